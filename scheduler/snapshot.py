"""Rows -> core arrays: the only reader. A fixed number of statements whatever the size of the cell.

Hosts come from `scheduler.fleet`, which reads what has changed; what of them is reserved, from `scheduler.reserved`: a contract's
GPUs whose claim has begun stand in rows of their own behind those of the hosts. `Snapshot.host_of` leads from a row back to the host.
"""

from collections import Counter
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
from django.conf import settings

from marketplace import prepared
from marketplace.models import Cell
from marketplace.services import power, spot_prices
from marketplace.services.budgets import NodeTable, node_table
from marketplace.services.conditions import SILENT
from scheduler import fleet as cells
from scheduler import promises, rules, spending, standing, usage, waiting
from scheduler.core import gang
from scheduler.core.types import I32, I64, Fleet, HostFlag, Level, Policy, Request, Running
from scheduler.reserved import Ahead, Parts, claimed, reservations
from scheduler.standing import KINDS, LAG_S
from scheduler.waiting import Waiting

MIX_JOBS = 2000  # newest jobs of the cell from which the mix of shapes is estimated
MIX_STEP = 20  # one part in so many


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
    jobs: dict[int, Waiting]
    model_of: dict[int, int]  # GpuModel id -> position in the models mask
    names: cells.Names  # `names.taints`: taint -> its bit
    repairs: dict[int, rules.Repair]  # running jobs whose requests are for lost ranks alone
    held: Counter[int]  # milli-GPU that live placements in this cell hold, by organization
    money: spending.Spending


def take(cell: Cell, *, now: datetime, running: bool = True) -> Snapshot:
    """The cell as it stands: open capacity, waiting jobs in no order, placements that could give way.

    Without `running` the last are left out, who has used how much, and who waits behind more than a cycle takes: while every job finds
    room, none of it matters.
    """
    hosts = cells.read(cell.pk)
    sites, site_of = hosts.sites
    nodes = node_table(sites.tolist())
    repairs = rules.repairs(cell.pk)
    jobs = waiting.read(cell.pk, now, repairs, short=running)
    begun, ahead = reservations(cell.pk, now, max((job.lasts_s or 0 for job in jobs), default=0))
    reserved = Parts(hosts, begun)
    model_of = hosts.models[0]
    fleet = _fleet(hosts, reserved, ahead, nodes, _site_flags(sites, now)[site_of], _sick(cell.pk))
    held = standing.held({job.organization_id for job in jobs}, cell.pk)
    requests = _requests(jobs, begun, model_of, held, may_preempt=not standing.leaving(cell.pk))
    host_of = hosts.id_list if not len(reserved) else hosts.id_list + hosts["host_id"][reserved.rows].tolist()
    ruled = [job.id for job in jobs if job.ruled]
    capacity = max(1.0, 1000.0 * float(fleet.gpu_count.sum()))
    mix = _mix(cell, jobs, model_of)
    policy = Policy(shapes=mix, usage_scale=capacity, backfill_depth=settings.PROMISED_STARTS, lag_s=LAG_S)
    taints = hosts.names.taints
    rules.bind(requests, fleet, host_of, ruled=ruled, taints=taints, mended=repairs, now=now, policy=policy)
    _pack(requests, fleet, hosts, reserved)
    _bar([job for job in jobs if job.contract_kind == "spot"], requests, now)
    if running:
        usage.bind(requests, now=now)
    promises.bind(cell.pk, requests, fleet, host_of)
    stands = standing.running(cell.pk, hosts.id_list, reserved.row_of(len(hosts)), now) if running else []
    money = spending.read({job.organization_id for job in jobs}, {job.contract_id for job in jobs}, now=now)
    spending.bind(requests, stands, money, mended=repairs)
    return Snapshot(
        cell=cell,
        generation=cell.generation,
        now=now,
        fleet=fleet,
        requests=requests,
        running=stands,
        policy=policy,
        host_of=host_of,
        node_of=nodes.ids.tolist(),
        jobs={job.id: job for job in jobs},
        model_of=model_of,
        names=hosts.names,
        repairs=repairs,
        held=held.here,
        money=money,
    )


_FLAGS = f"""
SELECT s.id, s.mode = 'auto' AND NOT {power.FREEZE_STANDS},
  coalesce(bool_or(a.revoked_at IS NULL AND a.lease_until > %s AND a.last_sync_at >= %s), false)
FROM marketplace_site s LEFT JOIN marketplace_agent a ON a.site_id = s.id WHERE s.id = ANY(%s) GROUP BY 1
"""  # noqa: S608


def _site_flags(sites: I64, now: datetime) -> I32:
    """Flags that each site puts on all its hosts: silent, or not granting.

    A site whose agent's lease still runs but that has not been heard for `SILENT` keeps what it has and gets nothing new.
    """
    found = prepared.rows(_FLAGS, [now, now - SILENT, sites.tolist()])
    flags = {
        pk: (0 if alive else int(HostFlag.UNREACHABLE))
        | (0 if grants and not settings.POWER_FREEZE else int(HostFlag.NO_GRANTS))
        for pk, grants, alive in found
    }
    return np.array([flags[pk] for pk in sites.tolist()], np.int32)


_SAME = (
    "host_id", "gpu_count", "leaf", "spine", "site", "standby_w", "parked_w", "base_w", "gpu_min_w", "gpu_max_w", "cap_control",
    "gpu_active", "cpu_only", "nvlink", "taints", "leaves", "vram_total",
)  # fmt: skip


def _sick(cell_id: int) -> list[tuple[int, int]]:
    """(host, index) of GPUs that must not be used."""
    return prepared.rows(
        "SELECT g.host_id, g.index FROM marketplace_gpu g JOIN marketplace_host h ON h.id = g.host_id"
        " WHERE NOT g.healthy AND h.cell_id = %s AND h.state <> 'retired'",
        [cell_id],
    )


def _fleet(
    hosts: cells.Hosts,
    reserved: Parts,
    ahead: dict[int, Ahead],
    nodes: NodeTable,
    site_flags: I32,
    sick: list[tuple[int, int]],
) -> Fleet:
    columns: dict[str, Any] = {name: hosts[name] for name in _SAME}
    columns |= {name: hosts[name] for name in ("cpu_free", "ram_free", "nvme_free", "gpu_free", "vram_free", "pool")}
    if sick:
        columns["gpu_free"] = columns["gpu_free"].copy()
        columns["gpu_free"][hosts.position([host for host, _ in sick]), [index for _, index in sick]] = 0
    columns["gpu_model"] = hosts.models[1]
    columns["power_node"] = hosts.nodes(nodes.ids)
    columns["flags"] = hosts["flags"] | site_flags
    columns["owner"] = np.zeros(len(hosts), np.int64)
    claims = claimed(hosts, ahead)
    columns |= claims
    if len(reserved):
        rows, mine, owed = reserved.rows, reserved.mine, reserved.owed(hosts)
        extra = {name: column[rows] for name, column in columns.items()}
        extra["pool"] = -np.array(reserved.contracts, np.int64)
        extra["gpu_max_w"] = reserved.gpu_most_w(hosts)
        extra |= {name: np.zeros_like(extra[name]) for name in claims}
        for name in ("gpu_free", "vram_free"):
            extra[name] = np.where(mine, extra[name], 0).astype(np.int32)
            columns[name] = columns[name].copy()
            for i, row in enumerate(rows):
                columns[name][row][mine[i]] = 0
        for name, offers in owed.items():
            extra[name] = offers
            columns[name] = columns[name].copy()
            np.subtract.at(columns[name], rows, offers)
        columns = {name: np.concatenate([column, extra[name]]) for name, column in columns.items()}
    return Fleet(
        **columns,
        node_parent=nodes.parent.astype(np.int32),
        node_k_gpu=nodes.k_gpu.astype(np.int32),
        node_free_mw=nodes.free_mw,
        node_reclaimable_mw=nodes.reclaimable_mw,
    )


def _requests(
    jobs: list[Waiting],
    claims: dict[int, dict[int, set[int]]],
    model_of: dict[int, int],
    held: standing.Held,
    *,
    may_preempt: bool,
) -> list[Request]:
    reserved = {contract for by_contract in claims.values() for contract in by_contract}
    names = _model_names(model_of)
    made = [_request(job, reserved, names, held) for job in jobs]
    return made if may_preempt else [replace(request, may_preempt=False) for request in made]


def _model_names(model_of: dict[int, int]) -> dict[str, int]:
    """GPU model's name -> its position in the models mask."""
    rows = prepared.rows("SELECT name, id FROM marketplace_gpumodel WHERE id = ANY(%s)", [list(model_of)])
    return {name: model_of[pk] for name, pk in rows}


def _models(named: list[str], names: dict[str, int]) -> int:
    """The models mask of a job that names these; a name that the cell does not have is a bit that no host has."""
    mask = 0
    for name in named:
        mask |= 1 << names.get(name, 62)
    return mask


def requests_of(taken: Snapshot, jobs: list[int]) -> list[Request]:
    """What running jobs would ask for if they queued again now; those that could not be placed at all are left out."""
    rows = waiting.named(taken.cell.pk, taken.now, jobs)
    held = standing.held({row.organization_id for row in rows}, taken.cell.pk)
    made = _requests(rows, reservations(taken.cell.pk, taken.now, 0)[0], taken.model_of, held, may_preempt=False)
    taints, policy = taken.names.taints, taken.policy
    rules.bind(made, taken.fleet, taken.host_of, ruled=[], taints=taints, mended={}, now=taken.now, policy=policy)
    money = spending.read({row.organization_id for row in rows}, {row.contract_id for row in rows}, now=taken.now)
    spending.bind(made, (), money, mended=())
    return made


def _bar(spot: list[Waiting], requests: list[Request], now: datetime) -> None:
    """Who has lost in the spot auction is not placed."""
    if spot and (lost := spot_prices.barred([job.id for job in spot], now)):
        for r in requests:
            r.price_ok = r.price_ok and r.job not in lost


def _pack(requests: list[Request], fleet: Fleet, hosts: cells.Hosts, reserved: Parts) -> None:
    """Gangs without GPUs that wait for the closest place get its level: the smallest at which their pool, all of it free, could
    hold them. (The core knows GPUs of a host in all, but of CPU, RAM and NVMe only what is free.)
    """
    asks = [
        r
        for r in requests
        if not r.gpus and r.topology.required and r.replicas > 1 and not (r.topology.pack or r.topology.spread)
    ]
    if not asks:
        return
    mine, count = np.array([len(gpus) for gpus in reserved.gpus], np.int64), hosts["gpu_count"][reserved.rows]
    own = {
        name: np.concatenate([hosts[name], hosts[name][reserved.rows] * mine // np.maximum(1, count)])
        for name in ("cpu_total", "ram_total", "nvme_total")
    }
    host_of = np.unique(fleet.host_id, return_inverse=True)[1]
    domain_of = {Level.HOST: host_of}
    for level, column in ((Level.LEAF, fleet.leaf), (Level.SPINE, fleet.spine)):
        domain_of[level] = np.unique(column, return_inverse=True)[1]
    for r in asks:
        needs = ((own["cpu_total"], r.cpu), (own["ram_total"], r.ram), (own["nvme_total"], r.nvme))
        fits = [total // need for total, need in needs if need] or [np.full(len(fleet), r.replicas)]
        here = ((r.pool == 0) | (fleet.pool == r.pool)) & ((r.site < 0) | (fleet.site == r.site))
        counts = np.where(here, np.minimum.reduce(fits), 0)
        r.topology = replace(
            r.topology, pack=gang.smallest_level(counts, domain_of.__getitem__, r.replicas + len(r.members))
        )


def _request(job: Waiting, reserved: set[int], names: dict[str, int], held: standing.Held) -> Request:
    return Request(
        job=job.id,
        org=job.organization_id,
        kind=KINDS[job.contract_kind],
        priority=job.priority,
        replicas=job.replicas,
        pool=-job.contract_id if job.contract_id in reserved else job.listing_id,
        cpu=job.vcpu_milli,
        ram=job.ram_mib,
        nvme=job.nvme_gib,
        gpus=job.gpus,
        gpu_milli=job.gpu_milli,
        vram=job.vram_mib,
        models=_models(job.gpu_models, names),
        topology=rules.topology_of(job.topology, job.topology_required),
        queued_at=job.queued_s,
        weight=job.fair_share_weight * 1000,
        quota_id=job.contract_id,
        quota_milli=max(0, job.contract_gpus * 1000 - held.contract[job.contract_id]),
        limit_milli=max(0, job.gpu_limit * 1000 - held.organization[job.organization_id]),
        may_preempt=job.contract_kind != "spot",
        duration_s=job.lasts_s or 0,
    )


_MIX = """
SELECT vcpu_milli, ram_mib, gpus, gpu_milli, gpu_models, gpu_model_id, sum(replicas)::bigint, count(*), max(id) FROM (
  SELECT j.id, j.vcpu_milli, j.ram_mib, j.gpus, j.gpu_milli, j.gpu_models, l.gpu_model_id, j.replicas FROM marketplace_job j
  JOIN marketplace_contract c ON c.id = j.contract_id JOIN marketplace_listing l ON l.id = c.listing_id
  WHERE j.cell_id = %s ORDER BY j.id DESC LIMIT %s
) newest GROUP BY 1, 2, 3, 4, 5, 6
"""
Mix = tuple[tuple[int, int, int, int, int, int], ...]


class _Counted(NamedTuple):
    """A cell's mix, for GPU models of these positions, and the job from which on it is counted anew."""

    mix: Mix
    models: dict[int, int]
    again: int


_mixes: dict[int, _Counted] = {}  # by cell


def _mix(cell: Cell, jobs: list[Waiting], model_of: dict[int, int]) -> Mix | None:
    """Shapes of the newest jobs with their counts, most frequent first: the mix for which fragmentation is priced. None without
    history. A job that names no GPU model has that of its listing: nothing else is offered there.

    Counted anew when one in MIX_STEP of them is another.
    """
    known = _mixes.get(cell.pk)
    if known is None or known.models != model_of or max((job.id for job in jobs), default=0) >= known.again:
        known = _mixes[cell.pk] = _counted(prepared.rows(_MIX, [cell.pk, MIX_JOBS]), model_of)
    return known.mix or None


def forget() -> None:
    """Drops what this process keeps of cells: their hosts and their mixes."""
    _mixes.clear()
    cells.forget()


def _counted(rows: list[tuple[Any, ...]], model_of: dict[int, int]) -> _Counted:
    names = _model_names(model_of) if rows else {}
    count: Counter[tuple[int, int, int, int, int]] = Counter()
    for cpu, ram, gpus, milli, named, listed, replicas, *_ in rows:
        mask = _models(named, names) or (1 << model_of[listed] if listed in model_of else 0)
        count[cpu, ram, gpus, milli, mask if gpus else 0] += replicas
    mix = tuple((*shape, n) for shape, n in sorted(count.items(), key=lambda item: (-item[1], item[0])))
    jobs, newest = sum(row[7] for row in rows), max((row[8] for row in rows), default=0)
    return _Counted(mix, model_of, newest + max(1, jobs // MIX_STEP))
