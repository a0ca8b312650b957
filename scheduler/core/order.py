"""The order in which waiting jobs are considered, and what past use of the cells weighs in it.

Contract kind (firm, flexible, on-demand, spot), then priority, then weighted dominant-resource fairness between
organizations (progressive filling: the organization with the least share per weight goes next, and each of its jobs in this
order adds that job's dominant share), then, among the jobs of one organization, `Policy.queue`:

    age        first come, first served
    shortest   least size first; size = GPUs x run time (s) / (1 + waited / patience)

The second is Smith's rule (weight one a job: least mean wait on one queue), aged so that nobody waits for ever: what has waited
n times `Policy.patience_s` counts as 1/(n + 1) of its size. It decides nothing between organizations, so nobody gains there by
small jobs or by a short time limit; and a limit is enforced, so a lie about it ends the job.

The share an organization starts with is `Request.usage / Policy.usage_scale`. Usage is what it holds now plus `PAST` times what it
held, each GPU-second weighing half as much per half-life (`decayed`); `scheduler.usage` computes it over all cells. The order is
made as if every job were placed: one that then waits has cost its organization a turn, not capacity.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Final

from scheduler.core.types import Fleet, Policy, Request

# The past outweighs the present: a running job cannot be taken away, so that what an organization holds too much today is made
# good only if it counts beyond its end. On the Philly trace the worst share of a week is 0.90 at once the past, 0.95 at 3 times and
# 0.96 at 10 times (decision 17).
PAST: Final = 3.0


def decayed(timeline: Iterable[tuple[float, float, float]], now: float, half_life: float) -> float:
    """Exponentially weighted mean of what was held: sum of amount * (2^-(age of end) - 2^-(age of start)), in the unit of amount.

    `timeline`: (amount, start s, end s), ends in the future count as now. Ages in half-lives. Somebody who always held x has x;
    who held x until one half-life ago has x / 2.
    """
    total = 0.0
    for amount, start, end in timeline:
        if start < now:
            total += amount * (2.0 ** ((min(end, now) - now) / half_life) - 2.0 ** ((start - now) / half_life))
    return total


def weighed(held: float, past: float) -> float:
    """Usage of an organization that holds `held` now and held `past` on (decayed) average."""
    return held + PAST * past


def size(r: Request, now_s: int, policy: Policy) -> float:
    """Aged size of a job, GPU-seconds (formula above). A job without GPUs counts as 1/64 of one."""
    work = r.replicas * max(r.gpus * r.gpu_milli / 1000, 1 / 64) * (r.duration_s or policy.unknown_s)
    return work / (1.0 + max(0, now_s - r.queued_at) / policy.patience_s)


def fair_order(fleet: Fleet, requests: Sequence[Request], policy: Policy | None = None, now_s: int = 0) -> list[int]:
    """Indices of the requests in the order of the module's docstring."""
    policy = policy or Policy()
    total = (
        max(1.0, float(fleet.gpu_count.sum()) * 1000),
        max(1.0, float(fleet.cpu_free.sum())),
        max(1.0, float(fleet.ram_free.sum())),
    )
    if policy.queue == "shortest":
        keys = [(r.kind, -r.priority, size(r, now_s, policy), r.queued_at, r.job) for r in requests]
    else:
        keys = [(r.kind, -r.priority, 0.0, r.queued_at, r.job) for r in requests]
    indices = sorted(range(len(requests)), key=keys.__getitem__)
    share: dict[int, float] = {}
    weight: dict[int, int] = {}
    for r in requests:
        share[r.org] = max(share.get(r.org, 0.0), r.usage / policy.usage_scale)
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
