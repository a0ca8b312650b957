"""Promised GPUs that cannot be used: other GPUs of the same offer stand in, and what none stand in for is told, and not charged.

A window that has begun, or begins within HEAL_AHEAD, moves off hosts that are out of work: with sick GPUs (`gpu_rule`), without a
beat, drained, of a site that was silent past its lease (`leases`) or is switched off. It moves for the rest of its time; a host that
returns is free for others, unless its GPUs found no room elsewhere. What runs on the host's other GPUs runs on. Announced maintenance
sees to its own hosts (services.maintenance).

Each contract is mended in a transaction of its own, under the locks of its cell and its site: nobody is promised the same GPUs
meanwhile, and no host leaves or comes back in the midst of it.
"""

import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from django.db import transaction

from marketplace.errors import MarketError
from marketplace.locks import Lock, acquire
from marketplace.models import (
    Contract,
    ContractEvent,
    Gpu,
    Host,
    HostCondition,
    Reservation,
    ReservationBlock,
    Site,
)
from marketplace.services import availability, holds, jobs
from marketplace.services.contracts import notices, shortfalls
from marketplace.services.leases import SITE_SILENT
from scheduler.core.capacity import Admission

log = logging.getLogger(__name__)
HEAL_AHEAD = timedelta(hours=25)  # the scheduler closes a reservation's GPUs to others a day before its claim
HEAL_BATCH = 500
ACTOR = "stand-ins"
LOOKING = "we go on looking for others"  # the end of what is said while GPUs are missing


def heal(now: datetime) -> int:
    """Reservations that have begun, or do within HEAL_AHEAD, and whose GPUs cannot be used get others of their listing, if there are
    any; returns how many moved. What finds no room stays as it is, is told and written down (`Shortfall`), and tried again by the next
    tick, as is a cell in which somebody else is at work.
    """
    moved = 0
    for contract_id in _wanted(now):
        try:
            moved += _mend(contract_id, now)
        except MarketError as error:
            if error.code != "busy":
                raise
            log.warning("contract %s: %s", contract_id, error.detail)
    return moved


def _wanted(now: datetime) -> list[int]:
    """Contracts with something to mend, or to write down. Few queries where there is nothing."""
    live = Reservation.objects.filter(state=Reservation.State.FIRM, contract__isnull=False)
    soon = live.filter(maintenance=None, starts_at__gt=now, claims_at__lte=now + HEAL_AHEAD)
    ahead = {row.pk: row for row in soon.order_by("claims_at", "pk")[:HEAL_BATCH]}
    found = {ahead[pk].contract_id for pk in holds.disturbed(ahead.values(), now)} if ahead else set()
    begun = live.filter(
        contract__state=Contract.State.ACTIVE, starts_at__lte=now, ends_at__gt=now,
        blocks__host__in=Host.objects.filter(shortfalls.GONE),
    )  # fmt: skip
    missing_some = (
        shortfalls.standing(now)
        .filter(contract__state=Contract.State.ACTIVE)
        .order_by()
        .values_list("contract_id", flat=True)
    )
    found |= set(begun.order_by().values_list("contract_id", flat=True).union(missing_some)[:HEAL_BATCH])
    return sorted(pk for pk in found if pk is not None)


@dataclass
class Mended:
    """What was done for one contract."""

    moved: int = 0  # reservations
    stand_in: int = 0  # GPUs, in place of others whose window had begun
    waiting: list[Reservation] = field(default_factory=list)  # not begun, and without room
    why: set[str] = field(default_factory=set)


def _mend(contract_id: int, now: datetime) -> int:
    shown = Contract.objects.get(pk=contract_id)
    done = Mended()
    with transaction.atomic():
        acquire((Lock.CELL, shown.cell_id), (Lock.SITE, shown.site_id))
        contract = (
            Contract.objects.select_for_update(no_key=True, of=("self",)).select_related("quote").get(pk=shown.pk)
        )
        if contract.state not in {Contract.State.ACTIVE, Contract.State.PENDING_PAYMENT}:
            return 0  # it ended meanwhile
        rows = Reservation.objects.filter(contract=contract, state=Reservation.State.FIRM, ends_at__gt=now)
        held_inside = Reservation.objects.filter(state=Reservation.State.HELD, held_until__gt=now, within__isnull=False)
        mine = list(
            rows.exclude(pk__in=held_inside.values("within")).order_by("pk").select_related("listing", "contract")
            .select_for_update(no_key=True, of=("self",))
        )  # fmt: skip
        level = contract.quote.level if contract.quote is not None else "site"
        begun = [row for row in mine if row.starts_at <= now]
        short = shortfalls.write_down(contract, begun, now, now)
        for row in mine:
            if now < row.starts_at and row.claims_at <= now + HEAL_AHEAD and row.maintenance_id is None:
                _move(row, level, done, now)
        for row in begun:
            _stand_in(row, level, done, now)
        if done.stand_in:
            short = shortfalls.write_down(contract, begun, now, max(_clear_at(row, now) for row in begun))
        if done.moved:
            jobs.nudge_cell(contract.cell_id)
        _say(contract, short, done, now)
    return done.moved


def _clear_at(row: Reservation, now: datetime) -> datetime:
    """From then on its GPUs can be used: what runs there as spot gets its notice first."""
    lead = timedelta(seconds=availability.lead_s(row.listing)) if holds.lent_to_spot(row) else timedelta(0)
    return min(now + lead, row.ends_at)


# --- other GPUs
def _move(row: Reservation, level: str, done: Mended, now: datetime) -> None:
    """All of one that has not begun."""
    if not holds.disturbed([row], now):
        return
    gpus = sum(len(block.gpu_indices) for block in row.blocks.all())
    found = availability.admit(
        row.listing, gpus=gpus, level=level, starts_at=row.starts_at, ends_at=row.ends_at, now=now, without=(row.pk,)
    )
    if not found.admitted:
        log.error(
            "contract %s: GPUs it is promised from %s are gone: %s",
            row.contract and row.contract.public_id,
            row.starts_at,
            found.reason,
        )
        done.waiting.append(row)
        return
    holds.write_blocks(row, [(int(str(host)), count) for host, count in found.hold], now=now)
    done.moved += 1


def _stand_in(row: Reservation, level: str, done: Mended, now: datetime) -> None:
    """Others for those of its GPUs whose hosts are out of work: all of them together, or as many as can be had where what it has does
    not come to stand in more places than it may (`level`).
    """
    gone = list(
        row.blocks.filter(host__in=Host.objects.filter(shortfalls.GONE)).select_related("host__site").order_by("pk")
    )
    gone = [block for block in gone if _leaves(block.host, row.ends_at)]
    wanted = sum(len(block.gpu_indices) for block in gone)
    if not wanted:
        return
    done.why |= {_why(block.host) for block in gone}
    stays = row.blocks.exclude(pk__in=[block.pk for block in gone]).exists()
    able = _able(row)
    near = holds.neighbours(row, level)
    beside = able if near is None else able & set(near)
    gpus, found = wanted, _room(row, wanted, level, beside if stays else able, now)
    if not found.admitted:  # beside what stays, or in the place where its host will be back
        less = _room(row, wanted, level, beside, now)
        gpus = less.alternatives.in_window.get(level, 0) if less.alternatives is not None else 0
        found = _room(row, gpus, level, beside, now) if 0 < gpus < wanted else found
    if not found.admitted:
        return
    try:
        with transaction.atomic():
            holds.record(row, _trim(gone, gpus), until=now)
            holds.grow(row, [(int(str(host)), count) for host, count in found.hold], now=now)
    except MarketError as error:
        if error.code != "no_capacity":  # its devices cannot be numbered so: then it waits
            raise
        return
    done.moved, done.stand_in = done.moved + 1, done.stand_in + gpus


def _leaves(host: Host, end: datetime) -> bool:
    """A host that drains by an hour after the window's end is as good as any."""
    return not (host.state == Host.State.DRAINING and host.leaves_at is not None and host.leaves_at >= end)


def _able(row: Reservation) -> set[int]:
    """Hosts that are heard and at work. A sick one, were it at work, has fewer GPUs to give."""
    silent = HostCondition.objects.filter(ends_at=None).exclude(kind=HostCondition.Kind.ABLE)
    found = Host.objects.filter(listing_id=row.listing_id, state=Host.State.ACTIVE).exclude(
        pk__in=silent.values("host")
    )
    return set(found.values_list("pk", flat=True))


def _room(row: Reservation, gpus: int, level: str, among: Collection[int], now: datetime) -> Admission:
    """Of so many GPUs on these hosts from now to its end."""
    return availability.admit(
        row.listing, gpus=gpus, level=level, starts_at=max(row.starts_at, now.replace(microsecond=0)), ends_at=row.ends_at,
        now=now, among=among,
    )  # fmt: skip


def _trim(blocks: Iterable[ReservationBlock], gpus: int) -> dict[int, list[int]]:
    """Take so many GPUs from the blocks, the sick ones first; returns them, by host."""
    found: dict[int, list[int]] = {}
    for block in blocks:
        sick = set(Gpu.objects.filter(host=block.host_id, healthy=False).values_list("index", flat=True))
        order = sorted(block.gpu_indices, key=lambda index: (index not in sick, index))
        taken, gpus = order[:gpus], max(0, gpus - len(order))
        if taken:
            found[block.host_id] = taken
        block.gpu_indices = sorted(set(order) - set(taken))
        if block.gpu_indices:
            block.save(update_fields=["gpu_indices"])
        else:
            block.delete()
    return found


# --- what its people are told
def _why(host: Host) -> str:
    """In a customer's words; what the operator wrote is not theirs to read."""
    if host.site.mode == Site.Mode.OFF:
        return "its site is switched off"
    if host.state == Host.State.LOST:
        return "its site does not answer" if host.state_reason == SITE_SILENT else "a host does not answer"
    return "a GPU is sick" if host.gpus.filter(healthy=False).exists() else "a host was taken out of work"


def _say(contract: Contract, short: int, done: Mended, now: datetime) -> None:
    """Each once: a line in the contract's story, and a mail."""
    last = ContractEvent.objects.filter(contract=contract, actor=ACTOR).order_by("-pk").first()
    waited = last is not None and last.reason.endswith(LOOKING)
    why = f" ({', '.join(sorted(done.why))})" if done.why else ""
    said: list[tuple[str, str]] = []
    if done.stand_in:
        said.append(
            ("stand_in", f"{done.stand_in} other GPUs stand in for its own{why}; what was missing is not charged")
        )
    if short:
        said.append(
            (
                "missing",
                f"{short} of its {contract.gpu_count} GPUs cannot be used{why}; not charged meanwhile; {LOOKING}",
            )
        )
    for row in done.waiting:
        words = f"what it is promised from {row.starts_at:%-d %b %H:%M} UTC cannot be used at present; {LOOKING}"
        said.append(("missing", words))
    if waited and not said:
        said.append(("whole", "all of its GPUs can be used again"))
    for what, words in said:
        if last is not None and last.reason == words and what == "missing":
            continue
        ContractEvent.objects.create(
            contract=contract,
            at=now,
            actor=ACTOR,
            from_state=contract.state,
            to_state=contract.state,
            reason=words[:200],
        )
        notices.tell([contract.pk], what, words)
