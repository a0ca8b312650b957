"""Hosts held and cleared one move at a time: what the benchmark does in a cell so full that no repair lands at once.

The room of `defrag.search` is made at once or not at all. Here a host is held, and what comes free elsewhere takes those who must
leave it, one by one. The service does not do this (docs/measured.md#churn).
"""

from __future__ import annotations

import numpy as np

from scheduler.core.defrag import MOST, NEVER, PER_MOVE, Move, Wanted, Work, best_host, book, clear, clear_all, size_of
from scheduler.core.fit_kernels import Q_HOLD, fit_kernel
from scheduler.core.pack import copy_state
from scheduler.core.score import Tables
from scheduler.core.state import State
from scheduler.core.types import I64


def cheapest(s: State, work: Work, one: Wanted, limit: int) -> list[int]:
    """Hosts that could be cleared for `one` by at most `limit` moves that pay, fewest moves first, then least work lost."""
    s = copy_state(s)
    members = np.argsort(work.row, kind="stable").astype(np.int64)
    start = np.searchsorted(work.row[members], np.arange(len(s.rows) + 1)).astype(np.int64)
    keys = np.empty(len(s.rows), np.int64)
    clear_all(one.vector, s, work, members, start, limit, np.zeros(MOST, np.uint8), keys)
    paying = (keys < NEVER) & ((keys & (PER_MOVE - 1)) < one.worth)
    return [int(h) for h in np.argsort(keys, kind="stable") if paying[h]]


def room(s: State, q: I64, h: int) -> int:
    """The GPUs that q gets on host h, as a mask; -1 when it does not fit there. Holds do not count."""
    q = q.copy()
    q[Q_HOLD] = 0
    reason, mask, _, _ = fit_kernel(s.rows[h], s.gfree[h], s.vfree[h], s.nvl[h], q, s.parent, s.k, s.budget)
    return -1 if reason else int(mask)


def drain(s: State, t: Tables, work: Work, one: Wanted, h: int, max_moves: int) -> tuple[list[Move], int]:
    """(moves off host h that land now, how many more must leave before `one` fits there; -1: it never will). For a host that
    is held for `one`.

    `s` is not changed; the rules of `defrag.search` hold for every single move.
    """
    s = copy_state(s)
    members = np.flatnonzero(work.row == h).astype(np.int64)
    leave = np.zeros(MOST, np.uint8)
    free = one.vector.copy()
    free[Q_HOLD] = 0
    if clear(h, free, s, work, members, 0, len(members), MOST, leave) >= NEVER:
        return [], -1
    victims = sorted((int(members[i]) for i in np.flatnonzero(leave)), key=lambda v: (-size_of(work.vector[v]), v))
    made: list[Move] = []
    for v in victims:
        if len(made) == max_moves:
            break
        to, mask = best_host(work.vector[v], h, s, t)
        if to >= 0:
            book(to, work.vector[v], mask, s, t)
            made.append(Move(v, h, to, mask, 0))
    return made, len(victims) - len(made)
