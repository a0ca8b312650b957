"""Whose contract a call may touch is told: when it is announced or changed, and what it took when it is over.

Once of each thing: a row, a line in the contract's story, and one mail to the organization by the outbox.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from django.db.models import Q

from billing.core.money import format_minor
from marketplace import ids, outbox
from marketplace.models import Contract, ContractEvent, Curtailment, CurtailmentNotice, Host
from marketplace.services import curtailment_reports, mails, sheds

NOTICE = "marketplace.curtailment_notice"
TOLD = ("owner", "admin", "engineer")
LIVE = (Contract.State.ACTIVE,)
What = CurtailmentNotice.What


def announced(row: Curtailment, *, now: datetime) -> None:
    """Contracts that may give way to a mandatory call, their hosts under its node: their notice counts from here."""
    if row.mandatory:
        _write(row, dict.fromkeys(_concerned(row), 0), What.ANNOUNCED, now)


def changed(row: Curtailment, *, now: datetime) -> None:
    told = CurtailmentNotice.objects.filter(curtailment=row, what=What.ANNOUNCED)
    CurtailmentNotice.objects.filter(curtailment=row, what=What.CHANGED).delete()
    _write(row, dict.fromkeys(told.values_list("contract_id", flat=True), 0), What.CHANGED, now)


def over(row: Curtailment, *, now: datetime) -> None:
    """Those whose jobs left for it: for how long their contracts are not billed. Those whose GPUs it held lower: what is credited.
    Those who were only told: that it took nothing.
    """
    took = sheds.contracts_of(row)
    seconds = max(0, int((row.over_at - row.starts_at).total_seconds())) if took else 0
    told = CurtailmentNotice.objects.filter(curtailment=row).values_list("contract_id", flat=True)
    credit = {
        ids.decode("ctr", found["contract"]): found["amount_minor"]
        for found in curtailment_reports.credited(row, now=now)
        if found["why"] == "held_lower"
    }
    _write(row, {pk: seconds if pk in took else 0 for pk in {*told, *took}}, What.OVER, now, credit=credit)


def held(rows: Iterable[tuple[int, int]], *, now: datetime) -> None:
    """Contracts (with the call, by id) whose GPUs are held lower: told the first time."""
    wanted: dict[int, dict[int, int]] = defaultdict(dict)
    for call, contract in rows:
        wanted[call][contract] = 0
    known = CurtailmentNotice.objects.filter(curtailment__in=wanted, what=What.HELD)
    for call, contract in known.values_list("curtailment_id", "contract_id"):
        wanted[call].pop(contract, None)
    for row in Curtailment.objects.filter(pk__in=[pk for pk, fresh in wanted.items() if fresh]).order_by("pk"):
        _write(row, wanted[row.pk], What.HELD, now)


def _concerned(row: Curtailment) -> list[int]:
    hosts = Host.objects.filter(power_node__in=curtailment_reports.below(row.node)).exclude(listing=None)
    named = Q(kind="flexible")
    if row.emergency:
        named |= Q(emergency_notice_s__isnull=False)
    rows = Contract.objects.filter(named, listing__in=hosts.values("listing"), state__in=LIVE)
    return list(rows.order_by("pk").values_list("pk", flat=True))


def _write(
    row: Curtailment,
    seconds: Mapping[int, int],
    what: str,
    now: datetime,
    *,
    credit: Mapping[int | None, int] | None = None,
) -> None:
    """To contracts, by id, with the seconds that are not billed and what is credited."""
    contracts = {c.pk: c for c in Contract.objects.filter(pk__in=seconds)}
    fresh: list[Contract] = []
    for pk in sorted(contracts):
        _, made = CurtailmentNotice.objects.get_or_create(
            curtailment=row, contract_id=pk, what=what,
            defaults={
                "organization_id": contracts[pk].organization_id, "curtailed_s": seconds[pk], "at": now,
                "credit_minor": (credit or {}).get(pk, 0),
            },
        )  # fmt: skip
        fresh += [contracts[pk]] if made else []
    words = f"notice: {row.public_id} {what}: {window(row)}"
    ContractEvent.objects.bulk_create(
        ContractEvent(contract=c, at=now, actor="power", from_state=c.state, to_state=c.state, reason=words)
        for c in fresh
    )
    for organization in sorted({c.organization_id for c in fresh}):
        payload = {"curtailment": row.pk, "organization": organization, "what": what}
        outbox.emit(NOTICE, key=f"{row.pk}-{organization}-{what}-{int(now.timestamp())}", payload=payload)


# --- the mail
def send(payload: dict[str, Any]) -> None:
    """One mail to an organization of all its contracts. Twice is no harm."""
    rows = list(
        CurtailmentNotice.objects.filter(
            curtailment=payload["curtailment"], organization=payload["organization"], what=payload["what"]
        ).select_related("contract", "curtailment__site").order_by("contract_id")
    )  # fmt: skip
    if rows:
        mails.send(mails.addresses(payload["organization"], TOLD), letter(rows))


def letter(rows: Sequence[CurtailmentNotice]) -> mails.Letter:
    """Of one call and one organization; at least one notice."""
    row = rows[0].curtailment
    said = {
        What.ANNOUNCED: f"Grid call at {row.site.name}: {window(row)}",
        What.CHANGED: f"Changed: grid call at {row.site.name}, now {window(row)}",
        What.HELD: f"GPUs held lower: grid call at {row.site.name}, {window(row)}",
        What.OVER: f"Over: grid call at {row.site.name}, {window(row)}",
    }
    return mails.Letter(
        subject=said[What(rows[0].what)],
        paragraphs=tuple(sentence(notice) for notice in rows),
        facts=(("Site", row.site.name), ("Window", window(row)), ("Call", row.public_id)),
        path=f"/contracts/{rows[0].contract.public_id}",
        label="Your contract",
        why="You get this because your organization has a contract at a site that the grid has called on.",
    )


def sentence(notice: CurtailmentNotice) -> str:
    """What it means for one contract."""
    name, minutes = notice.contract.public_id, notice.curtailed_s // 60
    if notice.what == What.HELD:
        return (
            f"{name}: GPUs that its jobs run on are held to less power for the call. They run on, slower. Meanwhile you pay for the "
            "share of their power that they have: your invoice has the rest as a credit."
        )
    if notice.what == What.OVER:
        said = []
        if notice.curtailed_s:
            said.append(f"its jobs left for the call and queue again; {minutes} minutes are not billed")
        if notice.credit_minor:
            amount = format_minor(notice.credit_minor, notice.contract.currency)
            said.append(f"its GPUs were held lower while its jobs ran on; {amount} is credited with the next invoice")
        return f"{name}: {'; '.join(said) or 'nothing of it was touched'}."
    flexible, emergency_s = notice.contract.kind == "flexible", notice.contract.emergency_notice_s
    named = notice.curtailment.emergency and emergency_s is not None
    notices = [notice.contract.flexible_notice_s] if flexible else []
    notice_s = min([*notices, *([emergency_s or 0] if named else [])], default=0)
    ahead = f"{notice_s} seconds" if notice_s < 120 else f"{notice_s // 60} minutes"
    last = (
        ""
        if flexible
        else "the grid has declared an emergency, which it names. Last of all, where nothing else is left, "
    )
    return (
        f"{name}: {last}its jobs may be asked to leave from {max(notice.curtailment.starts_at, notice.at):%-d %b %H:%M} UTC on, not "
        f"before {ahead} after this. They get their checkpoint grace and queue again; that time is not billed."
    )


def window(row: Curtailment) -> str:
    """`1 Mar 2027 22:00 to 2 Mar 02:00 UTC`."""
    return f"{row.starts_at:%-d %b %Y %H:%M} to {row.over_at:%-d %b %H:%M} UTC"
