"""Whoever is touched is told, once of each version: a row, a line in the contract's story and in those of jobs that run there, a mail."""

from collections.abc import Collection, Iterable, Sequence
from datetime import datetime

from django.db.models import QuerySet

from marketplace import outbox
from marketplace.models import (
    Contract,
    ContractEvent,
    Job,
    Maintenance,
    MaintenanceHost,
    MaintenanceNotice,
    Placement,
)
from marketplace.services import drains, mails, replicas
from marketplace.services.availability import HOLDING
from marketplace.services.maintenance import planning
from marketplace.services.maintenance.planning import Impact

NOTICE = "marketplace.maintenance_notice"
TOLD = ("owner", "admin", "engineer")
What = MaintenanceNotice.What


def tell(row: Maintenance, found: Impact, what: str, *, now: datetime) -> int:
    """Those whom it touches, and those whom it touched when they were last told: that it does not any more. Returns how many."""
    touched = {each.contract.pk: (each.gpus, each.short) for each in found.touched}
    gone = concerned(row).exclude(contract__in=touched).values_list("contract_id", flat=True)
    told = _write(row, touched, what, now)
    return told + _write(row, dict.fromkeys(gone, (0, 0)), What.CANCELLED, now)


def tell_new(row: Maintenance, found: Impact, *, now: datetime) -> int:
    """Those whom it touches and who were not told of this version."""
    return _write(row, {each.contract.pk: (each.gpus, each.short) for each in found.touched}, What.ANNOUNCED, now)


def tell_all(row: Maintenance, what: str, *, now: datetime) -> int:
    """Whoever was told that it touches him, and not yet that it does not."""
    rows = concerned(row).values_list("contract_id", "gpus", "short_gpus")
    return _write(row, {pk: (gpus, short) for pk, gpus, short in rows}, what, now)


def concerned(row: Maintenance) -> QuerySet[MaintenanceNotice]:
    """The last notice of each contract that it concerns."""
    last = MaintenanceNotice.objects.filter(maintenance=row).order_by("contract_id", "-version").distinct("contract_id")
    return MaintenanceNotice.objects.filter(pk__in=last.values("pk")).exclude(what=What.CANCELLED)


def concerned_of(organization_id: int) -> QuerySet[MaintenanceNotice]:
    """The last notice of each maintenance about each contract of an organization, also of what was cancelled."""
    rows = MaintenanceNotice.objects.all().owned_by(organization_id)
    last = rows.order_by("maintenance_id", "contract_id", "-version").distinct("maintenance_id", "contract_id")
    return MaintenanceNotice.objects.filter(pk__in=last.values("pk"))


def untold(row: Maintenance) -> bool:
    """Does it touch a contract that was not told of this version: by what runs there and may run there then, or by what it holds?"""
    _, there = planning.running(list(row.hosts.values_list("host_id", flat=True)), row.away_at)
    held = planning.contracts_of(planning.held_there(row, row.away_at, row.ends_at))
    touched = {*there, *(contract.pk for contract in held)}
    told = MaintenanceNotice.objects.filter(maintenance=row, version=row.version, contract__in=touched)
    return bool(touched - set(told.values_list("contract_id", flat=True)))


def _write(row: Maintenance, touched: dict[int, tuple[int, int]], what: str, now: datetime) -> int:
    organizations = dict(Contract.objects.filter(pk__in=touched).values_list("pk", "organization_id"))
    fresh: list[int] = []
    for pk in sorted(touched):
        gpus, short = touched[pk]
        _, made = MaintenanceNotice.objects.get_or_create(
            maintenance=row, contract_id=pk, version=row.version,
            defaults={"organization_id": organizations[pk], "what": what, "gpus": gpus, "short_gpus": short, "at": now},
        )  # fmt: skip
        fresh += [pk] if made else []
    _stories(row, fresh, what, now)
    for organization in sorted({organizations[pk] for pk in fresh}):
        payload = {"maintenance": row.pk, "organization": organization, "version": row.version}
        outbox.emit(NOTICE, key=f"{row.pk}-{organization}-{row.version}", payload=payload)
    return len(fresh)


def _stories(row: Maintenance, contract_ids: Collection[int], what: str, now: datetime) -> None:
    words = f"notice: {row.public_id} {what}: {window(row)}, {drains.CATEGORIES[row.category]}"[:200]
    rows = Contract.objects.filter(pk__in=contract_ids).values_list("pk", "state").order_by("pk")
    ContractEvent.objects.bulk_create(
        ContractEvent(contract_id=pk, at=now, actor="maintenance", from_state=state, to_state=state, reason=words)
        for pk, state in rows
    )
    there = MaintenanceHost.objects.filter(maintenance=row).values("host")
    live = Placement.objects.filter(host__in=there, contract__in=contract_ids).exclude(state__in=Placement.FINAL)
    jobs = Job.objects.filter(pk__in=live.values("job")).order_by("pk")
    replicas.note(jobs, words, now=now, actor="maintenance")


# --- the mail
def send(maintenance_id: int, organization_id: int, version: int) -> None:
    """One mail to an organization of all its contracts. Twice is no harm."""
    rows = list(
        MaintenanceNotice.objects.filter(
            maintenance=maintenance_id, organization=organization_id, version=version
        ).select_related("contract", "maintenance__site").order_by("contract_id")
    )  # fmt: skip
    if rows:
        mails.send(mails.addresses(organization_id, TOLD), letter(rows))


def letter(rows: Sequence[MaintenanceNotice]) -> mails.Letter:
    """Of one maintenance and one organization; at least one notice."""
    row = rows[0].maintenance
    return mails.Letter(
        subject=subject(rows[0]),
        paragraphs=(*about(row), *map(sentence, rows)),
        facts=(("Site", row.site.name), ("Window", window(row)), ("Maintenance", row.public_id)),
        path=f"/maintenance/{row.public_id}",
        label="What it means for you",
        why="You get this because a contract of your organization is touched.",
    )


def subject(notice: MaintenanceNotice) -> str:
    row = notice.maintenance
    said = {
        What.ANNOUNCED: f"Maintenance at {row.site.name}: {window(row)}",
        What.CHANGED: f"Changed: maintenance at {row.site.name}, now {window(row)}",
        What.CANCELLED: f"Cancelled: maintenance at {row.site.name}, {window(row)}",
        What.FINISHED: f"Over early: maintenance at {row.site.name}, {window(row)}",
    }
    return said[What(notice.what)]


def about(row: Maintenance) -> Iterable[str]:
    """What is done, and what it likely means."""
    yield f"{row.text} ({drains.CATEGORIES[row.category]})"
    if row.impact:
        yield row.impact
    if row.emergency_reason:
        yield f"Without due notice: {row.emergency_reason} Reserved time that it takes is not charged."


def window(row: Maintenance) -> str:
    """`1 Mar 2027 22:00 to 2 Mar 02:00 UTC`."""
    return f"{row.starts_at:%-d %b %Y %H:%M} to {row.ends_at:%-d %b %H:%M} UTC"


def sentence(notice: MaintenanceNotice) -> str:
    """What it means for one contract."""
    name, row = notice.contract.public_id, notice.maintenance
    if notice.what == What.CANCELLED:
        return f"{name}: nothing of it is touched."
    if notice.what == What.FINISHED:
        return f"{name}: all of it is there again."
    leave = (
        f"Jobs that run there are asked to leave at {row.away_at:%-d %b %H:%M} UTC, earlier where their grace is longer, "
        "and queue again."
    )
    if notice.contract.kind not in HOLDING:
        return f"{name}: {notice.gpus} GPUs in use there. {leave}"
    kept = notice.gpus - notice.short_gpus
    room = (
        "others stand in for all of them"
        if not notice.short_gpus
        else f"others stand in for {kept}, {notice.short_gpus} are missing"
    )
    return f"{name}: {notice.gpus} of its GPUs are there; {room}. {leave}"
