"""Jobs: submit, cancel, preempt, and what becomes of a job when its placements move. The only writer of their state."""

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from contextlib import nullcontext
from datetime import datetime
from typing import Any, Final

from django.db import connection, transaction
from django.db.models import F

from marketplace import outbox, prepared
from marketplace.errors import MarketError
from marketplace.locks import Lock, acquire
from marketplace.models import Contract, Job, Placement
from marketplace.services import job_rules, job_terms, replicas, secrets
from marketplace.services.transitions import transition_many
from marketplace.tenancy import Actor

# Why a job was asked to stop; `billing.spot` knows them by their first words.
CANCELLED: Final = "cancelled by the customer"
CONTRACT_ENDED: Final = "the contract ended"
# Reasons of a placement's end that are ours or the site's, not the job's: the job gets another try without a charge.
# (The words are the agent's, docs/agent-protocol.md, and ours.)
FAULTS = frozenset(
    {
        "host_lost", "site_lost", "start_failed", "supervisor_lost", "lease_expired", "power_shed", "gang_member_failed",
        "drained", "host drained", "preempted", "killed_after_grace", "stopped", "not_started",
    }
)  # fmt: skip
CYCLE = "scheduler.run_cycle"


def nudge_cell(cell_id: int) -> None:
    outbox.emit(CYCLE, key=str(cell_id), payload={"cell": cell_id})


def submit(actor: Actor, contract: Contract | int, spec: dict[str, Any], *, now: datetime) -> Job:
    """Queue one job under `contract` (or its id); MarketError names what is in the way."""
    return submit_many(actor, [(contract, spec)], now=now)[0]


def submit_many(actor: Actor, wanted: Sequence[tuple[Contract | int, dict[str, Any]]], *, now: datetime) -> list[Job]:
    """Queue jobs, all or none, in bulk statements. `spec` has Job's field names, already checked for shape by the caller.

    Every refusal comes before the first write: inside the caller's transaction there is nothing a savepoint would undo.
    """
    if not wanted:
        return []
    asked = [(c if isinstance(c, int) else c.pk, job_terms.shape_of(spec)) for c, spec in wanted]
    with nullcontext() if connection.in_atomic_block else transaction.atomic():
        held, fitting = job_terms.hold(actor, asked)
        for pk in dict.fromkeys(pk for pk, _ in asked):
            job_terms.check(pk, held, now)
        jobs = []
        for pair, (_, spec) in zip(asked, wanted, strict=True):
            job = _made(held[pair[0]], spec, now)
            if pair not in fitting:
                job_terms.refuse_what_never_fits(job, held[pair[0]])
            jobs.append(job)
        _insert(jobs, actor, now)
        for cell_id in sorted({job.cell_id for job in jobs}):
            nudge_cell(cell_id)
    return jobs


def _made(terms: job_terms.Terms, spec: dict[str, Any], now: datetime) -> Job:
    """The job, not yet a row; refused where its rules or its size cannot be under these terms."""
    plain = {k: v for k, v in spec.items() if k != "secrets"}
    job = Job(
        organization_id=terms.organization_id,
        contract_id=terms.id,
        cell_id=terms.cell_id,
        state=Job.State.QUEUED,
        secrets=secrets.seal(spec["secrets"]) if spec.get("secrets") else None,
        created_at=now,
        queued_at=now,
        **plain,
    )
    job_rules.check(job, terms)
    job_terms.check_size(job, terms)
    return job


_COLUMNS = {field.attname: str(field.column) for field in Job._meta.concrete_fields if not field.primary_key}
_LIST = ", ".join(_COLUMNS.values())
# The rows and the first event of each. One parameter for all columns: JSON is read faster than fifty values are bound.
_INSERT = f"""
WITH made AS (
  INSERT INTO marketplace_job ({_LIST}) SELECT {_LIST} FROM json_populate_recordset(NULL::marketplace_job, %s) RETURNING id
), told AS (
  INSERT INTO marketplace_jobevent (job_id, at, actor, from_state, to_state, reason)
  SELECT id, %s, %s, '', %s, '' FROM made ORDER BY id
)
SELECT id FROM made ORDER BY id
"""  # noqa: S608


def _insert(jobs: list[Job], actor: Actor, now: datetime) -> None:
    """In one statement; the jobs get their ids, in their order."""
    rows = [{column: job.__dict__[name] for name, column in _COLUMNS.items()} for job in jobs]
    made = prepared.rows(_INSERT, [json.dumps(rows, default=_json), now, actor.label[:120], Job.State.QUEUED.value])
    for job, (pk,) in zip(jobs, made, strict=True):
        job.pk = pk
        job._state.adding, job._state.db = False, connection.alias  # noqa: SLF001 (as bulk_create does)


def _json(value: datetime | bytes) -> str:
    return "\\x" + value.hex() if isinstance(value, bytes) else value.isoformat()


def cancel(actor: Actor, job: Job, *, now: datetime) -> Job:
    """Waiting jobs end at once; jobs on hosts drain first (checkpoint signal, grace) and stop being billed now."""
    from marketplace.services import placements

    with transaction.atomic():
        acquire((Lock.CELL, job.cell_id))  # no commit is under way: the sites that we find are all there are
        site_ids = (
            Placement.objects.filter(job=job).exclude(state__in=Placement.FINAL).values_list("site_id", flat=True)
        )
        placements.lock_sites(site_ids)
        moved = transition_many(
            Job, [job.pk], expected=(*Job.WAITING, Job.State.DRAFT), to=Job.State.CANCELLED, now=now, actor=actor.label,
            reason=CANCELLED, set_columns={"finished_at": now, "cancel_requested_at": now},
        )  # fmt: skip
        if not moved:
            fresh = Job.objects.select_for_update(no_key=True).get(pk=job.pk)
            if fresh.state in Job.FINAL:
                raise MarketError("illegal_transition", f"The job is {fresh.state} already.")
            if fresh.cancel_requested_at is None:
                Job.objects.filter(pk=job.pk).update(cancel_requested_at=now, state_reason=CANCELLED)
                drain_jobs([job.pk], now=now, actor=actor.label, reason=CANCELLED)
    job.refresh_from_db()
    return job


def preempt(
    job_ids: Iterable[int], *, now: datetime, actor: str, reason: str, increment: Collection[str] = ()
) -> list[int]:
    """Placed or running jobs become `preempting`, their placements drain; they queue again when those are gone.

    `increment`: counters of the job that grow by one with it.
    """
    moved = transition_many(
        Job,
        job_ids,
        expected=(Job.State.PLACED, Job.State.RUNNING),
        to=Job.State.PREEMPTING,
        now=now,
        actor=actor,
        reason=reason,
        increment=increment,
    )
    drain_jobs(moved, now=now, actor=actor, reason=reason)
    return sorted(moved)


def drain_jobs(job_ids: Iterable[int], *, now: datetime, actor: str, reason: str) -> None:
    from marketplace.services import placements

    live = Placement.objects.filter(job_id__in=list(job_ids)).exclude(state__in=Placement.FINAL)
    placements.request_release(list(live.values_list("pk", flat=True)), now=now, actor=actor, reason=reason)


def checkpointed(newest: dict[int, datetime]) -> None:
    """Jobs have saved their work, at the times given; never back to an older one. The caller holds the sites' locks."""
    if newest:
        with connection.cursor() as cursor:
            cursor.execute(
                "UPDATE marketplace_job j SET checkpointed_at = u.at FROM unnest(%s::bigint[], %s::timestamptz[]) u(id, at)"
                " WHERE j.id = u.id AND (j.checkpointed_at IS NULL OR j.checkpointed_at < u.at)",
                [list(newest), list(newest.values())],
            )


def end_contract(contract_id: int, *, now: datetime) -> None:
    """The contract is over: what waits is cancelled, what runs drains."""
    jobs = Job.objects.filter(contract_id=contract_id).exclude(state__in=Job.FINAL)
    with transaction.atomic():
        acquire((Lock.CELL, Contract.objects.values_list("cell_id", flat=True).get(pk=contract_id)))
        sites = Placement.objects.filter(contract_id=contract_id).exclude(state__in=Placement.FINAL)
        from marketplace.services import placements

        placements.lock_sites(sites.values_list("site_id", flat=True))
        ids = list(jobs.values_list("pk", flat=True))
        transition_many(
            Job, ids, expected=(*Job.WAITING, Job.State.DRAFT), to=Job.State.CANCELLED, now=now, actor="system",
            reason=CONTRACT_ENDED, set_columns={"finished_at": now},
        )  # fmt: skip
        Job.objects.filter(pk__in=ids, state__in=Job.ON_HOSTS, cancel_requested_at=None).update(
            cancel_requested_at=now, state_reason=CONTRACT_ENDED
        )
        drain_jobs(ids, now=now, actor="system", reason=CONTRACT_ENDED)


def settle(job_ids: Iterable[int], *, now: datetime) -> None:
    """Bring jobs in line with the placements of their current attempt. Called, in its transaction, by whoever moved a placement."""
    jobs = {
        j.pk: j
        for j in Job.objects.filter(pk__in=sorted(set(job_ids)), state__in=Job.ON_HOSTS)
        .order_by("pk")
        .select_for_update(no_key=True)
    }
    members: dict[int, list[Placement]] = defaultdict(list)
    rows = Placement.objects.filter(job_id__in=jobs).only(
        "id", "job_id", "attempt", "epoch", "rank", "state", "exit_code", "reason", "running_at", "release_requested_at",
        "finished_at",
    )  # fmt: skip
    for placement in rows:
        members[placement.job_id].append(placement)
    running: list[int] = []
    outcomes: dict[tuple[str, str, int | None], list[int]] = defaultdict(list)
    broken: dict[str, list[int]] = defaultdict(list)
    touched: set[int] = set()  # members of gangs whose table of ranks has changed
    for pk, job in jobs.items():
        gang = replicas.newest(members[pk], job.attempt)
        if gang and all(p.state in Placement.FINAL for p in gang):
            outcomes[_outcome(job, gang)].append(pk)
            continue
        if (
            job.state == Job.State.PLACED
            and any(p.state == "running" for p in gang)
            and all(p.running_at or p.state in Placement.FINAL for p in gang)
        ):
            running.append(pk)
        ended = [p for p in gang if p.state in Placement.FINAL and not replicas.succeeded(p)]
        if ended and not job.cancel_requested_at and job.state != Job.State.PREEMPTING:
            if loss := replicas.lost(job, gang, FAULTS, now):
                replicas.go_on(job, gang, loss, now=now)
                touched.update(p.pk for p in gang)
                nudge_cell(job.cell_id)
            elif fresh := [p for p in ended if p.rank not in job.lost_ranks]:
                if all(replicas.word(p) in FAULTS for p in fresh):
                    replicas.hold(gang, at=replicas.lost_at(fresh, now))
                broken[fresh[0].reason or "a replica failed"].append(pk)
        if job.repair_since is not None and replicas.whole_again(job, gang, now=now):
            touched.update(p.pk for p in gang)
    transition_many(
        Job,
        running,
        expected=(Job.State.PLACED,),
        to=Job.State.RUNNING,
        now=now,
        actor="system",
        set_columns={"started_at": now},
    )
    for reason, ids in broken.items():  # one replica is gone: the gang cannot go on without it
        drain_jobs(ids, now=now, actor="system", reason=f"a replica ended: {reason}"[:200])
    if touched:
        _tell_sites(touched)
    for (state, reason, code), ids in outcomes.items():
        _finish(ids, jobs, state=state, reason=reason, code=code, now=now)


def _tell_sites(placement_ids: Iterable[int]) -> None:
    from marketplace.services import placements

    placements.touch_sites(Placement.objects.filter(pk__in=placement_ids).values_list("site_id", flat=True))


def _outcome(job: Job, gang: list[Placement]) -> tuple[str, str, int | None]:
    """(state, reason, exit code) of a job whose placements are all final."""
    if job.on_replica_loss == Job.OnReplicaLoss.SHRINK:  # what it went on without says nothing of the work
        gang = [p for p in gang if p.rank not in job.lost_ranks]
    worst = max((p.exit_code for p in gang if p.exit_code is not None), default=None, key=abs)
    if all(replicas.succeeded(p) for p in gang):
        return Job.State.SUCCEEDED, "all replicas exited 0", 0
    if job.cancel_requested_at is not None:
        return Job.State.CANCELLED, job.state_reason or "cancelled", worst
    if job.state == Job.State.PREEMPTING:
        return Job.State.REQUEUED, job.state_reason or "preempted", None
    reasons = [p.reason.split(":")[0] for p in gang if p.reason]
    faults = sorted((r for r in reasons if r in FAULTS), key=lambda r: r in replicas.UNCOUNTED)
    fault = faults[0] if faults else None  # what broke the gang, rather than how the others were asked to leave
    own = next((p for p in gang if p.state == "failed" and p.reason.split(":")[0] not in FAULTS), None)
    if fault and own is None:
        if job.restarts < job.max_restarts:
            return Job.State.REQUEUED, f"{fault}: trying again", None
        return Job.State.FAILED, f"{fault}, {job.restarts} restarts used", worst
    reason = own.reason if own and own.reason else f"exit code {worst}"
    return Job.State.FAILED, reason[:300], worst


def _finish(ids: list[int], jobs: dict[int, Job], *, state: str, reason: str, code: int | None, now: datetime) -> None:
    if state == Job.State.REQUEUED:
        moved = transition_many(
            Job, ids, expected=Job.ON_HOSTS, to=state, now=now, actor="system", reason=reason,
            set_columns=replicas.FRESH,
        )  # fmt: skip
        faulty = [pk for pk in moved if moved[pk] != Job.State.PREEMPTING]
        Job.objects.filter(pk__in=faulty).update(restarts=F("restarts") + 1)
    else:
        moved = transition_many(
            Job, ids, expected=Job.ON_HOSTS, to=state, now=now, actor="system", reason=reason,
            set_columns={"finished_at": now, "exit_code": code, "repair_since": None},
        )  # fmt: skip
    for cell_id in sorted({jobs[pk].cell_id for pk in moved}):
        nudge_cell(cell_id)
