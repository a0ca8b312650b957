"""Whose contract a call may touch is told: when it is announced or changed, and what it took when it is over.

Once of each thing: a row, a line in the contract's story, and one mail to the organization by the outbox.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from django.db.models import Q

from marketplace import outbox
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
    """Those whose jobs left for it: for how long their contracts are not billed. Those who were only told: that it took nothing."""
    took = sheds.contracts_of(row)
    seconds = max(0, int((row.over_at - row.starts_at).total_seconds())) if took else 0
    told = CurtailmentNotice.objects.filter(curtailment=row).values_list("contract_id", flat=True)
    _write(row, {pk: seconds if pk in took else 0 for pk in {*told, *took}}, What.OVER, now)


def _concerned(row: Curtailment) -> list[int]:
    hosts = Host.objects.filter(power_node__in=curtailment_reports.below(row.node)).exclude(listing=None)
    named = Q(kind="flexible")
    if row.emergency:
        named |= Q(emergency_notice_s__isnull=False)
    rows = Contract.objects.filter(named, listing__in=hosts.values("listing"), state__in=LIVE)
    return list(rows.order_by("pk").values_list("pk", flat=True))


def _write(row: Curtailment, seconds: dict[int, int], what: str, now: datetime) -> None:
    contracts = {c.pk: c for c in Contract.objects.filter(pk__in=seconds)}
    fresh: list[Contract] = []
    for pk in sorted(contracts):
        _, made = CurtailmentNotice.objects.get_or_create(
            curtailment=row, contract_id=pk, what=what,
            defaults={"organization_id": contracts[pk].organization_id, "curtailed_s": seconds[pk], "at": now},
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
        What.OVER: f"Over: grid call at {row.site.name}, {window(row)}",
    }
    return mails.Letter(
        subject=said[What(rows[0].what)],
        paragraphs=tuple(sentence(notice) for notice in rows),
        facts=(("Site", row.site.name), ("Window", window(row)), ("Call", row.public_id)),
        path=f"/contracts/{rows[0].contract.public_id}",
        label="Your contract",
        why="You get this because a contract of your organization gives way to the grid.",
    )


def sentence(notice: CurtailmentNotice) -> str:
    """What it means for one contract."""
    name, minutes = notice.contract.public_id, notice.curtailed_s // 60
    if notice.what == What.OVER:
        if not notice.curtailed_s:
            return f"{name}: nothing of it was touched."
        return f"{name}: its jobs left for the call and queue again; {minutes} minutes are not billed."
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
