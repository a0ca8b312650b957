"""Many windows at once: the calendar of what is free, and the first windows that fit. `capacity` is the door to it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from scheduler.core.claims import LEVELS, CapacityError, Ints, Pool, Shape, check_level, check_window, claim_window

_BATCH = 64  # starts that are tried in one sweep


@dataclass(frozen=True)
class CalendarCell:
    """`gpus` can be booked as one block for the whole of [start, end)."""

    start: int
    end: int
    gpus: int


def largest_over(
    pool: Pool, shape: Shape, windows: Sequence[tuple[int, int]], levels: Sequence[str] = LEVELS
) -> dict[str, Ints]:
    """`largest` at each of `levels` in each of `windows`: {level: int64[windows]}, from one sweep over the claims."""
    hosts = pool.hosts
    # Cells nest, so that in this order those of every level are runs.
    order = np.lexsort([hosts.cell[level] for level in LEVELS])
    units = pool.free_over(np.array(windows, np.int64).reshape(-1, 2))[:, order] // shape.chunk
    found: dict[str, Ints] = {}
    for level in levels:
        check_level(level)
        cells = hosts.cell[level][order]
        starts = np.flatnonzero(np.r_[True, cells[1:] != cells[:-1]][: len(cells)])
        inside = np.add.reduceat(units, starts, axis=1) if len(starts) else units
        found[level] = inside.max(axis=1, initial=0) * shape.chunk
    return found


def free_calendar(
    pool: Pool, shape: Shape, level: str, t1: int, t2: int, step_s: int | None = None
) -> tuple[CalendarCell, ...]:
    """What one block can be, step by step over [t1, t2).

    With `step_s`: per step of that length (the last may be shorter), bookable for the whole step. Without: the exact
    step function, cut where any claim begins or ends, equal neighbours joined.
    """
    check_window(t1, t2)
    if step_s is not None:
        if step_s < 1:
            raise CapacityError(f"step of {step_s} s")
        cuts = [*range(t1, t2, step_s), t2]
    else:
        marks = np.unique(np.concatenate((pool.starts, pool.ends)))
        cuts = [t1, *marks[(marks > t1) & (marks < t2)].tolist(), t2]
    counts = largest_over(pool, shape, list(pairwise(cuts)), (level,))[level].tolist()
    cells: list[CalendarCell] = []
    for (a, b), count in zip(pairwise(cuts), counts, strict=True):
        if step_s is None and cells and cells[-1].gpus == count:
            cells[-1] = replace(cells[-1], end=b)
        else:
            cells.append(CalendarCell(a, b, count))
    return tuple(cells)


def first_windows(
    pool: Pool, shape: Shape, level: str, gpus: int, span: int, t1: int, t2: int,
    *, lead_s: int = 0, now: int = 0, grain_s: int = 1, limit: int = 3,
) -> tuple[tuple[int, int], ...]:  # fmt: skip
    """The first windows inside [t1, t2) in which one block of `gpus` can be had for at least `span` seconds: each begins as
    early as it can, not before the one ahead of it ends, and is as long as it can be.

    Windows are the customer's: their claims begin `lead_s` earlier, not before `now`. Starts are multiples of `grain_s`, and
    so are ends that a claim cuts short.
    """
    check_level(level)
    check_window(0, span)
    found: list[tuple[int, int]] = []
    ends = np.unique(pool.ends[pool.ends < t2])
    marks = np.unique(pool.starts[pool.starts < t2])

    def fits(windows: Sequence[tuple[int, int]]) -> Ints:
        claimed = [claim_window(a, b, lead_s, now) for a, b in windows]
        return np.flatnonzero(largest_over(pool, shape, claimed, (level,))[level] >= gpus)

    at = -(-t1 // grain_s) * grain_s
    while len(found) < limit:
        # Sliding a window later, room appears only where a claim ends, and the lead may begin there.
        starts = np.unique(np.r_[at, -(-(ends + lead_s) // grain_s) * grain_s])
        starts = starts[(starts >= at) & (starts + span <= t2)]
        first = _first(starts, lambda some: fits([(t, t + span) for t in some]))
        if first is None:
            break
        cuts = np.unique(np.r_[marks[marks > first + span] // grain_s * grain_s, t2])
        cuts = cuts[cuts > first + span]
        low, high = 0, len(cuts)  # a longer window never has more room: bisect for the latest end that still fits
        while low < high:
            middle = (low + high) // 2
            if fits([(first, int(cuts[middle]))]).size:
                low = middle + 1
            else:
                high = middle
        at = int(cuts[low - 1]) if low else first + span
        found.append((first, at))
    return tuple(found)


def nearest_starts(
    pool: Pool, shape: Shape, level: str, gpus: int, start: int, span: int,
    *, since: int, until: int, lead_s: int = 0, now: int = 0, grain_s: int = 1,
) -> tuple[int | None, int | None]:  # fmt: skip
    """(the latest start before `start`, not before `since`; the earliest after it, before `until`) from which one block of `gpus`
    can be had for `span` seconds; None where there is none. Starts are multiples of `grain_s`; claims begin `lead_s` earlier,
    not before `now`. A start that fits itself is not looked at.
    """
    check_window(start, start + span)
    # Earlier, room appears only where the window's end comes to a claim's start; later, only where a claim ends.
    before = np.unique((pool.starts[pool.starts < start + span] - span) // grain_s * grain_s)
    after = np.unique(-(-(pool.ends[pool.ends < until] + lead_s) // grain_s) * grain_s)

    def fits(some: list[int]) -> Ints:
        claimed = [claim_window(at, at + span, lead_s, now) for at in some]
        return np.flatnonzero(largest_over(pool, shape, claimed, (level,))[level] >= gpus)

    earlier = _first(before[(before >= since) & (before < start)][::-1], fits)
    return earlier, _first(after[(after > start) & (after < until)], fits)


def _first(starts: Ints, fits: Callable[[list[int]], Ints]) -> int | None:
    """The first of `starts` that fits, looked for in batches."""
    for begin in range(0, len(starts), _BATCH):
        some = starts[begin : begin + _BATCH].tolist()
        if (good := fits(some)).size:
            return int(some[int(good[0])])
    return None
