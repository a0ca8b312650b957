"""A site's nodes with what is booked at each, and its devices, read and written as one."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any

import numpy as np
from django.conf import settings
from django.db import connection
from django.db.models import Exists, F, OuterRef

from marketplace.models import HeldLower, Host, Miner, PowerFreeze, PowerNode, ShedClaim, Site
from scheduler.core import power as core

FRESH_S = 150  # a full report comes each minute; two missed ones are silence
FRESH = timedelta(seconds=FRESH_S)


@dataclass
class Ledger:
    """A site's nodes with what is booked at each; changes are collected and written together.

    Its devices are read when they are first asked for, and once. Nothing of it locks a row: whoever writes a site's nodes, hosts
    and miners holds the site's lock, so under that lock the ledger is what the rows say, and without it what they said.
    """

    site_id: int
    mode: str  # of the site
    frozen: bool  # by the platform's freeze
    nodes: dict[int, PowerNode]
    tree: core.PowerTree
    free: core.Ints  # mW still admissible at each position of `tree`
    changes: dict[int, int] = field(default_factory=lambda: defaultdict(int))  # node id -> mW

    @classmethod
    def of(cls, site_id: int) -> "Ledger":
        freeze = Exists(PowerFreeze.objects.filter(ended_at=None))
        rows = PowerNode.objects.filter(site_id=site_id).annotate(site_mode=F("site__mode"), frozen=freeze)
        nodes = {n.pk: n for n in rows.order_by("depth", "pk")}
        root: Any = next(iter(nodes.values()), None)
        mode = root.site_mode if root else Site.Mode.HOLD  # without nodes there is nothing to raise
        frozen = settings.POWER_FREEZE or (root is not None and root.frozen)
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
        return cls(site_id, mode, frozen, nodes, tree, free)

    @cached_property
    def hosts(self) -> dict[int, Host]:
        """By id, in its order."""
        is_held = Exists(HeldLower.objects.filter(host=OuterRef("pk"), ends_at=None))
        return {h.pk: h for h in Host.objects.filter(site_id=self.site_id).annotate(is_held=is_held).order_by("pk")}

    @staticmethod
    def is_held(host: Any) -> bool:
        """Whether a call held the GPUs of a host of `hosts` lower, and it has not read its full limits back yet."""
        return bool(host.is_held)

    @cached_property
    def miners(self) -> dict[int, Miner]:
        """By id, in its order."""
        return {m.pk: m for m in Miner.objects.filter(site_id=self.site_id).order_by("pk")}

    @cached_property
    def claims(self) -> dict[int, ShedClaim]:
        """The lowerings that are not settled yet, by miner: a miner has one at the most."""
        open_claims = ShedClaim.objects.filter(site_id=self.site_id, state=ShedClaim.State.COMMANDED)
        return {c.miner_id: c for c in open_claims.order_by("pk")}

    def waits_for(self, miner: Miner) -> bool:
        """Whether it was asked for watts that readings have not proved yet."""
        claim = self.claims.get(miner.pk)
        return claim is not None and claim.state == ShedClaim.State.COMMANDED

    def forget_hosts(self) -> None:
        """Others have written them: they are read anew when they are asked for again."""
        self.__dict__.pop("hosts", None)

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
        for mw, pk in rows:
            self.nodes[pk].reserved_mw += mw
        if rows:
            with connection.cursor() as cursor:
                cursor.executemany(
                    "UPDATE marketplace_powernode SET reserved_mw = reserved_mw + %s WHERE id = %s", rows
                )
        self.changes.clear()

    def set_margins(self, margins: Mapping[int, int]) -> None:
        """Keep other margins (node id -> W): in the rows, and of what is free."""
        if not margins:
            return
        for pk, watts in margins.items():
            self.free[self.tree.index[pk]] -= 1000 * (watts - self.nodes[pk].margin_w)
            self.nodes[pk].margin_w = watts
        with connection.cursor() as cursor:
            cursor.executemany(
                "UPDATE marketplace_powernode SET margin_w = %s WHERE id = %s", [(w, pk) for pk, w in margins.items()]
            )


def may_grant(ledger: Ledger, *, now: datetime) -> bool:
    """Whether watts may be granted: by the site's mode, the platform's freeze, and no meter fallen silent. True only under
    the site's lock. Where a meter has never reported, every sleep still counts in full: what fits, fits.
    """
    return ledger.mode == Site.Mode.AUTO and not ledger.frozen and not ledger.stale(now, unread=False)


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
