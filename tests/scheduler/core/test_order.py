import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.core.order import PAST, decayed, fair_order, size, weighed
from scheduler.core.types import Kind, Policy, Request
from tests.scheduler.core.cells import queue
from tests.scheduler.core.test_plan import box

pytestmark = pytest.mark.serverless
AGE, SHORTEST = Policy(queue="age"), Policy(queue="shortest")


def order(jobs, policy=AGE, now=0, fleet=None):
    return [jobs[i].job for i in fair_order(fleet or box(), jobs, policy, now)]


@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 5000), st.integers(1, 5000)), max_size=6), st.integers(50, 900)
)
def test_decayed_usage_is_the_weighted_mean_of_what_was_held(spans, half_life):
    now = 4000
    timeline = [(amount, start, start + length) for amount, start, length in spans]
    step = 1.0  # the integral of amount * ln2 / H * 2^(-age / H), by the midpoint rule
    summed = 0.0
    for amount, start, end in timeline:
        for k in range(int((min(end, now) - start) / step) if start < now else 0):
            summed += amount * 2 ** (-(now - start - (k + 0.5) * step) / half_life) * step
    assert decayed(timeline, now, half_life) == pytest.approx(
        summed * 0.6931471805599453 / half_life, rel=1e-3, abs=1e-2
    )


def test_always_held_is_worth_itself_and_a_half_life_ago_half():
    assert decayed([(3000, -(10**7), 0)], 0, 3600) == pytest.approx(3000)
    assert decayed([(3000, -(10**7), -3600)], 0, 3600) == pytest.approx(1500)
    assert decayed([(3000, 10, 20)], 0, 3600) == 0


def test_who_held_too_much_for_long_goes_behind_who_holds_as_much_since_now():
    long_ago = weighed(0, decayed([(8000, -3600, 0)], 0, 3600))
    just_now = weighed(8000, decayed([(8000, -60, 0)], 0, 3600))
    assert long_ago == pytest.approx(PAST * 4000)
    assert long_ago > just_now
    jobs = [Request(job=1, org=1, gpus=1, queued_at=0, usage=long_ago), Request(job=2, org=2, gpus=1, usage=just_now)]
    assert order(jobs, Policy(queue="age", usage_scale=8000.0)) == [2, 1]


@settings(max_examples=30)
@given(st.integers(0, 10**6))
def test_whoever_goes_first_owes_least_and_what_is_due_is_made_good(seed):
    """Turns on one device: everybody always wants it, one had it alone for a while. In the end all had the same, to a few turns."""
    dice = random.Random(seed)
    count, half_life = dice.randint(2, 4), 500
    past, got = [0.0] * count, [0] * count
    keep = 2.0 ** (-1 / half_life)
    for step in range(1500):
        wanting = [0] if step < 60 else range(count)
        jobs = [Request(job=o + 1, org=o, gpus=1, usage=weighed(0, past[o])) for o in wanting]
        who = order(jobs, Policy(queue="age", usage_scale=1.0))[0] - 1
        assert past[who] == min(past[o] for o in wanting)
        got[who] += 1
        past = [p * keep + (1 - keep) * (o == who) for o, p in enumerate(past)]
    assert max(past) - min(past) <= 3 * (1 - keep)


def test_what_was_used_lately_counts_against_an_organization_per_weight():
    jobs = [
        Request(job=1, org=1, gpus=1, queued_at=0, usage=4000.0),
        Request(job=2, org=2, gpus=1, queued_at=5),
        Request(job=3, org=3, gpus=1, queued_at=1, usage=6000.0, weight=2000),
    ]
    assert order(jobs, Policy(queue="age", usage_scale=8000.0)) == [2, 3, 1]


def test_within_an_organization_the_smallest_goes_first_until_another_has_waited():
    policy = Policy(queue="shortest", patience_s=1000, unknown_s=5000)
    jobs = [
        Request(job=1, gpus=8, duration_s=1000, queued_at=0),
        Request(job=2, gpus=1, duration_s=1000, queued_at=90),
        Request(job=3, gpus=2, duration_s=100, queued_at=95),
        Request(job=4, gpus=1, queued_at=0),  # no limit: taken for 5,000 s
    ]
    assert order(jobs, policy, 100) == [3, 2, 4, 1]
    assert size(jobs[0], 7000, policy) == 1000
    # After 20,000 s the oldest has waited 20 times the patience; what has just come is as small as it is.
    jobs[1].queued_at = 20_000
    assert order(jobs, policy, 20_000)[-1] == 2


def test_small_jobs_win_nothing_between_organizations():
    many = [Request(job=i, org=1, gpus=1, duration_s=10, queued_at=i) for i in range(1, 9)]
    other = Request(job=99, org=2, gpus=4, duration_s=10**6, queued_at=100)
    turns = order([*many, other], SHORTEST)
    assert turns.index(99) == 1  # the first turn is a tie, by age; the second is the other's


@given(st.integers(0, 10**6))
def test_an_order_is_a_permutation_and_does_not_mix_kinds_or_priorities(seed):
    dice = random.Random(seed)
    jobs = queue(dice, 30)
    for r in jobs:
        r.usage = dice.choice((0.0, 0.3, 2.0))
        r.duration_s = dice.choice((0, 60, 6000))
    found = fair_order(box(3), jobs, Policy(queue=dice.choice(("age", "shortest"))), 500)
    assert sorted(found) == list(range(30))
    tiers = [(jobs[i].kind, -jobs[i].priority) for i in found]
    assert tiers == sorted(tiers)


@given(st.integers(0, 10**6))
def test_what_one_organization_queues_does_not_change_the_order_of_another(seed):
    dice = random.Random(seed)
    jobs = [r for r in queue(dice, 30) if r.kind == Kind.ON_DEMAND]
    alone = [r.job for r in jobs if r.org == 1]
    mixed = [job for job in order(jobs, SHORTEST, 500) if job in alone]
    assert mixed == order([r for r in jobs if r.org == 1], SHORTEST, 500)
