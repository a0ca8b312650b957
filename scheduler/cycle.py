"""One cycle of one cell: snapshot, plan, commit, record. One at a time per cell (advisory lock), fenced by the cell's generation."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from time import perf_counter_ns
from typing import Any

from django.db import connection, transaction
from django.db.models import F
from django.utils import timezone

from marketplace import outbox
from marketplace.models import Cell, Job, Placement, ReservationBlock
from marketplace.services import jobs as job_service
from marketplace.services import placements as placement_service
from marketplace.services import replicas
from scheduler import commit, snapshot
from scheduler.core.plan import plan
from scheduler.core.types import Decision as Decided
from scheduler.core.types import Reason
from scheduler.models import Cycle, Decision

AGAIN_S = 0.3  # when another cycle of the cell runs, this nudge comes back then


@contextmanager
def _alone(cell_id: int) -> Iterator[bool]:
    """Session-level advisory lock for the length of a cycle; False when somebody else holds it."""
    number = (0x43 << 56) | cell_id
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_try_advisory_lock(%s)", [number])
        mine = bool(cursor.fetchone()[0])
    try:
        yield mine
    finally:
        if mine:
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_advisory_unlock(%s)", [number])


def run(cell_id: int, *, now: datetime | None = None) -> Cycle | None:
    """Plan and commit the cell once. None when nothing waits, or when another cycle runs (then a nudge is left for later)."""
    moment = now or timezone.now()
    with _alone(cell_id) as mine:
        if not mine:
            with transaction.atomic():
                outbox.emit(job_service.CYCLE, key=str(cell_id), payload={"cell": cell_id}, delay_s=AGAIN_S)
            return None
        evict_for_reservations(cell_id, now=moment)
        waits = Job.objects.filter(cell_id=cell_id, state__in=Job.WAITING).exists()
        if not waits and not replicas.waiting().filter(cell_id=cell_id).exists():
            return None
        Cell.objects.filter(pk=cell_id).update(generation=F("generation") + 1)
        cell = Cell.objects.get(pk=cell_id)
        return _run(cell, moment)


def _run(cell: Cell, now: datetime) -> Cycle:
    t0 = perf_counter_ns()
    outermost = not connection.in_atomic_block
    with transaction.atomic():
        if outermost:  # one picture of the cell, whatever commits meanwhile
            with connection.cursor() as cursor:
                cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        taken = snapshot.take(cell, now=now)
    t1 = perf_counter_ns()
    made = plan(
        taken.fleet,
        taken.requests,
        taken.running,
        policy=taken.policy,
        seed=cell.generation,
        now_s=int(now.timestamp()),
    )
    t2 = perf_counter_ns()
    outcome = commit.commit(taken, made, now=now)
    t3 = perf_counter_ns()
    record = Cycle.objects.create(
        cell=cell,
        generation=cell.generation,
        started_at=now,
        jobs_considered=len(taken.requests),
        jobs_placed=len(outcome.placed),
        placements=outcome.placements,
        preempted=len(outcome.preempted),
        conflicts=len(outcome.conflicts),
        snapshot_us=(t1 - t0) // 1000,
        plan_us=(t2 - t1) // 1000,
        commit_us=(t3 - t2) // 1000,
    )
    _decide(record, taken, made.decisions, outcome)
    if outcome.conflicts:  # the rows had moved: look again soon
        with transaction.atomic():
            outbox.emit(job_service.CYCLE, key=str(cell.pk), payload={"cell": cell.pk}, delay_s=AGAIN_S)
    return record


def _decide(record: Cycle, taken: snapshot.Snapshot, decided: list[Decided], outcome: commit.Outcome) -> None:
    """The last decision on each job looked at, one row a job."""
    rows = [_decision(record, taken, d, outcome) for d in decided]
    Decision.objects.bulk_create(
        rows,
        update_conflicts=True,
        unique_fields=["job"],
        update_fields=[
            "cycle",
            "at",
            "outcome",
            "reason",
            "stages",
            "candidates",
            "binding",
            "suggestion",
            "earliest_start",
        ],
    )


def _decision(record: Cycle, taken: snapshot.Snapshot, d: Decided, outcome: commit.Outcome) -> Decision:
    placed = d.placed and d.job not in outcome.conflicts
    reason = Reason.OK if placed else outcome.conflicts.get(d.job, d.reason)
    return Decision(
        job_id=d.job,
        cycle=record,
        at=record.started_at,
        outcome="placed" if placed else "waiting",
        reason=reason.name,
        stages=[stage.name for stage, _ in d.stages],
        candidates=[count for _, count in d.stages],
        binding=_binding(taken, d) if not placed else "",
        suggestion=d.change[:300],
        earliest_start=datetime.fromtimestamp(d.earliest_start, UTC) if d.earliest_start else None,
    )


def _binding(taken: snapshot.Snapshot, d: Decided) -> str:
    text = d.binding.name.lower()
    if d.node >= 0:
        from marketplace.models import PowerNode

        name = PowerNode.objects.filter(pk=taken.node_of[d.node]).values_list("name", flat=True).first()
        text += f" at power node {name}"
    return f"{text}, short by {d.short}" if d.short else text


def evict_for_reservations(cell_id: int, *, now: datetime) -> list[int]:
    """Jobs of others that stand on GPUs whose reservation's claim has begun give way (they queue again)."""
    blocks = ReservationBlock.objects.filter(
        host__cell_id=cell_id, reservation__state="firm", reservation__claims_at__lte=now, reservation__ends_at__gt=now
    ).values_list("host_id", "gpu_indices", "reservation__contract_id")
    held: dict[int, list[tuple[set[int], Any]]] = {}
    for host_id, indices, contract_id in blocks:
        held.setdefault(host_id, []).append((set(indices), contract_id))
    live = Placement.objects.filter(host_id__in=held).exclude(state__in=(*Placement.FINAL, "draining"))
    strangers = {
        p.job_id: p.site_id
        for p in live.only("job_id", "site_id", "host_id", "contract_id", "gpu_indices")
        if any(p.contract_id != contract and gpus & set(p.gpu_indices) for gpus, contract in held[p.host_id])
    }
    if not strangers:
        return []
    with transaction.atomic():
        placement_service.lock_sites(strangers.values())
        return job_service.preempt(strangers, now=now, actor="scheduler", reason="a reservation begins on these GPUs")


def waiting_cells(now: datetime) -> list[int]:
    """Cells with jobs or lost ranks that wait, or with a reservation that begins within a minute."""
    queued = Job.objects.filter(state__in=Job.WAITING).values_list("cell_id", flat=True).distinct()
    soon = ReservationBlock.objects.filter(
        reservation__state="firm", reservation__claims_at__range=(now - timedelta(minutes=1), now)
    ).values_list("host__cell_id", flat=True)
    mended = replicas.waiting().values_list("cell_id", flat=True).distinct()
    return sorted({*queued, *soon, *mended})
