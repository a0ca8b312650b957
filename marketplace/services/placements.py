"""Placements: made by commit, granted by power, observed through agents, released. The only writer of their state.

Every caller holds the sites' locks (`lock_sites`) before it touches rows; rows are locked in id order beneath them.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from django.db import transaction
from django.db.models import F, Value
from django.db.models.functions import Coalesce

from marketplace import arrays, caches, prepared
from marketplace.arrays import Ints
from marketplace.locks import Lock, acquire
from marketplace.models import Agent, Placement
from marketplace.services import hosts, power
from marketplace.services.transitions import transition_many


def lock_sites(site_ids: Iterable[int]) -> None:
    acquire(*((Lock.SITE, pk) for pk in set(site_ids)))


def touch_sites(site_ids: Iterable[int]) -> None:
    """What shall be at these sites has changed: agents that wait are answered now."""
    wanted = sorted(set(site_ids))
    if not wanted:
        return
    prepared.count(
        "UPDATE marketplace_site SET desired_generation = desired_generation + 1 WHERE id = ANY(%s)", [wanted]
    )
    transaction.on_commit(lambda: wake_agents(wanted), robust=True)


def wake_agents(site_ids: Iterable[int]) -> None:
    """Tell the stream process that waiting agents may be answered. Lost without Redis: it polls each second then."""
    with suppress(Exception):  # a nudge only
        pipe = caches.client().pipeline(transaction=False)
        for pk in site_ids:
            pipe.publish(f"site:{pk}", b"1")
        pipe.execute()


@dataclass(frozen=True)
class Planned:
    """Replicas that a commit has admitted: columns [P]. `granted`: their watts are booked (else they wait for miners);
    `delta_w`: what the host's reservation grows by, for each as if it were the only one that waits there.
    """

    job: Ints
    rank: Ints
    host: Ints  # id
    site: Ints
    gpus: list[str]  # array literals
    milli: Ints
    vram: Ints
    watts_delta: Ints
    granted: Ints
    delta_w: Ints


_CREATE = """
WITH planned AS (
  SELECT * FROM unnest(%(job)s::bigint[], %(rank)s::bigint[], %(host)s::bigint[], %(site)s::bigint[], %(gpus)s::text[],
    %(milli)s::bigint[], %(vram)s::bigint[], %(watts_delta)s::bigint[], %(granted)s::bigint[], %(delta_w)s::bigint[])
    WITH ORDINALITY AS u(job, rank, host, site, gpus, milli, vram, watts_delta, granted, delta_w, number)
), made AS (
  INSERT INTO marketplace_placement (job_id, contract_id, organization_id, host_id, site_id, cell_id, attempt, rank, epoch,
    gpu_indices, gpu_milli, vram_mib, vcpu_milli, ram_mib, nvme_gib, watts_delta, state, desired, generation, reason, created_at,
    granted_at)
  SELECT u.job, j.contract_id, j.organization_id, u.host, u.site, j.cell_id, j.attempt, u.rank, j.epoch, u.gpus::smallint[],
    u.milli, u.vram, j.vcpu_milli, j.ram_mib, j.nvme_gib, u.watts_delta, CASE u.granted WHEN 1 THEN 'granted' ELSE 'shedding' END,
    'run', 1, '', %(now)s, CASE u.granted WHEN 1 THEN %(now)s::timestamptz END
  FROM planned u JOIN marketplace_job j ON j.id = u.job ORDER BY u.number
  RETURNING id, job_id, rank, host_id, site_id, state, granted_at
), told AS (
  INSERT INTO marketplace_placementevent (placement_id, at, actor, from_state, to_state, reason)
  SELECT id, %(now)s, CASE WHEN first OR state = 'shedding' THEN %(actor)s ELSE 'power' END,
    CASE WHEN first THEN '' ELSE 'intended' END, CASE WHEN first THEN 'intended' ELSE state END, ''
  FROM made, unnest(ARRAY[true, false]) first ORDER BY id, first DESC
), booked AS (
  INSERT INTO marketplace_powergrant (placement_id, host_id, site_id, delta_w, state, created_at, granted_at)
  SELECT m.id, m.host_id, m.site_id, u.delta_w, m.state, %(now)s, m.granted_at
  FROM made m JOIN planned u ON u.job = m.job_id AND u.rank = m.rank ORDER BY m.id
)
SELECT count(*) FROM made
"""


def create(planned: Planned, left: hosts.Left, *, now: datetime, actor: str) -> int:
    """Write planned placements: their rows, events (`intended`, then `granted` or `shedding`) and grants in one statement, and
    what is left of the hosts in another. Returns how many placements there are now.

    The caller (scheduler.commit) has moved the jobs, re-run the fit rule on hosts that it has locked, booked the watts at the
    nodes, and holds the cells' and sites' locks.
    """
    ((count,),) = arrays.execute(_CREATE, {**vars(planned), "now": now, "actor": actor[:120]})
    hosts.take(left)
    touch_sites(set(planned.site.tolist()))
    return int(count)


def grant(ids: Iterable[int], *, now: datetime) -> None:
    """The watts are confirmed: the agent may start."""
    transition_many(
        Placement,
        ids,
        expected=("intended", "shedding"),
        to="granted",
        now=now,
        actor="power",
        set_columns={"granted_at": now},
    )


def request_release(ids: Sequence[int], *, now: datetime, actor: str, reason: str) -> None:
    """Ask for the end. What never reached the site is released at once; the rest drains, and is not billed from now on."""
    unstarted = Placement.objects.filter(pk__in=ids, state__in=("intended", "shedding")).values_list("pk", flat=True)
    finish(list(unstarted), to="released", now=now, actor=actor, reason=reason)
    moved = transition_many(
        Placement, ids, expected=("granted", "starting", "running", "unreachable"), to="draining", now=now, actor=actor, reason=reason,
        set_columns={"desired": "drain", "reason": reason[:200]},
    )  # fmt: skip
    if moved:  # billing has stopped with the first request, if this one is a second
        Placement.objects.filter(pk__in=moved).update(
            generation=F("generation") + 1, release_requested_at=Coalesce("release_requested_at", Value(now))
        )
        touch_sites(Placement.objects.filter(pk__in=moved).values_list("site_id", flat=True))


def finish(
    ids: Sequence[int], *, to: str, now: datetime, actor: str, reason: str, columns: dict[str, Any] | None = None
) -> None:
    """Placements reach a final state: their share of the host and their watts go back, their jobs are settled."""
    end([Ended(pk, to, reason, columns or {}) for pk in ids], now=now, actor=actor)


@dataclass(frozen=True)
class Ended:
    """A placement's end: the final state, why, and what else is written with it."""

    pk: int
    to: str
    reason: str
    columns: dict[str, Any]


def end(wanted: Sequence[Ended], *, now: datetime, actor: str) -> None:
    """As `finish`, each with its own end; a handful of statements whatever their number."""
    from marketplace.services import jobs

    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for ended in wanted:
        groups[ended.to, ended.reason[:200]].append(ended.pk)
    moved: set[int] = set()
    for (to, reason), pks in groups.items():
        moved |= set(
            transition_many(
                Placement, pks, expected=[s for s in Placement.TRANSITIONS if s not in Placement.FINAL], to=to, now=now,
                actor=actor, reason=reason, set_columns={"desired": "stop", "reason": reason, "finished_at": now},
            )
        )  # fmt: skip
    if not moved:
        return
    rows = list(Placement.objects.filter(pk__in=moved).order_by("pk"))
    own = {ended.pk: ended.columns for ended in wanted}
    named = sorted({name for row in rows for name in own[row.pk]})
    for row in rows:
        for name, value in own[row.pk].items():
            setattr(row, name, value)
    if named:
        Placement.objects.bulk_update([row for row in rows if own[row.pk]], named, batch_size=500)
    hosts.give_back(rows)
    power.release(rows, now=now)
    touch_sites({p.site_id for p in rows})
    jobs.settle({p.job_id for p in rows}, now=now)
    for cell_id in sorted({p.cell_id for p in rows}):
        jobs.nudge_cell(cell_id)


def observe(agent: Agent, reports: list[dict[str, Any]], *, now: datetime) -> None:
    """Take in what an agent says of its placements. Reports about other sites' placements or old generations change nothing.

    Times are the agent's, held between the grant and now: a site can neither bill before the grant nor ahead of time.
    """
    from marketplace.services import jobs

    by_id = {r["pk"]: r for r in reports}
    rows = Placement.objects.filter(pk__in=by_id, site_id=agent.site_id).exclude(state__in=Placement.FINAL)
    jobs.checkpointed(_checkpoints(rows, by_id, now))
    started: list[int] = []
    running: dict[datetime, list[int]] = defaultdict(list)
    back: dict[str, list[int]] = defaultdict(list)
    ended: list[tuple[Placement, dict[str, Any]]] = []
    for row in rows:
        report = by_id[row.pk]
        state = report["state"]
        if state in {"exited", "failed"} and row.state in Placement.AT_SITE:
            ended.append((row, report))
        elif row.state == "unreachable" and state in {"running", "draining"} and row.running_at is not None:
            # The second in which it was first seen to run stays, and what was asked to leave still is.
            back["running" if row.release_requested_at is None else "draining"].append(row.pk)
        elif state == "starting" and row.state in {"granted", "unreachable"}:
            started.append(row.pk)
        elif state == "running" and row.state in {"granted", "starting", "unreachable"}:
            running[_bounded(report.get("running_at"), row.granted_at, now)].append(row.pk)
    transition_many(Placement, started, expected=("granted", "unreachable"), to="starting", now=now, actor=agent.name)
    for to, ids in back.items():
        transition_many(Placement, ids, expected=("unreachable",), to=to, now=now, actor=agent.name, reason="back")
    for at, ids in running.items():
        transition_many(
            Placement,
            ids,
            expected=("granted", "starting", "unreachable"),
            to="running",
            now=now,
            actor=agent.name,
            set_columns={"running_at": at},
        )
    end([_end(row, report, now) for row, report in ended], now=now, actor=agent.name)
    job_ids = Placement.objects.filter(pk__in=[pk for ids in running.values() for pk in ids]).values_list(
        "job_id", flat=True
    )
    jobs.settle(job_ids, now=now)


def _checkpoints(rows: Iterable[Placement], reports: dict[int, dict[str, Any]], now: datetime) -> dict[int, datetime]:
    """Job -> its newest checkpoint, as its replicas tell. One of before the replica's start is what it began from: no news."""
    found: dict[int, datetime] = {}
    for row in rows:
        at = reports[row.pk].get("checkpoint_at")
        began = row.running_at or _bounded(reports[row.pk].get("running_at"), row.granted_at, now)
        if at is not None and at >= began:
            found[row.job_id] = max(found.get(row.job_id, began), min(at, now))
    return found


def _end(row: Placement, report: dict[str, Any], now: datetime) -> Ended:
    """What an agent's last word on a placement comes to."""
    at = _bounded(report.get("finished_at"), row.granted_at, now)
    columns: dict[str, Any] = {"exit_code": report.get("exit_code"), "finished_at": at}
    if row.running_at is None and (began := report.get("running_at")):
        columns["running_at"] = min(_bounded(began, row.granted_at, now), at)
    asked = row.release_requested_at is not None
    if not asked:
        columns["release_requested_at"] = at
    code, reason = report.get("exit_code"), str(report.get("reason") or "")
    clean = report["state"] == "exited" and (code == 0 or asked)
    return Ended(
        row.pk,
        "released" if clean else "failed",
        reason or (row.reason if code else "") or f"exit code {code}",
        columns,
    )


def _bounded(moment: datetime | None, low: datetime | None, high: datetime) -> datetime:
    at = moment or high
    return min(max(at, low or at), high)
