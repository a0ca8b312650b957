"""A discrete-event simulator of one cell of GPU hosts: arrivals, departures, gangs, tenants; the clock is injected.

    from benchmarks.simulator import Cluster, Workload, simulate
    simulate(work, cluster, Core(...)) -> Outcome
    simulate(work, cluster, Reserving(...), windows) -> Outcome      # with contracts for GPUs from one second to another

Time is integer seconds from the first arrival. A `Discipline` is told what arrived and what ended and says what starts now and
where; the simulator books GPUs one by one (a double booking raises), ends jobs after their true duration, and integrates. The
discipline sees estimates, never durations. Everybody gets the same workload, estimates included.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast

import numpy as np

from benchmarks.harness import require
from scheduler.core.types import I32, I64


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


class Window(NamedTuple):
    """A contract signed at `signed` s for `gpus` GPUs during [start, end) s: `chunk` of them on a host, all in one cell of `level`."""

    signed: int
    start: int
    end: int
    gpus: int
    chunk: int
    level: str


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


class Reserver(Discipline, Protocol):
    """Who also sells windows."""

    def reserve(self, now: int, job: int, window: Window) -> dict[int, int] | None:
        """Host -> the GPUs (bit mask) that are the window's while it lasts; None: refused. Its holder arrives as `job` when it begins,
        and must be started on them then and there.
        """
        ...


@dataclass
class Outcome:
    start: I64  # [J + W]: of jobs, then of the holders of windows (-1: refused)
    first: I64  # [J + 1]: replica r of job j stood on hosts[first[j] + r]
    hosts: I64
    busy: float  # GPU-seconds up to the last submission
    span: int
    decisions: int

    def delay(self, work: Workload) -> float:
        """Mean seconds from submission to start."""
        return float((self.start[: len(work)] - work.submit).mean())

    def utilisation(self, cluster: Cluster) -> float:
        """Share of all GPU-seconds between the first and the last submission that ran something."""
        return self.busy / (cluster.gpus * self.span)


def simulate(work: Workload, cluster: Cluster, discipline: Discipline, windows: Sequence[Window] = ()) -> Outcome:
    """Runs all jobs to their end, and all `windows` that are not refused: their holder is job number J + w, arrives when the window
    begins and leaves when it ends, however late it started. Raises WorkNotDoneError when something is double-booked or never starts,
    or a holder stands on other GPUs than its window's.
    """
    count, width = len(work), work.width.tolist() + [w.gpus for w in windows]
    submit, duration = work.submit.tolist(), work.duration.tolist()
    per_job, full = work.gpus.tolist() + [w.chunk for w in windows], (1 << cluster.per_host) - 1
    replicas = work.replicas.tolist() + [w.gpus // w.chunk for w in windows]
    free = [full] * cluster.hosts
    start = np.full(count + len(windows), -1, np.int64)
    first = np.concatenate([[0], np.cumsum(work.replicas)]).astype(np.int64)
    stood = np.zeros(first[-1], np.int64)
    where: dict[int, list[tuple[int, int]]] = {}
    ends: list[tuple[int, int]] = []
    contracts = [(w.signed, count + i) for i, w in enumerate(windows)]  # then (start, holder) of each that was sold
    heapq.heapify(contracts)
    sold: dict[int, dict[int, int]] = {}
    arriving, now, decisions, busy, in_use = 0, 0, 0, 0.0, 0
    last = submit[-1]
    while arriving < count or ends or contracts:
        upcoming = [submit[arriving]] if arriving < count else []
        if contracts:
            upcoming.append(contracts[0][0])
        if ends:
            upcoming.append(ends[0][0])
        if discipline.wake > now:
            upcoming.append(discipline.wake)
        then = min(upcoming)
        if then > now:
            busy += in_use * max(0, min(then, last) - min(now, last))
        now = then
        ended, arrived = [], []
        while ends and ends[0][0] <= now:
            job = heapq.heappop(ends)[1]
            ended.append(job)
            for host, mask in where.pop(job):
                free[host] |= mask
            in_use -= width[job]
        while arriving < count and submit[arriving] <= now:
            arrived.append(arriving)
            arriving += 1
        while contracts and contracts[0][0] <= now:
            holder = heapq.heappop(contracts)[1]
            if holder in sold:
                arrived.append(holder)
            elif found := cast("Reserver", discipline).reserve(now, holder, window := windows[holder - count]):
                sold[holder] = found
                heapq.heappush(contracts, (max(now, window.start), holder))
        for job, hosts, masks in discipline.decide(now, arrived, ended):
            taken = []
            require(start[job] < 0 and len(hosts) == replicas[job], f"job {job}: started twice, or not whole")
            for host, wish in zip(hosts, masks, strict=True):
                mask = wish or _lowest(free[host], per_job[job])
                require(
                    mask & ~free[host] == 0 and mask.bit_count() == per_job[job], f"job {job}: host {host} is taken"
                )
                free[host] ^= mask
                taken.append((host, mask))
            where[job], start[job] = taken, now
            if job < count:
                stood[first[job] : first[job + 1]] = [host for host, _ in taken]
                heapq.heappush(ends, (now + duration[job], job))
            else:
                own = sold[job]
                require(
                    all(mask & ~own.get(host, 0) == 0 for host, mask in taken), f"window {job - count}: not on its GPUs"
                )
                heapq.heappush(ends, (windows[job - count].end, job))
            in_use += width[job]
        decisions += 1
    idle = int((start[:count] < work.submit).sum()) + sum(start[job] < windows[job - count].start for job in sold)
    require(idle == 0, f"{idle} jobs never started")
    return Outcome(start, first, stood, busy, max(1, last), decisions)


def _lowest(free: int, count: int) -> int:
    mask = 0
    for _ in range(count):
        bit = free & -free
        mask |= bit
        free ^= bit
    return mask
