"""A site's nodes with what is booked at each, read and written as one."""

from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import numpy as np
from django.conf import settings
from django.db import connection

from marketplace.models import Host, PowerNode, Site
from scheduler.core import power as core

FRESH_S = 150  # a full report comes each minute; two missed ones are silence


@dataclass
class Ledger:
    """A site's nodes with what is booked at each; changes are collected and written together."""

    site_id: int
    nodes: dict[int, PowerNode]
    tree: core.PowerTree
    free: core.Ints  # mW still admissible at each position of `tree`
    changes: dict[int, int] = field(default_factory=lambda: defaultdict(int))  # node id -> mW

    @classmethod
    def of(cls, site_id: int) -> "Ledger":
        nodes = {n.pk: n for n in PowerNode.objects.filter(site_id=site_id).order_by("depth", "pk")}
        tree = core.PowerTree.of(
            core.NodeSpec(
                key=n.pk,
                parent=n.parent_id,
                cap_w=n.cap_w,
                limit_w=n.limit_w,
                fixed_w=n.fixed_w,
                overhead_gpu_permille=n.overhead_gpu_permille,
                overhead_miner_permille=n.overhead_miner_permille,
                metering=n.metering,
            )
            for n in nodes.values()
        )
        free = np.array([nodes[k].allowed_mw - nodes[k].reserved_mw for k in tree.keys], np.int64)
        return cls(site_id, nodes, tree, free)

    def refuses(self, node_id: int, delta_w: int, kind: int = core.HOST) -> core.Refusal | None:
        return core.admissible(self.tree, self.free, self.tree.index[node_id], delta_w, kind)

    def book(self, node_id: int, delta_w: int, kind: int) -> None:
        """Add `delta_w` (negative to give back) at the node and all above it."""
        for n in self.tree.paths[self.tree.index[node_id]]:
            mw = delta_w * int(self.tree.k[n, kind])
            self.free[n] -= mw
            self.changes[self.tree.keys[n]] += mw  # type: ignore[index]

    def keep(self, node_id: int, watts: int) -> None:
        """Leave `watts` (negative: no longer) of a host's at the node and all above it to who waits for them; nothing is booked."""
        for n in self.tree.paths[self.tree.index[node_id]]:
            self.free[n] -= watts * int(self.tree.k[n, core.HOST])

    def stale(self, now: datetime, *, unread: bool) -> bool:
        """Whether a metered node's meter is silent. `unread`: one that has never reported counts, too."""
        fresh = timedelta(seconds=FRESH_S)
        read = [n.measured_at for n in self.nodes.values() if n.metering == PowerNode.Metering.METER]
        return any(unread if at is None else now - at > fresh for at in read)

    def reactions(self, now: datetime) -> tuple[core.Reaction, ...]:
        meters: dict[Hashable, tuple[int, int]] = {
            pk: (n.measured_w, int((now - n.measured_at).total_seconds()))
            for pk, n in self.nodes.items()
            if n.metering == PowerNode.Metering.METER and n.measured_w is not None and n.measured_at is not None
        }
        return core.over_cap(self.tree, meters, fresh_s=FRESH_S)

    def hot(self, now: datetime) -> frozenset[int]:
        """Positions of the nodes whose meter stands over 95 % of the cap: nothing is woken under them."""
        return frozenset(self.tree.index[r.node] for r in self.reactions(now) if r.action != "freeze")

    def save(self) -> None:
        rows = [(mw, pk) for pk, mw in sorted(self.changes.items()) if mw]
        if rows:
            with connection.cursor() as cursor:
                cursor.executemany(
                    "UPDATE marketplace_powernode SET reserved_mw = reserved_mw + %s WHERE id = %s", rows
                )
        self.changes.clear()


def may_grant(ledger: Ledger, *, now: datetime) -> bool:
    """Whether watts may be granted: by the site's mode, the platform's freeze, and no meter fallen silent. True only under
    the site's lock. Where a meter has never reported, every sleep still counts in full: what fits, fits.
    """
    mode = Site.objects.values_list("mode", flat=True).get(pk=ledger.site_id)
    return mode == Site.Mode.AUTO and not settings.POWER_FREEZE and not ledger.stale(now, unread=False)


def may_wake(ledger: Ledger, *, now: datetime) -> bool:
    """As `may_grant`, and every meter has reported: nothing is woken until it is metered."""
    return may_grant(ledger, now=now) and not ledger.stale(now, unread=True)


def active_watts(host: Host, gpu_indices: Iterable[int], cpu_only: bool) -> int:
    """W to book for a host on which these GPUs are active."""
    return core.host_reserved_w(
        gpus=host.gpu_count,
        active_gpus=len(set(gpu_indices)),
        standby_w=host.standby_w,
        parked_w=host.parked_w,
        base_w=host.base_w,
        gpu_min_w=host.gpu_min_w,
        gpu_max_w=host.gpu_most_w,
        cap_control=host.cap_control,
        powered=host.power_state != Host.PowerState.OFF,
        cpu_only=cpu_only,
    )
