"""The spot auction: a uniform price for one market and one interval, by the highest bids that fit. Pure, integers only.

A market is a set of GPUs that every bid in it could be delivered from. Supply comes in steps, each with the floor under which
none of it is sold; demand in lots, each a job that is served whole or not at all, at the limit of its bid. Quantities are
milli-GPU, prices millionths of the major unit per GPU-hour, times whole seconds.

The rule, in this order:

1. Lots stand in line by the higher limit, then the older bid, then the smaller bid id, then their place within the bid.
2. Each lot in its turn is served if it fits whole into what steps with a floor at or under its limit still have, cheapest
   first. One that does not fit is passed over, and the next has its turn: a large gang never idles what a small job would pay for.
3. The price is the lowest that clears: the highest of the dearest floor sold at, and the limits of lots behind the last one
   served that wanted GPUs and got none. Never above the lowest limit served. Where nothing is sold it is the lowest floor.

Hence: nobody pays over his limit, nothing is sold under its floor, who bids more never gets less, and the order of the input
means nothing. With lots of one size the surplus, sum of (limit - floor), is the largest there is; with others, what a
passed-over lot leaves to lower bids is the cost of whole lots.

Monotone also for a bid of several lots, given more room C' >= C: if its first lot fits both times or neither, the rest is the
same question again; if it fits into C' alone, it is larger than C, and with it the bid has more than all of C.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Final, NamedTuple

INTERVAL_S: Final = 300


class Loss(StrEnum):
    """Why a lot is not served. Names are stable: they are stored and shown."""

    UNDER_FLOOR = "under_floor"  # its limit is below every floor: no supply is for sale to it
    OUTBID = "outbid"  # others who bid more, or as much and before it, take the GPUs
    DOES_NOT_FIT = "does_not_fit"  # it is larger than what those before it leave, and smaller ones behind it go on


class Step(NamedTuple):
    """`milli` milli-GPU that are not sold under `floor`."""

    floor: int
    milli: int


class Lot(NamedTuple):
    """A job of a bid: `bid` is its contract, `since` when that was made, `place` the job's place among its own (distinct)."""

    bid: int
    since: int
    limit: int
    place: int
    milli: int


class Cleared(NamedTuple):
    """`price`: of the interval; None in a market without supply. `served`: indices of lots, in line; `lost`: index -> why."""

    price: int | None
    served: tuple[int, ...]
    lost: dict[int, Loss]
    supply: int
    demand: int
    sold: int


def interval_of(second: int) -> int:
    """The start of the interval that `second` lies in."""
    return second - second % INTERVAL_S


def clear(steps: Iterable[Step], lots: Sequence[Lot]) -> Cleared:
    """The auction. Raises ValueError for a quantity below 1 or a negative price."""
    ladder = sorted(step for step in steps if step.milli > 0)
    if any(lot.milli < 1 or lot.limit < 0 for lot in lots) or any(step.floor < 0 for step in ladder):
        raise ValueError("a lot wants at least 1 milli-GPU, and prices are not negative")
    line = sorted(range(len(lots)), key=lambda i: (-lots[i].limit, lots[i].since, lots[i].bid, lots[i].place))
    left = sum(step.milli for step in ladder)  # for sale at the limit in turn, less what is sold; falls with the limit
    top = len(ladder)
    sold, served, lost = 0, [], {}
    last = -1
    for at, i in enumerate(line):
        lot = lots[i]
        while top and ladder[top - 1].floor > lot.limit:
            top -= 1
            left -= ladder[top].milli
        if lot.milli <= left:
            sold, left, last = sold + lot.milli, left - lot.milli, at
            served.append(i)
        else:
            lost[i] = Loss.OUTBID if top else Loss.UNDER_FLOOR
    for i in line[: last + 1]:
        if i in lost:
            lost[i] = Loss.DOES_NOT_FIT
    behind = [lots[i].limit for i in line[last + 1 :] if lost[i] is Loss.OUTBID]
    price = max([_dearest(ladder, sold), *behind]) if ladder else None
    demand = sum(lot.milli for lot in lots)
    return Cleared(price, tuple(served), lost, sum(s.milli for s in ladder), demand, sold)


def _dearest(ladder: Sequence[Step], sold: int) -> int:
    """The floor of the last step of which anything is sold; that of the first where nothing is."""
    for step in ladder:
        sold -= step.milli
        if sold <= 0:
            return step.floor
    return ladder[-1].floor


def surplus(steps: Iterable[Step], lots: Sequence[Lot], served: Iterable[int]) -> int:
    """What the sale is worth over the floors: sum of (limit - floor) x milli-GPU, the cheapest steps first."""
    chosen = [lots[i] for i in served]
    worth, need = sum(lot.limit * lot.milli for lot in chosen), sum(lot.milli for lot in chosen)
    for step in sorted(steps):
        part = min(need, step.milli)
        worth, need = worth - part * step.floor, need - part
    if need:
        raise ValueError("more is served than there is")
    return worth


def bound(steps: Iterable[Step], lots: Sequence[Lot]) -> int:
    """A surplus that no sale exceeds: the best there would be if every lot could be cut."""
    ladder = sorted(steps)
    worth, at, left = 0, 0, ladder[0].milli if ladder else 0
    for lot in sorted(lots, key=lambda lot: -lot.limit):
        need = lot.milli
        while need and at < len(ladder) and ladder[at].floor < lot.limit:
            part = min(need, left)
            worth, need, left = worth + part * (lot.limit - ladder[at].floor), need - part, left - part
            if not left:
                at += 1
                left = ladder[at].milli if at < len(ladder) else 0
    return worth
