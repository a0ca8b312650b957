"""What makes up for what was lost: sweeps that ask Stripe, books that are rebuilt and compared, invariants that are counted."""

from __future__ import annotations

import logging
from datetime import datetime, timedelta

from django.db import connection
from django.db.models import Q

from billing import events, gateway, invoices, ledger, payments, payouts, standing, usage
from billing.invoices import open_case
from billing.models import BillingAccount, BillingCase, Invoice, OperatorAccount, StripeEvent, UsageQuarantine
from marketplace import outbox
from marketplace.models import OutboxMessage

log = logging.getLogger(__name__)

OVERLAP = timedelta(hours=2)
FIRST_LOOK = timedelta(days=3)
PROJECTION_LAG = timedelta(hours=1)


def sweep(now: datetime) -> dict[str, int]:
    """Every minute: messages that got lost, attempts that are due, dunning, operators that wait. Counts what it found."""
    found = {"mirrored": 0, "paid": 0, "dunned": standing.dun(now), "payouts": 0}
    waiting = Invoice.objects.filter(
        state=Invoice.State.OPEN, due_minor__gt=0, mirrored_at=None, finalized_at__lt=now - timedelta(minutes=5)
    )
    for invoice in waiting.order_by("id")[:200]:
        known = OutboxMessage.objects.filter(topic=invoices.MIRROR, key=str(invoice.pk), parked_at=None).exists()
        if not known:
            outbox.emit(invoices.MIRROR, key=str(invoice.pk), payload={"invoice": invoice.pk})
            found["mirrored"] += 1
    cut_off = Q(payments__state="pending", payments__created_at__lt=now - timedelta(minutes=15))
    to_pay = Invoice.objects.filter(Q(next_attempt_at__lte=now) | cut_off, state=Invoice.State.OPEN)
    for invoice in to_pay.order_by("id").distinct()[:50]:
        found["paid"] += payments.pay(invoice.pk, now=now)
    ready = OperatorAccount.objects.filter(transfers_enabled=True).values_list("organization_id", flat=True)
    for operator_id in ready:
        if any(amount > 0 for amount in payouts.unsettled(operator_id).values()):
            found["payouts"] += len(payouts.settle(operator_id, now=now))
    return found


def reconcile(now: datetime) -> dict[str, int]:
    """Hourly: ask Stripe for what we missed, try failed payouts again, rebuild the books, compare the mirror."""
    found = {
        "events": missed_events(now),
        "stale": refetch_stale(now),
        "payouts": payouts.retry_failed(),
        "ledger": check_ledger(now),
        "mirror": compare_mirror(now),
        "quarantined": report_quarantine(now),
    }
    log.info("reconciled: %s", found)
    return found


LOOKS_BACK = timedelta(days=35)  # in search of seconds that nobody recorded


def missed_events(now: datetime) -> int:
    """Keep every event since the last we have, with an overlap; returns how many were new."""
    newest = StripeEvent.objects.order_by("-event_created_at").values_list("event_created_at", flat=True).first()
    since = max(newest - OVERLAP, now - timedelta(days=29)) if newest is not None else now - FIRST_LOOK
    return sum(events.keep(event, now=now) for event in gateway.events_since(since))


def refetch_stale(now: datetime) -> int:
    """Ask again for open invoices and for operators that are not ready; returns how many were looked at."""
    stale = Invoice.objects.filter(state=Invoice.State.OPEN, stripe_invoice__isnull=False).order_by("id")
    looked = 0
    for stripe_invoice in stale.values_list("stripe_invoice", flat=True)[:500]:
        payments.sync_invoice(stripe_invoice or "", now=now)
        looked += 1
    asking = OperatorAccount.objects.filter(transfers_enabled=False, stripe_account__isnull=False)
    for account in asking.select_related("organization")[:200]:
        payouts.refresh_recipient(account.organization, now=now)
        looked += 1
    cardless = BillingAccount.objects.filter(stripe_customer__isnull=False, payment_method="")
    for buyer in cardless.select_related("organization").order_by("-id")[:200]:
        payments.refresh_card(buyer.organization, now=now)
        looked += 1
    return looked


def check_ledger(now: datetime) -> int:
    """Zero per currency, and projections equal to their postings; opens a case for each that is not. Returns the cases."""
    wrong = [f"the ledger sums to {total} in {currency}" for currency, total in ledger.trial_balance().items() if total]
    wrong += ledger.project(ledger.clock() - PROJECTION_LAG)
    for sentence in wrong:
        log.error("ledger: %s", sentence)
        open_case(BillingCase.Kind.LEDGER, sentence.split(":")[0][:80], sentence, now=now)
    return len(wrong)


def compare_mirror(now: datetime, since: datetime | None = None) -> int:
    """Stripe's invoices since `since` (3 days) against ours, both ways; opens a case for each difference, returns their number."""
    since = since or now - FIRST_LOOK
    ours = {
        invoice.stripe_invoice: invoice
        for invoice in Invoice.objects.filter(stripe_invoice__isnull=False, finalized_at__gte=since - OVERLAP)
    }
    wrong: list[tuple[str, str]] = []
    seen: set[str] = set()
    for remote in gateway.invoices_since(since):
        seen.add(remote.id)
        invoice = ours.get(remote.id)
        if invoice is None:
            if (
                remote.our_id
                and remote.status != "draft"
                and not Invoice.objects.filter(stripe_invoice=remote.id).exists()
            ):
                wrong.append((remote.our_id, f"{remote.id} at Stripe names {remote.our_id}, which does not name it"))
            continue
        if remote.status != "draft" and (remote.total, remote.currency) != (invoice.due_minor, invoice.currency):
            wrong.append((invoice.public_id, f"due {invoice.due_minor} {invoice.currency}, at Stripe {remote.total}"))
        if remote.status == "paid" and invoice.state != Invoice.State.PAID:
            payments.sync_invoice(remote.id, now=now)
        if invoice.state == Invoice.State.PAID and remote.status not in {"paid", "draft"} and invoice.due_minor:
            wrong.append((invoice.public_id, f"paid here, {remote.status} at Stripe ({remote.id})"))
    for subject, detail in wrong:
        log.error("mirror: %s: %s", subject, detail)
        open_case(BillingCase.Kind.MIRROR, subject, detail, now=now)
    return len(wrong)


def report_quarantine(now: datetime) -> int:
    """Open a case while usage lies in quarantine; returns how much does."""
    waiting = UsageQuarantine.objects.filter(settled_at=None).count()
    if waiting:
        open_case(BillingCase.Kind.USAGE, "quarantine", f"{waiting} usage events wait for a person", now=now)
    return waiting


def invariants() -> dict[str, int]:
    """What must be zero at any moment, counted by SQL over the whole database: see each key's query.

    `ledger` sums per currency; `invoice_totals` invoices whose lines do not sum to the total; `shares` lines whose parts do
    not; `prepaid` contracts that drew down more than was paid at signing; `usage_overlaps` records that overlap; `unfounded`
    paid-out lines of unpaid invoices; `overpaid` currencies in which more was paid out than collected, what operators owe back
    (carried negative) aside; `resales` sellers to whom the ledger owes something else than the lines of their buyers less the lines that
    credited them; `numbers` gaps in the invoice numbers; `payout_totals` payouts that are not the sum of their lines.
    """
    queries = {
        "ledger": "SELECT COUNT(*) FROM (SELECT a.currency FROM billing_posting p JOIN billing_ledgeraccount a"
        " ON a.id = p.account_id GROUP BY a.currency HAVING SUM(p.amount_minor) <> 0) x",
        "invoice_totals": "SELECT COUNT(*) FROM billing_invoice i WHERE i.total_minor <>"
        " (SELECT COALESCE(SUM(l.amount_minor), 0) FROM billing_invoiceline l WHERE l.invoice_id = i.id)",
        "shares": "SELECT COUNT(*) FROM billing_invoiceline WHERE operator_minor + platform_minor + seller_minor <> amount_minor"
        " AND kind NOT IN ('upfront', 'drawdown')",
        "prepaid": "SELECT COUNT(*) FROM (SELECT l.contract_id FROM billing_invoiceline l JOIN billing_invoice i"
        " ON i.id = l.invoice_id WHERE l.kind IN ('upfront', 'drawdown') AND i.state NOT IN ('draft', 'void')"
        " GROUP BY 1 HAVING SUM(l.amount_minor) < 0) x",
        "usage_overlaps": "SELECT COUNT(*) FROM (SELECT start_s < lag(end_s) OVER (PARTITION BY placement_id, meter,"
        " revision ORDER BY start_s) AS crossing FROM billing_usagerecord) x WHERE crossing",
        "unfounded": "SELECT COUNT(*) FROM billing_payoutline p JOIN billing_invoiceline l ON l.id = p.invoice_line_id"
        " JOIN billing_invoice i ON i.id = l.invoice_id WHERE i.state <> 'paid'",
        "overpaid": "SELECT COUNT(*) FROM (SELECT p.currency, SUM(p.amount_minor) AS sent FROM billing_payout p"
        " WHERE p.state = 'sent' GROUP BY 1) o WHERE o.sent > (SELECT COALESCE(SUM(i.due_minor), 0) FROM billing_invoice i"
        " WHERE i.state = 'paid' AND i.currency = o.currency) + (SELECT COALESCE(SUM(-x.open), 0) FROM (SELECT"
        " SUM(l.operator_minor) AS open FROM billing_invoiceline l JOIN billing_invoice i ON i.id = l.invoice_id"
        " LEFT JOIN billing_payoutline b ON b.invoice_line_id = l.id WHERE i.state = 'paid' AND b.id IS NULL"
        " AND i.currency = o.currency GROUP BY l.operator_id HAVING SUM(l.operator_minor) < 0) x)",
        "resales": "SELECT COUNT(*) FROM (SELECT x.organization_id FROM billing_invoiceline l JOIN billing_invoice i"
        " ON i.id = l.invoice_id JOIN marketplace_resale x ON x.id = l.resale_id WHERE i.state NOT IN ('draft', 'void')"
        " GROUP BY 1, i.currency HAVING SUM(l.seller_minor) <> (SELECT COALESCE(-SUM(p.amount_minor), 0) FROM billing_posting p"
        " JOIN billing_ledgeraccount a ON a.id = p.account_id WHERE a.code = 'resale' AND a.currency = i.currency"
        " AND a.organization_id = x.organization_id)) x",
        "numbers": "SELECT COALESCE(SUM(gap), 0) FROM (SELECT MAX(number) - COUNT(*) AS gap FROM billing_invoice"
        " WHERE number IS NOT NULL GROUP BY legal_entity) x",
        "payout_totals": "SELECT COUNT(*) FROM billing_payout p WHERE p.amount_minor <>"
        " (SELECT COALESCE(SUM(l.amount_minor), 0) FROM billing_payoutline l WHERE l.payout_id = p.id)",
    }
    found: dict[str, int] = {}
    with connection.cursor() as cursor:
        for name, query in queries.items():
            cursor.execute(query)
            row = cursor.fetchone()
            found[name] = int(row[0]) if row else 0
    return found


def unmetered(now: datetime) -> int:
    """Milli-GPU-seconds that the timeline bills and no record holds (or the reverse): 0 after every metering pass.

    Of placements that ended in the last LOOKS_BACK: a month is closed by then, and what was recorded before never changes.
    """
    return usage.drift(since=now - LOOKS_BACK, until=now)
