"""Who waits in a cell and may be placed now, as many as one cycle takes."""

from collections.abc import Iterable
from datetime import datetime
from typing import Any, Final, NamedTuple

from marketplace import prepared

MAX_JOBS = 10_000  # considered in one cycle; the rest waits for the next


class Waiting(NamedTuple):
    """A job that may be placed now, with what its contract and its organization say of it. Columns of `_WAITING`, in order."""

    id: int
    organization_id: int
    contract_id: int
    priority: int
    replicas: int
    gpus: int
    gpu_milli: int
    vram_mib: int
    vcpu_milli: int
    ram_mib: int
    nvme_gib: int
    gpu_models: list[str]
    topology: str
    topology_required: bool
    lasts_s: int | None  # most that it stands: its limit and its grace
    queued_s: int
    contract_kind: str
    contract_gpus: int
    listing_id: int
    fair_share_weight: int
    gpu_limit: int
    ruled: bool  # more binds it than its shape: see `scheduler.rules`


_JOBS: Final = """
marketplace_job j JOIN marketplace_contract c ON c.id = j.contract_id
LEFT JOIN marketplace_billingstanding s ON s.organization_id = j.organization_id
"""
# The contract runs, and the organization is not suspended.
_ABLE: Final = """
j.cell_id = %(cell)s AND j.state IN ('queued', 'requeued') AND j.cancel_requested_at IS NULL
AND c.state = 'active' AND c.starts_at <= %(now)s AND (c.ends_at IS NULL OR c.ends_at > %(now)s)
AND s.state IS DISTINCT FROM 'suspended'
"""
# Each contract's first, then each one's second: a customer who queues thousands does not hide the others.
_FIRST: Final = f"""
WITH turn AS (
  SELECT j.id, j.queued_at,
    row_number() OVER (PARTITION BY j.contract_id ORDER BY j.priority DESC, j.queued_at, j.id) AS turn
  FROM {_JOBS} WHERE {_ABLE}
  ORDER BY turn, j.queued_at, j.id LIMIT %(limit)s
)
SELECT j.id, j.organization_id, j.contract_id, j.priority, j.replicas, j.gpus, j.gpu_milli, j.vram_mib, j.vcpu_milli,
  j.ram_mib, j.nvme_gib, j.gpu_models, j.topology, j.topology_required,
  j.max_seconds + j.checkpoint_grace_s, floor(extract(epoch FROM coalesce(j.queued_at, j.created_at)))::bigint, c.kind,
  c.gpu_count, c.listing_id, o.fair_share_weight, o.gpu_limit, j.ruled
FROM turn JOIN marketplace_job j ON j.id = turn.id JOIN marketplace_contract c ON c.id = j.contract_id
JOIN marketplace_organization o ON o.id = j.organization_id ORDER BY turn.turn, turn.queued_at, j.id
"""  # noqa: S608
_NAMED: Final = _FIRST.replace("j.state IN ('queued', 'requeued')", "j.id = ANY(%(jobs)s)")
_DECIDED: Final = f"FROM {_JOBS} LEFT JOIN scheduler_decision d ON d.job_id = j.id WHERE {_ABLE}"
_OTHERS: Final = f"""
SELECT j.id {_DECIDED} AND NOT j.id = ANY(%(but)s)
ORDER BY d.held_hosts IS NULL, CASE WHEN d.at >= j.queued_at THEN d.at END NULLS FIRST, j.queued_at, j.id LIMIT %(limit)s
"""
_UNSEEN: Final = f"SELECT EXISTS (SELECT {_DECIDED} AND (d.at IS NULL OR d.at < j.queued_at))"


def read(cell_id: int, now: datetime, mending: Iterable[int], *, short: bool) -> list[Waiting]:
    """`MAX_JOBS` at most that queue, and besides them `mending`: running gangs that lost ranks.

    Where more queue and room is `short`, half of the places go by turn. The others go to those behind, who may fit where the first do
    not: to whoever has a start promised, which is kept by being planned; then to whoever was never looked at, then was longest ago.
    """
    asked: dict[str, Any] = {"cell": cell_id, "now": now, "limit": MAX_JOBS}
    found = [Waiting(*row) for row in prepared.rows(_FIRST, asked)]
    if short and len(found) == MAX_JOBS:
        behind = MAX_JOBS // 2
        found = found[: MAX_JOBS - behind]
        asked |= {"limit": behind, "but": [job.id for job in found]}
        found += named(cell_id, now, [pk for (pk,) in prepared.rows(_OTHERS, asked)])
    mended = list(mending)
    return named(cell_id, now, mended) + found if mended else found


def named(cell_id: int, now: datetime, jobs: list[int]) -> list[Waiting]:
    """These jobs, whether they queue or run, as they would ask now; without those that could not be placed at all."""
    rows = prepared.rows(_NAMED, {"cell": cell_id, "now": now, "limit": len(jobs), "jobs": jobs})
    return [Waiting(*row) for row in rows]


def unseen(cell_id: int, now: datetime) -> bool:
    """Whether somebody waits whom no cycle has looked at since he queues."""
    return prepared.row(_UNSEEN, {"cell": cell_id, "now": now}) == (True,)
