"""Hosts as they stand in a plan: what a replica on one of them is worth, and what taking it or giving it back changes."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np

from scheduler.core.fit_kernels import (
    ACTIVE,
    CLAIM,
    CLAIMED,
    CPU,
    CPU_ONLY,
    FLAGS,
    HELD,
    MODEL,
    NGPU,
    NODE,
    NVME,
    OWED_CPU,
    OWED_NVME,
    OWED_RAM,
    OWNER,
    Q_CPU,
    Q_GPUS,
    Q_HOLD,
    Q_MILLI,
    Q_NVLINK,
    Q_NVME,
    Q_RAM,
    Q_STAYS,
    Q_VRAM,
    RAM,
    TOTAL,
    choose_kernel,
    delta_kernel,
    vram_kernel,
)
from scheduler.core.jit import inlined, inlined_sum, kernel
from scheduler.core.score import TABLE_SCALE, Tables
from scheduler.core.types import BLOCKING, F64, I16, I32, I64, MAX_GPUS, HostFlag

NO: Final = -(2**31) + 1  # the score of a host on which the request does not fit now
IDLE: Final = 2  # column of State.counted
_SCALE: Final = TABLE_SCALE
_SCHEDULABLE: Final = int(HostFlag.SCHEDULABLE)
_BLOCKING: Final = BLOCKING
_GRID: Final = 16
_STEPS: Final = (1.150, 0.319, -0.319, -1.150)  # beyond these a normal variable lies with chances 1/8, 3/8, 5/8, 7/8


class State(NamedTuple):
    """Hosts and nodes as they stand in the plan, mutable. Columns of `rows` are named in `fit`."""

    rows: I64  # [H, HOST_WIDTH]
    gfree: I32  # [H, 16]
    vfree: I32  # [H, 16]
    nvl: I16  # [H, 16]
    parent: I32  # [N]
    k: I32  # [N]
    budget: I64  # [N] mW still admissible: free + reclaimable - placed
    frag: I64  # [H] F x total weight, as it stands
    balance: F64  # [H] balance terms, as they stand
    counted: I64  # [H, 3] free milli-GPU, free milli-CPU, and idle GPUs that requests for several could use; 0: closed to all
    left: I64  # [2] milli-GPU and milli-CPU counted
    slots: I64  # [17] how many requests for z GPUs the counted could serve, each size alone
    price: F64  # [17] of a slot of z GPUs, milli-GPU
    worth: F64  # [17] of w idle GPUs of a host, as slots, milli-GPU


def unscored(hosts: int) -> dict[str, Any]:
    """The columns of a state that the score fills (`refresh_all`), for so many hosts."""
    return {
        "frag": np.zeros(hosts, np.int64),
        "balance": np.zeros(hosts, np.float64),
        "counted": np.zeros((hosts, 3), np.int64),
        "left": np.zeros(2, np.int64),
        "slots": np.zeros(MAX_GPUS + 1, np.int64),
        "price": np.zeros(MAX_GPUS + 1, np.float64),
        "worth": np.zeros(MAX_GPUS + 1, np.float64),
    }


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
    claimed = np.int64(0)  # `claimed_kernel`
    if q[Q_STAYS] and 0 < rows[h, CLAIM] < q[Q_STAYS]:
        claimed = rows[h, CLAIMED]
    if (picky or claimed) and choose_kernel(rows[h], g[h], s.vfree[h], s.nvl[h], q)[0]:
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
    base, broken = 0.0, 0.0  # broken: the slots that a share on an idle GPU takes besides
    if t.mode == 2:
        base = 1000.0 * (1.0 - 0.5 * cpu / t.cpu_cap - 0.5 * total / t.gpu_cap)
    elif t.mode == 0:
        base = s.balance[h] - balance(total, cpu, ram, t) - t.spec[y] * need * milli
        if need <= 1 and whole == n and n > 0 and rows[h, CPU_ONLY] == 0:
            base -= t.opening
        if s.worth[s.counted[h, IDLE]] > 0.0:
            room = cpu // t.slot_cpu
            base -= s.worth[s.counted[h, IDLE]] - s.worth[min(whole - (0 if shared else need), room)]
            if shared and room >= whole:
                broken = s.worth[whole] - s.worth[whole - 1]
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
    last, vram = -1, vram_kernel(rows[h], q)
    for i in range(n):
        gi = g[h, i]
        if gi < milli or gi == last or (claimed >> i) & 1 or s.vfree[h, i] < vram:
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
                worth = base + t.w_frag * gain + t.hole[rest] - t.hole[gi] - (broken if gi >= 1000 else 0.0)
                v = np.int64(np.floor(_SCALE * worth + 0.5))
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
            _count(h, s, t)


@inlined
def _count(h: int, s: State, t: Tables) -> None:
    """Counts a host among what is left for requests of several GPUs, as it stands now instead of before."""
    row, counted = s.rows[h], s.counted[h]
    free, cpu, idle = np.int64(0), np.int64(0), np.int64(0)
    if row[FLAGS] & _SCHEDULABLE and not row[FLAGS] & _BLOCKING and row[OWNER] <= 0 and row[HELD] == 0:
        free, cpu = row[TOTAL], row[CPU]
        for i in range(row[NGPU]):
            if s.gfree[h, i] >= 1000:
                idle += 1
        idle = min(idle, cpu // t.slot_cpu)
    s.left[0] += free - counted[0]
    s.left[1] += cpu - counted[1]
    if idle != counted[IDLE]:
        for j in range(len(t.slot_size)):
            z = t.slot_size[j]
            s.slots[z] += idle // z - counted[IDLE] // z
    counted[0], counted[1], counted[IDLE] = free, cpu, idle


@inlined
def price_slots(s: State, t: Tables) -> int:
    """Sets the prices of slots anew; returns the least size whose price changed, 0 when none did.

    A slot is worth so much of its price as the chance that it will be wanted (Littlewood's rule, 1972): that more requests
    than there are slots come before the hosts are full, by GPU or by CPU; Poisson arrivals, in the normal approximation.
    Prices move in four steps and what is left is read off a grid of sixteen steps an octave, so that they seldom do.
    """
    if t.mode or len(t.slot_size) == 0:
        return 0
    room, octaves = int(min(np.float64(s.left[0]), t.gpu_per_cpu * s.left[1])), 0
    while room >= 2 * _GRID:
        room, octaves = room >> 1, octaves + 1
    room = max(1, room << octaves)
    least = 0
    for j in range(len(t.slot_size) - 1, -1, -1):
        z, wanted = t.slot_size[j], t.slot_rate[j] * room
        x, level = (s.slots[z] - 0.5 - wanted) / np.sqrt(wanted), 0
        for step in _STEPS:
            level += x < step
        price = t.slot_price * level / len(_STEPS)
        if price != s.price[z]:
            s.price[z] = price
            least = z
    if least:
        for w in range(len(s.worth)):
            s.worth[w] = 0.0
            for j in range(len(t.slot_size)):
                s.worth[w] += s.price[t.slot_size[j]] * (w // t.slot_size[j])
    return least


@kernel
def refresh_all(s: State, t: Tables) -> None:
    """`refresh_host` for all hosts, and the prices of slots."""
    s.counted[:] = 0
    s.left[:] = 0
    s.slots[:] = 0
    s.price[:] = 0.0
    s.worth[:] = 0.0
    for h in range(len(s.rows)):
        refresh_host(h, s, t)
    price_slots(s, t)


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
    if mask & row[CLAIMED]:  # what it holds comes back with the GPUs
        row[OWED_CPU] -= q[Q_CPU]
        row[OWED_RAM] -= q[Q_RAM]
        row[OWED_NVME] -= q[Q_NVME]
    if mask == 0:
        row[CPU_ONLY] += 1
    g, v, vram = s.gfree[h], s.vfree[h], vram_kernel(row, q)
    for i in range(row[NGPU]):
        if (mask >> i) & 1:
            g[i] -= q[Q_MILLI]
            v[i] -= vram
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
    if mask & row[CLAIMED]:
        row[OWED_CPU] += q[Q_CPU]
        row[OWED_RAM] += q[Q_RAM]
        row[OWED_NVME] += q[Q_NVME]
    if mask == 0:
        row[CPU_ONLY] -= 1
    g, v, vram = s.gfree[h], s.vfree[h], vram_kernel(row, q)
    for i in range(row[NGPU]):
        if (mask >> i) & 1:
            g[i] += q[Q_MILLI]
            v[i] += vram
            if g[i] >= 1000:
                row[ACTIVE] &= ~(1 << i)
    delta = delta_kernel(row, mask)
    if delta:
        node = row[NODE]
        while node >= 0:
            s.budget[node] += delta * s.k[node]
            node = s.parent[node]
    return delta
