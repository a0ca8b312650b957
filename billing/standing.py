"""What an account's card, debts and overdue invoices make of its standing, and the steps that follow an unpaid invoice."""

from datetime import datetime, timedelta

from django.db import transaction
from django.db.models import Q

from billing import ledger
from billing.models import BillingAccount, DunningStep, Invoice
from marketplace import outbox
from marketplace.locks import Lock, acquire
from marketplace.models import BillingStanding
from marketplace.services import accounts, contracts, terms

# What happens to an unpaid invoice, in days after it was issued. Each step is taken once (DunningStep).
DUNNING = ((3, "notify"), (7, "notify"), (14, "suspend"), (terms.DEFAULT_AFTER_DAYS, "default"))
DEFAULT = "billing.default_contracts"


def refresh_standing(organization_id: int, *, now: datetime) -> None:
    """Tell the market what the organization may do: from its card, its dunning state and what it owes."""
    account = BillingAccount.objects.filter(organization_id=organization_id).first()
    if account is None:
        return
    if account.dunning == BillingAccount.Dunning.SUSPENDED:
        state = BillingStanding.State.SUSPENDED
    elif not account.payment_method:
        state = BillingStanding.State.NO_CARD
    elif account.dunning == BillingAccount.Dunning.PAST_DUE:
        state = BillingStanding.State.PAST_DUE
    else:
        state = BillingStanding.State.GOOD
    owed = ledger.balance(ledger.Code.RECEIVABLE, account.currency, organization_id)
    accounts.set_billing_standing(
        organization_id, state=state, available_minor=account.credit_limit_minor - owed, now=now
    )


def dun(now: datetime) -> int:
    """Take the dunning steps that are due for unpaid invoices, each once; returns how many were taken."""
    taken = 0
    late = Invoice.objects.filter(
        state=Invoice.State.OPEN, due_minor__gt=0, finalized_at__lte=now - timedelta(days=DUNNING[0][0])
    ).filter(Q(pay_attempts__gt=0) | Q(account__payment_method=""))
    late = late.exclude(
        kind=Invoice.Kind.UPFRONT
    )  # what is due at signing is no debt: its contract is cancelled instead
    for invoice in late.order_by("id")[:500]:
        assert invoice.finalized_at is not None
        for day, action in DUNNING:
            if now >= invoice.finalized_at + timedelta(days=day):
                taken += _dunning_step(invoice, day, action, now)
    return taken


def _dunning_step(invoice: Invoice, day: int, action: str, now: datetime) -> bool:
    with transaction.atomic():
        acquire((Lock.WALLET, invoice.organization_id))
        if not Invoice.objects.filter(pk=invoice.pk, state=Invoice.State.OPEN).exists():
            return False  # paid meanwhile
        _, fresh = DunningStep.objects.get_or_create(
            invoice=invoice, day=day, action=action, defaults={"taken_at": now}
        )
        if not fresh:
            return False
        if action == "suspend":
            BillingAccount.objects.filter(pk=invoice.account_id).update(dunning=BillingAccount.Dunning.SUSPENDED)
        elif action == "default":
            outbox.emit(DEFAULT, key=str(invoice.pk), payload={"invoice": invoice.pk})
        else:
            outbox.emit("billing.notify", payload={"invoice": invoice.pk, "day": day})
    if action == "suspend":
        refresh_standing(invoice.organization_id, now=now)
    return True


def default_contracts(invoice_id: int, *, now: datetime) -> list[int]:
    """The last step: the organization's contracts end by default, unless the invoice was paid meanwhile. Returns those ended."""
    invoice = Invoice.objects.get(pk=invoice_id)
    if invoice.state not in {Invoice.State.OPEN, Invoice.State.UNCOLLECTIBLE}:
        return []
    reason = f"{invoice.display_number} stayed unpaid for {terms.DEFAULT_AFTER_DAYS} days"
    return contracts.default(invoice.organization_id, now=now, reason=reason)
