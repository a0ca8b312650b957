"""Bounded defragmentation of a cell: a few small jobs leave a host with their checkpoints, so that one that waits fits there.

At each tick, between two cycles (it holds the lock that a cycle holds), `core.defrag` looks for a repair on the cell as it
stands: whom to move, where there is room for each already, and who then fits. Who is to leave gets his checkpoint signal, as
after any preemption by us: nothing is billed from that moment on, it counts as no restart, and the job queues again. The freed
host is held for the one who waits by a promise in his decision (`scheduler.promises`), so that nobody who was moved, or came
since, takes it. One wave at a time: while anybody of the cell still gives way to somebody, nobody else is asked to leave.

Who may be moved: jobs under spot contracts, which are sold as work that gives way, and those whose owner has agreed to it
(`Job.movable`); with a checkpoint grace, of one replica, without rules beyond their shape, on capacity that is not reserved for
them, and running here for `REST_S` at least. Who is served: jobs without such rules that the last cycle left waiting for room, with
no promised start; a gang of up to `GANG` replicas gets room for all of them at once, or none.

What a move costs is the work since the last checkpoint that the job told of (since its start, without one: whether its grace is
long enough to save that nobody knows), and the time in which it does none: its grace, and `LAG_S` until it runs elsewhere. What
it brings is that the other starts now: `HORIZON_S` of its work, and what it has waited. The second must be `DEFRAG_GAIN` times
the first.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Final

import numpy as np
from django.conf import settings
from django.db import connection, transaction
from django.utils import timezone

from marketplace import outbox
from marketplace.locks import Lock, acquire
from marketplace.models import Cell, Job, Placement
from marketplace.services import jobs as job_service
from marketplace.services import placements as placement_service
from marketplace.services import replicas
from scheduler import cycle, words
from scheduler.core import defrag
from scheduler.core.pack import Packer, classes_of
from scheduler.core.score import Shape, shapes_of, tables_for
from scheduler.core.types import Fleet, HostFlag, Request, Running
from scheduler.models import Decision
from scheduler.snapshot import LAG_S, Snapshot, requests_of

ACTOR: Final = "scheduler"
TOPIC: Final = "scheduler.defragment"
MOVED: Final = "moved to make room"  # and the reason of one that leaves
REST_S: Final = 600  # a job that has just come to its host is left in peace
HORIZON_S: Final = 3600  # of its run, what a job that starts now is counted to gain
SERVED: Final = 32  # jobs for which room is looked for in one tick, oldest first
GANG: Final = 64  # replicas of a gang for which room is looked for
LEAST_MILLI: Final = 100  # a job without GPUs is worth as much as a tenth of one

# Running placements whose owner allows a move. Where jobs of the same contract wait for its ceiling, or of the organization for its
# limits, what leaves would not come back before them: there nobody is moved.
_MOVABLE = """
SELECT p.id, j.id, j.checkpoint_grace_s
FROM marketplace_placement p JOIN marketplace_job j ON j.id = p.job_id JOIN marketplace_contract c ON c.id = j.contract_id
WHERE p.cell_id = %(cell)s AND p.state = 'running' AND j.state = 'running' AND (c.kind = 'spot' OR j.movable) AND j.checkpoint_grace_s > 0
  AND j.replicas = 1 AND NOT j.ruled AND j.cancel_requested_at IS NULL AND p.release_requested_at IS NULL
  AND p.running_at <= %(rested)s AND (%(jobs)s::bigint[] IS NULL OR j.id = ANY(%(jobs)s))
  AND NOT EXISTS (SELECT 1 FROM marketplace_job w JOIN scheduler_decision d ON d.job_id = w.id
    WHERE w.contract_id = j.contract_id AND w.state IN ('queued', 'requeued') AND d.reason = 'OVER_QUOTA')
  AND NOT EXISTS (SELECT 1 FROM marketplace_job w JOIN scheduler_decision d ON d.job_id = w.id
    WHERE w.organization_id = j.organization_id AND w.state IN ('queued', 'requeued')
      AND d.reason IN ('ORGANIZATION_LIMIT', 'HOURLY_LIMIT'))
ORDER BY p.id
"""
_SERVED = """
SELECT j.id FROM marketplace_job j JOIN scheduler_decision d ON d.job_id = j.id
WHERE j.cell_id = %(cell)s AND j.state IN ('queued', 'requeued') AND j.cancel_requested_at IS NULL
  AND (j.replicas = 1 OR j.replicas <= %(gang)s AND NOT j.topology_required) AND NOT j.ruled
  AND d.outcome = 'waiting' AND d.at >= j.queued_at AND d.held_hosts IS NULL AND NOT d.reason = ANY(%(other)s)
  AND (%(jobs)s::bigint[] IS NULL OR j.id = ANY(%(jobs)s))
ORDER BY j.queued_at, j.id LIMIT %(limit)s
"""


@dataclass(frozen=True)
class Room:
    """`movers`: job id -> its grace in s; when they have left, each replica of `job` fits on its one of `hosts`."""

    job: int
    hosts: list[int]
    movers: dict[int, int]


def ask() -> None:
    """A message to each cell where jobs wait, unless one is on its way already."""
    with transaction.atomic():
        for cell_id in (
            Job.objects.filter(state__in=Job.WAITING).order_by("cell_id").values_list("cell_id", flat=True).distinct()
        ):
            outbox.emit(TOPIC, key=str(cell_id), payload={"cell": cell_id})


def run(cell_id: int, *, now: datetime | None = None) -> list[int]:
    """Makes room once; returns the jobs asked to leave. Raises `outbox.Busy` while a cycle of the cell, or another tick, runs."""
    moment = now or timezone.now()
    with cycle.alone(cell_id) as mine:
        if not mine:
            raise outbox.Busy(lambda: cycle.runs(cell_id))
        left = _run(cell_id, moment)
    outbox.nudge(job_service.CYCLE)  # a cycle that came meanwhile has been sent back
    return left


def _run(cell_id: int, now: datetime) -> list[int]:
    if settings.DEFRAG_MOVES < 1 or _leaving(cell_id) or not _served(cell_id):
        return []
    taken = cycle.picture(Cell.objects.get(pk=cell_id), now, running=True)
    return _apply(cell_id, rooms(taken), now)


def _leaving(cell_id: int) -> bool:
    """Whether anybody gives way already: the wave before this one, or a cycle's victims."""
    return Job.objects.filter(cell_id=cell_id, state=Job.State.PREEMPTING).exists()


def _served(cell_id: int, jobs: list[int] | None = None) -> list[int]:
    """Jobs that wait for room and for nothing else, oldest first."""
    other = [reason.name for reason in cycle.NO_ROOM_NEEDED]
    with connection.cursor() as cursor:
        cursor.execute(_SERVED, {"cell": cell_id, "other": other, "jobs": jobs, "limit": SERVED, "gang": GANG})
        return [pk for (pk,) in cursor.fetchall()]


def _movable(cell_id: int, now: datetime, jobs: list[int] | None = None) -> dict[int, tuple[int, int]]:
    """Placement -> (job, grace in s)."""
    rested = now - timedelta(seconds=REST_S)
    with connection.cursor() as cursor:
        cursor.execute(_MOVABLE, {"cell": cell_id, "rested": rested, "jobs": jobs})
        return {placement: (job, grace) for placement, job, grace in cursor.fetchall()}


# --- the search
def rooms(taken: Snapshot) -> list[Room]:
    """Whom to move now for whom, `DEFRAG_MOVES` at most. Same snapshot, same answer."""
    movable = _movable(taken.cell.pk, taken.now)
    served = set(_served(taken.cell.pk))
    now_s = int(taken.now.timestamp())
    waits = [r for r in taken.requests if r.job in served and _only_room(r)]
    if not waits or not movable:
        return []
    asks = {r.job: r for r in requests_of(taken, [job for job, _ in movable.values()]) if r.price_ok and r.budget_ok}
    stands: list[tuple[Running, Request, int]] = []
    for p in taken.running:
        job, grace = movable.get(p.placement, (0, 0))
        gone_soon = 0 < p.ends_at <= now_s + grace + 2 * LAG_S
        if job in asks and not gone_soon and int(taken.fleet.pool[p.host]) >= 0:
            stands.append((p, replace(asks[job], vram=p.vram), grace))
    if not stands:
        return []
    fleet = _closed(taken)
    vectors, of = classes_of([r for _, r, _ in stands] + waits)
    shapes = [Shape(*row) for row in taken.policy.shapes] if taken.policy.shapes is not None else shapes_of(waits)
    packer = Packer(fleet, vectors, tables_for(fleet, shapes, taken.policy.packer))
    work = defrag.workload(
        [p.host for p, _, _ in stands],
        vectors[of[: len(stands)]],
        [sum(1 << g for g in p.gpus) for p, _, _ in stands],
        [True] * len(stands),
        [_milli(r) * (p.work_lost_s + grace + LAG_S) for p, r, grace in stands],
    )
    wanted = [
        defrag.Wanted(
            vectors[k], _milli(r) * (HORIZON_S + max(0, now_s - r.queued_at)) // settings.DEFRAG_GAIN, r.replicas
        )
        for k, r in zip(of[len(stands) :], waits, strict=True)
    ]
    found = defrag.search(packer.state, packer.tables, work, wanted, settings.DEFRAG_MOVES)
    movers: dict[int, dict[int, int]] = defaultdict(dict)
    for move in found.moves:
        placement, _, grace = stands[move.index]
        movers[move.wanted][placement.job] = grace
    hosts: dict[int, list[int]] = defaultdict(list)
    for r in found.rooms:
        hosts[r.wanted].append(taken.host_of[r.row])
    return [Room(waits[i].job, rows, movers[i]) for i, rows in hosts.items()]


def _only_room(r: Request) -> bool:
    """Whether it could start at once if there were room: its ceilings hold it already."""
    free = (r.quota_milli, r.milli), (r.limit_milli, r.milli), (r.rate_left, r.milli * r.price)
    return r.price_ok and r.budget_ok and not r.promised_start and all(left < 0 or left >= need for left, need in free)


def _milli(r: Request) -> int:
    return max(LEAST_MILLI, r.milli)


def _closed(taken: Snapshot) -> Fleet:
    """The fleet without the hosts that are held for others: nobody moves there, and nobody leaves them."""
    held = [row for r in taken.requests for row in r.promised_hosts if row >= 0]
    flags = taken.fleet.flags.copy()
    same = np.isin(taken.fleet.host_id, taken.fleet.host_id[held])
    flags[same] |= int(HostFlag.DRAINING)
    return replace(taken.fleet, flags=flags)


# --- the rows
def _apply(cell_id: int, found: Sequence[Room], now: datetime) -> list[int]:
    """Asks the movers of each room to leave and promises it to who waits, where all of it is still as it was."""
    left: list[int] = []
    if not found:
        return left
    with transaction.atomic():
        acquire(
            (Lock.CELL, cell_id)
        )  # nobody is placed meanwhile: where a job stands, it stays until its site says more
        everybody = [job for room in found for job in room.movers]
        live = Placement.objects.filter(job_id__in=everybody).exclude(state__in=Placement.FINAL)
        placement_service.lock_sites(live.values_list("site_id", flat=True))
        able = {job for job, _ in _movable(cell_id, now, everybody).values()}
        served = set(_served(cell_id, [room.job for room in found]))
        for room in found:
            if room.job in served and able >= room.movers.keys():
                left += _make(room, now)
        if left:
            job_service.nudge_cell(cell_id)
    return left


def _make(room: Room, now: datetime) -> list[int]:
    start = now.replace(microsecond=0) + timedelta(seconds=max(room.movers.values()) + LAG_S)
    job = Job.objects.get(pk=room.job)
    size = f"{job.gpus} GPU{'s' * (job.gpus != 1)}" if job.gpus else "more CPU and memory"
    gang = f"at once in each of {job.replicas} places" if job.replicas > 1 else "in one host"
    reason = f"{MOVED}: a job that needs {size} {gang} waits, and there is a place for this one elsewhere"
    left = job_service.preempt(room.movers, now=now, actor=ACTOR, reason=reason, increment=["moves"])
    many = f"{len(left)} smaller jobs leave" if len(left) != 1 else "a smaller job leaves"
    theirs = "their hosts" if len(left) != 1 else "its host"
    where = theirs if job.replicas > 1 else "a host"
    told = f"{words.ROOM}: {many} {where} with a checkpoint, by {start.astimezone(UTC):%H:%M:%S} UTC at the latest"
    Decision.objects.filter(job_id=room.job).update(earliest_start=start, held_hosts=room.hosts, suggestion=told)
    replicas.note([job], told, now=now, actor=ACTOR)
    return left
