"""From a placement's timeline to the seconds that are billed.

Billed is the time from *running confirmed* to *release requested*: the time in state `running`. Every other state is
free: before it is usable, while it drains, once it is gone. Silence (`unreachable`) and a disagreement (`parked`) are
free too unless the agent's own record, read when it came back, proves that the task ran all along. Exclusions
(curtailed, host dead, our fault) are cut out of what remains.

Boundaries are floored to whole UTC seconds at both ends. Flooring is monotone, so intervals that touch before it touch
after it: no second is billed twice and none is lost between neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
SECOND = timedelta(seconds=1)

BILLED_STATES = frozenset({"running"})
PROVABLE_STATES = frozenset({"unreachable", "parked"})


@dataclass(frozen=True, slots=True, order=True)
class Transition:
    """The placement entered `state` at the aware instant `at`; `sequence` orders transitions of one instant.

    `proven` on a transition out of `unreachable` or `parked` says that the agent's record shows the task running
    through all of the silence that this transition ends.
    """

    at: datetime
    sequence: int
    state: str
    proven: bool = False


@dataclass(frozen=True, slots=True, order=True)
class Interval:
    """Half-open `[start, end)` in whole UTC seconds since 1970."""

    start: int
    end: int

    @property
    def seconds(self) -> int:
        return self.end - self.start


def floor_second(instant: datetime) -> int:
    """Whole UTC seconds since 1970 at or before the aware `instant`; exact, also before 1970 and across DST."""
    if instant.tzinfo is None:
        raise ValueError(f"{instant!r} has no time zone")
    return (instant - EPOCH) // SECOND


def instant(second: int) -> datetime:
    """The aware UTC instant of a whole second since 1970."""
    return EPOCH + second * SECOND


def interval(start: datetime, end: datetime) -> Interval:
    """`[start, end)` with both ends floored to whole UTC seconds."""
    return Interval(floor_second(start), floor_second(end))


def union(intervals: Iterable[Interval]) -> tuple[Interval, ...]:
    """The same seconds as ascending intervals that neither overlap nor touch; empty ones vanish."""
    merged: list[Interval] = []
    for piece in sorted(intervals):
        if piece.end <= piece.start:
            continue
        if merged and piece.start <= merged[-1].end:
            merged[-1] = Interval(merged[-1].start, max(merged[-1].end, piece.end))
        else:
            merged.append(piece)
    return tuple(merged)


def subtract(intervals: Iterable[Interval], holes: Iterable[Interval]) -> tuple[Interval, ...]:
    """The seconds of `intervals` that lie in none of `holes`, as by `union`."""
    holes = union(holes)
    left: list[Interval] = []
    for piece in union(intervals):
        start = piece.start
        for hole in holes:
            if hole.end <= start or hole.start >= piece.end:
                continue
            left.append(Interval(start, hole.start))
            start = hole.end
        left.append(Interval(start, piece.end))
    return union(left)


def clip(intervals: Iterable[Interval], window: Interval) -> tuple[Interval, ...]:
    """The seconds of `intervals` that lie in `window`."""
    return union(Interval(max(piece.start, window.start), min(piece.end, window.end)) for piece in intervals)


def cut(intervals: Iterable[Interval], marks: Iterable[int]) -> tuple[Interval, ...]:
    """The same intervals cut at each second of `marks` that falls inside one (prices change there)."""
    ordered = sorted(set(marks))
    pieces: list[Interval] = []
    for piece in union(intervals):
        start = piece.start
        for mark in ordered:
            if start < mark < piece.end:
                pieces.append(Interval(start, mark))
                start = mark
        pieces.append(Interval(start, piece.end))
    return tuple(pieces)


def billable_intervals(
    transitions: Iterable[Transition], exclusions: Iterable[Interval] = (), *, until: datetime
) -> tuple[Interval, ...]:
    """The billable seconds of one placement up to `until`, ascending and disjoint.

    Order and repetition of `transitions` do not matter. The state of the last one lasts until `until`; time in an
    unproven silence that has not ended is not billable yet (it becomes so when a later transition proves it).
    """
    ordered: Sequence[Transition] = sorted(set(transitions))
    horizon = floor_second(until)
    pieces: list[Interval] = []
    for index, entered in enumerate(ordered):
        left = ordered[index + 1] if index + 1 < len(ordered) else None
        billed = entered.state in BILLED_STATES or (
            entered.state in PROVABLE_STATES and left is not None and left.proven
        )
        if billed:
            end = horizon if left is None else min(horizon, floor_second(left.at))
            pieces.append(Interval(floor_second(entered.at), end))
    return subtract(pieces, exclusions)


@dataclass(frozen=True, slots=True, order=True)
class Reading:
    """One usage record as stored: an interval of one placement and meter, its rate, its quantity and its revision.

    `rate` is what one second adds to `quantity` (milli-GPUs for GPU time). A first record has
    `quantity == rate * seconds`; a correction is the same interval with the next revision and a smaller quantity.
    """

    placement: int
    meter: str
    span: Interval
    revision: int
    rate: int
    quantity: int


def quantity_in(reading: Reading, window: Interval) -> int:
    """The part of `reading.quantity` that falls into `window`; windows that tile the interval add up to all of it.

    A corrected record counts from its start until its quantity is used up, so the split is exact and integer:
    `min(quantity, rate * (end - start)) - min(quantity, rate * (start' - start))`.
    """
    start = max(window.start, reading.span.start)
    end = min(window.end, reading.span.end)
    if end <= start:
        return 0
    before = min(reading.quantity, reading.rate * (start - reading.span.start))
    # At the record's own end all of its quantity is counted, whatever its rate says.
    through = (
        reading.quantity
        if end == reading.span.end
        else min(reading.quantity, reading.rate * (end - reading.span.start))
    )
    return through - before
