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
from collections.abc import Hashable, Sequence
from itertools import groupby

import numpy as np

from scheduler.core import backfill, explain, gang, kernels
from scheduler.core import fit_kernels as fit
from scheduler.core.fit import request_error
from scheduler.core.pack import Packer, Run, bits, classes_of
from scheduler.core.preempt import Preemptor
from scheduler.core.score import Shape, shapes_of, tables_for
from scheduler.core.ties import Ties
from scheduler.core.types import (
    Decision,
    Fleet,
    Kind,
    Placement,
    Plan,
    Policy,
    Preemption,
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
        # The same classes once more, for work that ends before a held host is needed.
        free = vectors.copy()
        free[:, fit.Q_HOLD] = 0
        self.class_count = len(vectors)
        order = np.random.default_rng(seed).permutation(len(fleet)).astype(np.int64) if seed else None
        shapes = [Shape(*row) for row in policy.shapes] if policy.shapes is not None else shapes_of(requests)
        tables = tables_for(fleet, shapes, policy.packer)
        steps = sum(r.replicas for r in requests) + 2 * len(running) + 64
        classes = np.concatenate([vectors, free])
        self.packer = Packer(fleet, classes, tables, order=order, steps=min(steps, 1 << 20))
        self.ties = Ties(fleet, self.packer.state, order)
        rank = np.argsort(order) if order is not None else None
        self.preemptor = Preemptor(self.packer.state, running, lambda h: int(rank[h]) if rank is not None else h)
        self.holds: list[backfill.Hold] = []
        self.holds_left = policy.backfill_depth if any(r.ends_at > now_s for r in running) else 0
        self.quota: dict[int, int] = {}
        for r in requests:
            if r.quota_id and r.quota_milli >= 0:
                self.quota[r.quota_id] = min(r.quota_milli, self.quota.get(r.quota_id, r.quota_milli))
        self.out = Plan()
        self.hopeless: set[Hashable] = set()  # what did not fit, and no victims would help: true until somebody leaves
        self.explained: dict[Hashable, Decision] = {}

    def run(self) -> Plan:
        late = self._pass(fair_order(self.fleet, self.requests, self.policy.usage_scale))
        # A job refused for its quota gets a second look: one that was charged before it may not have been placed.
        if late:
            late = self._pass(late)
        for i in late:
            change = "a larger quota, or an end of other jobs"
            self.out.decisions.append(_refused(self.requests[i], Reason.OVER_QUOTA, change))
        meta = self.packer.cache.meta
        self.out.counters = {
            "jobs": len(self.requests),
            "placed_jobs": sum(d.placed for d in self.out.decisions),
            "placements": len(self.out.placements),
            "preemptions": len(self.out.preemptions),
            "holds": len(self.holds),
            "classes": self.class_count,
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
            elif not self._charge(r):
                late.append(i)
            elif r.replicas > 1 or r.tied:
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

    def _class(self, i: int) -> int:
        """The class of a request, in its form without holds when it ends before the first held start."""
        r = self.requests[i]
        if self.holds and r.duration_s and self.now + r.duration_s <= min(h.start for h in self.holds):
            return int(self.of[i]) + self.class_count
        return int(self.of[i])

    def _singles(self, jobs: list[int]) -> None:
        """Places jobs of one replica, in order; stops at each that did not fit and may preempt or get a hold."""
        start = 0
        while start < len(jobs):
            rest = jobs[start:]
            more = [self.holds_left > 0 or self._preempts(self.requests[i]) for i in rest]
            run = Run(np.array([self._class(i) for i in rest], np.int32), np.array(more, np.uint8))
            at, held = 0, False
            while at < len(rest) and not held:
                end = self.packer.resume(run, at)
                rows = zip(
                    run.host[at:end].tolist(), run.mask[at:end].tolist(), run.delta[at:end].tolist(), strict=True
                )
                for i, (row, mask, delta) in zip(rest[at:end], rows, strict=True):
                    if row >= 0:
                        self._place(self.requests[i], 0, row, mask, delta)
                        self.out.decisions.append(Decision(self.requests[i].job, True, Reason.OK))
                    else:
                        held = self._other_ways(i)
                at = end
            start += at  # a new hold changes the classes of those that follow

    def _place(self, r: Request, replica: int, row: int, mask: int, delta: int) -> None:
        place = Placement(r.job, replica, self.packer.host_of(row), bits(mask), r.gpu_milli, delta)
        self.out.placements.append(place)

    def _gang(self, i: int) -> None:
        r, q = self.requests[i], self.packer.classes[self._class(i)]
        if self._key(i) not in self.hopeless:
            topology, where = self.ties.topology(r), self.ties.where(r)
            placed = gang.place_gang(self.packer.state, q, r.replicas, topology, where)
            if placed is not None:
                self._placed(i, placed)
                return
        self._other_ways(i)

    def _placed(self, i: int, where: gang.Gang) -> None:
        r = self.requests[i]
        for row in dict.fromkeys(where.host.tolist()):
            self.packer.touched(row)
        if r.joins:
            self.ties.placed(r, where.host.tolist())
            self.hopeless.clear()  # whoever must stand near it may now have a place
        for replica, (row, mask, delta) in enumerate(zip(*(column.tolist() for column in where), strict=True)):
            self._place(r, replica, row, mask, delta)
        self.out.decisions.append(Decision(r.job, True, Reason.OK))

    def _preempts(self, r: Request) -> bool:
        return self.policy.preemption and r.may_preempt and bool(self.running)

    def _key(self, i: int) -> Hashable:
        r = self.requests[i]
        who = (r.kind == Kind.SPOT, r.org, r.priority) if self._preempts(r) else None
        return self._class(i), r.replicas, r.topology, who, r.near, r.apart, r.members

    def _other_ways(self, i: int) -> bool:
        """For a job that fits nowhere: preempt, else get a start time, else wait. True when a hold was made."""
        r = self.requests[i]
        if self._key(i) not in self.hopeless:
            if self._preempts(r) and self._preempt(i):
                return False
            self.hopeless.add(self._key(i))
            if self.holds_left > 0:
                state, gone = self.packer.state, self.preemptor.gone
                hold = backfill.earliest(
                    *(state, self.running, self.preemptor.held, gone, self.packer.classes[self._class(i)]),
                    *(r.replicas, self.ties.topology(r), self.now, self.ties.where(r)),
                )
                if hold is not None:
                    self._wait(i, hold.start)
                    backfill.apply(state, hold)
                    for row in hold.rows.tolist():
                        self.packer.touched(row)
                    self.holds.append(hold)
                    self.holds_left -= 1
                    self.packer.watts_returned()
                    return True
        self._wait(i)
        return False

    def _preempt(self, i: int) -> bool:
        r, state = self.requests[i], self.packer.state
        k = self._class(i)
        q = self.packer.classes[k]

        topology, where = self.ties.topology(r), self.ties.where(r)

        def fits() -> bool:
            trial = gang.place_gang(state, q, r.replicas, topology, where)
            if trial is not None:
                gang.release_kernel(q, state, trial.host, trial.mask, r.replicas)
            return trial is not None

        victims = self.preemptor.for_replica(r, q) if r.replicas == 1 and not r.tied else None
        if victims is None and (r.replicas > 1 or r.tied or explain.look(state, q).hosts[Reason.NO_WATTS]):
            victims = self.preemptor.for_all(r, fits)
        if victims is None:
            return False
        for row in self.preemptor.evict(victims):
            self.packer.touched(row)
        self.packer.watts_returned()
        placed = gang.place_gang(state, q, r.replicas, topology, where)
        assert placed is not None, f"job {r.job}: victims were found, but it does not fit without them"
        self._placed(i, placed)
        for v in victims:
            victim = self.running[v]
            self.out.preemptions.append(Preemption(victim.placement, victim.job, victim.host, r.job))
        self.hopeless.clear()
        self.explained.clear()
        return True

    def _wait(self, i: int, start: int = 0) -> None:
        r, k = self.requests[i], self._class(i)
        if r.quota_id in self.quota:
            self.quota[r.quota_id] += r.replicas * r.gpus * r.gpu_milli
        key = (k, r.replicas, r.topology, r.near, r.apart, r.members)
        known = self.explained.get(key)
        if known is None:
            if not self.policy.explain or len(self.explained) >= self.policy.explain_limit:
                reason = Reason.GANG_INCOMPLETE if r.replicas > 1 else Reason.NO_GPU if r.gpus else Reason.NO_CPU
                self.out.decisions.append(Decision(r.job, False, reason, earliest_start=start))
                return
            known = self.explained[key] = explain.explain(
                self.packer.state, self.packer.classes[k], r, where=self.ties.where(r)
            )
        self.out.decisions.append(Decision(r.job, *known[1:-1], start))


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
