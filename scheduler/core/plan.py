"""One plan of one cell: order the jobs, place them, preempt for those that may, and say why the others wait.

Start times promised by earlier plans come first: they are booked again, and whoever's time has come, or fits sooner, starts
(`core.backfill`). Then all others in the order of `core.order`: a job that fits is placed; one that does not may preempt
(`core.preempt`); else, while fewer than `Policy.backfill_depth` promises stand, it is promised a start.
Quotas and price limits are feasibility, not order.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from scheduler.core import backfill, explain, gang, kernels
from scheduler.core import fit_kernels as fit
from scheduler.core.fit import request_error
from scheduler.core.order import fair_order
from scheduler.core.pack import Packer, Run, bits, classes_of
from scheduler.core.preempt import Preemptor, held
from scheduler.core.quotas import Quotas
from scheduler.core.score import Shape, shapes_of, tables_for
from scheduler.core.ties import Ties
from scheduler.core.types import (
    I64,
    WHOLE,
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
        self.rank = np.arange(len(fleet)) if self.ties.row_of is None else self.ties.row_of
        self.held = held(running, self.rank.tolist().__getitem__)
        self._preemptor: Preemptor | None = None
        self.horizon = backfill.Horizon(self.packer.state, running, self.held, now_s, policy.lag_s)
        self.promised: dict[int, backfill.Hold] = {}  # request -> its hold, given earlier or by this plan
        self.done: set[int] = set()  # requests that were decided before the order began
        self.broken: list[int] = []  # requests that lost the start they were promised
        self.depth = policy.backfill_depth if any(r.ends_at > now_s for r in running) else 0
        self.quotas = Quotas(requests)
        self.out = Plan()
        self.hopeless: set[Hashable] = set()  # what did not fit, and no victims would help: true until somebody leaves
        self.explained: dict[Hashable, Decision] = {}

    @property
    def preemptor(self) -> Preemptor:
        """Made when somebody first needs it: most plans evict nobody."""
        if self._preemptor is None:
            self._preemptor = Preemptor(self.packer.state, self.running, self.held)
        return self._preemptor

    def run(self) -> Plan:
        self._keep_promises()
        order = fair_order(self.fleet, self.requests, self.policy, self.now)
        late = self._pass([i for i in order if i not in self.done])
        # A job refused for its quota gets a second look: one that was charged before it may not have been placed.
        if late:
            late = self._pass(list(late))
        for i, bound in late.items():
            self.out.decisions.append(_refused(self.requests[i], bound, "a larger quota, or an end of other jobs"))
        placed = {p.job for p in self.out.placements}
        self.out.broken = [job for i in self.broken if (job := self.requests[i].job) not in placed]
        meta = self.packer.cache.meta
        self.out.counters = {
            "jobs": len(self.requests),
            "placed_jobs": sum(d.placed for d in self.out.decisions),
            "placements": len(self.out.placements),
            "preemptions": len(self.out.preemptions),
            "holds": len(self.promised),
            "promises_broken": len(self.out.broken),
            "classes": self.class_count,
            "rescored": int(meta[kernels.META_RESCORED]),
            "filled": int(meta[kernels.META_FILLED]),
        }
        return self.out

    # --- promises of earlier plans
    def _keep_promises(self) -> None:
        """Books again what was promised, the earliest first; then starts each that fits already."""
        mine = [i for i, r in enumerate(self.requests) if r.promised_start > 0]
        mine.sort(key=lambda i: (self.requests[i].promised_start, self.requests[i].job))
        lost = []
        for i in mine:
            r = self.requests[i]
            refusal = self._refusal(r)
            if refusal is not None:
                self._decided(i, refusal)
            elif self.quotas.charge(r) is Reason.OK:
                rows = [int(self.rank[h]) if 0 <= h < len(self.rank) else -1 for h in r.promised_hosts]
                whole = len(rows) == r.replicas
                where = self.ties.where(r)
                hold = self.horizon.again(self._free(i), rows, r.promised_start, r.duration_s, where) if whole else None
                if hold is None:
                    lost.append(i)
                else:
                    self._hold(i, hold)
        for i in lost:
            hold = self._promise(i)
            if hold is None or hold.start > self.requests[i].promised_start:
                self.broken.append(i)
        idle = (self.packer.state.gfree >= WHOLE).sum(axis=1)
        for i in mine:
            if i in self.promised and self._start_promised(i, idle):
                self.done.add(i)
            elif i in lost and i not in self.promised:
                self.quotas.refund(self.requests[i])

    def _promise(self, i: int) -> backfill.Hold | None:
        """A start time for the job and a hold from then on, if known ends make room for it."""
        r = self.requests[i]
        hold = self.horizon.earliest(
            *(self._free(i), r.replicas, self.ties.topology(r), r.duration_s, self.ties.where(r)),
        )
        if hold is not None:
            self._hold(i, hold)
        return hold

    def _decided(self, i: int, decision: Decision) -> None:
        self.out.decisions.append(decision)
        self.done.add(i)

    def _hold(self, i: int, hold: backfill.Hold) -> None:
        self.horizon.book(hold)
        self.promised[i] = hold
        self._holds_changed(hold)

    def _unhold(self, i: int) -> backfill.Hold:
        hold = self.promised.pop(i)
        self.horizon.drop(hold)
        self._holds_changed(hold)
        return hold

    def _holds_changed(self, hold: backfill.Hold) -> None:
        for row in dict.fromkeys(hold.rows):
            self.packer.touched(row)
        self.packer.watts_returned()
        self.hopeless.clear()

    def _start_promised(self, i: int, idle: I64) -> bool:
        """Starts the job now if it fits beside all other holds; else its hold stands, or one that begins earlier.

        `idle`: GPUs of each row that nobody uses, at most: a look that spares most jobs the longer one.
        """
        r, hold = self.requests[i], self.promised[i]
        preempts = self._preempts(r)
        if preempts or r.gpu_milli < WHOLE or not r.gpus or int((idle // r.gpus).sum()) >= r.replicas:
            self._unhold(i)
            if self._beside(i) or (preempts and self._preempt(i)):
                return True
            self._hold(i, hold)
        where = self.ties.topology(r), r.duration_s, self.ties.where(r)
        sooner = self.horizon.earliest(self._free(i), r.replicas, *where, instead=hold)
        if sooner is not None:
            self._unhold(i)
            self._hold(i, sooner)
        return False

    # --- the pass
    def _pass(self, order: list[int]) -> dict[int, Reason]:
        """Considers jobs in order; returns those over a limit, and which."""
        late: dict[int, Reason] = {}
        singles: list[int] = []
        for i in order:
            r = self.requests[i]
            if i in self.promised:  # charged when its promise was booked
                self._singles(singles)
                singles = []
                self._wait(i)
                continue
            refusal = self._refusal(r)
            if refusal is not None:
                self.out.decisions.append(refusal)
            elif (bound := self.quotas.charge(r)) is not Reason.OK:
                late[i] = bound
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
        if not r.budget_ok:
            return _refused(r, Reason.BUDGET_USED, "a larger budget for the month, or the next month")
        if not len(self.fleet):
            return _refused(r, Reason.EMPTY_CELL, "no host in this cell")
        return None

    def _free(self, i: int) -> I64:
        """The request's vector without holds: for looks at states in which they are booked."""
        vector: I64 = self.packer.classes[int(self.of[i]) + self.class_count]
        return vector

    def _outlasts(self, r: Request) -> bool:
        """Whether it may still run when the first held start comes."""
        return self.horizon.overlapped(r.duration_s) > 0

    def _class(self, i: int) -> int:
        """The class of a request, in its form without holds when it ends before the first held start."""
        k = int(self.of[i])
        return k + self.class_count if self.horizon.holds and not self._outlasts(self.requests[i]) else k

    def _singles(self, jobs: list[int]) -> None:
        """Places jobs of one replica, in order; stops at each that did not fit and may have another way."""
        start = 0
        while start < len(jobs):
            rest = jobs[start:]
            ways = bool(self.promised) or len(self.promised) < self.depth
            more = [ways or self._preempts(self.requests[i]) for i in rest]
            run = Run(np.array([self._class(i) for i in rest], np.int32), np.array(more, np.uint8))
            at, holds, changed = 0, len(self.promised), False
            while at < len(rest) and not changed:
                end = self.packer.resume(run, at)
                rows = zip(
                    run.host[at:end].tolist(), run.mask[at:end].tolist(), run.delta[at:end].tolist(), strict=True
                )
                for i, (row, mask, delta) in zip(rest[at:end], rows, strict=True):
                    if row >= 0:
                        self._place(i, 0, row, mask, delta)
                        self.out.decisions.append(Decision(self.requests[i].job, True, Reason.OK))
                    else:
                        self._other_ways(i)
                        changed = len(self.promised) != holds
                at = end
            start += at  # a new hold changes the classes of those that follow

    def _place(self, i: int, replica: int, row: int, mask: int, delta: int) -> None:
        r = self.requests[i]
        place = Placement(r.job, replica, self.packer.host_of(row), bits(mask), r.gpu_milli, delta)
        self.out.placements.append(place)
        if r.duration_s and (self.depth or self.promised):
            self.horizon.add(row, self._free(i), mask, r.duration_s)

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
            self._place(i, replica, row, mask, delta)
        self.out.decisions.append(Decision(r.job, True, Reason.OK))

    def _beside(self, i: int) -> bool:
        """Places a job now into what the holds leave it."""
        r = self.requests[i]
        topology, where = self.ties.topology(r), self.ties.where(r)
        found = self.horizon.beside(self._free(i), r.replicas, topology, r.duration_s, where)
        if found is None:
            return False
        self._placed(i, found)
        return True

    def _preempts(self, r: Request) -> bool:
        return self.policy.preemption and r.may_preempt and bool(self.running)

    def _key(self, i: int) -> Hashable:
        """What a failure of this job says of others: same class, same gang, same victims, same holds in the way."""
        r = self.requests[i]
        who = (r.kind == Kind.SPOT, r.org, r.priority) if self._preempts(r) else None
        holds = self.horizon.overlapped(r.duration_s)
        return self._class(i), r.replicas, r.topology, who, r.near, r.apart, r.members, holds

    def _other_ways(self, i: int) -> None:
        """For a job that fits nowhere free of holds: beside them, or preempt, else get a start time, else wait."""
        r, key = self.requests[i], self._key(i)
        if key not in self.hopeless:
            if self._outlasts(r) and self._beside(i):
                return
            if self._preempts(r) and self._preempt(i):
                return
            self.hopeless.add(key)
            if len(self.promised) < self.depth:
                self._promise(i)
        self._wait(i)

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
        self.horizon.left(victims)
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

    def _wait(self, i: int) -> None:
        r, k, hold = self.requests[i], self._class(i), self.promised.get(i)
        start = hold.start if hold else 0
        where = tuple(self.packer.host_of(row) for row in hold.rows) if hold else ()
        if hold is None:  # who has a promise keeps its part of the quota, too
            self.quotas.refund(r)
        key = (k, r.replicas, r.topology, r.near, r.apart, r.members, r.job if hold else 0)
        known = self.explained.get(key)
        if known is None:
            if not self.policy.explain or len(self.explained) >= self.policy.explain_limit:
                reason = Reason.GANG_INCOMPLETE if r.replicas > 1 else Reason.NO_GPU if r.gpus else Reason.NO_CPU
                self.out.decisions.append(Decision(r.job, False, reason, earliest_start=start, held=where))
                return
            with self.horizon.hidden(hold):  # its own hold is not what it waits for
                known = self.explained[key] = explain.explain(
                    self.packer.state, self.packer.classes[k], r, where=self.ties.where(r)
                )
        self.out.decisions.append(known._replace(job=r.job, placed=False, earliest_start=start, held=where))


def _refused(r: Request, reason: Reason, change: str) -> Decision:
    return Decision(r.job, False, reason, binding=reason, change=change)
