import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.core import fit_kernels as fit
from scheduler.core.backfill import Horizon, reduce_kernel
from scheduler.core.fit import bounds, deadlines, rounded_end, vram_of
from scheduler.core.fit_kernels import request_vector
from scheduler.core.pack import copy_state, make_state
from scheduler.core.plan import plan
from scheduler.core.preempt import held
from scheduler.core.types import FOREVER, MAX_GPUS, Fleet, Kind, Level, Policy, Reason, Request, Topology
from tests.scheduler.core.cells import cell, check, queue, settle
from tests.scheduler.core.test_plan import box, full

pytestmark = pytest.mark.serverless
QUIET = Policy(queue="age", preemption=False, explain=False)


def two_hosts(first=1000, second=5000):
    """Two hosts of 8, six GPUs of each busy until then."""
    fleet = box(2)
    running = [r for r in full(fleet, kind=Kind.FIRM) if max(r.gpus) < 6]
    for r in running:
        r.ends_at = first if r.host == 0 else second
    for host in (0, 1):
        fleet.gpu_free[host, 6:8] = 1000
        fleet.gpu_active[host] &= 0b111111
    return fleet, running


def decide(fleet, requests, running, now, **policy):
    result = plan(fleet, requests, running, now_s=now, policy=replace(QUIET, **policy))
    return result, {d.job: d for d in result.decisions}


def test_a_promise_names_its_hosts_and_the_next_plan_keeps_them():
    fleet, running = two_hosts()
    big = Request(job=900, gpus=8, duration_s=500)
    _, decisions = decide(fleet, [big], running, 500)
    assert (decisions[900].earliest_start, decisions[900].held) == (1000, (0,))
    # Between the cycles somebody more entitled comes, who would like that host for long.
    back = replace(big, promised_start=1000, promised_hosts=(0,))
    rich = Request(job=901, kind=Kind.FIRM, gpus=8, duration_s=9000)
    result, decisions = decide(fleet, [rich, back], running, 600)
    assert (decisions[900].earliest_start, decisions[900].held) == (1000, (0,))
    assert decisions[901].earliest_start == 1500  # behind it
    assert result.counters["promises_broken"] == 0


def test_when_the_time_has_come_the_promise_goes_first():
    fleet, running = two_hosts()
    later = [r for r in running if r.host == 1]
    fleet.gpu_free[0, :8], fleet.gpu_active[0] = 1000, 0
    back = Request(job=900, gpus=8, promised_start=1000, promised_hosts=(0,))
    rich = Request(job=901, kind=Kind.FIRM, gpus=8)
    result, _ = decide(fleet, [rich, back], later, 1000)
    assert [(p.job, p.host) for p in result.placements] == [(900, 0)]


def test_a_promised_job_starts_sooner_where_it_fits_sooner():
    fleet, running = two_hosts()
    gone = [r for r in running if r.host == 0]
    fleet.gpu_free[1, :8], fleet.gpu_active[1] = 1000, 0
    result, _ = decide(fleet, [Request(job=900, gpus=8, promised_start=1000, promised_hosts=(0,))], gone, 600)
    assert [(p.job, p.host) for p in result.placements] == [(900, 1)]


def test_no_start_is_promised_on_a_host_that_leaves_before_its_end():
    """Host 0 is free first, and leaves: at 1549 it is too soon by one second for 50 s of lag and 500 s of work from 1000 on."""
    fleet, running = two_hosts()
    for leaves, start, host in ((1549, 5000, 1), (1550, 1000, 0)):
        fleet.leaves[0] = leaves
        asked = Request(job=900, gpus=8, duration_s=500, until=rounded_end(500, 500, [leaves], 50))
        _, decisions = decide(fleet, [asked], running, 500, lag_s=50)
        assert (decisions[900].earliest_start, decisions[900].held) == (start, (host,))
        kept = replace(asked, promised_start=1000, promised_hosts=(0,))
        result, decisions = decide(fleet, [kept], running, 500, lag_s=50)
        assert (decisions[900].earliest_start, result.counters["promises_broken"]) == (start, host)
    fleet.leaves[1], fleet.gpu_count[1] = 0, 8
    running = [r for r in running if r.host == 0]
    fleet.flags[1] = 0  # nobody's: only the host that leaves is left, and a later end than its hour
    late = [*running, replace(running[0], placement=999, job=999, host=1, ends_at=9000)]
    _, decisions = decide(fleet, [asked], late, 500, lag_s=50)
    assert decisions[900].earliest_start == 1000


def test_a_hold_is_never_on_gpus_that_are_reserved_before_its_end():
    """Four of host 0 are reserved from 2000 on. What is promised four for longer needs the two that idle and two that come back."""
    fleet, running = two_hosts()
    fleet.claimed_at[0], fleet.claimed_gpus[0] = 2000, 0b1111
    fleet.flags[1] = 0
    big, long = (Request(job=job, gpus=n, duration_s=3000) for job, n in ((900, 4), (901, 2)))
    for r in (big, long):
        r.stays = bounds(r, 500, *deadlines(fleet), QUIET)[1]
    _, decisions = decide(fleet, [big], running, 500)
    assert (decisions[900].earliest_start, decisions[900].held) == (1000, (0,))
    kept = replace(big, promised_start=1000, promised_hosts=(0,))
    _, decisions = decide(fleet, [kept, long], running, 500)
    assert decisions[900].earliest_start == 1000
    assert not decisions[901].placed, "it would stand on what the promise needs"
    brief = Request(job=902, gpus=2, duration_s=500)
    brief.stays = bounds(brief, 500, *deadlines(fleet), QUIET)[1]
    _, decisions = decide(fleet, [kept, brief], running, 500)
    assert decisions[902].placed, "it is gone by then"


def test_a_promise_moves_to_an_earlier_start_and_never_to_a_later_one():
    fleet, running = two_hosts(first=3000, second=2000)
    back = Request(job=900, gpus=8, promised_start=3000, promised_hosts=(0,))
    _, decisions = decide(fleet, [back], running, 600)
    assert (decisions[900].earliest_start, decisions[900].held) == (2000, (1,))
    stays = Request(job=900, gpus=8, promised_start=2000, promised_hosts=(1,))
    _, decisions = decide(fleet, [stays], running, 600)
    assert (decisions[900].earliest_start, decisions[900].held) == (2000, (1,))


def test_a_host_that_fails_breaks_the_promise_and_it_is_counted():
    fleet, running = two_hosts()
    fleet.flags[0] = 0
    back = Request(job=900, gpus=8, promised_start=1000, promised_hosts=(0,))
    result, decisions = decide(fleet, [back], running, 600)
    assert (decisions[900].earliest_start, decisions[900].held) == (5000, (1,))
    assert result.counters["promises_broken"] == 1


def test_long_work_goes_beside_a_hold_that_needs_only_part_of_the_host():
    fleet, running = two_hosts()
    half = Request(job=900, gpus=4, queued_at=1)
    long = [Request(job=901 + i, gpus=2, queued_at=2 + i) for i in range(3)]
    result, decisions = decide(fleet, [half, *long], running, 500)
    assert decisions[900].earliest_start == 1000
    # Six come back at 1000, four are held: two of the idle ones of host 0 may go for good, beside the two of host 1.
    assert sorted(p.host for p in result.placements) == [0, 1]
    assert not decisions[903].placed


def test_what_ends_in_time_may_use_all_that_is_held():
    fleet, running = two_hosts()
    big = Request(job=900, gpus=8, queued_at=1)
    short = [Request(job=901 + i, gpus=2, duration_s=500, queued_at=2) for i in range(2)]
    result, _ = decide(fleet, [big, *short], running, 500)
    assert sorted(p.host for p in result.placements) == [0, 1]
    too_long = [replace(r, duration_s=501) for r in short]
    result, _ = decide(fleet, [big, *too_long], running, 500)
    assert [p.host for p in result.placements] == [1]


def test_no_more_promises_stand_at_a_time_than_the_policy_allows():
    fleet, running = two_hosts()
    jobs = [Request(job=900 + i, gpus=8, queued_at=i, duration_s=100) for i in range(6)]
    _, decisions = decide(fleet, jobs, running, 500, backfill_depth=3)
    starts = [d.earliest_start for d in decisions.values() if d.held]
    assert sorted(starts) == [1000, 1100, 1200]
    kept = [
        replace(r, promised_start=decisions[r.job].earliest_start, promised_hosts=decisions[r.job].held) for r in jobs
    ]
    _, again = decide(fleet, kept, running, 600, backfill_depth=3)
    assert {j: d.earliest_start for j, d in again.items() if d.held} == {900: 1000, 901: 1100, 902: 1200}


def test_a_lag_between_placement_and_run_is_part_of_every_stay():
    fleet, running = two_hosts()
    big = Request(job=900, gpus=8, duration_s=500, queued_at=1)
    short = Request(job=901, gpus=2, duration_s=480, queued_at=2)
    behind = Request(job=902, gpus=8, duration_s=500, queued_at=3)
    result, decisions = decide(fleet, [big, short, behind], running, 500, lag_s=30)
    assert [p.host for p in result.placements] == [1]  # 500 + 30 + 480 is after 1000
    assert decisions[902].earliest_start == 1530


def test_watts_are_kept_for_a_promise():
    row = {
        "cpu_free": 64_000,
        "gpus": 4,
        "power_node": 0,
        "parked_w": 100,
        "base_w": 300,
        "gpu_min_w": 50,
        "gpu_max_w": 600,
    }
    fleet = Fleet.build([{"host_id": i, **row} for i in range(3)], [{"free_mw": 2_600_000}])
    running = [r for r in full(fleet, per_host=4, kind=Kind.FIRM) if r.host == 0]
    for r in running:
        r.ends_at = 1000
    fleet.gpu_free[1:, :4], fleet.gpu_active[1:] = 1000, 0
    two = Request(job=900, replicas=2, gpus=4, topology=Topology(Level.SITE), queued_at=1)  # 2 x 2,600 W
    small = Request(job=901, gpus=1, queued_at=2)
    result, decisions = decide(fleet, [two, small], running, 500)
    # Host 0 gives 2,600 W back at 1000; the other 2,600 W must stay.
    assert decisions[900].earliest_start == 1000
    assert not result.placements


def test_a_promise_counts_against_the_quota_it_will_need():
    fleet, running = two_hosts()
    shared = {"quota_id": 7, "quota_milli": 8000}
    jobs = [
        Request(job=900, gpus=8, queued_at=1, **shared),
        Request(job=901, gpus=1, duration_s=100, queued_at=2, **shared),
    ]
    _, decisions = decide(fleet, jobs, running, 500)
    assert decisions[900].earliest_start == 1000
    assert decisions[901].reason == Reason.OVER_QUOTA


def reduced_in_plain_python(state, horizon, rows, until):
    """The twin of `reduce_kernel`: (CPU, RAM, NVMe, milli of each GPU, VRAM of each GPU) by row."""
    out = {}
    for h in rows:
        n = int(state.rows[h, fit.NGPU])

        def at(time, h=h, n=n):
            free = [
                *state.rows[h, [fit.CPU, fit.RAM, fit.NVME]].tolist(),
                *state.gfree[h, :n].tolist(),
                *state.vfree[h, :n].tolist(),
            ]
            moves = [(horizon._vector[i], int(horizon._mask[i]), 1) for i in range(horizon._used)
                     if horizon._row[i] == h and horizon._time[i] <= time]  # fmt: skip
            moves += [(hold.q, mask, -1) for hold in horizon.holds for row, mask in zip(hold.rows, hold.masks, strict=True)
                      if row == h and hold.start <= time < hold.end]  # fmt: skip
            for q, mask, sign in moves:
                for column, resource in enumerate((fit.Q_CPU, fit.Q_RAM, fit.Q_NVME)):
                    free[column] += sign * int(q[resource])
                for g in range(n):
                    if mask >> g & 1:
                        free[3 + g] += sign * int(q[fit.Q_MILLI])
                        free[3 + n + g] += sign * vram_of(
                            int(q[fit.Q_VRAM]), int(q[fit.Q_MILLI]), int(state.rows[h, fit.VRAM])
                        )
            return free

        now = [
            *state.rows[h, [fit.CPU, fit.RAM, fit.NVME]].tolist(),
            *state.gfree[h, :n].tolist(),
            *state.vfree[h, :n].tolist(),
        ]
        looks = [now, *(at(hold.start) for hold in horizon.holds if h in hold.rows and hold.start < until)]
        low = [min(column) for column in zip(*looks, strict=True)]
        out[h] = [max(0, v) for v in low]
    return out


@settings(max_examples=30)
@given(st.integers(0, 10**6))
def test_what_holds_leave_is_what_plain_python_finds(seed):
    dice = random.Random(seed)
    fleet, nodes = cell(dice, 5, tight=2.0)
    first = [replace(r, quota_id=0, quota_milli=-1) for r in queue(dice, 25)]
    after, running = settle(fleet, nodes, plan(fleet, first, policy=QUIET), first)
    for r in running:
        r.ends_at = dice.choice((0, 300, 600, 900))
    state = make_state(after)
    horizon = Horizon(state, running, held(running, lambda h: h), 100)
    for r in queue(dice, 8):
        q = request_vector(r)
        q[fit.Q_HOLD] = 0
        hold = horizon.earliest(q, r.replicas, r.topology, dice.choice((0, 200, 400)))
        if hold is not None:
            horizon.book(hold)
    rows = np.unique(np.array([row for h in horizon.holds for row in h.rows], np.int64))
    until = dice.choice((250, 500, 700, 2000, FOREVER))
    expected = reduced_in_plain_python(state, horizon, rows.tolist(), until)
    trial = copy_state(state)
    low, at = np.zeros(3 + 2 * MAX_GPUS, np.int64), np.zeros(3 + 2 * MAX_GPUS, np.int64)
    reduce_kernel(
        *(rows, until, horizon._order(), horizon._time, horizon._row, horizon._vector, horizon._mask),
        *(horizon._hs, horizon._he, horizon._hr, horizon._hv, horizon._hm, trial, low, at),
    )
    for h in rows.tolist():
        n = int(trial.rows[h, fit.NGPU])
        found = trial.rows[h, [fit.CPU, fit.RAM, fit.NVME]].tolist()
        found += trial.gfree[h, :n].tolist() + trial.vfree[h, :n].tolist()
        assert found == expected[h]


def history(seed):
    """Cycle after cycle on a random cell: work ends at or before its bound, new work comes, and no start moves later."""
    dice = random.Random(seed)
    fleet, nodes = cell(dice, 6, watts=dice.random() < 0.5, tight=1.5)
    policy = replace(QUIET, backfill_depth=dice.choice((1, 3, 6)))
    waiting, running, true_end, promises, number = {}, {}, {}, {}, 1
    promised = 0
    now = 0
    while now < 4000:
        due = [start for start, _ in promises.values() if start > now]
        now = min([now // 200 * 200 + 200, *due])
        for job in [j for j, end in true_end.items() if end <= now]:
            fleet = leave_all(fleet, running.pop(job))
            del true_end[job]
        for r in queue(dice, dice.randrange(5)):
            duration = dice.choice((300, 700, 1500))
            waiting[number] = replace(
                r, job=number, duration_s=duration, queued_at=now, quota_id=0, quota_milli=-1, kind=Kind.ON_DEMAND
            )
            number += 1
        requests = [
            replace(r, promised_start=promises[j][0], promised_hosts=promises[j][1]) if j in promises else r
            for j, r in waiting.items()
        ]
        hours = deadlines(fleet)
        bound = [(r, bounds(r, now, *hours, policy)) for r in requests]
        requests = [replace(r, until=until, stays=stays) for r, (until, stays) in bound]
        rows = [r for group in running.values() for r in group]
        made = plan(fleet, requests, rows, now_s=now, policy=policy, seed=now)
        check(fleet, made, requests, rows)
        assert made.counters["promises_broken"] == 0
        for d in made.decisions:
            before = promises.pop(d.job, None)
            if before is not None:
                assert d.placed or 0 < d.earliest_start <= before[0]
                assert not d.placed or now <= before[0]
            if d.held:
                promises[d.job] = d.earliest_start, d.held
                promised += 1
        fleet, placed = settle(fleet, nodes, made, requests)
        for r in placed:
            request = waiting[r.job]
            r.ends_at = now + request.duration_s
            running.setdefault(r.job, []).append(r)
            true_end[r.job] = now + int(request.duration_s * dice.uniform(0.1, 1.0)) // 1
        for d in made.decisions:
            if d.placed:
                del waiting[d.job]
    return promised


def leave_all(fleet, rows):
    from tests.scheduler.core.cells import leave

    return leave(fleet, rows)


@settings(max_examples=30)
@given(st.integers(0, 10**6))
def test_promises_are_kept_whatever_comes_between(seed):
    history(seed)


def test_histories_do_promise():
    assert sum(history(seed) for seed in range(8)) > 10
