"""Minutes, devices and the P&L agree to the millijoule; made anew they say the same; what was paid is counted once."""

from datetime import timedelta

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from billing.core.energy import MJ_PER_MWH
from marketplace.errors import MarketError
from marketplace.models import (
    DeviceHour,
    Miner,
    OutboxMessage,
    Placement,
    PowerNode,
    ProfitHour,
    Receipt,
    Site,
    SiteMinute,
    SpotInterval,
)
from marketplace.services import feeds, placement_energy, profit, receipts
from tests import factories as f
from tests.factories import NOW

pytestmark = pytest.mark.django_db
HOUR = timedelta(hours=1)
MWH = 3_600_000_000_000


@pytest.fixture
def site():
    return f.site(carbon_g_per_kwh=400, energy_price_microusd_per_kwh=40_000)


def turn(site, at):
    f.accounted(Site.objects.get(pk=site.pk), now=at)


NETWORK = (
    ("difficulty", 155_970_000_000_000), ("btc_usd_cents", 10_693_500), ("block_height", 921_700), ("fees_sat_per_block", 1_937_500),
)  # fmt: skip


def hashprice(now):
    for kind, value in NETWORK:
        feeds.store(kind, value, source="test", observed_at=now, now=now)


def lived(site, start, minutes, step=30):
    Site.objects.filter(pk=site.pk).update(sampled_at=start)
    for seconds in range(step, minutes * 60 + 1, step):
        Miner.objects.update(measured_at=start + timedelta(seconds=seconds))
        turn(site, start + timedelta(seconds=seconds))


def rows(site, at=NOW):
    return {row.kind: row for row in ProfitHour.objects.filter(site=site, start=at)}


def test_devices_minutes_and_kinds_agree_to_the_millijoule(site):
    host, idle = f.host(site, measured_w=6_001), f.host(site, measured_w=1_100)
    contract = f.contract(f.listing(site, hosts=[host, idle]), price=2_400_000)
    a, b = (
        f.placement(f.job(contract, gpus=n, state="running"), host, gpus, state="running", running_at=NOW)
        for n, gpus in ((1, [0]), (2, [1, 2]))
    )
    miner = f.miner(site)
    PowerNode.objects.filter(site=site, parent=None).update(measured_w=13_777, measured_at=NOW + HOUR, fixed_w=500)
    start = NOW - timedelta(seconds=10)
    Site.objects.filter(pk=site.pk).update(sampled_at=start)
    for seconds in (7, 13, 20, 75.5, 80.001, 130):  # over two hours' edges, in uneven steps
        turn(site, start + timedelta(seconds=seconds))
    profit.rebuild(site, start, start + timedelta(seconds=130))
    assert profit.uneven(site, NOW - HOUR, NOW + HOUR) == []
    ms = 130_000
    placed = profit.by_device(site, "placement", NOW - HOUR, NOW + HOUR)
    assert placed == {a.pk: 2_000 * ms, b.pk: 4_001 * ms}
    assert profit.by_device(site, "host", NOW - HOUR, NOW + HOUR) == {idle.pk: 1_100 * ms}
    assert profit.by_device(site, "miner", NOW - HOUR, NOW + HOUR) == {miner.pk: 3_500 * ms}
    told = ProfitHour.objects.filter(site=site)
    assert sum(row.energy_mj for row in told) == 13_777 * ms
    assert sum(row.seen_ms for row in told.filter(kind="ai")) == ms
    SiteMinute.objects.filter(site=site).order_by("start").update(miners_mj=0)
    assert profit.uneven(site, NOW - HOUR, NOW + HOUR) != []


def test_a_minute_keeps_the_price_it_began_with(site):
    f.miner(site)
    feeds.store("energy_microusd_per_mwh", 30_000_000, source="x", observed_at=NOW, now=NOW)
    Site.objects.filter(pk=site.pk).update(sampled_at=NOW)
    turn(site, NOW + timedelta(seconds=20))
    feeds.store(
        "energy_microusd_per_mwh",
        -5_000_000,
        source="x",
        observed_at=NOW + timedelta(seconds=25),
        now=NOW + timedelta(seconds=25),
    )
    turn(site, NOW + timedelta(seconds=59))
    turn(site, NOW + timedelta(seconds=119))
    first, second = SiteMinute.objects.filter(site=site).order_by("start")
    assert (first.energy_uusd_mwh, second.energy_uusd_mwh) == (30_000_000, -5_000_000)
    assert first.energy_microusd == first.site_mj * 30_000_000 // MJ_PER_MWH
    assert second.energy_microusd < 0


def test_a_clock_that_goes_back_counts_nothing_twice(site):
    f.miner(site)
    Site.objects.filter(pk=site.pk).update(sampled_at=NOW)
    for seconds in (30, 10, 30, 40):
        turn(site, NOW + timedelta(seconds=seconds))
    assert SiteMinute.objects.get(site=site).seen_ms == 40_000


def test_a_reading_that_is_old_is_not_energy(site):
    f.miner(site)
    Miner.objects.update(measured_at=NOW - HOUR)
    Site.objects.filter(pk=site.pk).update(sampled_at=NOW)
    turn(site, NOW + timedelta(seconds=30))
    assert SiteMinute.objects.get(site=site).miners_mj == 0
    assert not DeviceHour.objects.filter(of="miner").exists()


def test_the_p_and_l_of_an_hour(site):
    hashprice(NOW)
    host = f.host(site, measured_w=8_000)
    contract = f.contract(f.listing(site, hosts=[host]), price=2_000_000, fee_permille=150)
    f.placement(f.job(contract, gpus=8, state="running"), host, state="running", running_at=NOW)
    f.miner(site, modes=(("sleep", 25, 0), ("normal", 3500, 200_000)))
    Miner.objects.update(measured_ghs=200_000)
    lived(site, NOW, 60)
    profit.rebuild(site, NOW, NOW + HOUR)
    found = rows(site)
    assert set(found) == {"ai", "hashing", "demand_response", "energy"}
    assert found["ai"].revenue_microusd == 8 * 2_000_000 * 850 // 1000
    assert found["ai"].energy_mj == 10_000 * 3_600_000  # PUE 1.25
    assert found["ai"].energy_microusd == 400_000  # 10 kWh at 4 cents
    assert found["hashing"].energy_mj == 3_675 * 3_600_000
    price = feeds.rates(site, now=NOW).hashing.hashprice_uusd
    assert (
        found["hashing"].revenue_microusd == price * 200_000 * 99 // 100 // 24_000_000
    )  # 200 TH/s, the pool keeps 1 %
    assert found["hashing"].paid_microusd is None
    assert sum(row.carbon_mg for row in found.values()) == (10_000 + 3_675) * 400  # Wh x mg per Wh
    assert found["energy"].energy_mj == 0
    before = list(ProfitHour.objects.order_by("pk").values())
    assert profit.rebuild(site, NOW, NOW + HOUR) == 1
    assert list(ProfitHour.objects.order_by("pk").values()) == before, "made anew it says the same, in the same rows"
    profit.clock(now=NOW + HOUR)
    assert list(ProfitHour.objects.filter(start=NOW).order_by("pk").values()) == before


def test_spot_earns_the_price_of_each_interval(site):
    host = f.host(site)
    listing = f.listing(site, hosts=[host], spot_floor=1_000_000)
    contract = f.contract(listing, kind="spot", price=1_000_000, limit_price=3_000_000, fee_permille=0)
    f.placement(f.job(contract, gpus=1, state="running"), host, [0], state="running", running_at=NOW)
    for n, price in enumerate((1_000_000, 2_000_000, 9_000_000)):
        SpotInterval.objects.create(
            listing=listing, cell=site.cell, gpu_model=host.gpu_model, start=NOW + timedelta(minutes=5 * n), price=price, floor=price,
            currency="USD", supply_milli=1000, demand_milli=1000, sold_milli=1000, closed_at=NOW,
        )  # fmt: skip
    lived(site, NOW, 15)
    profit.rebuild(site, NOW, NOW + timedelta(minutes=15))
    # the third costs no more than the limit, and lasts until the hour is over: nobody has made another price
    assert rows(site)["ai"].revenue_microusd == (1_000_000 * 5 + 2_000_000 * 5 + 3_000_000 * 50) // 60


PAID = {"kind": "hashing", "source": "a pool", "reference": "2026-11-01"}


def receive(site, amount=3_000_001, start=NOW, end=NOW + 2 * HOUR, **fields):
    values = {**PAID, "start": start, "end": end, "amount_microusd": amount, **fields}
    return receipts.receive(site, actor=f.actor(site.organization), now=NOW + 9 * HOUR, **values)


def test_a_payout_is_spread_by_the_work_of_its_hours_and_counted_once(site):
    hashprice(NOW)
    hashprice(NOW + HOUR)
    f.miner(site)
    Miner.objects.update(measured_ghs=100_000)
    lived(site, NOW, 60)
    Miner.objects.update(measured_ghs=200_000)
    lived(site, NOW + HOUR, 60)
    first = receive(site)
    assert receive(site).pk == first.pk
    assert Receipt.objects.count() == OutboxMessage.objects.filter(topic=profit.TOPIC).count() == 1
    for change in ({"amount": 3}, {"end": NOW + HOUR}, {"kind": "demand_response"}, {"amount_sat": 1}):
        with pytest.raises(MarketError) as refused:
            receive(site, **change)
        assert refused.value.code == "conflict"
    profit.rebuild(site, NOW, NOW + HOUR)  # one of its hours is enough
    paid = [rows(site, NOW + n * HOUR)["hashing"].paid_microusd for n in range(2)]
    assert sum(paid) == 3_000_001
    assert paid[1] == pytest.approx(2 * paid[0], abs=2)
    assert rows(site)["hashing"].revenue_microusd > 0


def test_demand_response_is_paid_by_the_time(site):
    receive(site, kind="demand_response", reference="call 7", amount=100, start=NOW + HOUR / 2, end=NOW + 2 * HOUR)
    profit.rebuild(site, NOW, NOW + HOUR)
    found = [rows(site, NOW + n * HOUR)["demand_response"] for n in range(2)]
    assert [(row.revenue_microusd, row.paid_microusd) for row in found] == [(33, 33), (67, 67)]
    with connection.cursor() as cursor:  # nothing stands behind these hours any more
        cursor.execute("SET CONSTRAINTS ALL IMMEDIATE; TRUNCATE marketplace_receipt")
    profit.rebuild(site, NOW, NOW + 2 * HOUR)
    assert not ProfitHour.objects.exists()


@pytest.mark.parametrize(
    "wrong", [{"end": NOW}, {"end": NOW + timedelta(days=33)}, {"end": NOW + 10 * HOUR}, {"start": NOW + timedelta(microseconds=1)}]
)  # fmt: skip
def test_a_receipt_is_for_a_time_that_is_over(site, wrong):
    with pytest.raises(MarketError) as refused:
        receive(site, **wrong)
    assert refused.value.code == "invalid_request"


CSV = (
    "kind,source,reference,start,end,amount_usd,amount_sat\n"
    "hashing,a pool,1,2026-10-01T00:00:00Z,2026-10-02T00:00:00Z,1034.567891,1200000\n"
    "demand_response,the grid,aug,2026-10-01T00:00,2026-10-31T00:00,25000,\n"
)


def take(site, text):
    return receipts.take(site, text, actor=f.actor(site.organization), now=NOW)


def test_a_file_is_taken_whole_or_not_at_all(site):
    made = take(site, CSV)
    assert [(r.amount_microusd, r.amount_sat) for r in made] == [(1_034_567_891, 1_200_000), (25_000_000_000, None)]
    assert [r.pk for r in take(site, CSV)] == [r.pk for r in made]
    for text, where in (
        (CSV + "hashing,a pool,2,2026-10-01,2026-10-02,1.0000001,\n", "/csv/4"),
        (CSV + "luck,a pool,2,2026-10-01,2026-10-02,1,\n", "/csv/4"),
        (CSV.replace("25000", "25001"), "/csv/3"),
        ("kind,source\n", "/csv"),
    ):
        with pytest.raises(MarketError) as refused:
            take(site, text.replace("a pool,1", "new,1"))
        assert where in refused.value.fields
    assert Receipt.objects.count() == 2


# --- what a placement drew, for its customer
def test_a_placements_energy_is_its_part_of_the_host_hour_by_hour(site):
    """Two share a host, one ends after ten minutes; the rest of an hour and a half is the other's."""
    host = f.host(site, measured_w=6_000)
    contract = f.contract(f.listing(site, hosts=[host]))
    a, b = (
        f.placement(f.job(contract, state="running"), host, range(4 * n, 4 * n + 4), state="running") for n in range(2)
    )
    other = f.placement(f.job(contract, state="queued"), host, [], state="intended")
    Placement.objects.update(created_at=NOW)
    lived(site, NOW, 10)
    Placement.objects.filter(pk=b.pk).update(state="released", finished_at=NOW + timedelta(minutes=10))
    lived(site, NOW + timedelta(minutes=10), 80)
    rows = list(Placement.objects.order_by("pk"))
    with CaptureQueriesContext(connection) as asked:
        drew = placement_energy.of_placements(rows, now=NOW + 2 * HOUR)
    assert len(asked) == 1
    assert (drew[a.pk].wh, drew[b.pk].wh) == (500 + 8_000, 500)
    assert (drew[a.pk].average_w, drew[b.pk].average_w) == (round((10 * 3_000 + 80 * 6_000) / 90), 3_000)
    assert drew[other.pk] == placement_energy.Drew()
    assert placement_energy.of_placements([], now=NOW) == {}
    profit.rebuild(site, NOW, NOW + 2 * HOUR)
    assert profit.uneven(site, NOW, NOW + HOUR) == []


def test_an_hour_from_before_time_was_kept_has_energy_and_no_average(site):
    host = f.host(site, measured_w=6_000)
    placed = f.placement(
        f.job(f.contract(f.listing(site, hosts=[host])), state="running"), host, range(8), state="running"
    )
    Placement.objects.update(created_at=NOW)
    lived(site, NOW, 30)
    DeviceHour.objects.update(ms=[])
    lived(site, NOW + timedelta(minutes=30), 30)
    assert placement_energy.of_placements([placed], now=NOW + HOUR)[placed.pk] == placement_energy.Drew(6_000, None)
    lived(site, NOW + HOUR, 30)
    placed.refresh_from_db()
    assert placement_energy.of_placements([placed], now=NOW + 2 * HOUR)[placed.pk] == placement_energy.Drew(
        9_000, 6_000
    )
