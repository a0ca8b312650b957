"""What is due at signing: an invoice of its own, collected at once; the contract is active when it is paid.

What is paid lies in the customer's prepaid account until the commitment draws it down (billing.commitments). A contract that
is cancelled before has its invoice voided; where the payment was faster, the money comes back as credit on the next invoice.
"""

from __future__ import annotations

import logging
from datetime import datetime

from django.db import transaction

from billing import drafts, gateway, invoices, payments, usage
from billing.core import metering, rating
from billing.core.metering import Interval
from billing.core.rating import LineKind
from billing.draft_lines import DraftLine
from billing.models import BillingAccount, Invoice, InvoiceLine
from marketplace.locks import Lock, acquire
from marketplace.models import Contract
from marketplace.services import contracts

log = logging.getLogger(__name__)


def issue(contract_id: int, *, now: datetime) -> Invoice | None:
    """Make, number and book the invoice of what is due at signing, once; the outbox has it collected.

    None where nothing is due any more. An invoice that credit covers activates the contract here.
    """
    contract = Contract.objects.select_related("organization", "gpu_model").get(pk=contract_id)
    account = invoices.account_of(contract.organization, now=now)
    with transaction.atomic():
        acquire((Lock.WALLET, contract.organization_id))
        known = _invoice_of(contract_id)
        contract.refresh_from_db()
        if known is not None or contract.state != Contract.State.PENDING_PAYMENT or contract.ends_at is None:
            return known
        account.refresh_from_db()
        if account.state != BillingAccount.State.OPEN:
            log.warning("contract %s: the account is %s, nothing is invoiced", contract.public_id, account.state)
            return None
        first = usage.price_versions(contract)[0]
        span = metering.interval(contract.starts_at, contract.ends_at)
        price = rating.Price(first.pk, first.millionths)
        line = rating.Line(contract.pk, LineKind.UPFRONT, "gpu", price, span, 0, contract.upfront_minor)
        draft = drafts.Draft(account, metering.instant(span.start), metering.instant(span.end))
        draft.lines.append(DraftLine(line, contract, _month(span), False, 0, 0))
        (invoice,) = invoices.store([draft], Invoice.Kind.UPFRONT, now)
        invoices.finalize([invoice], now)
        if invoice.state == Invoice.State.PAID or not invoice.due_minor:  # by credit, or too little to charge alone
            contracts.confirm_payment(contract_id, now=now)
    return invoice


def _month(span: Interval) -> int:
    return rating.month_of(span.start).start


def _invoice_of(contract_id: int) -> Invoice | None:
    lines = InvoiceLine.objects.filter(contract_id=contract_id, kind=InvoiceLine.Kind.UPFRONT)
    line = lines.select_related("invoice").first()
    return None if line is None else line.invoice


def withdraw(contract_id: int, *, now: datetime) -> None:
    """The contract was cancelled: its invoice is void, here and at Stripe, unless it was paid before. Idempotent.

    Raises gateway.GatewayError where Stripe does not answer: the outbox repeats it.
    """
    invoice = _invoice_of(contract_id)
    if invoice is None or invoice.state != Invoice.State.OPEN:
        return
    if not invoice.stripe_invoice:
        invoices.mark_void(invoice.pk, now=now)  # whoever is mirroring it looks again before it charges
        return
    remote = gateway.get_invoice(invoice.stripe_invoice)
    if remote.status == "draft":
        gateway.delete_draft(remote.id)
        invoices.mark_void(invoice.pk, now=now)
        return
    if remote.status == "open":
        gateway.void_invoice(remote.id, key=f"invoice-{invoice.pk}-void")
    payments.sync_invoice(remote.id, now=now)
