"""What each power node can still give to GPU hosts: free now, pending, and what sleeping miners would give back."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from django.db.models import Exists, OuterRef, Q

from marketplace.models import Miner, PowerGrant, PowerNode, ShedClaim
from scheduler.core.power import HOST, MINER


@dataclass(frozen=True)
class NodeBudget:
    """mW: `free` less what pending grants wait for; `reclaimable` from machines that may be slept."""

    node: PowerNode
    parent_id: int | None
    free_mw: int
    reclaimable_mw: int


def node_budgets(site_ids: Iterable[int]) -> dict[int, NodeBudget]:
    """Budgets of every node of the sites, parents first. Three queries."""
    ids = list(site_ids)
    nodes = {n.pk: n for n in PowerNode.objects.filter(site_id__in=ids).order_by("depth", "pk")}
    pending = _climb(
        nodes,
        PowerGrant.objects.filter(site_id__in=ids, state=PowerGrant.State.SHEDDING).values_list(
            "host__power_node_id", "delta_w"
        ),
        HOST,
    )
    sleepable = Miner.objects.filter(site_id__in=ids, state=Miner.State.OK, manual=False).filter(
        Q(desired_mode__gt=0) | Exists(ShedClaim.objects.filter(miner=OuterRef("pk"), state="commanded"))
    )
    awake = (
        (node, max(0, w - modes[0]))
        for node, w, modes in sleepable.values_list("power_node_id", "reserved_w", "mode_watts")
    )
    reclaimable = _climb(nodes, awake, MINER)
    return {
        pk: NodeBudget(n, n.parent_id, n.allowed_mw - n.reserved_mw - pending[pk], reclaimable[pk])
        for pk, n in nodes.items()
    }


def _climb(nodes: dict[int, PowerNode], devices: Iterable[tuple[int, int]], kind: int) -> dict[int, int]:
    """Sum of watts x overhead at each node, in mW."""
    watts: dict[int, int] = defaultdict(int)
    for node_id, w in devices:
        watts[node_id] += w
    below = dict(watts)
    for pk in reversed(list(nodes)):
        parent = nodes[pk].parent_id
        if parent is not None:
            below[parent] = below.get(parent, 0) + below.get(pk, 0)
    return {
        pk: below.get(pk, 0) * (n.overhead_gpu_permille if kind == HOST else n.overhead_miner_permille)
        for pk, n in nodes.items()
    }
