"""From mempool.space's answers, byte for byte, to what the machines are told: served, fetched, kept, priced, dispatched."""

import json
import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from marketplace.models import FeedValue
from marketplace.services import feeds, power
from sandbox.recorded import serving
from scheduler import site_loop
from tests import factories as f

pytestmark = pytest.mark.django_db
HERE = Path(__file__).parent / "mempool"
DAYS = {"2025-11-03": (43.37, 43.33, 0.002), "2026-01-12": (38.85, 39.53, 0.02)}  # ours, published, how near
MACHINES = {"S19j Pro": (3068, 104), "S19 XP": (3010, 140), "S21": (3500, 200), "S21 XP": (3645, 270)}  # W, TH/s
ALL = {"difficulty": True, "rewards": True, "prices": True}


def noon(day, minutes=1):
    return datetime.fromisoformat(day).replace(hour=12, tzinfo=UTC) + timedelta(minutes=minutes)


@pytest.fixture
def served(settings):
    with serving(HERE / "2025-11-03") as made:
        settings.MEMPOOL_URL, settings.ENERGY_PRICE_URL, settings.ENERGY_PRICE_FILE = made.httpd.url, "", ""
        settings.POOL_FEE_PERMILLE = 10
        yield made


@pytest.fixture
def mine():
    """One machine of each model, hashing, at 5.5 cents a kWh; a change of mode costs nothing."""
    site = f.site(metering="firmware", energy_price_microusd_per_kwh=55_000, switch_cost_uusd=0)
    for model, (watts, ths) in MACHINES.items():
        f.miner(site, model, modes=(("sleep", 10, 0), ("full", watts, 1000 * ths)))
    return site


def told(site, now):
    """By machine, the mode that the site's loop would command now; what keeps its mode is not in it."""
    seen = site_loop.Seen(site, power.Ledger.of(site.pk), [], feeds.rates(site, now=now), now)
    thought = site_loop.think(seen)
    return {seen.ledger.miners[c.miner_id].name: c.mode for c in thought.commands}, thought.reason


def test_two_published_days_from_the_wire_to_the_machines(served, mine):
    for day, (ours, published, near) in DAYS.items():
        served.folder = HERE / day
        assert feeds.fetch_all(now=noon(day)) == ALL
        found = feeds.rates(mine, now=noon(day)).hashing.hashprice_uusd / 1_000_000
        assert found == pytest.approx(ours, abs=0.005)
        assert found == pytest.approx(published, rel=near)
        # 5.5 cents lie between what an S19j Pro earns of a kWh at the meter on the one day (5.77) and on the other (5.17)
        assert told(mine, noon(day))[0] == ({} if day == "2025-11-03" else {"S19j Pro": 0})
    kept = {(row.kind, row.observed_at.date().isoformat()): row for row in FeedValue.objects.all()}
    assert set(kept) == {(kind.value, day) for kind in feeds.HASHING for day in DAYS}
    price = kept["btc_usd_cents", "2026-01-12"]
    assert (int(price.value), price.source) == (9_113_200, f"{served.httpd.url}/api/v1/prices")
    assert price.observed_at == noon("2026-01-12", 0), "its own time, not ours"
    assert int(kept["block_height", "2025-11-03"].value) == 922_000


def payload(name, **changes):
    body = json.loads((HERE / "2026-01-12" / name).read_text()) | changes
    return json.dumps({k: v for k, v in body.items() if v is not None}).encode()


OLD = int(noon("2026-01-12", -181).timestamp())
HTML = b"<!DOCTYPE html><html><body>429 Too Many Requests</body></html>"
D, R, P = "hashrate-3d.json", "reward-stats-144.json", "prices.json"
WRONG = [
    (D, {"currentDifficulty": 0, "currentHashrate": 0}, "currentDifficulty is 0: nothing to decide on"),
    (D, {"currentDifficulty": "148260000000000"}, "currentDifficulty is '148260000000000': a number is expected"),
    (D, {"currentDifficulty": None}, "currentDifficulty is missing"),
    (D, {"currentDifficulty": True}, "a number is expected"),
    (D, {"hashrates": []}, "hashrates is empty"),
    (D, {"hashrates": [{"timestamp": OLD - 3 * 86_400, "avgHashrate": 1e21}]}, "hashrates/timestamp says 2026-01-09"),
    (D, HTML, "no JSON but"),
    (D, b"[1, 2]", "an object with currentDifficulty is expected, not list"),
    (R, {"totalFee": "0"}, "totalFee is '0': nothing to decide on"),
    (R, {"totalFee": 276780000}, "totalFee is 276780000: digits in a string are expected"),
    (R, {"totalReward": None}, "totalReward is missing"),
    (R, {"totalReward": "1"}, "144 blocks with 1 sat"),
    (R, {"endBlock": "932144"}, "endBlock is '932144': a number is expected"),
    (R, {"startBlock": 940_000, "endBlock": 932_001}, "-7998 blocks"),
    (R, HTML, "no JSON but"),
    (P, {"USD": 0}, "USD is 0: nothing to decide on"),
    (P, {"USD": "91132"}, "USD is '91132': a number is expected"),
    (P, {"USD": None}, "USD is missing"),
    (P, {"USD": float("nan")}, "USD is nan: nothing to decide on"),
    (P, {"time": OLD}, "time says 2026-01-12 08:59 UTC: older than 1 hours"),
    (P, b"", "no JSON but"),
]


def test_what_decides_nothing_is_refused_by_name_and_the_last_plan_stays(served, mine, caplog):
    served.folder = HERE / "2026-01-12"
    assert feeds.fetch_all(now=noon("2026-01-12")) == ALL
    plan, rows = told(mine, noon("2026-01-12")), FeedValue.objects.count()
    for minute, (name, wrong, why) in enumerate(WRONG, start=2):
        served.instead = {name: wrong if isinstance(wrong, bytes) else payload(name, **wrong)}
        # What is not broken is news of this minute, or known already: the price has a time of its own, the height stands.
        served.instead.setdefault(D, b"{}")
        caplog.clear()
        with caplog.at_level(logging.WARNING, "marketplace.services.feeds"):
            feeds.fetch_all(now=noon("2026-01-12", minute))
        path = {D: "hashrate/3d", R: "reward-stats/144", P: "prices"}[name]
        said = [r.getMessage() for r in caplog.records if path in r.getMessage()]
        assert len(said) == 1, (name, wrong)
        assert why in said[0], (name, wrong)
        assert FeedValue.objects.count() == rows
        assert told(mine, noon("2026-01-12", minute)) == plan, "within their hour the last values stand"
    late = noon("2026-01-12", 90)
    assert feeds.rates(mine, now=late).hashing is None
    assert told(mine, late) == ({}, "no_prices"), "and then nothing is changed any more"


def test_a_height_that_does_not_move_grows_old(served):
    day = "2026-01-12"
    served.folder = HERE / day
    assert feeds.fetch_all(now=noon(day))["rewards"]
    assert not feeds.fetch_all(now=noon(day, 30))["rewards"], "no news"
    assert {row.observed_at for row in FeedValue.objects.filter(kind="fees_sat_per_block")} == {noon(day)}
    served.instead = {R: payload(R, startBlock=931_860, endBlock=932_003)}
    assert feeds.fetch_all(now=noon(day, 40))["rewards"]
