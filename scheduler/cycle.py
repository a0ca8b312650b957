"""One cycle of one cell: snapshot, plan, commit, record. One at a time per cell (advisory lock), fenced by the cell's generation."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from time import monotonic, perf_counter_ns, sleep

import numpy as np
from django.db import DatabaseError, connection, transaction
from django.utils import timezone

from marketplace import arrays, outbox, prepared
from marketplace.locks import Lock, acquire
from marketplace.models import Cell, Job, Placement, PowerNode
from marketplace.services import drains, holds, replicas
from marketplace.services import jobs as job_service
from marketplace.services import placements as placement_service
from scheduler import commit, promises, reasons, snapshot, waiting
from scheduler import record as records
from scheduler.core.plan import plan
from scheduler.core.types import Decision as Decided
from scheduler.core.types import Plan, Reason
from scheduler.models import Cycle

log = logging.getLogger(__name__)
AGAIN_S = 0.3  # when another cycle of the cell runs, this nudge comes back then
REST_S = 0.1  # a worker's, at most, after a cycle
# Refused for what nobody's leaving would change.
NO_ROOM_NEEDED = (
    Reason.OVER_QUOTA, Reason.ORGANIZATION_LIMIT, Reason.HOURLY_LIMIT, Reason.BUDGET_USED, Reason.PRICE_LIMIT, Reason.INVALID,
    Reason.EMPTY_CELL,
)  # fmt: skip


@contextmanager
def alone(cell_id: int) -> Iterator[bool]:
    """Session-level advisory lock for the length of a cycle; False when somebody else holds it."""
    number = (0x43 << 56) | cell_id
    mine = prepared.row("SELECT pg_try_advisory_lock(%s)", [number]) == (True,)
    try:
        yield mine
    finally:
        if mine:
            _let_go(number)


def _let_go(number: int) -> None:
    """Gives up the lock. It is the session's: where it cannot be asked any more, the session ends and the lock with it, and
    whatever broke the cycle is what its caller hears of.
    """
    try:
        prepared.rows("SELECT pg_advisory_unlock(%s)", [number])
    except DatabaseError:
        log.exception("the lock of cell %s goes with its session", number & 0xFFFFFFFF)
        connection.close()


def run(cell_id: int, *, now: datetime | None = None) -> Cycle | None:
    """Plan and commit the cell once. None when nothing waits, or when another cycle runs (then a nudge is left for later)."""
    try:
        return attempt(cell_id, now=now)
    except outbox.Busy:
        with transaction.atomic():
            outbox.emit(job_service.CYCLE, key=str(cell_id), payload={"cell": cell_id}, delay_s=AGAIN_S)
        return None


def attempt(cell_id: int, *, now: datetime | None = None, rest_s: float = 0) -> Cycle | None:
    """As `run`; raises `outbox.Busy` when another cycle of the cell runs.

    A cycle is followed by a rest as long as it took, `rest_s` at most, in which nobody else begins one: under load what
    arrives meanwhile is one cycle's work instead of several', and cycles leave CPU to those who submit.
    """
    began = monotonic()
    moment = now or timezone.now()
    with alone(cell_id) as mine:
        if not mine:
            raise outbox.Busy(lambda: runs(cell_id))
        evict_for_reservations(cell_id, now=moment)
        if not (prepared.row(_SOMEBODY, [cell_id]) == (True,) or replicas.mending(cell_id)):
            return None
        cell = _begun(cell_id)
        made, keep = _run(cell, moment)
        if rest_s and made.jobs_considered < waiting.MAX_JOBS:  # else more waits already
            sleep(min(rest_s, monotonic() - began))
    keep()  # nobody waits for it: the next cycle may have begun
    return made


_SOMEBODY = "SELECT EXISTS (SELECT FROM marketplace_job WHERE cell_id = %s AND state IN ('queued', 'requeued'))"


def _begun(cell_id: int) -> Cell:
    """The cell in its next generation: what an older cycle of it still plans is void."""
    names = [field.attname for field in Cell._meta.concrete_fields]
    told = f"UPDATE marketplace_cell SET generation = generation + 1 WHERE id = %s RETURNING {', '.join(names)}"  # noqa: S608
    row = prepared.row(told, [cell_id])
    if row is None:
        raise Cell.DoesNotExist(f"cell {cell_id}")
    return Cell.from_db(connection.alias, names, row)


def runs(cell_id: int) -> bool:
    """Whether a cycle of the cell runs now."""
    with alone(cell_id) as mine:
        return not mine


def _run(cell: Cell, now: datetime) -> tuple[Cycle, Callable[[], object]]:
    """The cycle, and what writes its record when the cell is free again."""
    t0 = perf_counter_ns()
    hungry = _left_somebody(cell)
    taken = picture(cell, now, running=hungry)
    t1 = perf_counter_ns()
    made = _plan(taken)
    t2 = perf_counter_ns()
    if not hungry and any(not d.placed and d.reason not in NO_ROOM_NEEDED for d in made.decisions):
        # Somebody found no room: only now it matters who could give way, and who ends when.
        taken = picture(cell, now, running=True)
        t3 = perf_counter_ns()
        made = _plan(taken)
        t1, t2 = t1 + t3 - t2, perf_counter_ns()
    with transaction.atomic():
        outcome = commit.commit(taken, made, now=now)
        record = Cycle.objects.create(
            cell=cell,
            generation=cell.generation,
            started_at=now,
            jobs_considered=len(taken.requests),
            jobs_placed=len(outcome.placed),
            placements=outcome.placements,
            preempted=len(outcome.preempted),
            conflicts=len(outcome.conflicts),
            promises_broken=promises.tell_broken(cell, taken.requests, made, now),
            snapshot_us=(t1 - t0) // 1000,
            plan_us=(t2 - t1) // 1000,
            commit_us=(perf_counter_ns() - t2) // 1000,
        )
        _decide(record, taken, made.decisions, outcome)
        if outcome.conflicts:  # the rows had moved: look again soon
            outbox.emit(job_service.CYCLE, key=str(cell.pk), payload={"cell": cell.pk}, delay_s=AGAIN_S)
        elif len(taken.requests) >= waiting.MAX_JOBS and (outcome.placed or waiting.unseen(cell.pk, now)):
            job_service.nudge_cell(cell.pk)  # more than one cycle's worth waits
    return record, partial(_keep, record, taken, made, outcome.conflicts)


def _keep(record: Cycle, taken: snapshot.Snapshot, made: Plan, refused: dict[int, Reason]) -> None:
    reasons.keep(record, taken, made, refused)
    records.keep(record, taken, made, refused)


def picture(cell: Cell, now: datetime, *, running: bool) -> snapshot.Snapshot:
    """One picture of the cell, whatever commits meanwhile."""
    outermost = not connection.in_atomic_block
    with transaction.atomic():
        if outermost:
            with connection.cursor() as cursor:
                cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        return snapshot.take(cell, now=now, running=running)


def _plan(taken: snapshot.Snapshot) -> Plan:
    return plan(
        taken.fleet,
        taken.requests,
        taken.running,
        policy=taken.policy,
        seed=taken.generation,
        now_s=int(taken.now.timestamp()),
    )


def _left_somebody(cell: Cell) -> bool:
    """Whether the cell's last cycle left jobs waiting: the next will want to know who could give way."""
    last = "SELECT jobs_considered > jobs_placed FROM scheduler_cycle WHERE cell_id = %s ORDER BY id DESC LIMIT 1"
    return prepared.row(last, [cell.pk]) == (True,)


_PLACED = """
INSERT INTO scheduler_decision (job_id, cycle_id, at, outcome, reason, stages, candidates, binding, suggestion, earliest_start)
SELECT id, %s, %s, 'placed', 'OK', '{}', '{}', '', '', NULL FROM unnest(%s::bigint[]) id ORDER BY id
"""
_WAITS = """
INSERT INTO scheduler_decision (job_id, cycle_id, at, outcome, reason, stages, candidates, binding, suggestion, earliest_start,
  held_hosts)
SELECT id, %s, %s, 'waiting', reason, stages::text[], candidates::int[], binding, suggestion, to_timestamp(nullif(start, 0)),
  nullif(held, '{}')::bigint[]
FROM unnest(%s::bigint[], %s::text[], %s::text[], %s::text[], %s::text[], %s::text[], %s::bigint[], %s::text[])
  u(id, reason, stages, candidates, binding, suggestion, start, held) ORDER BY id
"""
_REPLACE = """
ON CONFLICT (job_id) DO UPDATE SET cycle_id = excluded.cycle_id, at = excluded.at, outcome = excluded.outcome,
  reason = excluded.reason, stages = excluded.stages, candidates = excluded.candidates, binding = excluded.binding,
  suggestion = excluded.suggestion, earliest_start = excluded.earliest_start,
  held_hosts = excluded.held_hosts
"""


def _decide(record: Cycle, taken: snapshot.Snapshot, decided: list[Decided], outcome: commit.Outcome) -> None:
    """The last decision on each job looked at, one row a job, by one statement for those placed and one for the others."""
    head = [record.pk, record.started_at]
    placed = [d.job for d in decided if d.placed and d.job not in outcome.conflicts]
    if placed:
        arrays.execute(_PLACED + _REPLACE, [*head, np.array(placed, np.int64)])
    waits = {d.job: d for d in decided if not d.placed}
    waits |= _refused(decided, taken, outcome)
    if waits:
        names = _node_names(taken, {d.node for d in waits.values()})
        reasons = [outcome.conflicts.get(job, d.reason).name for job, d in waits.items()]
        stages = ["{" + ",".join(stage.name for stage, _ in d.stages) + "}" for d in waits.values()]
        candidates = ["{" + ",".join(str(count) for _, count in d.stages) + "}" for d in waits.values()]
        binding = [_binding(d, names)[:200] for d in waits.values()]
        changes = [d.change[:300] for d in waits.values()]
        starts = np.array([d.earliest_start for d in waits.values()], np.int64)
        ids, held = np.array(list(waits), np.int64), promises.held_hosts(list(waits.values()), taken.host_of)
        arrays.execute(_WAITS + _REPLACE, [*head, ids, reasons, stages, candidates, binding, changes, starts, held])


def _refused(decided: list[Decided], taken: snapshot.Snapshot, outcome: commit.Outcome) -> dict[int, Decided]:
    """Decisions on jobs that the commit did not place. What they were promised before is still theirs."""
    asked = {r.job: r for r in taken.requests if r.job in outcome.conflicts}
    found = {}
    for d in decided:
        if d.placed and (r := asked.get(d.job)):
            kept = bool(r.promised_hosts) and min(r.promised_hosts) >= 0
            found[d.job] = d._replace(
                binding=outcome.conflicts[d.job],
                earliest_start=r.promised_start if kept else 0,
                held=r.promised_hosts if kept else (),
            )
    return found


def _node_names(taken: snapshot.Snapshot, nodes: set[int]) -> dict[int, str]:
    """Names of power nodes by their position."""
    ids = {taken.node_of[node]: node for node in nodes if node >= 0}
    return {ids[pk]: name for pk, name in PowerNode.objects.filter(pk__in=ids).values_list("id", "name")}


def _binding(d: Decided, names: dict[int, str]) -> str:
    text = d.binding.name.lower()
    if d.node >= 0:
        text += f" at power node {names[d.node]}"
    return f"{text}, short by {d.short}" if d.short else text


_CLAIMED = """
SELECT EXISTS (SELECT FROM marketplace_reservation r JOIN marketplace_reservationblock b ON b.reservation_id = r.id
  JOIN marketplace_host h ON h.id = b.host_id WHERE r.state = 'firm' AND r.claims_at <= %(now)s AND r.ends_at > %(now)s
  AND (%(cell)s::bigint IS NULL OR h.cell_id = %(cell)s))
"""
# Placements of others on GPUs whose reservation's claim has begun, that nobody has asked to leave yet.
_STRANGERS = """
SELECT DISTINCT p.cell_id, p.id, p.site_id FROM marketplace_reservation r
JOIN marketplace_reservationblock b ON b.reservation_id = r.id
JOIN marketplace_placement p ON p.host_id = b.host_id AND p.gpu_indices && b.gpu_indices AND p.contract_id <> r.contract_id
WHERE r.state = 'firm' AND r.claims_at <= %(now)s AND r.ends_at > %(now)s AND p.release_requested_at IS NULL
  AND p.state NOT IN ('released', 'failed', 'lost') AND (%(cell)s::bigint IS NULL OR p.cell_id = %(cell)s)
"""


def _strangers(cell_id: int | None, now: datetime) -> list[tuple[int, int, int]]:
    """(cell, placement, site) of each, and of those who hold the CPU, RAM or NVMe that goes with such GPUs; of all cells where none is
    named.
    """
    if prepared.row(_CLAIMED, {"cell": cell_id, "now": now}) != (True,):
        return []
    found = set(prepared.rows(_STRANGERS, {"cell": cell_id, "now": now}))
    return sorted(found | set(holds.crowding(cell_id, now)))


def evict_for_reservations(cell_id: int, *, now: datetime) -> list[int]:
    """What stands of others on GPUs whose reservation's claim has begun gives way: the replicas there, or their whole jobs, which
    queue again. Returns the jobs.
    """
    if not _strangers(cell_id, now):
        return []
    with transaction.atomic():
        # Nobody is placed and no reservation moves meanwhile: whom we find is who stands there.
        acquire((Lock.CELL, cell_id))
        found = _strangers(cell_id, now)
        placement_service.lock_sites(site for _, _, site in found)
        going = Placement.objects.filter(pk__in=[pk for _, pk, _ in found]).order_by("pk")
        return drains.take_off(
            going, now=now, actor="scheduler", reason="preempted: a reservation begins on these GPUs"
        )


def waiting_cells(now: datetime) -> list[int]:
    """Cells with jobs or lost ranks that wait, or with strangers on GPUs that are claimed by now."""
    queued = Job.objects.filter(state__in=Job.WAITING).values_list("cell_id", flat=True).distinct()
    mended = replicas.waiting().values_list("cell_id", flat=True).distinct()
    return sorted({*queued, *mended, *(cell for cell, _, _ in _strangers(None, now))})
