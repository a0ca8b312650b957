"""Standing bids against what is offered, price first, then time. Pure, integers only.

A bid wants GPUs of one model in one region for a length of time that begins within a range, at a limit or less. An ask is an offer
with its price and its exact capacity (`core.capacity`). Prices: millionths of the major unit per GPU-hour; times: whole seconds.

The rule, in this order:

1. Bids stand in line by the higher limit, then the older bid, then the smaller id.
2. Each in its turn looks at the asks at its limit or under it: the cheapest first, then the older, then the smaller id.
3. At an ask it takes the earliest start in its range at which all that it wants fits, and pays the ask's price, never its own limit.
   One that takes parts takes, where not all fits, the most that does, at the earliest start at which that is so, and no less than
   its least; what it still wants it seeks at the next ask.
4. What is taken is gone for the next in line.

Hence: nobody pays over his limit, nothing is taken twice, the order of the input means nothing, and of two bids that want the same, the
one behind gets nothing that the one before could have had instead of nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from scheduler.core import capacity
from scheduler.core.capacity import Claim, Pool, Shape

STARTS: Final = 64  # of one bid at one ask that are tried: the beginning, and where claims end
MINUTE: Final = 60


class Bid(NamedTuple):
    """`gpus` wanted still, `least` the least that one match may be of; start in [earliest, latest]; `site` 0: any of the region."""

    id: int
    since: int
    limit: int
    gpus: int
    least: int
    level: str
    earliest: int
    latest: int
    duration: int
    kind: str
    buyer: int
    site: int = 0


class Ask(NamedTuple):
    """Asks of one `shelf` sell the same capacity: their pools are equal.
    `window`: sold as a whole or not at all (a resale). `least`: of one match; `chunk`: GPUs come by this on one host. `only`: whom
    it is for (None: everybody); `never`: whom it is not for, its own seller. Terms in seconds; `until`: starts before it only.
    """

    id: int
    since: int
    price: int
    kind: str
    shelf: int
    pool: Pool
    chunk: int
    least: int
    lead: int
    site: int
    shortest: int
    longest: int
    window: tuple[int, int] | None = None
    only: frozenset[int] | None = None
    never: int = 0


class Match(NamedTuple):
    """`gpus` of `ask` for `bid` in [start, end) at `price`."""

    bid: int
    ask: int
    gpus: int
    start: int
    end: int
    price: int


def line(bids: Iterable[Bid]) -> list[Bid]:
    """In the order in which they are served."""
    return sorted(bids, key=lambda bid: (-bid.limit, bid.since, bid.id))


def match(bids: Iterable[Bid], asks: Sequence[Ask], now: int) -> list[Match]:
    """All that can be sold now, in the order of the line. Raises ValueError for a bid without meaning, and for two of one id."""
    waiting = line(bids)
    if len({bid.id for bid in waiting}) < len(waiting) or len({ask.id for ask in asks}) < len(asks):
        raise ValueError("an id stands twice in the book")
    if any(bid.gpus < 1 or not 1 <= bid.least <= bid.gpus or bid.duration < 1 for bid in waiting):
        raise ValueError("a bid wants at least one GPU for a second, and its least is no more than all of it")
    offered = sorted(asks, key=lambda ask: (ask.price, ask.since, ask.id))
    pools = {ask.shelf: ask.pool for ask in offered}
    found: list[Match] = []
    for bid in waiting:
        wanted = bid.gpus
        for ask in offered:
            if ask.price > bid.limit:
                break
            if not wanted or not suits(bid, ask):
                continue
            taken = _take(bid, min(bid.least, wanted), wanted, ask, pools[ask.shelf], now)
            if taken is None:
                continue
            made, claim = taken
            pools[ask.shelf] = pools[ask.shelf].plus(claim)
            found.append(made)
            wanted -= made.gpus
    return found


def suits(bid: Bid, ask: Ask) -> bool:
    """Could the bid ever be met there? Price and room aside."""
    return (
        bid.kind == ask.kind
        and bid.site in {0, ask.site}
        and (ask.only is None or bid.buyer in ask.only)
        and bid.buyer != ask.never
        and ask.shortest <= bid.duration <= ask.longest
        and (ask.window is None or _covers(*ask.window, bid))
    )


def _covers(start: int, end: int, bid: Bid) -> bool:
    return end - start == bid.duration and bid.earliest <= start <= bid.latest


def starts(bid: Bid, ask: Ask, pool: Pool, now: int) -> Iterator[int]:
    """When it could begin where it suits, the earliest first: room appears only where the range begins and where claims end."""
    if ask.window is not None:
        if ask.window[0] > now:
            yield ask.window[0]
        return
    first = _minute(max(bid.earliest, now))
    if first > bid.latest:
        return
    yield first
    freed = {_minute(int(end) + ask.lead) for end in pool.ends}
    yield from [at for at in sorted(freed) if first < at <= bid.latest][:STARTS]


def _minute(second: int) -> int:
    return -(-second // MINUTE) * MINUTE


def _take(bid: Bid, least: int, wanted: int, ask: Ask, pool: Pool, now: int) -> tuple[Match, Claim] | None:
    """The best that the ask has for the bid, and the claim that it makes there."""
    best: tuple[int, int] | None = None
    for start in starts(bid, ask, pool, now):
        t1, t2 = capacity.claim_window(start, start + bid.duration, ask.lead, now)
        room = capacity.largest(pool, Shape(ask.chunk), bid.level, t1, t2)
        gpus = min(room, wanted) // ask.chunk * ask.chunk
        if gpus >= max(least, ask.least) and (best is None or gpus > best[0]):
            best = gpus, start
            if gpus == wanted:
                break
    if best is None:
        return None
    gpus, start = best
    t1, t2 = capacity.claim_window(start, start + bid.duration, ask.lead, now)
    room_found = capacity.admit(pool, Shape(ask.chunk), bid.level, gpus, t1, t2)
    claim = Claim(("bid", bid.id), t1, t2, room_found.hold, bid.level, ask.chunk)
    return Match(bid.id, ask.id, gpus, start, start + bid.duration, ask.price), claim
