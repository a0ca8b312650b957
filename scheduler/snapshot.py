"""Rows -> core arrays: the only reader. A fixed number of queries whatever the size of the cell.

A reserved contract's GPUs stand in rows of their own (pool = minus the contract's id), so that its jobs find them and no
other's can; the host's open row shows them as taken. `Snapshot.host_of` leads from a row back to the host.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import numpy as np
from django.db.models import F, Q, Window
from django.db.models.functions import RowNumber

from marketplace.models import BillingStanding, Cell, Host, Job, Placement, ReservationBlock, Site
from marketplace.services.budgets import node_budgets
from scheduler.core.types import (
    MAX_GPUS,
    Fleet,
    HostFlag,
    Kind,
    Level,
    Policy,
    Request,
    Running,
    Topology,
)

CLAIM_AHEAD = timedelta(hours=24)  # a reservation's GPUs are closed to others this long before its claim
MAX_JOBS = 2000  # considered in one cycle; the rest waits for the next
MIX_JOBS = 2000  # newest jobs of the cell from which the mix of shapes is estimated

_KIND = {"reserved": Kind.FIRM, "flexible": Kind.FLEXIBLE, "on_demand": Kind.ON_DEMAND, "spot": Kind.SPOT}
_STATE_FLAG = {
    "active": 0,
    "draining": HostFlag.DRAINING,
    "maintenance": HostFlag.MAINTENANCE,
    "lost": HostFlag.UNREACHABLE,
}
_LEVEL = {"host": Level.HOST, "leaf": Level.LEAF, "spine": Level.SPINE, "site": Level.SITE}


@dataclass
class Snapshot:
    cell: Cell
    generation: int
    now: datetime
    fleet: Fleet
    requests: list[Request]
    running: list[Running]
    policy: Policy
    host_of: list[int]  # row -> host id
    node_of: list[int]  # position -> power node id
    jobs: dict[int, Job]
    model_of: dict[int, int]  # GpuModel id -> position in the models mask


def take(cell: Cell, *, now: datetime) -> Snapshot:
    """The cell as it stands: open capacity, waiting jobs in no order, placements that could give way."""
    hosts = list(Host.objects.filter(cell=cell).exclude(state=Host.State.RETIRED).order_by("id"))
    model_of = {pk: i for i, pk in enumerate(sorted({h.gpu_model_id for h in hosts})[:63])}
    claims = _claims(cell, now)
    flags = _site_flags({h.site_id for h in hosts}, now)
    budgets = node_budgets(flags)
    position = {pk: i for i, pk in enumerate(budgets)}
    rows = list(_rows(hosts, claims))
    fleet = _fleet(rows, model_of, flags, position, budgets)
    jobs = _waiting(cell, now)
    return Snapshot(
        cell=cell,
        generation=cell.generation,
        now=now,
        fleet=fleet,
        requests=_requests(jobs, claims, model_of, may_preempt=not _leaving(cell)),
        running=_running(cell, rows, now),
        policy=Policy(shapes=_mix(cell)),
        host_of=[host.pk for host, _, _ in rows],
        node_of=list(position),
        jobs={job.pk: job for job in jobs},
        model_of=model_of,
    )


def _claims(cell: Cell, now: datetime) -> dict[int, dict[int, set[int]]]:
    """Host id -> contract id -> GPU indices of reservations that are in force or soon will be."""
    blocks = ReservationBlock.objects.filter(
        host__cell=cell,
        reservation__state="firm",
        reservation__ends_at__gt=now,
        reservation__claims_at__lte=now + CLAIM_AHEAD,
    ).values_list("host_id", "reservation__contract_id", "gpu_indices")
    found: dict[int, dict[int, set[int]]] = defaultdict(dict)
    for host_id, contract_id, indices in blocks:
        found[host_id].setdefault(contract_id, set()).update(indices)
    return found


def _site_flags(site_ids: Iterable[int], now: datetime) -> dict[int, int]:
    """Flags that a site puts on all its hosts: silent, or not granting."""
    flags: dict[int, int] = {}
    for site in Site.objects.filter(pk__in=set(site_ids)).prefetch_related("agents").order_by("id"):
        alive = any(a.lease_until and a.lease_until > now and not a.revoked_at for a in site.agents.all())
        flags[site.pk] = (0 if alive else HostFlag.UNREACHABLE) | (
            0 if site.mode == Site.Mode.AUTO else HostFlag.NO_GRANTS
        )
    return flags


_Row = tuple[Host, int, list[bool]]  # host, pool, per GPU: is it part of this row


def _rows(hosts: list[Host], claims: dict[int, dict[int, set[int]]]) -> Iterable[_Row]:
    for host in hosts:
        claimed = claims.get(host.pk, {})
        taken = set().union(*claimed.values()) if claimed else set()
        yield host, host.listing_id or 0, [i not in taken for i in range(host.gpu_count)]
        for contract_id, indices in sorted(claimed.items()):
            yield host, -contract_id, [i in indices for i in range(host.gpu_count)]


def _fleet(
    rows: list[_Row], model_of: dict[int, int], flags: dict[int, int], position: dict[int, int], budgets: dict[int, Any]
) -> Fleet:
    size = len(rows)
    leaf, spine = _Ids(), _Ids()
    gpu_free = np.zeros((size, MAX_GPUS), np.int32)
    vram_free = np.zeros((size, MAX_GPUS), np.int32)
    nvlink = np.full((size, MAX_GPUS), -1, np.int16)
    table = np.zeros((size, 20), np.int64)
    for i, (host, pool, mine) in enumerate(rows):
        n = host.gpu_count
        gpu_free[i, :n] = [f if m else 0 for f, m in zip(host.gpu_free, mine, strict=True)]
        vram_free[i, :n] = [f if m else 0 for f, m in zip(host.vram_free, mine, strict=True)]
        nvlink[i, :n] = host.nvlink_domains
        share = sum(mine)
        cpu, ram, nvme = (_part(free, total, share, n) for free, total in _shape(host))
        active = sum(1 << g for g in range(n) if host.gpu_free[g] < 1000)
        state = int(HostFlag.SCHEDULABLE) | int(_STATE_FLAG.get(host.state, 0)) | flags.get(host.site_id, 0)
        state |= int(HostFlag.OFF) if host.power_state == Host.PowerState.OFF else 0
        table[i] = (
            host.pk, cpu, ram, nvme, model_of.get(host.gpu_model_id, 62) if n else -1, n,
            leaf[host.site_id, host.leaf], spine[host.site_id, host.spine], host.site_id, pool,
            0, position[host.power_node_id], state, host.standby_w, host.parked_w,
            host.base_w, host.gpu_min_w, host.gpu_max_w, host.cap_control, active,
        )  # fmt: skip
    names32 = (
        "gpu_model",
        "gpu_count",
        "leaf",
        "spine",
        "site",
        "power_node",
        "flags",
        "standby_w",
        "parked_w",
        "base_w",
        "gpu_min_w",
        "gpu_max_w",
        "gpu_active",
    )
    order = (
        "host_id", "cpu_free", "ram_free", "nvme_free", "gpu_model", "gpu_count", "leaf", "spine", "site", "pool", "owner", "power_node",
        "flags", "standby_w", "parked_w", "base_w", "gpu_min_w", "gpu_max_w", "cap_control", "gpu_active",
    )  # fmt: skip
    columns: dict[str, Any] = {name: np.ascontiguousarray(table[:, c]) for c, name in enumerate(order)}
    for name in names32:
        columns[name] = columns[name].astype(np.int32)
    columns["cap_control"] = columns["cap_control"].astype(np.int8)
    nodes = list(budgets.values())
    return Fleet(
        **columns,
        cpu_only=np.array([host.cpu_only_active for host, _, _ in rows], np.int32),
        gpu_free=gpu_free,
        vram_free=vram_free,
        nvlink=nvlink,
        node_parent=np.array([position[b.parent_id] if b.parent_id else -1 for b in nodes], np.int32),
        node_k_gpu=np.array([b.node.overhead_gpu_permille for b in nodes], np.int32),
        node_free_mw=np.array([b.free_mw for b in nodes], np.int64),
        node_reclaimable_mw=np.array([b.reclaimable_mw for b in nodes], np.int64),
    )


def _shape(host: Host) -> tuple[tuple[int, int], ...]:
    return (host.vcpu_free, host.vcpu_milli), (host.ram_free, host.ram_mib), (host.nvme_free, host.nvme_gib)


def _part(free: int, total: int, gpus: int, of: int) -> int:
    """CPU, RAM and NVMe go with the GPUs: a row of g of n GPUs may use at most g/n of the host."""
    return free if gpus == of else min(free, total * gpus // max(of, 1))


class _Ids(dict[tuple[int, str], int]):
    """Small integers for fabric names; a host without a name is a domain of its own."""

    def __missing__(self, key: tuple[int, str]) -> int:
        value = len(self)
        if key[1]:
            self[key] = value
        else:
            self[key[0], f"\0{value}"] = value
        return value


def _waiting(cell: Cell, now: datetime) -> list[Job]:
    """Jobs that may be placed now: their contract runs, and their organization is not suspended."""
    rows = Job.objects.filter(cell=cell, state__in=Job.WAITING, cancel_requested_at=None)
    rows = rows.filter(contract__state="active", contract__starts_at__lte=now).filter(
        Q(contract__ends_at=None) | Q(contract__ends_at__gt=now)
    )
    rows = rows.exclude(organization__standing__state=BillingStanding.State.SUSPENDED)
    # Each contract's first, then each one's second: a customer who queues thousands does not hide the others.
    turn = Window(RowNumber(), partition_by="contract_id", order_by=[F("priority").desc(), "queued_at", "id"])
    return list(
        rows.select_related("contract", "organization")
        .annotate(turn=turn)
        .order_by("turn", "queued_at", "id")[:MAX_JOBS]
    )


def _leaving(cell: Cell) -> bool:
    """Whether victims of an earlier cycle still drain: until they are gone nobody else is preempted for the same watts and GPUs."""
    draining = Placement.objects.filter(cell=cell, state__in=("draining", "unreachable"))
    return draining.filter(job__state=Job.State.PREEMPTING).exists()


def _requests(
    jobs: list[Job], claims: dict[int, dict[int, set[int]]], model_of: dict[int, int], *, may_preempt: bool
) -> list[Request]:
    from marketplace.models import GpuModel

    reserved = {contract for by_contract in claims.values() for contract in by_contract}
    names = dict(GpuModel.objects.filter(pk__in=model_of).values_list("name", "id"))
    live = Placement.objects.exclude(state__in=Placement.FINAL)
    used = _milli_by(live.filter(contract_id__in={j.contract_id for j in jobs}), "contract_id")
    by_org = _milli_by(live.filter(organization_id__in={j.organization_id for j in jobs}), "organization_id")
    made = [_request(job, reserved, names, model_of, used, by_org) for job in jobs]
    return made if may_preempt else [replace(request, may_preempt=False) for request in made]


def _milli_by(rows: Any, column: str) -> Counter[int]:
    total: Counter[int] = Counter()
    for key, gpus, milli in rows.values_list(column, "gpu_indices", "gpu_milli"):
        total[key] += len(gpus) * milli
    return total


def _request(
    job: Job,
    reserved: set[int],
    names: dict[str, int],
    model_of: dict[int, int],
    used: Counter[int],
    by_org: Counter[int],
) -> Request:
    contract = job.contract
    mask = 0
    for name in job.gpu_models:
        mask |= 1 << model_of[names[name]] if name in names else 1 << 62
    level = _LEVEL.get(job.topology, Level.NONE)
    quota = min(
        contract.gpu_count * 1000 - used[contract.pk], job.organization.gpu_limit * 1000 - by_org[job.organization_id]
    )
    return Request(
        job=job.pk,
        org=job.organization_id,
        kind=_KIND[contract.kind],
        priority=job.priority,
        replicas=job.replicas,
        pool=-contract.pk if contract.pk in reserved else contract.listing_id,
        cpu=job.vcpu_milli,
        ram=job.ram_mib,
        nvme=job.nvme_gib,
        gpus=job.gpus,
        gpu_milli=job.gpu_milli,
        vram=job.vram_mib,
        models=mask,
        topology=Topology(pack=level, required=job.topology_required)
        if level
        else Topology(spread=Level.HOST if job.topology == "spread" else Level.NONE),
        queued_at=int((job.queued_at or job.created_at).timestamp()),
        weight=job.organization.fair_share_weight * 1000,
        usage=float(by_org[job.organization_id]),
        quota_id=contract.pk,
        quota_milli=max(0, quota),
        may_preempt=contract.kind != "spot",
        duration_s=job.max_seconds or 0,
    )


def _running(cell: Cell, rows: list[_Row], now: datetime) -> list[Running]:
    """Live placements, at the row that holds their GPUs."""
    row_of: dict[tuple[int, int], int] = {}
    for i, (host, _, mine) in enumerate(rows):
        for gpu, here in enumerate(mine):
            if here:
                row_of[host.pk, gpu] = i
        row_of.setdefault((host.pk, -1), i)
    live = (
        Placement.objects.filter(cell=cell)
        .exclude(state__in=(*Placement.FINAL, "draining", "parked", "unreachable"))
        .select_related("job", "contract")
    )
    found = []
    for p in live:
        row = row_of.get((p.host_id, p.gpu_indices[0] if p.gpu_indices else -1))
        if row is None:
            continue
        since = p.running_at or p.created_at
        limit = p.job.max_seconds
        found.append(
            Running(
                placement=p.pk,
                job=p.job_id,
                org=p.organization_id,
                kind=_KIND[p.contract.kind],
                host=row,
                gpus=tuple(p.gpu_indices),
                gpu_milli=p.gpu_milli,
                cpu=p.vcpu_milli,
                ram=p.ram_mib,
                nvme=p.nvme_gib,
                vram=p.vram_mib,
                bid=p.contract.limit_price or 0,
                priority=p.job.priority,
                work_lost_s=max(0, int((now - since).total_seconds())),
                gang_size=p.job.replicas,
                ends_at=int(since.timestamp()) + limit if limit else 0,
            )
        )
    return found


def _mix(cell: Cell) -> tuple[tuple[int, int, int, int, int, int], ...] | None:
    """Shapes of the newest jobs with their counts: the mix for which fragmentation is priced. None without history."""
    rows = (
        Job.objects.filter(cell=cell)
        .order_by("-id")
        .values_list("vcpu_milli", "ram_mib", "gpus", "gpu_milli", "replicas")[:MIX_JOBS]
    )
    counts: Counter[tuple[int, int, int, int]] = Counter()
    for cpu, ram, gpus, milli, replicas in rows:
        counts[cpu, ram, gpus, milli] += replicas
    return tuple((*shape, 0, n) for shape, n in counts.most_common()) or None
