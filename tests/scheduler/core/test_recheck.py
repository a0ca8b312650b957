import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.core import recheck
from scheduler.core.fit import Budget, fits_one, host_row, host_watts
from scheduler.core.fit_kernels import Q_HOLD
from scheduler.core.pack import bits, classes_of, make_state
from scheduler.core.plan import plan
from scheduler.core.types import Fleet, Reason
from tests.scheduler.core.cells import cell, queue, settle

pytestmark = pytest.mark.serverless


class Plain:
    """`admit` and `book` in plain integers, by `fits_one`."""

    def __init__(self, fleet):
        self.fleet = fleet
        self.rows = [host_row(fleet, h) for h in range(len(fleet))]
        self.budget = (fleet.node_free_mw + fleet.node_reclaimable_mw).tolist()

    def path(self, h):
        node, out = int(self.fleet.power_node[h]), []
        while node >= 0:
            out.append(Budget(node, int(self.fleet.node_k_gpu[node]), self.budget[node]))
            node = int(self.fleet.node_parent[node])
        return out

    def admit(self, request, replicas, vram):
        rows, budget, deltas = list(self.rows), list(self.budget), []
        for p in replicas:
            held = request.vram or vram(p)
            row = self.rows[p.host]
            fit = fits_one(row, request, self.path(p.host), p.gpus)
            if fit.reason is Reason.OK and any(row.vram_free[i] < held for i in p.gpus):
                fit = fit._replace(reason=Reason.NO_VRAM)
            if fit.reason is not Reason.OK:
                self.rows, self.budget = rows, budget
                return fit.reason, []
            deltas.append(fit.watts_delta)
            gpu_free, vram_free, active = list(row.gpu_free), list(row.vram_free), row.gpu_active
            for i in p.gpus:
                gpu_free[i] -= p.gpu_milli
                vram_free[i] -= held
                active |= 1 << i
            self.rows[p.host] = row._replace(
                gpu_free=gpu_free, vram_free=vram_free, gpu_active=active, cpu_free=row.cpu_free - request.cpu,
                ram_free=row.ram_free - request.ram, nvme_free=row.nvme_free - request.nvme, cpu_only=row.cpu_only + (not p.gpus),
            )  # fmt: skip
            if any(row.claimed_gpus >> i & 1 for i in p.gpus):
                self.rows[p.host] = self.rows[p.host]._replace(
                    owed_cpu=row.owed_cpu - request.cpu, owed_ram=row.owed_ram - request.ram, owed_nvme=row.owed_nvme - request.nvme
                )  # fmt: skip
            for at in self.path(p.host):
                self.budget[at.node] -= fit.watts_delta * at.k_permille
        return Reason.OK, deltas


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_admission_is_the_plain_rule(seed):
    """A plan that was made of an emptier cell than the one that is locked: part of it holds, and gangs fall whole."""
    dice = random.Random(seed)
    empty, nodes = cell(dice, 8, tight=dice.choice((0.1, 0.5, 1.0)))
    requests = queue(dice, 25)
    made = plan(empty, requests)
    others = queue(dice, 8)
    now, _ = settle(empty, nodes, plan(empty, others), others)
    wanted = {r.job: [p for p in made.placements if p.job == r.job] for r in requests}
    jobs = [r for r in requests if wanted[r.job]]
    if not jobs:
        return
    replicas = [p for r in jobs for p in wanted[r.job]]
    classes, of = classes_of(jobs, frozenset({3}))
    classes[:, Q_HOLD] = 0

    def share(p):
        return int(empty.vram_free[p.host].max()) * p.gpu_milli // 1000

    held = {r.job: r.vram for r in jobs}
    state = make_state(now)
    batch = recheck.Batch(
        first=np.cumsum([0, *(len(wanted[r.job]) for r in jobs)]).astype(np.int64),
        classes=classes,
        of=of.astype(np.int64),
        host=np.array([p.host for p in replicas], np.int64),
        mask=np.array([sum(1 << i for i in p.gpus) for p in replicas], np.int64),
        vram=np.array([(held[p.job] or share(p)) if p.gpus else 0 for p in replicas], np.int64),
        pool=now.pool[[p.host for p in replicas]].astype(np.int64),
    )
    reasons, delta = recheck.admit(state, batch)
    plain = Plain(now)
    for j, request in enumerate(jobs):
        reason, deltas = plain.admit(request, wanted[request.job], share)
        assert Reason(int(reasons[j])) == reason
        if reason is Reason.OK:
            assert delta[batch.first[j] : batch.first[j + 1]].tolist() == deltas
    same_rows(state, plain)


def same_rows(state, plain):
    assert state.budget.tolist() == plain.budget
    again = make_state(plain.fleet)
    for h, row in enumerate(plain.rows):
        again.rows[h, :3] = row.cpu_free, row.ram_free, row.nvme_free
        n = row.gpu_count
        assert state.gfree[h, :n].tolist() == list(row.gpu_free)[:n]
        assert state.vfree[h, :n].tolist() == list(row.vram_free)[:n]
        assert (int(state.rows[h, 5]), int(state.rows[h, 6])) == (row.gpu_active, row.cpu_only)
        assert state.rows[h, :3].tolist() == again.rows[h, :3].tolist()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_watts_are_booked_in_order_where_every_node_has_them(seed):
    dice = random.Random(seed)
    fleet, _ = cell(dice, 6, tight=dice.choice((0.1, 0.4, 1.0)))
    count = len(fleet)
    free = fleet.node_free_mw.copy()
    use = [dice.choice((0, 0, 1, 3)) & ((1 << int(fleet.gpu_count[h])) - 1) for h in range(count)]
    reserved = [host_watts(host_row(fleet, h), use[h], 0) - dice.choice((0, 0, 50)) for h in range(count)]
    grants, raises = ([dice.choice((1, 1, 1, 0)) for _ in range(count)] for _ in range(2))
    ints = lambda values: np.array(values, np.int64)  # noqa: E731
    power = recheck.Power(ints(use), ints([0] * count), ints(reserved), ints(grants), ints(raises), free.copy())
    wanted = []
    for _ in range(20):
        h = dice.randrange(count)
        n = int(fleet.gpu_count[h])
        wanted.append((h, dice.choice((0, 1 << dice.randrange(n), (1 << n) - 1)) if n else 0))
    granted, delta = recheck.book(make_state(fleet), power, ints([h for h, _ in wanted]), ints([m for _, m in wanted]))
    left, alone = free.tolist(), [0] * count
    for i, (h, mask) in enumerate(wanted):
        after, lone = use[h] | mask, bool(alone[h]) or not mask
        more = max(0, host_watts(host_row(fleet, h), after, int(lone)) - reserved[h])
        path, node = [], int(fleet.power_node[h])
        while node >= 0:
            path.append((node, more * int(fleet.node_k_gpu[node])))
            node = int(fleet.node_parent[node])
        fits = grants[h] and (not more or (raises[h] and all(mw <= left[n] for n, mw in path)))
        assert (int(granted[i]), int(delta[i])) == (int(bool(fits)), more)
        if fits:
            use[h], alone[h] = after, int(lone)
            reserved[h] += more
            for n, mw in path:
                left[n] -= mw
    assert power.free_mw.tolist() == left
    assert (power.use.tolist(), power.reserved_w.tolist()) == (use, reserved)


def test_gpus_that_do_not_exist_or_are_not_linked_are_refused():
    fleet = Fleet.build([{"host_id": 1, "gpus": 4, "vram": 100, "nvlink": [0, 0, 1, -1]}], [])
    from scheduler.core.types import Request, Topology

    linked = Request(job=1, gpus=2, topology=Topology(nvlink=2))
    for request, mask, reason in (
        (linked, 0b0011, Reason.OK),
        (linked, 0b0101, Reason.TOPOLOGY),
        (linked, 0b1100, Reason.TOPOLOGY),
        (Request(job=1, gpus=2), 0b0101, Reason.OK),
        (Request(job=1, gpus=2), 0b0001, Reason.NO_GPU),
        (Request(job=1, gpus=2), 0b10001, Reason.NO_GPU),
        (Request(job=1, gpus=1, vram=101), 0b0001, Reason.NO_VRAM),
    ):
        classes, of = classes_of([request])
        one = np.zeros(1, np.int64)
        batch = recheck.Batch(
            np.array([0, 1]), classes, of.astype(np.int64), one, np.array([mask]), one.copy(), one.copy()
        )
        state = make_state(fleet)
        reasons, _ = recheck.admit(state, batch)
        assert Reason(int(reasons[0])) == reason, (request, bits(mask))
