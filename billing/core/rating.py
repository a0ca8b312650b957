"""Usage times price: the lines of an invoice. Preview and final call the same functions.

A line's amount is `milli-GPU-seconds x price / 3,600,000`, an exact rational rounded once, half away from zero. Input
is integer quantities grouped by contract, meter and price version; how the groups were cut, ordered or merged before
does not change a line, because they are summed first.

Kinds: `on_demand` and `spot` bill running seconds (spot with one price version per clearing price); `reserved` bills
its commitment whether used or not, prorated by seconds, and what goes beyond the month's commitment as overage at the
on-demand price; `flexible` is `reserved` less the curtailed time, and so
is what leaves in a grid emergency. What of a commitment could not be had is `credit`.
Where a call of the grid holds GPUs lower, the share of their power that is withheld comes back (`held_lower`, ADR 23): of running
seconds at the price of each, of a commitment at most what it comes to there, and nothing besides what is curtailed or missed.
What was paid at signing (`upfront`) is drawn down by the commitment, first things first, and what is left of it at the
end is given back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum

from billing.core.metering import Interval, clip, cut, floor_second, instant, subtract
from billing.core.money import exact_amount, round_half_away


class LineKind(StrEnum):
    USAGE = "usage"
    COMMITMENT = "commitment"
    OVERAGE = "overage"
    UPFRONT = "upfront"
    DRAWDOWN = "drawdown"
    RESALE = "resale"
    CREDIT = "credit"
    HELD_LOWER = "held_lower"


WORDS = {
    LineKind.USAGE: "used",
    LineKind.COMMITMENT: "reserved",
    LineKind.OVERAGE: "beyond the reservation",
    LineKind.CREDIT: "reserved but missing",
    LineKind.HELD_LOWER: "credited for GPUs held lower",
}


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
class Added:
    """A part of a commitment: `milli_gpus` over `term` at a price of their own, as of GPUs that joined later."""

    milli_gpus: int
    term: Interval
    price: Price


@dataclass(frozen=True, slots=True)
class Missed:
    """`milli_gpus` of a commitment that could not be had during `span`."""

    milli_gpus: int
    span: Interval


@dataclass(frozen=True, slots=True)
class Commitment:
    """What a reserved or flexible contract holds: `milli_gpus` over `term`, free during `curtailed`, what was `added`, what it
    `missed` and does not owe, and what of its running GPUs' power was `withheld`, as GPUs.

    `sold` is somebody else's to use: it stays due, to the end of its own window, and is no part of what may be drawn down.
    `curtailed` is empty for a reserved contract that names no emergency. `overage` prices what goes beyond the month's commitment.
    """

    contract: int
    meter: str
    milli_gpus: int
    term: Interval
    price: Price
    overage: Price
    curtailed: tuple[Interval, ...] = ()
    added: tuple[Added, ...] = ()
    sold: tuple[Added, ...] = ()
    missed: tuple[Missed, ...] = ()
    withheld: tuple[Missed, ...] = ()

    def parts(self) -> tuple[Added, ...]:
        """All that it owes, what was there from the beginning first, and what was sold on beyond an early end."""
        kept = (Added(p.milli_gpus, Interval(max(p.term.start, self.term.end), p.term.end), p.price) for p in self.sold)
        return (
            Added(self.milli_gpus, self.term, self.price),
            *self.added,
            *(p for p in kept if p.term.start < p.term.end),
        )


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
    return sum(committed_by_price(commitment, window).values())


def committed_by_price(commitment: Commitment, window: Interval) -> dict[Price, int]:
    """`committed_quantity` by the price that it is billed at."""
    return dict.fromkeys((part.price for part in commitment.parts()), 0) | _by_price(_promised(commitment, window))


def owed(commitment: Commitment, window: Interval) -> Iterator[Added]:
    """What the commitment comes to inside `window`, piece by piece: what is promised, and below zero what is missed or withheld."""
    yield from _promised(commitment, window)
    for taken in _taken(commitment, window, (*commitment.missed, *commitment.withheld)):
        yield replace(taken, milli_gpus=-taken.milli_gpus)


def _promised(commitment: Commitment, window: Interval) -> Iterator[Added]:
    for part in commitment.parts():
        for piece in subtract(clip((part.term,), window), commitment.curtailed):
            yield Added(part.milli_gpus, piece, part.price)


def sold_quantity(commitment: Commitment, window: Interval) -> int:
    """Milli-GPU-seconds of the commitment that others use: sold on, curtailed seconds taken out."""
    return sum(
        part.milli_gpus * sum(piece.seconds for piece in subtract(clip((part.term,), window), commitment.curtailed))
        for part in commitment.sold
    )


def missed_by_price(commitment: Commitment, window: Interval) -> dict[Price, int]:
    """Milli-GPU-seconds of the commitment inside `window` that were missed, by price: the dearest GPUs are missed first, and what
    is curtailed is not missed besides.
    """
    return _by_price(_taken(commitment, window, commitment.missed))


def withheld_by_price(commitment: Commitment, window: Interval) -> dict[Price, int]:
    """Milli-GPU-seconds of the commitment inside `window` whose power was withheld, by price: of what is neither curtailed nor missed,
    the dearest GPUs first.
    """
    if not commitment.withheld:
        return {}
    both = _by_price(_taken(commitment, window, (*commitment.missed, *commitment.withheld)))
    missed = missed_by_price(commitment, window)
    return {price: left for price, n in both.items() if (left := n - missed.get(price, 0))}


def _taken(commitment: Commitment, window: Interval, takes: Sequence[Missed]) -> Iterator[Added]:
    if not takes:
        return
    parts = sorted(commitment.parts(), key=lambda part: (-part.price.millionths, part.price.version))
    marks = {at for span in (*(m.span for m in takes), *(p.term for p in parts)) for at in (span.start, span.end)}
    free = subtract((window,), commitment.curtailed)
    for piece in cut(free, sorted(marks)):
        left = sum(m.milli_gpus for m in takes if m.span.start <= piece.start < m.span.end)
        for part in parts:
            if left and part.term.start <= piece.start < part.term.end:
                taken = min(left, part.milli_gpus)
                yield Added(taken, piece, part.price)
                left -= taken


def _by_price(pieces: Iterable[Added]) -> dict[Price, int]:
    found: dict[Price, int] = {}
    for piece in pieces:
        found[piece.price] = found.get(piece.price, 0) + piece.milli_gpus * piece.term.seconds
    return found


def withheld(milli_gpus: int, gpu_w: int, full_w: int) -> int:
    """Milli-GPUs that are credited each second of `milli_gpus` held to `gpu_w` of their `full_w` each: the share of their power that
    they do not have, to the thousandth of it, rounded up.
    """
    permille = -(-1000 * (full_w - gpu_w) // full_w)
    return -(-milli_gpus * permille // 1000)


def beyond(spans: Iterable[Interval], allowed_s: int) -> tuple[Interval, ...]:
    """What is left of the seconds in `spans`, each counted once, after the first `allowed_s` of them."""
    pieces: list[Interval] = []
    through = None
    for span in sorted(spans, key=lambda span: (span.start, span.end)):
        start = span.start if through is None else max(span.start, through)
        through = span.end if through is None else max(through, span.end)
        if start >= span.end:
            continue
        borne = min(allowed_s, span.end - start)
        allowed_s -= borne
        if start + borne < span.end:
            pieces.append(Interval(start + borne, span.end))
    return tuple(pieces)


def rate_commitment(
    commitment: Commitment,
    window: Interval,
    currency: str,
    *,
    used: int,
    billed: Mapping[Price, int] | None = None,
    credited: Mapping[Price, int] | None = None,
    held_lower: Mapping[Price, int] | None = None,
) -> tuple[Line, ...]:
    """The commitment, overage and credit lines of `window`, which lies inside one UTC month.

    `used` is the contract's milli-GPU-seconds from the month's start to the window's end; `billed` are the quantities of
    that month that earlier invoices carry, by price. Each line is what is due to date less what was billed, so a month
    invoiced in several windows comes to the same quantities as in one, and a correction of the past appears as a smaller
    or negative line. Drawdown first: only what exceeds the GPUs that it holds over the whole month is overage; what still ran
    while a curtailment had begun is not. What was missed comes back as credit, a negative line of its own, and `credited` are
    such quantities of earlier invoices; so does the power withheld, and `held_lower`.
    """
    month = month_of(window.start)
    if window.end > month.end:
        raise ValueError("a commitment is rated inside one UTC month; cut the window with month_windows")
    earlier, given, eased = billed or {}, credited or {}, held_lower or {}
    until = Interval(month.start, window.end)
    held = replace(commitment, curtailed=())
    theirs = sold_quantity(held, month) + sum(missed_by_price(commitment, month).values())
    over = max(0, used - committed_quantity(held, month) + theirs)
    free, less = missed_by_price(commitment, until), withheld_by_price(commitment, until)
    due = [
        *((LineKind.COMMITMENT, p, n - earlier.get(p, 0)) for p, n in committed_by_price(commitment, until).items()),
        (LineKind.OVERAGE, commitment.overage, over - earlier.get(commitment.overage, 0)),
        *((LineKind.CREDIT, p, -free.get(p, 0) - given.get(p, 0)) for p in sorted({*free, *given})),
        *((LineKind.HELD_LOWER, p, -less.get(p, 0) - eased.get(p, 0)) for p in sorted({*less, *eased})),
    ]
    return tuple(
        rated(kind, UsageGroup(commitment.contract, commitment.meter, price, window, left), currency)
        for kind, price, left in due
        if left
    )


def drawn(prepaid: int, commitment: int, *, over: bool) -> int:
    """Minor units that an invoice takes from what was paid at signing: as much as its `commitment` lines come to, while
    there is any; all that is left, once the contract is `over` (curtailed time and an early end leave some, which goes back).
    """
    return max(0, prepaid if over else min(prepaid, commitment))


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
