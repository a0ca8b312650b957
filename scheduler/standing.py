"""What stands in a cell: who could give way or will end, what an eviction would cost, and who is on the way out already."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Final, NamedTuple

from marketplace import prepared
from marketplace.services.availability import LAG_S, WATTS_S
from scheduler.core.types import Kind, Running

KINDS: Final = {"reserved": Kind.FIRM, "flexible": Kind.FLEXIBLE, "on_demand": Kind.ON_DEMAND, "spot": Kind.SPOT}


class Row(NamedTuple):
    """A live placement. Columns of `_RUNNING`, in order; times in seconds."""

    id: int
    job: int
    org: int
    kind: str
    host: int
    gpus: list[int]
    gpu_milli: int
    cpu: int
    ram: int
    nvme: int
    vram: int
    bid: int
    priority: int
    since: int
    replicas: int
    limit: int  # and the grace after it; 0 = none
    grace_end: int | None  # of one that drains
    saved: int  # newest checkpoint, 0 = it told of none
    contract: int
    least: int  # replicas with which its gang goes on, 0 = it goes whole


# What does not run yet begins now, if it has waited longer for its watts than anybody may: it starts slowly (an image is fetched).
# What of a gang that may shrink is done counts towards its least (services.replicas.may_lose).
_RUNNING = """
SELECT p.id, p.job_id, p.organization_id, c.kind, p.host_id, p.gpu_indices, p.gpu_milli, p.vcpu_milli, p.ram_mib, p.nvme_gib,
  p.vram_mib, coalesce(c.limit_price, 0), j.priority, floor(extract(epoch FROM
    coalesce(p.running_at, greatest(p.created_at, %(now)s - make_interval(secs => %(watts_s)s)))))::bigint,
  j.replicas, coalesce(j.max_seconds + j.checkpoint_grace_s, 0),
  CASE WHEN p.state = 'draining' THEN floor(extract(epoch FROM p.release_requested_at))::bigint + j.checkpoint_grace_s END,
  coalesce(floor(extract(epoch FROM j.checkpointed_at)), 0)::bigint, p.contract_id,
  CASE WHEN j.on_replica_loss = 'shrink' AND j.state = 'running' AND j.cancel_requested_at IS NULL THEN
    greatest(1, j.min_replicas - (SELECT count(*) FROM marketplace_placement d WHERE d.job_id = j.id AND d.attempt = j.attempt
      AND d.state = 'released' AND d.exit_code = 0 AND NOT d.rank = ANY(j.lost_ranks))) ELSE 0 END
FROM marketplace_placement p JOIN marketplace_job j ON j.id = p.job_id JOIN marketplace_contract c ON c.id = p.contract_id
WHERE p.cell_id = %(cell)s AND p.state IN ('intended', 'shedding', 'granted', 'starting', 'running', 'draining') ORDER BY p.id
"""
_LEAVING = """
SELECT EXISTS (SELECT 1 FROM marketplace_job j JOIN marketplace_placement p ON p.job_id = j.id
  WHERE j.cell_id = %(cell)s AND j.state = 'preempting' AND p.state IN ('draining', 'unreachable'))
OR EXISTS (SELECT 1 FROM marketplace_placement WHERE cell_id = %(cell)s AND state = 'draining' AND reason LIKE 'preempted%%')
"""


def running(
    cell_id: int, hosts: Sequence[int], reserved: Mapping[tuple[int, int], int], now: datetime
) -> list[Running]:
    """Live placements that could end or give way. What drains is on its way out: nobody evicts it, and it is gone `LAG_S` after
    its grace; one that is late by then is given as long again.

    `hosts`: host ids by row. `reserved`: (host id, GPU) -> the row of a reservation's part of the host.
    """
    now_s = int(now.timestamp())
    row_of = {pk: i for i, pk in enumerate(hosts)}
    rows = [Row(*row) for row in prepared.rows(_RUNNING, {"cell": cell_id, "now": now, "watts_s": WATTS_S})]
    return [_running(p, reserved, row_of[p.host], now_s) for p in rows if p.host in row_of]


def _running(p: Row, reserved: Mapping[tuple[int, int], int], row: int, now_s: int) -> Running:
    ends = p.since + p.limit + LAG_S if p.limit else 0
    if p.grace_end is not None:
        ends = (p.grace_end if p.grace_end + LAG_S > now_s else now_s) + LAG_S
    return Running(
        placement=p.id,
        job=p.job,
        org=p.org,
        kind=KINDS[p.kind],
        host=reserved.get((p.host, p.gpus[0]), row) if p.gpus else row,
        gpus=tuple(p.gpus),
        gpu_milli=p.gpu_milli,
        cpu=p.cpu,
        ram=p.ram,
        nvme=p.nvme,
        vram=p.vram,
        bid=p.bid,
        priority=p.priority,
        work_lost_s=max(0, now_s - max(p.since, p.saved)),
        gang_size=p.replicas,
        gang_min=p.least,
        ends_at=ends,
        quota_id=p.contract,
        preemptible=p.grace_end is None,
    )


class Held(NamedTuple):
    """Milli-GPU that live placements hold now, by contract and by organization over all cells, and by organization in this one."""

    contract: Counter[int]
    organization: Counter[int]
    here: Counter[int]


def held(organizations: Collection[int], cell_id: int) -> Held:
    found = Held(Counter(), Counter(), Counter())
    rows = prepared.rows(
        "SELECT contract_id, organization_id, cell_id, sum(cardinality(gpu_indices) * gpu_milli) FROM marketplace_placement"
        " WHERE state NOT IN ('released', 'failed', 'lost') AND organization_id = ANY(%s) GROUP BY 1, 2, 3",
        [sorted(organizations)],
    )
    for contract_id, organization_id, cell, milli in rows:
        found.contract[contract_id] += milli
        found.organization[organization_id] += milli
        if cell == cell_id:
            found.here[organization_id] += milli
    return found


def leaving(cell_id: int) -> bool:
    """Whether victims of an earlier cycle still drain: until they are gone nobody else is preempted for the same watts and GPUs."""
    return prepared.row(_LEAVING, {"cell": cell_id}) == (True,)
