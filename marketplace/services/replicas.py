"""When a replica of a running gang is lost: the rest goes on, by the job's own policy, or the gang starts again.

A replica is lost when its placement ended by no doing of the job (its host died, its site asked it to leave, its start failed).
`replace_replica`: its rank waits to be placed again, inside the gang's own domain, while the others keep running. `shrink`: the
others go on without it, as long as `min_replicas` are left. Either way the job's epoch grows, and with it the table of ranks
that the others are told (services.agents). Whatever leaves nobody standing is a restart of the gang (services.jobs).

Nobody pays for waiting: from the last good sign of what was lost until the gang is whole again the others are `held` on the
placement's timeline, which is what is billed.
"""

from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from django.db.models import Q, QuerySet

from marketplace import prepared
from marketplace.models import Job, JobEvent, Placement, PlacementEvent

HELD = "held"
# Ends that somebody asked for: they lose the replica, and do not count against max_restarts.
UNCOUNTED = frozenset({"drained", "preempted", "killed_after_grace", "stopped", "not_started"})
# It exited because it was asked to: a checkpoint written, not the work done, whatever its exit code.
ASKED = frozenset({"drained", "killed_after_grace", "power_shed", "lease_expired", "stopped", "gang_member_failed"})


class Loss(NamedTuple):
    """Ranks that a gang goes on without, for now or for good."""

    ranks: tuple[int, ...]
    reason: str
    at: datetime  # from here on the others are not billed
    counted: bool


def newest(rows: Iterable[Placement], attempt: int) -> list[Placement]:
    """The placement of each rank that stands for it now, by rank."""
    found: dict[int, Placement] = {}
    for row in rows:
        if row.attempt == attempt and (row.rank not in found or found[row.rank].epoch < row.epoch):
            found[row.rank] = row
    return [found[rank] for rank in sorted(found)]


def word(placement: Placement) -> str:
    """The reason's first word, which says whose doing the end was."""
    return placement.reason.split(":")[0]


def succeeded(placement: Placement) -> bool:
    return placement.state == "released" and placement.exit_code == 0 and word(placement) not in ASKED


def lost(job: Job, gang: Sequence[Placement], faults: Collection[str], now: datetime) -> Loss | None:
    """What a running gang has just lost and can go on without; None where it cannot, or lost nothing new.

    Without a replica that is still wanted there is nobody to go on; an end of the job's own doing ends all of it.
    """
    if job.state != Job.State.RUNNING or job.on_replica_loss == Job.OnReplicaLoss.RESTART_GANG:
        return None
    fresh = [p for p in gang if p.state in Placement.FINAL and not succeeded(p) and p.rank not in job.lost_ranks]
    standing = [p for p in gang if p.state not in Placement.FINAL and p.release_requested_at is None]
    if not fresh or not standing or any(word(p) not in faults for p in fresh):
        return None
    counted = any(word(p) not in UNCOUNTED for p in fresh)
    if counted and job.restarts >= job.max_restarts:
        return None
    ranks = tuple(p.rank for p in fresh)
    if job.on_replica_loss == Job.OnReplicaLoss.SHRINK:
        left = sum(1 for p in gang if p.rank not in {*ranks, *job.lost_ranks} and (p in standing or succeeded(p)))
        if left < (job.min_replicas or job.replicas):
            return None
    return Loss(ranks, word(fresh[0]), lost_at(fresh, now), counted)


def may_lose(job: Job, gang: Sequence[Placement], ranks: Collection[int]) -> bool:
    """Whether a running gang goes on when these ranks are asked to leave. Asking costs no restart."""
    if job.state != Job.State.RUNNING or job.cancel_requested_at is not None:
        return False
    left = [
        p for p in gang if p.rank not in ranks and p.state not in Placement.FINAL and p.release_requested_at is None
    ]
    if job.on_replica_loss == Job.OnReplicaLoss.REPLACE_REPLICA:
        return bool(left)
    done = sum(1 for p in gang if p.rank not in job.lost_ranks and succeeded(p))
    shrinks = job.on_replica_loss == Job.OnReplicaLoss.SHRINK
    return shrinks and bool(left) and len(left) + done >= (job.min_replicas or job.replicas)


def lost_at(fresh: Iterable[Placement], now: datetime) -> datetime:
    """The last good sign of the first that was lost: its own bill ends there."""
    return min([p.release_requested_at or p.finished_at or now for p in fresh] + [now])


def go_on(job: Job, gang: Sequence[Placement], loss: Loss, *, now: datetime) -> None:
    """Record the loss on the locked job: a new epoch, ranks to place again or to do without, the others held."""
    ranks = sorted({*job.lost_ranks, *loss.ranks})
    replace = job.on_replica_loss == Job.OnReplicaLoss.REPLACE_REPLICA
    job.lost_ranks, job.epoch = ranks, job.epoch + 1
    job.repair_since = (job.repair_since or now) if replace else None
    job.restarts += loss.counted
    job.save(update_fields=["lost_ranks", "epoch", "repair_since", "restarts"])
    names = ", ".join(str(rank) for rank in loss.ranks)
    what = "to be placed again" if replace else f"going on with {job.replicas - len(ranks)}"
    note([job], f"lost rank {names} ({loss.reason}): {what}", now=now)
    others = hold(gang, at=loss.at)
    if not replace:
        release(others, at=now)


def hold(gang: Iterable[Placement], *, at: datetime) -> list[Placement]:
    """Running members wait for others from `at` on, unless they wait already."""
    running = [p for p in gang if p.state == "running" and p.running_at is not None]
    waiting = _held({p.pk for p in running})
    _tell([p for p in running if p.pk not in waiting], "running", HELD, at=at)
    return running


def release(gang: Iterable[Placement], *, at: datetime) -> None:
    """What was held works again."""
    rows = list(gang)
    waiting = _held({p.pk for p in rows})
    _tell([p for p in rows if p.pk in waiting], HELD, "running", at=at)


def whole_again(job: Job, gang: Sequence[Placement], *, now: datetime) -> bool:
    """A gang that was repaired runs in full: its members are billed again from the start of the last of them."""
    if job.repair_since is None or job.lost_ranks:
        return False
    if not all(succeeded(p) or (p.state in {"running", "draining"} and p.running_at is not None) for p in gang):
        return False
    began = max((p.running_at for p in gang if p.running_at is not None), default=now)
    release([p for p in gang if p.state == "running"], at=min(began, now))
    job.repair_since = None
    job.save(update_fields=["repair_since"])
    note([job], "the gang is whole again", now=now)
    return True


def placed_again(job_ids: Collection[int], *, now: datetime, actor: str) -> int:
    """The lost ranks of these locked jobs have placements again (scheduler.commit). Returns how many of them still waited."""
    rows = list(waiting().filter(pk__in=job_ids).order_by("pk"))
    note(rows, "lost ranks placed again", now=now, actor=actor)
    return waiting().filter(pk__in=[job.pk for job in rows]).update(lost_ranks=[])


FRESH: dict[str, Any] = {"lost_ranks": [], "repair_since": None}  # columns of a job whose gang is gone as a whole


def note(jobs: Iterable[Job], reason: str, *, now: datetime, actor: str = "system") -> None:
    """An event of the job's story that is no change of its state."""
    JobEvent.objects.bulk_create(
        JobEvent(job=job, at=now, actor=actor, from_state=job.state, to_state=job.state, reason=reason[:300])
        for job in jobs
    )


def waiting() -> QuerySet[Job]:
    """Running jobs with ranks that wait to be placed again."""
    rows = Job.objects.filter(repair_since__isnull=False, state=Job.State.RUNNING, cancel_requested_at=None)
    return rows.exclude(lost_ranks=[])


_MENDING = """
SELECT id, attempt, epoch, lost_ranks FROM marketplace_job WHERE cell_id = %s AND repair_since IS NOT NULL AND state = 'running'
  AND cancel_requested_at IS NULL AND lost_ranks <> '{}'
"""


def mending(cell_id: int) -> list[tuple[int, int, int, list[int]]]:
    """(job, attempt, epoch, ranks) of `waiting` in a cell."""
    return prepared.rows(_MENDING, [cell_id])


def _held(ids: Collection[int]) -> set[int]:
    """Those whose newest word on holding is that they are."""
    rows = PlacementEvent.objects.filter(Q(from_state=HELD) | Q(to_state=HELD), placement_id__in=ids)
    state = dict(rows.order_by("id").values_list("placement_id", "to_state"))
    return {pk for pk, to in state.items() if to == HELD}


def _tell(rows: Iterable[Placement], before: str, after: str, *, at: datetime) -> None:
    PlacementEvent.objects.bulk_create(
        PlacementEvent(
            placement=p, at=at, actor="system", from_state=before, to_state=after, reason="waits for its gang"
        )
        for p in rows
    )
