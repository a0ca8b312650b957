"""Suggestions are true: whatever is said to make a waiting job fit does, by the planner and by the fit rule on its own."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.core.case import Case, Window
from scheduler.core.changes import changes, reserved
from scheduler.core.types import Fleet, Kind, Level, Policy, Reason, Request, Running, Tie, Topology
from tests.scheduler.core import cells

pytestmark = pytest.mark.serverless
QUIET = Policy(explain=False)


def case_of(fleet, requests, running=(), **fields):
    return Case(fleet, list(requests), list(running), Policy(), **fields)


def one_host(**fields):
    host = {"host_id": 1, "gpus": 8, "vram": 80_000, "cpu_free": 96_000, "ram_free": 500_000, "pool": 7}
    return {**host, **fields}


def kinds(found):
    return {c.kind: c for c in found}


def ran(job, host, gpus, **fields):
    return Running(
        placement=job * 10 + host, job=job, org=1, kind=Kind.ON_DEMAND, host=host, gpus=tuple(gpus), **fields
    )


def busy(host, gpus, **fields):
    """A host's row with these GPUs taken."""
    free = [0 if i in gpus else 1000 for i in range(8)]
    return one_host(host_id=host, gpu_free=free, gpu_active=sum(1 << i for i in gpus), **fields)


# --- each kind says the least change
def test_fewer_gpus_smaller_replicas_and_the_gang_in_pieces():
    fleet = Fleet.build([busy(1, range(3)), busy(2, range(5)), busy(3, range(8))])
    found = kinds(changes(case_of(fleet, [Request(job=1, gpus=8, cpu=8000)]), 1))
    assert found["gpus"].request.gpus == 5
    split = found["split"].request
    assert (split.replicas, split.gpus, split.cpu) == (8, 1, 1000)
    gang = kinds(changes(case_of(fleet, [Request(job=1, replicas=4, gpus=3)]), 1))
    assert gang["replicas"].request.replicas == 2
    assert gang["gpus"].request.gpus == 2 or gang["gpus"].request.gpus == 1
    assert len(gang["replicas"].hosts) == 2


def test_less_of_each_resource_in_round_numbers():
    fleet = Fleet.build([one_host(cpu_free=33_300, ram_free=100_000, nvme_free=77)])
    for name, asked, fits in (
        ("cpu", 64_000, 33_000),
        ("ram", 200_000, 99_328),
        ("nvme", 100, 70),
        ("vram", 90_000, 79_872),
    ):
        found = changes(case_of(fleet, [Request(job=1, gpus=1, **{name: asked})]), 1)
        assert kinds(found)[name].request == Request(job=1, gpus=1, **{name: fits})


def test_a_share_of_one_gpu():
    fleet = Fleet.build([one_host(gpu_free=[555] + [0] * 7, gpu_active=255)])
    found = kinds(changes(case_of(fleet, [Request(job=1, gpus=1, gpu_milli=700)]), 1))
    assert found["share"].request.gpu_milli == 550


def test_another_model_site_or_listing_and_none_that_may_not_be_booked():
    rows = [
        busy(1, range(8), gpu_model=0, site=1),
        one_host(host_id=2, gpu_model=1, site=1),
        one_host(host_id=3, gpu_model=0, site=2),
        one_host(host_id=4, gpu_model=2, site=3, pool=9),
    ]
    job = Request(job=1, gpus=8, pool=7, models=1, site=1)
    found = changes(case_of(Fleet.build(rows), [job]), 1)
    assert {(c.kind, c.request.models, c.request.site) for c in found} >= {("model", 2, 1), ("site", 1, 2)}
    assert "listing" not in kinds(found)
    assert kinds(changes(case_of(Fleet.build(rows), [job]), 1, pools=[7, 9]))["listing"].hosts == (3,)


def test_a_looser_topology_nvlink_or_affinity():
    rows = [busy(i, range(4), leaf=i, spine=1, nvlink=[0, 1, 0, 1, 0, 1, 0, 1]) for i in range(1, 5)]
    fleet = Fleet.build(rows)
    gang = Request(job=1, replicas=3, gpus=4, topology=Topology(pack=Level.LEAF, required=True))
    assert kinds(changes(case_of(fleet, [gang]), 1))["topology"].request.topology == Topology(
        Level.SPINE, required=True
    )
    near = Request(job=1, gpus=4, topology=Topology(nvlink=2))
    assert kinds(changes(case_of(fleet, [near]), 1))["nvlink"].request.topology.nvlink == 1
    apart = Request(job=1, gpus=4, apart=(Tie(Level.SPINE, 5, (0,)),))
    assert "apart" in kinds(changes(case_of(fleet, [apart]), 1))
    spread = Request(job=1, replicas=5, gpus=1, topology=Topology(spread=Level.HOST, max_per_domain=1))
    assert kinds(changes(case_of(fleet, [spread]), 1))["spread"].request.topology.max_per_domain == 2


def test_each_side_of_the_affinity_is_tried_by_itself_and_both_only_where_neither_helps():
    fleet = Fleet.build([busy(1, range(8), leaf=1), one_host(host_id=2, leaf=2), one_host(host_id=3, leaf=3)])
    there, elsewhere = Tie(Level.LEAF, 5, (0,)), Tie(Level.LEAF, 6, (1, 2))
    found = kinds(changes(case_of(fleet, [Request(job=1, gpus=8, near=(there,))]), 1))
    assert (found["near"].request.near, "apart" in found, "affinity" in found) == ((), False, False)
    found = kinds(
        changes(case_of(fleet, [Request(job=1, gpus=8, near=(elsewhere,), apart=(elsewhere,), joins=(6,))]), 1)
    )
    assert (found["apart"].request.apart, found["apart"].request.joins, found["apart"].request.near) == (
        (),
        (),
        (elsewhere,),
    )
    found = kinds(changes(case_of(fleet, [Request(job=1, gpus=8, near=(there,), apart=(elsewhere,))]), 1))
    assert ("near" in found, "apart" in found, "affinity" in found) == (False, False, True)


def test_tolerating_taints_is_tried_but_not_those_that_nobody_can_tolerate():
    fleet = Fleet.build([busy(1, range(8)), one_host(host_id=2, taints=1 << 3)])
    assert kinds(changes(case_of(fleet, [Request(job=1, gpus=8)]), 1))["taints"].hosts == (1,)
    fleet = Fleet.build([busy(1, range(8)), one_host(host_id=2, taints=1 << 62)])
    assert "taints" not in kinds(changes(case_of(fleet, [Request(job=1, gpus=8)]), 1))


def test_quota_price_and_spot():
    fleet = Fleet.build([one_host()])
    over = Request(job=1, gpus=4, quota_id=3, quota_milli=3000)
    found = kinds(changes(case_of(fleet, [over]), 1))
    assert found["quota"].request.quota_milli == -1
    assert found["gpus"].request.gpus == 3, "fewer GPUs stay under the ceiling"
    assert "price" in kinds(changes(case_of(fleet, [Request(job=1, gpus=1, price_ok=False)]), 1))
    full = Fleet.build([busy(1, range(8))])
    spot = ran(9, 0, range(8), preemptible=True)
    spot.kind = Kind.SPOT
    found = kinds(changes(case_of(full, [Request(job=1, gpus=8, kind=Kind.SPOT)], [spot]), 1))
    assert found["contract"].request.kind == Kind.ON_DEMAND


def test_later_when_running_work_or_a_window_ends():
    rows = [busy(1, range(8)), busy(2, range(8)), one_host(host_id=2, pool=-5)]
    fleet = Fleet.build(rows)
    running = [ran(3, 0, range(4), ends_at=100), ran(4, 0, range(4, 8), ends_at=200), ran(5, 1, range(8))]
    found = kinds(changes(case_of(fleet, [Request(job=1, gpus=8, pool=7)], running), 1))
    assert (found["ends"].start, found["ends"].jobs) == (200, (4,))
    assert found["job"].jobs == (5,), "no single other end makes room for 8"
    half = kinds(changes(case_of(fleet, [Request(job=1, gpus=4, pool=7)], running), 1))
    assert (half["ends"].start, half["ends"].jobs, half["job"].jobs) == (100, (3,), (3,))


def test_after_a_reservation_ends_its_gpus_are_anybodys():
    """The host's open row shows the reserved GPUs as taken; their own row is the contract's alone."""
    closed = one_host(host_id=2, gpu_free=[0] * 8, vram_free=[0] * 8)
    fleet = Fleet.build([busy(1, range(8)), closed, one_host(host_id=2, pool=-5)])
    case = case_of(fleet, [Request(job=1, gpus=8, pool=7)], [ran(3, 0, range(8), ends_at=200)])
    assert kinds(changes(case, 1))["ends"].start == 200
    soon = kinds(changes(case, 1, windows=[Window(2, 150)]))["window"]
    assert (soon.start, soon.rows, soon.jobs, soon.hosts) == (150, (2,), (), (1,))


@pytest.mark.parametrize(("next_gpus", "start"), [(0, 150), (0b1111, 150), (0b11110000, 0)])
def test_a_window_ends_with_the_last_reservation_of_its_gpus_and_not_with_those_of_others(next_gpus, start):
    """The window's GPUs are the lower four; the claim at 100 is over by 150 where it is on these, and stays where it is not."""
    open_ = one_host(gpu_free=[0] * 4 + [1000] * 4, vram_free=[0] * 4 + [80_000] * 4)
    if next_gpus:
        open_ |= {"claimed_at": 100, "claimed_gpus": next_gpus, "owed_cpu": 48_000}
    own = one_host(pool=-5, gpu_free=[1000] * 4 + [0] * 4, vram_free=[80_000] * 4 + [0] * 4)
    case = case_of(Fleet.build([open_, own]), [Request(job=1, gpus=8, pool=7, stays=1 << 62 if next_gpus else 0)])
    found = kinds(changes(case, 1, windows=[Window(1, 150)]))
    assert ("window" in found, found["window"].start if "window" in found else 0) == (start > 0, start)
    assert case.fleet.claimed_gpus[0] == next_gpus


def test_only_jobs_that_may_be_named_are_named_as_a_help():
    fleet = Fleet.build([busy(1, range(8)), busy(2, range(8))])
    running = [ran(3, 0, range(8)), ran(4, 1, range(8))]
    found = changes(case_of(fleet, [Request(job=1, gpus=8)], running), 1, may_name={4}.__contains__)
    assert kinds(found)["job"].jobs == (4,)
    assert not changes(case_of(fleet, [Request(job=1, gpus=8)], running), 1, may_name=lambda _: False)


def test_a_time_limit_lets_it_use_what_is_held_or_leaves():
    fleet = Fleet.build([busy(1, range(4))])
    first = Request(job=1, gpus=8, queued_at=1)
    later = Request(job=2, gpus=4, queued_at=2)
    running = [ran(3, 0, range(4), ends_at=1000)]
    case = case_of(fleet, [first, later], running, now_s=100)
    found = kinds(changes(case.after(case.plan()), 2))
    assert found["duration"].request.duration_s == 900
    leaving = case_of(Fleet.build([one_host(leaves=5000)]), [Request(job=1, gpus=4, until=1 << 62)], now_s=1000)
    assert kinds(changes(leaving, 1))["duration"].request.duration_s == 4000


def test_the_time_to_leave_counts_in_limits_and_in_known_ends():
    """With the lag of a real cell: what is suggested must be gone when the promised start comes, not only over."""
    running = [ran(3, 0, range(4), ends_at=1000)]
    jobs = [Request(job=1, gpus=8, queued_at=1), Request(job=2, gpus=4, queued_at=2)]
    case = replace(case_of(Fleet.build([busy(1, range(4))]), jobs, running, now_s=100), policy=Policy(lag_s=120))
    assert kinds(changes(case.after(case.plan()), 2))["duration"].request.duration_s == 780
    placed = replace(case, requests=[Request(job=4, gpus=4, duration_s=600)], running=[])
    assert [r.ends_at for r in placed.after(placed.plan()).running] == [820]


def test_held_capacity_is_not_offered():
    """Four GPUs are free, but held for the job before it: no smaller shape may take them."""
    fleet = Fleet.build([busy(1, range(4))])
    queue = [Request(job=1, gpus=8, queued_at=1), Request(job=2, gpus=4, queued_at=2)]
    found = changes(case_of(fleet, queue, [ran(3, 0, range(4), ends_at=1000)], now_s=100), 2)
    assert "gpus" not in kinds(found)
    assert "gpus" in kinds(changes(case_of(fleet, queue[:1], [ran(3, 0, range(4), ends_at=1000)], now_s=100), 1))


def test_a_promised_start_is_carried_into_the_cell_after_and_does_not_bind_another_shape():
    fleet = Fleet.build([busy(1, range(4))])
    case = case_of(fleet, [Request(job=1, gpus=8)], [ran(3, 0, range(4), ends_at=1000)], now_s=100)
    after = case.after(case.plan())
    assert (after.requests[0].promised_start, after.requests[0].promised_hosts) == (1000, (0,))
    found = kinds(changes(after, 1))
    assert found["gpus"].request.gpus == 4, "its own hold is not in its way"
    assert found["gpus"].request.promised_start == 0
    assert found["ends"].start == 1000


def test_a_job_that_fits_needs_no_change_and_an_unknown_one_is_an_error():
    case = case_of(Fleet.build([one_host()]), [Request(job=1, gpus=8)])
    assert [c.kind for c in changes(case, 1)] == ["now"]
    with pytest.raises(KeyError):
        changes(case, 2)
    assert changes(case_of(Fleet.build([]), [Request(job=1)]), 1) == []


# --- and all of it is true
def check_suggestions(seed, watts):
    """Every change said of a random cell's waiting jobs, tried by itself; how many there were."""
    said = 0
    dice = random.Random(seed)
    fleet, nodes = cells.cell(dice, hosts=9, watts=watts)
    requests = cells.queue(dice, jobs=12)
    made = Case(fleet, requests, [], Policy(), seed % 7).plan()
    after, running = cells.settle(fleet, nodes, made, requests)
    for r in running:
        r.ends_at = dice.choice((0, 500, 900))
    waiting = [r for r in requests if r.job in {d.job for d in made.decisions if not d.placed}]
    case = Case(after, waiting, running, Policy(), seed % 5, 100)
    for r in waiting[:2]:
        for c in changes(case, r.job, pools=(7, 8), windows=()):
            here, gone = case, [x for x in running if c.kind == "job" and x.job in c.jobs]
            if c.start:
                gone = [x for x in running if 0 < x.ends_at <= c.start]
            if gone:
                here = replace(case, fleet=cells.leave(after, gone), running=[x for x in running if x not in gone])
            if c.start:
                then = [case.lasting(x, x.duration_s, c.start) for x in here.requests]
                here = replace(here, now_s=c.start, requests=then)
            evicts = c.kind == "contract"
            # It is said as it is now: what leaves or is claimed before it would end is worked out anew in each cycle.
            asked = case.lasting(c.request, c.request.duration_s, c.start) if c.start else c.request
            queue = [replace(asked, may_preempt=evicts) if x.job == r.job else x for x in here.requests]
            again = replace(here, requests=queue, policy=QUIET).plan()
            assert dict.fromkeys(p.host for p in again.placements if p.job == r.job) == dict.fromkeys(c.hosts), c
            for row, mask in zip(c.hosts, c.gpus, strict=True):
                got = [p.gpus for p in again.placements if p.job == r.job and p.host == row]
                assert {gpu for gpus in got for gpu in gpus} == {i for i in range(16) if mask >> i & 1}, c
            cells.check(here.fleet, again, queue, here.running)
            said += 1
    return said


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.booleans())
def test_every_suggestion_is_true(seed, watts):
    check_suggestions(seed, watts)


@pytest.mark.full
def test_every_suggestion_is_true_in_five_hundred_cells():
    assert sum(check_suggestions(seed, watts=seed % 2 == 0) for seed in range(500)) > 500


@given(st.integers(0, 10**6))
def test_the_cell_after_a_plan_is_what_the_placements_leave(seed):
    dice = random.Random(seed)
    fleet, nodes = cells.cell(dice, hosts=9)
    requests = cells.queue(dice, jobs=12)
    case = Case(fleet, requests, [], Policy(), seed % 7, 100)
    made = case.plan()
    expected, _ = cells.settle(fleet, nodes, made, requests)
    after = case.after(made)
    for name in Fleet.__dataclass_fields__:
        assert (getattr(after.fleet, name) == getattr(expected, name)).all(), name
    placed = {p.job for p in made.placements}
    assert {r.job for r in after.requests} == {r.job for r in requests} - placed
    assert all(d.reason != Reason.OK for d in after.plan().decisions if d.job not in placed and not d.placed)
    ended = after.without(lambda _: True)
    for name in Fleet.__dataclass_fields__:
        assert (getattr(ended.fleet, name) == getattr(fleet, name)).all(), name


def test_what_the_plan_placed_counts_towards_the_ceiling_and_what_ends_no_more():
    fleet = Fleet.build([one_host(), one_host(host_id=2)])
    first = Request(job=1, org=1, gpus=4, quota_id=3, quota_milli=8000, limit_milli=9000, duration_s=600)
    over = Request(job=2, org=1, gpus=8, quota_id=3, quota_milli=8000, limit_milli=9000)
    case = case_of(fleet, [first, over])
    after = case.after(case.plan())
    (waits,) = after.requests
    assert (waits.job, waits.quota_milli, waits.limit_milli) == (2, 4000, 5000)
    found = kinds(changes(after, 2))
    assert "now" not in found
    assert found["gpus"].request.gpus == 4
    assert (found["ends"].start, found["ends"].jobs, found["job"].jobs) == (600, (1,), (1,))


def test_reservations_are_named_as_what_stops_it_where_it_would_fit_without_them():
    closed = one_host(host_id=2, gpu_free=[0] * 8, vram_free=[0] * 8, cpu_free=0)
    fleet = Fleet.build([busy(1, range(8)), closed, one_host(host_id=2, pool=-5)])
    case = case_of(fleet, [Request(job=1, gpus=8, cpu=8000, pool=7), Request(job=2, gpus=9, cpu=8000, pool=7)])
    assert [reserved(case, job, [Window(2, 150)]) for job in (1, 2)] == [True, False]
    assert not reserved(case, 1, [])
