"""A job as it is shown: by the API, the pages and the command line alike. Reads only."""

from typing import Any

from django.utils import timezone

from marketplace import ids
from marketplace.models import Job, JobEvent, LogChunk, Placement
from marketplace.services import job_rules, placement_energy
from marketplace.services.transitions import legal_actions

MAX_LOG_CHUNKS = 200


def shown(job: Job) -> dict[str, Any]:
    """The resource. Secrets are never in it; `actions` are what is legal now."""
    return {
        "id": job.public_id,
        "object": "job",
        "name": job.name,
        "contract": ids.encode("ctr", job.contract_id),
        "state": job.state,
        "reason": job.state_reason,
        "replicas": job.replicas,
        "gpus": job.gpus,
        "gpu_milli": job.gpu_milli,
        "vram_mib": job.vram_mib,
        "vcpu_milli": job.vcpu_milli,
        "ram_mib": job.ram_mib,
        "nvme_gib": job.nvme_gib,
        "gpu_models": job.gpu_models,
        **job_rules.shown(job),
        "priority": job.priority,
        "image": job.image,
        "command": job.command,
        "env": job.env,
        "attempt": job.attempt,
        "restarts": job.restarts,
        "movable": job.movable,
        "moves": job.moves,
        "exit_code": job.exit_code,
        "created_at": job.created_at,
        "queued_at": job.queued_at,
        "started_at": job.started_at,
        "finished_at": job.finished_at,
        "checkpointed_at": job.checkpointed_at,
        "reference": job.reference,
        "metadata": job.metadata,
        "actions": ["cancel"] if "cancelled" in legal_actions(Job, job.state) and not job.cancel_requested_at else [],
    }


def placements(job: Job) -> list[dict[str, Any]]:
    rows = list(Placement.objects.filter(job=job).select_related("host", "site").order_by("-attempt", "rank")[:200])
    drew = placement_energy.of_placements(rows, now=timezone.now())
    return [placement(p, drew[p.pk]) for p in rows]


def placement(p: Placement, drew: placement_energy.Drew) -> dict[str, Any]:
    """The resource: where a replica ran, the instants between which it is billed, and what it drew."""
    return {
        "id": p.public_id,
        "object": "placement",
        "job": ids.encode("job", p.job_id),
        "contract": ids.encode("ctr", p.contract_id),
        "attempt": p.attempt,
        "rank": p.rank,
        "site": p.site.name,
        "host": p.host.name,
        "gpus": p.gpu_indices,
        "gpu_milli": p.gpu_milli,
        "state": p.state,
        "reason": p.reason,
        "granted_at": p.granted_at,
        "running_at": p.running_at,
        "release_requested_at": p.release_requested_at,
        "finished_at": p.finished_at,
        "exit_code": p.exit_code,
        "energy_wh": drew.wh,
        "average_w": drew.average_w,
    }


def events(job: Job) -> list[dict[str, Any]]:
    """The first thousand, for the job's page."""
    return [event(row) for row in JobEvent.objects.filter(job=job).order_by("id")[:1000]]


def event(row: JobEvent) -> dict[str, Any]:
    return {"at": row.at, "actor": row.actor, "from": row.from_state, "to": row.to_state, "reason": row.reason}


def logs(placement: Placement | None, stream: str, offset: int) -> dict[str, Any]:
    """Text from byte `offset` on, at most MAX_LOG_CHUNKS chunks; `next` is where to go on."""
    if placement is None:
        return {
            "object": "log",
            "placement": None,
            "stream": stream,
            "offset": offset,
            "next": 0,
            "data": "",
            "complete": False,
        }
    rows = list(
        LogChunk.objects.filter(placement=placement, stream=stream, offset__gte=0)
        .order_by("offset")
        .only("offset", "size", "data")
    )
    text, end = [], offset
    for row in [r for r in rows if r.offset + r.size > offset][:MAX_LOG_CHUNKS]:
        text.append(row.data.encode()[max(0, offset - row.offset) :].decode(errors="replace"))
        end = row.offset + row.size
    last = rows[-1].offset + rows[-1].size if rows else 0
    return {
        "object": "log",
        "placement": placement.public_id,
        "stream": stream,
        "offset": offset,
        "next": end,
        "data": "".join(text),
        "complete": placement.state in Placement.FINAL and end >= last,
    }
