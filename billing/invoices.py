"""Closing a period: draft, number, book, and leave the mirroring to the outbox. Cases and parked accounts.

Preview and close rate by the same function (billing.drafts). A final invoice never changes (trigger): what comes late is an
adjustment on the next one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime

from django.conf import settings
from django.db import connection, transaction
from django.db.models.functions import Now

from billing import drafts, ledger, usage
from billing.core import metering, money
from billing.drafts import Draft
from billing.models import BillingAccount, BillingCase, Invoice, InvoiceLine, UsageRecord
from marketplace import outbox
from marketplace.errors import MarketError
from marketplace.locks import Lock, acquire
from marketplace.models import Organization, OutboxMessage

MIRROR = "billing.mirror_invoice"
MAX_LINES_OF_INVOICE = 10_000
MAX_TIMES_THE_USUAL = 50
UNUSUAL_FROM_MINOR = 10_000_000


def account_of(organization: Organization, *, now: datetime) -> BillingAccount:
    """The organization's billing account; opened on first use in its currency."""
    account, _ = BillingAccount.objects.get_or_create(
        organization=organization, defaults={"currency": organization.currency, "created_at": now}
    )
    return account


def preview(organization: Organization, now: datetime) -> Draft:
    """What an invoice closed now would say, running seconds included: the lines that `close_period` would make.

    Writes no usage. `draft.error` says why the account cannot be rated, where that is so.
    """
    account = account_of(organization, now=now)
    through = metering.instant(metering.floor_second(now))
    pending = usage.pending(organization.pk, until=now)
    starts = drafts.starts([account], through, pending=pending)
    if starts[account.pk] >= through:
        return Draft(account, through, through)
    return drafts.rate([account], starts, through, pending=pending)[0]


def close_period(
    organization: Organization, through: datetime, kind: str = Invoice.Kind.INTERIM, *, now: datetime
) -> Invoice | None:
    """Bill an organization through the past instant `through` (floored to a second); finalize; have it collected.

    Returns the invoice, or None where nothing is due. Repeating it returns the same invoice. MarketError
    `account_parked` where a person must look first, `conflict` where `through` lies before what was billed already.
    """
    through = metering.instant(metering.floor_second(through))
    if through > now:
        raise MarketError("invalid_request", f"A period is closed through the past; {through:%F %T} UTC is to come.")
    account = account_of(organization, now=now)
    close_many([account], through, kind, now=now)
    account.refresh_from_db()
    if account.state == BillingAccount.State.PARKED:
        raise MarketError("account_parked", f"The billing account of {organization} is parked; see its open case.")
    invoice = Invoice.objects.filter(account=account, period_end=through, kind=kind).first()
    if invoice is None and account.billed_through is not None and account.billed_through > through:
        raise MarketError("conflict", f"Already billed through {account.billed_through:%F %T} UTC.")
    return invoice


def close_many(accounts: Sequence[BillingAccount], through: datetime, kind: str, *, now: datetime) -> int:
    """Close one period of many accounts in one transaction; returns the number of invoices made.

    Usage is metered through the edge first, per account, in transactions of its own. What cannot be rated parks its
    account and opens a case; the others go on.
    """
    for organization_id in usage.owing([account.organization_id for account in accounts]):
        usage.meter(organization_id, through=through, now=now)
    with transaction.atomic():
        acquire(*((Lock.WALLET, account.organization_id) for account in accounts), timeout_ms=10_000)
        rows = BillingAccount.objects.select_for_update(no_key=True).filter(pk__in=[a.pk for a in accounts])
        live = list(rows.filter(state=BillingAccount.State.OPEN).select_related("organization").order_by("pk"))
        starts = drafts.starts(live, through)
        pending = [account for account in live if starts[account.pk] < through]
        rated = drafts.rate(pending, starts, through)
        good = [draft for draft in rated if not _park_if_odd(draft, now)]
        invoices = store(good, kind, now)
        BillingAccount.objects.filter(pk__in=[draft.account.pk for draft in good]).update(
            billed_through=through,
            usage_cutoff=Now(),  # the database's clock, as usage's `received_at`
        )
        finalize(invoices, now)
    return len(invoices)


# --- storing and finalizing


def _park_if_odd(draft: Draft, now: datetime) -> bool:
    """Park an account whose draft failed or is out of all proportion; the run goes on without it."""
    reason = draft.error
    if not reason and len(draft.lines) > MAX_LINES_OF_INVOICE:
        reason = f"{len(draft.lines)} lines, more than {MAX_LINES_OF_INVOICE}"
    if not reason and abs(draft.total_minor) >= UNUSUAL_FROM_MINOR:
        usual = list(Invoice.objects.filter(account=draft.account).values_list("total_minor", flat=True)[:6])
        average = sum(map(abs, usual)) // len(usual) if usual else 0
        if average and abs(draft.total_minor) > MAX_TIMES_THE_USUAL * average:
            reason = f"a total of {draft.total_minor}, against {average} on average before"
    if not reason:
        return False
    park(draft.account, f"closing through {draft.end:%F %T}: {reason}", now=now)
    return True


def park(account: BillingAccount, detail: str, *, now: datetime) -> None:
    """Stop billing the account until a person has looked, visibly: an open case says why."""
    BillingAccount.objects.filter(pk=account.pk).update(state=BillingAccount.State.PARKED)
    open_case(BillingCase.Kind.PARKED, account.public_id, detail, now=now, organization_id=account.organization_id)


def unpark(account: BillingAccount, *, now: datetime, closed_by: str) -> None:
    """A person has looked: close the case and bill again."""
    with transaction.atomic():
        BillingAccount.objects.filter(pk=account.pk, state="parked").update(state=BillingAccount.State.OPEN)
        BillingCase.objects.filter(subject=account.public_id, closed_at=None).update(closed_at=now, closed_by=closed_by)


def open_case(kind: str, subject: str, detail: str, *, now: datetime, organization_id: int | None = None) -> None:
    """Open a case once per (kind, subject); while it is open, the first detail stands."""
    BillingCase.objects.bulk_create(
        [BillingCase(kind=kind, subject=subject, detail=detail[:2000], opened_at=now, organization_id=organization_id)],
        ignore_conflicts=True,
    )


def close_case(case: BillingCase, *, now: datetime, closed_by: str) -> None:
    """A person has looked at it. The case of a parked account bills it again. MarketError where it is closed already."""
    if case.kind == BillingCase.Kind.PARKED and case.organization_id is not None:
        account = BillingAccount.objects.filter(organization_id=case.organization_id).first()
        if account is not None and account.public_id == case.subject:
            unpark(account, now=now, closed_by=closed_by)
            return
    closed = BillingCase.objects.filter(pk=case.pk, closed_at=None).update(closed_at=now, closed_by=closed_by[:120])
    if not closed:
        raise MarketError("illegal_transition", f"Case {case.public_id} is closed already.")


def store(rated: Sequence[Draft], kind: str, now: datetime) -> list[Invoice]:
    """Insert drafts with lines as draft invoices; accounts that owe nothing get none."""
    charged = [draft for draft in rated if draft.lines]
    invoices = Invoice.objects.bulk_create(
        [
            Invoice(
                account=draft.account,
                organization_id=draft.account.organization_id,
                kind=kind,
                legal_entity=settings.LEGAL_ENTITY,
                period_start=draft.start,
                period_end=draft.end,
                currency=draft.account.currency,
                total_minor=draft.total_minor,
                buyer={"name": draft.account.organization.name, "country": draft.account.organization.country},
                created_at=now,
            )
            for draft in charged
        ]
    )
    InvoiceLine.objects.bulk_create(
        [
            InvoiceLine(
                invoice=invoice,
                position=position,
                contract=row.contract,
                operator_id=row.contract.operator_id,
                kind=row.line.kind.value,
                adjustment=row.adjustment,
                price_version_id=row.line.price.version,
                price_millionths=row.line.price.millionths,
                month_s=row.month_s,
                start_s=row.line.span.start,
                end_s=row.line.span.end,
                quantity=row.line.quantity,
                amount_minor=row.line.amount,
                operator_minor=row.operator_minor,
                platform_minor=row.platform_minor,
                seller_minor=row.seller_minor,
                resale=row.resale,
                description=row.description[:200],
            )
            for invoice, draft in zip(invoices, charged, strict=True)
            for position, row in enumerate(draft.lines, start=1)
        ],
        batch_size=2000,
    )
    return invoices


def finalize(invoices: Sequence[Invoice], now: datetime) -> None:
    """Number, book and open the drafts, and leave a message that mirrors each to Stripe; all in the running transaction."""
    if not invoices:
        return
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO billing_invoicecounter AS c (legal_entity, last_number) VALUES (%s, %s) ON CONFLICT"
            " (legal_entity) DO UPDATE SET last_number = c.last_number + EXCLUDED.last_number RETURNING last_number",
            [settings.LEGAL_ENTITY, len(invoices)],
        )
        row = cursor.fetchone()
    assert row is not None
    carried = _carried(invoices)
    for number, invoice in enumerate(invoices, start=row[0] - len(invoices) + 1):
        invoice.number = number
        invoice.finalized_at = now
        owed = invoice.total_minor + carried.get(invoice.organization_id, 0)
        small = 0 < owed < money.MINIMUM_CHARGE.get(invoice.currency, 0)
        invoice.due_minor = 0 if small else max(0, owed)
        invoice.credit_minor = invoice.total_minor - invoice.due_minor if invoice.total_minor >= 0 else 0
        # What is too small to charge stays open with nothing due: the next invoice carries and settles it.
        invoice.state = Invoice.State.OPEN if invoice.due_minor or small else Invoice.State.PAID
        invoice.paid_at = None if invoice.state == Invoice.State.OPEN else now
    _write_final(invoices, now)
    lines: dict[int, list[InvoiceLine]] = defaultdict(list)
    for line in InvoiceLine.objects.filter(invoice__in=invoices):
        lines[line.invoice_id].append(line)
    ledger.book_many([finalize_booking(invoice, lines[invoice.pk]) for invoice in invoices])
    settled = [invoice for invoice in invoices if invoice.state == Invoice.State.PAID]
    ledger.book_many([collect_booking(invoice, lines[invoice.pk], now) for invoice in settled])
    for invoice in settled:
        settle_carried(invoice, now)
    due = [invoice.pk for invoice in invoices if invoice.due_minor]
    OutboxMessage.objects.bulk_create(
        [OutboxMessage(topic=MIRROR, key=str(pk), payload={"invoice": pk}, available_at=now) for pk in due]
    )
    if due:
        transaction.on_commit(lambda: outbox.nudge(MIRROR), robust=True)


def _write_final(invoices: Sequence[Invoice], now: datetime) -> None:
    """Write what `finalize` decided, in one statement however many invoices there are."""
    with connection.cursor() as cursor:
        cursor.execute(
            "UPDATE billing_invoice i SET number = f.number, finalized_at = %s, credit_minor = f.credit_minor,"
            " due_minor = f.due_minor, state = f.state, paid_at = CASE WHEN f.state = 'paid' THEN %s::timestamptz END"
            " FROM unnest(%s::bigint[], %s::bigint[], %s::bigint[], %s::bigint[], %s::text[])"
            " AS f(id, number, credit_minor, due_minor, state) WHERE i.id = f.id AND i.state = 'draft'",
            [
                now,
                now,
                [invoice.pk for invoice in invoices],
                [invoice.number for invoice in invoices],
                [invoice.credit_minor for invoice in invoices],
                [invoice.due_minor for invoice in invoices],
                [str(invoice.state) for invoice in invoices],
            ],
        )
        if cursor.rowcount != len(invoices):
            raise RuntimeError(f"{len(invoices)} drafts were to be finalized, {cursor.rowcount} were")


def _carried(invoices: Sequence[Invoice]) -> dict[int, int]:
    """What earlier invoices left on the organizations' receivable beyond what is being collected, in minor units.

    Negative: a credit. Positive: amounts too small to charge.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT a.organization_id, SUM(p.amount_minor) - COALESCE((SELECT SUM(i.due_minor) FROM billing_invoice i"
            " WHERE i.organization_id = a.organization_id AND i.state IN ('open', 'uncollectible')), 0)"
            " FROM billing_ledgeraccount a JOIN billing_posting p ON p.account_id = a.id"
            " WHERE a.code = 'receivable' AND a.organization_id = ANY(%s) GROUP BY 1",
            [[invoice.organization_id for invoice in invoices]],
        )
        return {organization: int(amount) for organization, amount in cursor.fetchall()}


def settle_carried(invoice: Invoice, now: datetime) -> list[InvoiceLine]:
    """The invoice is paid, and with it the earlier ones that were too small to charge; returns their lines."""
    small = Invoice.objects.filter(
        account_id=invoice.account_id, state=Invoice.State.OPEN, due_minor=0, number__lt=invoice.number
    )
    lines: list[InvoiceLine] = []
    for each in small.order_by("number"):
        if Invoice.objects.filter(pk=each.pk, state=Invoice.State.OPEN).update(state=Invoice.State.PAID, paid_at=now):
            mine = list(InvoiceLine.objects.filter(invoice=each))
            ledger.book(collect_booking(each, mine, now))
            lines += mine
    return lines


def finalize_booking(invoice: Invoice, lines: Iterable[InvoiceLine]) -> ledger.Booking:
    """The customer owes the total; operators' shares accrue until it is paid; the fee is ours. What others sold on to him is due to
    them (`resale`) until an invoice of their own credits it. What is paid at signing is the
    customer's own until the commitment draws it down.
    """
    entries = [
        ledger.Entry(ledger.Code.RECEIVABLE, invoice.organization_id, invoice.currency, invoice.total_minor),
    ]
    for line in lines:
        if line.seller_minor and line.resale is not None:
            seller = line.resale.organization_id
            entries.append(ledger.Entry(ledger.Code.RESALE, seller, invoice.currency, -line.seller_minor))
        if line.kind in InvoiceLine.HELD:
            held = ledger.Entry(ledger.Code.PREPAID, invoice.organization_id, invoice.currency, -line.amount_minor)
            entries.append(held)
        entries.append(
            ledger.Entry(ledger.Code.OPERATOR_ACCRUED, line.operator_id, invoice.currency, -line.operator_minor)
        )
        entries.append(ledger.Entry(ledger.Code.PLATFORM_FEE, None, invoice.currency, -line.platform_minor))
    return ledger.Booking(
        f"invoice-{invoice.pk}-finalized", "invoice", invoice.public_id, invoice.finalized_at or invoice.created_at,
        tuple(entries),
    )  # fmt: skip


def mark_void(invoice_id: int, *, now: datetime) -> bool:
    """An open invoice that nobody owes any more: its state, and its booking taken back. False where it is not open."""
    with transaction.atomic():
        moved = Invoice.objects.filter(pk=invoice_id, state=Invoice.State.OPEN).update(
            state=Invoice.State.VOID, next_attempt_at=None
        )
        if not moved:
            return False
        invoice = Invoice.objects.get(pk=invoice_id)
        booked = finalize_booking(invoice, list(InvoiceLine.objects.filter(invoice=invoice)))
        back = tuple(replace(entry, amount=-entry.amount) for entry in booked.entries)
        ledger.book(ledger.Booking(f"invoice-{invoice.pk}-void", "void", invoice.public_id, now, back))
    return True


def collect_booking(invoice: Invoice, lines: Iterable[InvoiceLine], at: datetime) -> ledger.Booking:
    """The amount due lies at Stripe; what accrued to the operators is now payable to them."""
    entries = [
        ledger.Entry(ledger.Code.STRIPE_CLEARING, None, invoice.currency, invoice.due_minor),
        ledger.Entry(ledger.Code.RECEIVABLE, invoice.organization_id, invoice.currency, -invoice.due_minor),
    ]
    for line in lines:
        entries += [
            ledger.Entry(ledger.Code.OPERATOR_ACCRUED, line.operator_id, invoice.currency, line.operator_minor),
            ledger.Entry(ledger.Code.OPERATOR_PAYABLE, line.operator_id, invoice.currency, -line.operator_minor),
        ]
    return ledger.Booking(f"invoice-{invoice.pk}-paid", "payment", invoice.public_id, at, tuple(entries))


def records_of(line: InvoiceLine) -> list[UsageRecord]:
    """The usage records behind a line, highest revisions, by placement and start: what the customer checks it against.

    None behind what is paid at signing, drawn down or credited.
    """
    if line.kind in {*InvoiceLine.HELD, InvoiceLine.Kind.RESALE}:
        return []
    records = (
        UsageRecord.objects.filter(
            contract_id=line.contract_id, meter=line.meter, start_s__lt=line.end_s, end_s__gt=line.start_s
        )
        .select_related("placement")
        .order_by("placement_id", "start_s", "-revision")
        .distinct("placement_id", "start_s")
    )
    if line.kind == InvoiceLine.Kind.USAGE:
        records = records.filter(price_version_id=line.price_version_id)
    return list(records)
