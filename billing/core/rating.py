"""Usage times price: the lines of an invoice. Preview and final call the same functions.

A line's amount is `milli-GPU-seconds x price / 3,600,000`, an exact rational rounded once, half away from zero. Input
is integer quantities grouped by contract, meter and price version; how the groups were cut, ordered or merged before
does not change a line, because they are summed first.

Kinds: `on_demand` and `spot` bill running seconds (spot with one price version per clearing price); `reserved` bills
its commitment whether used or not, prorated by seconds, and what goes beyond the month's commitment as overage at the
on-demand price; `flexible` is `reserved` less the curtailed time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from billing.core.metering import Interval, clip, floor_second, instant, subtract
from billing.core.money import exact_amount, round_half_away


class LineKind(StrEnum):
    USAGE = "usage"
    COMMITMENT = "commitment"
    OVERAGE = "overage"


@dataclass(frozen=True, slots=True, order=True)
class Price:
    """One immutable version of a price: `millionths` of the major unit per GPU-hour."""

    version: int
    millionths: int


@dataclass(frozen=True, slots=True, order=True)
class UsageGroup:
    """Integer milli-GPU-seconds of one contract at one price inside `span`; negative when it takes back what was billed."""

    contract: int
    meter: str
    price: Price
    span: Interval
    quantity: int


@dataclass(frozen=True, slots=True, order=True)
class Line:
    """One rated line: `amount` minor units for `quantity` milli-GPU-seconds at `price` inside `span`."""

    contract: int
    kind: LineKind
    meter: str
    price: Price
    span: Interval
    quantity: int
    amount: int


@dataclass(frozen=True, slots=True)
class Commitment:
    """What a reserved or flexible contract holds: `milli_gpus` over `term`, free during `curtailed`.

    `curtailed` is empty for a reserved contract. `overage` prices what goes beyond the month's commitment.
    """

    contract: int
    meter: str
    milli_gpus: int
    term: Interval
    price: Price
    overage: Price
    curtailed: tuple[Interval, ...] = ()


def rated(kind: LineKind, group: UsageGroup, currency: str) -> Line:
    """One line of one group, rounded once."""
    amount = round_half_away(exact_amount(group.quantity, group.price.millionths, currency))
    return Line(group.contract, kind, group.meter, group.price, group.span, group.quantity, amount)


def rate_usage(groups: Iterable[UsageGroup], currency: str, *, kind: LineKind = LineKind.USAGE) -> tuple[Line, ...]:
    """Lines of running time, one per (contract, meter, price, span); groups of one key are summed before rounding."""
    totals: dict[tuple[int, str, Price, Interval], int] = {}
    for group in groups:
        key = (group.contract, group.meter, group.price, group.span)
        totals[key] = totals.get(key, 0) + group.quantity
    return tuple(
        rated(kind, UsageGroup(*key, quantity), currency) for key, quantity in sorted(totals.items()) if quantity
    )


def committed_quantity(commitment: Commitment, window: Interval) -> int:
    """Milli-GPU-seconds that the commitment promises and bills inside `window`, curtailed seconds taken out."""
    held = subtract(clip((commitment.term,), window), commitment.curtailed)
    return commitment.milli_gpus * sum(piece.seconds for piece in held)


def rate_commitment(
    commitment: Commitment,
    window: Interval,
    currency: str,
    *,
    used: int,
    billed_commitment: int = 0,
    billed_overage: int = 0,
) -> tuple[Line, ...]:
    """The commitment and overage lines of `window`, which lies inside one UTC month.

    `used` is the contract's milli-GPU-seconds from the month's start to the window's end; `billed_commitment` and
    `billed_overage` are the quantities of that month that earlier invoices carry. Both lines are what is due to date
    less what was billed, so a month invoiced in several windows comes to the same quantities as in one, and a
    correction of the past appears as a smaller or negative line. Drawdown first: only what exceeds the commitment of
    the whole month is overage.
    """
    month = month_of(window.start)
    if window.end > month.end:
        raise ValueError("a commitment is rated inside one UTC month; cut the window with month_windows")
    to_date = Interval(month.start, window.end)
    committed = committed_quantity(commitment, to_date) - billed_commitment
    over = max(0, used - committed_quantity(commitment, month)) - billed_overage
    due = ((LineKind.COMMITMENT, commitment.price, committed), (LineKind.OVERAGE, commitment.overage, over))
    return tuple(
        rated(kind, UsageGroup(commitment.contract, commitment.meter, price, window, quantity), currency)
        for kind, price, quantity in due
        if quantity
    )


def month_of(second: int) -> Interval:
    """The UTC calendar month that holds `second`, in whole seconds; its length knows leap years."""
    at = instant(second)
    start = datetime(at.year, at.month, 1, tzinfo=UTC)
    following = datetime(at.year + at.month // 12, at.month % 12 + 1, 1, tzinfo=UTC)
    return Interval(floor_second(start), floor_second(following))


def month_windows(window: Interval) -> tuple[Interval, ...]:
    """`window` cut at each UTC month's start."""
    pieces: list[Interval] = []
    start = window.start
    while start < window.end:
        end = min(window.end, month_of(start).end)
        pieces.append(Interval(start, end))
        start = end
    return tuple(pieces)


def total(lines: Iterable[Line]) -> int:
    """The sum of rounded lines in minor units: what the invoice says at its foot."""
    return sum(line.amount for line in lines)
