import random
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.core.plan import plan
from scheduler.core.preempt import may_evict
from scheduler.core.types import Fleet, Kind, Level, Policy, Request, Topology
from tests.scheduler.core.cells import cell, check, leave, queue, settle
from tests.scheduler.core.test_plan import box, full

pytestmark = pytest.mark.serverless


def victims(result):
    return {p.placement for p in result.preemptions}


def test_the_lowest_bid_leaves_first_and_no_more_than_needed():
    fleet = box(2)
    running = full(fleet)
    for r in running:
        r.bid = 100 + r.placement
    result = plan(fleet, [Request(job=99, gpus=3)], running)
    assert victims(result) == {0, 1, 2}
    assert {p.host for p in result.placements} == {0}


def test_equal_bids_are_ordered_by_work_lost():
    fleet = box(2)
    running = full(fleet)
    for r in running:
        r.work_lost_s = 500 if r.host == 0 else 10
    running[11].work_lost_s = 9000
    result = plan(fleet, [Request(job=99, gpus=7)], running)
    assert victims(result) == {8, 9, 10, 12, 13, 14, 15}


def test_spot_is_not_preempted_by_spot_nor_firm_by_anyone_else():
    fleet = box(1)
    assert not victims(plan(fleet, [Request(job=99, gpus=1, kind=Kind.SPOT)], full(fleet)))
    fleet = box(1)
    running = full(fleet, kind=Kind.FIRM)
    assert not victims(plan(fleet, [Request(job=99, gpus=1, kind=Kind.FIRM, priority=9)], running))
    own = plan(fleet, [Request(job=99, org=50, gpus=1, kind=Kind.FIRM, priority=9)], running)
    assert len(victims(own)) == 1
    assert not victims(plan(fleet, [Request(job=99, org=50, gpus=1, kind=Kind.FIRM)], running))
    assert not victims(
        plan(fleet, [Request(job=99, org=50, gpus=1, priority=9)], running, policy=Policy(preemption=False))
    )


def test_a_gang_is_preempted_whole_and_its_cost_is_that_of_all():
    fleet = box(2)
    running = full(fleet)
    for r in running:
        r.work_lost_s = 10
        if r.placement in {0, 8}:
            r.job, r.gang_size, r.work_lost_s = 7777, 2, 9
    # The gang's two members lose 18 s together: a single victim of 10 s is cheaper than one member.
    assert victims(plan(fleet, [Request(job=99, gpus=1)], running)) == {1}
    assert victims(plan(fleet, [Request(job=99, gpus=8)], running)) == {0, 1, 2, 3, 4, 5, 6, 7, 8}


def test_a_gang_evicts_over_hosts_and_puts_back_whom_it_does_not_need():
    fleet = box(4)
    running = full(fleet)
    for r in running:
        r.bid = {0: 5, 1: 1, 2: 9, 3: 2}[r.host]
    request = Request(job=99, replicas=2, gpus=8, topology=Topology(pack=Level.SITE))
    result = plan(fleet, [request], running)
    assert {p.host for p in result.placements} == {1, 3}
    assert victims(result) == {r.placement for r in running if r.host in {1, 3}}


def test_who_was_taken_in_vain_on_the_way_is_put_back():
    fleet = box(3)
    running = full(fleet)
    for r in running:
        r.bid = {0: 1, 1: 5, 2: 5}[r.host]
    fleet.cpu_free[0] = 500  # the cheapest victims sit where the gang cannot go
    request = Request(job=99, replicas=2, gpus=8, cpu=1000, topology=Topology(pack=Level.SITE))
    result = plan(fleet, [request], running)
    assert {p.host for p in result.placements} == {1, 2}
    assert victims(result) == {r.placement for r in running if r.host in {1, 2}}


def test_watts_above_the_host_are_freed_elsewhere():
    row = {
        "cpu_free": 64_000,
        "gpus": 2,
        "power_node": 0,
        "parked_w": 100,
        "base_w": 300,
        "gpu_min_w": 50,
        "gpu_max_w": 600,
    }
    fleet = Fleet.build([{"host_id": i, **row} for i in range(3)], [{"free_mw": 0}])
    running = [r for r in full(fleet, per_host=2) if r.host < 2]
    fleet.gpu_free[2, :2], fleet.gpu_active[2] = 1000, 0
    result = plan(fleet, [Request(job=99, gpus=2, models=0)], running)
    check(fleet, result, [Request(job=99, gpus=2, models=0)], running)
    assert len(victims(result)) == 2


def test_nobody_leaves_when_it_would_not_help():
    fleet = box(2)
    assert not victims(plan(fleet, [Request(job=99, gpus=8, vram=100_000)], full(fleet)))
    fleet = box(2)
    assert not victims(plan(fleet, [Request(job=99, gpus=8, replicas=3)], full(fleet)))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_preemption_is_minimal(seed):
    dice = random.Random(seed)
    fleet, nodes = cell(dice, 6, tight=dice.choice((0.5, 1.2)))
    first = [replace(r, kind=Kind.SPOT, quota_id=0, quota_milli=-1) for r in queue(dice, 40)]
    after, running = settle(fleet, nodes, plan(fleet, first), first)
    request = replace(queue(dice, 1)[0], job=900, kind=Kind.FIRM, quota_id=0, quota_milli=-1)
    result = plan(after, [request], running)
    check(after, result, [request], running)
    jobs = {p.job for p in result.preemptions}
    assert {r.placement for r in running if r.job in jobs} == victims(result), "gangs leave whole"
    assert all(may_evict(request, r) for r in running if r.job in jobs)
    if jobs and len(jobs) <= 5:
        for some in range(len(jobs)):
            for fewer in combinations(sorted(jobs), some):
                freed = leave(after, [r for r in running if r.job in fewer])
                still = plan(freed, [request], policy=Policy(preemption=False))
                assert not still.placements, f"{fewer} would have been enough, {jobs} left"
    if not jobs and not result.placements:
        gone = leave(after, [r for r in running if may_evict(request, r)])
        assert not plan(gone, [request], policy=Policy(preemption=False)).placements, "victims would have helped"


def test_of_equal_bids_and_work_lost_the_one_nearest_in_size_leaves():
    fleet = box(2)
    running = [r for r in full(fleet) if r.host == 1]
    whole = replace(running[0], placement=100, job=100, host=0, gpus=tuple(range(8)))
    assert len(victims(plan(fleet, [Request(job=99, gpus=1)], [whole, *running]))) == 1
    assert 100 not in victims(plan(fleet, [Request(job=99, gpus=1)], [whole, *running]))
    # For all eight GPUs the one job is nearer than eight of one, and fewer leave.
    assert victims(plan(fleet, [Request(job=99, gpus=8)], [whole, *running])) == {100}


def gang_of(running, members, least):
    for r in running:
        if r.placement in members:
            r.job, r.gang_size, r.gang_min = 7777, len(members), least


def test_a_gang_that_may_shrink_loses_what_it_can_spare_and_no_more():
    fleet = box(1)
    running = full(fleet)
    gang_of(running, set(range(8)), 5)
    assert len(victims(plan(fleet, [Request(job=99, gpus=3)], running))) == 3
    fleet = box(1)
    running = full(fleet)
    gang_of(running, set(range(8)), 5)
    assert len(victims(plan(fleet, [Request(job=99, gpus=4)], running))) == 8


def test_one_plan_does_not_shrink_a_gang_twice_below_its_least():
    fleet = box(1)
    running = full(fleet)
    gang_of(running, set(range(8)), 6)
    jobs = [Request(job=98, gpus=2, queued_at=1), Request(job=99, gpus=2, queued_at=2)]
    result = plan(fleet, jobs, running)
    assert len(victims(result)) == 8  # two were spared for the first; the second takes it whole
    assert {p.job for p in result.placements} == {98, 99}


def test_whoever_is_freed_by_a_gang_that_leaves_whole_stays():
    fleet = box(1)
    running = full(fleet)
    for r in running:
        r.bid = {0: 1, 1: 2, 2: 3}.get(r.placement, 9)
        if r.placement in {0, 2}:
            r.job, r.gang_size = 7777, 2
    assert victims(plan(fleet, [Request(job=99, gpus=2)], running)) == {0, 2}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_no_victim_is_superfluous_and_no_gang_is_left_below_its_least(seed):
    dice = random.Random(seed)
    fleet, nodes = cell(dice, 6, tight=dice.choice((0.5, 1.2)))
    first = [replace(r, kind=Kind.SPOT, quota_id=0, quota_milli=-1) for r in queue(dice, 40)]
    after, running = settle(fleet, nodes, plan(fleet, first), first)
    for r in running:
        r.gang_min = r.gang_size - 1 if r.gang_size > 1 and r.job % 2 else 0
    request = replace(queue(dice, 1)[0], job=900, kind=Kind.FIRM, quota_id=0, quota_milli=-1)
    result = plan(after, [request], running)
    check(after, result, [request], running)
    gone = victims(result)
    left = {r.job: [m.placement for m in running if m.job == r.job and m.placement not in gone] for r in running}
    for r in running:
        if r.placement in gone:
            assert not left[r.job] or len(left[r.job]) >= r.gang_min > 0
    for job in {r.job for r in running if r.placement in gone}:
        if not left[job] and len({r.job for r in running if r.placement in gone}) > 1:
            fewer = leave(after, [r for r in running if r.placement in gone and r.job != job])
            assert not plan(fewer, [request], policy=Policy(preemption=False)).placements, f"{job} left in vain"
