"""Why a job waits or stands where it does: the last decision, the hosts left after each stage, what would change it.

Suggestions are tried with the real planner on the cell as the last cycle left it: from that cycle's record, or from a
snapshot where it was not recorded. A customer learns of others only that something ends; our own people see which.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import numpy as np
from django.core.cache import cache
from django.utils import timezone

from billing.models import PriceVersion
from marketplace import ids
from marketplace.models import (
    BillingStanding,
    Cell,
    Contract,
    GpuModel,
    Job,
    Listing,
    Organization,
    Placement,
    ReservationBlock,
    Site,
)
from marketplace.tenancy import Actor
from scheduler import record, snapshot, words
from scheduler.core.case import Case, Window
from scheduler.core.changes import Change, changes
from scheduler.core.choice import Choice, choice
from scheduler.core.types import Reason, Request
from scheduler.models import CycleRecord, Decision
from scheduler.packed import UnreadableError

log = logging.getLogger(__name__)
FRESH_S: Final = 15  # an answer about a waiting job serves so long, whatever cycles pass
KEPT_S: Final = 3600
MAX_SHOWN: Final = 64  # replicas and job names in an answer
ROUNDED: Final = 1 / 32  # milli-GPU: scores are kept rounded
AHEAD: Final = snapshot.CLAIM_AHEAD
_API: Final = {
    "gpus": "gpus", "replicas": "replicas", "gpu_milli": "gpu_milli", "cpu": "vcpu_milli", "ram": "ram_mib", "nvme": "nvme_gib",
    "vram": "vram_mib", "duration_s": "max_seconds",
}  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """The cell in which a job waits: as a cycle left it (`recorded`), or as it is now."""

    case: Case
    models: list[int]
    recorded: bool


def explain(job: Job, *, staff: bool = False, deep: bool = True, fresh: bool = False) -> dict[str, Any]:
    """The explanation as the API gives it. `staff`: names other organizations' jobs. `deep=False`: what the decision row says
    alone, without suggestions; `fresh`: computed now, not taken from the cache.
    """
    decision: Decision | None = getattr(job, "decision", None)
    answer = _said(job, decision, staff=staff)
    if not deep or decision is None or not (_queues(job) or answer["outcome"] == "placed"):
        return answer
    key = f"why:{job.pk}:{int(staff)}"
    known = None if fresh else _cached(key)
    now = timezone.now()
    if (
        known
        and known["outcome"] == answer["outcome"]
        and (known["cycle"] == decision.cycle_id or known["until"] > now)
    ):
        return {**answer, **known["more"]}
    try:
        more = _placed(job, decision, staff) if answer["outcome"] == "placed" else _waits(job, decision, staff, now)
    except UnreadableError as error:
        more = {"note": f"The record of the cycle cannot be read: {error}." if staff else "The cycle's record is gone."}
    with suppress(Exception):  # without Redis it is computed again
        until = now + timedelta(seconds=FRESH_S)
        kept = {"cycle": decision.cycle_id, "outcome": answer["outcome"], "until": until, "more": more}
        cache.set(key, kept, KEPT_S)
    return {**answer, **more}


def _cached(key: str) -> Any:
    with suppress(Exception):
        return cache.get(key)
    return None


def _queues(job: Job) -> bool:
    """Whether all of it, or replicas that it lost, wait for a place."""
    return job.state in Job.WAITING or (
        job.repair_since is not None and job.lost_ranks != [] and job.state in Job.ON_HOSTS
    )


# --- what the decision row says
def _said(job: Job, decision: Decision | None, *, staff: bool) -> dict[str, Any]:
    base: dict[str, Any] = {
        "object": "explanation",
        "job": job.public_id,
        "state": job.state,
        "stages": [],
        "changes": [],
        "placed": None,
    }
    waits = _queues(job)
    outside = _outside(job) if waits else ""
    if decision is None:
        text = "The job is not waiting." if not waits else outside or "No cycle has looked at the job yet."
        return {**base, "outcome": job.state, "reason": None, "text": text}
    outcome = "waiting" if waits else decision.outcome
    stages = [
        {"stage": s, "label": words.stage(s), "hosts_left": n}
        for s, n in zip(decision.stages, decision.candidates, strict=False)
    ]
    text = outside or "The job has been placed."
    if waits and not outside:
        text = _waiting_text(decision, staff=staff)
        if decision.held_hosts and (room := _room(job)):
            text += f" For it, {room}."
    elif not waits and decision.outcome != "placed":
        text = "The job ended before it was placed."
    return {
        **base,
        "outcome": outcome,
        "reason": decision.reason.lower(),
        "binding": decision.binding if staff else words.REASONS[words.reason(decision.reason)][0],
        "stages": stages,
        "suggestion": decision.suggestion if staff else "",
        "earliest_start": decision.earliest_start if waits else None,
        "at": decision.at,
        "text": text,
    }


def _room(job: Job) -> str:
    """What the job's history says last, if that is of room being made for it."""
    said = job.events.order_by("-id").values_list("reason", flat=True).first() or ""
    return said if said.startswith(words.ROOM) else ""


def _waiting_text(decision: Decision, *, staff: bool) -> str:
    if decision.outcome == "placed":  # it stood somewhere, and queues again
        return "The job waits: no cycle has looked at it since it was queued again."
    found = words.reason(decision.reason)
    head, _, short = decision.binding.partition(", short by ")
    name = head.partition(" at power node ")[0].upper()
    text = words.binds(found, words.reason(name) if name in Reason.__members__ else found, int(short or 0))
    if staff and decision.suggestion:
        text += f"; {decision.suggestion}"
    return f"The job waits: {text}."


def _outside(job: Job) -> str:
    """Why no cycle considers the job at all, or ''."""
    contract = Contract.objects.get(pk=job.contract_id)
    now = timezone.now()
    if job.cancel_requested_at:
        return "The job is being cancelled."
    if contract.state != "active":
        return f"The job waits: its contract is {contract.state.replace('_', ' ')}."
    if contract.starts_at > now:
        return f"The job waits: its contract begins at {_moment(contract.starts_at)}."
    if contract.ends_at and contract.ends_at <= now:
        return "The job waits: its contract is over."
    if BillingStanding.objects.filter(organization=job.organization_id, state="suspended").exists():
        return "The job waits: the organization is suspended until its invoices are paid."
    return ""


# --- a job that waits
def _waits(job: Job, decision: Decision, staff: bool, now: datetime) -> dict[str, Any]:
    scene = _scene(job, decision, now)
    request = next((r for r in scene.case.requests if r.job == job.pk), None)
    if request is None:
        return {"note": "The last cycle did not consider it: it is not among those that may be placed now."}
    mine = {r.job for r in scene.case.running if r.org == job.organization_id}
    listings = _listings(job)
    found = changes(
        scene.case,
        job.pk,
        pools=list(listings),
        windows=_windows(scene.case, now),
        may_name=(lambda _: True) if staff else mine.__contains__,
    )
    told = _Told(job, scene, request, listings, None if staff else mine)
    return {
        "changes": [told.change(c) for c in found if _holds(c, scene.case, now)],
        "note": "" if scene.recorded else "The last cycle was not recorded: this is the cell as it is now.",
    }


def _scene(job: Job, decision: Decision, now: datetime) -> Scene:
    row = _kept(decision)
    if row is not None:
        with suppress(UnreadableError):
            known = record.load(row)
            return Scene(known.after(), known.models, recorded=True)
    taken = snapshot.take(Cell.objects.get(pk=job.cell_id), now=now)
    return Scene(record.case_of(taken), record.models_of(taken), recorded=False)


def _kept(decision: Decision) -> CycleRecord | None:
    if decision.cycle_id is None:
        return None
    return CycleRecord.objects.filter(cycle_id=decision.cycle_id).first()


def _listings(job: Job) -> dict[int, Listing]:
    """Other listings in the cell that the job's organization may book."""
    organization = Organization.objects.get(pk=job.organization_id)
    actor = Actor(kind="user", organization_id=organization.pk, livemode=organization.livemode)
    rows = Listing.objects.visible_to(actor).filter(state="published", site__cell=job.cell_id)
    return {row.pk: row for row in rows.exclude(contracts=job.contract_id).select_related("site", "gpu_model")}


def _windows(case: Case, now: datetime) -> list[Window]:
    """When the reserved rows of the fleet are anybody's again."""
    rows = np.flatnonzero(case.fleet.pool < 0)
    if not len(rows):
        return []
    ends = dict(
        ReservationBlock.objects.filter(
            reservation__state="firm", reservation__contract_id__in=[-int(p) for p in np.unique(case.fleet.pool[rows])]
        ).values_list("reservation__contract_id", "reservation__ends_at")
    )
    pools = {int(row): -int(case.fleet.pool[row]) for row in rows}
    return [Window(row, int(ends[c].timestamp())) for row, c in pools.items() if c in ends and ends[c] > now]


def _holds(c: Change, case: Case, now: datetime) -> bool:
    """Whether a later start is free of reservations that the snapshot does not close yet: those beyond its horizon."""
    start = datetime.fromtimestamp(c.start, UTC)
    if not c.start or start <= now + AHEAD:
        return True
    hosts = [int(case.fleet.host_id[h]) for h in c.hosts]
    later = ReservationBlock.objects.filter(host_id__in=hosts, reservation__state="firm")
    return not later.filter(reservation__claims_at__gt=now + AHEAD, reservation__claims_at__lte=start + AHEAD).exists()


class _Told:
    """Changes as the API gives them: fields to submit with, words, and names that the reader may see."""

    def __init__(
        self, job: Job, scene: Scene, request: Request, listings: dict[int, Listing], mine: Collection[int] | None
    ) -> None:
        self.job, self.case, self.was, self.listings, self.mine = job, scene.case, request, listings, mine
        self.models = GpuModel.objects.in_bulk(scene.models)
        self.model_at = scene.models

    def change(self, c: Change) -> dict[str, Any]:
        """One suggestion. `starts_at` None: now."""
        names = self._where(c)
        starts = datetime.fromtimestamp(c.start, UTC) if c.start else None
        if starts:
            names["when"] = _moment(starts)
        jobs = [j for j in c.jobs if self.mine is None or j in self.mine][:MAX_SHOWN]
        names["jobs"] = self._jobs(jobs, all_of=len(jobs) == len(c.jobs))
        fields = {api: getattr(c.request, name) for name, api in _API.items() if self._differs(c.request, name)}
        if c.kind == "model":
            fields["gpu_models"] = [names["model"]]
        if c.kind == "topology":
            pack = c.request.topology
            fields |= {"topology": pack.pack.name.lower() if pack.pack else "pack", "topology_required": pack.required}
        if c.kind == "price" and names["millionths"]:
            fields["price_limit"] = names["millionths"]
        if c.kind == "site" and names["site_id"]:
            fields["site"] = names["site_id"]
        if c.kind == "nvlink":
            fields["nvlink"] = Job.Nvlink.PREFERRED.value
        if c.kind == "spread":
            fields["max_per_domain"] = c.request.topology.max_per_domain
        if c.kind == "affinity":
            fields["affinity"] = []
        if c.kind == "listing":
            fields["listing"] = self.listings[c.request.pool].public_id
        return {
            "kind": c.kind,
            "text": words.change(c, self.was, names),
            "fields": fields,
            "starts_at": starts,
            "jobs": [ids.encode("job", j) for j in jobs],
        }

    def _differs(self, request: Request, name: str) -> bool:
        return bool(getattr(request, name) != getattr(self.was, name))

    def _where(self, c: Change) -> dict[str, Any]:
        if not c.hosts:
            return {}
        h, fleet = c.hosts[0], self.case.fleet
        site = Site.objects.filter(pk=int(fleet.site[h])).first()
        at = int(fleet.gpu_model[h])
        model = self.models.get(self.model_at[at]) if 0 <= at < len(self.model_at) else None
        listing = self.listings.get(c.request.pool)
        price = _price(self.job.contract) if c.kind == "price" else None
        return {
            "site": site.name if site else "another site",
            "site_id": site.public_id if site else "",
            "model": model.name if model else "hosts without GPUs",
            "listing": listing.title if listing else "",
            "millionths": price,
            "price": f"{price / 1_000_000:g} {self.job.contract.currency}" if price else "",
        }

    def _jobs(self, jobs: list[int], *, all_of: bool) -> str:
        """`your job "train"`; with the organization for our own people; '' when one of them is a stranger's."""
        if not jobs or not all_of:
            return ""
        rows = Job.objects.filter(pk__in=jobs).select_related("organization").order_by("pk")
        if self.mine is None:
            return "job " + ", ".join(f"{row.public_id} of {row.organization}" for row in rows)
        return "your job " + ", ".join(row.name or row.public_id for row in rows)


# --- a job that was placed
def _placed(job: Job, decision: Decision, staff: bool) -> dict[str, Any]:
    # Of a rank that was lost and placed again the newest; what the gang does without is nowhere.
    rows = Placement.objects.filter(job=job, attempt=job.attempt).exclude(rank__in=job.lost_ranks)
    last = rows.order_by("rank", "-epoch").distinct("rank").select_related("host", "site")[:MAX_SHOWN]
    where = [{"rank": p.rank, "site": p.site.name, "host": p.host.name, "gpus": p.gpu_indices} for p in last]
    bare = {
        "placed": {"replicas": where, "candidates": None, "terms": []},
        "note": "That cycle is no longer on record.",
    }
    row = _kept(decision)
    known = record.load(row) if row is not None else None
    why = choice(known.case, known.plan, job.pk) if known else None
    if known is None or why is None:
        return bare
    stages = [{"stage": s.name, "label": words.stage(s.name), "hosts_left": n} for s, n in why.stages]
    placed = {
        "replicas": where,
        "hosts": why.hosts,
        "candidates": why.candidates,
        "level": why.level.name.lower(),
        "domains": why.domains,
        "score": round(why.score, 2),
        "second": None if why.second is None else round(why.second, 2),
        "terms": [{"name": t.name, "milli_gpu": round(t.milli, 2), "label": words.TERMS[t.name]} for t in why.terms],
        "evicted": [ids.encode("job", j) for j in why.evicted] if staff else [],
    }
    return {"placed": placed, "stages": stages, "text": _placed_text(why, len(why.placements)), "note": ""}


def _placed_text(why: Choice, replicas: int) -> str:
    fitted = f"{why.candidates} of {why.hosts} hosts" if why.candidates != 1 else f"1 of {why.hosts} hosts"
    made = " Spot work left for it." if why.evicted else ""
    if replicas == 1:
        best = "and it got the only one" if why.candidates == 1 else "and it got the one with the best score"
        if why.second is not None and why.second > why.score + ROUNDED:
            best = "and it stands where the starts promised to others, and its own rules, let it"
        return f"The job has been placed: {fitted} could take it, {best}.{made}"
    inside = f"one {words.level(why.level)}"
    room = f"the tightest of {why.domains} with room" if why.domains > 1 else "the only one with room"
    return f"The job has been placed: {fitted} could take a replica; all {replicas} stand in {inside}, {room}.{made}"


def _price(contract: Contract) -> int:
    """What a GPU-hour costs under it now, millionths: what its jobs' limits are compared with."""
    now_s = int(timezone.now().timestamp())
    rows = PriceVersion.objects.filter(contract=contract, kind=PriceVersion.Kind.RATE, valid_from_s__lte=now_s)
    newest = rows.order_by("-valid_from_s").values_list("millionths", flat=True).first()
    return int(contract.price if newest is None else newest)


def _moment(at: datetime) -> str:
    return at.strftime("%-d %b %Y %H:%M:%S UTC")
