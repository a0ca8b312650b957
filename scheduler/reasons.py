"""Why placed jobs stand where they do, in few bytes: kept with the cycle's own row, when its record (scheduler.record) is long gone.

For each class of requests that a cycle placed, the hosts left after each stage of the fit rule as the cell stood when the cycle
began; for each job, its class. About 1 byte a job and 100 a class, compressed: what a job is told of its place costs less than
its name. Jobs with affinity rules have a class of their own each; of more than `CLASSES` the rest are told only where they stand.

Written after the commit, when the cell is free again; a failure is logged and costs the reasons, never the cycle.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Collection
from typing import Final, NamedTuple

import numpy as np

from scheduler.core import explain
from scheduler.core.case import Case
from scheduler.core.pack import classes_of, make_state
from scheduler.core.ties import Ties
from scheduler.core.types import FIT_STAGES, Plan, Reason
from scheduler.models import Cycle
from scheduler.record import case_of
from scheduler.snapshot import Snapshot

log = logging.getLogger(__name__)
CLASSES: Final = 256  # of one cycle: a look at every host for each


class Kept(NamedTuple):
    """`hosts`: of the cell. `stages`: hosts left after each stage that lost some, and after the last."""

    hosts: int
    stages: tuple[tuple[Reason, int], ...]

    @property
    def candidates(self) -> int:
        return self.stages[-1][1]


def keep(cycle: Cycle, taken: Snapshot, made: Plan, refused: Collection[int]) -> None:
    """With the cycle's row, for the jobs that it placed."""
    try:
        body = packed(case_of(taken), made, refused)
        if body:
            Cycle.objects.filter(pk=cycle.pk).update(reasons=body)
    except Exception:  # whatever it is: the jobs have their places
        log.exception("the reasons of cycle %s of %s are not kept", cycle.generation, cycle.cell_id)


def packed(case: Case, made: Plan, refused: Collection[int] = ()) -> bytes:
    """Empty where nobody was placed."""
    asked = {r.job: r for r in case.requests}
    placed = sorted({p.job for p in made.placements if p.job not in refused})
    if not placed:
        return b""
    state = make_state(case.fleet)
    ties = Ties(case.fleet, state)
    vectors, of = classes_of([asked[job] for job in placed])
    classes: list[list[list[int]]] = []
    known: dict[tuple[int, int], int] = {}  # (class of the vector, the job where it has ties) -> its class here
    here = []
    for job, k in zip(placed, of.tolist(), strict=True):
        key = k, job if asked[job].tied else 0
        if key not in known:
            known[key] = len(classes) if len(classes) < CLASSES else -1
            if known[key] >= 0:
                where = ties.where(asked[job])
                seen = explain.look(state, vectors[k], None if where is None else where.allowed)
                classes.append(_stages(seen.hosts, len(state.rows)))
        here.append(known[key])
    jobs = np.diff(np.array(placed, np.int64), prepend=0).tolist()
    told = {"hosts": len(state.rows), "classes": classes, "jobs": jobs, "of": here}
    return zlib.compress(json.dumps(told, separators=(",", ":")).encode(), 6)


def _stages(lost: list[int], hosts: int) -> list[list[int]]:
    """[stage, hosts left] of those that lost some, and of the last."""
    found, left = [], hosts
    for stage in FIT_STAGES:
        left -= lost[stage]
        if lost[stage] or stage == FIT_STAGES[-1]:
            found.append([int(stage), left])
    return found


def of(cycle_id: int | None, job: int) -> Kept | None:
    """What was kept of a job that the cycle placed."""
    body = Cycle.objects.filter(pk=cycle_id).values_list("reasons", flat=True).first() if cycle_id else None
    if not body:
        return None
    told = json.loads(zlib.decompress(bytes(body)))
    at = np.flatnonzero(np.cumsum(told["jobs"]) == job)
    if not len(at) or (k := told["of"][int(at[0])]) < 0:
        return None
    return Kept(told["hosts"], tuple((Reason(stage), left) for stage, left in told["classes"][k]))
