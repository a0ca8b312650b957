"""Plan -> rows: the only writer. Re-runs the fit rule on locked rows, job by job, and commits what still holds.

One transaction: locks (cell, sites), the cell's fence, jobs, hosts; then bulk statements. A job whose replicas no longer all
fit is left waiting and counted as a conflict; nothing of it is written.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from django.db import connection, transaction

from marketplace.locks import Lock, acquire
from marketplace.models import Cell, Host, Job, Placement
from marketplace.services import hosts as host_rows
from marketplace.services import jobs as job_service
from marketplace.services import placements as placement_service
from marketplace.services.budgets import node_table
from marketplace.services.transitions import transition_many
from scheduler.core.fit import Budget, HostRow, fits_one
from scheduler.core.types import HostFlag, Plan, Reason, Request
from scheduler.core.types import Placement as Planned
from scheduler.snapshot import Snapshot

ACTOR = "scheduler"


class FencedError(Exception):
    """A newer cycle of this cell has begun: this plan is void."""


@dataclass
class Outcome:
    placed: list[int] = field(default_factory=list)  # job ids
    placements: int = 0
    conflicts: dict[int, Reason] = field(default_factory=dict)
    preempted: list[int] = field(default_factory=list)


def commit(snapshot: Snapshot, plan: Plan, *, now: datetime) -> Outcome:
    """Write the plan as far as it still holds. Raises FencedError when the cell's generation has moved on."""
    wanted: dict[int, list[Planned]] = defaultdict(list)
    for planned in plan.placements:
        wanted[planned.job].append(planned)
    outcome = Outcome()
    with transaction.atomic():
        host_ids = {snapshot.host_of[p.host] for p in plan.placements}
        site_ids = set(Host.objects.filter(pk__in=host_ids).values_list("site_id", flat=True))
        victims = {p.job for p in plan.preemptions}
        live = Placement.objects.filter(job_id__in=victims).exclude(state__in=Placement.FINAL)
        site_ids |= set(live.values_list("site_id", flat=True))
        acquire((Lock.CELL, snapshot.cell.pk), *((Lock.SITE, pk) for pk in site_ids))
        if not Cell.objects.filter(pk=snapshot.cell.pk, generation=snapshot.generation).exists():
            raise FencedError(f"cell {snapshot.cell.name}: generation {snapshot.generation} is over")
        if victims:
            reason = "capacity claimed by a higher contract"
            outcome.preempted = job_service.preempt(victims, now=now, actor=ACTOR, reason=reason)
        if wanted:
            _place(snapshot, wanted, host_ids, outcome, now)
    return outcome


def _place(
    snapshot: Snapshot, wanted: dict[int, list[Planned]], host_ids: set[int], outcome: Outcome, now: datetime
) -> None:
    requests = {r.job: r for r in snapshot.requests}
    waiting = Job.objects.filter(pk__in=wanted, state__in=Job.WAITING, cancel_requested_at=None).order_by("pk")
    jobs = {job.pk: job for job in waiting.select_for_update(no_key=True)}
    hosts = host_rows.lock(host_ids)
    checker = _Checker(snapshot, hosts)
    rows: list[Placement] = []
    for job_id, planned in wanted.items():
        job = jobs.get(job_id)
        if job is None:
            outcome.conflicts[job_id] = Reason.INVALID
            continue
        reason = checker.admit(requests[job_id], planned)
        if reason is not Reason.OK:
            outcome.conflicts[job_id] = reason
            continue
        outcome.placed.append(job_id)
        rows += [_row(job, p, hosts[snapshot.host_of[p.host]], now) for p in planned]
    with connection.cursor() as cursor:
        cursor.execute("UPDATE marketplace_job SET attempt = attempt + 1 WHERE id = ANY(%s)", [outcome.placed])
    moved = transition_many(
        Job, outcome.placed, expected=Job.WAITING, to=Job.State.PLACED, now=now, actor=ACTOR, reason="placed"
    )
    assert len(moved) == len(outcome.placed)  # the rows are locked
    placement_service.create_many(rows, locked_hosts=hosts, now=now, actor=ACTOR)
    outcome.placements = len(rows)


def _row(job: Job, planned: Planned, host: Host, now: datetime) -> Placement:
    vram = job.vram_mib or host.vram_mib * planned.gpu_milli // 1000
    return Placement(
        job=job,
        contract_id=job.contract_id,
        organization_id=job.organization_id,
        host=host,
        site_id=host.site_id,
        cell_id=host.cell_id,
        attempt=job.attempt + 1,
        rank=planned.replica,
        gpu_indices=list(planned.gpus),
        gpu_milli=planned.gpu_milli,
        vram_mib=vram if planned.gpus else 0,
        vcpu_milli=job.vcpu_milli,
        ram_mib=job.ram_mib,
        nvme_gib=job.nvme_gib,
        watts_delta=planned.watts_delta,
        created_at=now,
    )


class _Checker:
    """The fit rule on locked rows, with what this commit has admitted so far subtracted."""

    def __init__(self, snapshot: Snapshot, hosts: dict[int, Host]) -> None:
        self.snapshot = snapshot
        self.rows = {pk: _host_row(host) for pk, host in hosts.items()}
        self.node_of = {pk: host.power_node_id for pk, host in hosts.items()}
        self.vram = {pk: host.vram_mib for pk, host in hosts.items()}
        self.nodes = node_table({host.site_id for host in hosts.values()})
        self.position = {pk: i for i, pk in enumerate(self.nodes.ids.tolist())}
        self.spent: dict[int, int] = defaultdict(int)  # position -> mW

    def admit(self, request: Request, planned: Sequence[Planned]) -> Reason:
        """All replicas or none."""
        rows, spent = dict(self.rows), dict(self.spent)
        for p in planned:
            host_id = self.snapshot.host_of[p.host]
            row = self.rows[host_id]._replace(
                pool=int(self.snapshot.fleet.pool[p.host]), site=int(self.snapshot.fleet.site[p.host])
            )
            fit = fits_one(row, request, self._path(host_id), p.gpus)
            if fit.reason is Reason.OK and not self._vram_left(row, p, request, host_id):
                fit = fit._replace(reason=Reason.NO_VRAM)
            if fit.reason is not Reason.OK:
                self.rows, self.spent = rows, defaultdict(int, spent)
                return fit.reason
            self._subtract(host_id, request, p, fit.watts_delta)
        return Reason.OK

    def _vram_left(self, row: HostRow, p: Planned, request: Request, host_id: int) -> bool:
        vram = request.vram or self.vram[host_id] * p.gpu_milli // 1000
        return all(row.vram_free[i] >= vram for i in p.gpus)

    def _path(self, host_id: int) -> list[Budget]:
        path: list[Budget] = []
        at, nodes = self.position[self.node_of[host_id]], self.nodes
        while at >= 0:
            free = int(nodes.free_mw[at] + nodes.reclaimable_mw[at]) - self.spent[at]
            path.append(Budget(at, int(nodes.k_gpu[at]), free))
            at = int(nodes.parent[at])
        return path

    def _subtract(self, host_id: int, request: Request, p: Planned, watts: int) -> None:
        row = self.rows[host_id]
        gpu_free, vram_free, active = list(row.gpu_free), list(row.vram_free), row.gpu_active
        for i in p.gpus:
            gpu_free[i] -= p.gpu_milli
            vram_free[i] -= request.vram or self.vram[host_id] * p.gpu_milli // 1000
            active |= 1 << i
        self.rows[host_id] = row._replace(
            gpu_free=gpu_free, vram_free=vram_free, gpu_active=active, cpu_free=row.cpu_free - request.cpu,
            ram_free=row.ram_free - request.ram, nvme_free=row.nvme_free - request.nvme, cpu_only=row.cpu_only + (not p.gpus),
        )  # fmt: skip
        for budget in self._path(host_id):
            self.spent[budget.node] += watts * budget.k_permille


def _host_row(host: Host) -> HostRow:
    """The locked row as it is now; site-wide flags were the snapshot's business, the host's own state is checked again."""
    usable = host.state == Host.State.ACTIVE
    return HostRow(
        cpu_free=host.vcpu_free,
        ram_free=host.ram_free,
        nvme_free=host.nvme_free,
        gpu_model=-1,
        gpu_count=host.gpu_count,
        gpu_free=host.gpu_free,
        vram_free=host.vram_free,
        nvlink=host.nvlink_domains,
        gpu_active=sum(1 << i for i, free in enumerate(host.gpu_free) if free < 1000),
        cpu_only=host.cpu_only_active,
        pool=0,
        site=host.site_id,
        owner=0,
        flags=int(HostFlag.SCHEDULABLE) if usable else int(HostFlag.SCHEDULABLE | HostFlag.DRAINING),
        standby_w=host.standby_w,
        parked_w=host.parked_w,
        base_w=host.base_w,
        gpu_min_w=host.gpu_min_w,
        gpu_max_w=host.gpu_max_w,
        cap_control=host.cap_control,
    )
