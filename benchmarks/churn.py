"""Churn: openb's shapes come and go, jobs that do not fit wait, and a few moves make room. FGD without moves beside it.

Arrivals are Poisson, shapes drawn evenly from the pod list, lifetimes lognormal (sigma 1, mean 2 h) whatever the shape, scaled so
that they ask for exactly 98 % of the GPUs. The cell starts full of such jobs in equilibrium (residual lives) and settles for one
mean lifetime before anything is counted. Whoever does not fit waits; at each departure the waiting are offered the host that
changed, oldest first.
Seven jobs in ten can be moved (checkpointable, seeded); a move costs its owner 120 s of its run. One move is earned every 20
arrivals. Ours holds hosts for the jobs of several GPUs that wait longest and clears them by moves into what comes free elsewhere.
What bounds it, and what other readings of the measure give: docs/measured.md.
The same arrivals and lives for every policy; placements, scores, holds and moves are the core's own (Packer, defrag).
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from benchmarks import clearing, packing
from benchmarks.churn_load import LOAD, MEAN_S, MOVABLE, SIGMA, Load, bound, load_of
from benchmarks.harness import Options, Report, require
from benchmarks.traces import Nodes
from scheduler.core import defrag
from scheduler.core.fit_kernels import HELD, Q_GPUS, Q_HOLD, Q_MILLI, TOTAL, fit_kernel
from scheduler.core.jit import kernel
from scheduler.core.pack import Packer, Run, classes_of
from scheduler.core.score import Tables, tables_for
from scheduler.core.state import State
from scheduler.core.types import F64, I32, I64

LOST_S = 120.0  # checkpoint, restart, warm-up
ARRIVALS_A_MOVE = 20
REACH = 14  # moves that one waiting job may cost
HELD_AT_ONCE = 3  # hosts being cleared
HOLD_S = 600.0  # a host that is not clear by then is let go
HORIZON_S = 3600.0  # a job that starts now is counted to gain so much of its run
BIG = 8  # GPUs


@dataclass
class Result:
    unallocated: float = 0.0  # share of the GPUs, mean over the time in which somebody waits
    waiting: float = 0.0  # share of the time
    big_wait: float = 0.0  # mean, s; who still waits at the end counts as far as he has come
    small_wait: float = 0.0
    big: int = 0
    moves: int = 0
    arrivals: int = 0
    placed: int = 0
    left: int = 0  # still waiting at the end
    lost: float = 0.0  # milli-GPU seconds of work lost to moves, per milli-GPU second allocated
    used: float = field(default=0.0)


@kernel
def next_waiting(h: int, waiting: I32, age: F64, qs: I64, s: State) -> int:
    """Position of the class of `waiting` that host h should take next, the oldest that fits; -1: none does."""
    best = -1
    for i in range(len(waiting)):
        if best >= 0 and age[i] <= age[best]:
            continue
        if fit_kernel(s.rows[h], s.gfree[h], s.vfree[h], s.nvl[h], qs[waiting[i]], s.parent, s.k, s.budget)[0] == 0:
            best = i
    return best


class Cell:
    """One policy under the load. `moves`: hosts are held and cleared for jobs of several GPUs."""

    def __init__(self, nodes: Nodes, load: Load, vectors: I64, of: I32, tables: Tables, *, moves: bool) -> None:
        fleet = nodes.fleet()
        self.load, self.moves = load, moves
        self.kinds = len(vectors)
        free = vectors.copy()
        free[:, Q_HOLD] = 0  # the same classes for whom a host is held
        self.packer = Packer(fleet, np.concatenate([vectors, free]), tables, steps=1 << 16)
        self.classes = of[load.pod].astype(np.int32)
        self.milli = (vectors[:, Q_GPUS] * vectors[:, Q_MILLI]).astype(float)
        self.gpus = vectors[:, Q_GPUS]
        self.capacity = nodes.gpu_total * 1000.0
        self.big = min(BIG, int(self.gpus.max()))
        self.row = np.full(len(load.at), -1, np.int64)
        self.mask = np.zeros(len(load.at), np.int64)
        self.ends = load.life.copy()
        self.queues: dict[int, deque[int]] = {}
        self.departures: list[tuple[float, int]] = []
        self.out = Result()
        self.allocated, self.clock, self.earned = 0.0, 0.0, 0.0
        self.asked = 0
        self.held: list[tuple[int, int]] = []  # job that waits, host that is held for it
        self.since: dict[int, float] = {}  # host -> held since, or last let go
        self.on: dict[int, set[int]] = {h: set() for h in range(len(fleet))}
        self.waits: dict[bool, list[float]] = {True: [], False: []}
        self.one = Run(np.zeros(1, np.int32))

    def run(self) -> Result:
        at, total = 0, len(self.load.at)
        while at < total or self.departures:
            coming = self.load.at[at] if at < total else np.inf
            leaving = self.departures[0][0] if self.departures else np.inf
            now = float(min(coming, leaving))
            if now >= self.load.end:
                break
            self._pass(now)
            if leaving <= coming:
                _, job = heapq.heappop(self.departures)
                if self.ends[job] > now:  # a move put it off
                    heapq.heappush(self.departures, (float(self.ends[job]), job))
                    continue
                self._leave(job, now)
            else:
                self._arrive(at, now)
                at += 1
        self._pass(self.load.end)
        return self._close()

    def _pass(self, now: float) -> None:
        """Time goes by: what is allocated while somebody waits."""
        span = now - max(self.clock, self.load.settled)
        if span > 0:
            self.out.used += span * self.allocated
            if self.queues:
                self.out.waiting += span
                self.out.unallocated += span * (1 - self.allocated / self.capacity)
        self.clock = now

    def _arrive(self, job: int, now: float) -> None:
        k = int(self.classes[job])
        self.out.arrivals += int(now > self.load.settled)
        if self.moves and now > 0:
            self.earned = min(self.earned + 1 / ARRIVALS_A_MOVE, 4.0 * REACH)
        if k in self.queues or not self._place(job, now):
            self.queues.setdefault(k, deque()).append(job)
            if self.moves and job - self.asked >= ARRIVALS_A_MOVE:
                self.asked = job
                self._hold(now)

    def _place(self, job: int, now: float) -> bool:
        self.one.seq[0] = self.classes[job]
        self.packer.resume(self.one, 0)
        if self.one.host[0] < 0:
            return False
        self._started(job, int(self.one.host[0]), int(self.one.mask[0]), now)
        return True

    def _started(self, job: int, row: int, mask: int, now: float) -> None:
        self.row[job], self.mask[job] = row, mask
        self.on[row].add(job)
        self.ends[job] = now + self.load.life[job]
        heapq.heappush(self.departures, (float(self.ends[job]), job))
        self.allocated += self.milli[self.classes[job]]
        self.out.placed += 1
        self._waited(job, now)

    def _waited(self, job: int, now: float) -> None:
        if self.load.at[job] >= self.load.settled:
            self.waits[bool(self.gpus[self.classes[job]] >= self.big)].append(now - self.load.at[job])

    def _leave(self, job: int, now: float) -> None:
        k, row = int(self.classes[job]), int(self.row[job])
        self.packer.give(row, self.packer.classes[k], int(self.mask[job]))
        self.allocated -= self.milli[k]
        self.on[row].discard(job)
        self.row[job] = -1
        if self.held:
            self._clear(now)
        self._offer(row, now)

    def _offer(self, row: int, now: float) -> None:
        """The waiting try the host that changed (nobody fits anywhere else: they tried)."""
        while self.queues:
            waiting = list(self.queues)
            age = np.array([now - self.load.at[self.queues[k][0]] for k in waiting])
            i = next_waiting(row, np.array(waiting, np.int32), age, self.packer.classes, self.packer.state)
            if i < 0:
                return
            require(self._place(self._next(waiting[i]), now), "a job that fits was not placed")

    def _next(self, k: int) -> int:
        queue = self.queues[k]
        job = queue.popleft()
        if not queue:
            del self.queues[k]
        return job

    def _work(self, jobs: I64) -> defrag.Work:
        k = self.classes[jobs]
        lost = (self.milli[k] * LOST_S).astype(np.int64)
        movable = self.load.movable[jobs].astype(np.uint8)
        return defrag.Work(self.row[jobs], self.packer.classes[k], self.mask[jobs], movable, lost)

    def _hold(self, now: float) -> None:
        """A host for the job that waits longest among those of several GPUs and has none held yet."""
        taken = {job for job, _ in self.held}
        heads = [q[0] for k, q in self.queues.items() if self.gpus[k] > 1 and q[0] not in taken]
        if not heads or len(self.held) >= HELD_AT_ONCE or self.earned < self.gpus[self.classes[heads[0]]]:
            return
        job = min(heads, key=lambda j: self.load.at[j])
        k = int(self.classes[job])
        jobs = np.flatnonzero(self.row >= 0)
        busy = {h for h, at in self.since.items() if now - at < 4 * HOLD_S} | {h for _, h in self.held}
        found = clearing.cheapest(self.packer.state, self._work(jobs), self._wanted(k, now, job), REACH)
        rows = [h for h in found if h not in busy]
        if rows:
            self.held.append((job, rows[0]))
            self.since[rows[0]] = now
            self._mark(rows[0], 1)

    def _wanted(self, k: int, now: float, job: int) -> defrag.Wanted:
        return defrag.Wanted(self.packer.classes[k], int(self.milli[k] * (HORIZON_S + now - self.load.at[job])))

    def _mark(self, row: int, value: int) -> None:
        self.packer.state.rows[row, HELD] = value
        self.packer.touched(row)

    def _clear(self, now: float) -> None:
        """Whoever stands on a held host and fits elsewhere now goes there; the job it is held for starts when it can."""
        for job, h in list(self.held):
            if self.row[job] >= 0 or now - self.since[h] > HOLD_S:  # it found another host, or this one does not empty
                self._release(job, h, now)
                continue
            k = int(self.classes[job])
            jobs = np.array(sorted(self.on[h]), np.int64)
            moves: list[defrag.Move] = []
            left = 0
            if len(jobs):
                moves, left = clearing.drain(
                    self.packer.state,
                    self.packer.tables,
                    self._work(jobs),
                    self._wanted(k, now, job),
                    h,
                    int(self.earned),
                )
            for move in moves:
                self._move(int(jobs[move.index]), move, now)
            if left == 0:
                self._mark(h, 0)
                self.held.remove((job, h))
                q = self.queues[k]
                q.remove(job)
                if not q:
                    del self.queues[k]
                mask = clearing.room(self.packer.state, self.packer.classes[k], h)
                require(mask >= 0, "a cleared host has no room")
                self.packer.take(h, k, mask)
                self._started(job, h, mask, now)
                self._offer(h, now)
            elif left < 0:
                self._release(job, h, now)

    def _release(self, job: int, h: int, now: float) -> None:
        self._mark(h, 0)
        self.held.remove((job, h))
        self._offer(h, now)

    def _move(self, job: int, move: defrag.Move, now: float) -> None:
        """It lands before it leaves."""
        k = int(self.classes[job])
        self.earned -= 1
        require(self.earned >= 0, "more moves than were earned")
        self.packer.take(move.to, k, move.mask)
        self.packer.give(move.row, self.packer.classes[k], int(self.mask[job]))
        self.on[move.row].discard(job)
        self.on[move.to].add(job)
        self.row[job], self.mask[job] = move.to, move.mask
        self.ends[job] += LOST_S
        if now > self.load.settled:
            self.out.moves += 1
            self.out.lost += float(self.milli[k]) * LOST_S

    def _close(self) -> Result:
        for queue in self.queues.values():
            for job in queue:
                self._waited(job, self.load.end)
                self.out.left += 1
        out, span = self.out, self.load.end - self.load.settled
        out.unallocated /= max(out.waiting, 1e-9)
        out.lost /= max(out.used, 1e-9)
        out.used /= span * self.capacity
        out.waiting /= span
        out.big = len(self.waits[True])
        out.big_wait = float(np.mean(self.waits[True])) if self.waits[True] else 0.0
        out.small_wait = float(np.mean(self.waits[False])) if self.waits[False] else 0.0
        state = self.packer.state
        require(int(state.gfree.min()) >= 0 and int(state.rows[:, :3].min()) >= 0, "oversold")
        require(abs(state.rows[:, TOTAL].sum() + self.allocated - self.capacity) < 1, "the books do not balance")
        return out


POLICIES = {  # packer, moves
    "fgd": ("fgd", False),
    "fgd, moves": ("fgd", True),
    "ours, no moves": ("tailrace", False),
    "ours": ("tailrace", True),
}


def run(options: Options) -> Report:
    nodes, readers, seeds, _, source = packing.load(options)
    names = options.traces or (("default",) if "default" in readers else tuple(readers)[:1])
    lifetimes = 0.5 if options.quick else 2.0
    least: list[float] = []
    compared = {"fgd", "ours"}  # on every seed; the parts of the policy on the first
    table = [
        ["trace", "seed", "policy", "used %", "unallocated % while waiting", "waiting % of time", "wait of big, min"]
    ]
    table[0] += ["of others", "big jobs", "moves a arrival", "still waiting"]
    results: dict[str, list[Result]] = {p: [] for p in POLICIES}
    for name in names:
        trace = readers[name]()
        vectors, of = classes_of(packing.requests_of(trace))
        fleet = nodes.fleet()
        least.append(bound(trace))
        for seed in seeds:
            load = load_of(nodes, trace, seed, lifetimes)
            for policy, (packer, moves) in POLICIES.items():
                if policy not in compared and (options.quick or seed != seeds[0]):
                    continue
                cell = Cell(nodes, load, vectors, of, tables_for(fleet, trace.shapes(), packer), moves=moves)
                r = cell.run()
                require(r.placed > 0 and r.big > 0, f"{name}: nothing happened")
                results[policy].append(r)
                table.append(
                    [
                        *(name, str(seed), policy, f"{100 * r.used:.2f}", f"{100 * r.unallocated:.2f}"),
                        *(f"{100 * r.waiting:.0f}", f"{r.big_wait / 60:.1f}", f"{r.small_wait / 60:.2f}", str(r.big)),
                        *(f"{r.moves / max(1, r.arrivals):.4f}", str(r.left)),
                    ]
                )

    def mean(policy: str, key: str) -> float:
        return float(np.mean([getattr(r, key) for r in results[policy]]))

    figures = {
        "unallocated_ratio_vs_fgd": mean("ours", "unallocated") / mean("fgd", "unallocated"),
        "big_job_wait_ratio": mean("ours", "big_wait") / mean("fgd", "big_wait"),
        "moves_per_arrival": sum(r.moves for r in results["ours"]) / sum(r.arrivals for r in results["ours"]),
    }
    peer = {"bound_unallocated": float(np.mean(least))}
    for p in (p for p, done in results.items() if done):
        label = p.replace(", ", "_").replace(" ", "_")
        peer |= {f"{label}_unallocated": mean(p, "unallocated"), f"{label}_big_wait_s": mean(p, "big_wait")}
        peer[f"{label}_other_wait_s"] = mean(p, "small_wait")
    return Report(
        "churn",
        figures,
        peer,
        {
            "source": source,
            "traces": list(names),
            "seeds": list(seeds),
            "offered load": LOAD,
            "lifetimes": f"lognormal, sigma {SIGMA:g}, mean {MEAN_S:g} s, independent of the shape",
            "counted": f"{lifetimes:g} mean lifetimes after one",
            "movable": MOVABLE,
            "a move costs": f"{LOST_S:g} s",
        },
        {
            "unallocated_ratio_vs_fgd": ("<=", 0.6),
            "big_job_wait_ratio": ("<=", 0.5),
            "moves_per_arrival": ("<=", 0.05),
        },
        table,
    )
