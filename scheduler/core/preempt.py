"""Preemption: whom to evict so that a waiting job fits, and nobody in vain.

Who may be a victim: spot placements for any job that is not spot; and placements of the same organization with a lower
priority. Order among victims: spot first, the lowest bid first (the auction's order), then the least work lost since
the last
checkpoint, then the most GPUs (fewer evictions). A gang goes whole, and its cost is that of all its placements.

Two searches. One replica: on every host, victims are taken in order until it fits, then put back, dearest first, as
long as it
still fits (the reprieve); the host whose set is cheapest wins: (somebody who is not spot, highest bid, work lost,
evictions).
A gang, or a job that watts stop at a node above: the shortest prefix of all victims in order that makes room
(bisection), then the
same reprieve over it. A set is returned only when the job fits with it, and with no member of it left out.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Final, NamedTuple

import numpy as np

from scheduler.core import fit_kernels as fit
from scheduler.core.fit_kernels import REQUEST_WIDTH, fit_kernel, static_kernel
from scheduler.core.jit import kernel
from scheduler.core.state import State, give, take
from scheduler.core.types import I32, I64, WHOLE, Kind, Request, Running

MAX_VICTIM_JOBS: Final = 4096  # jobs looked at for a gang; beyond that only the first in order


class Held(NamedTuple):
    """What running placements hold, as the kernels read it: row of the state, request vector, GPU mask."""

    row: I64  # [V]
    vector: I64  # [V, REQUEST_WIDTH]
    mask: I64  # [V]


def held(running: Sequence[Running], row_of: Callable[[int], int]) -> Held:
    """The columns of `running`."""
    vector = np.zeros((len(running), REQUEST_WIDTH), np.int64)
    mask = np.zeros(len(running), np.int64)
    row = np.zeros(len(running), np.int64)
    for i, r in enumerate(running):
        gpus = len(r.gpus)
        vector[i, fit.Q_CPU : fit.Q_VRAM + 1] = (
            *(r.cpu, r.ram, r.nvme, gpus),
            *((r.gpu_milli, r.vram) if gpus else (0, 0)),
        )
        mask[i] = sum(1 << g for g in r.gpus)
        row[i] = row_of(r.host)
    return Held(row, vector, mask)


def may_evict(request: Request, victim: Running) -> bool:
    """Whether the request may take the place of the victim."""
    if not victim.preemptible or victim.job == request.job:
        return False
    if victim.kind == Kind.SPOT and request.kind != Kind.SPOT:
        return True
    return victim.org == request.org and victim.priority < request.priority


def order_key(victim: Running, lost: int) -> tuple[int, int, int, int, int, int]:
    """Victims in the order in which they leave; `lost`: the work that its whole gang would lose, seconds."""
    spot = victim.kind == Kind.SPOT
    size = len(victim.gpus) * (victim.gpu_milli if victim.gpus else WHOLE)
    return (not spot, victim.bid if spot else victim.priority, lost, -size, victim.job, victim.placement)


@kernel
def cheapest_host(
    start: I64,
    members: I64,
    tier: I64,
    lost: I64,
    row: I64,
    vector: I64,
    mask: I64,
    q: I64,
    s: State,
    out: I32,
) -> int:
    """The host whose victims cost least. Candidates b = 0.. have members[start[b]:start[b + 1]] (victims on one row,
    in order).

    `tier` (spot before others, then the bid) and `lost` (work lost by the victim's whole gang, seconds) order the
    sets. The
    chosen set goes to out[V] (1 = evicted). Returns the candidate, or -1. The state is left as it was.
    """
    best = -1
    best_tier, best_lost, best_count = np.int64(0), np.int64(0), np.int64(0)
    for b in range(len(start) - 1):
        h = row[members[start[b]]]
        if static_kernel(s.rows[h], q):
            continue
        end, fits = start[b], False
        while end < start[b + 1] and not fits:
            v = members[end]
            give(h, vector[v], mask[v], s)
            end += 1
            fits = fit_kernel(s.rows[h], s.gfree[h], s.vfree[h], s.nvl[h], q, s.parent, s.k, s.budget)[0] == 0
        kept = np.int64(0)  # bit i: victim start[b] + i was put back (hosts hold few enough placements)
        if fits:
            for at in range(min(end - 1, start[b] + 62), start[b] - 1, -1):
                v = members[at]
                take(h, vector[v], mask[v], s)
                if fit_kernel(s.rows[h], s.gfree[h], s.vfree[h], s.nvl[h], q, s.parent, s.k, s.budget)[0] == 0:
                    kept |= np.int64(1) << (at - start[b])
                else:
                    give(h, vector[v], mask[v], s)
        worst, total, count = np.int64(-1), np.int64(0), np.int64(0)
        for at in range(end - 1, start[b] - 1, -1):
            v = members[at]
            if at - start[b] <= 62 and (kept >> (at - start[b])) & 1:
                continue
            take(h, vector[v], mask[v], s)
            worst = max(worst, tier[v])
            total += lost[v]
            count += 1
        if not fits:
            continue
        better = best < 0 or worst < best_tier
        if not better and worst == best_tier:
            better = total < best_lost or (total == best_lost and count < best_count)
        if better:
            best, best_tier, best_lost, best_count = b, worst, total, count
            out[:] = 0
            for at in range(start[b], end):
                if not (at - start[b] <= 62 and (kept >> (at - start[b])) & 1):
                    out[members[at]] = 1
    return best


class Preemptor:
    """Finds victims among `running` on a state. Those already evicted, or named in `gone`, no longer count."""

    def __init__(self, state: State, running: Sequence[Running], row_of: Callable[[int], int]) -> None:
        self.state = state
        self.running = running
        self.held = held(running, row_of)
        self.gone = np.zeros(len(running), bool)
        self.of_job: dict[int, list[int]] = {}
        for i, r in enumerate(running):
            self.of_job.setdefault(r.job, []).append(i)
        self.lost = np.array([sum(running[j].work_lost_s for j in self.of_job[r.job]) for r in running], np.int64)
        self.order = sorted(range(len(running)), key=lambda i: order_key(running[i], int(self.lost[i])))
        tiers = {key: n for n, key in enumerate(sorted({order_key(r, 0)[:2] for r in running}))}
        self.known: dict[Hashable, list[int]] = {}
        self.tier = np.array([tiers[order_key(r, 0)[:2]] for r in running], np.int64)

    def candidates(self, request: Request) -> list[int]:
        """Victims in the order in which they leave. A gang is a candidate only when all of it may go."""
        key = (
            request.kind == Kind.SPOT,
            request.org,
            request.priority,
            request.job if request.job in self.of_job else 0,
        )
        known = self.known.get(key)
        if known is None:
            able = [may_evict(request, r) for r in self.running]
            known = [i for i in self.order if able[i] and all(able[j] for j in self.of_job[self.running[i].job])]
            self.known[key] = known
        return [i for i in known if not self.gone[i]]

    def for_replica(self, request: Request, q: I64) -> list[int] | None:
        """Victims for one replica: the cheapest set on one host, with the gangs they belong to. Nothing is evicted
        yet.
        """
        victims = self.candidates(request)
        if not victims:
            return None
        rows = self.held.row[victims]
        by_row = np.argsort(rows, kind="stable")
        members = np.array(victims, np.int64)[by_row]
        cuts = np.flatnonzero(np.r_[True, np.diff(rows[by_row]) != 0, True]).astype(np.int64)
        out = np.zeros(len(self.running), np.int32)
        found = cheapest_host(cuts, members, self.tier, self.lost, *self.held, q, self.state, out)
        if found < 0:
            return None
        return self._whole([int(i) for i in np.flatnonzero(out)])

    def for_all(self, request: Request, fits: Callable[[], bool]) -> list[int] | None:
        """Victims for a gang, or against a node's watts: the shortest prefix in order, then the reprieve.

        `fits()` says whether the whole job fits on the state as it is, and leaves it so.
        """
        jobs = list(dict.fromkeys(self.running[i].job for i in self.candidates(request)))[:MAX_VICTIM_JOBS]
        evicted: list[int] = []

        def to(count: int) -> None:
            while len(evicted) < count:
                evicted.append(jobs[len(evicted)])
                self._move(evicted[-1], out=True)
            while len(evicted) > count:
                self._move(evicted.pop(), out=False)

        to(len(jobs))
        if not jobs or not fits():
            to(0)
            return None
        low, high = 1, len(jobs)
        while low < high:
            mid = (low + high) // 2
            to(mid)
            if fits():
                high = mid
            else:
                low = mid + 1
        to(low)
        chosen = self._reprieve(evicted, fits)
        for job in chosen:
            self._move(job, out=False)
        return self._whole([self.of_job[job][0] for job in chosen])

    def _reprieve(self, evicted: list[int], fits: Callable[[], bool]) -> list[int]:
        """Puts back, dearest first, every job without which the request still fits; halves first, to put many back at
        once.
        """
        chosen: list[int] = []
        stack = [evicted[::-1]]
        while stack:
            part = stack.pop()
            for job in part:
                self._move(job, out=False)
            if fits():
                continue
            for job in part:
                self._move(job, out=True)
            if len(part) == 1:
                chosen.append(part[0])
            else:
                middle = len(part) // 2
                stack += [part[middle:], part[:middle]]
        return chosen

    def _move(self, job: int, *, out: bool) -> None:
        indices = self.of_job[job]
        for i in indices if out else reversed(indices):
            (give if out else take)(self.held.row[i], self.held.vector[i], self.held.mask[i], self.state)

    def _whole(self, victims: list[int]) -> list[int]:
        return sorted(
            {j for i in victims for j in self.of_job[self.running[i].job]}, key=lambda i: self.running[i].placement
        )

    def evict(self, victims: list[int]) -> list[int]:
        """Evicts for good; returns the rows that changed."""
        for i in victims:
            give(self.held.row[i], self.held.vector[i], self.held.mask[i], self.state)
            self.gone[i] = True
        return sorted({int(self.held.row[i]) for i in victims})
