import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.core.fit import fits_one, host_row
from scheduler.core.order import fair_order
from scheduler.core.plan import plan
from scheduler.core.types import Fleet, HostFlag, Kind, Level, Policy, Reason, Request, Running, Topology
from tests.scheduler.core.cells import budgets_of, cell, check, queue, settle

pytestmark = pytest.mark.serverless


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["tailrace", "fgd", "best_fit"]), st.booleans())
def test_a_plan_never_oversells_and_gangs_are_whole(seed, packer, watts):
    dice = random.Random(seed)
    fleet, _ = cell(dice, dice.randrange(1, 20), watts=watts, tight=dice.choice((0.1, 0.4, 2.0)))
    requests = queue(dice, 30)
    check(fleet, plan(fleet, requests, policy=Policy(packer=packer), seed=seed % 3), requests)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_a_plan_with_running_work_never_oversells_and_refuses_nobody_who_fits(seed):
    dice = random.Random(seed)
    fleet, nodes = cell(dice, 10, tight=dice.choice((0.4, 1.0)))
    first = queue(dice, 30)
    after, running = settle(fleet, nodes, plan(fleet, first), first)
    for r in running:
        r.preemptible = dice.random() < 0.8
    second = [replace(r, job=r.job + 100) for r in queue(dice, 15)]
    result = plan(after, second, running, seed=seed % 2)
    check(after, result, second, running)
    # Work-conserving: with nothing held, a job of one replica that waits fits on no host as the plan leaves them.
    gone = {p.placement for p in result.preemptions}
    if not gone:
        end, _ = settle(after, nodes, result, second)
        by_job = {r.job: r for r in second}
        for d in result.decisions:
            r = by_job[d.job]
            if not d.placed and r.replicas == 1 and d.reason != Reason.OVER_QUOTA:
                assert all(fits_one(host_row(end, h), r, budgets_of(end, h)).reason for h in range(len(end)))


def test_same_snapshot_and_seed_give_the_same_plan_and_the_fleet_is_not_touched():
    fleet, nodes = cell(random.Random(5), 16)
    before = {name: getattr(fleet, name).copy() for name in Fleet.__dataclass_fields__}
    requests = queue(random.Random(6), 60)
    one, two = (plan(fleet, requests, seed=9) for _ in range(2))
    assert (one.placements, one.decisions, one.preemptions) == (two.placements, two.decisions, two.preemptions)
    assert all((getattr(fleet, name) == column).all() for name, column in before.items())
    assert nodes


def box(count=1, **more):
    return Fleet.build(
        [
            {"host_id": i, "cpu_free": 64_000, "ram_free": 262_144, "gpus": 8, "vram": 81_920, **more}
            for i in range(count)
        ]
    )


def test_kinds_then_priority_then_fair_share_then_age():
    fleet = box()
    jobs = [
        Request(job=1, org=1, kind=Kind.SPOT, priority=9, gpus=1, queued_at=0),
        Request(job=2, org=1, kind=Kind.ON_DEMAND, gpus=1, queued_at=1),
        Request(job=3, org=1, kind=Kind.ON_DEMAND, gpus=1, queued_at=2),
        Request(job=4, org=2, kind=Kind.ON_DEMAND, gpus=1, queued_at=9),
        Request(job=5, org=3, kind=Kind.ON_DEMAND, gpus=1, queued_at=8, usage=0.5),
        Request(job=6, org=3, kind=Kind.FIRM, gpus=1, queued_at=99),
        Request(job=7, org=2, kind=Kind.ON_DEMAND, priority=1, gpus=1, queued_at=99),
    ]
    # Job 7 has given org 2 its turn, so org 1 goes twice before or after it by share; org 3 has used half the cell.
    assert [jobs[i].job for i in fair_order(fleet, jobs)] == [6, 7, 2, 3, 4, 5, 1]


def test_a_heavier_weight_gets_more_turns():
    jobs = [Request(job=i, org=i % 2 + 1, gpus=1, weight=3000 if i % 2 else 1000, queued_at=i) for i in range(16)]
    first = [jobs[i].org for i in fair_order(box(), jobs)][:8]
    assert first.count(2) == 6


def test_a_gang_takes_the_smallest_domain_that_holds_it():
    fleet = Fleet.build(
        [
            {"host_id": i, "cpu_free": 64_000, "gpus": 8, "leaf": leaf, "spine": leaf // 2}
            for i, leaf in enumerate((0, 0, 0, 1, 1, 2, 2, 2, 2))
        ]
    )
    result = plan(fleet, [Request(job=1, replicas=2, gpus=8, topology=Topology(Level.SPINE, required=True))])
    assert [p.host for p in result.placements] == [3, 4]
    result = plan(fleet, [Request(job=1, replicas=5, gpus=8, topology=Topology(Level.SPINE, required=True))])
    assert {p.host for p in result.placements} == {0, 1, 2, 3, 4}
    result = plan(fleet, [Request(job=1, replicas=6, gpus=8, topology=Topology(Level.SPINE, required=True))])
    assert result.placements == []
    assert result.decisions[0].reason == Reason.TOPOLOGY
    assert result.decisions[0].short == 1
    assert len(plan(fleet, [Request(job=1, replicas=6, gpus=8, topology=Topology(Level.SPINE))]).placements) == 6


def test_a_gang_spreads_over_failure_domains():
    fleet = Fleet.build([{"host_id": i, "cpu_free": 64_000, "gpus": 8, "leaf": i // 2} for i in range(6)])
    request = Request(job=1, replicas=6, gpus=2, topology=Topology(spread=Level.LEAF, max_per_domain=2))
    leaves = [p.host // 2 for p in plan(fleet, [request]).placements]
    assert sorted(leaves) == [0, 0, 1, 1, 2, 2]
    refused = plan(fleet, [replace(request, replicas=7)])
    assert refused.decisions[0].placed is False


def test_watts_bind_at_an_ancestor_and_are_named():
    nodes = [
        {"parent": -1, "k_gpu": 1200, "free_mw": 1_000_000, "reclaimable_mw": 2_600_000},
        {"parent": 0, "free_mw": 9_000_000},
    ]
    row = {
        "cpu_free": 64_000,
        "gpus": 4,
        "power_node": 1,
        "parked_w": 300,
        "base_w": 800,
        "gpu_min_w": 50,
        "gpu_max_w": 600,
    }
    fleet = Fleet.build([{"host_id": 1, **row}, {"host_id": 2, **row}], nodes)
    # The first GPU costs 800 + 600 + 3*50 - 300 = 1,250 W, each further one 550 W: x1.2 <= 3,600 W allows 1,250 + 3*550 = 2,900.
    result = plan(fleet, [Request(job=j, gpus=1) for j in range(1, 9)])
    assert sum(p.watts_delta for p in result.placements) == 2900
    assert len({p.host for p in result.placements}) == 1
    waiting = [d for d in result.decisions if not d.placed]
    assert [d.reason for d in waiting] == [Reason.NO_WATTS] * 4
    assert {d.node for d in waiting} == {0}
    assert waiting[0].short == 1250 - 100  # 120,000 mW are left at the root: 100 W at k = 1.2
    assert "power node 0" in waiting[0].change


def test_stages_count_the_hosts_that_survive():
    fleet = Fleet.build(
        [
            {"host_id": 1, "pool": 5, "gpus": 8, "cpu_free": 64_000},
            {"host_id": 2, "pool": 6, "gpus": 8, "cpu_free": 64_000},
            {
                "host_id": 3,
                "pool": 6,
                "gpus": 8,
                "cpu_free": 64_000,
                "flags": int(HostFlag.SCHEDULABLE | HostFlag.MAINTENANCE),
            },
            {"host_id": 4, "pool": 6, "gpus": 2, "cpu_free": 64_000},
            {"host_id": 5, "pool": 6, "gpus": 8, "cpu_free": 1000},
        ]
    )
    decision = plan(
        fleet, [Request(job=1, pool=6, gpus=8, cpu=2000), Request(job=2, pool=6, gpus=4, cpu=2000)]
    ).decisions[1]
    stages = dict(decision.stages)
    assert stages[Reason.NOT_IN_POOL] == 4
    assert stages[Reason.HOST_UNSCHEDULABLE] == 3
    assert stages[Reason.NO_CPU] == 2
    assert stages[Reason.NO_GPU] == 0
    assert decision.reason == decision.binding == Reason.NO_GPU
    assert decision.short == 2


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (Request(job=1, gpus=1, price_ok=False), Reason.PRICE_LIMIT),
        (Request(job=1, gpus=2, quota_id=3, quota_milli=1000), Reason.OVER_QUOTA),
        (Request(job=1, gpus=2, gpu_milli=500), Reason.INVALID),
        (Request(job=1, gpus=1, pool=9), Reason.NOT_IN_POOL),
        (Request(job=1, gpus=1, site=4), Reason.WRONG_SITE),
        (Request(job=1, gpus=1, models=0b10), Reason.WRONG_MODEL),
        (Request(job=1, gpus=1, vram=90_000), Reason.NO_VRAM),
        (Request(job=1, ram=300_000), Reason.NO_RAM),
        (Request(job=1, nvme=1), Reason.NO_NVME),
        (Request(job=1, gpus=8, replicas=2), Reason.GANG_INCOMPLETE),
        (Request(job=1, gpus=8, topology=Topology(nvlink=2)), Reason.TOPOLOGY),
    ],
)
def test_the_reason_is_named(request_, reason):
    decision = plan(box(nvlink=[0, 0, 0, 0, 1, 1, 1, 1]), [request_]).decisions[0]
    assert (decision.placed, decision.reason) == (False, reason)
    assert decision.change


def test_quota_is_shared_and_comes_back_from_a_job_that_waits():
    jobs = [
        Request(job=1, gpus=8, replicas=3, quota_id=1, quota_milli=26_000, queued_at=1),
        Request(job=2, gpus=4, quota_id=1, quota_milli=26_000, queued_at=2),
    ]
    placed = {d.job for d in plan(box(2), jobs).decisions if d.placed}
    assert placed == {2}


def full(fleet, per_host=8, kind=Kind.SPOT, **more):
    out = []
    for host in range(len(fleet)):
        for g in range(per_host):
            fleet.gpu_free[host, g] = 0
            fleet.gpu_active[host] |= 1 << g
            n = len(out)
            out.append(Running(placement=n, job=n, org=50, kind=kind, host=host, gpus=(g,), **more))
    return out


def test_backfill_gives_a_start_time_that_small_jobs_do_not_delay():
    fleet = box(2)
    running = full(fleet, kind=Kind.FIRM)
    for r in running:
        r.ends_at = 1000 if r.host == 0 else 5000
    # Two GPUs of each host are free already.
    for host in (0, 1):
        fleet.gpu_free[host, 6:8] = 1000
        fleet.gpu_active[host] &= 0b111111
    running = [r for r in running if max(r.gpus) < 6]
    big = Request(job=900, gpus=8, queued_at=1)
    jobs = [
        big,
        *(Request(job=901 + i, gpus=1, queued_at=10 + i) for i in range(4)),
        Request(job=950, gpus=1, queued_at=20, duration_s=300),
    ]
    result = plan(fleet, jobs, running, now_s=500)
    decisions = {d.job: d for d in result.decisions}
    assert decisions[900].earliest_start == 1000
    assert [p.host for p in result.placements if p.job < 950] == [1, 1]  # nothing of unknown length on the held host
    assert [p.host for p in result.placements if p.job == 950] == [0]  # but what ends before then may
    assert decisions[903].reason == Reason.NO_GPU or decisions[903].reason == Reason.HELD_FOR_EARLIER_JOB
    too_long = replace(jobs[-1], duration_s=600)
    result = plan(fleet, [big, too_long], running, now_s=500)
    assert [p.host for p in result.placements] == [1]
