"""Plan -> rows: the only writer. Re-runs the fit rule on locked rows, job by job, and commits what still holds.

One transaction: locks (cell, organizations whose slice of their GPU limit must grow or that limit what an hour costs, sites), the
cell's fence, slices, hosts; then one statement a table. A job whose replicas no longer all fit, or that its organization's limits do
not hold beside what other cells have committed, is left waiting and counted as a conflict; nothing of it is written.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cache
from typing import Final, NamedTuple

import numpy as np
from django.db import transaction
from django.db.models import QuerySet

from marketplace import arrays, outbox, prepared
from marketplace.locks import Lock, acquire
from marketplace.models import Job, Placement
from marketplace.services import drains, power, slices
from marketplace.services import hosts as host_rows
from marketplace.services import placements as placement_service
from marketplace.services import replicas as gangs
from marketplace.services.budgets import NodeTable, node_table
from marketplace.services.transitions import transition_many
from scheduler import fleet as cells
from scheduler import spending
from scheduler.core import fit_kernels as fit
from scheduler.core import recheck
from scheduler.core.fit import bounds
from scheduler.core.pack import bits, classes_of
from scheduler.core.slices import refused
from scheduler.core.state import State, unscored
from scheduler.core.types import I64, HostFlag, Plan, Preemption, Reason, Request
from scheduler.core.types import Placement as Planned
from scheduler.reserved import Ahead, Begun, claimed, reservations
from scheduler.snapshot import Snapshot

ACTOR = "scheduler"
SITE_LOOP = "scheduler.site_loop"

# Column of a state row -> column of `cells.Hosts`.
_STATE: Final = {
    fit.CPU: "cpu_free", fit.RAM: "ram_free", fit.NVME: "nvme_free", fit.NGPU: "gpu_count", fit.ACTIVE: "gpu_active",
    fit.CPU_ONLY: "cpu_only", fit.POOL: "pool", fit.SITE: "site", fit.FLAGS: "flags", fit.STANDBY: "standby_w", fit.PARKED: "parked_w",
    fit.BASE: "base_w", fit.GMIN: "gpu_min_w", fit.GMAX: "gpu_most_w", fit.CAPCTL: "cap_control", fit.TAINTS: "taints",
    fit.LEAVES: "leaves", fit.VRAM: "vram_total",
}  # fmt: skip


_CLAIMS: Final = {
    "claimed_at": fit.CLAIM, "claimed_gpus": fit.CLAIMED, "owed_cpu": fit.OWED_CPU, "owed_ram": fit.OWED_RAM, "owed_nvme": fit.OWED_NVME,
}  # fmt: skip


class FencedError(Exception):
    """A newer cycle of this cell has begun, or its rows moved past its locks: this plan is void."""


@dataclass
class Outcome:
    placed: list[int] = field(default_factory=list)  # job ids
    placements: int = 0
    conflicts: dict[int, Reason] = field(default_factory=dict)
    preempted: list[int] = field(default_factory=list)


def commit(snapshot: Snapshot, plan: Plan, *, now: datetime) -> Outcome:
    """Write the plan as far as it still holds. Raises FencedError when the cell's generation has moved on."""
    outcome = Outcome()
    rows = np.fromiter((p.host for p in plan.placements), np.int64, len(plan.placements))
    with transaction.atomic(savepoint=False):  # whatever refuses it voids the whole cycle
        sites = set(np.unique(snapshot.fleet.site[rows]).tolist())
        victims = [p.placement for p in plan.preemptions]
        if victims:
            sites |= set(_standing(victims).values_list("site_id", flat=True))
        wanted: dict[int, list[Planned]] = defaultdict(list)
        for p in plan.placements:
            wanted[p.job].append(p)
        milli = {job: sum(len(p.gpus) * p.gpu_milli for p in replicas) for job, replicas in wanted.items()}
        asked = _asked(snapshot, milli)
        growing = slices.beyond(snapshot.cell.pk, asked) if asked else []
        paying = asked.keys() & snapshot.money.left.keys()
        owners = ((Lock.ORG, pk) for pk in {*growing, *paying})
        acquire((Lock.CELL, snapshot.cell.pk), *owners, *((Lock.SITE, pk) for pk in sites))
        # Locked: who begins a newer cycle raises the generation, waits for us to end, and sees what we wrote.
        fence = "SELECT generation FROM marketplace_cell WHERE id = %s FOR NO KEY UPDATE"
        if prepared.row(fence, [snapshot.cell.pk]) != (snapshot.generation,):
            raise FencedError(f"cell {snapshot.cell.name}: generation {snapshot.generation} is over")
        here = _Here(sites, {}, now)
        if wanted:
            # Reservations are made and moved under the cell's lock, which we hold: what was sold since the snapshot is seen.
            longest_s = max(r.duration_s for r in snapshot.requests)
            begun, ahead = reservations(snapshot.cell.pk, now, longest_s)
            here = _Here(sites, ahead, now)
            _refuse(snapshot, wanted, begun, outcome)
        if asked and wanted:
            may_hold = slices.hold(snapshot.cell.pk, asked, growing)
            free = {pk: most - snapshot.held[pk] for pk, most in may_hold.items()}
            _limit(snapshot, wanted, free, milli, Reason.ORGANIZATION_LIMIT, outcome)
        if paying and wanted:
            cost = {r.job: milli.get(r.job, 0) * r.price for r in snapshot.requests}
            left = spending.read(paying, (), now=now).left
            _limit(snapshot, wanted, left, cost, Reason.HOURLY_LIMIT, outcome)
        if victims and wanted:
            _evict(snapshot, plan.preemptions, wanted, here, outcome)
        if wanted:
            _place(snapshot, wanted, here, outcome)
    return outcome


class _Here(NamedTuple):
    """Sites that are locked, reservations to come by host, and the commit's time."""

    sites: set[int]
    ahead: dict[int, Ahead]
    now: datetime


def _refuse(snapshot: Snapshot, wanted: dict[int, list[Planned]], begun: Begun, outcome: Outcome) -> None:
    """Takes out of `wanted` who waits no more, and whose GPUs are reserved for somebody else by now."""
    waiting = _still_waiting(list(wanted), snapshot)
    closed = _closed(snapshot, wanted, begun)
    outcome.conflicts = {job: Reason.INVALID for job in wanted if job not in waiting}
    outcome.conflicts |= dict.fromkeys(closed & waiting, Reason.HOST_RESERVED_FOR_OWNER)
    for job in outcome.conflicts:
        del wanted[job]


def _asked(snapshot: Snapshot, milli: Mapping[int, int]) -> dict[int, int]:
    """Milli-GPU that each organization would hold in the cell with what jobs take (`milli`). Since the snapshot only commits of this
    cell could have added to what it holds, and the fence has none pass.
    """
    planned: Counter[int] = Counter()
    for job, more in milli.items():
        planned[snapshot.jobs[job].organization_id] += more
    return {organization: snapshot.held[organization] + more for organization, more in planned.items() if more}


def _limit(
    snapshot: Snapshot,
    wanted: dict[int, list[Planned]],
    free: Mapping[int, int],
    need: Mapping[int, int],
    why: Reason,
    outcome: Outcome,
) -> None:
    """Takes out of `wanted`, from the plan's end, what does not fit beside what its organization has in other cells: what is `free` by
    organization, the `need` of each job.
    """
    for job in refused(((job, snapshot.jobs[job].organization_id, need[job]) for job in wanted), free):
        outcome.conflicts[job] = why
        del wanted[job]


def _evict(
    snapshot: Snapshot,
    preemptions: Sequence[Preemption],
    wanted: dict[int, list[Planned]],
    here: _Here,
    outcome: Outcome,
) -> None:
    """Asks victims to leave for those who still want their places, and to whom these hosts are open as they stand now."""
    jobs = [job for job in dict.fromkeys(p.for_job for p in preemptions) if job in wanted]
    if not jobs:
        return
    state, batch, _, _ = _locked(snapshot, {job: wanted[job] for job in jobs}, here)
    barred = recheck.barred(state, batch)
    outcome.conflicts |= {job: Reason(why) for job, why in zip(jobs, barred.tolist(), strict=True) if why}
    for job in outcome.conflicts.keys() & set(jobs):
        del wanted[job]
    victims = _standing([p.placement for p in preemptions if p.for_job in wanted])
    reason = "preempted: capacity claimed by a higher contract"
    outcome.preempted = drains.take_off(victims, now=here.now, actor=ACTOR, reason=reason)


def _standing(placements: Sequence[int]) -> QuerySet[Placement]:
    """Those that live, and that nobody has asked to leave."""
    return Placement.objects.filter(pk__in=placements, release_requested_at=None).exclude(state__in=Placement.FINAL)


def _locked(
    snapshot: Snapshot, wanted: dict[int, list[Planned]], here: _Here
) -> tuple[State, recheck.Batch, cells.Hosts, NodeTable]:
    """The hosts wanted, locked, with the nodes above them, and what is wanted, as the fit rule reads them."""
    replicas = [p for planned in wanted.values() for p in planned]
    hosts = cells.lock(snapshot.fleet.host_id[[p.host for p in replicas]].tolist(), snapshot.names)
    nodes = node_table(here.sites)
    state = _state(snapshot, hosts, nodes, here)
    batch = _batch(snapshot, hosts, state, wanted, here.now)
    return state, batch, hosts, nodes


def _place(snapshot: Snapshot, wanted: dict[int, list[Planned]], here: _Here, outcome: Outcome) -> None:
    jobs, replicas, now = list(wanted), [p for planned in wanted.values() for p in planned], here.now
    state, batch, hosts, nodes = _locked(snapshot, wanted, here)
    reasons, watts = recheck.admit(state, batch)
    outcome.conflicts |= {job: Reason(why) for job, why in zip(jobs, reasons.tolist(), strict=True) if why}
    outcome.placed = [job for job, why in zip(jobs, reasons.tolist(), strict=True) if not why]
    if not outcome.placed:
        return
    kept = np.flatnonzero(np.repeat(reasons == 0, np.diff(batch.first)))
    at, mask = batch.host[kept], batch.mask[kept]
    books = power.books(hosts["host_id"], hosts["site"].astype(np.int64), hosts["reserved_w"], nodes, now=now)
    granted, delta = recheck.book(state, books, at, mask)
    mended = [job for job in outcome.placed if job in snapshot.repairs]
    queued = [job for job in outcome.placed if job not in snapshot.repairs]
    moved = transition_many(
        Job, queued, expected=Job.WAITING, to=Job.State.PLACED, now=now, actor=ACTOR, reason="placed", increment=("attempt",)
    )  # fmt: skip
    if len(moved) != len(queued):
        raise FencedError(f"cell {snapshot.cell.name}: {len(queued) - len(moved)} jobs moved past its lock")
    power.book_nodes(nodes, books.free_mw)
    rows = placement_service.Planned(
        job=np.array([replicas[i].job for i in kept.tolist()], np.int64),
        rank=np.array([_rank(snapshot, replicas[i]) for i in kept.tolist()], np.int64),
        host=hosts["host_id"][at],
        site=hosts["site"][at].astype(np.int64),
        gpus=[_literal(m) for m in mask.tolist()],
        milli=np.array([replicas[i].gpu_milli for i in kept.tolist()], np.int64),
        vram=batch.vram[kept],
        watts_delta=np.maximum(watts[kept], 0),
        granted=granted,
        delta_w=delta,
    )
    left = _left(hosts, state, books, at, granted)
    outcome.placements = placement_service.create(rows, left, now=now, actor=ACTOR)
    if mended and gangs.placed_again(mended, now=now, actor=ACTOR) != len(mended):
        raise FencedError(f"cell {snapshot.cell.name}: a gang that was mended moved past its lock")
    for site in np.unique(
        rows.site[granted == 0]
    ).tolist():  # whose miners must sleep first: at once, not at the next tick
        outbox.emit(SITE_LOOP, key=str(site), payload={"site": site})


def _closed(snapshot: Snapshot, wanted: dict[int, list[Planned]], begun: Begun) -> set[int]:
    """Jobs planned onto GPUs that are reserved for others by now, or no longer for their own contract."""

    def refused(p: Planned) -> bool:
        here = begun.get(int(snapshot.fleet.host_id[p.host]), {})
        owner = -int(snapshot.fleet.pool[p.host])
        if owner > 0:  # a row of its own contract's GPUs
            return not here.get(owner, set()) >= set(p.gpus)
        return bool(here) and not set().union(*here.values()).isdisjoint(p.gpus)

    return {job for job, replicas in wanted.items() if any(map(refused, replicas))}


def _rank(snapshot: Snapshot, planned: Planned) -> int:
    """A whole gang's replicas are numbered as they come; those that join one take the ranks that it lost."""
    repair = snapshot.repairs.get(planned.job)
    return repair.ranks[planned.replica] if repair else planned.replica


def _still_waiting(jobs: list[int], snapshot: Snapshot) -> set[int]:
    """Those that wait and are not to be cancelled. Under the cell's lock nobody else moves a waiting job; the move is guarded.

    A running gang waits for the ranks that the plan is for while its epoch is the same: a further loss is a new one. Its row
    is locked: what it loses from here on, it loses after its repair.
    """
    rows = arrays.execute(
        "SELECT id FROM marketplace_job WHERE id = ANY(%s) AND state = ANY(%s) AND cancel_requested_at IS NULL",
        [np.array(jobs, np.int64), list(Job.WAITING)],
    )
    found = {pk for (pk,) in rows}
    mended = [job for job in jobs if job in snapshot.repairs]
    if mended:
        still = gangs.waiting().filter(pk__in=mended).order_by("pk").select_for_update(no_key=True)
        found |= {
            pk
            for pk, attempt, epoch in still.values_list("id", "attempt", "epoch")
            if (attempt, epoch) == (snapshot.repairs[pk].attempt, snapshot.repairs[pk].epoch)
        }
    return found


def _state(snapshot: Snapshot, hosts: cells.Hosts, nodes: NodeTable, here: _Here) -> State:
    """The locked rows as the kernels read them. Site-wide flags were the snapshot's business, the hosts' own are read again."""
    rows = np.zeros((len(hosts), fit.HOST_WIDTH), np.int64)
    for column, name in _STATE.items():
        rows[:, column] = hosts[name]
    rows[~np.isin(hosts["site"], list(here.sites)), fit.FLAGS] |= int(
        HostFlag.DRAINING
    )  # moved to a site that is not locked
    for name, column in claimed(hosts, here.ahead).items():
        rows[:, _CLAIMS[name]] = column
    models = snapshot.model_of
    rows[:, fit.MODEL] = [models.get(pk, 62) for pk in hosts["model_id"].tolist()]
    rows[hosts["gpu_count"] == 0, fit.MODEL] = -1
    rows[:, fit.NODE] = nodes.positions(hosts["node_id"])
    gpu_free = hosts["gpu_free"].copy()
    rows[:, fit.TOTAL] = gpu_free.sum(axis=1)
    return State(
        rows=rows,
        gfree=gpu_free,
        vfree=hosts["vram_free"].copy(),
        nvl=np.ascontiguousarray(hosts["nvlink"]),
        parent=nodes.parent.astype(np.int32),
        k=nodes.k_gpu.astype(np.int32),
        budget=nodes.free_mw + nodes.reclaimable_mw,
        **unscored(len(hosts)),
    )


def _batch(
    snapshot: Snapshot, hosts: cells.Hosts, state: State, wanted: dict[int, list[Planned]], now: datetime
) -> recheck.Batch:
    replicas, counts = (
        [p for planned in wanted.values() for p in planned],
        [len(planned) for planned in wanted.values()],
    )
    requests = {r.job: r for r in snapshot.requests}
    asked = [requests[job] for job in wanted]
    # As it is said now: a host may have begun to leave since the snapshot, or be reserved.
    leaves, claims = (np.unique(column[column > 0]).tolist() for column in (hosts["leaves"], state.rows[:, fit.CLAIM]))
    if leaves or claims:
        now_s = int(now.timestamp())
        asked = [_bound(r, bounds(r, now_s, leaves, claims, snapshot.policy)) for r in asked]
    classes, of = classes_of(asked)
    classes[:, fit.Q_HOLD] = 0  # a hold is the plan's own promise
    rows = np.array([p.host for p in replicas], np.int64)
    at = hosts.position(snapshot.fleet.host_id[rows])
    planned_pool = snapshot.fleet.pool[rows]
    vram = classes[np.repeat(of, counts), fit.Q_VRAM]
    milli = np.array([p.gpu_milli for p in replicas], np.int64)
    mask = np.array([_mask(p.gpus) for p in replicas], np.int64)
    share = hosts["vram_total"][at].astype(np.int64) * milli // 1000
    return recheck.Batch(
        first=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        classes=classes,
        of=of.astype(np.int64),
        host=at,
        mask=mask,
        vram=np.where(mask == 0, 0, np.where(vram > 0, vram, share)),
        pool=np.where(planned_pool < 0, planned_pool, hosts["pool"][at]),  # a listing may have let the host go
    )


def _bound(r: Request, hours: tuple[int, int]) -> Request:
    """What stands on its own contract's GPUs takes nothing that goes with others'."""
    return replace(r, until=hours[0], stays=hours[1] if r.pool >= 0 else 0)


def _left(hosts: cells.Hosts, state: State, books: recheck.Power, at: I64, granted: I64) -> host_rows.Left:
    """The columns to write of each host that a replica came to."""
    used = np.unique(at)
    raised = np.zeros(len(hosts), bool)
    raised[at[granted == 1]] = True
    shapes = zip(
        *(column[used].tolist() for column in (raised, books.use, hosts["gpu_count"], hosts["gpu_min_w"], hosts["gpu_most_w"])),
        hosts["cap_control"][used].tolist(),
        strict=True,
    )  # fmt: skip
    commands = [
        power.limits(use, gpus, low, high, cap_control=bool(capped)) if up else (None, None)
        for up, use, gpus, low, high, capped in shapes
    ]
    rows = state.rows[used]
    return host_rows.Left(
        ids=hosts["host_id"][used],
        gpu_count=rows[:, fit.NGPU],
        gpu_free=state.gfree[used],
        vram_free=state.vfree[used],
        vcpu_free=rows[:, fit.CPU],
        ram_free=rows[:, fit.RAM],
        nvme_free=rows[:, fit.NVME],
        cpu_only=rows[:, fit.CPU_ONLY],
        reserved_w=books.reserved_w[used],
        limits=[limits for limits, _ in commands],
        power_states=[str(state) if state else None for _, state in commands],
    )


@cache
def _mask(gpus: tuple[int, ...]) -> int:
    return sum(1 << i for i in gpus)


@cache
def _literal(mask: int) -> str:
    return "{" + ",".join(map(str, bits(mask))) + "}"
