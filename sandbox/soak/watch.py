"""What is looked at after each turn: the copper, the books, and what was done since the last look.

`potential` is the proof that no watt was granted that is not there: what the machines really draw at this moment and what all hosts
may draw under the limits they were promised must fit under every cap together, whatever was acknowledged, read or believed.
"""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING

import numpy as np
from django.db.models import F, Q

from benchmarks.auditor import rows
from marketplace.models import Curtailment, Host, Miner, Placement, PowerGrant, PowerNode, ShedClaim, Site
from sandbox.market.house import MOVING
from sandbox.market.states import States

if TYPE_CHECKING:
    from sandbox.soak.soak import Soak

AUDIT_EVERY = 40  # looks
LIFTED = timedelta(minutes=5)  # after its end a fault may still lift what it lifted: machines boot, and ramp
OVER_S = 60  # what a fault lifts over a cap, the site's own loop brings down within so many seconds
BLIND_S = 15  # what a meter told longer ago the site's own loop does not go by
SOFT, STALE_S = 0.95, 150  # of a cap, by a meter that spoke so many seconds ago at most
UNREAD_S = 200  # a machine unread for so long, with turns in between, stands at its nameplate


class Watch:
    def __init__(self, soak: Soak) -> None:
        self.soak, self.site = soak, soak.site
        self.counts: Counter[str] = Counter()
        self.states = States()
        self.looks = 0
        self.modes = dict(Miner.objects.filter(site=self.site.pk).values_list("name", "desired_mode"))
        self.seen: Counter[str] = Counter()
        fleet = self.site.physics.fleet
        self.was_up = ~fleet.asleep
        self.over: dict[str, tuple[float, float]] = {}  # node -> its newest time over its cap: from, to
        self.unread: set[str] = set()

    def look(self) -> list[str]:
        """What is wrong now."""
        self.looks += 1
        self.counts["turns"] += 1
        found = self._count()
        found += [f"a breaker tripped: {trip}" for trip in self.site.physics.trips]
        found += self.site.wrong
        found += self._over()
        found += self._unread()
        found += self._potential()
        found += self._books()
        if self.looks % AUDIT_EVERY == 0:
            found += self.states.look()
        return [f"{self.soak.clock.now:%d %T}: {words}" for words in found]

    def _over(self) -> list[str]:
        """Every second since the last look in which a node stood over its cap: only what a fault lifted may, and not for long."""
        now, found = self.soak.clock.now, []
        lifted: set[str] = set()
        if hasattr(self.soak, "faults"):
            lately = [f for f in self.soak.faults.over if now < f.until + LIFTED]
            lifted = {name for f in [*self.soak.faults.live, *lately] for name in f.lifts}
        physics = self.site.physics
        instants, physics.over_instants = physics.over_instants, []
        for row in instants:
            node, at = row["node"], row["at"]
            began, last = self.over.get(node, (at, at))
            blind = at - physics.meter_at[physics.node_names.index(node)] > BLIND_S  # then only its breaker can know
            self.over[node] = (began if at - last <= 2 and not blind else at, at)
            self.counts["seconds over a cap, by a fault"] += node in lifted
            if node not in lifted:
                found.append(
                    f"{node} drew {row['watts']:,} W over its cap of {row['cap_w']:,}, and no fault had lifted it"
                )
            elif at - self.over[node][0] > OVER_S:
                found.append(f"{node} stood over its cap of {row['cap_w']:,} W for more than {OVER_S} s")
        return found[:4]

    def _unread(self) -> list[str]:
        """Whose reading is old is booked at its nameplate."""
        if not self.soak.control:
            return []
        old = Q(measured_at=None) | Q(measured_at__lt=self.soak.clock.now - timedelta(seconds=UNREAD_S))
        found = Miner.objects.filter(old, site=self.site.pk).values_list("name", "reserved_w", "mode_watts")
        silent = {name for name, *_ in found}
        self.counts["machines unread, at their nameplate"] += len(silent - self.unread)
        self.unread = silent
        return [
            f"{name} is silent and booked with {w} W of {ladder[-1]}" for name, w, ladder in found if w < ladder[-1]
        ]

    def _count(self) -> list[str]:
        """What control and the site did since the last look; what of it must not be: a machine raised under a node over 95 % of its cap."""
        modes, raised = {}, []
        hot = self._hot()
        miners = Miner.objects.filter(site=self.site.pk)
        for name, mode, state, node in miners.values_list("name", "desired_mode", "state", "power_node__name"):
            # One that is not believed is woken within the watts that stand booked for it, whatever hashing pays: it is a test.
            self.counts["wakes" if state == "ok" else "tests of doubted machines"] += mode > self.modes.get(name, 0)
            self.counts["sleeps"] += mode < self.modes.get(name, 0)
            self.counts[f"sleeps under {node}"] += mode < self.modes.get(name, 0)
            if mode > self.modes.get(name, 0) and hot & {node, self.site.nodes[node].parent}:
                raised.append(f"{name} was told to hash more under a node over {SOFT:.0%} of its cap")
            modes[name] = mode
        self.modes = modes
        now: Counter[str] = Counter()
        now["grants"] = PowerGrant.objects.filter(site=self.site.pk).exclude(granted_at=None).count()
        claims = rows(
            f"SELECT state, reason, count(*) AS n FROM marketplace_shedclaim WHERE site_id = {self.site.pk}"
            " AND state <> 'commanded' GROUP BY 1, 2"
        )
        for row in claims:
            now["sleeps confirmed" if row["state"] == "confirmed" else f"sleeps not believed: {row['reason']}"] += row[
                "n"
            ]
        calls = rows(
            f"SELECT source, count(*) AS n FROM marketplace_curtailment WHERE site_id = {self.site.pk} GROUP BY 1"
        )
        for row in calls:
            now[f"grid calls: {row['source']}"] = row["n"]
        for name, n in now.items():
            self.counts[name] += max(0, n - self.seen[name])
        self.seen = now
        up = ~self.site.physics.fleet.asleep
        if not (self.soak.control and self.site.link):
            self.counts["raises at the site"] += (
                int((up & ~self.was_up & (self.site.physics.fleet.boot_left <= 0)).sum())
                - self._booted(up)
                - self.site.let_go
            )  # what control had said before, and the agent let go when it might
        self.was_up, self.site.let_go = up, 0
        return raised

    def _hot(self) -> set[str]:
        """Nodes over 95 % of their caps by what control has read of their meters."""
        fresh = self.soak.clock.now - timedelta(seconds=STALE_S)
        nodes = PowerNode.objects.filter(site=self.site.pk, measured_at__gte=fresh, measured_w__gt=SOFT * F("cap_w"))
        return set(nodes.values_list("name", flat=True))

    def _booted(self, up: np.ndarray) -> int:
        """Machines that came up by themselves, by a fault or with the power: nobody raised them."""
        fleet = self.site.physics.fleet
        came = up & ~self.was_up & (fleet.boot_left <= 0)
        return int(sum(1 for i in np.flatnonzero(came) if fleet.fault[i]))

    def _potential(self) -> list[str]:
        physics = self.site.physics
        n = len(physics.nodes)
        books = dict(Host.objects.filter(site=self.site.pk).values_list("name", "reserved_w"))
        live = physics.energised()[physics.host_node]
        hosts = np.bincount(physics.host_node, [books[name] for name in physics.hosts.names] * live, n)
        miners = np.bincount(physics.miner_node, physics.fleet.true_w, n)
        for i in range(n - 1, 0, -1):
            hosts[physics.parent[i]] += hosts[i]
            miners[physics.parent[i]] += miners[i]
        fixed = np.array([row["fixed_w"] for row in physics.nodes], float)
        total = fixed + hosts * physics.k_gpu + miners * physics.k_miner
        return [f"{physics.node_names[i]}: granted and drawn together {total[i]:,.0f} W of {physics.cap[i]:,.0f}"
                for i in np.flatnonzero(total > physics.cap)]  # fmt: skip

    def _books(self) -> list[str]:
        """The nodes' sums are those of their devices."""
        nodes = {n.pk: n for n in PowerNode.objects.filter(site=self.site.pk)}
        sums = dict.fromkeys(nodes, 0)
        for model, overhead in ((Host, "overhead_gpu_permille"), (Miner, "overhead_miner_permille")):
            for home, watts in model.objects.filter(site=self.site.pk).values_list("power_node_id", "reserved_w"):
                at: int | None = home
                while at is not None:
                    sums[at] += watts * getattr(nodes[at], overhead)
                    at = nodes[at].parent_id
        return [f"{n.name} is booked with {n.reserved_mw} mW, its devices with {sums[pk]}" for pk, n in nodes.items()
                if n.reserved_mw != sums[pk]]  # fmt: skip

    def calm(self) -> bool:
        """Nothing begins or ends at the site."""
        moving = Placement.objects.filter(site_id=self.site.pk, state__in=MOVING)
        asked = ShedClaim.objects.filter(site_id=self.site.pk, state="commanded")
        return not (moving.exists() or asked.exists() or self.site.told())

    def unsettled(self) -> list[str]:
        """What is not yet as it was before anything went wrong."""
        miners = Miner.objects.filter(site=self.site.pk)
        found = {
            "machines not believed": miners.exclude(state="ok").count(),
            "machines not told to hash": miners.filter(desired_mode=0).count(),
            "machines asleep": int(self.site.physics.fleet.asleep.sum()),
            "sleeps not settled": ShedClaim.objects.filter(site=self.site.pk, state="commanded").count(),
            "placements": Placement.objects.filter(site=self.site.pk).exclude(state__in=Placement.FINAL).count(),
            "grid calls": Curtailment.objects.filter(
                site=self.site.pk, state__in=("announced", "active", "restoring")
            ).count(),
            "hosts that do not take work": Host.objects.filter(site=self.site.pk).exclude(state="active").count(),
            "sites not on auto": Site.objects.filter(pk=self.site.pk).exclude(mode="auto").count(),
        }
        return [f"{n} {what}" for what, n in found.items() if n]

    def said(self) -> str:
        c = self.soak.counts()
        return f"{c['jobs']} jobs, {c['grants']} grants, {c['sleeps']} sleeps, {c['wakes']} wakes, {len(self.soak.faults.over)} faults over"
