"""The compiled loops of `dispatch`: hull steps, radix sort, acceptance, filling, and the divisible bound.

Columns: `node`, `ladder` (int32 per miner), `off`, `watts`, `value` (the ladder table), `parent`, `slack` (per node; W). Each kernel is
the plain function above it, compiled; `kernel.py_func` is its interpreted twin. No floats but value per watt.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

Ints = npt.NDArray[np.int64]
Modes = npt.NDArray[np.int16]
Mask = npt.NDArray[np.bool_]

KEY_BITS = 11  # per radix pass; two passes: 4,194,304 levels of value per watt
KEYS = 1 << (2 * KEY_BITS)
# Tiers of the kernels. SHED: as FAST, but only a cap puts a machine to sleep, never its price.
SLOW, FAST, SHED = 0, 1, 2


def _steps(
    off: npt.NDArray[np.int32],
    ladder: npt.NDArray[np.int32],
    watts: Ints,
    value: Ints,
    current: Modes,
    wake: Modes,
    locked: Mask,
    tier: int,
    wear: int,
) -> tuple[npt.NDArray[np.int32], Modes, npt.NDArray[np.int32], npt.NDArray[np.float64]]:
    """Hull steps of every miner that may change: miner i owns steps first[i]..first[i+1], each the mode it leads to, the watts it adds and
    its value per watt.
    """
    n = len(ladder)
    room = 0
    for i in range(n):
        room += off[ladder[i] + 1] - off[ladder[i]] - 1
    first = np.zeros(n + 1, np.int32)
    mode = np.empty(room, np.int16)
    more = np.empty(room, np.int32)
    per_watt = np.empty(room, np.float64)
    top = 0
    for i in range(n):
        first[i] = top
        if locked[i]:
            continue
        o = off[ladder[i]]
        base_v = value[o] + (wear if current[i] == 0 else 0)
        only = current[i] if current[i] > 0 else wake[i]
        for m in range(1, off[ladder[i] + 1] - o):
            if tier != SLOW and m != only:
                continue
            w = watts[o + m]
            v = value[o + m] + (wear if current[i] == m else 0)
            while True:
                if top > first[i]:
                    last = mode[top - 1]
                    last_w, last_v = watts[o + last], value[o + last] + (wear if current[i] == last else 0)
                else:
                    last_w, last_v = watts[o], base_v
                slope = (v - last_v) / (w - last_w)
                if top > first[i] and slope >= per_watt[top - 1]:
                    top -= 1  # the entry before lies under the hull
                    continue
                break
            if slope > 0 or tier == SHED:
                mode[top] = m
                more[top] = w - last_w
                per_watt[top] = slope
                top += 1
    first[n] = top
    return first, mode[:top], more[:top], per_watt[:top]


def _sorted_by_value(
    first: npt.NDArray[np.int32], per_watt: npt.NDArray[np.float64], current: Modes, tier: int
) -> npt.NDArray[np.int32]:
    """Miners in the order of their steps, most value per watt first; stable, so a miner's steps stay in order."""
    total = len(per_watt)
    key = np.empty(total, np.int32)
    who = np.empty(total, np.int32)
    if total == 0:
        return who
    low, high = per_watt.min(), per_watt.max()
    levels = KEYS - 1 if tier == SLOW else KEYS // 2 - 1
    scale = levels / (high - low) if high > low else 0.0
    for i in range(len(first) - 1):
        # In the fast tier whoever is awake comes before whoever would be woken.
        behind = KEYS // 2 if tier != SLOW and current[i] == 0 else 0
        for s in range(first[i], first[i + 1]):
            key[s] = behind + levels - int((per_watt[s] - low) * scale)
            who[s] = i
    for shift in (0, KEY_BITS):
        start = np.zeros((1 << KEY_BITS) + 1, np.int64)
        for s in range(total):
            start[((key[s] >> shift) & ((1 << KEY_BITS) - 1)) + 1] += 1
        for b in range(1 << KEY_BITS):
            start[b + 1] += start[b]
        key_out, who_out = np.empty(total, np.int32), np.empty(total, np.int32)
        for s in range(total):
            b = (key[s] >> shift) & ((1 << KEY_BITS) - 1)
            at = start[b]
            start[b] = at + 1
            key_out[at] = key[s]
            who_out[at] = who[s]
        key, who = key_out, who_out
    return who


def _accept(
    parent: Ints,
    slack: Ints,
    node: npt.NDArray[np.int32],
    first: npt.NDArray[np.int32],
    mode: Modes,
    more: npt.NDArray[np.int32],
    order: npt.NDArray[np.int32],
    modes: Modes,
) -> None:
    """Take the steps in order while every ancestor has slack; a miner whose step did not fit takes no later one.

    Lowers `slack` and raises `modes` in place. The loop jumps about in memory, so it touches two words a step: where its miner is
    (node and next step in one) and what the step adds.
    """
    n = len(node)
    where = np.empty(n, np.int64)
    for i in range(n):
        where[i] = np.int64(node[i]) << 32 | first[i]
    for s in range(len(order)):
        i = order[s]
        if where[i] < 0:
            continue
        at = where[i] & 0xFFFFFFFF
        watts = more[at]
        home = where[i] >> 32
        p = home
        while p >= 0 and slack[p] >= watts:
            p = parent[p]
        if p >= 0:
            where[i] = ~where[i]
            continue
        where[i] += 1
        while home >= 0:
            slack[home] -= watts
            home = parent[home]
    for i in range(n):
        at = (where[i] if where[i] >= 0 else ~where[i]) & 0xFFFFFFFF
        if at > first[i]:
            modes[i] = mode[at - 1]


def _fill(
    parent: Ints,
    slack: Ints,
    node: npt.NDArray[np.int32],
    ladder: npt.NDArray[np.int32],
    off: npt.NDArray[np.int32],
    watts: Ints,
    value: Ints,
    current: Modes,
    locked: Mask,
    wear: int,
    modes: Modes,
) -> None:
    """Give what slack is left to any mode that fits, also those under the hull. Lowers `slack` in place."""
    for i in range(len(node)):
        if locked[i]:
            continue
        o, top = off[ladder[i]], off[ladder[i] + 1] - off[ladder[i]]
        room = slack[node[i]]
        p = parent[node[i]]
        while p >= 0 and room > 0:
            room = min(room, slack[p])
            p = parent[p]
        now = modes[i]
        if room <= 0 or now + 1 >= top:
            continue
        best, best_v = now, value[o + now] + (wear if current[i] == now else 0)
        for m in range(now + 1, top):
            if watts[o + m] - watts[o + now] > room:
                break
            v = value[o + m] + (wear if current[i] == m else 0)
            if v > best_v:
                best, best_v = m, v
        if best != now:
            more = watts[o + best] - watts[o + now]
            modes[i] = best
            p = node[i]
            while p >= 0:
                slack[p] -= more
                p = parent[p]


def _divisible(
    parent: Ints,
    slack: Ints,
    node: npt.NDArray[np.int32],
    more: npt.NDArray[np.int32],
    per_watt: npt.NDArray[np.float64],
    who: npt.NDArray[np.int32],
    order: Ints,
) -> float:
    """What the steps in `order` earn when the last one of a node may be taken in part: the optimum of the divisible problem."""
    gain = 0.0
    for s in range(len(order)):
        at = order[s]
        part = np.int64(more[at])
        p = node[who[at]]
        while p >= 0 and part > 0:
            part = min(part, slack[p])
            p = parent[p]
        if part <= 0:
            continue
        gain += part * per_watt[at]
        p = node[who[at]]
        while p >= 0:
            slack[p] -= part
            p = parent[p]
    return gain


steps_kernel = njit(cache=True, nogil=True)(_steps)
sort_kernel = njit(cache=True, nogil=True)(_sorted_by_value)
accept_kernel = njit(cache=True, nogil=True)(_accept)
fill_kernel = njit(cache=True, nogil=True)(_fill)
divisible_kernel = njit(cache=True, nogil=True)(_divisible)
