"""One plan of one cell: order the jobs, place them, preempt for those that may, and say why the others wait.

Order: contract kind (firm, flexible, on-demand, spot), priority, then weighted dominant-resource fairness between
organizations (decayed usage so far plus what this plan gives them, per weight: progressive filling), then age, then
job id.
Quotas and price limits are feasibility, not order. The fair order is computed as if every job were placed: a job that
then
waits has cost its organization one turn, not capacity.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import groupby

import numpy as np

from scheduler.core import explain, gang, kernels
from scheduler.core.fit import request_error
from scheduler.core.pack import Packer, bits, classes_of
from scheduler.core.score import Shape, shapes_of, tables_for
from scheduler.core.types import (
    Decision,
    Fleet,
    Level,
    Placement,
    Plan,
    Policy,
    Reason,
    Request,
    Running,
)


def plan(
    fleet: Fleet,
    requests: Sequence[Request],
    running: Sequence[Running] = (),
    *,
    policy: Policy | None = None,
    seed: int = 0,
    now_s: int = 0,
) -> Plan:
    """Plans one cell. Same arguments, same plan.

    `seed` permutes the hosts (ties go to the first); 0 keeps the order of the columns. `now_s`: seconds, the clock of
    `ends_at`.
    """
    return _Planner(fleet, requests, running, policy or Policy(), seed, now_s).run()


class _Planner:
    def __init__(
        self,
        fleet: Fleet,
        requests: Sequence[Request],
        running: Sequence[Running],
        policy: Policy,
        seed: int,
        now_s: int,
    ) -> None:
        self.fleet, self.requests, self.running, self.policy, self.now = fleet, requests, running, policy, now_s
        owners = frozenset(np.unique(fleet.owner[fleet.owner > 0]).tolist())
        vectors, self.of = classes_of(requests, owners)
        order = np.random.default_rng(seed).permutation(len(fleet)).astype(np.int64) if seed else None
        shapes = [Shape(*row) for row in policy.shapes] if policy.shapes is not None else shapes_of(requests)
        tables = tables_for(fleet, shapes, policy.packer)
        steps = sum(r.replicas for r in requests) + 2 * len(running) + 64
        self.packer = Packer(fleet, vectors, tables, order=order, steps=min(steps, 1 << 20))
        self.quota: dict[int, int] = {}
        for r in requests:
            if r.quota_id and r.quota_milli >= 0:
                self.quota[r.quota_id] = min(r.quota_milli, self.quota.get(r.quota_id, r.quota_milli))
        self.out = Plan()
        self.failed: set[tuple[object, ...]] = set()
        self.explained: dict[tuple[object, ...], Decision] = {}

    def run(self) -> Plan:
        late = self._pass(fair_order(self.fleet, self.requests, self.policy.usage_scale))
        # A job refused for its quota gets a second look: one that was charged before it may not have been placed.
        if late:
            late = self._pass(late)
        for i in late:
            self.out.decisions.append(
                _refused(self.requests[i], Reason.OVER_QUOTA, "a larger quota, or an end of other jobs")
            )
        meta = self.packer.cache.meta
        self.out.counters = {
            "jobs": len(self.requests),
            "placed_jobs": sum(d.placed for d in self.out.decisions),
            "placements": len(self.out.placements),
            "preemptions": len(self.out.preemptions),
            "classes": len(self.packer.classes),
            "rescored": int(meta[kernels.META_RESCORED]),
            "filled": int(meta[kernels.META_FILLED]),
        }
        return self.out

    def _pass(self, order: list[int]) -> list[int]:
        """Considers jobs in order; returns those over their quota."""
        late: list[int] = []
        singles: list[int] = []
        for i in order:
            r = self.requests[i]
            refusal = self._refusal(r)
            if refusal is not None:
                self.out.decisions.append(refusal)
                continue
            if not self._charge(r):
                late.append(i)
                continue
            if r.replicas > 1 or r.topology.pack > Level.NVLINK:
                self._singles(singles)
                singles = []
                self._gang(i)
            else:
                singles.append(i)
        self._singles(singles)
        return late

    def _refusal(self, r: Request) -> Decision | None:
        error = request_error(r)
        if error:
            return _refused(r, Reason.INVALID, error)
        if not r.price_ok:
            return _refused(r, Reason.PRICE_LIMIT, "a higher price limit, or a cheaper hour")
        if not len(self.fleet):
            return _refused(r, Reason.EMPTY_CELL, "no host in this cell")
        return None

    def _charge(self, r: Request) -> bool:
        need = r.replicas * r.gpus * r.gpu_milli
        if r.quota_id in self.quota:
            if need > self.quota[r.quota_id]:
                return False
            self.quota[r.quota_id] -= need
        elif 0 <= r.quota_milli < need:
            return False
        return True

    def _singles(self, jobs: list[int]) -> None:
        if not jobs:
            return
        run = self.packer.place(self.of[np.array(jobs, np.int64)])
        hosts, masks, deltas = run.host.tolist(), run.mask.tolist(), run.delta.tolist()
        for at, i in enumerate(jobs):
            r = self.requests[i]
            if hosts[at] < 0:
                self._wait(i)
                continue
            self.out.placements.append(
                Placement(r.job, 0, self.packer.host_of(hosts[at]), bits(masks[at]), r.gpu_milli, deltas[at])
            )
            self.out.decisions.append(Decision(r.job, True, Reason.OK))

    def _gang(self, i: int) -> None:
        r, q = self.requests[i], self.packer.classes[self.of[i]]
        key = (int(self.of[i]), r.replicas, r.topology)
        placed = None if key in self.failed else gang.place_gang(self.packer.state, q, r.replicas, r.topology)
        if placed is None:
            self.failed.add(key)
            self._wait(i)
            return
        self._placed(i, placed)

    def _placed(self, i: int, where: gang.Gang) -> None:
        r = self.requests[i]
        for row in dict.fromkeys(where.host.tolist()):
            self.packer.touched(row)
        rows = zip(where.host.tolist(), where.mask.tolist(), where.delta.tolist(), strict=True)
        for replica, (row, mask, delta) in enumerate(rows):
            self.out.placements.append(
                Placement(r.job, replica, self.packer.host_of(row), bits(mask), r.gpu_milli, delta)
            )
        self.out.decisions.append(Decision(r.job, True, Reason.OK))

    def _wait(self, i: int) -> None:
        r = self.requests[i]
        if r.quota_id in self.quota:
            self.quota[r.quota_id] += r.replicas * r.gpus * r.gpu_milli
        key = (int(self.of[i]), r.replicas, r.topology)
        known = self.explained.get(key)
        if known is None:
            if not self.policy.explain or len(self.explained) >= self.policy.explain_limit:
                self.out.decisions.append(
                    Decision(r.job, False, Reason.GANG_INCOMPLETE if r.replicas > 1 else Reason.NO_GPU)
                )
                return
            known = self.explained[key] = explain.explain(self.packer.state, self.packer.classes[self.of[i]], r)
        self.out.decisions.append(Decision(r.job, *known[1:]))


def _refused(r: Request, reason: Reason, change: str) -> Decision:
    return Decision(r.job, False, reason, binding=reason, change=change)


def fair_order(fleet: Fleet, requests: Sequence[Request], usage_scale: float = 1.0) -> list[int]:
    """Indices of the requests in the order of the module's docstring."""
    total = (
        max(1.0, float(fleet.gpu_count.sum()) * 1000),
        max(1.0, float(fleet.cpu_free.sum())),
        max(1.0, float(fleet.ram_free.sum())),
    )
    indices = sorted(
        range(len(requests)),
        key=lambda i: (requests[i].kind, -requests[i].priority, requests[i].queued_at, requests[i].job),
    )
    share: dict[int, float] = {}
    weight: dict[int, int] = {}
    for r in requests:
        share[r.org] = max(share.get(r.org, 0.0), r.usage / usage_scale)
        weight[r.org] = max(1, r.weight)
    out: list[int] = []
    for _, tier in groupby(indices, key=lambda i: (requests[i].kind, requests[i].priority)):
        queues: dict[int, list[int]] = {}
        for i in tier:
            queues.setdefault(requests[i].org, []).append(i)
        if len(queues) == 1:
            queue = next(iter(queues.values()))
            out += queue
            r = requests[queue[0]]
            share[r.org] += sum(_dominant(requests[i], total) for i in queue)
            continue
        heap = [(share[org] / weight[org], requests[queue[0]].queued_at, org, 0) for org, queue in queues.items()]
        heapq.heapify(heap)
        while heap:
            _, _, org, at = heap[0]
            queue = queues[org]
            out.append(queue[at])
            share[org] += _dominant(requests[queue[at]], total)
            if at + 1 < len(queue):
                following = requests[queue[at + 1]]
                heapq.heapreplace(heap, (share[org] / weight[org], following.queued_at, org, at + 1))
            else:
                heapq.heappop(heap)
    return out


def _dominant(r: Request, total: tuple[float, float, float]) -> float:
    return r.replicas * max(r.gpus * r.gpu_milli / total[0], r.cpu / total[1], r.ram / total[2])
