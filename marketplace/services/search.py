"""The market's search: published listings that an actor may see, filtered, sorted, with facets and exact stock.

Which offers match, in which order, and how much of them is free is worked out on the columns of `services.catalogue`, brought up to
date before each search. The rows of the page are then read from the database under the actor's own rule of sight, so that nothing
is shown that is no longer on offer. Four statements at most, whatever the size of the market, while nothing has changed.
"""

import base64
import json
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
from django.db.models import QuerySet

from marketplace import prepared
from marketplace.compiled import Compiled, any_of, shape_of
from marketplace.errors import MarketError
from marketplace.models import Kind, Listing
from marketplace.services import availability, catalogue, host_shape, price_tiers
from marketplace.services.availability import Stock
from marketplace.services.filters import (
    COMPARABLE,
    FACETS,
    FILTER_NAMES,
    Comparison,
    Filters,
    comparisons,
    conditions,
    one_of,
    priced,
)
from marketplace.services.offers import NONE, Mask, Offers, facet
from marketplace.services.price_tiers import Asked, Option
from marketplace.tenancy import Actor
from scheduler.core.claims import Ints

__all__ = [
    "COMPARABLE",
    "FACETS",
    "FILTER_NAMES",
    "SORTS",
    "Checked",
    "Comparison",
    "Filters",
    "Found",
    "Result",
    "comparisons",
    "on_offer",
    "search",
]  # fmt: skip

UNKNOWN = (1 << 62) - 1  # sorts what has no value last
_COLUMN = {
    "vram": "vram_mib",
    "fabric": "fabric_gbps",
    "carbon": "carbon_g_per_kwh",
    "renewable": "renewable_permille",
    "reliability": "reliability_permille",
    "benchmark": "benchmark_score",
    "nvlink": "nvlink_gpus",
    "vcpu": "vcpu_milli",
    "ram": "ram_mib",
    "nvme": "nvme_gib",
    "notice": "eviction_notice_s",
    "term": "min_term_hours",
}
_HEARD = """
SELECT h.listing_id, min(h.beat_at) FROM marketplace_host h JOIN marketplace_site s ON s.id = h.site_id
WHERE h.listing_id = ANY (%s) AND s.mode <> 'off' AND (h.state = 'active' OR (h.state = 'draining' AND h.leaves_at > %s))
  AND h.back_at IS NULL GROUP BY 1
UNION ALL
SELECT x.listing_id, min(h.beat_at) FROM marketplace_resale x
JOIN marketplace_reservationblock b ON b.reservation_id = x.reservation_id
JOIN marketplace_host h ON h.id = b.host_id WHERE x.listing_id = ANY (%s) GROUP BY 1
"""
SORTS = ("price", "-price", "newest", "oldest", *(sign + name for name in _COLUMN for sign in ("", "-")))


@dataclass(frozen=True)
class Checked:
    """`hosts` of a listing on offer, `verified` of them by benchmark; `score` of the poorest, None where one has none."""

    verified: int = 0
    hosts: int = 0
    score: int | None = None


@dataclass(frozen=True)
class Found:
    """`prices`: kind -> what it costs and asks for what was asked; what nothing of the listing meets is left out. `host`: as
    services.host_shape.
    """

    listing: Listing
    stock: Stock
    checked: Checked = Checked()
    prices: dict[str, Option] = field(default_factory=dict)
    host: dict[str, int] | None = None


@dataclass(frozen=True)
class Result:
    """`facets`: {field: {value: offers}}, each counted as if its own filter were off, availability aside. `nothing`: only when no
    offer matched: which filter removed the last ones.
    """

    rows: list[Found]
    has_more: bool
    cursor: str | None
    as_of: datetime
    facets: dict[str, dict[str, int]] = field(default_factory=dict)
    nothing: dict[str, Any] | None = None


def on_offer(actor: Actor) -> QuerySet[Listing]:
    """Published listings that the actor may see, of the actor's own mode (live or test), whoever owns them."""
    shown = Listing.objects.visible_to(actor).filter(state=Listing.State.PUBLISHED)
    if actor.kind not in {"staff", "system"}:
        shown = shown.filter(site__cell__livemode=actor.livemode)
    return shown


def search(
    actor: Actor,
    wanted: Filters,
    *,
    now: datetime,
    sort: str = "price",
    limit: int = 20,
    cursor: str | None = None,
    with_facets: bool = False,
) -> Result:
    """One page of offers. `sort`: one of SORTS. MarketError("invalid_request") for a sort or cursor that is not ours."""
    if sort not in SORTS:
        raise MarketError("invalid_request", f"sort is {sort}", {"/sort": f"one of {', '.join(SORTS)}"})
    after = _decode(cursor, sort) if cursor else None
    offers = catalogue.read()
    base = offers.visible(actor)
    steps = conditions(offers, wanted, now)
    matching = base.copy()
    for _, mask in steps:
        matching &= mask
    start, end = availability.window(wanted.start, wanted.end, now)
    free = offers.stock(now=now, level=wanted.level, kind=wanted.stock_kind, starts_at=start, ends_at=end)
    if wanted.start is None:
        free = np.maximum(free, offers.resold(now=now, level=wanted.level))
    shown = matching
    if wanted.count is not None or wanted.start is not None:
        shown = matching & (free >= np.maximum(wanted.count or 1, offers.listings["min_gpus"]))
    asked = wanted.asked(now)
    chosen, value = _ordered(offers, shown, sort, wanted.kinds, asked, after)
    page = chosen[:limit]
    more = len(chosen) > limit
    return Result(
        rows=_rows(actor, offers, page, free, asked, now),
        has_more=more,
        cursor=_encode(sort, int(value[page[-1]]), int(offers.listings["id"][page[-1]])) if more else None,
        as_of=now,
        facets=_facets(offers, base, steps, wanted, asked) if with_facets else {},
        nothing=_why_nothing(base, steps, matching, free) if not len(chosen) and cursor is None else None,
    )


_PAGE = Compiled(
    lambda actor: (
        on_offer(actor)
        .select_related("site", "gpu_model", "organization__reliability", "reliability", "resale")
        .filter(any_of("pk", "ids"))
    )
)


# --- rows, in the order asked for
def _ordered(
    offers: Offers, shown: Mask, sort: str, kinds: tuple[Kind, ...], asked: Asked, after: tuple[int, int] | None
) -> tuple[Ints, Ints]:
    """(positions of `shown` behind the cursor in the order asked for, the value of each offer that they are sorted by)."""
    ids = offers.listings["id"]
    descending = sort.startswith("-") or sort == "newest"
    name = sort.lstrip("-")
    if name == "price":
        value = np.full(len(offers), NONE)
        for kind in reversed(kinds):
            price = offers.price(kind, asked)
            value = np.where(price != NONE, price, value)
    else:
        value = ids if name in {"newest", "oldest"} else offers.number(_COLUMN[name])
    if not descending:  # what has no value comes last either way
        value = np.where(value == NONE, UNKNOWN, value)
    sign = -1 if descending else 1
    if after is not None:
        beyond, at = sign * value, sign * after[0]
        shown = shown & ((beyond > at) | ((beyond == at) & (sign * ids > sign * after[1])))
    chosen = np.flatnonzero(shown)
    return chosen[np.lexsort((sign * ids[chosen], sign * value[chosen]))], value


def _rows(actor: Actor, offers: Offers, page: Ints, free: Ints, asked: Asked, now: datetime) -> list[Found]:
    """The offers as the database has them now; one that was withdrawn since the columns were read is left out."""
    ids = offers.listings["id"][page].tolist()
    rows = {row.pk: row for row in _PAGE(shape_of(actor), ids=ids, organization=actor.organization_id)} if ids else {}
    heard = _heard(ids, now)
    totals, stock = offers.totals[page].tolist(), free[page].tolist()
    verified, hosts = offers.verified[page].tolist(), offers.host_count[page].tolist()
    scores = [None if score == NONE else score for score in offers.of_hosts["benchmark_score"][page].tolist()]
    least = np.stack([offers.of_hosts[name][page] for name in host_shape.FIELDS], axis=1).tolist()
    return [
        Found(
            rows[pk],
            Stock(gpus, total, now, heard.get(pk)),
            Checked(*checked),
            price_tiers.all_chosen(rows[pk], asked),
            host_shape.of_values(shape) if shape[0] != NONE else None,
        )
        for pk, gpus, total, shape, *checked in zip(ids, stock, totals, least, verified, hosts, scores, strict=True)
        if pk in rows
    ]


def _heard(listing_ids: list[int], now: datetime) -> dict[int, datetime]:
    """The oldest last beat of each listing's working hosts: the columns do not follow beats, which come every few seconds."""
    return dict(prepared.rows(_HEARD, [listing_ids, now, listing_ids]))


def _encode(sort: str, value: int, pk: int) -> str:
    return base64.urlsafe_b64encode(json.dumps([sort, value, pk]).encode()).decode()


def _decode(cursor: str, sort: str) -> tuple[int, int]:
    try:
        name, value, pk = json.loads(base64.urlsafe_b64decode(cursor.encode()))
        at = int(value), int(pk)
    except (ValueError, TypeError, OverflowError, RecursionError):
        name, at = None, (0, 0)
    if name != sort or max(map(abs, at)) > UNKNOWN or _encode(sort, *at) != cursor:
        raise MarketError(
            "invalid_request", "The cursor is not one of this search and sort; start again.", {"/cursor": "invalid"}
        )
    return at


# --- what else there is
def _facets(
    offers: Offers, base: Mask, steps: list[tuple[str, Mask]], wanted: Filters, asked: Asked
) -> dict[str, dict[str, int]]:
    """Offers per value of each facet, counted as if its own filter were off."""
    common = base.copy()
    for name, mask in steps:
        if name not in {*FACETS, "kind", "price_max", "upfront_max_permille", "flexible_hours_max"}:
            common &= mask
    sells = {kind: priced(offers, (kind,), wanted.price_max, asked) for kind in Kind}
    sold = np.zeros(len(offers), bool)
    for kind in wanted.kinds:
        sold |= sells[kind]
    own = {name: one_of(offers, name, getattr(wanted, name)) for name in FACETS}
    found: dict[str, dict[str, int]] = {}
    for name in FACETS:
        mask = common & sold
        for other, condition in own.items():
            if other != name and condition is not None:
                mask &= condition
        found[name] = facet(offers.listings[name], offers.names, mask)
    for condition in own.values():
        if condition is not None:
            common &= condition
    counts = {kind.value: int((common & sells[kind]).sum()) for kind in Kind}
    found["kind"] = dict(sorted(((k, c) for k, c in counts.items() if c), key=lambda pair: (-pair[1], pair[0])))
    return found


def _why_nothing(base: Mask, steps: list[tuple[str, Mask]], matching: Mask, free: Ints) -> dict[str, Any]:
    """`removed_by`: the filter that took the last offers, in the order of `conditions`, "availability" last; `left_before`: how
    many there were until then; `without`: offers if one filter alone were off (only those that would help). `largest`: the largest
    block there is in the window among what else matches.
    """
    before = int(base.sum())
    if before == 0:
        return {"removed_by": None, "left_before": 0, "without": {}}
    left = base.copy()
    for name, mask in steps:
        left &= mask
        now = int(left.sum())
        if now == 0:
            return {"removed_by": name, "left_before": before, "without": _without(base, steps)}
        before = now
    return {
        "removed_by": "availability",
        "left_before": before,
        "without": {},
        "largest": int(free[matching].max(initial=0)),
    }


def _without(base: Mask, steps: list[tuple[str, Mask]]) -> dict[str, int]:
    fails = np.zeros(len(base), np.int64)
    for _, mask in steps:
        fails += ~mask
    helped = {name: int((base & ((fails - ~mask) == 0)).sum()) for name, mask in steps}
    return {name: offers for name, offers in helped.items() if offers}
