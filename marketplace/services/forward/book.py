"""The book, for everybody: what is bid and offered for a GPU model in a region, month by month and price by price, and what was sold.

Nobody's name is in it. A bid counts in every month in which it could run; an offer in a month where it has room for all of what is
left of the month, a resale where its window touches it. Offers for named partners alone are left out.
"""

from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
from django.db.models import Q, QuerySet

from marketplace.errors import MarketError
from marketplace.models import Fill, GpuModel, Listing, Resale, Site, StandingBid
from marketplace.services import catalogue
from marketplace.services.availability import seconds
from marketplace.services.filters import one_of
from marketplace.services.offers import NONE
from marketplace.services.price_tiers import Asked
from marketplace.tenancy import Actor

MONTHS = 12
LEVELS = 50  # of price, on each side, the best first
MOST = 2_000  # bids and offers that one reading adds up


@dataclass(frozen=True)
class Level:
    """`gpus` of `count` bids or offers at `price`."""

    price: int
    gpus: int
    count: int


@dataclass(frozen=True)
class Depth:
    """Bids by the highest price, offers by the lowest; `start` and `end`: of the month, UTC. One currency."""

    gpu_model: str
    region: str
    start: datetime
    end: datetime
    currency: str
    bids: tuple[Level, ...]
    offers: tuple[Level, ...]


def months(now: datetime, count: int = MONTHS) -> list[datetime]:
    """The first instants of this month and of those after it."""
    at = now.astimezone(UTC)
    return [
        datetime(at.year + (at.month - 1 + n) // 12, (at.month - 1 + n) % 12 + 1, 1, tzinfo=UTC) for n in range(count)
    ]


def depth(model: GpuModel, region: str, month: datetime, *, livemode: bool, currency: str, now: datetime) -> Depth:
    """One month's book: the listings from the columns of the catalogue, bids and resales by their indexes."""
    end = months(month, 2)[1]
    return Depth(
        model.name, region, month, end, currency,
        bids=_levels(_bids(model, region, month, end, livemode, currency, now), highest=True),
        offers=_levels(_offers(model, region, month, end, livemode, currency, now), highest=False),
    )  # fmt: skip


def _levels(pairs: list[tuple[int, int]], *, highest: bool) -> tuple[Level, ...]:
    gpus: dict[int, int] = defaultdict(int)
    count: dict[int, int] = defaultdict(int)
    for price, number in pairs:
        gpus[price] += number
        count[price] += 1
    return tuple(Level(price, gpus[price], count[price]) for price in sorted(gpus, reverse=highest)[:LEVELS])


def _bids(
    model: GpuModel, region: str, start: datetime, end: datetime, livemode: bool, currency: str, now: datetime
) -> list[tuple[int, int]]:
    rows = StandingBid.objects.filter(
        livemode=livemode, gpu_model=model, region=region, state="open", currency=currency, expires_at__gt=now, earliest__lt=end
    ).order_by("-limit_price", "created_at", "id")  # fmt: skip
    return [
        (row.limit_price, row.wanted) for row in rows[:MOST] if row.latest + timedelta(seconds=row.duration_s) > start
    ]


def _offers(
    model: GpuModel, region: str, start: datetime, end: datetime, livemode: bool, currency: str, now: datetime
) -> list[tuple[int, int]]:
    listed = catalogue.read()
    rows = listed.listings
    shown = (rows["partners_only"] == 0) & (rows["livemode"] == int(livemode)) & (rows["is_resale"] == 0)
    price = listed.price("reserved", Asked(seconds(end) - seconds(max(start, now))))
    shown &= price != NONE
    for name, value in (("gpu_model", model.name), ("region", region), ("currency", currency)):
        among = one_of(listed, name, (value,))
        shown &= among if among is not None else True
    free = listed.stock(now=now, level="site", kind="reserved", starts_at=max(start, now), ends_at=end)
    here = np.flatnonzero(shown & (free > 0))
    found = list(zip(price[here].tolist(), free[here].tolist(), strict=True))
    sold_on = Resale.objects.filter(
        Q(listing__reserved_price__isnull=False) | Q(listing__flexible_price__isnull=False), state=Resale.State.OPEN,
        expires_at__gt=now, starts_at__lt=end, ends_at__gt=start, currency=currency, contract__gpu_model=model,
        contract__site__region=region, contract__cell__livemode=livemode, listing__visibility=Listing.Visibility.PUBLIC,
    )  # fmt: skip
    return found + [(row.price, row.left) for row in sold_on.order_by("price", "pk")[:MOST]]


def model_of(name: str) -> GpuModel:
    """MarketError("not_found") for a GPU model that we do not know."""
    found = GpuModel.objects.filter(name=name).first()
    if found is None:
        raise MarketError("not_found", f"There is no GPU model {name}.")
    return found


def choices(*, livemode: bool) -> tuple[list[str], list[str]]:
    """(GPU models, regions) that a bid can name."""
    models = GpuModel.objects.order_by("name").values_list("name", flat=True)
    regions = Site.objects.filter(cell__livemode=livemode).order_by("region").values_list("region", flat=True)
    return list(models), list(regions.distinct())


def books(*, livemode: bool) -> list[tuple[str, str]]:
    """(GPU model, region) of every book in which something is bid or offered for the time to come, by name."""
    offered = Listing.objects.filter(
        Q(reserved_price__isnull=False) | Q(flexible_price__isnull=False), state=Listing.State.PUBLISHED,
        visibility=Listing.Visibility.PUBLIC, site__cell__livemode=livemode, gpu_model__isnull=False,
    ).values_list("gpu_model__name", "site__region")  # fmt: skip
    wanted = StandingBid.objects.filter(livemode=livemode, state="open").values_list("gpu_model__name", "region")
    return sorted({*offered.distinct(), *wanted.distinct()})


def fills(actor: Actor, *, gpu_model: str = "", region: str = "") -> QuerySet[Fill]:
    """What was sold and stands, of the actor's own mode."""
    rows = Fill.objects.visible_to(actor).filter(undone_at=None).select_related("gpu_model")
    if actor.kind not in {"staff", "system"}:
        rows = rows.filter(livemode=actor.livemode)
    if gpu_model:
        rows = rows.filter(gpu_model__name=gpu_model)
    return rows.filter(region=region) if region else rows
