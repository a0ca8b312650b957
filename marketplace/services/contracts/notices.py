"""What customers are told about their contracts: one sentence on the page and in the API, and a mail where something happens
that nobody is looking at.
"""

from collections.abc import Iterable
from datetime import datetime

from django.conf import settings
from django.core.mail import send_mail
from django.db import transaction
from django.utils import timezone

from billing.core.money import format_minor
from marketplace import outbox
from marketplace.models import Contract, Membership, OutboxMessage
from marketplace.services.availability import HOLDING

NOTICE = "marketplace.contract_notice"
TOLD = ("owner", "admin", "billing")


def tell(contract_ids: Iterable[int], what: str, detail: str = "") -> None:
    """Leave a mail to the customer in the running transaction; `what` is a key of SUBJECTS."""
    assert what in SUBJECTS, what
    messages = [
        OutboxMessage(
            topic=NOTICE,
            key=f"{pk}-{what}",
            payload={"contract": pk, "what": what, "detail": detail},
            available_at=timezone.now(),
        )
        for pk in contract_ids
    ]
    if OutboxMessage.objects.bulk_create(messages, ignore_conflicts=True):  # one that waits says it already
        transaction.on_commit(lambda: outbox.nudge(NOTICE), robust=True)


SUBJECTS = {
    "active": "{id} is active",
    "cancelled": "{id} was cancelled: its payment did not arrive",
    "began": "{id} has begun: {gpus} GPUs are yours",
    "over": "{id} is over",
    "defaulted": "{id} was ended: an invoice stayed unpaid",
    "closed_out": "{id} was ended by us",
    "price_proposed": "{id}: its operator asks for another price",
    "price_lapsed": "{id} ends: its new price was not accepted",
}


def send(contract_id: int, what: str, detail: str) -> None:
    """The mail itself. Twice is no harm."""
    contract = Contract.objects.select_related("organization").get(pk=contract_id)
    people = Membership.objects.filter(organization=contract.organization, role__in=TOLD)
    addresses = sorted(people.values_list("user__email", flat=True).distinct())
    if not addresses:
        return
    subject = SUBJECTS[what].format(id=contract.public_id, gpus=contract.gpu_count)
    text = "\n\n".join(filter(None, [detail, sentence(contract, timezone.now())]))
    where = f"{settings.PUBLIC_URL}/contracts/{contract.public_id}"
    send_mail(subject, f"{text}\n\n{where}\n", settings.DEFAULT_FROM_EMAIL, addresses)


def sentence(contract: Contract, now: datetime) -> str:
    """Where the contract stands and what comes next, in its customer's words."""
    state, holds = contract.state, contract.kind in HOLDING
    until = f" until {contract.ends_at:%-d %b %Y %H:%M} UTC" if contract.ends_at else " until you end it"
    if state == Contract.State.PENDING_PAYMENT:
        due = format_minor(contract.upfront_minor, contract.currency)
        limit = f" until {contract.pay_by:%-d %b %H:%M} UTC" if contract.pay_by else ""
        return (
            f"Waits for {due}, due at signing{limit}. Its GPUs are held; it is active the moment the payment arrives."
        )
    if state == Contract.State.ACTIVE:
        early = " It was ended before its agreed end." if contract.terminated_at else ""
        if contract.starts_at > now:
            return (
                f"Signed. {contract.gpu_count} GPUs are yours from {contract.starts_at:%-d %b %Y %H:%M}{until}.{early}"
            )
        return f"In force{until}.{early}" if holds else f"In force{until}. Nothing is billed until a job runs.{early}"
    return {
        Contract.State.ENDING: "Over: what waited was cancelled, what runs gets its checkpoint signal and leaves.",
        Contract.State.ENDED: "Over, as agreed. What is left to bill comes with the next invoice.",
        Contract.State.TERMINATED: "Ended early, by its rule. What is left to bill comes with the next invoice.",
        Contract.State.CANCELLED: "Cancelled before it began; nothing is owed. What was paid for it comes back as credit.",
        Contract.State.DEFAULTED: "Ended because an invoice stayed unpaid. What its rule of early termination leaves due is still billed.",
    }[Contract.State(state)]
