"""Plans of rivals, made of one picture of a cell and admitted in any order, doubled, some of them made of an older picture:
whatever the fit rule lets through never adds up to more than there is. The sums here are plain and know nothing of the rule.
"""

import random
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.core import recheck
from scheduler.core.fit_kernels import Q_HOLD
from scheduler.core.pack import classes_of, make_state
from scheduler.core.plan import plan
from tests.scheduler.core.cells import cell, queue

pytestmark = pytest.mark.serverless


def batch_of(fleet, requests, placements):
    """(jobs, batch) of a plan's placements; nothing where it has none."""
    wanted = defaultdict(list)
    for p in placements:
        wanted[p.job].append(p)
    jobs = [r for r in requests if r.job in wanted]
    replicas = [p for r in jobs for p in wanted[r.job]]
    classes, of = classes_of(jobs, frozenset({3}))
    classes[:, Q_HOLD] = 0
    vram = {r.job: r.vram for r in jobs}
    return jobs, recheck.Batch(
        first=np.cumsum([0, *(len(wanted[r.job]) for r in jobs)]).astype(np.int64),
        classes=classes,
        of=of.astype(np.int64),
        host=np.array([p.host for p in replicas], np.int64),
        mask=np.array([sum(1 << i for i in p.gpus) for p in replicas], np.int64),
        vram=np.array([vram[p.job] if p.gpus else 0 for p in replicas], np.int64),
        pool=fleet.pool[[p.host for p in replicas]].astype(np.int64),
    )


def draw_of(fleet, h, active, cpu_only):
    """W of a host with these GPUs active: design of the ledger, written down once more."""
    if not fleet.cap_control[h]:
        return int(fleet.base_w[h] + fleet.gpu_count[h] * fleet.gpu_max_w[h])
    if not active and not cpu_only:
        return int(fleet.standby_w[h] if fleet.flags[h] & 32 else fleet.parked_w[h])
    idle = int(fleet.gpu_count[h]) - len(active)
    return int(fleet.base_w[h] + len(active) * fleet.gpu_max_w[h] + idle * fleet.gpu_min_w[h])


def adds_up(fleet, admitted):
    """`admitted`: (request, placement) pairs. Nothing of any host, GPU or node is sold beyond what was free."""
    cpu, ram, nvme = ([0] * len(fleet) for _ in range(3))
    milli, vram = defaultdict(int), defaultdict(int)
    active, bare = defaultdict(set), defaultdict(int)
    for r, p in admitted:
        h = p.host
        cpu[h] += r.cpu
        ram[h] += r.ram
        nvme[h] += r.nvme
        bare[h] += not p.gpus
        for i in p.gpus:
            milli[h, i] += p.gpu_milli
            vram[h, i] += r.vram
            active[h].add(i)
    assert (fleet.cpu_free >= cpu).all()
    assert (fleet.ram_free >= ram).all()
    assert (fleet.nvme_free >= nvme).all()
    assert all(total <= fleet.gpu_free[at] for at, total in milli.items())
    assert all(total <= fleet.vram_free[at] for at, total in vram.items())
    mw = [0] * len(fleet.node_parent)
    for h in {*active, *(h for h, n in bare.items() if n)}:
        more = draw_of(fleet, h, active[h], bare[h]) - draw_of(fleet, h, set(), 0)
        node = int(fleet.power_node[h])
        while node >= 0:
            mw[node] += more * int(fleet.node_k_gpu[node])
            node = int(fleet.node_parent[node])
    assert all(
        sold <= free for sold, free in zip(mw, (fleet.node_free_mw + fleet.node_reclaimable_mw).tolist(), strict=True)
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_plans_of_rivals_never_add_up_to_more_than_there_is(seed):
    dice = random.Random(seed)
    fleet, _ = cell(dice, dice.randrange(2, 12), tight=dice.choice((0.1, 0.4, 1.0)))
    requests = queue(dice, 40)
    rivals = [dice.sample(requests, dice.randrange(5, 40)) for _ in range(3)]
    plans = [(mine, plan(fleet, mine, seed=n).placements) for n, mine in enumerate(rivals)]
    order = [*plans, dice.choice(plans)]
    dice.shuffle(order)
    state, admitted = make_state(fleet), []
    for mine, placements in order:
        open_ = {r.job for r in mine} - {r.job for r, _ in admitted}  # who is placed waits no more
        if not (left := [p for p in placements if p.job in open_]):
            continue
        jobs, batch = batch_of(fleet, mine, left)
        reasons, _ = recheck.admit(state, batch)
        for r, reason in zip(jobs, reasons.tolist(), strict=True):
            if not reason:
                admitted += [(r, p) for p in left if p.job == r.job]
    adds_up(fleet, admitted)
    ranks = defaultdict(list)
    for r, p in admitted:
        ranks[r.job].append(p.replica)
        assert len(p.gpus) == r.gpus
    assert all(sorted(ranks[r.job]) == list(range(r.replicas)) for r, _ in admitted)  # whole, and once
    first = {p.job for p in order[0][1]}
    assert first <= set(ranks)  # what a plan says of the cell it was made of holds
