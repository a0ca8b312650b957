"""The one owner of "how many, where, from when to when": exact availability over time and topology.

Pure: integers in, a concrete hold or a named reason out. Search, calendar, quote and accept all call it, and the
contract service calls it once more under the cell's lock.

API (times are integer seconds, windows half-open ``[start, end)``, counts are whole GPUs)::

    hosts = Hosts.of([(host_id, gpus, leaf, spine[, site]), ...])
    pool  = Pool.build(hosts, claims)                    # Claims on these hosts, of any listing
    pool.free(t1, t2)                       -> int64[hosts]    free on each host for all of it
    largest(pool, shape, level, t1, t2)     -> int             most GPUs one block can have
    largest_each(pool, shape, level, t1, t2)-> {site: int}     per site (or listing, as site)
    largest_over(pool, shape, windows, levels)   -> {level: int64[windows]}   of many windows, by one sweep
    free_calendar(pool, shape, level, t1, t2, step_s=None) -> (CalendarCell, ...)
    first_windows(pool, shape, level, gpus, span, t1, t2)  -> ((start, end), ...)   the first that fit
    nearest_starts(pool, shape, level, gpus, start, span)  -> (earlier, later)
    admit(pool, shape, level, gpus, t1, t2, not_before=t1, horizon_s=..., movable=()) -> Admission
    claim_window(start, end, lead_s, now)   -> (start, end)  a claim begins early by its lead
    violations(pool)                        -> tuple[str]      empty unless something is oversold or a promise broke

**Why a promise can be kept.** A claim *is* its hold: (host, GPUs) pairs inside one cell of the topology, taken from
what is free during every second of the window. Whole GPUs of one host are interchangeable, and intervals with counts
can always be given device numbers in order of their start without moving anybody (interval graphs are perfect), so
counts are enough. Cells nest (host < leaf < spine < site); a block is taken from the smallest cell that holds it and,
in there, buddy-wise: whole cells first, the remainder from the cell it fits most tightly, so that large blocks survive.
Nothing else holds capacity: ceilings of on-demand and spot contracts are rates, not claims, and what is claimed but
unused may be lent to spot and hashing meanwhile.
"""

from collections.abc import Collection, Hashable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from scheduler.core.claims import (
    FOREVER,
    LEVELS,
    CapacityError,
    Claim,
    Hosts,
    Ints,
    Pool,
    Shape,
    check_level,
    check_window,
    claim_window,
)
from scheduler.core.windows import CalendarCell, first_windows, free_calendar, largest_over, nearest_starts

__all__ = [
    "FOREVER", "FRAGMENTED", "LEVELS", "NEVER_FITS", "NO_CAPACITY", "Admission", "Alternatives", "CalendarCell", "CapacityError",
    "Claim", "Hosts", "Pool", "Shape", "admit", "claim_window", "first_windows", "free_calendar", "largest", "largest_each",
    "largest_over", "nearest_starts", "violations",
]  # fmt: skip

# Reasons of a refusal, in the order in which they are examined.
NEVER_FITS = "shape_never_fits"  # not even with every host empty
NO_CAPACITY = "no_capacity_in_window"  # the GPUs exist; others hold them in this window
FRAGMENTED = "fragmented_at_level"  # enough GPUs are free in a wider cell, but not inside one of the level asked for


@dataclass(frozen=True)
class Alternatives:
    """What would fit instead. Every offer here would be admitted as it stands.

    in_window: the most GPUs one block can have in this window, per level; later / earlier: the nearest windows of the
    same length for the same block (None: none inside the horizon); until: the same block from the same start, but
    ending then (None: not even a second).
    """

    in_window: dict[str, int]
    later: tuple[int, int] | None
    earlier: tuple[int, int] | None
    until: int | None


@dataclass(frozen=True)
class Admission:
    """Admitted: `hold` says which hosts and how many GPUs of each, `cell_level` how tight a cell it fell into. Refused:
    `reason`, `alternatives`.

    `moves`: claims that must take a new hold in the same transaction (only those the caller called movable).
    """

    admitted: bool
    hold: tuple[tuple[Hashable, int], ...] = ()
    cell_level: str = ""
    moves: tuple[Claim, ...] = ()
    reason: str = ""
    alternatives: Alternatives | None = None


def _by_cell(hosts: Hosts, units: Ints, level: str) -> Ints:
    """Chunks per cell of a level."""
    cells = hosts.cell[level]
    return np.bincount(cells, weights=units, minlength=int(cells.max(initial=-1)) + 1).astype(np.int64)


def _most(hosts: Hosts, units: Ints, level: str) -> int:
    return int(_by_cell(hosts, units, level).max(initial=0))


def largest(pool: Pool, shape: Shape, level: str, t1: int, t2: int) -> int:
    """Most GPUs that one block inside one cell of `level` can hold during all of [t1, t2); exact, a multiple of the
    chunk.
    """
    check_level(level)
    return _most(pool.hosts, pool.free(t1, t2) // shape.chunk, level) * shape.chunk


def largest_each(pool: Pool, shape: Shape, level: str, t1: int, t2: int) -> dict[Hashable, int]:
    """`largest` for every site of the pool at once: one pass over all hosts of a catalogue."""
    check_level(level)
    hosts = pool.hosts
    cells = _by_cell(hosts, pool.free(t1, t2) // shape.chunk, level)
    best = np.zeros(len(hosts.sites), np.int64)
    np.maximum.at(best, hosts.cell["site"], cells[hosts.cell[level]])
    return {site: int(count) * shape.chunk for site, count in zip(hosts.sites, best, strict=True)}


def _choose(cells: npt.NDArray[np.intp], units: Ints, idle: Ints) -> int:
    """The tightest of the cells: fewest free chunks, then the one least idle in the weeks around, then the first."""
    return int(cells[np.lexsort((cells, idle[cells], units[cells]))[0]])


def _fill(
    hosts: Hosts, units: Ints, idle: Ints, members: npt.NDArray[np.intp], depth: int, need: int, take: Ints
) -> None:
    """Take `need` chunks out of the hosts `members` of one cell at LEVELS[depth]: whole child cells first, then the
    tightest for the rest.
    """
    while depth > 0:
        child = hosts.cell[LEVELS[depth - 1]][members]
        names, slot = np.unique(child, return_inverse=True)
        count = np.bincount(slot, weights=units[members]).astype(np.int64)
        waste = np.bincount(slot, weights=idle[members]).astype(np.int64)
        while True:
            fits = np.flatnonzero(count >= need)
            if fits.size:
                break
            whole = int(np.argmax(count))
            inside = members[slot == whole]
            take[inside] = units[inside]
            need -= int(count[whole])
            count[whole] = 0
        members = members[slot == _choose(fits, count, waste)]
        depth -= 1
        if names.size == 1 and depth == 0:
            break
    take[members[0]] = need


def _place(
    pool: Pool, shape: Shape, level: str, gpus: int, t1: int, t2: int
) -> tuple[tuple[tuple[Hashable, int], ...], str] | None:
    """The hold of one block and the level of the cell it fell into, or None when no cell of `level` has room."""
    hosts, units, need = pool.hosts, pool.free(t1, t2) // shape.chunk, gpus // shape.chunk
    month = 30 * 86400
    idle = pool.free(t1 - month, t2 + month)
    for depth, name in enumerate(LEVELS[: LEVELS.index(level) + 1]):
        cells = _by_cell(hosts, units, name)
        fits = np.flatnonzero(cells >= need)
        if fits.size:
            # Of equally tight cells, the one whose leaf, then spine, is already broken: whole ones are for those who
            # need them.
            first = np.zeros(len(cells), np.int64)
            first[hosts.cell[name][::-1]] = np.arange(len(hosts.ids))[::-1]
            wider = [_by_cell(hosts, units, up)[hosts.cell[up][first[fits]]] for up in LEVELS[depth + 1 :]]
            waste = _by_cell(hosts, idle, name)[fits]
            chosen = int(fits[np.lexsort((fits, waste, *reversed(wider), cells[fits]))[0]])
            take = np.zeros(len(hosts.ids), np.int64)
            _fill(hosts, units, idle, np.flatnonzero(hosts.cell[name] == chosen), depth, need, take)
            hold = tuple((hosts.ids[i], int(take[i]) * shape.chunk) for i in np.flatnonzero(take))
            return hold, name
    return None


def _fits(pool: Pool, shape: Shape, level: str, gpus: int, t1: int, t2: int) -> bool:
    return largest(pool, shape, level, t1, t2) >= gpus


def _alternatives(
    pool: Pool, shape: Shape, level: str, gpus: int, t1: int, t2: int, not_before: int, horizon_s: int
) -> Alternatives:
    units, span = pool.free(t1, t2) // shape.chunk, t2 - t1
    # Sliding a window later, room appears only where a claim ends; earlier, only where the window's end reaches a
    # claim's start.
    ends = (int(t) for t in np.unique(pool.ends) if t1 < t <= t1 + horizon_s)
    starts = [int(t) for t in np.unique(pool.starts)]
    before = (t - span for t in reversed(starts) if not_before <= t - span < t1)
    later = next(((t, t + span) for t in ends if _fits(pool, shape, level, gpus, t, t + span)), None)
    earlier = next(((t, t + span) for t in before if _fits(pool, shape, level, gpus, t, t + span)), None)
    inside = [t for t in starts if t1 < t < t2]
    lo, hi = 0, len(inside)  # a longer window never has more room: bisect for the latest end that still fits
    while lo < hi:
        middle = (lo + hi) // 2
        if _fits(pool, shape, level, gpus, t1, inside[middle]):
            lo = middle + 1
        else:
            hi = middle
    return Alternatives(
        in_window={name: _most(pool.hosts, units, name) * shape.chunk for name in LEVELS},
        later=later,
        earlier=earlier,
        until=inside[lo - 1] if lo else None,
    )


def _replan(
    pool: Pool, shape: Shape, level: str, gpus: int, t1: int, t2: int, movable: Collection[Hashable]
) -> Admission | None:
    """Room for the block by giving the movable claims of this window other hosts; all of them keep their own window,
    level and chunk.
    """
    loose = [c for c in pool.claims if c.key in movable and c.start < t2 and c.end > t1]
    if not loose:
        return None
    wish = Claim(key=None, start=t1, end=t2, hold=(), level=level, chunk=shape.chunk)
    wanted = [(wish, gpus), *((claim, claim.gpus) for claim in loose)]
    # Narrow cells and large blocks are the hard ones: they choose first.
    wanted.sort(key=lambda item: (LEVELS.index(item[0].level), -item[1], item[0].start, item[0] is not wish))
    planned = pool.without({claim.key for claim in loose})
    own: tuple[tuple[Hashable, int], ...] = ()
    own_level, moves = "", []
    for claim, count in wanted:
        found = _place(planned, Shape(claim.chunk), claim.level, count, claim.start, claim.end)
        if found is None:
            return None
        planned = planned.plus(replace(claim, hold=found[0]))
        if claim is wish:
            own, own_level = found
        elif sorted(found[0], key=repr) != sorted(claim.hold, key=repr):
            moves.append(replace(claim, hold=found[0]))
    return Admission(True, hold=own, cell_level=own_level, moves=tuple(moves))


def admit(
    pool: Pool,
    shape: Shape,
    level: str,
    gpus: int,
    t1: int,
    t2: int,
    *,
    not_before: int | None = None,
    horizon_s: int = 400 * 86400,
    movable: Collection[Hashable] = (),
) -> Admission:
    """Find room for one block of `gpus` inside one cell of `level` during [t1, t2): its hold, or why not and what would
    fit.

    `not_before` bounds earlier windows that may be offered (t1 when not given), `horizon_s` later ones. `movable`: keys
    of claims that have not begun and may be given other hosts; they are touched only when there is no room otherwise,
    and then come back in `moves`.
    Exact without `movable`: refused only if no hold exists. Raises CapacityError for a question without meaning.
    """
    check_level(level)
    check_window(t1, t2)
    if gpus < 1 or gpus % shape.chunk:
        raise CapacityError(f"{gpus} GPUs are no positive multiple of the chunk of {shape.chunk}")
    found = _place(pool, shape, level, gpus, t1, t2)
    if found is not None:
        return Admission(True, hold=found[0], cell_level=found[1])
    if _most(pool.hosts, pool.hosts.gpus // shape.chunk, level) * shape.chunk < gpus:
        reason = NEVER_FITS
    else:
        if movable and (moved := _replan(pool, shape, level, gpus, t1, t2, movable)) is not None:
            return moved
        wide = _most(pool.hosts, pool.free(t1, t2) // shape.chunk, "site") * shape.chunk
        reason = FRAGMENTED if wide >= gpus else NO_CAPACITY
    other = _alternatives(pool, shape, level, gpus, t1, t2, t1 if not_before is None else not_before, horizon_s)
    return Admission(False, reason=reason, alternatives=other)


def violations(pool: Pool) -> tuple[str, ...]:
    """Every host oversold at some instant and every claim whose promise does not stand, as sentences; empty when all is
    well.

    A host that died (0 GPUs, or gone from the columns) shows here: its claims need a new hold (`admit` with the claim
    left out).
    """
    found: list[str] = []
    hosts = pool.hosts
    if pool.claims:
        first, last = min(c.start for c in pool.claims), max(c.end for c in pool.claims)
        over = pool.peak(first, last)
        found += [
            f"host {hosts.ids[i]!r}: {over[i]} of {hosts.gpus[i]} GPUs held at once"
            for i in np.flatnonzero(over > hosts.gpus)
        ]
    for claim in pool.claims:
        at = [hosts.position[host] for host, _ in claim.hold if host in hosts.position]
        if len(at) < len(claim.hold):
            found.append(f"claim {claim.key!r}: holds a host that is not offered")
        if len({int(hosts.cell[claim.level][i]) for i in at}) > 1:
            found.append(f"claim {claim.key!r}: spread over more than one {claim.level}")
        if any(count % claim.chunk for _, count in claim.hold):
            found.append(f"claim {claim.key!r}: a host's part is no multiple of {claim.chunk}")
    return tuple(found)
