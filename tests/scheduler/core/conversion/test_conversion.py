"""The conversion planner: a calendar one can check by hand, watts that are never used twice, cash that adds up, the exact best."""

import re
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.core.conversion.defaults import DEFAULTS
from scheduler.core.conversion.inputs import Batch, ConversionError, Hall, Lease, Market, Rental, Site
from scheduler.core.conversion.months import HOURS, Life, outcome, phase
from scheduler.core.conversion.returns import annual_rate, npv, payback
from scheduler.core.conversion.schedule import best, built_in, plan, waits
from scheduler.core.conversion.sensitivity import tornado

pytestmark = pytest.mark.serverless
BOUNDED = settings(max_examples=40, deadline=None, derandomize=True)

S21 = Batch("S21", 2_000, 3_500, 200_000, resale_cents=100_000)
S19 = Batch("S19j Pro", 1_000, 3_068, 104_000, resale_cents=20_000)
MARKET = Market(39_530_000, 0, 45_000_000, 0, 10_000, 0, 0)
LEASE = Lease(15_400, 150)
HALL = Hall("A", 12_000_000, 800, 1250, 1050, 1_000_000_000, 4, 7, 5, 2, (S21, S19))


def site(*halls, **changes):
    return Site(halls or (HALL,), changes.pop("income", LEASE), changes.pop("market", MARKET), **changes)


def test_the_calendar_of_a_hall():
    phases = [phase(HALL, 3, t, 2) for t in range(20)]
    assert phases == (
        ["hashing"] * 3
        + ["permit and orders"] * 7
        + ["building"] * 5
        + ["commissioning"] * 2
        + ["live"] * 2
        + ["term over"]
    )


def test_a_hall_by_hand():
    """7.68 MW of IT, converted at once: what it pays, earns, draws, and the miners' end."""
    assert HALL.it_w == 12_000_000 * 800 // 1250 == 7_680_000
    found = outcome(site(horizon_months=24, ramp_months=2), [0])
    months = found.months
    capital = 7_680_000 * 1_000_000_000 // 1_000_000
    assert months[0].capital_cents == -capital * 300 // 1000
    assert sum(m.capital_cents for m in months) == -capital
    assert months[7].resale_cents == 2_000 * 100_000 + 1_000 * 20_000
    assert [m.works_w for m in months[6:15]] == [0] + [12_000_000] * 7 + [0]
    assert months[14].ai_cents == 3_840 * 15_400
    assert months[15].ai_cents == 7_680 * 15_400
    assert months[15].running_cents == -7_680 * 15_400 * 150 // 1000
    assert months[15].energy_cents == 0  # passed on
    assert months[15].ai_w == 7_680_000 * 1250 // 1000
    # An S21 earns 39.53 x 0.99 x 0.2 / 24 $/h and pays for 3.5 kW x 1.05 at 4.5 c a kWh.
    value = 39_530_000 * 99 // 100 * 200_000 // 24_000_000 - 3_500 * 1050 * 45_000_000 // 10**9
    old = 39_530_000 * 99 // 100 * 104_000 // 24_000_000 - 3_068 * 1050 * 45_000_000 // 10**9
    assert months[0].hashing_w == (2_000 * 3_500 + 1_000 * 3_068) * 1050 // 1000
    assert months[0].hashing_cents == pytest.approx((2_000 * value + 1_000 * old) * HOURS / 10_000, abs=300)


def test_below_break_even_a_machine_sleeps():
    cheap, dear = (outcome(site(market=replace(MARKET, energy_uusd_mwh=p)), [None]).months[0] for p in (1, 200_000_000))
    assert cheap.hashing_w == -(-(2_000 * 3_500 + 1_000 * 3_068) * 1050 // 1000)
    assert dear.hashing_w == dear.hashing_cents == 0


def test_what_racks_leave_hashes_on_with_the_most_efficient():
    kept = Life(site(replace(HALL, keep_w=3_500_000)), replace(HALL, keep_w=3_500_000))
    assert [(b.model, b.count) for b in kept.kept] == [("S21", 1_000)]
    assert [(b.model, b.count) for b in kept.sold] == [("S21", 1_000), ("S19j Pro", 1_000)]
    rows = kept.path(0)
    first, full = rows[14], rows[30]
    assert first.hashing_w == 1_000 * 3_500 * 1050 // 1000  # a sixth of the racks is live
    assert 0 < full.hashing_w <= HALL.gross_w - full.ai_w


def test_gpus_are_ours_to_pay_for_and_their_rent_declines():
    rent = Rental(2_350_000, 200, 1_275, 3_700_000, 200)
    months = outcome(site(income=rent, horizon_months=48, ramp_months=1), [0]).months
    gpus = 7_680_000 // 1_275
    assert sum(m.capital_cents for m in months) == -(7_680 * 1_000_000 + gpus * 3_700_000)
    assert months[14].ai_cents == pytest.approx(gpus * HOURS * 235 * 0.8, abs=1)
    assert months[26].ai_cents == pytest.approx(gpus * HOURS * 235 * 0.64, abs=1)
    assert months[14].energy_cents == -round(months[14].ai_w * HOURS * 45_000_000 / 1e10)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"halls": ()}, "halls"),
        ({"halls": (HALL, HALL)}, "halls"),
        ({"horizon_months": 11}, "horizon_months"),
        ({"halls": (replace(HALL, pue_permille=999),)}, "halls/0/pue_permille"),
        ({"halls": (replace(HALL, usable_permille=1001),)}, "halls/0/usable_permille"),
        ({"halls": (replace(HALL, gross_w=10_000_000),)}, "halls/0/miners"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(changes, field):
    with pytest.raises(ConversionError) as caught:
        plan(replace(site(), **changes))
    assert caught.value.field == field


HALLS = st.builds(
    lambda name, gross, usable, capex, lead, build, keep, count: Hall(
        name, gross * 1_000_000, usable, 1250, 1050, capex * 100_000_000, 2, lead, build, 1,
        (replace(S21, count=min(count, gross * 270)), replace(S19, count=1)), keep * 1_000_000,
    ),
    st.just("A"), st.integers(2, 20), st.integers(300, 1000), st.integers(2, 30), st.integers(1, 6), st.integers(1, 5),
    st.integers(0, 4), st.integers(1, 3_000),
)  # fmt: skip
SITES = st.builds(
    lambda halls, crews, horizon, capital, trend, energy: Site(
        tuple(replace(h, name=f"H{i}") for i, h in enumerate(halls)), LEASE,
        Market(39_530_000, trend, energy * 1_000_000, 10, 10_000, 1_000_000, 30),
        horizon_months=horizon, crews=crews, capital_cents=capital and capital * 10**9,
    ),
    st.lists(HALLS, min_size=1, max_size=3), st.integers(1, 2), st.integers(12, 20), st.none() | st.integers(1, 40),
    st.integers(-20, 20), st.integers(5, 90),
)  # fmt: skip


@BOUNDED
@given(SITES, st.data())
def test_no_watt_is_used_twice_and_the_cash_adds_up(of, data):
    starts = [data.draw(st.none() | st.integers(0, of.horizon_months - 1)) for _ in of.halls]
    found = outcome(of, starts)
    gross = sum(h.gross_w for h in of.halls)
    for m in found.months:
        # A watt a hall may be lost to rounding up what cooling takes.
        assert 0 <= m.ai_w + m.hashing_w + m.works_w <= gross + 2 * len(of.halls)
    assert found.npv_cents == round(npv([m.cash_cents for m in found.months], of.wacc_permille))
    for h, start, phases in zip(of.halls, starts, found.phases, strict=True):
        life = Life(of, h)
        paid = -sum(m.capital_cents for m in life.path(start))
        assert 0 <= paid <= life.capital_cents
        if "commissioning" in phases:
            assert paid == life.capital_cents
    if not any(s is not None for s in starts):
        assert [m.cash_cents for m in found.months] == list(found.hashing_on)
        assert found.gain_cents == 0


def crewed(hall, start):
    return start + waits(hall), start + waits(hall) + built_in(hall)


def never_more(works, of):
    """Whether no month needs more crews than there are."""
    return all(sum(begin <= t < end for begin, end in works) <= of.crews for t in range(of.horizon_months))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(SITES)
def test_the_schedule_is_the_best_of_all(of):
    """Beside every combination of starts that is allowed."""
    values = []
    for h in of.halls:
        life = Life(of, h)
        stays = npv([m.cash_cents for m in life.path(None)], of.wacc_permille)
        longest = max(h.permit_months, h.lead_months) + h.build_months + h.commission_months
        options = [(0.0, None)]
        options += [
            (npv([m.cash_cents for m in life.path(s)], of.wacc_permille) - stays, s)
            for s in range(max(0, of.horizon_months - longest))
        ]
        values.append((life.capital_cents, options))
    most = 0.0
    for chosen in product(*(options for _, options in values)):
        works, spent = [], 0
        for h, (cost, _), (_, start) in zip(of.halls, values, chosen, strict=True):
            if start is not None:
                works.append(crewed(h, start))
                spent += cost
        ok = never_more(works, of)
        if ok and (of.capital_cents is None or spent <= of.capital_cents):
            most = max(most, sum(gain for gain, _ in chosen))
    starts = best(of)
    assert outcome(of, starts).gain_cents == pytest.approx(most, abs=len(of.halls) + 2)
    assert never_more([crewed(h, s) for h, s in zip(of.halls, starts, strict=True) if s is not None], of)


def test_returns_of_cash_that_is_known():
    year = [-1000] + [0] * 11 + [1100]
    assert annual_rate(year) == pytest.approx(0.10)
    assert npv(year, 100) == pytest.approx(0, abs=1e-6)
    assert payback([-100, 50, 50, -10, 20]) == 5
    assert payback([0, 0]) == 0
    assert payback([-1, 0]) is None
    assert annual_rate([1, 2]) is None


@BOUNDED
@given(st.lists(st.integers(-(10**9), 10**9), min_size=2, max_size=40))
def test_the_rate_makes_the_value_zero(cash):
    rate = annual_rate(cash)
    if rate is not None:
        assert abs(npv(cash, 1000 * rate)) <= 1e-6 * sum(map(abs, cash)) * max(1.0, (1 + rate) ** (-len(cash) / 12))


def test_a_tornado_goes_the_way_it_should():
    of = site(crews=1, wacc_permille=50)
    rows = {row.name: row for row in tornado(of, plan(of).starts)}
    assert rows["AI price"].low_cents < rows["AI price"].high_cents
    assert rows["Capital a MW"].low_cents > rows["Capital a MW"].high_cents
    assert rows["Time to build"].low_cents > rows["Time to build"].high_cents
    assert rows["Cost of capital"].low_cents > rows["Cost of capital"].high_cents
    assert rows["Hashprice"].low_cents > rows["Hashprice"].high_cents  # what is given up
    widths = [abs(row.high_cents - row.low_cents) for row in tornado(of, plan(of).starts)]
    assert widths == sorted(widths, reverse=True)


@pytest.mark.parametrize("one", DEFAULTS.values(), ids=DEFAULTS)
def test_every_default_says_its_source_its_date_and_how_far_to_trust_it(one):
    assert len(one.source.split()) >= 2, "a source, or whose estimate it is"
    assert re.fullmatch(r"20\d\d(-[01]\d(-[0-3]\d)?)?", one.date)
    assert one.confidence in {"high", "medium", "low"}
    assert one.unit
    if one.source.startswith("Our "):
        assert one.confidence == "low", "what nobody published is not to be trusted far"
