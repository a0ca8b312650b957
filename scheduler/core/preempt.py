"""Preemption: whom to evict so that a waiting job fits, and nobody in vain.

Who may be a victim: spot placements for any job that is not spot; and placements of the same organization with a lower
priority. Order among victims: spot first, the lowest bid first (the auction's order), then the least work lost since the last
checkpoint, then the most GPUs (fewer evictions). A gang goes whole, and its cost is that of all its placements; one that may
shrink (`Running.gang_min`) loses single replicas down to that number first, each at its own cost.

Two searches. One replica: on every host, victims are taken in order until it fits, then put back, dearest first, as long as it
still fits (the reprieve); the host whose set is cheapest wins: somebody who is not spot, highest bid, work lost, resource
distance, evictions. The distance is that of what leaves from what is needed, sqrt(sum over resources of ((needed - freed) /
needed)^2), so that a job of 8 GPUs is not evicted for one (the rule of Nomad's preemption).
A gang, or a job that watts stop at a node above: the shortest prefix of all victims in order that makes room
(bisection), then the same reprieve over it. A set is returned only when the job fits with it, and with no member of it left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from scheduler.core import fit_kernels as fit
from scheduler.core.fit_kernels import REQUEST_WIDTH, fit_kernel, static_kernel
from scheduler.core.jit import inlined, kernel
from scheduler.core.state import State, give, take
from scheduler.core.types import I32, I64, WHOLE, Kind, Request, Running

MAX_VICTIM_JOBS: Final = 4096  # jobs looked at for a gang; beyond that only the first in order


class Held(NamedTuple):
    """What running placements hold, as the kernels read it: row of the state, request vector, GPU mask."""

    row: I64  # [V]
    vector: I64  # [V, REQUEST_WIDTH]
    mask: I64  # [V]


def held(running: Sequence[Running], row_of: Callable[[int], int]) -> Held:
    """The columns of `running`; `row_of`: row of the state of a host."""
    vector = np.zeros((len(running), REQUEST_WIDTH), np.int64)
    masks: dict[tuple[int, ...], int] = {}
    rows, host = [], []
    for r in running:
        mask = masks.get(r.gpus)
        if mask is None:
            mask = masks[r.gpus] = sum(1 << g for g in r.gpus)
        rows.append((r.cpu, r.ram, r.nvme, len(r.gpus), r.gpu_milli if mask else 0, r.vram if mask else 0, mask))
        host.append(row_of(r.host))
    table = np.array(rows, np.int64).reshape(-1, 7)
    vector[:, fit.Q_CPU : fit.Q_VRAM + 1] = table[:, :6]
    return Held(np.array(host, np.int64), vector, np.ascontiguousarray(table[:, 6]))


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


@inlined
def _apart(needed: Any, freed: Any) -> Any:
    """One resource's part of the squared distance; none where nothing is needed."""
    return ((needed - freed) / needed) ** 2 if needed > 0 else 0.0


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

    `tier` (spot before others, then the bid) and `lost` (work lost by all that leaves with the victim, s) order the sets, then
    the resource distance, then their number. The chosen set goes to out[V] (1 = evicted). Returns the candidate, or -1. The
    state is left as it was.
    """
    best = -1
    best_tier, best_lost, best_count, best_far = np.int64(0), np.int64(0), np.int64(0), 0.0
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
        cpu, ram, nvme, gpu = np.int64(0), np.int64(0), np.int64(0), np.int64(0)
        for at in range(end - 1, start[b] - 1, -1):
            v = members[at]
            if at - start[b] <= 62 and (kept >> (at - start[b])) & 1:
                continue
            take(h, vector[v], mask[v], s)
            worst = max(worst, tier[v])
            total += lost[v]
            count += 1
            cpu += vector[v, fit.Q_CPU]
            ram += vector[v, fit.Q_RAM]
            nvme += vector[v, fit.Q_NVME]
            gpu += vector[v, fit.Q_GPUS] * vector[v, fit.Q_MILLI]
        if not fits:
            continue
        far = _apart(q[fit.Q_CPU], cpu) + _apart(q[fit.Q_RAM], ram) + _apart(q[fit.Q_NVME], nvme)
        far += _apart(q[fit.Q_GPUS] * q[fit.Q_MILLI], gpu)
        better = best < 0 or worst < best_tier
        if not better and worst == best_tier:
            nearer = far < best_far or (far == best_far and count < best_count)
            better = total < best_lost or (total == best_lost and nearer)
        if better:
            best, best_tier, best_lost, best_count, best_far = b, worst, total, count, far
            out[:] = 0
            for at in range(start[b], end):
                if not (at - start[b] <= 62 and (kept >> (at - start[b])) & 1):
                    out[members[at]] = 1
    return best


class Preemptor:
    """Finds victims among `running` on a state. Those already evicted, or named in `gone`, no longer count."""

    def __init__(self, state: State, running: Sequence[Running], columns: Held) -> None:
        self.state = state
        self.running = running
        self.held = columns
        self.gone = np.zeros(len(running), bool)
        self.of_job: dict[int, list[int]] = {}
        for i, r in enumerate(running):
            self.of_job.setdefault(r.job, []).append(i)
        # What an eviction of each costs when its gang goes whole.
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

    def _spare(self, job: int) -> int:
        """How many replicas a gang may lose and live on."""
        least = self.running[self.of_job[job][0]].gang_min
        return max(0, sum(not self.gone[i] for i in self.of_job[job]) - least) if least else 0

    def for_replica(self, request: Request, q: I64) -> list[int] | None:
        """Victims for one replica: the cheapest set on one host, with the gangs they belong to. Nothing is evicted yet."""
        victims = self.candidates(request)
        if not victims:
            return None
        rows = self.held.row[victims]
        lost = self.lost
        if any(self.running[i].gang_min for i in victims):
            lost = self.lost.copy()
            here = Counter((self.running[i].job, int(row)) for i, row in zip(victims, rows, strict=True))
            for i, row in zip(victims, rows, strict=True):
                if here[self.running[i].job, int(row)] <= self._spare(self.running[i].job):
                    lost[i] = self.running[i].work_lost_s
        by_row = np.argsort(rows, kind="stable")
        members = np.array(victims, np.int64)[by_row]
        cuts = np.flatnonzero(np.r_[True, np.diff(rows[by_row]) != 0, True]).astype(np.int64)
        out = np.zeros(len(self.running), np.int32)
        found = cheapest_host(cuts, members, self.tier, lost, *self.held, q, self.state, out)
        if found < 0:
            return None
        return self._without_idle(self._whole([int(i) for i in np.flatnonzero(out)]), int(rows[by_row][cuts[found]]), q)

    def _without_idle(self, victims: list[int], row: int, q: I64) -> list[int]:
        """A gang that leaves whole may free more on the row than its one member did: who is not needed then stays."""
        jobs = dict.fromkeys(self.running[i].job for i in victims)
        if len(jobs) in {1, len(victims)}:
            return victims
        units = [[i for i in victims if self.running[i].job == job] for job in jobs]
        units.sort(key=lambda unit: min(self.order.index(i) for i in unit))
        s = self.state
        for unit in units:
            self._move(unit, out=True)

        def fits() -> bool:
            found = fit_kernel(s.rows[row], s.gfree[row], s.vfree[row], s.nvl[row], q, s.parent, s.k, s.budget)
            return bool(found[0] == 0)

        chosen = self._reprieve(units, fits)
        for unit in chosen:
            self._move(unit, out=False)
        return self._whole([i for unit in chosen for i in unit])

    def for_all(self, request: Request, fits: Callable[[], bool]) -> list[int] | None:
        """Victims for a gang, or against a node's watts: the shortest prefix in order, then the reprieve.

        `fits()` says whether the whole job fits on the state as it is, and leaves it so.
        """
        units = self._units(request)
        evicted: list[list[int]] = []

        def to(count: int) -> None:
            while len(evicted) < count:
                evicted.append(units[len(evicted)])
                self._move(evicted[-1], out=True)
            while len(evicted) > count:
                self._move(evicted.pop(), out=False)

        to(len(units))
        if not units or not fits():
            to(0)
            return None
        low, high = 1, len(units)
        while low < high:
            mid = (low + high) // 2
            to(mid)
            if fits():
                high = mid
            else:
                low = mid + 1
        to(low)
        chosen = self._reprieve(evicted, fits)
        for unit in chosen:
            self._move(unit, out=False)
        return self._whole([i for unit in chosen for i in unit])

    def _units(self, request: Request) -> list[list[int]]:
        """What leaves together, in order: a gang, or the replicas it can spare one by one and then the rest of it."""
        units: list[list[int]] = []
        for job in list(dict.fromkeys(self.running[i].job for i in self.candidates(request)))[:MAX_VICTIM_JOBS]:
            members = [i for i in self.of_job[job] if not self.gone[i]]
            members.sort(key=lambda i: (self.running[i].work_lost_s, i))
            spare = self._spare(job)
            units += [*([i] for i in members[:spare]), *([members[spare:]] if members[spare:] else [])]
        return units

    def _reprieve(self, evicted: list[list[int]], fits: Callable[[], bool]) -> list[list[int]]:
        """Puts back, dearest first, every unit without which the request still fits; halves first, to put many back at once."""
        chosen: list[list[int]] = []
        stack = [evicted[::-1]]
        while stack:
            part = stack.pop()
            for unit in part:
                self._move(unit, out=False)
            if fits():
                continue
            for unit in part:
                self._move(unit, out=True)
            if len(part) == 1:
                chosen.append(part[0])
            else:
                middle = len(part) // 2
                stack += [part[middle:], part[:middle]]
        return chosen

    def _move(self, unit: list[int], *, out: bool) -> None:
        for i in unit if out else reversed(unit):
            (give if out else take)(self.held.row[i], self.held.vector[i], self.held.mask[i], self.state)

    def _whole(self, victims: list[int]) -> list[int]:
        """With the rest of every gang that cannot live on without them."""
        found: set[int] = set()
        for job, count in Counter(self.running[i].job for i in victims).items():
            spared = count <= self._spare(job)
            found.update(i for i in (victims if spared else self.of_job[job]) if self.running[i].job == job)
        return sorted((i for i in found if not self.gone[i]), key=lambda i: self.running[i].placement)

    def evict(self, victims: list[int]) -> list[int]:
        """Evicts for good; returns the rows that changed."""
        for i in victims:
            give(self.held.row[i], self.held.vector[i], self.held.mask[i], self.state)
            self.gone[i] = True
        return sorted({int(self.held.row[i]) for i in victims})
