import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.core.fit import choose_gpus, fits_one, host_row, host_watts, vram_of
from scheduler.core.fit_kernels import HELD, fit_kernel, request_vector
from scheduler.core.gang import room
from scheduler.core.pack import bits, make_state
from scheduler.core.plan import plan
from scheduler.core.types import Fleet, HostFlag, Reason, Request, Topology
from tests.scheduler.core.cells import budgets_of, cell, queue, settle

pytestmark = pytest.mark.serverless


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_the_kernel_is_the_plain_rule(seed):
    dice = random.Random(seed)
    fleet, nodes = cell(dice, 8, tight=dice.choice((0.05, 0.3, 1.0)))
    requests = queue(dice, 20)
    fleet, _ = settle(fleet, nodes, plan(fleet, requests), requests)
    state = make_state(fleet)
    counted = {}
    for request in queue(dice, 20):
        q = request_vector(request)
        counts = room(state, q)
        for h in range(len(fleet)):
            held = dice.random() < 0.1
            state.rows[h, HELD] = held
            reason, mask, delta, node = fit_kernel(
                state.rows[h], state.gfree[h], state.vfree[h], state.nvl[h], q, state.parent, state.k, state.budget
            )
            row, budgets = host_row(fleet, h), budgets_of(fleet, h)
            plain = fits_one(row, request, budgets, held=held)
            assert (plain.reason, plain.node) == (reason, node)
            if reason == Reason.OK:
                assert (plain.gpus, plain.watts_delta) == (bits(mask), delta)
                assert fits_one(row, request, budgets, plain.gpus) == plain
            counted[plain.reason] = counted.get(plain.reason, 0) + 1
            state.rows[h, HELD] = 0
            assert (counts[h] > 0) == (fits_one(row, request, ()).reason == Reason.OK)
    assert len(counted) > 3


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_room_is_how_many_replicas_go_on_one_after_another(seed):
    dice = random.Random(seed)
    fleet, _ = cell(dice, 4, watts=False)
    request = queue(dice, 1)[0]
    counts = room(make_state(fleet), request_vector(request))
    for h in range(len(fleet)):
        placed = 0
        while placed < 64 and (fit := fits_one(host_row(fleet, h), request, ())).reason == Reason.OK:
            placed += 1
            fleet.cpu_free[h] -= request.cpu
            fleet.ram_free[h] -= request.ram
            fleet.nvme_free[h] -= request.nvme
            for g in fit.gpus:
                fleet.gpu_free[h, g] -= request.gpu_milli
                fleet.vram_free[h, g] -= vram_of(request.vram, request.gpu_milli, int(fleet.vram_total[h]))
                fleet.gpu_active[h] |= 1 << g
        assert placed == min(64, counts[h])


def one(**more):
    return Fleet.build([{"host_id": 1, "cpu_free": 8000, "gpus": 4, "vram": 1000, **more}])


def test_a_share_needs_one_gpu_with_enough_free():
    fleet = one(gpu_free=[300, 300, 300, 300])
    assert fits_one(host_row(fleet, 0), Request(job=1, gpus=1, gpu_milli=400), ()).reason == Reason.NO_GPU_SHARE
    assert fits_one(host_row(fleet, 0), Request(job=1, gpus=1, gpu_milli=300), ()).gpus == (0,)
    fleet = one(gpu_free=[0, 100, 100, 0])
    assert fits_one(host_row(fleet, 0), Request(job=1, gpus=1, gpu_milli=400), ()).reason == Reason.NO_GPU


def test_a_share_that_names_no_memory_needs_its_share_of_it():
    """Half a GPU is half its memory: where somebody holds more than the other half it does not fit, in no form of the rule."""
    fleet = one(gpu_free=[750, 0, 0, 750], vram_free=[400, 0, 0, 500], gpu_active=0b1001)
    half = Request(job=1, gpus=1, gpu_milli=500)
    assert choose_gpus(host_row(fleet, 0), half) == (Reason.OK, (3,))
    assert fits_one(host_row(fleet, 0), half, (), (0,)).reason == Reason.NO_VRAM
    state = make_state(fleet)
    assert room(state, request_vector(half)).tolist() == [1]
    assert [p.gpus for p in plan(fleet, [half]).placements] == [(3,)]
    two = plan(fleet, [half, replace(half, job=2, queued_at=1)])
    assert len(two.placements) == 1  # the second is not planned where the commit would refuse it
    assert two.decisions[-1].reason == Reason.NO_VRAM
    assert plan(fleet, [replace(half, vram=100)]).placements[0].gpus == (0,)  # who names less gets by with less


def test_a_share_prefers_an_active_gpu_then_the_tightest():
    fleet = one(gpu_free=[1000, 700, 500, 900], gpu_active=0b1010)
    assert choose_gpus(host_row(fleet, 0), Request(job=1, gpus=1, gpu_milli=400)) == (Reason.OK, (1,))
    fleet = one(gpu_free=[1000, 700, 500, 900], gpu_active=0b1110)
    assert choose_gpus(host_row(fleet, 0), Request(job=1, gpus=1, gpu_milli=600)) == (Reason.OK, (1,))


def test_whole_gpus_keep_nvlink_domains_whole():
    fleet = one(
        gpus=8, nvlink=[0, 0, 0, 0, 1, 1, 1, 1], gpu_free=[1000] * 4 + [0, 1000, 1000, 1000], gpu_active=0b10000
    )
    row = host_row(fleet, 0)
    assert choose_gpus(row, Request(job=1, gpus=2, topology=Topology(nvlink=1)))[1] == (5, 6)
    assert choose_gpus(row, Request(job=1, gpus=4, topology=Topology(nvlink=2)))[1] == (0, 1, 2, 3)
    assert choose_gpus(row, Request(job=1, gpus=5, topology=Topology(nvlink=1)))[1] == (0, 1, 2, 3, 5)
    assert choose_gpus(row, Request(job=1, gpus=5, topology=Topology(nvlink=2)))[0] == Reason.TOPOLOGY


def test_the_committer_is_told_when_the_planned_gpus_are_gone():
    row = host_row(one(gpu_free=[1000, 0, 1000, 400], gpu_active=0b1010), 0)
    assert fits_one(row, Request(job=1, gpus=2), (), (0, 2)).reason == Reason.OK
    assert fits_one(row, Request(job=1, gpus=2), (), (0, 1)).reason == Reason.NO_GPU
    assert fits_one(row, Request(job=1, gpus=2), (), (0, 0)).reason == Reason.NO_GPU
    assert fits_one(row, Request(job=1, gpus=2), (), (0, 7)).reason == Reason.NO_GPU
    assert fits_one(row, Request(job=1, gpus=1, gpu_milli=500), (), (3,)).reason == Reason.NO_GPU_SHARE
    assert fits_one(row, Request(job=1, gpus=1, gpu_milli=400, vram=1001), (), (3,)).reason == Reason.NO_VRAM


def test_host_watts_follow_the_power_state():
    watts = {"standby_w": 20, "parked_w": 300, "base_w": 800, "gpu_min_w": 50, "gpu_max_w": 700}
    row = host_row(one(**watts), 0)
    assert host_watts(row, 0, 0) == 300
    assert host_watts(row, 0, 1) == 800 + 4 * 50
    assert host_watts(row, 0b101, 0) == 800 + 2 * 700 + 2 * 50
    assert host_watts(row._replace(flags=int(HostFlag.OFF)), 0, 0) == 20
    assert host_watts(row._replace(cap_control=False), 0, 0) == 800 + 4 * 700
    off = host_row(one(**watts, flags=int(HostFlag.SCHEDULABLE | HostFlag.OFF)), 0)
    assert fits_one(off, Request(job=1, gpus=1), ()).watts_delta == 800 + 700 + 3 * 50 - 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gpu_free": np.zeros((1, 8), np.int32)}, "gpu_free"),
        ({"cpu_free": np.zeros(1, np.int32)}, "cpu_free"),
        ({"power_node": np.array([3], np.int32)}, "power_node"),
        ({"gpu_count": np.array([2], np.int32)}, "gpu_free"),
        ({"gpu_count": np.array([17], np.int32)}, "gpu_count"),
        ({"node_parent": np.array([0], np.int32)}, "cycle"),
    ],
)
def test_a_malformed_fleet_is_refused(change, message):
    fleet = Fleet.build([{"host_id": 1, "gpus": 4}], [{"free_mw": 1}])
    columns = {name: getattr(fleet, name) for name in Fleet.__dataclass_fields__}
    with pytest.raises(ValueError, match=message):
        Fleet(**(columns | change))
