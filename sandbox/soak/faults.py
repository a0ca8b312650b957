"""The rows of the failure table (docs/power.md), as things that happen to a site for a while, and what must not happen meanwhile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from random import Random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sandbox.soak.soak import Soak

MINUTE = timedelta(minutes=1)
ASLEEP_LEAVES = 0.85  # of a PDU's cap, when its machines sleep and its hosts are parked


@dataclass
class Fault:
    """`row`: of the failure table. `never`: counters that must not rise from `settled` after it began until it ends."""

    row: str
    what: str
    until: datetime
    undo: Callable[[], None]
    began: datetime
    before: Counter[str]
    never: Sequence[str] = ()
    settled: timedelta = timedelta()
    held: Counter[str] | None = None  # the counters at `settled`
    name: str = ""  # of ROWS
    done: dict[str, int] = field(default_factory=dict)  # what was done about it, when it is over

    def watch(self, now: datetime, counts: Counter[str]) -> list[str]:
        """What has happened that must not."""
        if self.held is None:
            if now >= self.began + self.settled:
                self.held = counts.copy()
            return []
        return [f"{self.row} ({self.what}): {counts[n] - self.held[n]} {n} meanwhile"
                for n in self.never if counts[n] > self.held[n]]  # fmt: skip


class Faults:
    """What goes wrong when: every row in turn, shuffled anew each round, so that none is left out and any two may meet."""

    def __init__(self, soak: Soak, dice: Random) -> None:
        self.soak, self.dice = soak, dice
        self.live: list[Fault] = []
        self.over: list[Fault] = []
        self.waiting: list[str] = []
        self.next_at = soak.clock.now + 5 * MINUTE

    def turn(self, counts: Counter[str]) -> None:
        now = self.soak.clock.now
        for fault in [f for f in self.live if now >= f.until]:
            self.end(fault, counts)
        if now >= self.next_at:
            self.strike()
            self.next_at = now + MINUTE * self.dice.uniform(4, 16)

    def end(self, fault: Fault, counts: Counter[str]) -> None:
        fault.undo()
        self.live.remove(fault)
        fault.done = {name: n - fault.before[name] for name, n in counts.items() if n > fault.before[name]}
        self.over.append(fault)

    def strike(self) -> None:
        if not self.waiting:
            self.waiting = list(ROWS)
            self.dice.shuffle(self.waiting)
        busy = {fault.name for fault in self.live}  # two of one kind would end each other
        name = next((name for name in self.waiting if name not in busy), None)
        if name is None:
            return
        self.waiting.remove(name)
        made: Fault | None = getattr(self, name)()
        if made is not None:
            made.name = name
            self.live.append(made)

    def _fault(self, row: str, what: str, minutes: tuple[float, float], undo: Callable[[], Any], **more: Any) -> Fault:
        now = self.soak.clock.now
        until = now + MINUTE * self.dice.uniform(*minutes)
        return Fault(row, what, until, undo, now, self.soak.counts().copy(), **more)

    # --- machines
    def _machines(self, count: int, *, awake: bool | None = None) -> list[str]:
        fleet = self.soak.site.physics.fleet
        free = [n for i, n in enumerate(fleet.names) if not fleet.fault[i] and awake in (None, not fleet.asleep[i])]
        return self.dice.sample(free, min(count, len(free)))

    def _on(self, row: str, fault: str, names: list[str], minutes: tuple[float, float] = (3, 12)) -> Fault | None:
        fleet = self.soak.site.physics.fleet
        for name in names:
            fleet.set_fault(name, fault, factor=1.2)

        def undo() -> None:
            for name in names:
                fleet.set_fault(name, "")

        return self._fault(row, f"{fault} of {', '.join(names)}", minutes, undo) if names else None

    def acknowledges_and_ignores(self) -> Fault | None:
        return self._on("acks, no drop", "ack_ignore", self._machines(self.dice.randrange(1, 4), awake=True))

    def lies(self) -> Fault | None:
        return self._on("acks, no drop", "phantom", self._machines(1, awake=True))

    def does_not_answer(self) -> Fault | None:
        kind = self.dice.choice(("hang", "refuse", "error_status"))
        return self._on("no answer / stale", kind, self._machines(self.dice.randrange(1, 4)))

    def odd_readings(self) -> Fault | None:
        kind = self.dice.choice(("wattage_off", "frozen_reading", "slow_ramp"))
        return self._on("no answer / stale", kind, self._machines(1))

    def reboots(self) -> Fault | None:
        kind = self.dice.choice(("reboot_running", "asleep_after_reboot"))
        return self._on("power returns after an outage", kind, self._machines(2))

    def network_of_a_pdu(self) -> Fault:
        site = self.soak.site
        pdu = self.dice.choice([n for n in site.nodes if n.startswith("pdu")])
        site.deaf_pdus.add(pdu)
        return self._fault("no answer / stale", f"the network of {pdu}", (3, 8), lambda: site.deaf_pdus.discard(pdu))

    # --- meters and copper
    def meter_stale(self) -> Fault:
        physics = self.soak.site.physics
        i = self.dice.randrange(len(physics.nodes))
        physics.meter_stale[i] = True

        def undo() -> None:
            physics.meter_stale[i] = False

        # 150 s of silence is stale; what was commanded in the second before is still counted a turn later.
        return self._fault("meter stale", f"the meter of {physics.node_names[i]}", (5, 12), undo,
                           never=("grants", "wakes"), settled=timedelta(seconds=165))  # fmt: skip

    def over_95_percent(self) -> Fault:
        return self._intruder("meter > 95 % of cap", 0.965)

    def over_the_cap(self) -> Fault:
        return self._intruder("meter > cap", 1.06)

    def _intruder(self, row: str, share: float) -> Fault:
        """Somebody plugs in what no book knows of, until a PDU draws this share of its cap; but what carries it with all else asleep."""
        physics = self.soak.site.physics
        i = self.dice.choice([i for i, name in enumerate(physics.node_names) if name.startswith("pdu")])
        spare = float(physics.cap[i]) * ASLEEP_LEAVES
        watts = min(spare, max(0.0, share * float(physics.cap[i]) - float(physics.true_w[i])))
        up = [i]
        while physics.parent[up[-1]] >= 0:
            up.append(int(physics.parent[up[-1]]))
        for n in up:
            physics.fixed[n] += watts

        def undo() -> None:
            for n in up:
                physics.fixed[n] -= watts

        return self._fault(row, f"{watts / 1000:.1f} kW nobody knows of at {physics.node_names[i]}", (3, 8), undo)

    def outage(self) -> Fault:
        """A breaker is opened by hand, and closed again: machines boot hashing, hosts boot, work is gone."""
        site = self.soak.site
        i = self.dice.choice([i for i, name in enumerate(site.physics.node_names) if name.startswith("pdu")])
        physics = site.physics
        before = physics.energised()
        physics.closed[i] = False
        gone = before & ~physics.energised()
        physics.fleet.power_cut(gone[physics.miner_node])
        dark = gone[physics.host_node]
        physics.hosts.boot_left[dark] = 60.0
        for key in physics.hosts.dark(dark):
            site.work[int(key)].code = None
            site._end(site.work[int(key)], "failed", None, "host_lost", self.soak.clock.now)

        def undo() -> None:
            physics.reset_breaker(physics.node_names[i])

        return self._fault("power returns after an outage", f"an outage of {physics.node_names[i]}", (1, 6), undo)

    # --- us
    def control_away(self) -> Fault:
        self.soak.control = False

        def undo() -> None:
            self.soak.control = True

        return self._fault("control plane away", "control is down", (2, 10), undo, never=("raises at the site",))

    def link_cut(self) -> Fault:
        site = self.soak.site
        site.link = False

        def undo() -> None:
            site.link = True

        return self._fault("control plane away", "the site's link is cut", (2, 25), undo, never=("raises at the site",))

    def prices_stale(self) -> Fault:
        self.soak.priced = False

        def undo() -> None:
            self.soak.priced = True

        return self._fault("price or hashprice stale", "no feed answers", (100, 200), undo, never=("wakes",),
                           settled=timedelta(minutes=61))  # fmt: skip

    def doubled_beats(self) -> Fault:
        """Reports are told twice and out of order, and two loops of the site run at once."""
        self.soak.doubled = True

        def undo() -> None:
            self.soak.doubled = False

        return self._fault("duplicate beat, two schedulers", "reports doubled, two loops", (3, 10), undo)

    def workers_die(self) -> Fault:
        self.soak.kills = 400

        def undo() -> None:
            self.soak.kills = 0

        return self._fault("restart mid-event", "workers killed at some statement", (3, 10), undo)


ROWS = (
    "acknowledges_and_ignores", "lies", "does_not_answer", "odd_readings", "reboots", "network_of_a_pdu", "meter_stale",
    "over_95_percent", "over_the_cap", "outage", "control_away", "link_cut", "prices_stale", "doubled_beats", "workers_die",
)  # fmt: skip
