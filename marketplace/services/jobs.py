"""Jobs: submit, cancel, preempt, and what becomes of a job when its placements move. The only writer of their state."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from contextlib import nullcontext
from datetime import datetime
from typing import Any

from django.db import connection, transaction
from django.db.models import F

from marketplace import outbox
from marketplace.errors import MarketError
from marketplace.locks import Lock, acquire
from marketplace.models import BillingStanding, Contract, Host, Job, JobEvent, Placement
from marketplace.rows import Read
from marketplace.services import job_rules, replicas, screening, secrets
from marketplace.services.transitions import transition_many
from marketplace.tenancy import Actor

# Reasons of a placement's end that are ours or the site's, not the job's: the job gets another try without a charge.
# (The words are the agent's, docs/agent-protocol.md, and ours.)
FAULTS = frozenset(
    {
        "host_lost", "site_lost", "start_failed", "supervisor_lost", "lease_expired", "power_shed", "gang_member_failed",
        "drained", "host drained", "preempted", "killed_after_grace", "stopped", "not_started",
    }
)  # fmt: skip
CYCLE = "scheduler.run_cycle"
_CONTRACT = Read(Contract, "WHERE t.id = %s AND t.organization_id = %s", "listing", "site")


def nudge_cell(cell_id: int) -> None:
    outbox.emit(CYCLE, key=str(cell_id), payload={"cell": cell_id})


def contract_of(actor: Actor, pk: int) -> Contract | None:
    """A contract that the actor's own organization holds, with its listing and its site."""
    return _CONTRACT.first([pk, actor.organization_id])


def submit(actor: Actor, contract: Contract, spec: dict[str, Any], *, now: datetime) -> Job:
    """Queue one job under `contract`; MarketError names what is in the way."""
    return submit_many(actor, [(contract, spec)], now=now)[0]


def submit_many(actor: Actor, wanted: Sequence[tuple[Contract, dict[str, Any]]], *, now: datetime) -> list[Job]:
    """Queue jobs, all or none, in bulk statements. `spec` has Job's field names, already checked for shape by the caller.

    Every refusal comes before the first write: inside the caller's transaction there is nothing a savepoint would undo.
    """
    contracts = list({contract.pk: contract for contract, _ in wanted}.values())
    behind = {contract.pk: _Behind(contract) for contract in contracts}
    with nullcontext() if connection.in_atomic_block else transaction.atomic():
        standings = _hold(contracts)
        for contract in contracts:
            _check_contract(contract, *standings[contract.pk], now)
        jobs = []
        for contract, spec in wanted:
            plain = {k: v for k, v in spec.items() if k != "secrets"}
            job = Job(
                organization_id=contract.organization_id,
                contract=contract,
                cell_id=contract.cell_id,
                state=Job.State.QUEUED,
                secrets=secrets.seal(spec["secrets"]) if spec.get("secrets") else None,
                created_at=now,
                queued_at=now,
                **plain,
            )
            job_rules.check(job, contract)
            _check_fits_contract(job, contract, behind[contract.pk])
            jobs.append(job)
        _insert(jobs, actor, now)
        for cell_id in sorted({job.cell_id for job in jobs}):
            nudge_cell(cell_id)
    return jobs


def _insert(jobs: list[Job], actor: Actor, now: datetime) -> None:
    """The rows and the first event of each, in one statement; the jobs get their ids, in their order."""
    if not jobs:
        return
    fields = [field for field in Job._meta.concrete_fields if not field.primary_key]
    row = "(" + ", ".join(["%s"] * len(fields)) + ")"
    values = [field.get_db_prep_save(getattr(job, field.attname), connection) for job in jobs for field in fields]
    with connection.cursor() as cursor:
        cursor.execute(
            f"WITH made AS (INSERT INTO {Job._meta.db_table} ({', '.join(str(f.column) for f in fields)})"  # noqa: S608
            f" VALUES {', '.join([row] * len(jobs))} RETURNING id),"
            f" told AS (INSERT INTO {JobEvent._meta.db_table} (job_id, at, actor, from_state, to_state, reason)"
            " SELECT id, %s, %s, '', %s, '' FROM made ORDER BY id)"
            " SELECT id FROM made ORDER BY id",
            [*values, now, actor.label[:120], Job.State.QUEUED],
        )
        for job, (pk,) in zip(jobs, cursor.fetchall(), strict=True):
            job.pk = pk
            job._state.adding, job._state.db = False, connection.alias  # noqa: SLF001 (as bulk_create does)


def _hold(contracts: Iterable[Contract]) -> dict[int, tuple[str | None, list[str]]]:
    """The contracts as they are now, and none of them ends before we commit: who ends it sees our jobs, or we see its end.
    Answers of each one's organization its standing and the checks that it did not pass.
    """
    rows = {contract.pk: contract for contract in contracts}
    standings: dict[int, tuple[str | None, list[str]]] = {}
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT c.id, c.state, c.ends_at, s.state, ARRAY(SELECT x.kind::text FROM marketplace_screening x"
            " WHERE x.organization_id = c.organization_id AND x.state = 'rejected' ORDER BY 1)"
            " FROM marketplace_contract c LEFT JOIN marketplace_billingstanding s ON s.organization_id = c.organization_id"
            " WHERE c.id = ANY(%s) ORDER BY c.id FOR SHARE OF c",
            [list(rows)],
        )
        for pk, state, ends_at, standing, rejected in cursor.fetchall():
            rows[pk].state, rows[pk].ends_at = state, ends_at
            standings[pk] = standing, rejected
    return standings


def _check_contract(contract: Contract, standing: str | None, rejected: list[str], now: datetime) -> None:
    if contract.state != Contract.State.ACTIVE or (contract.ends_at and contract.ends_at <= now):
        raise MarketError("contract_inactive", f"{contract.public_id} is {contract.state}; book another one.")
    if standing is None or standing == BillingStanding.State.NO_CARD:
        raise MarketError("card_required", "Add a card on the page Payment methods, then submit again.")
    if standing == BillingStanding.State.SUSPENDED:
        raise MarketError("billing_suspended", "Pay the open invoices, then submit again.")
    screening.refuse_rejected(rejected, contract.terms.get("gpu_model"))


_LARGE = """
SELECT 1 FROM marketplace_host h WHERE h.listing_id = %s AND h.state <> 'retired' AND h.gpu_count >= %s AND h.vcpu_milli >= %s
  AND h.ram_mib >= %s AND h.nvme_gib >= %s AND (%s = 0 OR h.vram_mib >= %s)
"""
_OF_MODELS = "  AND h.gpu_model_id IN (SELECT id FROM marketplace_gpumodel WHERE name = ANY(%s)) "


class _Behind:
    """The hosts behind a contract. That one of them is large enough is found at once; all shapes are read only for a refusal."""

    def __init__(self, contract: Contract) -> None:
        self.listing_id = contract.listing_id
        self.known: dict[tuple[Any, ...], bool] = {}

    def hold(self, job: Job) -> bool:
        """Whether some host could hold a replica when it is empty."""
        shape = (tuple(job.gpu_models), job.gpus, job.vram_mib, job.vcpu_milli, job.ram_mib, job.nvme_gib)
        if shape not in self.known:
            asked = [self.listing_id, job.gpus, job.vcpu_milli, job.ram_mib, job.nvme_gib, job.gpus, job.vram_mib]
            with connection.cursor() as cursor:
                cursor.execute(
                    _LARGE + (_OF_MODELS if job.gpu_models else "") + "LIMIT 1",
                    [*asked, *([job.gpu_models] if job.gpu_models else [])],
                )
                self.known[shape] = cursor.fetchone() is not None
        return self.known[shape]

    def shapes(self) -> list[Host]:
        """One host of each shape."""
        names = ("gpu_model_id", "gpu_count", "vcpu_milli", "ram_mib", "nvme_gib", "vram_mib")
        hosts = Host.objects.filter(listing_id=self.listing_id).exclude(state=Host.State.RETIRED)
        return list(hosts.select_related("gpu_model").distinct(*names).order_by(*names))


def _check_fits_contract(job: Job, contract: Contract, behind: _Behind) -> None:
    """Refuse what can never run, naming the first dimension that no host behind the contract meets."""
    if job.total_gpus > contract.gpu_count:
        raise MarketError(
            "over_ceiling",
            f"The job asks for {job.total_gpus} GPUs; the contract holds {contract.gpu_count}. Ask for fewer, or extend it.",
            {"/replicas": f"at most {contract.gpu_count} GPUs in all"},
        )
    if behind.hold(job):
        return
    left = behind.shapes()
    steps: list[tuple[str, str, Any]] = [
        ("gpu_models", "GPU model", lambda h: not job.gpu_models or h.gpu_model.name in job.gpu_models),
        ("gpus", "GPUs in one host", lambda h: h.gpu_count >= job.gpus),
        ("vram_mib", "VRAM per GPU", lambda h: not job.gpus or h.vram_mib >= job.vram_mib),
        ("vcpu_milli", "vCPU", lambda h: h.vcpu_milli >= job.vcpu_milli),
        ("ram_mib", "RAM", lambda h: h.ram_mib >= job.ram_mib),
        ("nvme_gib", "NVMe", lambda h: h.nvme_gib >= job.nvme_gib),
    ]
    for field, noun, fits in steps:
        kept = [host for host in left if fits(host)]
        if not kept:
            most = max(
                (getattr(h, "gpu_count" if field == "gpus" else field, 0) or 0 for h in left if field != "gpu_models"),
                default=0,
            )
            asked = getattr(job, field)
            hint = (
                f"the largest has {most}"
                if field != "gpu_models"
                else "offered: " + ", ".join({h.gpu_model.name for h in left})
            )
            raise MarketError(
                "never_fits",
                f"No host of {contract.listing} has {noun} of {asked}; {hint}.",
                {f"/{field}": hint},
                {"reason": f"no_{field}"},
            )
        left = kept


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
            reason="cancelled by the customer", set_columns={"finished_at": now, "cancel_requested_at": now},
        )  # fmt: skip
        if not moved:
            fresh = Job.objects.select_for_update(no_key=True).get(pk=job.pk)
            if fresh.state in Job.FINAL:
                raise MarketError("illegal_transition", f"The job is {fresh.state} already.")
            if fresh.cancel_requested_at is None:
                Job.objects.filter(pk=job.pk).update(cancel_requested_at=now)
                drain_jobs([job.pk], now=now, actor=actor.label, reason="cancelled by the customer")
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
            reason="the contract ended", set_columns={"finished_at": now},
        )  # fmt: skip
        Job.objects.filter(pk__in=ids, state__in=Job.ON_HOSTS, cancel_requested_at=None).update(cancel_requested_at=now)
        drain_jobs(ids, now=now, actor="system", reason="the contract ended")


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
