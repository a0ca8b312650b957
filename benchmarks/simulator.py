"""A discrete-event simulator of one cell of GPU hosts: arrivals, departures, gangs, tenants; the clock is injected.

    from benchmarks.simulator import Cluster, Workload, simulate
    simulate(work, cluster, CorePolicy(...)) -> Outcome

Time is integer seconds from the first arrival. A `Discipline` is told what arrived and what ended and says what starts now and
where; the simulator books GPUs one by one (a double booking raises), ends jobs after their true duration, and integrates. The
discipline sees estimates, never durations. Everybody gets the same workload, estimates included.

Fairness. At each instant a tenant's *demand* is the GPUs of its jobs that run or wait, its *entitlement* the max-min fair
(water-filling) division of all GPUs over the demands, equal weights, its *received* the GPUs that its jobs hold. Both are
integrated over the time in which it has demand; the fair share of a tenant is received / entitled. It is 1 or more when the
tenant got all that max-min fairness owed it, in total; work that waits raises what is owed without raising what is received.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numba import njit

from benchmarks.harness import require
from scheduler.core.types import F64, I32, I64


@dataclass(frozen=True)
class Workload:
    """Jobs as columns [J], in order of submission; one job is `replicas` x `gpus` whole GPUs, each replica on one host."""

    submit: I64  # s
    duration: I64  # s, true
    estimate: I64  # s, >= duration: what a discipline is told
    gpus: I32  # of one replica
    replicas: I32
    tenant: I32
    tenants: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.submit)

    @property
    def width(self) -> I64:
        """GPUs of each job."""
        return self.gpus.astype(np.int64) * self.replicas


@dataclass(frozen=True)
class Cluster:
    hosts: int
    per_host: int = 8

    @property
    def gpus(self) -> int:
        return self.hosts * self.per_host


class Start(NamedTuple):
    """Job `job` starts now with these GPUs (bit mask) of these hosts, one entry a replica; mask 0: any free ones."""

    job: int
    hosts: Sequence[int]
    masks: Sequence[int]


class Discipline(Protocol):
    """Who decides. `wake`: the next time at which it wants to be asked although nothing happens, or 0."""

    wake: int

    def decide(self, now: int, arrived: list[int], ended: list[int]) -> list[Start]:
        """What starts now."""
        ...


@dataclass
class Outcome:
    start: I64  # [J]
    received: F64  # [tenants] GPU-seconds over the time with demand
    entitled: F64
    received_waiting: F64  # the same over the time with waiting jobs only
    entitled_waiting: F64
    busy: float  # GPU-seconds up to the last submission
    span: int
    decisions: int

    def delay(self, work: Workload) -> float:
        """Mean seconds from submission to start."""
        return float((self.start - work.submit).mean())

    def utilisation(self, cluster: Cluster) -> float:
        """Share of all GPU-seconds between the first and the last submission that ran something."""
        return self.busy / (cluster.gpus * self.span)

    def fair_shares(self) -> F64:
        """Received / entitled by tenant (docstring of the module); nan for who has no job."""
        return np.where(self.entitled > 0, self.received / np.maximum(self.entitled, 1e-9), np.nan)

    def fair_shares_waiting(self) -> F64:
        """The same, over the time in which the tenant has waiting jobs; nan for who never waits."""
        return np.where(
            self.entitled_waiting > 0, self.received_waiting / np.maximum(self.entitled_waiting, 1e-9), np.nan
        )


@njit(cache=True)
def fair_division(demand: F64, capacity: float, out: F64) -> None:
    """Max-min fair division of `capacity` over `demand` [T], equal weights (water-filling), into `out`."""
    left, open_ = capacity, 0
    for i in range(len(demand)):
        out[i] = 0.0
        open_ += demand[i] > 0
    while open_ > 0 and left > 1e-9:
        level, used = left / open_, 0.0
        full = 0
        for i in range(len(demand)):
            lack = demand[i] - out[i]
            if lack > 0 and lack <= level:
                out[i] += lack
                used += lack
                full += 1
        if full == 0:
            for i in range(len(demand)):
                if demand[i] > out[i]:
                    out[i] += level
            return
        left -= used
        open_ -= full


@njit(cache=True)
def _integrate(dt: float, held: F64, waiting: F64, capacity: float, share: F64, sums: F64) -> None:
    """Adds an interval to sums [4, T]: received and entitled with demand, received and entitled with waiting jobs."""
    demand = held + waiting
    fair_division(demand, capacity, share)
    for i in range(len(held)):
        if demand[i] > 0:
            sums[0, i] += held[i] * dt
            sums[1, i] += share[i] * dt
            if waiting[i] > 0:
                sums[2, i] += held[i] * dt
                sums[3, i] += share[i] * dt


def simulate(work: Workload, cluster: Cluster, discipline: Discipline) -> Outcome:
    """Runs all jobs to their end. Raises WorkNotDoneError when something is double-booked or never starts."""
    count, width = len(work), work.width.tolist()
    submit, duration, tenant = work.submit.tolist(), work.duration.tolist(), work.tenant.tolist()
    per_job, full = work.gpus.tolist(), (1 << cluster.per_host) - 1
    free = [full] * cluster.hosts
    held, waiting = np.zeros(len(work.tenants)), np.zeros(len(work.tenants))
    share, sums = np.zeros(len(work.tenants)), np.zeros((4, len(work.tenants)))
    start = np.full(count, -1, np.int64)
    where: dict[int, list[tuple[int, int]]] = {}
    ends: list[tuple[int, int]] = []
    arriving, now, decisions, busy, in_use = 0, 0, 0, 0.0, 0
    last = submit[-1]
    while arriving < count or ends:
        upcoming = [submit[arriving]] if arriving < count else []
        if ends:
            upcoming.append(ends[0][0])
        if discipline.wake > now:
            upcoming.append(discipline.wake)
        then = min(upcoming)
        if then > now:
            _integrate(float(then - now), held, waiting, float(cluster.gpus), share, sums)
            busy += in_use * max(0, min(then, last) - min(now, last))
        now = then
        ended, arrived = [], []
        while ends and ends[0][0] <= now:
            job = heapq.heappop(ends)[1]
            ended.append(job)
            for host, mask in where.pop(job):
                free[host] |= mask
            held[tenant[job]] -= width[job]
            in_use -= width[job]
        while arriving < count and submit[arriving] <= now:
            arrived.append(arriving)
            waiting[tenant[arriving]] += width[arriving]
            arriving += 1
        for job, hosts, masks in discipline.decide(now, arrived, ended):
            taken = []
            require(start[job] < 0 and len(hosts) == work.replicas[job], f"job {job}: started twice, or not whole")
            for host, wish in zip(hosts, masks, strict=True):
                mask = wish or _lowest(free[host], per_job[job])
                require(
                    mask & ~free[host] == 0 and mask.bit_count() == per_job[job], f"job {job}: host {host} is taken"
                )
                free[host] ^= mask
                taken.append((host, mask))
            where[job], start[job] = taken, now
            heapq.heappush(ends, (now + duration[job], job))
            held[tenant[job]] += width[job]
            waiting[tenant[job]] -= width[job]
            in_use += width[job]
        decisions += 1
    require(bool((start >= work.submit).all()), f"{int((start < work.submit).sum())} jobs never started")
    return Outcome(start, sums[0], sums[1], sums[2], sums[3], busy, max(1, last), decisions)


def _lowest(free: int, count: int) -> int:
    mask = 0
    for _ in range(count):
        bit = free & -free
        mask |= bit
        free ^= bit
    return mask
