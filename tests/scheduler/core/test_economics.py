"""Golden vectors of `design/power.md` (published hashprice days), and feeds that must not be believed."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.core import economics as eco
from scheduler.core.economics import SATOSHI, UUSD, FeedError, FutureFeedError, Quote, StaleFeedError, ZeroFeedError

pytestmark = pytest.mark.serverless
BOUNDED = settings(max_examples=60, deadline=None, derandomize=True)

T = 10**12
HASHPRICE = 39_530_000  # $39.53 per PH/s and day


def reward(height, fees_permyriad):
    """Subsidy plus fees; fees are published as their share of the whole reward."""
    return eco.subsidy_sat(height) * 10_000 // (10_000 - fees_permyriad)


def test_vector_of_2025_11_03():
    mined = eco.btc_per_ph_day_sat(155_970_000_000_000, reward(922_000, 62))
    assert float(mined / SATOSHI) == pytest.approx(0.00040557, abs=5e-9)
    assert abs(mined / SATOSHI - Fraction("0.00040577")) / Fraction("0.00040577") < Fraction(1, 1000)  # as published
    dollars = eco.hashprice_uusd(155_970_000_000_000, reward(922_000, 62), 106_935 * UUSD)
    assert dollars / UUSD == pytest.approx(43.37, abs=0.005)
    assert dollars / UUSD == pytest.approx(43.33, rel=0.002)  # as published


def test_vector_of_2026_01_12():
    dollars = eco.hashprice_uusd(148_260_000_000_000, reward(932_000, 55), 91_132 * UUSD)
    assert dollars / UUSD == pytest.approx(38.85, abs=0.005)
    assert dollars / UUSD == pytest.approx(39.53, rel=0.02)  # published; the index smooths


@pytest.mark.parametrize(("efficiency", "dollars"), [(17_000, 96.9), (22_000, 74.9), (32_300, 51.0)])
def test_dollars_per_mwh_at_the_asic(efficiency, dollars):
    assert eco.asic_uusd_per_mwh(HASHPRICE, efficiency) / UUSD == pytest.approx(dollars, abs=0.05)


@pytest.mark.parametrize(
    ("efficiency", "cents_per_kwh"), [(29_500, 5.26), (21_500, 7.22), (17_500, 8.87), (13_500, 11.50)]
)
def test_break_even_at_the_meter_of_four_machines(efficiency, cents_per_kwh):
    got = eco.break_even_uusd_per_mwh(HASHPRICE, efficiency, pool_fee_ppm=10_000, pue_permille=1050)
    assert got / UUSD / 10 == pytest.approx(cents_per_kwh, abs=0.006)


def test_subsidy_halves_at_the_heights_it_does():
    assert [eco.subsidy_sat(h) for h in (0, 209_999, 210_000, 1_049_999, 1_050_000)] == [
        5_000_000_000,
        5_000_000_000,
        2_500_000_000,
        312_500_000,
        156_250_000,
    ]
    assert eco.subsidy_sat(64 * 210_000) == 0


def test_reward_statistics_come_as_strings():
    assert eco.mean_reward_sat("45280000000", 144) == 314_444_444
    with pytest.raises(ZeroFeedError):
        eco.mean_reward_sat("0", 144)


def test_what_a_pools_scheme_pays_for():
    paid = {scheme: eco.expected_reward_sat(922_000, 1_937_500, scheme) for scheme in ("fpps", "pps", "pplns")}
    assert paid == {"fpps": 314_437_500, "pps": 312_500_000, "pplns": 314_437_500}
    with pytest.raises(ValueError, match="solo"):
        eco.expected_reward_sat(922_000, 1, "solo")


@BOUNDED
@given(
    st.integers(1, 500 * UUSD), st.integers(0, 600_000), st.integers(0, 12_000), st.integers(-500 * UUSD, 9_000 * UUSD),
    st.integers(0, 40_000), st.integers(1000, 1600),
)  # fmt: skip
def test_a_mode_never_looks_better_than_it_is_and_columns_agree(hashprice, ghs, watts, energy, fee, pue):
    exact = Fraction(hashprice * (UUSD - fee) * ghs, UUSD * 10**6 * 24) - Fraction(watts * pue * energy, 10**9)
    got = eco.mode_value_uusd_h(hashprice, ghs, watts, energy, pool_fee_ppm=fee, pue_permille=pue)
    assert exact - 3 < got <= exact
    columns = eco.mode_values_uusd_h(
        hashprice, np.array([[ghs, 0]]), np.array([[watts, 0]]), energy, pool_fee_ppm=fee, pue_permille=pue
    )
    assert columns.tolist() == [[got, 0]]


def test_a_mode_pays_exactly_below_its_break_even():
    # S21: 200 TH/s at 3,500 W
    edge = eco.break_even_uusd_per_mwh(HASHPRICE, 17_500, pool_fee_ppm=10_000, pue_permille=1050)
    kept = {"pool_fee_ppm": 10_000, "pue_permille": 1050}
    assert eco.mode_value_uusd_h(HASHPRICE, 200_000, 3_500, edge - 1000, **kept) > 0
    assert eco.mode_value_uusd_h(HASHPRICE, 200_000, 3_500, edge + 1000, **kept) < 0


def test_spot_floor_is_the_dearer_of_energy_and_hashing():
    share = eco.gpu_share_w(4_600, 8, 700)
    assert share == 1275
    hashing = eco.break_even_uusd_per_mwh(HASHPRICE, 17_500, pool_fee_ppm=10_000, pue_permille=1040)
    # $39.53 x 0.99 / (24 x 17.5 x 1.04) = $89.594/MWh; 1.275 kW x 1.25 x that = $0.142791; plus one cent
    assert eco.spot_floor(share, 1250, 45 * UUSD, hashing, 10_000) == 152_791
    assert eco.spot_floor(share, 1250, 200 * UUSD, hashing) == 318_750
    assert (
        eco.spot_floor(share, 1250, -50 * UUSD, 0, 7) == 7
    )  # never below the fee, also when energy is paid to be taken
    assert eco.spot_floor(1, 1000, 1, 1) == 1  # rounded up


def quote(value=5, at=1000):
    return Quote("hashprice", value, at, "test")


def test_values_nothing_may_be_decided_on():
    assert eco.checked(quote(), now=1100, max_age_s=100) == 5
    with pytest.raises(StaleFeedError, match="101 s old"):
        eco.checked(quote(), now=1101, max_age_s=100)
    with pytest.raises(FutureFeedError):
        eco.checked(quote(), now=969, max_age_s=100)
    for value in (0, -3):
        with pytest.raises(ZeroFeedError) as refused:
            eco.checked(quote(value), now=1000, max_age_s=100)
        assert refused.value.feed == "hashprice"
        assert isinstance(refused.value, FeedError)
        assert eco.checked(quote(value), now=1000, max_age_s=100, signed=True) == value


@pytest.mark.parametrize(
    "ask",
    [
        lambda: eco.hashprice_uusd(0, 1, 1),
        lambda: eco.hashprice_uusd(1, 0, 1),
        lambda: eco.hashprice_uusd(1, 1, 0),
        lambda: eco.mode_value_uusd_h(0, 1, 1, 1),
        lambda: eco.asic_uusd_per_mwh(0, 1),
        lambda: eco.break_even_uusd_per_mwh(1, 0),
        lambda: eco.mode_values_uusd_h(-1, np.zeros(1, np.int64), np.zeros(1, np.int64), 1),
    ],
)
def test_zeros_are_refused_in_every_formula(ask):
    with pytest.raises(ZeroFeedError):
        ask()
