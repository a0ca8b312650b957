"""`manage.py explain JOB`: why a job waits or stands where it does, for our own people."""

import json
from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.core.serializers.json import DjangoJSONEncoder

from marketplace import ids
from marketplace.models import Job
from scheduler import why


def find(text: str) -> Job:
    """The job of a public id (`job_...`) or a number. CommandError where there is none."""
    pk = int(text) if text.isdigit() else ids.decode(Job.PREFIX, text)
    rows = Job.objects.select_related("contract__listing", "organization", "cell")
    found: Job | None = rows.filter(pk=pk).first() if pk is not None and pk < 1 << 63 else None
    if found is None:
        raise CommandError(f"There is no job {text!r}: give its id (job_...) or number.")
    return found


class Command(BaseCommand):
    help = "Why a job waits or stands where it does: hosts left after each stage, what binds, what would help."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("job", help="job_... or its number")
        parser.add_argument("--json", action="store_true", help="one JSON object")

    def handle(self, *, job: str, json: bool, **_: Any) -> None:
        row = find(job)
        answer = why.explain(row, staff=True, fresh=True)
        self.stdout.write(_json(answer) if json else text(row, answer))


def _json(answer: dict[str, Any]) -> str:
    return json.dumps(answer, cls=DjangoJSONEncoder)


def text(job: Job, answer: dict[str, Any]) -> str:
    """The explanation as lines."""
    shape = f"{job.replicas} x {job.gpus} GPU" + (f" ({job.gpu_milli} milli)" if job.gpu_milli < 1000 else "")
    lines = [
        f"{job.public_id} {job.name}".rstrip(),
        (
            f"  {job.organization}, cell {job.cell.name}, {job.contract.kind}, {shape}, {job.vcpu_milli / 1000:g} vCPU, "
            f"{job.ram_mib} MiB, {job.topology}{' required' if job.topology_required else ''}"
        ),
        f"  state {job.state}: {answer['text']}",
    ]
    if answer.get("at"):
        lines.append(
            f"  decided {answer['at']:%Y-%m-%d %H:%M:%S} UTC, reason {answer['reason']}, binding {answer['binding'] or '-'}"
        )
    if answer.get("suggestion"):
        lines.append(f"  in detail: {answer['suggestion']}")
    if answer.get("earliest_start"):
        lines.append(f"  earliest start {answer['earliest_start']:%Y-%m-%d %H:%M:%S} UTC")
    if answer["stages"]:
        lines.append("  hosts left after each stage:")
        lines += [f"    {s['hosts_left']:>7}  {s['stage']}  ({s['label']})" for s in answer["stages"]]
    lines += _where(answer["placed"]) if answer["placed"] else []
    if answer["changes"]:
        lines.append("  what would change it (each tried with the planner):")
        lines += [f"    - {c['text']}" for c in answer["changes"]]
    if answer.get("note"):
        lines.append(f"  note: {answer['note']}")
    return "\n".join(lines)


def _where(placed: dict[str, Any]) -> list[str]:
    lines = [f"    replica {r['rank']}: {r['host']} of {r['site']}, GPUs {r['gpus']}" for r in placed["replicas"]]
    if placed["terms"]:
        second = "" if placed["second"] is None else f"; the next best scored {placed['second']:g}"
        lines.append(f"  score of replica 0's host {placed['score']:g} milli-GPU{second}:")
        lines += [f"    {t['milli_gpu']:>10.2f}  {t['name']}  ({t['label']})" for t in placed["terms"]]
    if placed.get("evicted"):
        lines.append(f"  left for it: {', '.join(placed['evicted'])}")
    return lines
