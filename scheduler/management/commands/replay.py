"""`manage.py replay CYCLE`: plans a recorded cycle again and compares. Ends with 1 when the plan differs."""

import json
import sys
from argparse import ArgumentParser
from time import perf_counter
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from marketplace import ids
from scheduler import record
from scheduler.models import Cycle, CycleRecord
from scheduler.packed import UnreadableError

SHOWN = 40


def find(text: str) -> Cycle:
    """The cycle of a public id (`cyc_...`) or a number. CommandError where there is none."""
    pk = int(text) if text.isdigit() else ids.decode(Cycle.PREFIX, text)
    found = Cycle.objects.select_related("cell").filter(pk=pk).first() if pk is not None and pk < 1 << 63 else None
    if found is None:
        raise CommandError(
            f"There is no cycle {text!r}: give its id (cyc_...) or number, as the staff admin shows them."
        )
    return found


class Command(BaseCommand):
    help = "Plan a recorded cycle again and compare, placement by placement. Exit status 1: the plan differs."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("cycle", help="cyc_... or its number")
        parser.add_argument("--json", action="store_true", help="one JSON object")
        parser.add_argument("--anyway", action="store_true", help="compare with what other code planned, too")

    def handle(self, *, cycle: str, json: bool, anyway: bool, **_: Any) -> None:
        row = find(cycle)
        kept = CycleRecord.objects.filter(cycle=row).first()
        if kept is None:
            raise CommandError(
                f"Cycle {row.public_id} of {row.cell.name} is not on record (CYCLE_RECORDS, or older than what is kept)."
            )
        try:
            known = record.load(kept)
        except UnreadableError as error:
            raise CommandError(f"The record of cycle {row.public_id} cannot be read: {error}") from error
        if known.code != record.code() and not anyway:
            raise CommandError(
                f"Cycle {row.public_id} was planned by other code ({known.code}) than this ({record.code()}): another plan would say"
                " nothing. Replay it with that version, or compare all the same with --anyway."
            )
        began = perf_counter()
        lines = record.replay(known)
        answer = {
            "cycle": row.public_id,
            "cell": row.cell.name,
            "generation": row.generation,
            "at": row.started_at.isoformat(),
            "hosts": len(known.case.fleet),
            "jobs": len(known.case.requests),
            "running": len(known.case.running),
            "placements": len(known.plan.placements),
            "preemptions": len(known.plan.preemptions),
            "seed": known.case.seed,
            "record_bytes": kept.size,
            "recorded_by": known.code,
            "replayed_by": record.code(),
            "plan_ms": round((perf_counter() - began) * 1000, 2),
            "same": not lines,
            "differences": lines,
        }
        self.stdout.write(_json(answer) if json else _text(answer))
        if lines:
            sys.exit(1)


def _json(answer: dict[str, Any]) -> str:
    return json.dumps(answer)


def _text(answer: dict[str, Any]) -> str:
    a = answer
    lines = [
        f"cycle {a['cycle']}: generation {a['generation']} of {a['cell']}, {a['at']}, seed {a['seed']}",
        (
            f"{a['hosts']} hosts, {a['jobs']} jobs, {a['running']} running placements; {a['placements']} placements, "
            f"{a['preemptions']} preemptions planned; {a['record_bytes']} bytes on record"
        ),
    ]
    if a["recorded_by"] != a["replayed_by"]:
        lines.append(f"recorded by other code ({a['recorded_by']}), replayed by {a['replayed_by']}")
    lines.append(f"planned again in {a['plan_ms']} ms: " + ("the same plan" if a["same"] else "ANOTHER PLAN"))
    lines += a["differences"][:SHOWN]
    if len(a["differences"]) > SHOWN:
        lines.append(f"and {len(a['differences']) - SHOWN} more (--json lists all)")
    return "\n".join(lines)
