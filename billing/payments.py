"""Collecting: cards, the mirror of an invoice at Stripe, its payment, and what both make of the account's standing.

Every step reads our row, makes one call with a key that the row determines, and writes the answer by a guarded update:
a worker killed anywhere repeats the step with the same key. Our state only moves forward, by what Stripe says when asked.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from datetime import datetime, timedelta

from django.db import transaction

from billing import gateway, invoices, ledger
from billing.models import BillingAccount, BillingCase, Invoice, InvoiceLine, Payment
from billing.standing import refresh_standing
from marketplace import outbox
from marketplace.errors import MarketError
from marketplace.models import Membership, Organization
from marketplace.services import contracts

log = logging.getLogger(__name__)

SETTLE = "billing.settle_payouts"
# Retries after a declined payment, in hours after the attempt before; then the invoice waits for its customer.
RETRY_HOURS = (24, 72, 120)
KEY_LIFETIME = timedelta(hours=20)  # Stripe may forget a key after 24 h: look the object up instead


# --- cards


def start_card_setup(organization: Organization, *, success_url: str, cancel_url: str, now: datetime) -> str:
    """The URL of Stripe's page where the organization adds a card. MarketError `service_unavailable` without Stripe."""
    account = invoices.account_of(organization, now=now)
    key = f"setup-{account.pk}-{int(now.timestamp() * 1000)}"
    with gateway.person_waits():
        return gateway.once(
            key, "card_setup", organization.pk,
            lambda key: gateway.start_setup(
                customer=ensure_customer(account), currency=account.currency, success_url=success_url,
                cancel_url=cancel_url, key=key,
            ),
        )  # fmt: skip


def portal_url(organization: Organization, *, return_url: str, now: datetime) -> str:
    """The URL of Stripe's portal: cards, receipts. MarketError `service_unavailable` without Stripe."""
    account = invoices.account_of(organization, now=now)
    key = f"portal-{account.pk}-{int(now.timestamp() * 1000)}"
    with gateway.person_waits():
        return gateway.once(
            key, "portal", organization.pk,
            lambda key: gateway.portal(customer=ensure_customer(account), return_url=return_url, key=key),
        )  # fmt: skip


def ensure_customer(account: BillingAccount) -> str:
    """Stripe's id of the account's customer; made on first need, once."""
    if account.stripe_customer:
        return account.stripe_customer
    organization = account.organization
    owner = (
        Membership.objects.filter(organization=organization, role__in=("owner", "billing"))
        .select_related("user")
        .order_by("id")
        .first()
    )
    customer = gateway.once(
        f"customer-{account.pk}",
        "customer",
        organization.pk,
        lambda key: gateway.create_customer(
            name=organization.name, email=owner.user.email if owner else "", reference=account.public_id, key=key
        ),
    )
    BillingAccount.objects.filter(pk=account.pk, stripe_customer=None).update(stripe_customer=customer)
    account.stripe_customer = customer
    return customer


def refresh_card(organization: Organization, *, now: datetime) -> BillingAccount:
    """Ask Stripe for the organization's cards and keep the default one (the newest, where none is set).

    Called by the webhook, the return page and the sweep alike; a first card opens the account for business, and invoices
    that wait for a card are tried again.
    """
    account = invoices.account_of(organization, now=now)
    if not account.stripe_customer:
        return account
    cards = gateway.cards(account.stripe_customer)
    default = gateway.default_card(account.stripe_customer)
    newest = cards[0].id if cards else ""
    chosen = next((card for card in cards if card.id == default), cards[0] if cards else None)
    if chosen is not None and not any(card.id == default for card in cards):
        gateway.set_default_card(account.stripe_customer, newest, key=f"default-card-{account.pk}-{newest}")
    fresh = chosen is not None and chosen.id != account.payment_method
    BillingAccount.objects.filter(pk=account.pk).update(
        payment_method=chosen.id if chosen else "",
        card_brand=chosen.brand if chosen else "",
        card_last4=chosen.last4 if chosen else "",
        card_expires=chosen.expires if chosen else "",
    )
    account.refresh_from_db()
    if fresh:
        _collect_now(Invoice.objects.filter(account=account, state=Invoice.State.OPEN), now)
    refresh_standing(organization.pk, now=now)
    return account


def use_newest_card(organization: Organization, *, now: datetime) -> BillingAccount:
    """A card was just added on the setup page: make it the default, then as `refresh_card`."""
    account = invoices.account_of(organization, now=now)
    if account.stripe_customer:
        cards = gateway.cards(account.stripe_customer)
        if cards and cards[0].id != account.payment_method:
            key = f"default-card-{account.pk}-{cards[0].id}"
            gateway.set_default_card(account.stripe_customer, cards[0].id, key=key)
    return refresh_card(organization, now=now)


# --- the mirror


def mirror(invoice_id: int, *, now: datetime) -> None:
    """Bring an open invoice to Stripe, compare the totals, finalize it there, and pay it. Idempotent; see the module.

    Raises gateway.GatewayError where Stripe does not answer: the outbox repeats it.
    """
    invoice = Invoice.objects.select_related("account__organization").get(pk=invoice_id)
    if invoice.state != Invoice.State.OPEN or not invoice.due_minor:
        return
    if BillingCase.objects.filter(kind="mirror", subject=invoice.public_id, closed_at=None).exists():
        return  # a person looks at it
    remote = _remote_draft(invoice, now)
    if not Invoice.objects.filter(pk=invoice.pk, state=Invoice.State.OPEN).exists():
        if remote.status == "draft":
            gateway.delete_draft(remote.id)  # voided meanwhile
        return
    if remote.status == "draft":
        if remote.total != invoice.due_minor:
            remote = gateway.add_lines(remote.id, lines_for_stripe(invoice), key=f"invoice-{invoice.pk}-lines")
        if remote.total != invoice.due_minor or remote.currency != invoice.currency:
            _mismatch(invoice, remote, now)
            return
        remote = gateway.finalize_invoice(remote.id, key=f"invoice-{invoice.pk}-finalize")
    Invoice.objects.filter(pk=invoice.pk).update(mirrored_at=now, pay_url=remote.pay_url)
    tried = Payment.objects.filter(invoice=invoice)
    if remote.status == "open" and (not tried.exists() or tried.filter(state=Payment.State.PENDING).exists()):
        pay(invoice.pk, now=now)  # the first attempt, or one that was cut off before its answer
    else:
        sync_invoice(remote.id, now=now)


def _remote_draft(invoice: Invoice, now: datetime) -> gateway.RemoteInvoice:
    customer = ensure_customer(invoice.account)
    if invoice.stripe_invoice:
        return gateway.get_invoice(invoice.stripe_invoice)
    remote = None
    key = f"invoice-{invoice.pk}-create"
    stale = invoice.finalized_at is not None and now - invoice.finalized_at > KEY_LIFETIME
    if stale or gateway.burnt(key):
        remote = gateway.find_invoice(customer, invoice.public_id)
    if remote is None:
        remote = gateway.create_invoice(
            customer=customer,
            currency=invoice.currency,
            number=invoice.display_number,
            our_id=invoice.public_id,
            key=key,
        )
    Invoice.objects.filter(pk=invoice.pk, stripe_invoice=None).update(stripe_invoice=remote.id)
    # An idempotent replay answers with the invoice as it was: ask for what it is.
    return gateway.get_invoice(remote.id)


def lines_for_stripe(invoice: Invoice) -> list[tuple[str, int]]:
    """At most 250 (description, minor units) lines that sum to the amount due: ours, or one per contract where they are more."""
    rows = list(InvoiceLine.objects.filter(invoice=invoice).order_by("position"))
    lines = [(row.description, row.amount_minor) for row in rows]
    room = gateway.MAX_LINES - 1
    if len(lines) > room:
        sums: dict[int, int] = {}
        for row in rows:
            sums[row.contract_id] = sums.get(row.contract_id, 0) + row.amount_minor
        lines = [(f"Contract {pk}: see invoice {invoice.display_number}", amount) for pk, amount in sums.items()]
    if len(lines) > room:
        lines = [(f"GPU capacity: see invoice {invoice.display_number}", invoice.total_minor)]
    if invoice.credit_minor:
        text = "Credit of earlier invoices" if invoice.credit_minor > 0 else "Carried from earlier invoices"
        lines.append((text, -invoice.credit_minor))
    return lines


def _mismatch(invoice: Invoice, remote: gateway.RemoteInvoice, now: datetime) -> None:
    """Stripe's total is not ours: nothing is charged, the draft goes, a person looks."""
    detail = f"due {invoice.due_minor} {invoice.currency}, at Stripe {remote.total} {remote.currency} ({remote.id})"
    log.error("invoice %s: the totals differ: %s", invoice.public_id, detail)
    invoices.open_case(
        BillingCase.Kind.MIRROR, invoice.public_id, detail, now=now, organization_id=invoice.organization_id
    )
    invoices.park(invoice.account, f"{invoice.display_number}: {detail}", now=now)
    gateway.delete_draft(remote.id)


# --- paying


def pay(invoice_id: int, *, now: datetime) -> bool:
    """Charge the account's default card for an open, mirrored invoice; returns whether it is paid.

    The attempt is a row before it is a call. A decline schedules the next one and marks the account past due; a card that
    wants its owner leaves the invoice's `pay_url` for the e-mail and the page.
    """
    payment = _attempt(invoice_id, now)
    if payment is None:
        return False
    invoice = payment.invoice
    account = invoice.account
    assert invoice.stripe_invoice is not None
    key = f"invoice-{invoice.pk}-pay-{payment.attempt}"
    if gateway.burnt(key) and sync_invoice(invoice.stripe_invoice, now=now):
        return True
    try:
        gateway.pay_invoice(invoice.stripe_invoice, payment_method=account.payment_method, key=key)
    except gateway.Declined as error:
        _declined(payment, error, now)
        return False
    except gateway.Refused as error:
        if sync_invoice(invoice.stripe_invoice, now=now):
            return True  # paid meanwhile, on Stripe's page
        Payment.objects.filter(pk=payment.pk, state="pending").update(
            state=Payment.State.FAILED, failure_code="refused", settled_at=now
        )
        _retry_later(invoice, str(error), now)
        return False
    return sync_invoice(invoice.stripe_invoice, now=now)


def _attempt(invoice_id: int, now: datetime) -> Payment | None:
    """The pending attempt to repeat, or the next one; None where there is nothing to charge."""
    with transaction.atomic():
        invoice = (
            Invoice.objects.select_for_update(no_key=True, of=("self",))
            .select_related("account__organization")
            .get(pk=invoice_id)
        )
        if invoice.state != Invoice.State.OPEN or not invoice.stripe_invoice:
            return None
        if not invoice.account.payment_method:
            Invoice.objects.filter(pk=invoice.pk).update(last_error="no card", next_attempt_at=None)
            return None
        pending = Payment.objects.filter(invoice=invoice, state=Payment.State.PENDING).order_by("-attempt").first()
        if pending is not None:
            pending.invoice = invoice
            return pending
        attempt = invoice.pay_attempts + 1
        Invoice.objects.filter(pk=invoice.pk).update(pay_attempts=attempt, next_attempt_at=None)
        invoice.pay_attempts = attempt
        return Payment.objects.create(
            invoice=invoice,
            organization_id=invoice.organization_id,
            attempt=attempt,
            amount_minor=invoice.due_minor,
            currency=invoice.currency,
            created_at=now,
        )


def _declined(payment: Payment, error: gateway.Declined, now: datetime) -> None:
    state = Payment.State.REQUIRES_ACTION if error.requires_action else Payment.State.FAILED
    Payment.objects.filter(pk=payment.pk, state=Payment.State.PENDING).update(
        state=state, failure_code=error.code[:60], settled_at=now
    )
    _retry_later(payment.invoice, f"{error.code}: {error}", now, retry=not error.requires_action)


def _retry_later(invoice: Invoice, why: str, now: datetime, *, retry: bool = True) -> None:
    tried = invoice.pay_attempts
    if invoice.kind == Invoice.Kind.UPFRONT:  # its contract waits an hour, and is cancelled then: no debt comes of it
        Invoice.objects.filter(pk=invoice.pk, state=Invoice.State.OPEN).update(last_error=why[:200])
        return
    again = now + timedelta(hours=RETRY_HOURS[tried - 1]) if retry and 0 < tried <= len(RETRY_HOURS) else None
    Invoice.objects.filter(pk=invoice.pk, state=Invoice.State.OPEN).update(next_attempt_at=again, last_error=why[:200])
    BillingAccount.objects.filter(pk=invoice.account_id, dunning="none").update(dunning=BillingAccount.Dunning.PAST_DUE)
    refresh_standing(invoice.organization_id, now=now)


def _collect_now(waiting: Iterable[Invoice], now: datetime) -> None:
    for invoice in waiting:
        pay(invoice.pk, now=now)


def pay_again(invoice: Invoice, *, now: datetime) -> bool:
    """The customer asks to be charged again now (the page's button). MarketError names what is in the way."""
    if invoice.state != Invoice.State.OPEN:
        raise MarketError("illegal_transition", f"The invoice is {invoice.state}; only an open one can be paid.")
    if not invoice.due_minor:
        raise MarketError("illegal_transition", "The amount is too small to charge; the next invoice carries it.")
    if not invoice.account.payment_method:
        raise MarketError("card_required", "Add a card on the page Payment methods, then pay.")
    with gateway.person_waits():
        paid = pay(invoice.pk, now=now)
    if not paid:
        invoice.refresh_from_db()
        raise MarketError("payment_failed", invoice.last_error, extra={"pay_url": invoice.pay_url})
    return paid


def sync_invoice(stripe_invoice: str, *, now: datetime) -> bool:
    """Ask Stripe for the invoice and move ours forward; returns whether ours is paid. Safe in any order, any number of times."""
    invoice = Invoice.objects.filter(stripe_invoice=stripe_invoice).select_related("account").first()
    if invoice is None:
        return False
    if invoice.state == Invoice.State.PAID:
        return True
    remote = gateway.get_invoice(stripe_invoice)
    if remote.status == "paid":
        if remote.amount_paid != invoice.due_minor:
            detail = f"paid {remote.amount_paid} of {invoice.due_minor} {invoice.currency} ({remote.id})"
            invoices.open_case(
                BillingCase.Kind.MIRROR, invoice.public_id, detail, now=now, organization_id=invoice.organization_id
            )
            return False
        intents = [payment for payment in gateway.payments_of(stripe_invoice) if payment.status == "succeeded"]
        mark_paid(invoice.pk, intents[0].payment_intent if intents else "", now=now)
        return True
    if remote.status == "void" and invoice.kind == Invoice.Kind.UPFRONT:
        invoices.mark_void(invoice.pk, now=now)
        return False
    if remote.status in {"void", "uncollectible"} and invoice.state == Invoice.State.OPEN:
        detail = f"is {remote.status} at Stripe, open here ({remote.id})"
        invoices.open_case(
            BillingCase.Kind.MIRROR, invoice.public_id, detail, now=now, organization_id=invoice.organization_id
        )
    return False


def mark_paid(invoice_id: int, payment_intent: str, *, now: datetime) -> bool:
    """Our invoice is paid: state, payment, books and the operators' payouts in one transaction; False where it was before."""
    with transaction.atomic():
        moved = Invoice.objects.filter(
            pk=invoice_id, state__in=(Invoice.State.OPEN, Invoice.State.UNCOLLECTIBLE)
        ).update(state=Invoice.State.PAID, paid_at=now, next_attempt_at=None, last_error="")
        if not moved:
            return False
        invoice = Invoice.objects.select_related("account").get(pk=invoice_id)
        lines = list(InvoiceLine.objects.filter(invoice=invoice))
        ledger.book(invoices.collect_booking(invoice, lines, now))
        lines += invoices.settle_carried(invoice, now)
        payment = Payment.objects.filter(invoice=invoice).exclude(state="succeeded").order_by("-attempt").first()
        if payment is None:
            payment = Payment(
                invoice=invoice, organization_id=invoice.organization_id, attempt=invoice.pay_attempts + 1,
                amount_minor=invoice.due_minor, currency=invoice.currency, created_at=now,
            )  # fmt: skip
        payment.state, payment.settled_at, payment.failure_code = Payment.State.SUCCEEDED, now, ""
        payment.stripe_payment_intent = payment_intent or None
        payment.save()
        owed = Invoice.objects.filter(account_id=invoice.account_id, state=Invoice.State.OPEN, pay_attempts__gt=0)
        if not owed.exclude(kind=Invoice.Kind.UPFRONT).exists():
            BillingAccount.objects.filter(pk=invoice.account_id).update(dunning=BillingAccount.Dunning.NONE)
        for line in lines:
            if line.kind == InvoiceLine.Kind.UPFRONT:
                contracts.confirm_payment(line.contract_id, now=now)
        for operator_id in sorted({line.operator_id for line in lines}):
            outbox.emit(SETTLE, key=str(operator_id), payload={"operator": operator_id})
    refresh_standing(invoice.organization_id, now=now)
    return True
