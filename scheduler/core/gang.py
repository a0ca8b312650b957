"""Gangs: all replicas or none, in the smallest domain of the fabric that holds them.

Bottom-up: a kernel counts how many replicas each host holds; sums per leaf, spine and site follow. The domain with
the least
room that still suffices is taken, at the lowest level that has one; inside it the roomiest sub-domains are filled
first and
the last one is the tightest that suffices, so that the fewest domains are opened and the largest holes stay whole.
Watts are
tested when the replicas are booked: a domain that has the GPUs but not the watts is given back and the next one is
tried.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from scheduler.core import fit_kernels as fit
from scheduler.core.fit_kernels import (
    ACTIVE,
    CPU,
    HELD,
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
    RAM,
    choose_kernel,
    delta_kernel,
    static_kernel,
    vram_kernel,
    watts_bind,
)
from scheduler.core.jit import kernel
from scheduler.core.state import State, give, take
from scheduler.core.types import I32, I64, Level, Topology

DOMAIN_TRIES: Final = 64  # domains tried a level when watts refuse one after another
_LADDER: Final = (Level.HOST, Level.LEAF, Level.SPINE, Level.SITE)
_NOBODY: Final = np.zeros(0, np.int64)
_COLUMN: Final = {Level.LEAF: fit.LEAF, Level.SPINE: fit.SPINE, Level.SITE: fit.SITE}


class Where(NamedTuple):
    """Rows that a request may use [H], and rows on which the rest of its gang runs."""

    allowed: npt.NDArray[np.bool_]
    members: I64


class Gang(NamedTuple):
    """Where each replica went: state row, GPU mask, W added (int32 [replicas])."""

    host: I32
    mask: I32
    delta: I32


@kernel
def room_kernel(s: State, q: I64, out: I64) -> None:
    """How many replicas of q each host holds by everything but watts, out [H]."""
    need, milli = q[Q_GPUS], q[Q_MILLI]
    for h in range(len(s.rows)):
        row = s.rows[h]
        out[h] = 0
        if static_kernel(row, q) or (q[Q_HOLD] and row[HELD]):
            continue
        n = np.int64(1 << 30)
        cpu, ram, nvme = row[CPU], row[RAM], row[NVME]
        claimed = fit.claimed_kernel(row, q)
        if claimed:
            cpu -= max(np.int64(0), row[fit.OWED_CPU])
            ram -= max(np.int64(0), row[fit.OWED_RAM])
            nvme -= max(np.int64(0), row[fit.OWED_NVME])
        if q[Q_CPU] > 0:
            n = min(n, cpu // q[Q_CPU])
        if q[Q_RAM] > 0:
            n = min(n, ram // q[Q_RAM])
        if q[Q_NVME] > 0:
            n = min(n, nvme // q[Q_NVME])
        if n > 0 and need > 0:
            g, v, nvl, vram = s.gfree[h], s.vfree[h], s.nvl[h], vram_kernel(row, q)
            gpus = np.int64(0)
            if milli < 1000:
                for i in range(row[NGPU]):
                    if (claimed >> i) & 1:
                        continue
                    each = np.int64(g[i]) // milli
                    if vram > 0:
                        each = min(each, np.int64(v[i]) // vram)
                    gpus += each
            else:
                idle = 0
                for i in range(row[NGPU]):
                    if g[i] >= 1000 and not ((row[ACTIVE] | claimed) >> i) & 1 and v[i] >= vram:
                        idle |= 1 << i
                if need > 1 and q[Q_NVLINK] == 2:
                    for i in range(row[NGPU]):
                        size, first = 0, True
                        for j in range(row[NGPU]):
                            if (idle >> j) & 1 and nvl[j] == nvl[i] and nvl[i] >= 0:
                                size += 1
                                if j < i:
                                    first = False
                        if (idle >> i) & 1 and first:
                            gpus += size // need
                else:
                    gpus = fit.popcount(idle) // need
            n = min(n, gpus)
        out[h] = max(np.int64(0), n)


@kernel
def book_kernel(hosts: I64, counts: I64, q: I64, s: State, host: I32, mask: I32, delta: I32, done: int) -> int:
    """Books counts[i] replicas on hosts[i] while watts allow; fills host, mask, delta from `done` on; the new
    `done`.
    """
    for i in range(len(hosts)):
        h = hosts[i]
        for _ in range(counts[i]):
            if done == len(host):
                return done
            reason, m = choose_kernel(s.rows[h], s.gfree[h], s.vfree[h], s.nvl[h], q)
            if reason:
                break
            if watts_bind(s.rows[h, NODE], delta_kernel(s.rows[h], m), s.parent, s.k, s.budget) >= 0:
                break
            delta[done] = take(h, q, m, s)
            host[done] = h
            mask[done] = m
            done += 1
    return done


@kernel
def release_kernel(q: I64, s: State, host: I32, mask: I32, done: int) -> None:
    """Takes back the first `done` replicas, last first."""
    for i in range(done - 1, -1, -1):
        give(host[i], q, mask[i], s)


def room(state: State, q: I64) -> I64:
    """How many replicas each host holds by everything but watts, [H]."""
    out = np.empty(len(state.rows), np.int64)
    room_kernel(state, q, out)
    return out


def domains(state: State, level: Level) -> I64:
    """Domain number of each host at a level, [H]: the host itself, its leaf, spine or site, or 0 for the cell."""
    if level <= Level.HOST and level != Level.NONE:
        return np.arange(len(state.rows), dtype=np.int64)
    if level == Level.NONE:
        return np.zeros(len(state.rows), np.int64)
    numbers: I64 = state.rows[:, _COLUMN[level]]
    if len(numbers) and numbers.min() >= 0 and numbers.max() < 4 * len(numbers) + 64:
        return numbers
    return np.unique(numbers, return_inverse=True)[1].astype(np.int64)


def place_gang(
    state: State, q: I64, replicas: int, topology: Topology, where: Where | None = None, counts: I64 | None = None
) -> Gang | None:
    """Books a gang on the state, whole, or leaves it as it was and returns None.

    `where`: the rows that it may use, and those on which the rest of the gang runs already: then these replicas keep to
    the gang's domain where its topology says so, and to its site in any case. `counts`: `room` of q, where it is known.
    """
    counts = np.minimum(room(state, q) if counts is None else counts, replicas)
    members: I64 = _NOBODY
    if where is not None:
        counts, members = np.where(where.allowed, counts, 0), where.members
    bound = bound_level(state, q, replicas, topology, members)
    if len(members):
        of = domains(state, bound)
        counts[~np.isin(of, of[members])] = 0
    if topology.spread > Level.NONE and topology.max_per_domain:
        counts = _bounded(counts, domains(state, max(topology.spread, Level.HOST)), topology.max_per_domain, members)
    if counts.sum() < replicas:
        return None
    for level in _levels(topology, bound):
        of = domains(state, level)
        sums = np.bincount(of, weights=counts).astype(np.int64)
        enough = np.flatnonzero(sums >= replicas)
        if len(members):
            enough = enough[np.isin(enough, of[members])]
        for domain in _tightest(state, level, enough, sums)[:DOMAIN_TRIES]:
            rows = np.flatnonzero((of == domain) & (counts > 0))
            gang = _book(state, q, replicas, topology, level, rows, counts[rows], members)
            if gang is not None:
                return gang
    return None


def _tightest(state: State, level: Level, enough: I64, sums: I64) -> I64:
    """Domains with the least room first; of hosts with equal room the one with the least free GPU."""
    if level == Level.HOST:
        return enough[np.lexsort((state.rows[enough, fit.TOTAL], sums[enough]))]
    return enough[np.argsort(sums[enough], kind="stable")]


def bound_level(state: State, q: I64, replicas: int, topology: Topology, members: I64 | None = None) -> Level:
    """The widest level that one gang of this topology may span."""
    if not topology.required:
        return Level.SITE
    if topology.pack > Level.NONE:
        return max(topology.pack, Level.HOST)
    if topology.spread > Level.NONE or not q[Q_GPUS]:
        return Level.SITE
    return _ideal_level(state, q, replicas + (0 if members is None else len(members)))


def _ideal_level(state: State, q: I64, replicas: int) -> Level:
    """The smallest level at which the pool could hold so many replicas if all its GPUs were free."""
    rows = state.rows
    fits = (q[fit.Q_POOL] == 0) | (rows[:, fit.POOL] == q[fit.Q_POOL])
    fits &= (q[fit.Q_SITE] < 0) | (rows[:, fit.SITE] == q[fit.Q_SITE])
    if q[fit.Q_MODELS]:
        fits &= (rows[:, fit.MODEL] >= 0) & (q[fit.Q_MODELS] >> np.maximum(rows[:, fit.MODEL], 0) & 1 == 1)
    each = rows[:, NGPU] * (1000 // q[Q_MILLI]) if q[Q_MILLI] < 1000 else rows[:, NGPU] // q[Q_GPUS]
    return smallest_level(np.where(fits, each, 0), lambda level: domains(state, level), replicas)


def smallest_level(counts: I64, domain_of: Callable[[Level], I64], replicas: int) -> Level:
    """The smallest level with a domain that holds so many replicas; `counts` [H]: how many each host holds, `domain_of`: the
    domain of each host at each level.
    """
    for level in _LADDER[:-1]:
        if len(counts) and np.bincount(domain_of(level), weights=counts).max() >= replicas:
            return level
    return Level.SITE


def _levels(topology: Topology, bound: Level) -> list[Level]:
    """Levels to try, lowest first. A gang never spans two sites: each agent starts its own, and fabrics end at the fence."""
    if topology.spread > Level.NONE:
        first = topology.pack if topology.pack > Level.NONE else Level.SITE
        return [first] if topology.required else list(dict.fromkeys([max(first, Level.HOST), Level.SITE]))
    return [level for level in _LADDER if level <= bound]


def _bounded(counts: I64, of: I64, most: int, members: I64) -> I64:
    """Counts cut so that no domain has more than `most`, members included, the roomiest hosts first."""
    left = np.maximum(0, most - np.bincount(of[members], minlength=int(of.max(initial=0)) + 1))
    order = np.lexsort((np.arange(len(counts)), -counts, of))
    sorted_counts, sorted_of = counts[order], of[order]
    before = np.cumsum(sorted_counts) - sorted_counts
    starts = np.r_[True, sorted_of[1:] != sorted_of[:-1]] if len(order) else np.zeros(0, bool)
    base = np.maximum.accumulate(np.where(starts, before, 0))
    out = np.empty_like(counts)
    out[order] = np.clip(left[sorted_of] - (before - base), 0, sorted_counts)
    return out


def _book(
    state: State, q: I64, replicas: int, topology: Topology, level: Level, rows: I64, counts: I64, members: I64
) -> Gang | None:
    host, mask, delta = (np.zeros(replicas, np.int32) for _ in range(3))
    if topology.spread > Level.NONE:
        rows, share = _spread(state, replicas, topology.spread, rows, counts, members)
        done = int(book_kernel(rows, share, q, state, host, mask, delta, 0))
    else:
        order = _filling(state, replicas, level, rows, counts)
        done = int(book_kernel(rows[order], counts[order], q, state, host, mask, delta, 0))
    if done == replicas:
        return Gang(host, mask, delta)
    release_kernel(q, state, host, mask, done)
    return None


def _filling(state: State, replicas: int, level: Level, rows: I64, counts: I64) -> I64:
    """Order in which to fill the hosts of a domain: by sub-domain of the next level down, then by host."""
    below = {Level.NONE: Level.SITE, Level.SITE: Level.SPINE, Level.SPINE: Level.LEAF}.get(level)
    if below is None:
        return _tight(replicas, counts)
    of = domains(state, below)[rows]
    names, local = np.unique(of, return_inverse=True)
    if len(names) == 1:
        return _filling(state, replicas, below, rows, counts)
    sums = np.bincount(local, weights=counts).astype(np.int64)
    order = _tight(replicas, sums)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    hosts = np.argsort(rank[local], kind="stable")
    # Sub-domains before the last one needed are filled to the brim: only in that one does the order of hosts matter.
    # What follows it stays in the list, in case watts refuse some hosts.
    total = np.cumsum(sums[order])
    last = int(np.searchsorted(total, replicas))
    if last < len(order):
        need = replicas - (int(total[last - 1]) if last else 0)
        members = hosts[rank[local][hosts] == last]
        inner = members[_filling(state, need, below, rows[members], counts[members])]
        at = int(np.searchsorted(rank[local][hosts], last))
        hosts[at : at + len(inner)] = inner
    return hosts


def _tight(replicas: int, room_of: I64) -> I64:
    """Indices, roomiest first, but the last one needed is the tightest that suffices."""
    order = np.argsort(-room_of, kind="stable")
    total = np.cumsum(room_of[order])
    last = int(np.searchsorted(total, replicas))
    if last >= len(order):
        return order
    need = replicas - (int(total[last - 1]) if last else 0)
    rest = order[last:]
    enough = int(np.searchsorted(-room_of[rest], -need, side="right"))  # rest is descending
    tight = rest[enough - 1]
    return np.concatenate([order[:last], [tight], rest[rest != tight]])


def _spread(state: State, replicas: int, level: Level, rows: I64, counts: I64, members: I64) -> tuple[I64, I64]:
    """(rows, replicas on each): as even over the domains of `level`, members included, as their room allows."""
    of = domains(state, max(level, Level.HOST))
    names, local = np.unique(of[rows], return_inverse=True)
    sums = np.bincount(local, weights=counts).astype(np.int64)
    have = np.bincount(of[members], minlength=int(of.max(initial=0)) + 1)[names]
    low, high = 0, replicas + len(members)
    while low < high:  # the smallest bound per domain that holds all
        mid = (low + high) // 2
        if np.minimum(sums, np.maximum(0, mid - have)).sum() >= replicas:
            high = mid
        else:
            low = mid + 1
    each = np.minimum(sums, np.maximum(0, low - have))
    full = np.flatnonzero((each > 0) & (each + have == low))
    for domain in full[: int(each.sum()) - replicas]:
        each[domain] -= 1
    order = np.lexsort((-counts, local))
    left, share = each.copy(), np.zeros(len(order), np.int64)
    for at, i in enumerate(order):
        share[at] = min(counts[i], left[local[i]])
        left[local[i]] -= share[at]
    return rows[order], share
