"""What each power node can still give to GPU hosts: free now, pending, and what sleeping miners would give back."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from marketplace import arrays
from marketplace.arrays import Ints


@dataclass(frozen=True)
class NodeTable:
    """Power nodes as columns [N], parents first. Watts in mW: `free` less what hosts with pending grants are short of
    (`pending_w`); `reclaimable` from machines that may be slept.
    """

    ids: Ints
    parent: Ints  # position, -1 for a root
    site: Ints
    k_gpu: Ints  # overhead, per mille
    free_mw: Ints
    reclaimable_mw: Ints

    def positions(self, node_ids: Ints) -> Ints:
        """Position of each node id; ValueError for one that is not here."""
        return _positions(self.ids, node_ids)


@dataclass(frozen=True)
class NodeBudget:
    """One node of a `NodeTable`, mW."""

    free_mw: int
    reclaimable_mw: int


# What a host with pending grants is short of is a fact of the host: the watts of all GPUs of which somebody has, or waits for, a part,
# less what is booked for it now. Who shares a GPU with another, or comes to a host that is raised for another, needs that much less,
# and needs it himself once the other is gone.
_SHORT = """
WITH short AS (
  SELECT h.site_id, h.power_node_id AS node, greatest(0, h.base_w + CASE WHEN h.cap_control
    THEN u.active * least(h.gpu_max_w, h.call_gpu_w) + (h.gpu_count - u.active) * h.gpu_min_w
    ELSE h.gpu_count * h.gpu_max_w END - h.reserved_w) AS watts
  FROM (
    SELECT g.host_id, bit_count(bit_or((SELECT coalesce(bit_or(1::bigint << i), 0) FROM unnest(p.gpu_indices) i))::bit(64)) AS active
    FROM marketplace_powergrant g JOIN marketplace_placement p ON p.id = g.placement_id
    WHERE g.state IN ('granted', 'shedding') AND g.host_id IN (
      SELECT host_id FROM marketplace_powergrant WHERE site_id = ANY(%(sites)s) AND state = 'shedding')
    GROUP BY 1
  ) u JOIN marketplace_host h ON h.id = u.host_id
)
"""
_BY_SITE = "SELECT site_id, sum(watts)::bigint FROM short GROUP BY 1"
_NODES = """
, tree AS (
  SELECT * FROM marketplace_powernode WHERE site_id = ANY(%(sites)s)
), pending AS (
  SELECT node, sum(watts)::bigint AS watts FROM short GROUP BY 1
), awake AS (
  SELECT m.power_node_id AS node, sum(greatest(0, m.reserved_w - m.mode_watts[1]))::bigint AS watts
  FROM marketplace_miner m
  WHERE m.site_id = ANY(%(sites)s) AND m.state = 'ok' AND NOT m.manual AND (m.desired_mode > 0
    OR EXISTS (SELECT 1 FROM marketplace_shedclaim c WHERE c.miner_id = m.id AND c.state = 'commanded'))
  GROUP BY 1
)
SELECT array_agg(id), array_agg(parent), array_agg(site), array_agg(k_gpu), array_agg(k_miner), array_agg(depth),
  array_agg(free), array_agg(pending), array_agg(awake)
FROM (
  SELECT n.id, coalesce(n.parent_id, -1) AS parent, n.site_id AS site, n.overhead_gpu_permille::bigint AS k_gpu,
    n.overhead_miner_permille::bigint AS k_miner, n.depth::bigint AS depth,
    1000 * (least(n.cap_w, coalesce(n.limit_w, n.cap_w)) - n.fixed_w - n.margin_w) - n.reserved_mw AS free,
    coalesce(p.watts, 0) AS pending, coalesce(a.watts, 0) AS awake
  FROM tree n LEFT JOIN pending p ON p.node = n.id LEFT JOIN awake a ON a.node = n.id ORDER BY n.depth, n.id
) t
"""


def node_table(site_ids: Iterable[int]) -> NodeTable:
    """Every node of the sites, in one statement."""
    found = arrays.columns(_SHORT + _NODES, {"sites": sorted(set(site_ids))})
    if found[0] is None:
        none = np.zeros(0, np.int64)
        return NodeTable(none, none, none, none, none, none)
    ids, parent, site, k_gpu, k_miner, depth, free, pending, awake = found
    above = np.where(parent < 0, -1, _positions(ids, np.where(parent < 0, ids, parent)))
    for level in range(int(depth.max()), 0, -1):  # from the leaves up: each node holds the sum of what hangs below it
        at = np.flatnonzero((depth == level) & (above >= 0))
        np.add.at(pending, above[at], pending[at])
        np.add.at(awake, above[at], awake[at])
    return NodeTable(ids, above, site, k_gpu, free - pending * k_gpu, awake * k_miner)


def pending_w(site_ids: Iterable[int]) -> dict[int, int]:
    """W that each site's hosts are short of for the grants that are pending there; sites without any are left out."""
    rows = arrays.execute(_SHORT + _BY_SITE, {"sites": sorted(set(site_ids))})
    return dict(rows)


def node_budgets(site_ids: Iterable[int]) -> dict[int, NodeBudget]:
    """`node_table` by node id, parents first."""
    table = node_table(site_ids)
    rows = zip(table.ids.tolist(), table.free_mw.tolist(), table.reclaimable_mw.tolist(), strict=True)
    return {pk: NodeBudget(free, reclaimable) for pk, free, reclaimable in rows}


def _positions(ids: Ints, wanted: Ints) -> Ints:
    order = np.argsort(ids, kind="stable")
    at = np.searchsorted(ids, wanted, sorter=order)
    if len(wanted) and (not len(ids) or at.max() >= len(ids) or (ids[order[at]] != wanted).any()):
        raise ValueError("a power node is not of these sites")
    return order[at]
