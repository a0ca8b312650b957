"""The fit rule of `fit` on rows of the planner's state, compiled; and how hosts and requests are laid out in such rows."""

from __future__ import annotations

from typing import Final

import numpy as np

from scheduler.core.jit import inlined, kernel
from scheduler.core.types import BLOCKING, I16, I32, I64, HostFlag, Request

# Columns of a state row (int64) and of a request vector (int64).
CPU, RAM, NVME, MODEL, NGPU, ACTIVE, CPU_ONLY, POOL, SITE, OWNER, NODE, FLAGS = range(12)
STANDBY, PARKED, BASE, GMIN, GMAX, CAPCTL, LEAF, SPINE, HELD, TOTAL, TAINTS, LEAVES = range(12, 24)
VRAM, CLAIM, CLAIMED, OWED_CPU, OWED_RAM, OWED_NVME = range(24, 30)
HOST_WIDTH: Final = 30
Q_POOL, Q_SITE, Q_MODELS, Q_CPU, Q_RAM, Q_NVME, Q_GPUS, Q_MILLI, Q_VRAM, Q_ORG, Q_NVLINK, Q_HOLD = range(12)
Q_TOLERATES, Q_UNTIL, Q_STAYS = range(12, 15)
REQUEST_WIDTH: Final = 15

_SCHEDULABLE: Final = int(HostFlag.SCHEDULABLE)
_OFF: Final = int(HostFlag.OFF)
_BLOCKING: Final = BLOCKING


def request_vector(request: Request) -> I64:
    """The request as the kernels read it, shape [REQUEST_WIDTH]."""
    milli = request.gpu_milli if request.gpus else 0
    vram = request.vram if request.gpus else 0
    t = request.topology.nvlink if request.gpus > 1 else 0
    return np.array(
        [
            *(request.pool, request.site, request.models, request.cpu, request.ram, request.nvme),
            *(request.gpus, milli, vram, request.org, t, 1),
            *(request.tolerates, request.until, request.stays),
        ],
        np.int64,
    )


@inlined
def popcount(x: int) -> int:
    n = 0
    while x:
        x &= x - 1
        n += 1
    return n


@inlined
def vram_kernel(row: I64, q: I64) -> int:
    """`fit.vram_of` on a state row, MiB."""
    if q[Q_VRAM] > 0 or q[Q_MILLI] >= 1000:
        return q[Q_VRAM]  # type: ignore[no-any-return]
    return row[VRAM] * q[Q_MILLI] // 1000  # type: ignore[no-any-return]


@kernel
def watts_kernel(row: I64, active: int, cpu_only: int) -> int:
    """`host_watts` on a state row, W."""
    if row[CAPCTL] == 0:
        return row[BASE] + row[NGPU] * row[GMAX]  # type: ignore[no-any-return]
    a = popcount(active)
    if a == 0 and cpu_only == 0:
        return row[STANDBY] if row[FLAGS] & _OFF else row[PARKED]  # type: ignore[no-any-return]
    return row[BASE] + a * row[GMAX] + (row[NGPU] - a) * row[GMIN]  # type: ignore[no-any-return]


@kernel
def static_kernel(row: I64, q: I64) -> int:
    """The stages that no placement of this plan changes: pool, site, model, flags, owner, taints, deadline. A Reason."""
    if q[Q_POOL] != 0 and row[POOL] != q[Q_POOL]:
        return 1
    if q[Q_SITE] >= 0 and row[SITE] != q[Q_SITE]:
        return 2
    if q[Q_MODELS] != 0 and (row[MODEL] < 0 or not (q[Q_MODELS] >> row[MODEL]) & 1):
        return 3
    if row[FLAGS] & _SCHEDULABLE == 0 or row[FLAGS] & _BLOCKING:
        return 4
    if row[OWNER] > 0 and row[OWNER] != q[Q_ORG]:
        return 5
    if row[TAINTS] & ~q[Q_TOLERATES]:
        return 20
    if row[LEAVES] and q[Q_UNTIL] > row[LEAVES]:
        return 21
    return 0


@kernel
def shape_kernel(row: I64, q: I64) -> int:
    """Holds, CPU, RAM, NVMe. A Reason."""
    if q[Q_HOLD] and row[HELD]:
        return 6
    if row[CPU] < q[Q_CPU]:
        return 7
    if row[RAM] < q[Q_RAM]:
        return 8
    if row[NVME] < q[Q_NVME]:
        return 9
    return 0


@inlined
def claimed_kernel(row: I64, q: I64) -> int:
    """Bit mask of the GPUs on which the request may still stand when they are claimed."""
    if q[Q_STAYS] and 0 < row[CLAIM] < q[Q_STAYS]:  # most cells have no claim to read
        return row[CLAIMED]  # type: ignore[no-any-return]
    return 0


@inlined
def owed_kernel(row: I64, q: I64) -> bool:
    """`fit.owed_short` on a state row."""
    return (  # type: ignore[no-any-return]
        row[CPU] - max(np.int64(0), row[OWED_CPU]) < q[Q_CPU]
        or row[RAM] - max(np.int64(0), row[OWED_RAM]) < q[Q_RAM]
        or row[NVME] - max(np.int64(0), row[OWED_NVME]) < q[Q_NVME]
    )


@kernel
def _choose(row: I64, gfree: I32, vfree: I32, nvl: I16, q: I64, but: int) -> tuple[int, int]:
    """Without the GPUs of the mask `but`."""
    need = q[Q_GPUS]
    if need == 0:
        return 0, 0
    n = row[NGPU]
    milli, vram, active = q[Q_MILLI], vram_kernel(row, q), row[ACTIVE]
    if milli < 1000:
        best, best_key, roomy, total = -1, np.int64(1 << 40), False, np.int64(0)
        for i in range(n):
            g = np.int64(gfree[i])
            total += g
            if g >= milli and not (but >> i) & 1:
                roomy = True
                if vfree[i] >= vram:
                    key = g if (active >> i) & 1 else g + 4096
                    if key < best_key:
                        best, best_key = i, key
        if best >= 0:
            return 0, 1 << best
        if roomy:
            return 12, 0
        return (11, 0) if total >= milli else (10, 0)
    idle, usable, mask = 0, 0, 0
    for i in range(n):
        if gfree[i] >= 1000 and not ((active | but) >> i) & 1:
            idle += 1
            if vfree[i] >= vram:
                usable += 1
                mask |= 1 << i
    if idle < need:
        return 10, 0
    if usable < need:
        return 12, 0
    if q[Q_NVLINK] and need > 1:
        best_mask, best_size = 0, 99
        for i in range(n):
            if (mask >> i) & 1 and nvl[i] >= 0:
                domain, size = 0, 0
                for j in range(n):
                    if (mask >> j) & 1 and nvl[j] == nvl[i]:
                        domain |= 1 << j
                        size += 1
                if need <= size < best_size:
                    best_mask, best_size = domain, size
        if best_mask:
            mask = best_mask
        elif q[Q_NVLINK] == 2:
            return 13, 0
    out = 0
    for i in range(n):
        if (mask >> i) & 1 and need > 0:
            out |= 1 << i
            need -= 1
    return 0, out


@kernel
def choose_kernel(row: I64, gfree: I32, vfree: I32, nvl: I16, q: I64) -> tuple[int, int]:
    """`choose_gpus` on state rows: (Reason, bit mask of the GPUs)."""
    reason, mask = _choose(row, gfree, vfree, nvl, q, 0)
    claimed = claimed_kernel(row, q)
    if reason or claimed == 0:
        return reason, mask
    if owed_kernel(row, q):
        return 23, 0
    reason, mask = _choose(row, gfree, vfree, nvl, q, claimed)
    return (23, 0) if reason else (0, mask)


@kernel
def delta_kernel(row: I64, mask: int) -> int:
    """W that the host's reservation grows by when the GPUs of `mask` (0: a CPU-only replica) become active."""
    after = watts_kernel(row, row[ACTIVE] | mask, row[CPU_ONLY] + (1 if mask == 0 else 0))
    return after - watts_kernel(row, row[ACTIVE], row[CPU_ONLY])


@kernel
def watts_bind(node: int, delta: int, parent: I32, k: I32, budget: I64) -> int:
    """The lowest ancestor that has not delta * k mW, or -1."""
    if delta > 0:
        while node >= 0:
            if delta * k[node] > budget[node]:
                return node
            node = parent[node]
    return -1


@kernel
def fit_kernel(
    row: I64, gfree: I32, vfree: I32, nvl: I16, q: I64, parent: I32, k: I32, budget: I64
) -> tuple[int, int, int, int]:
    """The fit rule on state rows: (Reason, GPU mask, W added, binding node)."""
    reason = static_kernel(row, q)
    if reason == 0:
        reason = shape_kernel(row, q)
    if reason:
        return reason, 0, 0, -1
    reason, mask = choose_kernel(row, gfree, vfree, nvl, q)
    if reason:
        return reason, 0, 0, -1
    delta = delta_kernel(row, mask)
    node = watts_bind(row[NODE], delta, parent, k, budget)
    if node >= 0:
        return 14, mask, delta, node
    return 0, mask, delta, -1
