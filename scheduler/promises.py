"""Start times promised to waiting jobs, from one cycle to the next: written with the job's decision, read back into its request."""

import logging
from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np

from marketplace import prepared
from marketplace.models import Cell, Job
from marketplace.services import replicas
from scheduler import words
from scheduler.core.types import Decision as Decided
from scheduler.core.types import Fleet, Plan, Request
from scheduler.models import Decision

log = logging.getLogger(__name__)
_PROMISED = """
SELECT d.job_id, floor(extract(epoch FROM d.earliest_start))::bigint, d.held_hosts
FROM scheduler_decision d JOIN marketplace_job j ON j.id = d.job_id
WHERE d.held_hosts IS NOT NULL AND d.earliest_start IS NOT NULL AND j.cell_id = %s AND j.state IN ('queued', 'requeued')
"""


def due(after: datetime, by: datetime) -> list[tuple[int, datetime]]:
    """(cell, start) of what was promised for a moment of (after, by], each once, earliest first."""
    rows = Decision.objects.filter(held_hosts__isnull=False, earliest_start__gt=after, earliest_start__lte=by)
    rows = rows.filter(job__state__in=Job.WAITING).order_by("earliest_start", "job__cell_id")
    return list(rows.values_list("job__cell_id", "earliest_start").distinct())


def bind(cell_id: int, requests: Sequence[Request], fleet: Fleet, host_of: Sequence[int]) -> None:
    """Gives requests the start and the hosts that their last decision promised. A host that is gone is row -1: the core then
    makes a new promise, and counts the old one as broken.
    """
    found = {job: (start, hosts) for job, start, hosts in prepared.rows(_PROMISED, [cell_id])}
    if not found:
        return
    wanted = {host for _, hosts in found.values() for host in hosts}
    ids = np.asarray(host_of, np.int64)
    rows: dict[tuple[int, int], int] = {}
    for row in np.flatnonzero(np.isin(ids, list(wanted))).tolist():
        # A reservation's part of a host is a row of its own, found by its pool.
        rows.setdefault((host_of[row], min(0, int(fleet.pool[row]))), row)
    for r in requests:
        if r.job in found:
            r.promised_start, hosts = found[r.job]
            r.promised_hosts = tuple(rows.get((host, min(0, r.pool)), -1) for host in hosts)


def tell_broken(cell: Cell, requests: Sequence[Request], made: Plan, now: datetime) -> int:
    """A promised start that the plan cannot keep is said: in the log, and in the job's story with the start that it has instead.
    How many there are.
    """
    if not made.broken:
        return 0
    log.warning("cell %s: promised starts of %d jobs cannot be kept: %s", cell.name, len(made.broken), made.broken[:20])
    promised = {r.job: r.promised_start for r in requests}
    instead = {d.job: d.earliest_start for d in made.decisions}
    rows = Job.objects.in_bulk(made.broken)
    for job in made.broken:
        start = instead.get(job, 0)
        then = f"it is now promised for {_moment(start)}" if start else "no other can be promised yet"
        lost = f"{words.BROKEN} {_moment(promised[job])} cannot be kept, for a host or its watts were lost: {then}"
        replicas.note([rows[job]], lost, now=now, actor="scheduler")
    return len(made.broken)


def _moment(seconds: int) -> str:
    return words.moment(datetime.fromtimestamp(seconds, UTC))


def held_hosts(decisions: Sequence[Decided], host_of: Sequence[int]) -> list[str]:
    """What each decision holds, as an array literal of host ids; empty for no promise."""
    return ["{" + ",".join(str(host_of[row]) for row in d.held) + "}" for d in decisions]
