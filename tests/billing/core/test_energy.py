"""Energy and its money, exact: nothing is lost between a sample and the P&L, however it is cut."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billing.core import energy
from billing.core.energy import KINDS, MJ_PER_MWH, Hour, Use

pytestmark = pytest.mark.serverless
BOUNDED = settings(max_examples=60, deadline=None, derandomize=True)
WATTS = st.integers(0, 200_000_000)
MS = st.integers(0, 60_000)


@BOUNDED
@given(st.integers(0, 10**12), st.integers(0, 10**7), st.sampled_from([1000, 60_000, 3_600_000]))
def test_spans_cut_a_time_where_buckets_begin(start, length, bucket):
    found = energy.spans(start, start + length, bucket)
    assert sum(ms for _, ms in found) == length
    assert [at for at, _ in found] == sorted({at for at, _ in found})
    position = start
    for at, ms in found:
        assert at == position // bucket * bucket
        assert position < position + ms <= at + bucket
        position += ms


@BOUNDED
@given(WATTS, st.dictionaries(st.integers(1, 1000), st.integers(1, 16_000), max_size=16))
def test_a_hosts_watts_are_its_placements(watts, weights):
    found = energy.shares(watts, weights)
    assert sum(found.values()) == (watts if weights else 0)
    assert set(found) == set(weights)
    whole = sum(weights.values())
    assert all(abs(found[k] - Fraction(watts * w, whole)) < 1 for k, w in weights.items())


SAMPLE = st.tuples(WATTS, WATTS, WATTS, MS, st.integers(1000, 2000), st.integers(1000, 2000), WATTS, st.none() | WATTS)


@BOUNDED
@given(st.lists(SAMPLE, max_size=8))
def test_what_came_in_is_the_sum_of_its_named_parts(samples):
    total = Use()
    for placements, idle, miners, ms, pue, miner_pue, fixed, metered in samples:
        used = energy.drawn(
            placements,
            idle,
            miners,
            ms,
            pue_permille=pue,
            miner_pue_permille=miner_pue,
            fixed_w=fixed,
            metered_w=metered,
        )
        if metered is None:
            assert used.remainder == 0
        else:
            assert used.site == metered * ms
        total += used
    parts = total.placements + total.idle + total.miners + total.cooling_hosts + total.cooling_miners + total.fixed
    assert total.site == parts + total.remainder
    assert total.site == total.ai + total.hashing + total.fixed + total.remainder


@BOUNDED
@given(WATTS, WATTS, WATTS, st.integers(1, 60_000), st.integers(0, 60_000), st.integers(1000, 2000))
def test_a_sample_cut_in_two_is_the_same_energy(placements, idle, miners, ms, cut, pue):
    def use(part):
        return energy.drawn(placements, idle, miners, part, pue_permille=pue, fixed_w=7, metered_w=None)

    cut = min(cut, ms)
    assert use(cut) + use(ms - cut) == use(ms)


@BOUNDED
@given(st.lists(st.dictionaries(st.integers(1, 30), st.integers(0, 10**12)), max_size=6))
def test_columns_by_device_add_up_in_any_order(samples):
    def all_of(rows):
        ids, mj = [], []
        for row in rows:
            ids, mj = energy.merged(ids, mj, row)
        return ids, mj

    ids, mj = all_of(samples)
    assert (ids, mj) == all_of(reversed(samples))
    assert ids == sorted(set(ids))
    assert sum(mj) == sum(sum(s.values()) for s in samples)


PART = st.integers(-(10**24), 10**24)


@BOUNDED
@given(st.lists(PART, min_size=1, max_size=6), st.integers(1, 10**13))
def test_rounded_parts_sum_to_the_rounded_whole(parts, unit):
    exact = [Fraction(p, unit) for p in parts]
    found = energy.told(exact)
    whole = sum(exact)
    assert sum(found) == (2 * whole + 1).numerator // (2 * (2 * whole + 1).denominator)  # half up
    assert all(abs(f - e) < 1 for f, e in zip(found, exact, strict=True))


@BOUNDED
@given(
    st.builds(Use, *[st.integers(0, 10**14)] * 7), st.integers(-(10**8), 10**9), st.none() | st.integers(0, 10**6), st.integers(0, 10**9),
    st.dictionaries(st.sampled_from(["hashing", "demand_response"]), st.integers(0, 10**12)),
)  # fmt: skip
def test_kinds_sum_to_the_site(use, price, carbon, ai, paid):
    rest = use.site - use.ai - use.hashing
    hour = Hour(
        use, 3_600_000, (use.ai * price, use.hashing * price, rest * price),
        None if carbon is None else (use.ai * carbon, use.hashing * carbon, rest * carbon), 10**24,
    )  # fmt: skip
    found = energy.lines(hour, ai, paid)
    assert tuple(found) == KINDS
    assert sum(line.energy_mj for line in found.values()) == use.site
    cost = Fraction(use.site * price, MJ_PER_MWH)
    assert sum(line.energy_uusd for line in found.values()) == (2 * cost + 1).numerator // (
        2 * (2 * cost + 1).denominator
    )
    if carbon is None:
        assert {line.carbon_mg for line in found.values()} == {None}
    else:
        assert abs(
            sum(line.carbon_mg for line in found.values()) - Fraction(1000 * use.site * carbon, MJ_PER_MWH)
        ) <= Fraction(1, 2)
    assert found["ai"].revenue_uusd == ai
    assert found["demand_response"].revenue_uusd == paid.get("demand_response", 0)
    assert {kind: line.paid_uusd for kind, line in found.items() if line.paid_uusd is not None} == paid


def test_an_hour_by_hand():
    # 1 MW of AI at PUE 1.25, 2 MW of hashing at 1.05, 100 kW always on, for an hour; the meter sees 3.5 MW at $40 a MWh.
    used = energy.drawn(
        1_000_000,
        0,
        2_000_000,
        3_600_000,
        pue_permille=1250,
        miner_pue_permille=1050,
        fixed_w=100_000,
        metered_w=3_500_000,
    )
    assert [used.ai, used.hashing, used.fixed, used.remainder] == [
        w * 3_600_000 for w in (1_250_000, 2_100_000, 100_000, 50_000)
    ]
    price = 40_000_000
    cost = (used.ai * price, used.hashing * price, (used.fixed + used.remainder) * price)
    # 100 PH/s at $40 a PH/s-day, the pool keeps 1 %: $165 in an hour
    work = 100_000_000 * 3_600_000 * 40_000_000 * 990_000
    found = energy.lines(Hour(used, 3_600_000, cost, None, work), 500_000_000, {})
    assert [line.energy_uusd for line in found.values()] == [50_000_000, 84_000_000, 0, 6_000_000]
    assert found["hashing"].revenue_uusd == 165_000_000


@BOUNDED
@given(st.integers(0, 10**12), st.lists(st.integers(0, 10**20), min_size=1, max_size=48))
def test_a_payout_is_spread_whole(amount, work):
    found = energy.spread(amount, work, [3600] * len(work))
    assert sum(found) == amount
    if sum(work):
        assert all(part == 0 for part, weight in zip(found, work, strict=True) if not weight)
    else:
        assert max(found) - min(found) <= 1
