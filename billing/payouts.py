"""Paying operators: their share of paid invoice lines, by transfer, once they are onboarded at Stripe."""

from __future__ import annotations

import logging
from collections import defaultdict
from datetime import datetime, timedelta

from django.db import connection, transaction

from billing import gateway, ledger
from billing.models import InvoiceLine, OperatorAccount, Payout, PayoutLine
from marketplace import outbox
from marketplace.errors import MarketError
from marketplace.locks import Lock, acquire
from marketplace.models import Membership, Organization
from marketplace.services import screening

log = logging.getLogger(__name__)

SEND = "billing.send_payout"
KEY_LIFETIME = timedelta(hours=20)


def operator_account(organization: Organization, *, now: datetime) -> OperatorAccount:
    """The operator's row at Stripe; opened on first use."""
    account, fresh = OperatorAccount.objects.get_or_create(
        organization=organization, defaults={"currency": organization.currency, "created_at": now}
    )
    if fresh:  # it can be paid out from now on
        screening.begin(organization, now=now)
    return account


def held(organization: Organization) -> bool:
    """Does its money wait for its business and sanctions checks? What is owed stays owed; a test operator is never held."""
    return organization.livemode and organization.verification != Organization.Verification.VERIFIED


def onboarding_link(organization: Organization, *, refresh_url: str, return_url: str, now: datetime) -> str:
    """The URL where the operator tells Stripe who it is and where money goes. MarketError where that cannot be."""
    if not organization.is_operator:
        raise MarketError("forbidden", f"{organization} is no operator: only operators are paid out.")
    account = operator_account(organization, now=now)
    with gateway.person_waits():
        recipient = ensure_recipient(account)
        key = f"onboarding-{account.pk}-{int(now.timestamp() * 1000)}"
        return gateway.once(
            key, "onboarding", organization.pk,
            lambda key: gateway.onboarding_link(recipient, refresh_url=refresh_url, return_url=return_url, key=key),
        )  # fmt: skip


def ensure_recipient(account: OperatorAccount) -> str:
    """Stripe's id of the operator's account; made once."""
    if account.stripe_account:
        return account.stripe_account
    organization = account.organization
    owner = Membership.objects.filter(organization=organization).select_related("user").order_by("id").first()
    recipient = gateway.once(
        f"recipient-{account.pk}",
        "recipient",
        organization.pk,
        lambda key: gateway.create_recipient(
            name=organization.name,
            email=owner.user.email if owner else f"operator-{organization.pk}@tailrace.invalid",
            country=organization.country,
            reference=organization.public_id,
            key=key,
        ),
    )
    OperatorAccount.objects.filter(pk=account.pk, stripe_account=None).update(stripe_account=recipient)
    account.stripe_account = recipient
    return recipient


def refresh_recipient(organization: Organization, *, now: datetime) -> OperatorAccount:
    """Ask Stripe whether transfers may go; what waits is then sent. For the return page, the webhook and the sweep."""
    account = operator_account(organization, now=now)
    if not account.stripe_account:
        return account
    enabled = gateway.transfers_enabled(account.stripe_account)
    OperatorAccount.objects.filter(pk=account.pk).update(transfers_enabled=enabled, checked_at=now)
    account.transfers_enabled = enabled
    if enabled:
        settle(organization.pk, now=now)
    return account


def unsettled(operator_id: int) -> dict[str, int]:
    """The operator's share of paid lines that no payout carries yet, in minor units per currency."""
    rows = (
        InvoiceLine.objects.filter(operator_id=operator_id, invoice__state="paid", payout_line=None)
        .values_list("invoice__currency", "operator_minor")
        .order_by()
    )
    sums: dict[str, int] = defaultdict(int)
    for currency, amount in rows:
        sums[currency] += amount
    return dict(sums)


def settle(operator_id: int, *, now: datetime) -> list[Payout]:
    """Make a payout per currency of all paid lines that have none, where the sum is positive and the operator onboarded.

    A negative sum stays and is netted from what comes, and so does all of it while the operator is `held`. The transfer itself
    goes through the outbox.
    """
    accounts = OperatorAccount.objects.filter(organization_id=operator_id, transfers_enabled=True)
    account = accounts.select_related("organization").first()
    if account is None or held(account.organization):
        return []
    made: list[Payout] = []
    with transaction.atomic():
        acquire((Lock.WALLET, operator_id))
        rows = InvoiceLine.objects.filter(operator_id=operator_id, invoice__state="paid", payout_line=None)
        lines: dict[str, list[InvoiceLine]] = defaultdict(list)
        for line in rows.select_related("invoice").order_by("id"):
            lines[line.invoice.currency].append(line)
        for currency, of_currency in sorted(lines.items()):
            amount = sum(line.operator_minor for line in of_currency)
            if amount <= 0:
                continue
            payout = Payout.objects.create(
                organization_id=operator_id, currency=currency, amount_minor=amount, created_at=now
            )
            PayoutLine.objects.bulk_create(
                [
                    PayoutLine(payout=payout, invoice_line=line, amount_minor=line.operator_minor)
                    for line in of_currency
                ],
                batch_size=2000,
            )
            outbox.emit(SEND, key=str(payout.pk), payload={"payout": payout.pk})
            made.append(payout)
    return made


def send(payout_id: int, *, now: datetime) -> bool:
    """Transfer a pending payout; returns whether it is sent. Raises gateway.Unavailable: the outbox repeats it.

    What Stripe refuses (too little balance, account restricted) is marked failed and tried again by the sweep.
    """
    payout = Payout.objects.select_related("organization__operator_account").get(pk=payout_id)
    if payout.state != Payout.State.PENDING:
        return payout.state == Payout.State.SENT
    account = payout.organization.operator_account
    if not account.stripe_account or held(payout.organization):
        return False  # `released` sends it
    transfer = ""
    key = f"payout-{payout.pk}-{payout.attempt}"
    if now - payout.created_at > KEY_LIFETIME or gateway.burnt(key):
        transfer = gateway.find_transfer(account.stripe_account, payout.public_id)
    try:
        transfer = transfer or gateway.transfer(
            account=account.stripe_account,
            amount=payout.amount_minor,
            currency=payout.currency,
            reference=payout.public_id,
            key=key,
        )
    except gateway.Refused as error:
        Payout.objects.filter(pk=payout.pk, state=Payout.State.PENDING).update(
            state=Payout.State.FAILED, last_error=str(error)[:200]
        )
        return False
    return mark_sent(payout.pk, transfer, now=now)


def mark_sent(payout_id: int, transfer: str, *, now: datetime) -> bool:
    """The transfer exists: state and books in one transaction."""
    with transaction.atomic():
        moved = Payout.objects.filter(pk=payout_id, state=Payout.State.PENDING).update(
            state=Payout.State.SENT, stripe_transfer=transfer, sent_at=now, last_error=""
        )
        if not moved:
            return False
        payout = Payout.objects.get(pk=payout_id)
        payable = ledger.Entry(
            ledger.Code.OPERATOR_PAYABLE, payout.organization_id, payout.currency, payout.amount_minor
        )
        clearing = ledger.Entry(ledger.Code.STRIPE_CLEARING, None, payout.currency, -payout.amount_minor)
        ledger.book(ledger.Booking(f"payout-{payout.pk}-sent", "payout", payout.public_id, now, (payable, clearing)))
    return True


def released(operator_id: int, *, now: datetime) -> None:
    """The operator has passed its checks (again): what was held is paid out."""
    for payout in Payout.objects.filter(organization_id=operator_id, state=Payout.State.PENDING).order_by("pk"):
        outbox.emit(SEND, key=str(payout.pk), payload={"payout": payout.pk})
    settle(operator_id, now=now)


def retry_failed() -> int:
    """Put failed payouts back in line with a new attempt number, so that Stripe does not replay its refusal."""
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute(
            "UPDATE billing_payout SET state = 'pending', attempt = attempt + 1 WHERE state = 'failed' RETURNING id"
        )
        pks = [pk for (pk,) in cursor.fetchall()]
        for pk in pks:
            outbox.emit(SEND, key=str(pk), payload={"payout": pk})
    return len(pks)
