"""The hot loop: score table [class x host], re-scored lazily from a change log, with a three-level arg-max.

A class is a distinct request vector. Its row of the table holds one int32 score per host (`NEVER`: no placement of this plan
can change that; `NO`: not now) under two levels of block maxima (64 hosts, 64 blocks), so that finding the best host reads
about 64 numbers per level and a changed host costs one block. A class catches up with the log of changed hosts when it is
next asked for. Watts bind many hosts at once, so they are tested on the arg-max only: a host that fails becomes `NO` until
it changes or until something gives watts back (`META_EPOCH`). Hosts in equal states share one score when a row is filled.
Ties go to the first host: the planner permutes hosts by its seed.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from scheduler.core.fit_kernels import NODE, Q_GPUS, Q_MILLI, choose_kernel, delta_kernel, static_kernel, watts_bind
from scheduler.core.jit import inlined, kernel
from scheduler.core.score import Tables
from scheduler.core.state import IDLE, NO, State, give, price_slots, refresh_host, score_host, take
from scheduler.core.types import I32, I64

NEVER: Final = -(2**31)
BLOCK: Final = 64
LAG: Final = 256  # changes for which a host stays put before the sweep looks at it
SWEEP: Final = 96  # hosts that the sweep re-scores a decision, at most
SLOTS: Final = 32  # slots that it looks at a decision, at most
META_LOG, META_EPOCH, META_HAND, META_STAMP, META_RESCORED, META_FILLED, META_SWEEP = range(7)
META_WIDTH: Final = 8

U8 = npt.NDArray[np.uint8]


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
    changed: I64  # [H] where in the log the host's last change stands
    group: I32  # [H] hosts in equal states at the start, -1 once changed
    memo: I32  # [groups]
    memo_of: I64  # [groups] the fill that wrote memo
    meta: I64  # [META_WIDTH]


@inlined
def note_change(h: int, s: State, t: Tables, c: Cache) -> None:
    """After every change of a host: what the score remembers of it, and the log, with all whose score changes with it."""
    refresh_host(h, s, t)
    _log(h, c)
    c.group[h] = -1
    least = price_slots(s, t)
    if least:
        for i in range(len(s.rows)):
            if s.counted[i, IDLE] >= least and i != h:
                _log(i, c)


@inlined
def _log(h: int, c: Cache) -> None:
    """Appends a host to the change log. A full log starts over, and every slot fills itself anew."""
    if c.meta[META_LOG] == len(c.log):
        c.meta[META_LOG] = 0
        c.meta[META_EPOCH] += 1
    c.log[c.meta[META_LOG]] = h
    c.changed[h] = c.meta[META_LOG]
    c.meta[META_LOG] += 1


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
    _catch_up(slot, q, c.meta[META_LOG], len(s.rows), s, t, c)
    return slot  # type: ignore[no-any-return]


@inlined
def _catch_up(slot: int, q: I64, until: int, most: int, s: State, t: Tables, c: Cache) -> int:
    """Re-scores for a slot the hosts of the log up to `until`, at most `most`, each at its last entry. Returns how many."""
    tab, at, done = c.tab[slot], c.seen[slot], 0
    while at < until and done < most:
        h = c.log[at]
        if c.changed[h] == at and tab[h] != NEVER:
            value, _ = score_host(h, q, s, t)
            put(slot, h, value, c)
            done += 1
        at += 1
    c.seen[slot] = at
    c.meta[META_RESCORED] += done
    return done


@inlined
def sweep(qs: I64, s: State, t: Tables, c: Cache) -> None:
    """A little of the work that classes seldom asked for have before them, so that none of them ever has much of it.

    Only hosts that have not changed for `LAG` changes are re-scored, so that hardly any is re-scored twice for it: what is
    done here is not done later. Slots take turns.
    """
    until = c.meta[META_LOG] - LAG
    left = SWEEP
    for _ in range(SLOTS):
        slot = c.meta[META_SWEEP]
        k = c.class_of[slot]
        if k >= 0 and c.epoch[slot] == c.meta[META_EPOCH] and c.seen[slot] < until:
            left -= _catch_up(slot, qs[k], min(until, c.seen[slot] + LAG), left, s, t, c)
            if left <= 0:
                return
        c.meta[META_SWEEP] = (slot + 1) % len(c.class_of)


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
        note_change(h, s, t, c)
        sweep(qs, s, t, c)
    return len(seq)


@kernel
def undo_run(start: int, end: int, seq: I32, qs: I64, s: State, t: Tables, c: Cache, host: I32, mask: I32) -> None:
    """Takes back seq[start:end], last first."""
    for i in range(end - 1, start - 1, -1):
        if host[i] >= 0:
            give(host[i], qs[seq[i]], mask[i], s)
            note_change(host[i], s, t, c)
            host[i] = -1
    c.meta[META_EPOCH] += 1  # watts came back: hosts marked NO for want of them count again
