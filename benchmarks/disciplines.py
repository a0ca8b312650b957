"""Who decides in the simulator: our planner, and the peers FIFO, EASY backfill and best fit.

The peers place a replica on the host with the least free GPUs that suffices. FIFO stops at the first job that does not fit; best
fit goes on and starts whatever fits, in order of arrival; EASY gives the first that does not fit a reservation (hosts and time, by
the estimates) and goes on with whatever does not delay it (Mu'alem & Feitelson 2001), host by host.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np
from numba import njit

from benchmarks.simulator import Cluster, Start, Workload
from scheduler.core.order import weighed
from scheduler.core.plan import plan
from scheduler.core.types import F64, I32, I64, WHOLE, Decision, Fleet, Kind, Policy, Request, Running

FIFO, EASY, BEST_FIT = range(3)
_NEVER: Final = 1 << 60
_NOBODY: Final = np.zeros(0, np.int64)


@njit(cache=True)
def _seat(free: I32, limit: I32, gpus: int, replicas: int, out: I32) -> bool:
    """Best fit of each replica by free[h], where limit[h] allows it too; books both on success. Hosts into out."""
    for r in range(replicas):
        best = -1
        for h in range(len(free)):
            if free[h] >= gpus and limit[h] >= gpus and (best < 0 or free[h] < free[best]):
                best = h
        if best < 0:
            for k in range(r):
                free[out[k]] += gpus
                limit[out[k]] += gpus
            return False
        out[r] = best
        free[best] -= gpus
        limit[best] -= gpus
    return True


@njit(cache=True)
def _shadow(
    now: int, free: I32, ends: I64, host: I32, amount: I32, gpus: int, replicas: int, extra: I32, out: I32
) -> int:
    """When the first job in line will fit, by estimates; `extra` [H]: what it then leaves of each host."""
    extra[:] = free
    whole = np.full(len(free), 1 << 20, np.int32)
    order = np.argsort(ends)
    i = 0
    while i < len(order):
        at = ends[order[i]]
        while i < len(order) and ends[order[i]] == at:
            extra[host[order[i]]] += amount[order[i]]
            i += 1
        if _seat(extra, whole, gpus, replicas, out):
            return max(now, at)
    return -1


@njit(cache=True)
def peer_kernel(
    mode: int,
    now: int,
    queue: I64,
    gpus: I32,
    replicas: I32,
    estimate: I64,
    free: I32,
    ends: I64,
    host: I32,
    amount: I32,
    started: I64,
    hosts: I32,
    slots: I32,
    vacant: I32,
) -> int:
    """Which of `queue` (job numbers in order of arrival) start now: started[0..n), their hosts one after another in `hosts`.

    Running replicas stand in slots of `ends`, `host`, `amount` (0: an empty slot); new ones go to vacant[0..), in `slots`.
    """
    n, used = 0, 0
    whole = np.full(len(free), 1 << 20, np.int32)
    extra = np.zeros(len(free), np.int32)
    spare = np.empty(len(hosts), np.int32)
    shadow = np.int64(-1)
    blocked = False
    # A job at least as wide and deep as one that failed fails, too; long and short ones are kept apart (only EASY tells them).
    failed = np.full((2, 64), 1 << 20, np.int32)
    for i in range(len(queue)):
        j = queue[i]
        g, r = gpus[j], replicas[j]
        long = 0
        if blocked and mode == EASY and (shadow < 0 or now + estimate[j] > shadow):
            long = 1
        if failed[long, g] <= r:
            continue
        if _seat(free, extra if long else whole, g, r, hosts[used:]):
            for k in range(used, used + r):
                slots[k] = vacant[k]
                ends[slots[k]], host[slots[k]], amount[slots[k]] = now + estimate[j], hosts[k], g
            started[n] = j
            n += 1
            used += r
            continue
        for wider in range(g, 64):
            failed[long, wider] = min(failed[long, wider], r)
        if not blocked:
            blocked = True
            if mode == FIFO:
                break
            if mode == EASY:
                shadow = _shadow(now, free, ends, host, amount, g, r, extra, spare)
    return n


class Peer:
    """FIFO, EASY or best fit."""

    wake = 0

    def __init__(self, mode: int, work: Workload, cluster: Cluster) -> None:
        self.mode, self.work = mode, work
        self.queue = np.zeros(0, np.int64)
        self.free = np.full(cluster.hosts, cluster.per_host, np.int32)
        self.ends = np.full(cluster.gpus, _NEVER, np.int64)
        self.host, self.amount = np.zeros(cluster.gpus, np.int32), np.zeros(cluster.gpus, np.int32)
        self.vacant = list(range(cluster.gpus))
        self.slots_of: dict[int, list[int]] = {}
        self.started = np.zeros(cluster.gpus, np.int64)
        self.hosts, self.slots = np.zeros(2 * cluster.gpus, np.int32), np.zeros(2 * cluster.gpus, np.int32)

    def decide(self, now: int, arrived: list[int], ended: list[int]) -> list[Start]:
        work = self.work
        for job in ended:
            for slot in self.slots_of.pop(job):
                self.free[self.host[slot]] += self.amount[slot]
                self.ends[slot], self.amount[slot] = _NEVER, 0
                self.vacant.append(slot)
        if arrived:
            self.queue = np.concatenate([self.queue, np.array(arrived, np.int64)])
        if not len(self.queue):
            return []
        n = peer_kernel(
            *(self.mode, now, self.queue, work.gpus, work.replicas, work.estimate, self.free),
            *(self.ends, self.host, self.amount, self.started, self.hosts, self.slots, np.array(self.vacant, np.int32)),
        )
        out, at = [], 0
        for job in self.started[:n].tolist():
            replicas = int(work.replicas[job])
            self.slots_of[job] = self.slots[at : at + replicas].tolist()
            out.append(Start(job, self.hosts[at : at + replicas].tolist(), [0] * replicas))
            at += replicas
        if n:
            self.queue = self.queue[~np.isin(self.queue, self.started[:n])]
            del self.vacant[:at]
        return out


class Core:
    """Our planner. Waiting jobs stay in groups of one tenant and shape, in its own order; a plan is given the first of each.

    Not every event needs a plan: nothing can start that did not a moment ago unless something ended, a promise is due, or what
    arrived fits the free GPUs of some host. Of a group whose shape fits no host as it stands, only the first job is shown; of
    the others the first few that end before the first held start, and the first few that do not.
    `promises` [J]: the first start time promised, 0 = none; `moved`: promises that a later plan put off.
    """

    def __init__(self, work: Workload, cluster: Cluster, policy: Policy, *, half_life: int, first: int = 4) -> None:
        self.work, self.half_life, self.first = work, half_life, first
        self.policy = replace(policy, usage_scale=float(cluster.gpus * WHOLE))
        self.fleet = Fleet.build(
            [{"host_id": h, "gpus": cluster.per_host, "leaf": h // 8, "spine": h // 64} for h in range(cluster.hosts)]
        )
        self.groups: dict[tuple[int, int, int], I64] = {}
        self.running: dict[int, list[Running]] = {}
        self.held, self.usage = np.zeros(len(work.tenants)), np.zeros(len(work.tenants))
        self.promised: dict[int, tuple[int, tuple[int, ...]]] = {}
        self.promises = np.zeros(len(work), np.int64)
        self.moved = self.plans = self.at = self.wake = 0

    def decide(self, now: int, arrived: list[int], ended: list[int]) -> list[Start]:
        self._age(now)
        for job in ended:
            self._end(job)
        out = self._first(now, arrived)
        fresh = self._grouped([job for job in arrived if job < len(self.work)])
        for key, jobs in fresh.items():
            self.groups[key] = np.concatenate([self.groups.get(key, _NOBODY), jobs])
        due = any(start <= now for start, _ in self.promised.values())
        if ended or due:
            fresh = {}
        elif not any(self._could(gpus, replicas) for _, gpus, replicas in fresh):
            return out
        while True:
            shown, more = self._shown(now, fresh or self.groups)
            if not shown:
                break
            started = self._plan(now, shown)
            out += started
            names = {s.job for s in started}
            # A group of which the first were shown and all started may have more that fit.
            if not any(group <= names for group in more):
                break
            fresh = {}
        self.wake = min((start for start, _ in self.promised.values() if start > now), default=0)
        return out

    def _first(self, now: int, arrived: list[int]) -> list[Start]:  # noqa: ARG002 - for who sells windows
        """What starts before the waiting jobs are looked at: nothing here."""
        return []

    # --- what is shown to the planner
    def _could(self, gpus: int, replicas: int) -> bool:
        idle = (self.fleet.gpu_free >= WHOLE).sum(axis=1)
        return int((idle // gpus).sum()) >= replicas

    def _grouped(self, jobs: list[int]) -> dict[tuple[int, int, int], I64]:
        found: dict[tuple[int, int, int], list[int]] = {}
        for job in jobs:
            key = int(self.work.tenant[job]), int(self.work.gpus[job]), int(self.work.replicas[job])
            found.setdefault(key, []).append(job)
        return {key: np.array(group, np.int64) for key, group in found.items()}

    def _shown(self, now: int, groups: dict[tuple[int, int, int], I64]) -> tuple[list[Request], list[set[int]]]:
        idle = (self.fleet.gpu_free >= WHOLE).sum(axis=1)
        shown, more = list(self.promised), []
        promised = len(shown)
        leader: dict[int, tuple[float, int]] = {}
        fitting: list[tuple[tuple[int, int, int], F64, I64]] = []
        for key, group in groups.items():
            tenant, gpus, replicas = key
            mine = group[~np.isin(group, shown[:promised])] if promised else group
            if not len(mine):
                continue
            size: F64 = mine.astype(np.float64)  # job numbers are in order of arrival
            if self.policy.queue == "shortest":  # as `core.order.size`
                age = 1.0 + (now - self.work.submit[mine]) / self.policy.patience_s
                size = self.work.estimate[mine] * float(gpus * replicas) / age
            best = int(size.argmin())
            leader[tenant] = min(leader.get(tenant, (np.inf, -1)), (float(size[best]), int(mine[best])))
            if int((idle // gpus).sum()) >= replicas:
                fitting.append((key, size, mine))
        held = min((start for start, _ in self.promised.values()), default=_NEVER)
        for _, size, mine in fitting:
            # What ends before the first held start may go where the rest may not.
            short = now + self.work.estimate[mine] <= held
            for part in (short, ~short):
                those = mine[part]
                k = min(self.first, len(those))
                chosen = those[np.argpartition(size[part], k - 1)[:k]] if k < len(those) else those
                shown += chosen.tolist()
                if k < len(those):
                    more.append({int(j) for j in chosen})
        shown += [job for _, job in leader.values()]
        return [self._request(j) for j in dict.fromkeys(shown)], more

    def _request(self, job: int) -> Request:
        work, tenant = self.work, int(self.work.tenant[job])
        start, hosts = self.promised.get(job, (0, ()))
        return Request(
            job=job,
            org=tenant + 1,
            kind=Kind.ON_DEMAND,
            replicas=int(work.replicas[job]),
            gpus=int(work.gpus[job]),
            queued_at=int(work.submit[job]),
            usage=weighed(float(self.held[tenant]), float(self.usage[tenant])),
            duration_s=int(work.estimate[job]),
            promised_start=start,
            promised_hosts=hosts,
        )

    # --- a plan and what follows from it
    def _plan(self, now: int, requests: list[Request]) -> list[Start]:
        running = [r for rows in self.running.values() for r in rows]
        made = plan(self.fleet, requests, running, policy=self.policy, now_s=now)
        self.plans += 1
        where: dict[int, list[tuple[int, tuple[int, ...]]]] = {}
        for p in made.placements:
            where.setdefault(p.job, []).append((p.host, p.gpus))
        out = []
        for d in made.decisions:
            if d.placed:
                out.append(self._start(now, d.job, where[d.job]))
            elif d.held:
                self._promise(d)
            elif self.promised.pop(d.job, None):
                self.moved += 1
        return out

    def _promise(self, d: Decision) -> None:
        if not self.promises[d.job]:
            self.promises[d.job] = d.earliest_start
        self.moved += 0 < self.promised.get(d.job, (0, ()))[0] < d.earliest_start
        self.promised[d.job] = d.earliest_start, d.held

    def _start(self, now: int, job: int, where: list[tuple[int, tuple[int, ...]]]) -> Start:
        work, tenant = self.work, int(self.work.tenant[job])
        self.promised.pop(job, None)
        key = tenant, int(work.gpus[job]), int(work.replicas[job])
        self.groups[key] = self.groups[key][self.groups[key] != job]
        rows = []
        for n, (host, gpus) in enumerate(where):
            self.fleet.gpu_free[host, list(gpus)] = 0
            self.fleet.gpu_active[host] |= sum(1 << g for g in gpus)
            rows.append(
                Running(
                    placement=job * 128 + n,
                    job=job,
                    org=tenant + 1,
                    kind=Kind.ON_DEMAND,
                    host=host,
                    gpus=gpus,
                    gang_size=len(where),
                    ends_at=now + int(work.estimate[job]),
                )
            )
        self.running[job] = rows
        self.held[tenant] += work.gpus[job] * work.replicas[job] * WHOLE
        return Start(job, [h for h, _ in where], [sum(1 << g for g in gpus) for _, gpus in where])

    def _end(self, job: int) -> None:
        for r in self.running.pop(job):
            self.fleet.gpu_free[r.host, list(r.gpus)] = WHOLE
            self.fleet.gpu_active[r.host] &= ~sum(1 << g for g in r.gpus)
        self.held[int(self.work.tenant[job])] -= self.work.gpus[job] * self.work.replicas[job] * WHOLE

    def _age(self, now: int) -> None:
        """Usage as `core.order.decayed` defines it, brought forward (held amounts are constant between events)."""
        keep = 2.0 ** ((self.at - now) / self.half_life)
        self.usage = self.usage * keep + self.held * (1.0 - keep)
        self.at = now
