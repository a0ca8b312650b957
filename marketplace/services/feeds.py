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
HISTORY = timedelta(days=2)  # of a file of a year, what a fetch still looks at
HASHING = (Kind.DIFFICULTY, Kind.BTC_USD, Kind.BLOCK_HEIGHT, Kind.FEES_SAT)

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


def latest(kind: str, *, now: datetime, scope: str = "") -> FeedValue | None:
    """The newest value that is not stale; None otherwise."""
    row = (
        FeedValue.objects.filter(kind=kind, scope=scope, observed_at__lte=now + AHEAD).order_by("-observed_at").first()
    )
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
    return answer.json()


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
class Energy:
    """What a MWh costs at a site now, micro-USD: the market's price or the site's own, and what its tariff adds to it."""

    base_uusd_mwh: int
    added_uusd_mwh: int
    source: str
    observed_at: datetime

    @property
    def uusd_mwh(self) -> int:
        return self.base_uusd_mwh + self.added_uusd_mwh


def energy_price(site: Site, *, now: datetime) -> Energy:
    """The zone's price, the nameless zone's, or the site's flat one; with the tariff's parts, by the site's clock."""
    added = tariffs.added_uusd_mwh(tariffs.parse(site.tariff), now.astimezone(ZoneInfo(site.timezone)))
    found = latest(Kind.ENERGY, now=now, scope=site.region) or latest(Kind.ENERGY, now=now)
    if found is None:
        return Energy(site.energy_price_microusd_per_kwh * 1000, added, "tariff of the site", now)
    return Energy(int(found.value), added, found.source, found.observed_at)


def carbon_g_mwh(site: Site, *, now: datetime) -> int | None:
    """Grams of CO2 of a MWh at the site: the feed's, else the site's own figure, else unknown."""
    found = latest(Kind.CARBON, now=now, scope=site.region) or latest(Kind.CARBON, now=now)
    if found is not None:
        return int(found.value)
    return None if site.carbon_g_per_kwh is None else site.carbon_g_per_kwh * 1000


def pool_fee_ppm(site: Site) -> int:
    return int(settings.POOL_FEE_PERMILLE) * 1000 if site.pool_fee_ppm is None else site.pool_fee_ppm


def prices(site: Site, *, now: datetime) -> dispatch.Prices | None:
    """What hashing pays and energy costs at the site; None while any feed is stale, and then nothing increases."""
    found = {kind: latest(kind, now=now) for kind in HASHING}
    if any(row is None for row in found.values()):
        return None
    value = {kind: int(row.value) for kind, row in found.items() if row is not None}
    reward = economics.expected_reward_sat(value[Kind.BLOCK_HEIGHT], value[Kind.FEES_SAT], site.pool_scheme)
    return dispatch.Prices(
        hashprice_uusd=economics.hashprice_uusd(value[Kind.DIFFICULTY], reward, value[Kind.BTC_USD] * 10_000),
        energy_uusd_mwh=energy_price(site, now=now).uusd_mwh,
        pool_fee_ppm=pool_fee_ppm(site),
        pue_permille=site.miner_pue_permille,
    )


def shown(site: Site, *, now: datetime) -> list[dict[str, Any]]:
    """The newest value of every feed that the site's plans use, with its time and source, also where it is too old to be used."""
    out = []
    for kind in (*HASHING, Kind.ENERGY, Kind.CARBON):
        scopes = [site.region, ""] if kind in {Kind.ENERGY, Kind.CARBON} else [""]
        rows = (FeedValue.objects.filter(kind=kind, scope=s).order_by("-observed_at").first() for s in scopes)
        row = next((r for r in rows if r is not None), None)
        if row is not None:
            old = now - row.observed_at > MAX_AGE[kind]
            out.append(
                {
                    "kind": kind.value, "value": int(row.value), "zone": row.scope, "source": row.source,
                    "observed_at": row.observed_at, "stale": old,
                }
            )  # fmt: skip
    return out


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
