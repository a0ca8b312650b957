"""Why a job waits or stands where it does: the last decision, the hosts left after each stage, what would change it.

Suggestions are tried with the real planner on the cell as the last cycle left it: from that cycle's record, or from a
snapshot where it was not recorded. A customer learns of others only that something ends; our own people see which.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import numpy as np
from django.core.cache import cache
from django.utils import timezone

from marketplace import ids
from marketplace.models import (
    Cell,
    GpuModel,
    Job,
    Listing,
    Organization,
    Placement,
    ReservationBlock,
    Site,
)
from marketplace.services import job_rules
from marketplace.tenancy import Actor
from scheduler import reasons, record, said, snapshot, words
from scheduler.core.case import Case, Window
from scheduler.core.changes import Change, changes, reserved
from scheduler.core.choice import Choice, choice
from scheduler.core.types import WHOLE, Kind, Request
from scheduler.models import CycleRecord, Decision
from scheduler.packed import UnreadableError
from scheduler.reserved import CLAIM_AHEAD

log = logging.getLogger(__name__)
FRESH_S: Final = 15  # an answer about a waiting job serves so long, whatever cycles pass
KEPT_S: Final = 3600
MAX_SHOWN: Final = 64  # replicas and job names in an answer
ROUNDED: Final = 1 / 32  # milli-GPU: scores are kept rounded
AHEAD: Final = CLAIM_AHEAD
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
    answer = said.answer(job, decision, staff=staff)
    if not deep or decision is None or not (said.queues(job) or answer["outcome"] == "placed"):
        return answer
    key = f"why:{job.pk}:{int(staff)}"
    known = None if fresh else _cached(key)
    now = timezone.now()
    if (
        known
        and known["outcome"] == answer["outcome"]
        and (known["cycle"] == decision.cycle_id or known["until"] > now)
    ):
        return _joined(job, answer, known["more"])
    try:
        more = _placed(job, decision, staff) if answer["outcome"] == "placed" else _waits(job, decision, staff, now)
    except UnreadableError as error:
        more = {"note": f"The record of the cycle cannot be read: {error}." if staff else "The cycle's record is gone."}
    with suppress(Exception):  # without Redis it is computed again
        until = now + timedelta(seconds=FRESH_S)
        kept = {"cycle": decision.cycle_id, "outcome": answer["outcome"], "until": until, "more": more}
        cache.set(key, kept, KEPT_S)
    return _joined(job, answer, more)


def _joined(job: Job, answer: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """The answer with what was found out beside it. How the job ended is said first, and is never from the cache."""
    if end := said.end(job) if "text" in more else "":
        more = {**more, "text": f"{end} {more['text']}"}
    return {**answer, **more}


def _cached(key: str) -> Any:
    with suppress(Exception):
        return cache.get(key)
    return None


# --- a job that waits
def _waits(job: Job, decision: Decision, staff: bool, now: datetime) -> dict[str, Any]:
    if said.outside(job):
        return {}
    scene = _scene(job, decision, now)
    request = next((r for r in scene.case.requests if r.job == job.pk), None)
    if request is None:
        return {"note": "The last cycle did not consider it: it is not among those that may be placed now."}
    mine = {r.job for r in scene.case.running if r.org == job.organization_id}
    listings, windows = _listings(job), _windows(scene.case, now)
    found = changes(
        scene.case,
        job.pk,
        pools=list(listings),
        windows=windows,
        may_name=(lambda _: True) if staff else mine.__contains__,
    )
    told = _Told(job, scene, request, listings, None if staff else mine)
    held = words.reason(decision.reason) in said.ROOM and reserved(scene.case, job.pk, windows)
    kept = [told.change(c) for c in found if _holds(c, scene.case) and told.can_say(c)]
    notes = (
        "" if scene.recorded else "The last cycle was not recorded: this is how things stand now.",
        "" if kept else "No single change that was tried would make it fit.",
    )
    return {
        **(said.reserved(job, staff=staff) if held else {}),
        "changes": kept,
        "note": " ".join(filter(None, notes)),
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
    """When the reserved rows of the fleet are anybody's again: once no reservation on any of their GPUs is in force or near."""
    rows = np.flatnonzero(case.fleet.pool < 0).tolist()
    if not rows:
        return []
    blocks = ReservationBlock.objects.filter(
        host_id__in={int(case.fleet.host_id[row]) for row in rows}, reservation__state="firm", reservation__ends_at__gt=now,
        reservation__claims_at__lte=_seen(case),
    )  # fmt: skip
    on: dict[int, list[tuple[int, set[int], datetime]]] = defaultdict(list)
    found = blocks.values_list("host_id", "reservation__contract_id", "gpu_indices", "reservation__ends_at")
    for host, contract, gpus, ends in found:
        on[host].append((contract, set(gpus), ends))
    windows = []
    for row in rows:
        here = on[int(case.fleet.host_id[row])]
        mine = set().union(*(gpus for contract, gpus, _ in here if contract == -int(case.fleet.pool[row])))
        if mine:
            last = max(ends for _, gpus, ends in here if gpus & mine)
            windows.append(Window(row, int(last.timestamp())))
    return windows


def _holds(c: Change, case: Case) -> bool:
    """Whether it is free of reservations that the case does not know: those beyond its horizon, which a later start, or one for
    longer, may meet. Of each host its GPUs must stay clear of those reserved, and what it takes of the rest is its GPUs' share.
    """
    request = c.request
    stays = timedelta(seconds=request.duration_s) if request.duration_s else AHEAD
    spot = request.kind == Kind.SPOT  # it gives way
    by = datetime.fromtimestamp((c.start or case.now_s) + case.policy.lag_s, UTC) + (timedelta() if spot else stays)
    mine = {int(case.fleet.host_id[row]): mask for row, mask in zip(c.hosts, c.gpus, strict=True)}
    later = ReservationBlock.objects.filter(host_id__in=mine, reservation__state="firm")
    later = later.filter(reservation__claims_at__gt=_seen(case), reservation__claims_at__lte=by).select_related("host")
    return not any(_crosses(request, mine[block.host_id], block) for block in later)


def _crosses(r: Request, mask: int, block: ReservationBlock) -> bool:
    """Whether a replica on these GPUs stands on some of the block's, or takes of the host's CPU, RAM and NVMe what goes with them."""
    if any(mask >> gpu & 1 for gpu in block.gpu_indices):
        return True
    host, others = block.host, block.host.gpu_count - len(block.gpu_indices)
    used = mask.bit_count() // r.gpus if r.gpus and r.gpu_milli == WHOLE else r.replicas  # replicas there, at most
    shares = ((r.cpu, host.vcpu_milli), (r.ram, host.ram_mib), (r.nvme, host.nvme_gib))
    return any(used * ask * host.gpu_count > total * min(others, mask.bit_count() or others) for ask, total in shares)


def _seen(case: Case) -> datetime:
    """By when reservations begin that the case knows (`reserved.reservations`)."""
    longest_s = max((r.duration_s for r in case.requests), default=0)
    return datetime.fromtimestamp(case.now_s + case.policy.lag_s, UTC) + max(AHEAD, timedelta(seconds=longest_s))


class _Told:
    """Changes as the API gives them: fields to submit with, words, and names that the reader may see."""

    def __init__(
        self, job: Job, scene: Scene, request: Request, listings: dict[int, Listing], mine: Collection[int] | None
    ) -> None:
        self.job, self.case, self.listings, self.mine = job, scene.case, listings, mine
        self.was = self._asked(request)
        self.models = GpuModel.objects.in_bulk(scene.models)
        self.model_at = scene.models

    def can_say(self, c: Change) -> bool:
        """A length that leaves no time beside the grace is no time limit."""
        return c.kind != "duration" or c.request.duration_s > self.job.checkpoint_grace_s

    def _asked(self, r: Request) -> Request:
        """The request as its owner writes it: the planner's length is the time limit and the grace after it."""
        return replace(r, duration_s=max(0, r.duration_s - self.job.checkpoint_grace_s))

    def change(self, c: Change) -> dict[str, Any]:
        """One suggestion. `starts_at` None: now."""
        c = c._replace(request=self._asked(c.request))
        names = self._where(c)
        starts = datetime.fromtimestamp(c.start, UTC) if c.start else None
        if starts:
            names["when"] = words.moment(starts)
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
        if c.kind in {"near", "apart", "affinity"}:
            fields |= job_rules.without(self.job, c.kind)
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
        price = said.price(self.job.contract) if c.kind == "price" else None
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
    row = _kept(decision)
    known = record.load(row) if row is not None else None
    why = choice(known.case, known.plan, job.pk) if known else None
    if known is None or why is None:
        return _outlived(job, decision, where)
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


def _outlived(job: Job, decision: Decision, where: list[dict[str, Any]]) -> dict[str, Any]:
    """What is said of a place when the record of its cycle is gone: the scores went with it, the hosts left did not."""
    known = reasons.of(decision.cycle_id, job.pk)
    placed: dict[str, Any] = {"replicas": where, "candidates": None, "terms": []}
    if known is None:
        return {"placed": placed, "note": "That cycle is no longer on record."}
    gang = job.replicas > 1
    fitted = f"{known.candidates} of {known.hosts} hosts could take {'a replica' if gang else 'it'}"
    best = "and all replicas were placed together" if gang else "and it got the one with the best score"
    return {
        "placed": {**placed, "hosts": known.hosts, "candidates": known.candidates},
        "stages": [{"stage": s.name, "label": words.stage(s.name), "hosts_left": n} for s, n in known.stages],
        "text": f"The job has been placed: when its cycle began, {fitted}, {best}.",
        "note": "The scores of that cycle are no longer on record.",
    }


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
