"""The year's own parts: hulls, the bound on cases one can work out by hand, and a site of two days that is never over a cap."""

import itertools

import numpy as np
import pytest

from benchmarks import year, year_inputs, year_site
from benchmarks.harness import Options, WorkNotDoneError
from benchmarks.year_bound import solve
from benchmarks.year_inputs import Call, Prices

pytestmark = pytest.mark.serverless
TICKS = 2 * 288
NOBODY = np.zeros(0, np.int64)


@pytest.fixture(scope="module")
def site():
    return year_site.Site.of(16, 1_000_000, 1)


def flat(energy_usd, hours=48):
    return Prices(np.full(hours, int(energy_usd * 1e6)), np.full(hours, 40_000_000), "flat")


def test_hulls_hold_every_machine_once_and_fall_in_worth(site):
    watts, ghs = site.steps()
    awake = site.fleet.watts[site.fleet.off[1:] - 1][site.fleet.ladder].sum()
    assert watts.sum() == awake - site.asleep_w()
    kinds = np.flatnonzero(np.diff(np.r_[np.inf, ghs / watts]) > 0)  # where the next kind's ladder begins
    for start, end in itertools.pairwise([0, *kinds.tolist(), len(watts)]):
        assert (np.diff(ghs[start:end] / watts[start:end]) <= 0).all()


def test_a_site_follows_jobs_and_calls_and_is_never_over_a_cap(site):
    call = Call(100, 130, 0.5)
    at = np.repeat(np.array([20, 101, 300]), 16)
    host = np.tile(np.arange(16), 3)
    watts = np.repeat([year_site.HOST_W[8], year_site.HOST_W[4], year_site.PARKED_W], 16)
    found = year_site.live(site, at, host, watts, flat(20), [call], TICKS)
    assert found.over == 0
    assert found.sheds >= 2
    assert found.delays == [
        20
    ]  # the rise of tick 101 found its watts under the call that the hosts themselves gave back
    assert 0.97 < found.used_mw / found.ideal_mw <= 1
    quiet = year_site.live(site, NOBODY, NOBODY, NOBODY, flat(20), [], TICKS)
    assert quiet.hash_uusd > found.hash_uusd > 0


def test_nothing_hashes_at_a_loss_and_all_do_where_energy_is_paid_for(site):
    dear = year_site.live(site, NOBODY, NOBODY, NOBODY, flat(500), [], TICKS)
    assert dear.hash_uusd == 0
    assert dear.miner_mwh == pytest.approx(site.asleep_w() * 48 / 1e6)
    given = year_site.live(site, NOBODY, NOBODY, NOBODY, flat(-5), [], TICKS)
    assert given.energy_uusd < 0 < given.hash_uusd


def test_a_cap_that_is_crossed_is_counted(site, monkeypatch):
    monkeypatch.setattr(year_site.core, "choose_shed", lambda *_: year_site.core.Shed((), {}))
    monkeypatch.setattr(year_site.dispatch, "plan_fast", lambda *a, **_: year_site.dispatch.Plan(a[3], 0, 0))
    found = year_site.live(site, NOBODY, NOBODY, NOBODY, flat(20), [Call(100, 130, 0.3)], TICKS)
    assert found.over > 0


def test_the_bound_of_two_hours_by_hand():
    # One kind of step: 1 MW that hashes 10 TH/s a kW. $48 per PH/s-day less the fee is $1.98 per PH/s-hour; at $0, hour 1 pays
    # 10 PH/s x 1.98 = $19.80. In hour 0 energy costs far more than that, so the jobs of hour 0 are best done there and then.
    kept = (
        np.array([1_000_000]),
        np.array([10_000_000]),
        np.array([500_000_000, 0]),
        np.array([48_000_000, 48_000_000]),
    )
    room = np.array([1e6 * 1050.0, 1e6 * 1050.0])
    alone = solve(*kept, room, np.zeros(2), 10, 0.0, 0.0, 0.0)
    assert alone.total == pytest.approx(19.8)
    # 10 GPU-hours at $3 that book 42 kW each of the miners' watts (50 kW x 1.25 / 1.05 of the room): no energy drawn, to keep it short
    booked = 42_000.0 * 1050 / 1250
    both = solve(*kept, room, np.array([10.0, 0.0]), 10, 3.0, booked, 0.0)
    assert both.gpu_hours == pytest.approx(10)
    assert both.total == pytest.approx(30 + 19.8)
    # Asked for in hour 1 alone, they cost hashing 0.42 of its watts.
    late = solve(*kept, room, np.array([0.0, 10.0]), 10, 3.0, booked, 0.0)
    assert late.total == pytest.approx(30 + 19.8 * 0.58)


def test_prices_are_seeded_or_read_from_a_file(tmp_path, monkeypatch):
    monkeypatch.delenv("TAILRACE_TRACES", raising=False)
    monkeypatch.setattr(year_inputs.traces, "directory", lambda _: tmp_path)
    one, two = (year_inputs.prices(8760, 5, Options()) for _ in range(2))
    assert (one.energy == two.energy).all()
    assert one.energy.mean() / 1e6 == pytest.approx(year_inputs.parameter("energy_mean_usd_mwh"), rel=0.05)
    assert 0 < (one.energy < 0).mean() < 0.05
    assert one.hashprice.min() >= year_inputs.parameter("hashprice_low_usd_ph_day") * 1e6
    (tmp_path / "mine.csv").write_text("energy_usd_mwh,hashprice_usd_ph_day\n12.5,40\n-3,41\n")
    read = year_inputs.prices(2, 5, Options(traces=("mine",)))
    assert (read.energy.tolist(), read.hashprice.tolist()) == ([12_500_000, -3_000_000], [40_000_000, 41_000_000])
    with pytest.raises(WorkNotDoneError, match="3 wanted"):
        year_inputs.prices(3, 5, Options(traces=("mine",)))


def test_calls_do_not_overlap_and_jobs_ask_for_the_load():
    calls = year_inputs.calls(365 * 288, 3)
    assert len(calls) == year_inputs.CALLS
    assert all(a.end < b.start for a, b in itertools.pairwise(calls))
    work, _ = year_inputs.jobs(28 * 288, 128, 0.7, 3, Options(trace_dir=None))
    assert (work.submit % year_inputs.TICK == 0).all()
    assert (np.diff(work.submit) >= 0).all()
    assert year.asked(work, 28 * 288).sum() / (128 * 28 * 24) == pytest.approx(0.7, abs=0.35)
