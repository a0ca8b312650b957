"""The hot loop: score table [class x host], re-scored lazily from a change log, with a three-level arg-max.

A class is a distinct request vector. Its row of the table holds one int32 score per host (`NEVER`: no placement of
this plan
can change that; `NO`: not now) under two levels of block maxima (64 hosts, 64 blocks), so that finding the best host
reads
about 64 numbers per level and a changed host costs one block. A class catches up with the log of changed hosts when
it is next
asked for. Watts bind many hosts at once, so they are tested on the arg-max only: a host that fails becomes `NO` until
it
changes or until something gives watts back (`META_EPOCH`). Hosts in equal states share one score when a row is filled.
Ties go to the first host: the planner permutes hosts by its seed.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from scheduler.core.fit import (
    ACTIVE,
    CPU,
    CPU_ONLY,
    HELD,
    MODEL,
    NGPU,
    NODE,
    NVME,
    Q_CPU,
    Q_GPUS,
    Q_HOLD,
    Q_MILLI,
    Q_NVLINK,
    Q_NVME,
    Q_RAM,
    Q_VRAM,
    RAM,
    TOTAL,
    choose_kernel,
    delta_kernel,
    static_kernel,
    watts_bind,
)
from scheduler.core.jit import inlined, inlined_sum, kernel
from scheduler.core.score import TABLE_SCALE, Tables
from scheduler.core.types import F64, I16, I32, I64

NEVER: Final = -(2**31)
NO: Final = -(2**31) + 1
BLOCK: Final = 64
_FAR: Final = 2**31 - 1
_SCALE: Final = TABLE_SCALE
META_LOG, META_EPOCH, META_HAND, META_STAMP, META_RESCORED, META_FILLED = range(6)
META_WIDTH: Final = 8

U8 = npt.NDArray[np.uint8]


class State(NamedTuple):
    """Hosts and nodes as they stand in the plan, mutable. Columns of `rows` are named in `fit`."""

    rows: I64  # [H, 24]
    gfree: I32  # [H, 16]
    vfree: I32  # [H, 16]
    nvl: I16  # [H, 16]
    parent: I32  # [N]
    k: I32  # [N]
    budget: I64  # [N] mW still admissible: free + reclaimable - placed
    frag: I64  # [H] F x total weight, as it stands
    balance: F64  # [H] balance terms, as they stand


class Cache(NamedTuple):
    """The score table of S slots and its bookkeeping."""

    tab: I32  # [S, 64 * B1]
    b1: I32  # [S, 64 * B2]
    b2: I32  # [S, B2]
    seen: I64  # [S] how much of the log the slot has read
    epoch: I64  # [S]
    slot_of: I64  # [C] -1: none
    class_of: I64  # [S] -1: none
    log: I32  # changed hosts
    stamp: I64  # [H] last catch-up that re-scored the host
    group: I32  # [H] hosts in equal states at the start, -1 once changed
    memo: I32  # [groups]
    memo_of: I64  # [groups] the fill that wrote memo
    meta: I64  # [META_WIDTH]


@inlined
def cpu_rank(cpus: I64, cpu: int) -> int:
    """How many of the ascending `cpus` are <= cpu."""
    low, high = 0, len(cpus)
    while low < high:
        mid = (low + high) >> 1
        if cpus[mid] <= cpu:
            low = mid + 1
        else:
            high = mid
    return low


@inlined
def fragmentation(row: I64, g: I32, t: Tables) -> int:
    """F of a host x total weight: free milli-GPU minus what each shape of the mix could use of it."""
    y = max(row[MODEL], 0)
    rank = cpu_rank(t.cpus, row[CPU])
    share = t.usable_share[y, rank]
    used = np.int64(0)
    whole = 0
    for i in range(row[NGPU]):
        used += g[i] * share[t.share_rank[g[i]]]
        if g[i] >= 1000:
            whole += 1
    return row[TOTAL] * t.total - used - 1000 * whole * t.usable_whole[y, rank, whole]  # type: ignore[no-any-return]


@inlined_sum
def balance(total: float, cpu: float, ram: float, t: Tables) -> float:
    """Free milli-GPU that the free CPU (w_cpu), or CPU and memory (w_mem), could never serve, over the mix.

    The sum may be taken in any order (three times faster): its last bits are far below the 1/64 milli-GPU of a score.
    """
    a = 0.0
    b = 0.0
    for m in range(len(t.weight)):
        lack = max(0.0, total - t.rho[m] * cpu)
        lack_either = max(lack, total - t.sigma[m] * ram)
        a += t.weight[m] * lack
        b += t.weight[m] * lack_either
    return t.w_cpu * a + t.w_mem * b


@inlined
def score_host(h: int, q: I64, s: State, t: Tables) -> tuple[Any, int]:
    """(score, GPU mask) of one replica on a host whose static stages passed; score NO when it does not fit.

    The mask is chosen here for shares only. Two-dimensional look-ups on purpose: a row view costs a reference count.
    """
    rows, g = s.rows, s.gfree
    need, milli = q[Q_GPUS], q[Q_MILLI]
    total = rows[h, TOTAL] - need * milli
    cpu = rows[h, CPU] - q[Q_CPU]
    ram = rows[h, RAM] - q[Q_RAM]
    if total < 0 or cpu < 0 or ram < 0 or rows[h, NVME] < q[Q_NVME] or (q[Q_HOLD] and rows[h, HELD]):
        return NO, 0
    n = rows[h, NGPU]
    shared = need == 1 and milli < 1000
    picky = need > 0 and not shared and (q[Q_VRAM] > 0 or q[Q_NVLINK] == 2)
    if picky and choose_kernel(rows[h], g[h], s.vfree[h], s.nvl[h], q)[0]:
        return NO, 0
    y = max(rows[h, MODEL], 0)
    rank = cpu_rank(t.cpus, cpu)
    used, whole = np.int64(0), np.int64(0)
    top = t.usable_share[y, rank, t.share_rank[1000]] * 1000
    for i in range(n):
        gi = g[h, i]
        if gi >= 1000:
            whole += 1
            used += top
        elif gi > 0:
            used += gi * t.usable_share[y, rank, t.share_rank[gi]]
    if not shared and whole < need:
        return NO, 0
    base = 0.0
    if t.mode == 2:
        base = 1000.0 * (1.0 - 0.5 * cpu / t.cpu_cap - 0.5 * total / t.gpu_cap)
    elif t.mode == 0:
        base = s.balance[h] - balance(total, cpu, ram, t) - t.spec[y] * need * milli
        if need <= 1 and whole == n and n > 0 and rows[h, CPU_ONLY] == 0:
            base -= t.opening[y, n]
    if not shared:
        if t.mode == 2:
            return np.int64(_SCALE * base), 0
        left = whole - need
        after = total * t.total - (used - need * top) - 1000 * left * t.usable_whole[y, rank, left]
        gain = np.float64(s.frag[h] - after) / t.total
        if t.mode == 1:
            return np.int64(100.0 / (1.0 + np.exp(-gain / 1000.0))), 0
        return np.int64(np.floor(_SCALE * (base + t.w_frag * gain) + 0.5)), 0
    best, best_i = np.int64(NO), -1
    last = -1
    for i in range(n):
        gi = g[h, i]
        if gi < milli or gi == last or s.vfree[h, i] < q[Q_VRAM]:
            continue
        last = gi
        rest = gi - milli
        if t.mode == 2:
            v = np.int64(_SCALE * base) - rest
        else:
            left = whole - (1 if gi >= 1000 else 0)
            u = used + rest * t.usable_share[y, rank, t.share_rank[rest]]
            u -= top if gi >= 1000 else gi * t.usable_share[y, rank, t.share_rank[gi]]
            after = total * t.total - u - 1000 * left * t.usable_whole[y, rank, left]
            gain = np.float64(s.frag[h] - after) / t.total
            if t.mode == 1:
                v = np.int64(100.0 / (1.0 + np.exp(-gain / 1000.0)))
            else:
                v = np.int64(np.floor(_SCALE * (base + t.w_frag * gain + t.hole[rest] - t.hole[gi]) + 0.5))
        if v > best:
            best, best_i = v, i
    return best, (1 << best_i if best_i >= 0 else 0)


@inlined
def refresh_host(h: int, s: State, t: Tables) -> None:
    """What the score remembers of a host's state."""
    if t.mode != 2:
        row = s.rows[h]
        s.frag[h] = fragmentation(row, s.gfree[h], t)
        if t.mode == 0:
            s.balance[h] = balance(row[TOTAL], row[CPU], row[RAM], t)


@kernel
def refresh_all(s: State, t: Tables) -> None:
    for h in range(len(s.rows)):
        refresh_host(h, s, t)


@inlined
def take(h: int, q: I64, mask: int, s: State) -> int:
    """Books one replica; returns the W its host's reservation grew by. Budgets at every ancestor go down."""
    row = s.rows[h]
    delta = delta_kernel(row, mask)
    row[CPU] -= q[Q_CPU]
    row[RAM] -= q[Q_RAM]
    row[NVME] -= q[Q_NVME]
    row[TOTAL] -= q[Q_GPUS] * q[Q_MILLI]
    row[ACTIVE] |= mask
    if mask == 0:
        row[CPU_ONLY] += 1
    g, v = s.gfree[h], s.vfree[h]
    for i in range(row[NGPU]):
        if (mask >> i) & 1:
            g[i] -= q[Q_MILLI]
            v[i] -= q[Q_VRAM]
    if delta:
        node = row[NODE]
        while node >= 0:
            s.budget[node] -= delta * s.k[node]
            node = s.parent[node]
    return delta


@kernel
def give(h: int, q: I64, mask: int, s: State) -> int:
    """Undoes `take`; returns the W given back."""
    row = s.rows[h]
    row[CPU] += q[Q_CPU]
    row[RAM] += q[Q_RAM]
    row[NVME] += q[Q_NVME]
    row[TOTAL] += q[Q_GPUS] * q[Q_MILLI]
    if mask == 0:
        row[CPU_ONLY] -= 1
    g, v = s.gfree[h], s.vfree[h]
    for i in range(row[NGPU]):
        if (mask >> i) & 1:
            g[i] += q[Q_MILLI]
            v[i] += q[Q_VRAM]
            if g[i] >= 1000:
                row[ACTIVE] &= ~(1 << i)
    delta = delta_kernel(row, mask)
    if delta:
        node = row[NODE]
        while node >= 0:
            s.budget[node] += delta * s.k[node]
            node = s.parent[node]
    return delta


@inlined
def note_change(h: int, c: Cache) -> None:
    """Appends a host to the change log. A full log starts over, and every slot fills itself anew."""
    if c.meta[META_LOG] == len(c.log):
        c.meta[META_LOG] = 0
        c.meta[META_EPOCH] += 1
    c.log[c.meta[META_LOG]] = h
    c.meta[META_LOG] += 1
    c.group[h] = -1


@kernel
def _fill(slot: int, q: I64, s: State, t: Tables, c: Cache) -> None:
    c.meta[META_STAMP] += 1
    c.meta[META_FILLED] += 1
    mark = c.meta[META_STAMP]
    tab = c.tab[slot]
    for h in range(len(s.rows)):
        if static_kernel(s.rows[h], q):
            tab[h] = NEVER
            continue
        group = c.group[h]
        if group >= 0 and c.memo_of[group] == mark:
            tab[h] = c.memo[group]
            continue
        value, _ = score_host(h, q, s, t)
        tab[h] = value
        if group >= 0:
            c.memo[group] = value
            c.memo_of[group] = mark
    tab[len(s.rows) :] = NEVER
    b1, b2 = c.b1[slot], c.b2[slot]
    for b in range(len(b1)):
        b1[b] = NEVER
        if b * BLOCK < len(tab):
            for i in range(b * BLOCK, (b + 1) * BLOCK):
                b1[b] = max(b1[b], tab[i])
    for b in range(len(b2)):
        b2[b] = NEVER
        for i in range(b * BLOCK, (b + 1) * BLOCK):
            b2[b] = max(b2[b], b1[i])


@inlined
def put(slot: int, h: int, value: int, c: Cache) -> None:
    """Writes one score and repairs the maxima above it."""
    tab = c.tab[slot]
    old = tab[h]
    if old == value:
        return
    tab[h] = value
    b1, b2 = c.b1[slot], c.b2[slot]
    b = h // BLOCK
    top = b1[b]
    if value >= top:
        new = np.int32(value)
    elif old == top:
        new = np.int32(NEVER)
        for i in range(b * BLOCK, (b + 1) * BLOCK):
            new = max(new, tab[i])
    else:
        return
    if new == top:
        return
    b1[b] = new
    p = b // BLOCK
    if new >= b2[p]:
        b2[p] = new
    elif top == b2[p]:
        new = np.int32(NEVER)
        for i in range(p * BLOCK, (p + 1) * BLOCK):
            new = max(new, b1[i])
        b2[p] = new


@inlined
def ensure(k: int, q: I64, s: State, t: Tables, c: Cache) -> int:
    """The slot of class k, up to date with every change."""
    slot = c.slot_of[k]
    if slot < 0:
        slot = c.meta[META_HAND]  # slots are taken in turn: a class that lost its own fills anew
        c.meta[META_HAND] = (slot + 1) % len(c.class_of)
        if c.class_of[slot] >= 0:
            c.slot_of[c.class_of[slot]] = -1
        c.class_of[slot] = k
        c.slot_of[k] = slot
        c.epoch[slot] = -1
    if c.epoch[slot] != c.meta[META_EPOCH]:
        _fill(slot, q, s, t, c)
        c.epoch[slot] = c.meta[META_EPOCH]
        c.seen[slot] = c.meta[META_LOG]
        return slot  # type: ignore[no-any-return]
    start, end = c.seen[slot], c.meta[META_LOG]
    if start < end:
        c.meta[META_STAMP] += 1
        mark = c.meta[META_STAMP]
        tab = c.tab[slot]
        for at in range(start, end):
            h = c.log[at]
            if c.stamp[h] == mark or tab[h] == NEVER:
                continue
            c.stamp[h] = mark
            value, _ = score_host(h, q, s, t)
            c.meta[META_RESCORED] += 1
            put(slot, h, value, c)
        c.seen[slot] = end
    return slot  # type: ignore[no-any-return]


@inlined
def first_best(slot: int, c: Cache) -> int:
    """The first host with the largest score, or -1 when no host fits."""
    b2 = c.b2[slot]
    top = np.int32(NEVER)
    p = 0
    for i in range(len(b2)):
        if b2[i] > top:
            top = b2[i]
            p = i
    if top <= NO:
        return -1
    b1 = c.b1[slot]
    b = p * BLOCK
    while b1[b] != top:
        b += 1
    tab = c.tab[slot]
    h = b * BLOCK
    while tab[h] != top:
        h += 1
    return h


@inlined
def pick(k: int, q: I64, s: State, t: Tables, c: Cache) -> tuple[int, int]:
    """(host, GPU mask) for one replica of class k, watts included, or (-1, 0)."""
    slot = ensure(k, q, s, t, c)
    shared = q[Q_GPUS] == 1 and q[Q_MILLI] < 1000
    while True:
        h = first_best(slot, c)
        if h < 0:
            return -1, 0
        row = s.rows[h]
        if shared:
            _, mask = score_host(h, q, s, t)
            if watts_bind(row[NODE], delta_kernel(row, mask), s.parent, s.k, s.budget) < 0:
                return h, mask
        # The rule's own choice: for shares, the one that costs the fewest watts.
        reason, mask = choose_kernel(row, s.gfree[h], s.vfree[h], s.nvl[h], q)
        if reason == 0 and watts_bind(row[NODE], delta_kernel(row, mask), s.parent, s.k, s.budget) < 0:
            return h, mask
        put(slot, h, NO, c)


@kernel
def place_run(
    start: int, seq: I32, stop: U8, qs: I64, s: State, t: Tables, c: Cache, host: I32, mask: I32, delta: I32
) -> int:
    """Places one replica after another, from seq[start] on: classes in, host (-1: none), GPU mask and W out.

    Returns the index after the last one considered; it stops after one that did not fit and has `stop` set.
    """
    for i in range(start, len(seq)):
        k = seq[i]
        q = qs[k]
        h, m = pick(k, q, s, t, c)
        host[i] = h
        mask[i] = m
        if h < 0:
            if stop[i]:
                return i + 1
            continue
        delta[i] = take(h, q, m, s)
        refresh_host(h, s, t)
        note_change(h, c)
    return len(seq)


@kernel
def undo_run(start: int, end: int, seq: I32, qs: I64, s: State, t: Tables, c: Cache, host: I32, mask: I32) -> None:
    """Takes back seq[start:end], last first."""
    for i in range(end - 1, start - 1, -1):
        if host[i] >= 0:
            give(host[i], qs[seq[i]], mask[i], s)
            refresh_host(host[i], s, t)
            note_change(host[i], c)
            host[i] = -1
    c.meta[META_EPOCH] += 1  # watts came back: hosts marked NO for want of them count again
