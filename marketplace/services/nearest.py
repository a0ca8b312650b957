"""What could be had instead of a quote that cannot be given: the nearest first, each one admitted as it stands when it is offered.

Distance, in thousandths, says how far an offer is from what was asked; each part is one sentence:

- time: days by which it begins earlier or later, against the length of what was asked (at least a day);
- part: the share of the GPUs, or of the time, that it leaves out;
- level: 150 for each step to a wider cell (from one leaf to one fabric, say);
- place: 50 for another listing at the site, 100 at another site, 200 in another region;
- price: the share by which a GPU-hour costs more than was asked; what costs less is as near as the same price.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final

from django.conf import settings

from marketplace.compiled import Compiled, shape_of, slot
from marketplace.errors import MarketError
from marketplace.models import Listing, Organization, Quote
from marketplace.services import availability, listings, price_tiers, quote_terms, quoted, search
from marketplace.services.availability import HOLDING, Market, instant, seconds
from marketplace.services.price_tiers import Option
from marketplace.services.quote_terms import Request
from marketplace.tenancy import Actor
from scheduler.core import capacity
from scheduler.core.capacity import LEVELS, Shape

OTHER_LISTINGS: Final = 3
LOOKED_AT: Final = 8  # other listings with room, cheapest first, of which the nearest are offered
LEVEL_STEP: Final = 150
SAME_SITE, OTHER_SITE, OTHER_REGION = 50, 100, 200
DAY_S: Final = 86_400


# A listing, where the actor may see it.
SEEN = Compiled(
    lambda actor: (
        Listing.objects.visible_to(actor)
        .select_related("site__cell", "gpu_model", "organization", "resale", "reliability")
        .filter(pk=slot("listing"))
    )
)


@dataclass(frozen=True)
class Offer:
    """`what`: later | earlier | shorter | fewer | level | listing. `distance`: see above."""

    what: str
    listing: Listing
    wanted: Request
    option: Option
    distance: int

    @property
    def price(self) -> int:
        return self.option.price


def alternatives(
    actor: Actor, listing: Listing, asked: Quote, other: capacity.Alternatives | None, *, now: datetime, market: Market | None = None
) -> dict[str, Any]:  # fmt: skip
    """`nearest`: offers by distance, each with its amounts and the body that asks for its quote. Beside it, the bare figures: the
    largest block per level in the window, the next window, the latest end, listings with room.

    `other`: what the core found on the asked listing; `market`: that listing as it was read for it.
    """
    found: dict[str, Any] = {}
    if other is not None:
        found["gpu_count"] = other.in_window
        found["later"] = None if other.later is None else _window(*other.later)
        found["earlier"] = None if other.earlier is None else _window(*other.earlier)
        found["ends_at"] = None if other.until is None else instant(other.until)
    organization = asked.organization
    offers = [
        *_here(actor, organization, listing, asked, other, now, market),
        *_elsewhere(actor, organization, listing, asked, now),
    ]
    offers.sort(key=lambda each: (each.distance, each.what, each.listing.pk))
    rows = {each.listing.pk: each.listing for each in offers}  # several are of the listing that was asked
    energy = {pk: quoted.energy(row, now) for pk, row in rows.items()}
    found["nearest"] = [_shown(each, organization, energy[each.listing.pk], now) for each in offers]
    found["listings"] = [
        {
            "listing": each.listing.public_id, "title": each.listing.title, "gpus": each.wanted.gpu_count, "price": each.price,
            "currency": each.listing.currency,
        }
        for each in offers
        if each.what == "listing"
    ]  # fmt: skip
    return found


def _window(start: int, end: int) -> dict[str, datetime]:
    return {"starts_at": instant(start), "ends_at": instant(end)}


def _request(asked: Quote, now: datetime) -> Request:
    """What was asked, as it would be asked again now."""
    starts_at = asked.starts_at if asked.starts_at > now and not asked.starts_at.second else None
    return Request(
        asked.kind, asked.gpu_count, asked.level, starts_at, asked.ends_at, asked.limit_price, **price_tiers.limits(asked)
    )  # fmt: skip


# --- on the listing that was asked
def _here(
    actor: Actor, organization: Organization, listing: Listing, asked: Quote, other: capacity.Alternatives | None, now: datetime,
    market: Market | None,
) -> Iterator[Offer]:  # fmt: skip
    """As it is offered now, whatever the quote froze: its present terms and price."""
    found = SEEN(shape_of(actor), listing=listing.pk, organization=actor.organization_id)
    if not found or found[0].state != Listing.State.PUBLISHED:
        return
    row = found[0]
    market = market or availability.load([row], now)
    for what, wanted, distance in _changed(_request(asked, now), asked, other, market, row, now):
        option = _option(row, wanted, now)
        if option is not None and _admits(organization, row, wanted, option.price, market, now):
            yield Offer(what, row, wanted, option, distance + _dearer(option.price, asked))


def _changed(
    wanted: Request, asked: Quote, other: capacity.Alternatives | None, market: Market, row: Listing, now: datetime
) -> Iterator[tuple[str, Request, int]]:
    if other is None or wanted.ends_at is None:  # a ceiling: there are only so many
        total = market.totals[row.pk]
        if 0 < total < wanted.gpu_count:
            yield "fewer", replace(wanted, gpu_count=total), 1000 * (wanted.gpu_count - total) // wanted.gpu_count
        return
    start = seconds(max(asked.starts_at, now))
    span = seconds(wanted.ends_at) - start
    for what, window in (("later", other.later), ("earlier", other.earlier)):
        if window is not None and not row.is_resale:  # a resale is had for its own window
            begins = instant(window[0]) if window[0] > seconds(now) else None
            moved = 1000 * abs(window[0] - start) // max(span, DAY_S)
            yield what, replace(wanted, starts_at=begins, ends_at=instant(window[1])), moved
    if other.until is not None and not row.is_resale:
        left_out = 1000 * (seconds(wanted.ends_at) - other.until) // span
        yield "shorter", replace(wanted, ends_at=instant(other.until)), left_out
    chunk = market.chunks[row.pk]
    most = min(other.in_window[wanted.level], wanted.gpu_count - 1) // chunk * chunk
    if most > 0:
        yield "fewer", replace(wanted, gpu_count=most), 1000 * (wanted.gpu_count - most) // wanted.gpu_count
    for step, level in enumerate(LEVELS[LEVELS.index(wanted.level) + 1 :], 1):
        if other.in_window[level] >= wanted.gpu_count:
            yield "level", replace(wanted, level=level), LEVEL_STEP * step
            break


def _option(row: Listing, wanted: Request, now: datetime) -> Option | None:
    try:
        price = listings.price_of(row, wanted.kind, now=now)
        return quote_terms.option_of(row, wanted, now) if wanted.kind in HOLDING else Option(price)
    except MarketError:
        return None


def _admits(
    organization: Organization, row: Listing, wanted: Request, price: int, market: Market, now: datetime
) -> bool:
    """Terms, limits and room: a quote asked for at this moment is given."""
    try:
        starts_at = quote_terms.check(row, organization, wanted, price, now, chunk=market.chunks[row.pk])
    except MarketError:
        return False
    if wanted.kind not in HOLDING or wanted.ends_at is None:
        return wanted.gpu_count <= market.totals[row.pk]
    t1, t2 = availability.claim_window(row, starts_at, wanted.ends_at, now)
    return capacity.largest(market.pool, Shape(market.chunks[row.pk]), wanted.level, t1, t2) >= wanted.gpu_count


# --- on others
def _elsewhere(actor: Actor, organization: Organization, listing: Listing, asked: Quote, now: datetime) -> list[Offer]:
    """Other listings of the same GPUs with room for all that was asked, in its window; the nearest OTHER_LISTINGS."""
    wanted = _request(asked, now)
    holding = wanted.kind in HOLDING
    asks = search.Filters(
        gpu_model=(listing.gpu_model.name,) if listing.gpu_model else (), kind=wanted.kind, count=wanted.gpu_count,
        start=max(asked.starts_at, now) if holding else None, end=wanted.ends_at if holding else None,
        level=wanted.level if holding else "site", resale=False,
        upfront_max_permille=wanted.upfront_max_permille, flexible_hours_max=wanted.flexible_hours_max,
    )  # fmt: skip
    rows = [
        f.listing for f in search.search(actor, asks, now=now, limit=LOOKED_AT + 1).rows if f.listing.pk != listing.pk
    ]
    if not rows:
        return []
    market = availability.load(rows, now)
    found: list[Offer] = []
    for row in rows:
        option = _option(row, wanted, now)
        alone = Market(market.pool.of_site(row.pk), market.beats, market.totals, market.chunks)
        if option is not None and _admits(organization, row, wanted, option.price, alone, now):
            distance = _place(listing, row) + _dearer(option.price, asked)
            found.append(Offer("listing", row, wanted, option, distance))
    return sorted(found, key=lambda each: (each.distance, each.price, each.listing.pk))[:OTHER_LISTINGS]


def _place(asked: Listing, row: Listing) -> int:
    if row.site_id == asked.site_id:
        return SAME_SITE
    return OTHER_SITE if row.site.region == asked.site.region else OTHER_REGION


def _dearer(price: int, asked: Quote) -> int:
    return max(0, 1000 * (price - asked.price) // max(1, asked.price))


# --- as it is shown
def _shown(offer: Offer, organization: Organization, energy: dict[str, Any] | None, now: datetime) -> dict[str, Any]:
    row, wanted = offer.listing, offer.wanted
    starts_at = wanted.starts_at or now
    total = None
    if wanted.kind in HOLDING and wanted.ends_at is not None:
        total = quote_terms.total_minor(wanted.gpu_count, starts_at, wanted.ends_at, offer.price, row.currency)
    made = Quote(
        organization=organization, listing=row, kind=wanted.kind, gpu_count=wanted.gpu_count, level=wanted.level,
        starts_at=starts_at, ends_at=wanted.ends_at,
        price=offer.price, currency=row.currency, total_minor=total, fee_permille=settings.PLATFORM_FEE_PERMILLE,
        terms={"upfront_permille": offer.option.upfront_permille, "energy": energy},
    )  # fmt: skip
    body = {
        "listing": row.public_id, "kind": wanted.kind, "gpu_count": wanted.gpu_count, "level": wanted.level,
        **({"starts_at": wanted.starts_at} if wanted.starts_at else {}),
        **({"ends_at": wanted.ends_at} if wanted.ends_at else {}),
        **({"limit_price": wanted.limit_price} if wanted.limit_price else {}),
        **price_tiers.limits(wanted),
    }  # fmt: skip
    return {
        "what": offer.what,
        "distance": offer.distance,
        "title": row.title,
        "site": row.site.name,
        "region": row.site.region,
        "reliability_permille": score.score_permille if (score := getattr(row, "reliability", None)) else None,
        "price": offer.price,
        "currency": row.currency,
        "items": quote_terms.itemise(made),
        "quote": {"method": "POST", "path": "/api/v1/quotes", "body": body},
    }
