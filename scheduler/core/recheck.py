"""The fit rule once more, on rows that a committer holds locked: admit what still fits, job by job, and book its watts.

Two passes over the same batch, each with a plain twin that its tests compare it with:
    admit  takes each job whole or not at all, in the plan's order, on GPUs that the plan chose, and subtracts it;
    book   gives admitted replicas their watts where every node above has them now, and leaves the rest waiting for miners.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from scheduler.core.fit_kernels import (
    ACTIVE,
    CLAIMED,
    CPU,
    CPU_ONLY,
    NGPU,
    NODE,
    NVME,
    OWED_CPU,
    OWED_NVME,
    OWED_RAM,
    POOL,
    Q_CPU,
    Q_GPUS,
    Q_MILLI,
    Q_NVLINK,
    Q_NVME,
    Q_RAM,
    Q_VRAM,
    RAM,
    TOTAL,
    claimed_kernel,
    delta_kernel,
    owed_kernel,
    popcount,
    shape_kernel,
    static_kernel,
    watts_bind,
    watts_kernel,
)
from scheduler.core.jit import kernel
from scheduler.core.state import State
from scheduler.core.types import I32, I64


class Batch(NamedTuple):
    """Planned replicas in the plan's order, those of a job side by side: P replicas of J jobs of C classes of requests.

    `pool`: of the row that the plan used (a reservation's, or what the host is listed in). `vram`: MiB held on each GPU.
    """

    first: I64  # [J + 1] where each job's replicas begin
    classes: I64  # [C, REQUEST_WIDTH]
    of: I64  # [J] class of each job
    host: I64  # [P] row of the state
    mask: I64  # [P] GPUs
    vram: I64  # [P]
    pool: I64  # [P]


@kernel
def check_kernel(row: I64, gfree: I32, vfree: I32, nvl: I64, q: I64, mask: int, vram: int) -> int:
    """Whether these GPUs are still what the request was promised: the stages of `fit._check_gpus`. A Reason."""
    milli, n = q[Q_MILLI], row[NGPU]
    if popcount(mask) != q[Q_GPUS] or mask >> n:
        return 10
    share = milli < 1000
    domain, linked = -2, True
    for i in range(n):
        if (mask >> i) & 1:
            if gfree[i] < milli or (not share and (row[ACTIVE] >> i) & 1):
                return 11 if share else 10
            if vfree[i] < vram:
                return 12
            linked = linked and nvl[i] >= 0 and (domain == -2 or nvl[i] == domain)
            domain = nvl[i]
    if q[Q_GPUS] > 1 and q[Q_NVLINK] == 2 and not linked:
        return 13
    claimed = claimed_kernel(row, q)
    if claimed and (claimed & mask or owed_kernel(row, q)):
        return 23
    return 0


@kernel
def _take(s: State, h: int, q: I64, mask: int, vram: int, delta: int, sign: int) -> None:
    """Subtract a replica (sign 1) or put it back (-1); the active mask is the caller's."""
    row = s.rows[h]
    milli = q[Q_MILLI]
    row[CPU] -= sign * q[Q_CPU]
    row[RAM] -= sign * q[Q_RAM]
    row[NVME] -= sign * q[Q_NVME]
    row[TOTAL] -= sign * milli * q[Q_GPUS]
    if mask & row[CLAIMED]:
        row[OWED_CPU] -= sign * q[Q_CPU]
        row[OWED_RAM] -= sign * q[Q_RAM]
        row[OWED_NVME] -= sign * q[Q_NVME]
    if mask == 0:
        row[CPU_ONLY] += sign
    for i in range(row[NGPU]):
        if (mask >> i) & 1:
            s.gfree[h, i] -= sign * milli
            s.vfree[h, i] -= sign * vram
    node = row[NODE]
    while node >= 0:
        s.budget[node] -= sign * delta * s.k[node]
        node = s.parent[node]


@kernel
def admit_kernel(s: State, b: Batch, reason: I64, delta: I64, active: I64) -> None:
    for j in range(len(b.of)):
        q = b.classes[b.of[j]]
        bad = 0
        p = b.first[j]
        while p < b.first[j + 1]:
            h, mask = b.host[p], b.mask[p]
            row = s.rows[h]
            row[POOL] = b.pool[p]
            vram = max(b.vram[p], q[Q_VRAM])
            bad = static_kernel(row, q)
            if bad == 0:
                bad = shape_kernel(row, q)
            if bad == 0:
                bad = check_kernel(row, s.gfree[h], s.vfree[h], s.nvl[h], q, mask, vram)
            if bad == 0:
                delta[p] = delta_kernel(row, mask)
                if watts_bind(row[NODE], delta[p], s.parent, s.k, s.budget) >= 0:
                    bad = 14
            if bad:
                break
            active[p] = row[ACTIVE]
            _take(s, h, q, mask, vram, delta[p], 1)
            row[ACTIVE] |= mask
            p += 1
        reason[j] = bad
        if bad:
            while p > b.first[j]:
                p -= 1
                h = b.host[p]
                _take(s, h, q, b.mask[p], max(b.vram[p], q[Q_VRAM]), delta[p], -1)
                s.rows[h, ACTIVE] = active[p]


def admit(s: State, b: Batch) -> tuple[I64, I64]:
    """(Reason of each job [J], W that each replica adds to its host [P]). `s` is left with what was admitted subtracted."""
    reason, delta, active = (np.zeros(n, np.int64) for n in (len(b.of), len(b.host), len(b.host)))
    admit_kernel(s, b, reason, delta, active)
    return reason, delta


def barred(s: State, b: Batch) -> I64:
    """Reason of each job to which some of its hosts is closed however empty it were [J]; 0 for the others."""
    out = np.zeros(len(b.of), np.int64)
    for j, (begin, end) in enumerate(pairwise(b.first.tolist())):
        for p in range(begin, end):
            row = s.rows[b.host[p]].copy()
            row[POOL] = b.pool[p]
            out[j] = out[j] or static_kernel(row, b.classes[b.of[j]])
    return out


class Power(NamedTuple):
    """The books at the hosts of the state [H] and at its nodes [N]."""

    use: I64  # bits of GPUs whose placements' watts are granted
    cpu_only: I64  # whether a granted placement has no GPU
    reserved_w: I64
    may_grant: I64  # whether its site grants now, be it watts that stand booked for the host already
    may_raise: I64  # whether it books more for a host now: nobody waits there since before
    free_mw: I64  # [N]


@kernel
def book_kernel(s: State, power: Power, host: I64, mask: I64, granted: I64, delta: I64) -> None:
    for p in range(len(host)):
        h = host[p]
        row = s.rows[h]
        use = power.use[h] | mask[p]
        alone = 1 if (power.cpu_only[h] or mask[p] == 0) else 0
        target = watts_kernel(row, use, alone)
        more = max(0, target - power.reserved_w[h])
        delta[p] = more
        if power.may_grant[h] == 0:
            continue
        if more > 0 and (power.may_raise[h] == 0 or watts_bind(row[NODE], more, s.parent, s.k, power.free_mw) >= 0):
            continue
        granted[p] = 1
        power.use[h], power.cpu_only[h] = use, alone
        power.reserved_w[h] += more
        node = row[NODE]
        while node >= 0:
            power.free_mw[node] -= more * s.k[node]
            node = s.parent[node]


def book(s: State, power: Power, host: I64, mask: I64) -> tuple[I64, I64]:
    """(1 for each replica whose watts are booked now [P], W by which its host's reservation grows [P]); `power` is changed."""
    granted, delta = np.zeros(len(host), np.int64), np.zeros(len(host), np.int64)
    book_kernel(s, power, host, mask, granted, delta)
    return granted, delta
