"""Recorded cycles: what a plan was made of and what came out, kept small, so that it can be planned again and explained.

Written after the commit, in a statement of its own; a failure is logged and costs the record, never the cycle. Every so many
records of a cell, and whenever hosts came or went, one stands alone; those between are kept as what differs from it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path
from time import perf_counter_ns
from typing import Any, Final

import numba
import numpy as np
from django.conf import settings
from django.db import transaction
from django.db.models import Max, OuterRef, Subquery

import scheduler.core
from marketplace import prepared
from scheduler.core.case import Case
from scheduler.core.types import Decision, Fleet, Placement, Plan, Preemption, Reason, Request, Running
from scheduler.models import Cycle, CycleRecord
from scheduler.packed import Column, Columns, UnreadableError, align, pack, unpack
from scheduler.packed import taken as rows_taken
from scheduler.snapshot import Snapshot
from scheduler.tables import from_table, plain, restored, to_table

log = logging.getLogger(__name__)
FRESH: Final = 100  # records that lean on one before the next stands alone
KEPT_BASES: Final = 8  # cells whose base a process remembers
_TABLES: Final[tuple[tuple[str, type, str], ...]] = (("jobs", Request, "job"), ("running", Running, "placement"))
_bases: dict[int, tuple[int, dict[str, Columns]]] = {}  # cell -> (record, its sections)


@dataclass(frozen=True)
class Recorded:
    """A cycle as it was. `refused`: jobs whose rows had moved at the commit. `nodes`: power node id by position;
    `models`: GPU model id by position in the models mask.
    """

    case: Case
    plan: Plan
    refused: dict[int, Reason]
    nodes: list[int]
    models: list[int]
    code: str

    def after(self) -> Case:
        return self.case.after(self.plan, self.refused)


def case_of(taken: Snapshot) -> Case:
    """What a cycle plans with, out of its snapshot."""
    now_s = int(taken.now.timestamp())
    return Case(taken.fleet, taken.requests, taken.running, taken.policy, taken.generation, now_s)


def models_of(taken: Snapshot) -> list[int]:
    """GPU model id by position in the models mask."""
    return sorted(taken.model_of, key=lambda pk: taken.model_of[pk])


@cache
def code() -> str:
    """What a plan depends on besides its case: the core's sources, and the two libraries that compute."""
    sources = hashlib.sha256()
    for path in sorted(Path(scheduler.core.__path__[0]).glob("*.py")):
        sources.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"core {sources.hexdigest()[:12]}, numpy {np.__version__}, numba {numba.__version__}"


def wanted(cycle: Cycle) -> bool:
    """Whether the settings ask for a record of this cycle."""
    if settings.CYCLE_RECORDS == "waiting" and cycle.jobs_placed == cycle.jobs_considered and not cycle.preempted:
        return False
    return settings.CYCLE_RECORDS != "none" and cycle.generation % settings.CYCLE_RECORD_EVERY == 0


def keep(cycle: Cycle, taken: Snapshot, made: Plan, refused: Mapping[int, Reason]) -> CycleRecord | None:
    """Records a cycle, when the settings ask for it; None when they do not, or when the database does not take it."""
    if not wanted(cycle):
        return None
    t0, case = perf_counter_ns(), case_of(taken)
    try:
        sections, notes = _sections(case, made, refused, taken.node_of, models_of(taken))
        with transaction.atomic():
            base_id, base = _base(cycle.cell_id)
            fits = base is not None and len(base["hosts"]["host_id"]) == len(case.fleet)
            if base is not None and fits:
                _share(base["hosts"], sections["hosts"])
            body = _written(sections, notes, base if fits else None)
            row = CycleRecord.objects.create(
                cycle=cycle,
                cell_id=cycle.cell_id,
                at=cycle.started_at,
                base_id=base_id if fits else None,
                code=code(),
                body=body,
                size=len(body),
                pack_us=(perf_counter_ns() - t0) // 1000,
            )
    except Exception:  # whatever it is: the jobs have their places
        log.exception("cycle %s of %s is not recorded", cycle.generation, cycle.cell_id)
        return None
    if not fits:
        _remember(cycle.cell_id, row.pk, sections)
    return row


def load(row: CycleRecord) -> Recorded:
    """The cycle as it was recorded. UnreadableError when the record is damaged or of a layout that this code cannot read."""
    base = None
    if row.base_id is not None:
        base = _read(bytes(CycleRecord.objects.values_list("body", flat=True).get(pk=row.base_id)), None)[0]
    sections, notes = _read(bytes(row.body), base)
    try:
        values = notes["values"]
        case = Case(
            fleet=Fleet(**{f.name: sections["hosts"][f.name] for f in fields(Fleet) if f.name in sections["hosts"]}),
            requests=from_table(Request, sections["jobs"], values["jobs"]),
            running=from_table(Running, sections["running"], values["running"]),
            policy=restored(notes["policy"]),
            seed=notes["seed"],
            now_s=notes["now"],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UnreadableError(f"written by {row.code}, which kept other fields: {error}") from error
    refused = {int(job): Reason(reason) for job, reason in notes["refused"].items()}
    return Recorded(
        case, _plan_of(sections["plan"], notes.get("held", {})), refused, notes["nodes"], notes["models"], row.code
    )


def replay(recorded: Recorded) -> list[str]:
    """Plans the case again; every difference in a line, none when it is the same plan."""
    return differences(recorded.plan, recorded.case.plan())


def differences(was: Plan, now: Plan) -> list[str]:
    """Placement by placement, eviction by eviction, decision by decision."""
    lines: list[str] = []
    for what, old, new in (
        ("placement", _by(was.placements), _by(now.placements)),
        ("preemption", _by(was.preemptions), _by(now.preemptions)),
        ("decision", {d.job: _told(d) for d in was.decisions}, {d.job: _told(d) for d in now.decisions}),
    ):
        keys = [*old, *(k for k in new if k not in old)]
        lines += [f"{what} {k}: recorded {old.get(k)}, now {new.get(k)}" for k in keys if old.get(k) != new.get(k)]
    if not lines and [p[:2] for p in was.placements] != [p[:2] for p in now.placements]:
        lines.append("placements: the same, in another order")
    return lines


def forget(now: datetime) -> int:
    """Deletes records that are older than the settings allow, or more than they allow of a cell; how many went.

    One that others lean on goes after the last of them. The newest that stands alone stays: the next will lean on it.
    """
    rows = CycleRecord.objects.all()
    old = rows.filter(at__lt=now - timedelta(days=settings.CYCLE_RECORD_DAYS))
    deleted = old.exclude(base=None).delete()[0]
    cells = rows.order_by().values_list("cell_id", flat=True).distinct()
    for cell_id in cells:
        mine = rows.filter(cell_id=cell_id)
        cut = mine.order_by("-pk").values_list("pk", flat=True)[settings.CYCLE_RECORD_KEEP - 1 :][:1]
        for pk in cut:
            deleted += mine.filter(pk__lt=pk).exclude(base=None).delete()[0]
            newest = mine.filter(base=None).aggregate(newest=Max("pk"))["newest"]
            deleted += mine.filter(pk__lt=pk, base=None, deltas=None).exclude(pk=newest).delete()[0]
    newest_of = rows.filter(cell_id=OuterRef("cell_id"), base=None).order_by("-pk").values("pk")[:1]
    alone = old.filter(base=None, deltas=None).exclude(pk=Subquery(newest_of))
    return int(deleted + alone.delete()[0])


# --- sections: hosts, jobs, running, plan
def _sections(
    case: Case, made: Plan, refused: Mapping[int, Reason], nodes: Sequence[int], models: Sequence[int]
) -> tuple[dict[str, Columns], dict[str, Any]]:
    sections: dict[str, Columns] = {"hosts": {f.name: getattr(case.fleet, f.name) for f in fields(Fleet)}}
    values = {}
    for name, kind, _ in _TABLES:
        sections[name], values[name] = to_table(kind, getattr(case, "requests" if name == "jobs" else name))
    sections["plan"] = _plan_columns(made)
    notes = {
        "seed": case.seed,
        "now": case.now_s,
        "policy": plain(case.policy),
        "values": values,
        "nodes": list(nodes),
        "models": list(models),
        "refused": {str(job): int(reason) for job, reason in refused.items()},
        "held": {str(d.job): list(d.held) for d in made.decisions if d.held},
    }
    return sections, notes


def _written(sections: dict[str, Columns], notes: dict[str, Any], base: dict[str, Columns] | None) -> bytes:
    parts = [pack(sections["hosts"], notes, None if base is None else base["hosts"])]
    for name, _, key in _TABLES:
        columns, old, places = sections[name], None, np.zeros(0, np.int64)
        if base is not None:
            places = align(columns[key], base[name][key])
            old = rows_taken(base[name], places)
        parts += [pack({"places": np.diff(places, prepend=0)}, None), pack(columns, None, old)]
    parts.append(pack(sections["plan"], None))
    return b"".join(len(part).to_bytes(4, "little") + part for part in parts)


def _read(data: bytes, base: dict[str, Columns] | None) -> tuple[dict[str, Columns], dict[str, Any]]:
    parts, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "little")
        parts.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    if len(parts) != 2 + 2 * len(_TABLES):
        raise UnreadableError(f"{len(parts)} sections")
    sections: dict[str, Columns] = {}
    sections["hosts"], notes = unpack(parts[0], None if base is None else base["hosts"])
    try:
        for i, (name, _, key) in enumerate(_TABLES):
            places = np.cumsum(unpack(parts[1 + 2 * i])[0]["places"].astype(np.int64))
            sections[name] = unpack(parts[2 + 2 * i], None if base is None else rows_taken(base[name], places))[0]
            sections[name][key]  # by it later rows are aligned
        sections["hosts"]["host_id"]
    except KeyError as error:
        raise UnreadableError(f"without {error}") from error
    sections["plan"] = unpack(parts[-1])[0]
    return sections, notes


_ALONE = """
SELECT r.cycle_id, (SELECT count(*) FROM scheduler_cyclerecord d WHERE d.base_id = r.cycle_id) FROM scheduler_cyclerecord r
WHERE r.cell_id = %s AND r.base_id IS NULL ORDER BY r.cycle_id DESC LIMIT 1
"""


def _base(cell_id: int) -> tuple[int | None, dict[str, Columns] | None]:
    """The cell's newest record that stands alone, while few enough lean on it."""
    newest, lean = prepared.row(_ALONE, [cell_id]) or (None, 0)
    if newest is None or lean >= FRESH:
        return None, None
    known = _bases.get(cell_id)
    if known is not None and known[0] == newest:
        return known
    body = CycleRecord.objects.values_list("body", flat=True).get(pk=newest)
    try:
        sections = _read(bytes(body), None)[0]
    except UnreadableError:  # of an older layout: begin anew
        return None, None
    _remember(cell_id, newest, sections)
    return newest, sections


def _share(base: Columns, columns: Columns) -> None:
    """Equal columns of the base become the snapshot's own, which the next snapshots share: those need no look then."""
    for name, column in columns.items():
        if base.get(name) is not column and np.array_equal(base.get(name), column):  # type: ignore[arg-type]
            base[name] = column


def _remember(cell_id: int, pk: int, sections: dict[str, Columns]) -> None:
    """Columns are kept as they are: nobody writes a snapshot's in place."""
    while len(_bases) >= KEPT_BASES and cell_id not in _bases:
        del _bases[next(iter(_bases))]
    _bases[cell_id] = pk, {s: dict(sections[s]) for s in ("hosts", "jobs", "running")}


_SAID: Final = ("placed", "reason", "binding", "node", "short", "fitting_replicas", "earliest_start")


def _said(d: Decision) -> tuple[int, ...]:
    return tuple(int(getattr(d, name)) for name in _SAID)


def _told(d: Decision) -> tuple[Any, ...]:
    return *_said(d), d.held


def _by(rows: Sequence[Any]) -> dict[Any, Any]:
    """By (job, replica), or (placement, job)."""
    return {row[:2]: row[2:] for row in rows}


def _plan_columns(made: Plan) -> Columns:
    def table(rows: Sequence[tuple[int, ...]], width: int) -> Column:
        return np.array(rows, np.int64).reshape(-1, width).T

    masks = [
        (p.job, p.replica, p.host, sum(1 << g for g in p.gpus), p.gpu_milli, p.watts_delta) for p in made.placements
    ]
    return {
        "placements": table(masks, 6),
        "preemptions": table([tuple(p) for p in made.preemptions], 4),
        "decisions": table([(d.job, *_said(d)) for d in made.decisions], 1 + len(_SAID)),
    }


def _plan_of(columns: Columns, held: dict[str, list[int]]) -> Plan:
    plan = Plan()
    for job, replica, host, mask, milli, watts in columns["placements"].T.tolist():
        gpus = tuple(i for i in range(mask.bit_length()) if mask >> i & 1)
        plan.placements.append(Placement(job, replica, host, gpus, milli, watts))
    plan.preemptions = [Preemption(*row) for row in columns["preemptions"].T.tolist()]
    for job, placed, reason, binding, node, short, fitting, start in columns["decisions"].T.tolist():
        reasons = Reason(reason), Reason(binding)
        hosts = tuple(held.get(str(job), ()))
        plan.decisions.append(
            Decision(job, bool(placed), reasons[0], (), reasons[1], node, short, fitting, "", start, hosts)
        )
    return plan
