"""Hashprice and energy prices from outside: fetched, checked, stored with time and source. Zero or stale is refused.

mempool.space shapes: /api/v1/mining/hashrate/3d, /api/v1/mining/reward-stats/144 (strings), /api/v1/prices,
/api/blocks/tip/height. A failed or refused fetch changes nothing: the last plan stays, and nothing increases.
"""

import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import httpx
from django.conf import settings

from marketplace.models import FeedValue, Site
from scheduler.core import dispatch, economics

log = logging.getLogger(__name__)
Kind = FeedValue.Kind
MAX_AGE = {
    Kind.DIFFICULTY: timedelta(hours=6),
    Kind.BTC_USD: timedelta(hours=1),
    Kind.BLOCK_HEIGHT: timedelta(hours=6),
    Kind.FEES_SAT: timedelta(hours=6),
    Kind.ENERGY: timedelta(hours=2),
}


def store(
    kind: str, value: int | Decimal, *, source: str, observed_at: datetime, now: datetime, scope: str = ""
) -> bool:
    """Keep a value; False where it is zero, negative, from the future or already known."""
    if value <= 0 or observed_at > now + timedelta(minutes=5):
        log.warning("feed %s of %s refused: value %s observed at %s", kind, source, value, observed_at)
        return False
    _, created = FeedValue.objects.get_or_create(
        kind=kind,
        scope=scope,
        observed_at=observed_at,
        defaults={"value": Decimal(value), "source": source[:80], "fetched_at": now},
    )
    return created


def latest(kind: str, *, now: datetime, scope: str = "") -> FeedValue | None:
    """The newest value that is not stale; None otherwise."""
    row = FeedValue.objects.filter(kind=kind, scope=scope).order_by("-observed_at").first()
    if row is None or now - row.observed_at > MAX_AGE[Kind(kind)]:
        return None
    return row


def fetch_all(*, now: datetime) -> dict[str, bool]:
    """Ask every feed once; what answered is stored. Network happens outside any transaction."""
    found: dict[str, bool] = {}
    base = settings.MEMPOOL_URL
    with httpx.Client(timeout=5) as client:
        for name, url, take in (
            ("difficulty", f"{base}/api/v1/mining/hashrate/3d", _difficulty),
            ("rewards", f"{base}/api/v1/mining/reward-stats/144", _rewards),
            ("prices", f"{base}/api/v1/prices", _prices),
            *((("energy", settings.ENERGY_PRICE_URL, _energy),) if settings.ENERGY_PRICE_URL else ()),
        ):
            found[name] = _fetch(client, url, take, now)
    return found


def _fetch(client: httpx.Client, url: str, take: Callable[[Any, str, datetime], bool], now: datetime) -> bool:
    try:
        answer = client.get(url)
        answer.raise_for_status()
        return take(answer.json(), url, now)
    except (httpx.HTTPError, KeyError, TypeError, ValueError) as error:
        log.warning("feed %s: %s", url, error)
        return False


def _difficulty(body: Any, url: str, now: datetime) -> bool:
    return store(Kind.DIFFICULTY, int(float(body["currentDifficulty"])), source=url, observed_at=_minute(now), now=now)


def _rewards(body: Any, url: str, now: datetime) -> bool:
    blocks = int(body["endBlock"]) - int(body["startBlock"]) + 1
    store(Kind.BLOCK_HEIGHT, int(body["endBlock"]), source=url, observed_at=_minute(now), now=now)
    return store(Kind.FEES_SAT, int(body["totalFee"]) // blocks, source=url, observed_at=_minute(now), now=now)


def _prices(body: Any, url: str, now: datetime) -> bool:
    at = datetime.fromtimestamp(int(body["time"]), UTC)
    return store(Kind.BTC_USD, int(Decimal(str(body["USD"])) * 100), source=url, observed_at=at, now=now)


def _energy(body: Any, url: str, now: datetime) -> bool:
    """`{"prices": [{"zone", "start", "usd_per_mwh"}]}`: the newest interval that has begun, per zone."""
    kept = False
    for row in body["prices"]:
        at = datetime.fromisoformat(row["start"])
        if at <= now:
            micro = int(Decimal(str(row["usd_per_mwh"])) * 1_000_000)
            kept = store(Kind.ENERGY, micro, source=url, observed_at=at, now=now, scope=row.get("zone", "")) or kept
    return kept


def _minute(moment: datetime) -> datetime:
    return moment.replace(second=0, microsecond=0)


def prices(site: Site, *, now: datetime) -> dispatch.Prices | None:
    """What hashing pays and energy costs at the site; None while any feed is stale, and then nothing increases."""
    found = {kind: latest(kind, now=now) for kind in (Kind.DIFFICULTY, Kind.BTC_USD, Kind.BLOCK_HEIGHT, Kind.FEES_SAT)}
    if any(row is None for row in found.values()):
        return None
    value = {kind: int(row.value) for kind, row in found.items() if row is not None}
    reward = economics.subsidy_sat(value[Kind.BLOCK_HEIGHT]) + value[Kind.FEES_SAT]
    energy = latest(Kind.ENERGY, now=now, scope=site.region) or latest(Kind.ENERGY, now=now)
    return dispatch.Prices(
        hashprice_uusd=economics.hashprice_uusd(value[Kind.DIFFICULTY], reward, value[Kind.BTC_USD] * 10_000),
        energy_uusd_mwh=int(energy.value) if energy else site.energy_price_microusd_per_kwh * 1000,
        pool_fee_ppm=settings.POOL_FEE_PERMILLE * 1000,
        pue_permille=site.miner_pue_permille,
    )


def worth_uusd_h(found: dispatch.Prices | None, ghs: int, watts: int) -> int:
    """Micro-USD per hour that a miner's mode earns; without prices its hash rate orders machines as well."""
    if found is None:
        return ghs
    return economics.mode_value_uusd_h(
        found.hashprice_uusd,
        ghs,
        watts,
        found.energy_uusd_mwh,
        pool_fee_ppm=found.pool_fee_ppm,
        pue_permille=found.pue_permille,
    )
