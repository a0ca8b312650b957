"""What tenants got of what max-min fairness owed them, over accounting windows; and how much of it a run could have given them.

At each instant a tenant's *demand* is the GPUs of its jobs that run or wait, its *fair division* the max-min (water-filling) division
of all GPUs over the demands, equal weights, and what it *received* the GPUs that its jobs hold. The time in which it has demand is cut
into windows; in each it was *owed* the integral of its division, but no more than the work that it had to do there: the GPU-seconds
that its jobs could have run in the window had each run whenever it was there. Its fair share is received / owed, both summed over
the windows. 1 or more: it got all that it was owed.

    a week      the span over which batch schedulers settle fair shares (the usual half-life of usage in Slurm is seven days)
    INSTANT     no windows and no limit by work: a job of ten seconds that waits an hour is owed its GPUs for the hour

Where nobody may be preempted, INSTANT is out of reach for a tenant with a few short wide jobs: no policy knows that they will come,
and when they are there the hosts are taken. `reachable` says how far: the share that each tenant could have had in this run if,
whenever a job of its own came, everybody else had stopped starting jobs until it fitted.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import njit

from benchmarks.simulator import Cluster, Outcome, Workload
from scheduler.core.types import F64, I64

INSTANT: Final = 0
DAY: Final = 86_400
WEEK: Final = 7 * DAY
_END, _SUBMIT, _START = range(3)


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
def _integrate(
    time: I64, kind: I64, job: I64, width: I64, tenant: I64, capacity: float, window: int, sums: F64
) -> None:
    """Events in order -> sums [2, windows, T]: GPU-seconds held, and those of the fair division."""
    tenants = sums.shape[2]
    held, waiting, share = np.zeros(tenants), np.zeros(tenants), np.zeros(tenants)
    now = time[0]
    for e in range(len(time)):
        if time[e] > now:
            fair_division(held + waiting, capacity, share)
            while now < time[e]:
                w = now // window
                until = min(time[e], (w + 1) * window)
                sums[0, w] += held * (until - now)
                sums[1, w] += share * (until - now)
                now = until
        j = job[e]
        if kind[e] == _END:
            held[tenant[j]] -= width[j]
        elif kind[e] == _SUBMIT:
            waiting[tenant[j]] += width[j]
        else:
            waiting[tenant[j]] -= width[j]
            held[tenant[j]] += width[j]


@njit(cache=True)
def _work(submit: I64, start: I64, duration: I64, width: I64, tenant: I64, window: int, out: F64) -> None:
    """Adds to out [windows, T] the GPU-seconds that jobs could have run in each window while they ran or waited."""
    for j in range(len(submit)):
        end = start[j] + duration[j]
        for w in range(submit[j] // window, (end - 1) // window + 1):
            begin = max(w * window, submit[j])
            done = min(max(begin - start[j], 0), duration[j])
            out[w, tenant[j]] += width[j] * min(duration[j] - done, (w + 1) * window - begin)


def shares(work: Workload, cluster: Cluster, start: I64, window: int = WEEK) -> F64:
    """Fair share of each tenant [T] (docstring of the module) in a run with these start times; nan for who has no job."""
    received, owed = balance(work, cluster, start, window)
    return np.where(owed > 0, received / np.maximum(owed, 1e-9), np.nan)


def balance(work: Workload, cluster: Cluster, start: I64, window: int) -> tuple[F64, F64]:
    """(received, owed) GPU-seconds of each tenant [T]."""
    tenant, width = work.tenant.astype(np.int64), work.width
    end = start + work.duration
    span = window or int(end.max())
    sums = np.zeros((2, int(end.max()) // span + 1, len(work.tenants)))
    _integrate(*_events(work, start), width, tenant, float(cluster.gpus), span, sums)
    received, owed = sums
    if window:
        most = np.zeros_like(owed)
        _work(work.submit, start, work.duration, width, tenant, window, most)
        owed = np.minimum(owed, most)
    return received.sum(axis=0), owed.sum(axis=0)


def reachable(work: Workload, cluster: Cluster, found: Outcome) -> F64:
    """An upper bound on each tenant's INSTANT share [T] for whoever preempts nobody and has the hosts as this run had them when
    the tenant's jobs came: each job starts as soon as running ones that truly end leave it room, as if nothing else started and
    its tenant had no other. What others demand is as it was, so less is owed than whatever could have happened.
    """
    earliest = np.empty(len(work), np.int64)
    _drained(
        *_events(work, found.start),
        *(work.submit, found.start + work.duration, work.gpus.astype(np.int64), work.replicas.astype(np.int64)),
        *(found.first, found.hosts, np.int64(cluster.per_host), np.zeros(cluster.hosts, np.int64), earliest),
    )
    best = np.full(len(work.tenants), np.nan)
    for t in np.unique(work.tenant).tolist():
        start = np.where(work.tenant == t, np.minimum(earliest, found.start), found.start)
        received, owed = balance(work, cluster, start, INSTANT)
        best[t] = received[t] / owed[t]
    return best


def _events(work: Workload, start: I64) -> tuple[I64, I64, I64]:
    """(time, kind, job) of everything that happens, in order; at one instant ends come first and starts last."""
    count = len(work)
    time = np.concatenate([start + work.duration, work.submit, start])
    kind = np.repeat(np.array([_END, _SUBMIT, _START], np.int64), count)
    order = np.lexsort((kind, time))
    return time[order], kind[order], np.tile(np.arange(count, dtype=np.int64), 3)[order]


@njit(cache=True)
def _drained(
    time: I64,
    kind: I64,
    job: I64,
    submit: I64,
    end: I64,
    gpus: I64,
    replicas: I64,
    first: I64,
    hosts: I64,
    per_host: int,
    used: I64,
    out: I64,
) -> None:
    """When each job would fit if from its submission on jobs only ended: out [J]. hosts[first[j]:first[j + 1]] are those of j."""
    running = np.empty(len(used) * per_host, np.int64)
    count = 0
    for e in range(len(time)):
        j = job[e]
        if kind[e] == _END:
            for i in range(count):
                if running[i] == j:
                    count -= 1
                    running[i] = running[count]
                    break
            for p in range(first[j], first[j + 1]):
                used[hosts[p]] -= gpus[j]
        elif kind[e] == _START:
            running[count] = j
            count += 1
            for p in range(first[j], first[j + 1]):
                used[hosts[p]] += gpus[j]
        else:
            left = used.copy()
            room = ((per_host - left) // gpus[j]).sum()
            out[j] = submit[j]
            if room >= replicas[j]:
                continue
            for i in np.argsort(end[running[:count]]):
                k = running[i]
                for p in range(first[k], first[k + 1]):
                    room -= (per_host - left[hosts[p]]) // gpus[j]
                    left[hosts[p]] -= gpus[k]
                    room += (per_host - left[hosts[p]]) // gpus[j]
                if room >= replicas[j]:
                    out[j] = end[k]
                    break
