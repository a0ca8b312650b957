"""Hashprice and energy prices from outside: fetched, checked, stored with time and source. Zero or stale is refused.

mempool.space shapes: /api/v1/mining/hashrate/3d, /api/v1/mining/reward-stats/144 (strings), /api/v1/prices; prices of energy as
`energy_prices` reads them. A failed or refused fetch changes nothing: the last plan stays, and nothing increases.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from importlib import import_module
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import httpx
from django.conf import settings

from marketplace import prepared
from marketplace.models import FeedValue, Site
from marketplace.services import energy_prices
from scheduler.core import dispatch, economics, tariffs

log = logging.getLogger(__name__)
Kind = FeedValue.Kind
MAX_AGE = {
    Kind.DIFFICULTY: timedelta(hours=6),
    Kind.BTC_USD: timedelta(hours=1),
    Kind.BLOCK_HEIGHT: timedelta(hours=6),
    Kind.FEES_SAT: timedelta(hours=6),
    Kind.ENERGY: timedelta(hours=2),
    Kind.CARBON: timedelta(hours=2),
}
AHEAD = timedelta(minutes=5)
INDEXED = timedelta(days=2)  # the newest day of mempool.space's index began so long ago at the most
MOST = 10**17  # of any number of a feed: a thousand times today's difficulty
HISTORY = timedelta(days=2)  # of a file of a year, what a fetch still looks at
HASHING = (Kind.DIFFICULTY, Kind.BTC_USD, Kind.BLOCK_HEIGHT, Kind.FEES_SAT)
LOCAL = (Kind.ENERGY, Kind.CARBON)  # by zone
SWITCH_H = 1  # hours over which a change of mode must pay for itself: as long as a price of energy stands
SILENT = timedelta(days=7)  # a zone's price as old as this is nobody's feed any more: the site's own price stands

for _plugin in settings.TARIFF_PLUGINS:  # each registers its kinds (scheduler.core.tariffs.register)
    import_module(_plugin)


def store(
    kind: str, value: int | Decimal, *, source: str, observed_at: datetime, now: datetime, scope: str = ""
) -> bool:
    """Keep a value; False where it is zero, negative (but for energy, whose price may be), from the future or already known."""
    if value == 0 or (value < 0 and kind != Kind.ENERGY) or observed_at > now + AHEAD:
        log.warning("feed %s of %s refused: value %s observed at %s", kind, source, value, observed_at)
        return False
    _, created = FeedValue.objects.get_or_create(
        kind=kind,
        scope=scope,
        observed_at=observed_at,
        defaults={"value": Decimal(value), "source": source[:80], "fetched_at": now},
    )
    return created


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
            found[name] = _tried(url, lambda url=url, take=take: take(_json(client, url), url, now))  # type: ignore[misc]
    if path := settings.ENERGY_PRICE_FILE:
        found["energy_file"] = _tried(
            path, lambda: _kept(energy_prices.read_csv(Path(path).read_text()), f"file {Path(path).name}", now)
        )
    if which := settings.GRIDSTATUS_PRICES:
        found["gridstatus"] = _tried(which, lambda: _kept(energy_prices.read_gridstatus(which), "gridstatus", now))
    return found


def _tried(name: str, take: Callable[[], bool]) -> bool:
    try:
        return take()
    except (httpx.HTTPError, OSError, KeyError, TypeError, ValueError) as error:
        log.warning("feed %s: %s", name, error)
        return False


def _json(client: httpx.Client, url: str) -> Any:
    answer = client.get(url)
    answer.raise_for_status()
    try:
        return answer.json()
    except ValueError:
        kind = answer.headers.get("content-type", "no type")
        raise FeedError(f"no JSON but {kind}: {answer.text[:60]!r}") from None


class FeedError(ValueError):
    """A feed's answer that decides nothing; says which field and why."""


def _number(body: Any, name: str) -> Decimal:
    """What is given as a JSON number above zero; mempool.space gives zero while its node is down."""
    value = _field(body, name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FeedError(f"{name} is {value!r}: a number is expected")
    if not 0 < value < MOST:
        raise FeedError(f"{name} is {value!r}: nothing to decide on")
    return Decimal(str(value))


def _sat(body: Any, name: str) -> int:
    """Satoshi, which mempool.space gives as text."""
    value = _field(body, name)
    if not isinstance(value, str) or not (value.isascii() and value.isdigit()):
        raise FeedError(f"{name} is {value!r}: digits in a string are expected")
    if not 0 < int(value) < MOST:
        raise FeedError(f"{name} is {value!r}: nothing to decide on")
    return int(value)


def _field(body: Any, name: str) -> Any:
    if not isinstance(body, dict):
        raise FeedError(f"an object with {name} is expected, not {type(body).__name__}")
    if body.get(name) is None:
        raise FeedError(f"{name} is missing")
    return body[name]


def _fresh(at: datetime, name: str, most: timedelta, now: datetime) -> datetime:
    if now - at > most:
        raise FeedError(f"{name} says {at:%F %R} UTC: older than {most // timedelta(hours=1)} hours")
    return at


def _difficulty(body: Any, url: str, now: datetime) -> bool:
    """It has no time of its own; that of the days beside it says whether their index still runs."""
    value = int(_number(body, "currentDifficulty"))
    days = _field(body, "hashrates")
    if not isinstance(days, list) or not days:
        raise FeedError("hashrates is empty")
    newest = max(int(_number(day, "timestamp")) for day in days)
    _fresh(datetime.fromtimestamp(newest, UTC), "hashrates/timestamp", INDEXED, now)
    return store(Kind.DIFFICULTY, value, source=url, observed_at=_minute(now), now=now)


def _rewards(body: Any, url: str, now: datetime) -> bool:
    """A height that does not move is no news: its values keep the time at which they were first seen, and grow stale."""
    first, last = int(_number(body, "startBlock")), int(_number(body, "endBlock"))
    fee, reward = _sat(body, "totalFee"), _sat(body, "totalReward")
    blocks = last - first + 1
    if blocks < 1 or reward <= fee:
        raise FeedError(f"{blocks} blocks with {reward} sat, of them {fee} fees")
    known = FeedValue.objects.filter(kind=Kind.BLOCK_HEIGHT, scope="").order_by("-observed_at").first()
    if known is not None and known.value == last:
        if now - known.observed_at > MAX_AGE[Kind.BLOCK_HEIGHT]:
            raise FeedError(f"endBlock stands at {last} since {known.observed_at:%F %R} UTC")
        return False
    store(Kind.BLOCK_HEIGHT, last, source=url, observed_at=_minute(now), now=now)
    return store(Kind.FEES_SAT, fee // blocks, source=url, observed_at=_minute(now), now=now)


def _prices(body: Any, url: str, now: datetime) -> bool:
    cents = int(100 * _number(body, "USD"))
    at = datetime.fromtimestamp(int(_number(body, "time")), UTC)
    _fresh(at, "time", MAX_AGE[Kind.BTC_USD], now)
    return store(Kind.BTC_USD, cents, source=url, observed_at=at, now=now)


def _energy(body: Any, url: str, now: datetime) -> bool:
    return _kept(energy_prices.read_json(body), url, now)


def _kept(rows: Iterable[energy_prices.Row], source: str, now: datetime) -> bool:
    """Intervals that have begun, a few days back; whether any was new."""
    kept = False
    for row in rows:
        if now - HISTORY <= row.start <= now:
            at = {"source": source, "observed_at": row.start, "now": now, "scope": row.zone}
            kept = store(Kind.ENERGY, row.uusd_mwh, **at) or kept  # type: ignore[arg-type]
            if row.carbon_g_mwh:
                store(Kind.CARBON, row.carbon_g_mwh, **at)  # type: ignore[arg-type]
    return kept


def _minute(moment: datetime) -> datetime:
    return moment.replace(second=0, microsecond=0)


# --- what they say of a site
@dataclass(frozen=True)
class Value:
    """The newest value of a feed."""

    value: int
    zone: str
    source: str
    observed_at: datetime
    stale: bool


# For each kind the newest of the site's zone, else the nameless zone's (that of the world): a step in the index for each.
_NEWEST = """
SELECT w.kind, w.zone, v.value, v.source, v.observed_at FROM unnest(%s::text[], %s::text[]) AS w(kind, zone), LATERAL (
  SELECT value, source, observed_at FROM marketplace_feedvalue
  WHERE kind = w.kind AND scope = w.zone AND observed_at <= %s ORDER BY observed_at DESC LIMIT 1) v
"""


def _newest(site: Site, now: datetime) -> dict[tuple[str, str], Value]:
    """The newest value by kind and zone, in one statement."""
    zones = dict.fromkeys((site.region, ""))
    wanted = [(str(kind), "") for kind in HASHING] + [(str(kind), zone) for kind in LOCAL for zone in zones]
    rows = prepared.rows(_NEWEST, [*map(list, zip(*wanted, strict=True)), now + AHEAD])
    return {
        (kind, zone): Value(int(value), zone, source, at, now - at > MAX_AGE[Kind(kind)])
        for kind, zone, value, source, at in rows
    }


@dataclass(frozen=True)
class Energy:
    """What a MWh costs at a site now, micro-USD: the market's price or the site's own, and what its tariff adds to it."""

    base_uusd_mwh: int
    added_uusd_mwh: int
    source: str
    observed_at: datetime

    @property
    def uusd_mwh(self) -> int:
        return self.base_uusd_mwh + self.added_uusd_mwh


@dataclass(frozen=True)
class Rates:
    """What a site's watts cost and may earn now. `hashing`: None while any of its feeds is stale, that of energy too, and then
    nothing increases; `carbon_g_mwh`: grams of CO2 of a MWh, None where nobody says.
    """

    energy: Energy
    carbon_g_mwh: int | None
    pool_fee_ppm: int
    hashing: dispatch.Prices | None


def rates(site: Site, *, now: datetime) -> Rates:
    """By the newest values that are not stale, in one statement. Energy and carbon: the zone's, the nameless zone's, or the
    site's own figure; the tariff's parts by the site's clock.
    """
    newest = _newest(site, now)
    found = {key: value for key, value in newest.items() if not value.stale}
    energy, carbon = (found.get((kind, site.region)) or found.get((kind, "")) for kind in LOCAL)
    own_g = None if site.carbon_g_per_kwh is None else site.carbon_g_per_kwh * 1000
    price = _energy_of(site, energy, now)
    fee = int(settings.POOL_FEE_PERMILLE) * 1000 if site.pool_fee_ppm is None else site.pool_fee_ppm
    silent = energy is None and any(k == Kind.ENERGY and now - v.observed_at < SILENT for (k, _), v in newest.items())
    hashing = None if silent else _hashing(site, found, price.uusd_mwh, fee)
    return Rates(price, carbon.value if carbon else own_g, fee, hashing)


def published_energy(site: Site, *, now: datetime) -> Value | None:
    """The grid's price in the site's zone by the newest reading that is not stale, micro-USD/MWh; without the site's own tariff."""
    newest = _newest(site, now)
    found = newest.get((Kind.ENERGY, site.region)) or newest.get((Kind.ENERGY, ""))
    return None if found is None or found.stale else found


def _energy_of(site: Site, found: Value | None, now: datetime) -> Energy:
    added = tariffs.added_uusd_mwh(tariffs.parse(site.tariff), now.astimezone(ZoneInfo(site.timezone)))
    if found is None:
        return Energy(site.energy_price_microusd_per_kwh * 1000, added, "tariff of the site", now)
    return Energy(found.value, added, found.source, found.observed_at)


def _hashing(site: Site, found: dict[tuple[str, str], Value], energy: int, fee: int) -> dispatch.Prices | None:
    if any((kind, "") not in found for kind in HASHING):
        return None
    difficulty, btc_usd_cents, height, fees_sat = (found[kind, ""].value for kind in HASHING)
    reward = economics.expected_reward_sat(height, fees_sat, site.pool_scheme)
    return dispatch.Prices(
        hashprice_uusd=economics.hashprice_uusd(difficulty, reward, btc_usd_cents * 10_000),
        energy_uusd_mwh=energy,
        pool_fee_ppm=fee,
        pue_permille=site.miner_pue_permille,
        wear_uusd_h=site.switch_cost_uusd // SWITCH_H,
    )


def shown(site: Site, *, now: datetime) -> list[dict[str, Any]]:
    """The newest value of every feed that the site's plans use, with its time and source, also where it is too old to be used."""
    found = _newest(site, now)
    rows = ((kind, found.get((kind, site.region)) or found.get((kind, ""))) for kind in (*HASHING, *LOCAL))
    return [{"kind": kind.value, **vars(row)} for kind, row in rows if row is not None]


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
