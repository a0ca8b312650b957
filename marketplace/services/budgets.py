"""What each power node can still give to GPU hosts: free now, pending, and what sleeping miners would give back."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from marketplace import arrays
from marketplace.arrays import Ints


@dataclass(frozen=True)
class NodeTable:
    """Power nodes as columns [N], parents first. Watts in mW: `free` less what pending grants wait for; `reclaimable` from
    machines that may be slept.
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


_NODES = """
WITH tree AS (
  SELECT * FROM marketplace_powernode WHERE site_id = ANY(%(sites)s)
), pending AS (
  SELECT h.power_node_id AS node, sum(g.delta_w)::bigint AS watts FROM marketplace_powergrant g
  JOIN marketplace_host h ON h.id = g.host_id
  WHERE g.site_id = ANY(%(sites)s) AND g.state = 'shedding' GROUP BY 1
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
    found = arrays.columns(_NODES, {"sites": sorted(set(site_ids))})
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
