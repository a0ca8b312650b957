"""Prices from outside: files, JSON, a grid operator's data; what is refused, what a tariff adds, what a pool keeps."""

import sys
from datetime import UTC, datetime, timedelta
from types import ModuleType
from typing import ClassVar

import pytest

from marketplace.errors import MarketError
from marketplace.models import FeedValue
from marketplace.services import energy_prices, feeds, sites
from marketplace.services.energy_prices import PriceFileError
from sandbox.feeds import Feeds
from tests import factories as f
from tests.factories import NOW

pytestmark = pytest.mark.django_db
CSV = "zone,start,usd_per_mwh,carbon_g_per_kwh\nus-tx,{0},31.25,380\n,{0},-4.5,\n"


def table(at=NOW):
    return CSV.format(at.isoformat())


def test_a_file_of_prices_is_read_and_kept_with_time_and_source(tmp_path, settings):
    path = tmp_path / "prices.csv"
    path.write_text(
        "\ufeff" + table() + f"us-tx,{(NOW + timedelta(hours=1)).isoformat()},99,\nus-tx,2020-01-01T00:00:00Z,5,\n"
    )
    settings.ENERGY_PRICE_FILE, settings.ENERGY_PRICE_URL, settings.MEMPOOL_URL = str(path), "", "http://127.0.0.1:9"
    assert feeds.fetch_all(now=NOW)["energy_file"]
    assert not feeds.fetch_all(now=NOW)["energy_file"], "known already"
    kept = {(row.kind, row.scope, int(row.value), row.source) for row in FeedValue.objects.all()}
    assert kept == {
        ("energy_microusd_per_mwh", "us-tx", 31_250_000, "file prices.csv"),
        ("energy_microusd_per_mwh", "", -4_500_000, "file prices.csv"),
        ("carbon_g_per_mwh", "us-tx", 380_000, "file prices.csv"),
    }  # neither what has not begun nor what is long over
    path.write_text("zone\n")
    assert not feeds.fetch_all(now=NOW + timedelta(minutes=1))["energy_file"]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("us-tx,2026-11-02T10:00:00,31,", "offset"), ("us-tx,soon,31,", "soon"), ("us-tx,{0},nan,", "NaN"), ("us-tx,{0},1e9,", "1E\\+9"),
        ("us-tx,{0},31,-1", "carbon"), ("us-tx,{0},cheap,", "line 4"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_read_is_named(line, why):
    with pytest.raises(PriceFileError, match=why) as refused:
        energy_prices.read_csv(table() + line.format(NOW.isoformat()) + "\n")
    assert "line 4" in str(refused.value)


def test_zero_future_and_below_zero():
    at = {"source": "x", "observed_at": NOW, "now": NOW}
    assert not feeds.store("energy_microusd_per_mwh", 0, **at)
    assert not feeds.store("btc_usd_cents", -1, **at)
    assert not feeds.store("btc_usd_cents", 1, **at | {"observed_at": NOW + timedelta(minutes=6)})
    assert feeds.store("energy_microusd_per_mwh", -1, **at)


def test_the_sandbox_speaks_json_that_is_read():
    answer = Feeds().market.energy(NOW.timestamp())
    rows = energy_prices.read_json(answer)
    assert {row.zone for row in rows} == {row["zone"] for row in answer["prices"]}
    for wrong in ([], {}, {"prices": [1]}):
        with pytest.raises(PriceFileError):
            energy_prices.read_json(wrong)


class Frame(list):
    def to_dict(self, shape):
        assert shape == "records"
        return list(self)


class Ercot:
    """The calls of gridstatus 0.37 that are made: get_iso("ercot")().get_spp(date=, market=, locations=) -> a frame."""

    asked: ClassVar[list] = []

    def get_spp(self, date, end=None, market=None, locations="ALL"):
        self.asked.append((date, market, locations))
        zone = datetime.fromisoformat("2026-11-02T05:45:00-06:00")
        row = {"Interval Start": zone, "Location": locations[0], "SPP": 21.07}
        return Frame([row, row | {"Interval Start": zone - timedelta(minutes=15), "SPP": 1.0}])


def test_a_grid_operators_data_by_gridstatus(monkeypatch):
    with pytest.raises(PriceFileError, match="the extra `gridstatus`"):
        energy_prices.read_gridstatus("ercot/REAL_TIME_15_MIN/HB_WEST=us-tx")
    grid = ModuleType("gridstatus")
    grid.get_iso, grid.Markets = {"ercot": Ercot}.__getitem__, str
    monkeypatch.setitem(sys.modules, "gridstatus", grid)
    (row,) = energy_prices.read_gridstatus("ercot/REAL_TIME_15_MIN/HB_WEST=us-tx")
    assert (row.zone, row.start, row.uusd_mwh) == ("us-tx", datetime(2026, 11, 2, 11, 45, tzinfo=UTC), 21_070_000)
    assert Ercot.asked == [("latest", "REAL_TIME_15_MIN", ["HB_WEST"])]
    with pytest.raises(PriceFileError, match="nowhere/X/Y"):
        energy_prices.read_gridstatus("nowhere/X/Y=z")


def test_the_tariff_and_the_pool_of_a_site_are_in_its_prices():
    site = f.site()
    peak = {"kind": "time_of_use", "uusd_mwh": 18_000_000, "from": "06:00", "to": "07:00"}
    actor = f.actor(site.organization)
    sites.update_site(
        site, actor=actor, now=NOW, tariff=[peak], timezone="America/Chicago", pool_scheme="pps", pool_fee_ppm=25_000
    )
    at = datetime(2026, 11, 2, 12, 30, tzinfo=UTC)  # 06:30 in Chicago
    here = {"source": "x", "observed_at": at, "now": at}
    feeds.store("energy_microusd_per_mwh", 30_000_000, scope=site.region, **here)
    price = feeds.rates(site, now=at).energy
    assert (price.uusd_mwh, price.added_uusd_mwh, price.source) == (48_000_000, 18_000_000, "x")
    assert feeds.rates(site, now=at + timedelta(minutes=30)).energy.added_uusd_mwh == 0
    for kind, value in (
        ("difficulty", 150 * 10**12),
        ("btc_usd_cents", 9_000_000),
        ("block_height", 930_000),
        ("fees_sat_per_block", 10**7),
    ):
        feeds.store(kind, value, **here)
    found = feeds.rates(site, now=at).hashing
    assert (found.energy_uusd_mwh, found.pool_fee_ppm) == (48_000_000, 25_000)
    sites.update_site(site, actor=actor, now=NOW, pool_scheme="fpps", pool_fee_ppm=None)
    more = feeds.rates(site, now=at).hashing
    assert more.hashprice_uusd == pytest.approx(found.hashprice_uusd * (312.5 + 10) / 312.5, rel=1e-6)
    assert more.pool_fee_ppm == 10_000
    shown = {row["kind"]: row for row in feeds.shown(site, now=at + timedelta(hours=2, minutes=1))}
    assert (
        shown["energy_microusd_per_mwh"]["stale"],
        shown["difficulty"]["stale"],
        shown["btc_usd_cents"]["stale"],
    ) == (True, False, True)


def test_an_energy_feed_that_falls_silent_is_no_cheap_hour():
    site = f.site()
    here = {"source": "x", "observed_at": NOW, "now": NOW}
    for kind, value in (("difficulty", 150 * 10**12), ("block_height", 930_000), ("fees_sat_per_block", 10**7)):
        feeds.store(kind, value, **here)

    def hashing(at):
        feeds.store("btc_usd_cents", 9_000_000, source="x", observed_at=at, now=at)
        return feeds.rates(site, now=at).hashing

    assert (
        hashing(NOW).energy_uusd_mwh == site.energy_price_microusd_per_kwh * 1000
    )  # nobody ever fed it: its own price
    feeds.store("energy_microusd_per_mwh", 4_000_000_000, scope=site.region, **here)
    assert hashing(NOW + timedelta(minutes=1)).energy_uusd_mwh == 4_000_000_000
    assert hashing(NOW + timedelta(hours=3)) is None
    late = NOW + timedelta(hours=4)
    feeds.store("energy_microusd_per_mwh", 20_000_000, source="x", observed_at=late, now=late, scope=site.region)
    assert hashing(late).energy_uusd_mwh == 20_000_000


@pytest.mark.parametrize(
    ("change", "field"), [({"timezone": "Mars"}, "/timezone"), ({"tariff": [{"kind": "moon"}]}, "/tariff/0/kind")]
)
def test_what_prices_are_made_from_must_be_readable(change, field):
    site = f.site()
    with pytest.raises(MarketError) as refused:
        sites.update_site(site, actor=f.actor(site.organization), now=NOW, **change)
    assert field in refused.value.fields
