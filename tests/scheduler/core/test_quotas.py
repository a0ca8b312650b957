import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.core.plan import plan
from scheduler.core.types import Reason, Request
from tests.scheduler.core.test_plan import box

pytestmark = pytest.mark.serverless


def placed(requests, hosts=2):
    return {d.job for d in plan(box(hosts), requests).decisions if d.placed}


def test_an_organizations_limit_holds_over_all_its_contracts():
    jobs = [
        Request(job=i, org=1 + i // 3, gpus=2, queued_at=i, quota_id=i + 1, quota_milli=8000, limit_milli=4000)
        for i in range(6)
    ]
    assert placed(jobs) == {0, 1, 3, 4}


def test_each_limit_binds_where_it_is_the_smaller():
    jobs = [
        Request(job=1, org=1, gpus=4, quota_id=1, quota_milli=2000, limit_milli=9000),
        Request(job=2, org=1, gpus=4, quota_id=2, quota_milli=4000, limit_milli=9000),
        Request(job=3, org=2, gpus=4, quota_id=3, quota_milli=9000, limit_milli=3000),
    ]
    assert placed(jobs) == {2}


def test_what_a_limit_refuses_is_named_and_costs_nobody_else():
    jobs = [Request(job=1, org=1, gpus=8, limit_milli=4000), Request(job=2, org=1, gpus=4, limit_milli=4000)]
    decisions = {d.job: d for d in plan(box(), jobs).decisions}
    assert decisions[1].reason == decisions[1].binding == Reason.ORGANIZATION_LIMIT
    assert decisions[2].placed


def test_an_hourly_limit_is_shared_by_an_organizations_jobs_whatever_their_price():
    money = {"org": 1, "rate_left": 8000 * 2_500_000}
    jobs = [
        Request(job=1, gpus=4, price=2_000_000, queued_at=1, **money),  # 8 of 20
        Request(job=2, gpus=8, price=2_000_000, queued_at=2, **money),  # 16: over
        Request(job=3, gpus=4, price=3_000_000, queued_at=3, **money),  # 12
        Request(job=4, gpus=1, price=0, queued_at=4, **money),  # under a reserved contract
        Request(job=5, gpus=2, org=2, queued_at=5),
    ]
    decisions = {d.job: d for d in plan(box(4), jobs).decisions}
    assert {job for job, d in decisions.items() if d.placed} == {1, 3, 4, 5}
    assert decisions[2].reason == decisions[2].binding == Reason.HOURLY_LIMIT


@given(
    st.lists(st.tuples(st.integers(1, 2), st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=12),
    st.integers(0, 20),
)
@settings(max_examples=30, deadline=None)
def test_no_plan_goes_beyond_an_hourly_limit_and_none_leaves_out_what_it_holds(wishes, left):
    limits = {1: left * 1000, 2: -1}
    jobs = [
        Request(job=n, org=org, gpus=gpus, cpu=1000, price=price, rate_left=limits[org], queued_at=n)
        for n, (org, gpus, price) in enumerate(wishes)
    ]
    decisions = {d.job: d for d in plan(box(16), jobs).decisions}
    cost = sum(r.milli * r.price for r in jobs if r.org == 1 and decisions[r.job].placed)
    assert cost <= limits[1]
    for r in jobs:
        assert decisions[r.job].placed or (r.org == 1 and r.milli * r.price > limits[1] - cost)


def test_nothing_new_begins_once_the_months_budget_is_used_up():
    jobs = [Request(job=1, org=1, gpus=1, budget_ok=False), Request(job=2, org=1, gpus=1)]
    decisions = {d.job: d for d in plan(box(), jobs).decisions}
    assert (decisions[1].placed, decisions[1].reason) == (False, Reason.BUDGET_USED)
    assert decisions[2].placed
