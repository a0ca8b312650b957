"""What customers are told about their contracts: one sentence on the page and in the API, and a mail where something happens
that nobody is looking at.
"""

from collections.abc import Iterable
from datetime import datetime, timedelta

from django.db import transaction
from django.utils import timezone

from billing.core.money import format_minor
from marketplace import outbox
from marketplace.models import Amendment, Contract, ContractDocument, Kind, OutboxMessage
from marketplace.services import mails
from marketplace.services.availability import HOLDING

NOTICE = "marketplace.contract_notice"
TOLD = ("owner", "admin", "billing")
SELLERS = ("owner", "admin")  # of the operator
GATHERED_S = 300  # what comes by the dozen is told once in so many seconds

SUBJECTS = {
    "signed": "{id} is signed: your order form",
    "active": "{id} is active",
    "cancelled": "{id} was cancelled: its payment did not arrive",
    "began": "{id} has begun: {gpus} GPUs are yours",
    "extended": "{id} was extended",
    "resized": "{id} has more GPUs: {gpus} in all",
    "over": "{id} is over",
    "defaulted": "{id} was ended: an invoice stayed unpaid",
    "closed_out": "{id} was ended by us",
    "outbid": "{id}: jobs were outbid",
    "missing": "{id}: some of its GPUs cannot be used",
    "stand_in": "{id}: other GPUs stand in",
    "whole": "{id}: all of its GPUs can be used again",
    "price_proposed": "{id}: its operator asks for another price",
    "price_applied": "{id}: its new price counts from now on",
    "price_lapsed": "{id} ends: its new price was not accepted",
    "price_accepted": "{id}: your price was accepted",
    "price_declined": "{id}: your price was declined",
}
WORK = frozenset({"missing", "stand_in", "whole"})  # those who run jobs are told, too
OPERATORS = frozenset({"price_accepted", "price_declined"})  # told to who sold it; the rest to who bought it
PAPERS = {
    "signed": ContractDocument.Kind.ORDER_FORM,
    "extended": ContractDocument.Kind.AMENDMENT,
    "resized": ContractDocument.Kind.AMENDMENT,
}


def tell(contract_ids: Iterable[int], what: str, detail: str = "") -> None:
    """Leave a mail in the running transaction; `what` is a key of SUBJECTS."""
    assert what in SUBJECTS, what
    wait = timedelta(seconds=GATHERED_S if what == "outbid" else 0)
    messages = [
        OutboxMessage(
            topic=NOTICE,
            key=f"{pk}-{what}",
            payload={"contract": pk, "what": what, "detail": detail},
            available_at=timezone.now() + wait,
        )
        for pk in contract_ids
    ]
    if (
        OutboxMessage.objects.bulk_create(messages, ignore_conflicts=True) and not wait
    ):  # one that waits says it already
        transaction.on_commit(lambda: outbox.nudge(NOTICE), robust=True)


def send(contract_id: int, what: str, detail: str) -> None:
    """The mail itself. Twice is no harm."""
    rows = Contract.objects.select_related("organization", "operator", "site", "gpu_model", "listing")
    contract = rows.get(pk=contract_id)
    sold = what in OPERATORS
    roles = SELLERS if sold else (*TOLD, "engineer") if what in WORK else TOLD
    to = mails.addresses(contract.operator_id if sold else contract.organization_id, roles)
    mails.send(to, letter(contract, what, detail, now=timezone.now()))


def letter(contract: Contract, what: str, detail: str, *, now: datetime) -> mails.Letter:
    """What the mail says: what happened, where the contract stands now, its figures, and the page on which to act."""
    sold = what in OPERATORS
    subject = SUBJECTS[what].format(id=contract.public_id, gpus=contract.gpu_count)
    paragraphs = (detail,) if sold else tuple(filter(None, (detail, sentence(contract, now))))
    path, label = _leads_to(contract, what)
    whose = contract.operator if sold else contract.organization
    return mails.Letter(
        subject, paragraphs or (subject,), _figures(contract), path, label,
        f"You get this as one of the people of {whose.name} who answer for its contracts.",
    )  # fmt: skip


def _figures(contract: Contract) -> tuple[tuple[str, str], ...]:
    model = f" × {contract.gpu_model.name}" if contract.gpu_model else ""
    most = "" if contract.kind in HOLDING else " at most"
    limit = contract.limit_price if contract.kind == Kind.SPOT else contract.price
    price = f"{(limit or 0) / 1_000_000:.6g} {contract.currency} per GPU-hour"
    return (
        ("Contract", f"{contract.public_id}, {contract.get_kind_display().lower()}"),
        ("GPUs", f"{contract.gpu_count}{model}{most}"),
        ("Site", f"{contract.site.name}, {contract.site.region}"),
        ("Limit" if contract.kind == Kind.SPOT else "Price", price),
        ("From", f"{contract.starts_at:%-d %b %Y %H:%M} UTC"),
        ("Until", f"{contract.ends_at:%-d %b %Y %H:%M} UTC" if contract.ends_at else "ended by the customer"),
    )


def _leads_to(contract: Contract, what: str) -> tuple[str, str]:
    """(path, words of the button): the paper, the question, or the contract's page. Who sold it has a desk of its own."""
    page = f"/contracts/{contract.public_id}"
    if what in OPERATORS:
        return f"/operator/marketplace/contract/{contract.pk}/change/", "Open the contract"
    if what in PAPERS:
        paper = contract.documents.filter(kind=PAPERS[what]).order_by("-pk").first()
        if paper is not None:
            return f"{page}/documents/{paper.public_id}", "Read the paper"
    if what == "price_proposed":
        asked = contract.amendments.filter(kind=Amendment.Kind.PRICE, state=Amendment.State.OPEN).first()
        if asked is not None:
            return f"{page}/amendments/{asked.public_id}", "Accept or decline"
    if what == "defaulted":
        return "/invoices", "See the invoices"
    return page, "Open the contract"


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
