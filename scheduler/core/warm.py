"""Compiles the kernels ahead of their first use: `python -m scheduler.core.warm`. A second call finds them in the cache."""

from typing import Any

import numpy as np

from scheduler.core import choice, defrag, dispatch, power, recheck
from scheduler.core.case import Case
from scheduler.core.pack import Packer, classes_of, make_state
from scheduler.core.plan import plan
from scheduler.core.score import shapes_of, tables_for
from scheduler.core.types import Fleet, Kind, Level, Policy, Request, Running, Topology


def warm() -> None:
    """One small plan and one small dispatch that pass through every kernel."""
    node = {"parent": -1, "free_mw": 10**12}
    host = {"gpus": 8, "vram": 80_000, "cpu_free": 100_000, "ram_free": 10**6, "power_node": 0, "leaf": 1, "spine": 1}
    fleet = Fleet.build([{**host, "host_id": i + 1} for i in range(4)], [node])
    full = Fleet.build(
        [{**host, "host_id": 1, "gpus": 8, "gpu_free": [0] * 8, "vram_free": [0] * 8, "gpu_active": 255}], [node]
    )
    shape: dict[str, Any] = {"cpu": 1000, "ram": 1000}
    wanted = [
        Request(job=1, gpus=1, gpu_milli=500, **shape),
        Request(job=2, gpus=2, replicas=3, **shape),
        Request(job=3, gpus=8, replicas=2, topology=Topology(pack=Level.LEAF, required=True, nvlink=1), **shape),
        Request(job=4, gpus=0, **shape),
        Request(job=5, gpus=8, replicas=9, **shape),
    ]
    for packer in ("tailrace", "best_fit"):
        case = Case(fleet, wanted, [], Policy(packer=packer))
        choice.choice(case, case.plan(), 1)
    victim = Running(placement=1, job=9, org=1, kind=Kind.SPOT, host=0, gpus=tuple(range(8)), vram=80_000)
    plan(full, [Request(job=6, gpus=8, kind=Kind.FIRM, **shape)], [victim])
    ends = Running(placement=1, job=9, org=1, kind=Kind.FIRM, host=0, gpus=tuple(range(8)), vram=80_000, ends_at=100)
    plan(full, [Request(job=7, gpus=8, **shape), Request(job=8, gpus=1, **shape)], [ends], now_s=1)
    one, none = np.zeros(1, np.int64), np.zeros(1, np.int64)
    classes, of = classes_of(wanted[:1])
    state = make_state(fleet)
    recheck.admit(state, recheck.Batch(np.array([0, 1]), classes, of.astype(np.int64), one, one + 1, one + 1000, none))
    idle = np.zeros(4, np.int64)
    recheck.book(state, recheck.Power(idle, idle, idle.copy(), idle, idle, np.full(1, 10**12)), one, one + 1)
    _moves(fleet)
    tree = power.PowerTree.of([power.NodeSpec("site", None, 100_000)])
    miners = dispatch.Fleet.of([0, 0], [0, 0], [[(25, 0), (2000, 100_000), (3500, 200_000)]])
    prices = dispatch.Prices(40_000_000, 40_000_000)
    budget = np.array([5_000_000], np.int64)
    dispatch.plan_dispatch(tree, miners, prices, [0, 0], budget_mw=budget, change_limit=1)
    dispatch.plan_fast(tree, miners, prices, [0, 0], budget_mw=budget)


def _moves(fleet: Fleet) -> None:
    """One repair in which somebody leaves a host, and one in which the second of two finds no place."""
    sizes = (1, 2, 8, 7)
    requests = [Request(job=i, gpus=gpus, cpu=1000, ram=1000) for i, gpus in enumerate(sizes)]
    vectors, _ = classes_of(requests)
    for others in ([7, 7, 7], [7, 8, 8]):
        packer = Packer(fleet, vectors, tables_for(fleet, shapes_of(requests), "tailrace"))
        stands = [(0, 0, 1), (0, 0, 2)] + [(row, {7: 3, 8: 2}[n], (1 << n) - 1) for row, n in enumerate(others, 1)]
        for row, k, mask in stands:
            packer.take(row, k, mask)
        rows, classes, masks = zip(*stands, strict=True)
        movable = [k == 0 for k in classes]
        work = defrag.workload(rows, vectors[list(classes)], masks, movable, [1] * len(stands))
        defrag.search(packer.state, packer.tables, work, [defrag.Wanted(vectors[2], 1000)], 4)


if __name__ == "__main__":
    warm()
