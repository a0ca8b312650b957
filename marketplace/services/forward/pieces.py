"""A contract's reservation in pieces, while parts of it are offered or sold on: rows -> strips (scheduler.core.parts) -> rows.

Beside `services.holds` the only writer of Reservation and ReservationBlock. Callers hold the cell's lock.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

from marketplace.models import Contract, Job, Placement, Reservation, ReservationBlock
from marketplace.services import holds
from marketplace.services.availability import LAG_S, instant, seconds
from scheduler.core import parts
from scheduler.core.capacity import FOREVER
from scheduler.core.parts import Gpus, Strip

Window = tuple[int, int]  # [start, end), seconds


def rows_of(contract: Contract, since: datetime) -> list[Reservation]:
    """What holds GPUs for it at `since` or later (or did until then), the first first."""
    live = Reservation.objects.filter(
        contract=contract, maintenance=None, state=Reservation.State.FIRM, ends_at__gte=since
    )
    return list(live.order_by("pk").prefetch_related("blocks").select_for_update(no_key=True))


def strips_of(rows: Iterable[Reservation]) -> list[Strip]:
    return [
        Strip(seconds(row.claims_at), seconds(row.ends_at), block.host_id, frozenset(block.gpu_indices))
        for row in rows
        for block in row.blocks.all()
    ]


def busy(contract: Contract, until: datetime) -> dict[int, set[int]]:
    """Host -> devices on which a job of the contract may still run at `until`: those without a limit of their own, and those
    whose limit lies behind it.
    """
    live = Placement.objects.filter(contract=contract, job__cancel_requested_at=None).exclude(state__in=Placement.FINAL)
    live = live.filter(release_requested_at=None).exclude(job__state__in=Job.FINAL)
    found: dict[int, set[int]] = defaultdict(set)
    rows = live.values_list("host_id", "gpu_indices", "job__max_seconds", "running_at", "created_at")
    for host, indices, limit, running_at, created_at in rows:
        over = seconds(running_at or created_at) + limit + LAG_S if limit else FOREVER
        if over > seconds(until):
            found[host] |= set(indices)
    return found


def sellable(rows: Iterable[Reservation], contract: Contract, start: datetime, end: datetime) -> dict[int, Gpus]:
    """Host -> devices that the contract holds throughout [start, end), and that none of its jobs may then use."""
    taken = busy(contract, start)
    held = parts.throughout(strips_of(rows), seconds(start), seconds(end))
    return {host: free for host, gpus in held.items() if (free := gpus - taken.get(host, set()))}


def cut(
    contract: Contract, rows: Sequence[Reservation], taken: Mapping[int, Iterable[int]], start: datetime, end: datetime
) -> None:
    """Take devices out of [start, end) of what the contract holds. PartsError for what it does not hold then."""
    left, _ = parts.cut(strips_of(rows), taken, seconds(start), seconds(end))
    _write(contract, rows, left)


def give_back(
    contract: Contract, taken: Mapping[int, Iterable[int]], start: datetime, end: datetime, now: datetime
) -> None:
    """Devices of [start, end) are the contract's again; work that runs on the piece before them goes on where it stands."""
    if max(start, now) >= end:
        return
    rows = rows_of(contract, min(start, now))
    back = [Strip(seconds(start), seconds(end), host, frozenset(gpus)) for host, gpus in taken.items()]
    _write(contract, rows, parts.join([*strips_of(rows), *back]))
    holds.renumber(taken.keys(), now=now, owed=True)


def rejoin(contract: Contract, now: datetime) -> bool:
    """Make one of pieces whose sold windows are over; False where there is nothing to do."""
    rows = rows_of(contract, now)
    strips, at = strips_of(rows), seconds(now)
    first = min((s.start for s in strips), default=at)
    joined = parts.join(s._replace(start=first) if s.start <= at else s for s in strips)
    whole = len(rows) == 1 and not rows[0].piece
    if whole or len({(s.start, s.end) for s in joined}) != 1:
        return False
    _write(contract, rows, joined)
    # What it holds now it has held from the first second on, in one row, whatever stands in since: what was before is over.
    before = Reservation.objects.filter(contract=contract, maintenance=None, piece=True, state=Reservation.State.FIRM)
    before.filter(ends_at__lt=now).update(state=Reservation.State.RELEASED)
    return True


def _write(contract: Contract, rows: Sequence[Reservation], strips: Iterable[Strip]) -> None:
    """The contract holds exactly these: a row for each window, the rows there are first. Its own row goes on as long as anything does;
    where that row's window is over, a piece goes on saying what it said.
    """
    main = contract.reservation
    spare = {row.pk: row for row in (main, *rows)}
    over = main.state == Reservation.State.FIRM and all(row.pk != main.pk for row in rows)
    held = list(strips)
    windows = {(s.start, s.end) for s in held}
    if over and not windows:
        del spare[main.pk]
    kept: dict[Window, Reservation] = {}
    if windows:
        own = seconds(main.claims_at), seconds(main.ends_at)
        kept[own if own in windows and not over else min(windows)] = spare.pop(main.pk)
    if over and windows:
        held += strips_of([main])
    wanted: dict[Window, dict[int, Gpus]] = defaultdict(dict)
    for strip in held:
        there = wanted[strip.start, strip.end]
        there[strip.host] = there.get(strip.host, frozenset()) | strip.gpus
    for row in list(spare.values()):
        window = seconds(row.claims_at), seconds(row.ends_at)
        if window in wanted and window not in kept:
            kept[window] = spare.pop(row.pk)
    for window in sorted(wanted.keys() - kept.keys(), key=lambda w: (w[0], -w[1])):
        kept[window] = spare.pop(min(spare)) if spare else Reservation(contract=contract, piece=True)
    for window, row in kept.items():
        _place(contract, row, window, wanted[window])
    Reservation.objects.filter(pk__in=spare).update(state=Reservation.State.RELEASED)


def _place(contract: Contract, row: Reservation, window: Window, gpus: Mapping[int, Gpus]) -> None:
    claims_at, ends_at = (instant(second) for second in window)
    starts_at = max(claims_at, contract.starts_at)
    row.listing_id, row.state, row.claims_at, row.ends_at = (
        contract.listing_id,
        Reservation.State.FIRM,
        claims_at,
        ends_at,
    )
    row.starts_at = starts_at if starts_at < ends_at else claims_at
    row.save()
    set_blocks(row, gpus)


def set_blocks(row: Reservation, gpus: Mapping[int, Iterable[int]]) -> None:
    """The reservation's devices are exactly these."""
    own = {block.host_id: block for block in ReservationBlock.objects.filter(reservation=row)}
    for host, block in own.items():
        if host not in gpus:
            block.delete()
    for host, indices in sorted(gpus.items()):
        numbers = sorted(indices)
        if host not in own:
            ReservationBlock.objects.create(reservation=row, host_id=host, gpu_indices=numbers)
        elif own[host].gpu_indices != numbers:
            ReservationBlock.objects.filter(pk=own[host].pk).update(gpu_indices=numbers)


def blocks_of(row: Reservation) -> dict[int, list[int]]:
    """Host -> devices."""
    return dict(
        ReservationBlock.objects.filter(reservation=row).order_by("host_id").values_list("host_id", "gpu_indices")
    )
