"""What is free, when: of one listing at every level of its topology, and of all offers that a search would find.

A step counts what one block could have for all of it, with the lead that its kind keeps clear: what a cell says can be quoted.
Contracts keep their lead clear of each other, so that beside one that begins or ends at midnight no other has the whole day;
where minutes at an edge are all that is missing, the step is shorter by the lead, and says so (`start`, `end`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise

import numpy as np

from marketplace.models import Kind, Listing
from marketplace.services import availability, catalogue, filters, search
from marketplace.services.availability import HOLDING, Market, instant, seconds
from marketplace.services.filters import Filters
from marketplace.services.offers import NONE
from marketplace.tenancy import Actor
from scheduler.core import capacity
from scheduler.core.capacity import LEVELS, Shape

MAX_STEPS = 1000
_AT_ONCE = 64  # steps of a whole market in one sweep: bounds its memory


@dataclass(frozen=True)
class Step:
    """The step that begins at `at`. [start, end): the window that was looked at; `gpus`: the largest block in it at each level."""

    at: datetime
    start: datetime
    end: datetime
    gpus: dict[str, int]


@dataclass(frozen=True)
class MarketStep:
    """As `Step`, of a search: `gpus`, the largest block any of its offers could give; `offers` of them fit the count that is
    asked for, and `cheapest` is the id of the one to take.
    """

    at: datetime
    start: datetime
    end: datetime
    gpus: int
    offers: int
    cheapest: int | None


def steps(starts_at: datetime, ends_at: datetime, step: timedelta, now: datetime) -> list[tuple[datetime, datetime]]:
    """[starts_at, ends_at) cut every `step`; what lies in the past is left out."""
    count = min(MAX_STEPS, max(0, -(-(ends_at - starts_at) // step)))
    cuts = [*(starts_at + i * step for i in range(count)), min(ends_at, starts_at + count * step)]
    return [(max(start, now), end) for start, end in pairwise(cuts) if end > now and end > start]


def kind_of(listing: Listing) -> str:
    """The kind that the calendar is of, where none is asked for: the first that holds capacity, else any that is offered."""
    offered = [kind for kind in Kind.values if listing.price_of(kind) is not None]
    return next((kind for kind in (*HOLDING, *offered) if kind in offered), Kind.RESERVED)


def of_listing(
    listing: Listing, cuts: Sequence[tuple[datetime, datetime]], *, now: datetime, kind: str, market: Market | None = None
) -> list[Step]:  # fmt: skip
    """The largest block of `listing` in each of `cuts`, by level."""
    market = market or availability.load([listing], now)
    own = availability.lead_s(listing)
    lead = own if kind in HOLDING else 0
    asked = [_trimmed(cut, own, now) for cut in cuts]
    windows = [capacity.claim_window(seconds(a), seconds(b), lead, seconds(now)) for each in asked for a, b in each]
    found = capacity.largest_over(market.pool, Shape(market.chunks[listing.pk]), windows)
    rows = iter(list(zip(*(found[level].tolist() for level in LEVELS), strict=True)))
    made: list[Step] = []
    for (at, _), each in zip(cuts, asked, strict=True):
        tried = [next(rows) for _ in each]
        best = tried.index(
            max(tried, key=sum)
        )  # the shortest has the most at every level; the longest that has as much
        made.append(Step(at, *each[best], dict(zip(LEVELS, tried[best], strict=True))))
    return made


def _trimmed(cut: tuple[datetime, datetime], lead_s: int, now: datetime) -> list[tuple[datetime, datetime]]:
    """The step, and the same without the lead at its begin, its end, and both, where that is a small part of it."""
    start, end = cut
    lead = timedelta(seconds=lead_s)
    if lead * 8 > end - start:
        return [cut]
    late = start + lead if start > now else start
    return list(dict.fromkeys([cut, (late, end), (start, end - lead), (late, end - lead)]))


def first_windows(
    listing: Listing,
    *,
    gpus: int,
    level: str,
    span: timedelta,
    starts_at: datetime,
    ends_at: datetime,
    now: datetime,
    kind: str,
    market: Market | None = None,
    limit: int = 3,
) -> list[tuple[datetime, datetime]]:
    """The first windows in which `gpus` can be had for `span` or longer, to the minute, inside the terms of the listing."""
    market = market or availability.load([listing], now)
    chunk = market.chunks[listing.pk]
    if gpus < listing.min_gpus or (kind in HOLDING and gpus % chunk):
        return []
    longest = timedelta(days=listing.max_term_days)
    span = max(span, timedelta(hours=listing.min_term_hours)) if kind in HOLDING else span
    if kind in HOLDING and span > longest:
        return []
    found = capacity.first_windows(
        market.pool, Shape(chunk), level, gpus, int(span.total_seconds()), seconds(max(starts_at, now)), seconds(ends_at),
        lead_s=availability.lead_s(listing) if kind in HOLDING else 0, now=seconds(now), grain_s=60, limit=limit,
    )  # fmt: skip
    windows = [(instant(a), instant(b)) for a, b in found]
    return [(a, min(b, a + longest) if kind in HOLDING else b) for a, b in windows]


def of_search(
    actor: Actor, wanted: Filters, cuts: Sequence[tuple[datetime, datetime]], *, now: datetime
) -> list[MarketStep]:
    """What the offers that match `wanted` could give in each of `cuts`, its window aside. One statement where nothing changed."""
    offers = catalogue.read()
    matching = offers.visible(actor)
    for name, mask in filters.conditions(offers, wanted, now):
        matching &= mask if name != "end" else True
    part = offers.only(offers.listings["id"][matching])
    kind = wanted.kind or Kind.RESERVED
    price = part.price(kind, wanted.asked(now))
    order = np.lexsort((part.listings["id"], np.where(price == NONE, search.UNKNOWN, price)))
    least = np.maximum(wanted.count or 1, part.listings["min_gpus"])
    lead = int(part.lead_s.max(initial=0))
    found: list[MarketStep] = []
    for begin in range(0, len(cuts), _AT_ONCE):
        asked = [
            (at, each) for cut in cuts[begin : begin + _AT_ONCE] for at, each in [(cut[0], _trimmed(cut, lead, now))]
        ]
        tried = [window for _, each in asked for window in (each[0], each[-1])]
        windows = np.array([(seconds(a), seconds(b)) for a, b in tried], np.int64)
        free = part.stock_over(now=now, level=wanted.level, kind=kind, windows=windows)
        fits = (free >= least)[:, order]
        most, count = free.max(axis=1, initial=0).tolist(), fits.sum(axis=1).tolist()
        for i, (at, _) in enumerate(asked):
            best = max(2 * i, 2 * i + 1, key=lambda k: (count[k], most[k]))
            first = int(part.listings["id"][order[int(fits[best].argmax())]]) if count[best] else None
            found.append(MarketStep(at, *tried[best], most[best], count[best], first))
    return found
