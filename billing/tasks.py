"""Thin tasks and outbox handlers: ids in, one domain call. All idempotent; beat's names stand in the settings."""

from __future__ import annotations

import logging
from datetime import date, datetime
from typing import Any

from celery import shared_task
from django.db.models import F
from django.utils import timezone

from billing import budgets, events, invoices, payments, payouts, standing, upfront, usage, webhooks
from billing import reconcile as reconciling
from billing.core.money import format_minor
from billing.models import BillingAccount, Invoice
from marketplace.models import Contract, Organization
from marketplace.outbox import handler
from marketplace.services import contracts, mails, screening, spending

log = logging.getLogger(__name__)

CLOSE_BATCH = 500


@shared_task(name="billing.tasks.meter")
def meter() -> int:
    """Close usage intervals that are due."""
    return usage.meter_all(timezone.now())


@shared_task(name="billing.tasks.measure_budgets")
def measure_budgets() -> int:
    """What the month has come to, where a budget asks; steps reached are told."""
    return budgets.measure_all(timezone.now())


@shared_task(name="billing.tasks.sweep")
def sweep() -> dict[str, int]:
    return reconciling.sweep(timezone.now())


@shared_task(name="billing.tasks.reconcile")
def reconcile() -> dict[str, int]:
    return reconciling.reconcile(timezone.now())


@shared_task(name="billing.tasks.close_month", time_limit=900, soft_time_limit=880)
def close_month(through: str) -> int:
    """Close the period of every open account through the ISO instant `through`; repeating it doubles nothing."""
    return close_all(datetime.fromisoformat(through), now=timezone.now())


def close_all(through: datetime, *, now: datetime, share: tuple[int, int] = (0, 1)) -> int:
    """Close accounts in batches of CLOSE_BATCH, each its own transaction; returns the invoices made.

    `share` (number, of) lets several workers divide the accounts by id; a batch that another worker holds is "busy".
    """
    made, last = 0, 0
    number, of = share
    while True:
        accounts = BillingAccount.objects.filter(state=BillingAccount.State.OPEN, pk__gt=last)
        if of > 1:
            accounts = accounts.annotate(turn=F("pk") % of).filter(turn=number)
        batch = list(accounts.select_related("organization").order_by("pk")[:CLOSE_BATCH])
        if not batch:
            return made
        made += invoices.close_many(batch, through, Invoice.Kind.PERIOD, now=now)
        last = batch[-1].pk


@handler(invoices.MIRROR)
def mirror_invoice(payload: dict[str, Any]) -> None:
    payments.mirror(payload["invoice"], now=timezone.now())


@handler(payments.SETTLE)
def settle_payouts(payload: dict[str, Any]) -> None:
    payouts.settle(payload["operator"], now=timezone.now())


@handler(screening.OPERATOR_CLEAR)
def operator_clear(payload: dict[str, Any]) -> None:
    payouts.released(payload["operator"], now=timezone.now())


@handler(payouts.SEND)
def send_payout(payload: dict[str, Any]) -> None:
    payouts.send(payload["payout"], now=timezone.now())


@handler(events.HANDLE)
def handle_event(payload: dict[str, Any]) -> None:
    webhooks.handle(payload["event"], now=timezone.now())


@handler("billing.open_account")
def open_account(payload: dict[str, Any]) -> None:
    """A new organization gets its billing account."""
    invoices.account_of(Organization.objects.get(pk=payload["organization"]), now=timezone.now())


@handler("billing.contract_accepted")
def contract_accepted(payload: dict[str, Any]) -> None:
    """A contract needs the customer's billing account, should it not be there yet, and what is due at signing is collected."""
    contract = Contract.objects.select_related("organization").get(pk=payload["contract"])
    invoices.account_of(contract.organization, now=timezone.now())
    if contract.state == Contract.State.PENDING_PAYMENT:
        upfront.issue(contract.pk, now=timezone.now())


@handler(contracts.CANCELLED)
def contract_cancelled(payload: dict[str, Any]) -> None:
    upfront.withdraw(payload["contract"], now=timezone.now())


@handler(standing.DEFAULT)
def default_contracts(payload: dict[str, Any]) -> None:
    standing.default_contracts(payload["invoice"], now=timezone.now())


@handler(spending.ALERT)
def budget_alert(payload: dict[str, Any]) -> None:
    spending.alert(payload["organization"], date.fromisoformat(payload["month"]), payload["percent"])


@handler("billing.notify")
def notify(payload: dict[str, Any]) -> None:
    """A reminder of an unpaid invoice to the organization's owners and billing people."""
    invoice = Invoice.objects.select_related("organization").get(pk=payload["invoice"])
    if invoice.state != Invoice.State.OPEN:
        return
    mails.send(mails.addresses(invoice.organization_id, ("owner", "billing")), reminder(invoice))


def reminder(invoice: Invoice) -> mails.Letter:
    """Of an unpaid invoice: what is owed and why it was not collected. Where the bank asks its owner, the button leads there."""
    amount = format_minor(invoice.due_minor, invoice.currency)
    why = invoice.last_error or "no payment has arrived"
    return mails.Letter(
        f"Invoice {invoice.display_number} of {amount} is unpaid",
        (f"Invoice {invoice.display_number} of {amount} could not be collected: {why}.",),
        (("Invoice", invoice.display_number), ("Due", amount)),
        invoice.pay_url or f"/invoices/{invoice.public_id}",
        "Pay it",
        f"You get this as one of the people of {invoice.organization.name} who answer for its invoices.",
    )
