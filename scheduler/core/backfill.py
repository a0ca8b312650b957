"""Conservative backfill: a job that waits gets a start time, and nothing placed behind it may move that time.

The start time is the first end of running work at which the job fits, if nothing else started (bisection over the
known ends:
more ends only free more). Placements without a known end are taken to stay. From then on the hosts of that future
placement are
held: only work that ends before the start may use them; and at every node the watts that the job will need there,
beyond what
ends give back by then, are kept out of the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from scheduler.core import fit_kernels as fit
from scheduler.core import gang
from scheduler.core.pack import copy_state
from scheduler.core.preempt import Held
from scheduler.core.state import State, give
from scheduler.core.types import I32, I64, Running, Topology


class Hold(NamedTuple):
    """A future placement: when (s), on which rows, and the watts to keep at each node until then (mW, [N])."""

    start: int
    rows: I32
    keep: I64


def earliest(
    state: State,
    running: Sequence[Running],
    held: Held,
    gone: np.ndarray,
    q: I64,
    replicas: int,
    topology: Topology,
    now: int,
    where: gang.Where | None = None,
) -> Hold | None:
    """When and where the gang will fit, by the ends of `running` that are known and not `gone`; None when they do not
    say.
    """
    known = [i for i, r in enumerate(running) if r.ends_at > now and not gone[i]]
    times = sorted({running[i].ends_at for i in known})
    if not times:
        return None
    known.sort(key=lambda i: running[i].ends_at)

    def at(time: int) -> tuple[State, gang.Gang | None]:
        trial = copy_state(state)
        for i in known:
            if running[i].ends_at > time:
                break
            give(held.row[i], held.vector[i], held.mask[i], trial)
        budget = trial.budget.copy()
        placed = gang.place_gang(trial, q, replicas, topology, where)
        trial.budget[:] = budget - trial.budget  # what the job takes at each node
        return trial, placed

    low, high = 0, len(times) - 1
    if at(times[high])[1] is None:
        return None
    while low < high:
        mid = (low + high) // 2
        if at(times[mid])[1] is None:
            low = mid + 1
        else:
            high = mid
    trial, placed = at(times[low])
    assert placed is not None
    freed = _freed(state, running, held, known, times[low])
    keep = np.maximum(0, trial.budget - freed)
    return Hold(times[low], np.unique(placed.host), np.minimum(keep, np.maximum(0, state.budget)))


def _freed(state: State, running: Sequence[Running], held: Held, known: list[int], time: int) -> I64:
    trial = copy_state(state)
    for i in known:
        if running[i].ends_at <= time:
            give(held.row[i], held.vector[i], held.mask[i], trial)
    return trial.budget - state.budget


def apply(state: State, hold: Hold) -> None:
    """Marks the rows and keeps the watts."""
    state.rows[hold.rows, fit.HELD] = 1
    np.subtract(state.budget, hold.keep, out=state.budget)
