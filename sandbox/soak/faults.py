"""The rows of the failure table (docs/power.md), as things that happen to a site for a while, and what must not happen meanwhile."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np

from sandbox.soak.grounds import OWN

if TYPE_CHECKING:
    from benchmarks.fault_site import Asic
    from sandbox.soak.soak import Soak

MINUTE = timedelta(minutes=1)
STALE_S = 150.0  # a meter silent for longer is stale
OVER = 1.06  # of its cap
LIE_W = 500.0  # no machine that sleeps draws so much
UNBELIEVED = ("sleeps not believed: acknowledged_no_drop", "sleeps not believed: phantom_load")
UNREAD = ("machines unread, at their nameplate",)
ASLEEP_LEAVES = 0.85  # of a PDU's cap, when its machines sleep and its hosts are parked
LONGER = 15 * MINUTE  # a fault that nothing has answered goes on for so long, for the occasion to come
OCCASION = 2 * MINUTE  # that it waits for one, before somebody brings it about
FEW = 3  # machines asked together: the lie of one is more than 20 % of them, and not within the meters' error (ADR 11)


@dataclass
class Fault:
    """`row`: of the failure table. `never`: counters that must not rise from `settled` after it began until it ends. `shows`: whether it
    is to be seen at the site now; `answers`: counters of which one rises when something is done about it. `lifts`: nodes that it puts
    over their caps by itself, until the site's own loop has brought them down. `goes_on`: what it does each turn until it is answered;
    one that is not goes on beyond `until`, for LONGER at most.
    """

    row: str
    what: str
    until: datetime
    undo: Callable[[], None]
    began: datetime
    before: Counter[str]
    never: Sequence[str] = ()
    settled: timedelta = timedelta()
    shows: Callable[[], bool] = lambda: True
    answers: Sequence[str] = ()
    lifts: frozenset[str] = frozenset()
    goes_on: Callable[[], None] = lambda: None
    struck: bool = False
    held: Counter[str] | None = None  # the counters at `settled`
    name: str = ""  # of ROWS
    done: dict[str, int] = field(default_factory=dict)  # what was done while it lasted, so far

    def watch(self, now: datetime, counts: Counter[str]) -> list[str]:
        """What has happened that must not."""
        self.struck = self.struck or self.shows()
        self.done = {name: n - self.before[name] for name, n in counts.items() if n > self.before[name]}
        if self.held is None:
            if now >= self.began + self.settled:
                self.held = counts.copy()
            return []
        return [f"{self.row} ({self.what}): {counts[n] - self.held[n]} {n} meanwhile"
                for n in self.never if counts[n] > self.held[n]]  # fmt: skip

    @property
    def answered(self) -> bool:
        """It was seen, and what the table says was done: something rose, or what must not rise was watched."""
        done = any(self.done.get(name) for name in self.answers) if self.answers else True
        return self.struck and done and not (self.never and self.held is None)

    def over(self, now: datetime) -> bool:
        """Its time is up; and where it is one that is to be answered, it was, or never will be."""
        return now >= self.until and (self.answered or not self.answers or now >= self.until + LONGER)


def missing(over: Sequence[Fault]) -> list[str]:
    """The rows of which this run proves nothing: that never struck, were never seen at the site, or that nothing answered."""
    found = []
    for name in ROWS:
        mine = [fault for fault in over if fault.name == name]
        said = name.replace("_", " ")
        if not mine:
            found.append(f"{said}: it never struck")
        elif not any(fault.struck for fault in mine):
            found.append(f"{said}: it struck {len(mine)} times, and was never to be seen at the site")
        elif not any(fault.answered for fault in mine):
            wanted = ", ".join(mine[0].answers) or f"no {' nor '.join(mine[0].never)}"
            found.append(f"{said}: it struck {len(mine)} times, and nothing was done about it ({wanted})")
    return found


class Faults:
    """What goes wrong when: every row in turn, shuffled anew each round, so that none is left out and any two may meet. The longest
    comes first, and again only when all have proved themselves: while prices are stale nothing wakes, and who waits for a machine to be
    put to sleep waits in vain. Who has proved nothing strikes again before those that have.
    """

    def __init__(self, soak: Soak, dice: Random) -> None:
        self.soak, self.dice = soak, dice
        self.live: list[Fault] = []
        self.over: list[Fault] = []
        self.waiting: list[str] = []
        self.plugged: dict[int, float] = defaultdict(float)  # node -> W that nobody knows of
        self.next_at = soak.clock.now + 5 * MINUTE

    def turn(self) -> None:
        now = self.soak.clock.now
        for fault in [f for f in self.live if f.over(now)]:
            self.end(fault)
        for fault in self.live:
            if not fault.answered:
                fault.goes_on()
        if now >= self.next_at:
            self.strike()
            self.next_at = now + MINUTE * self.dice.uniform(2, 9)

    def end(self, fault: Fault) -> None:
        fault.undo()
        fault.until = self.soak.clock.now
        self.live.remove(fault)
        self.over.append(fault)

    def strike(self) -> None:
        proved = {fault.name for fault in self.over if fault.answered}
        if not self.waiting:
            self.waiting = list(ROWS)
            self.dice.shuffle(self.waiting)
        again = [fault.name for fault in self.over if fault.name not in {*proved, *self.waiting}]
        first = ["prices_stale"] if not self.over else [name for name in self.waiting if name not in proved]
        busy = {fault.name for fault in self.live}  # two of one kind would end each other
        if len(proved) < len(ROWS):
            busy |= proved & {"prices_stale"}
        for name in dict.fromkeys([*first, *again, *self.waiting]):
            made: Fault | None = None if name in busy else getattr(self, name)()
            if made is not None:
                self.waiting = [other for other in self.waiting if other != name]
                made.name, made.struck = name, made.shows()
                self.live.append(made)
                return
        self.waiting = []  # none of them can strike now, such as a machine's lie while all sleep: the next round begins

    def _fault(self, row: str, what: str, minutes: tuple[float, float], undo: Callable[[], Any], **more: Any) -> Fault:
        now = self.soak.clock.now
        return Fault(row, what, now + MINUTE * self.dice.uniform(*minutes), undo, now, self.soak.counts(), **more)

    # --- machines
    def _machines(self, count: int, *, awake: bool | None = None) -> list[str]:
        fleet = self.soak.site.physics.fleet
        free = [n for i, n in enumerate(fleet.names) if not fleet.fault[i] and awake in (None, not fleet.asleep[i])]
        return self.dice.sample(free, min(count, len(free)))

    def _on(
        self, row: str, fault: str, names: list[str], minutes: tuple[float, float] = (5, 14), **more: Any
    ) -> Fault | None:
        fleet = self.soak.site.physics.fleet
        for name in names:
            fleet.set_fault(name, fault, factor=1.2)

        def undo() -> None:
            for name in names:
                fleet.set_fault(name, "")

        return self._fault(row, f"{fault} of {', '.join(names)}", minutes, undo, **more) if names else None

    def acknowledges_and_ignores(self) -> Fault | None:
        site, count = self.soak.site, self.dice.randrange(1, 4)
        fleet = site.physics.fleet
        return self._when_asked("ack_ignore", lambda made, _batch: made < count,
                                lambda n: site.asics[n].mode == 0 and not fleet.asleep[fleet.index[n]])  # fmt: skip

    def lies(self) -> Fault | None:
        """It obeys, reads as asleep, and draws on. Of many that lie down together the lie of one is within the meters' error and stays
        in the margin (ADR 11): it is one of few.
        """
        fleet = self.soak.site.physics.fleet
        return self._when_asked("phantom", lambda made, batch: not made and batch <= FEW,
                                lambda n: fleet.asleep[fleet.index[n]] and fleet.true_w[fleet.index[n]] > LIE_W)  # fmt: skip

    def _when_asked(self, fault: str, takes: Callable[[int, int], bool], shows: Callable[[str], bool]) -> Fault | None:
        """Of machines that nobody has told anything yet: those that control tells to sleep next turn out to be bad, as far as it `takes`
        them (how many there are already; how many are told together). Where nobody is told for a while, the operator calls.
        """
        site, names = self.soak.site, list[str]()
        fleet = site.physics.fleet
        if not self._machines(1, awake=True):
            return None

        def turns_bad(asic: Asic, batch: int) -> None:
            if not fleet.fault[fleet.index[asic.name]] and takes(len(names), batch):
                fleet.set_fault(asic.name, fault)
                names.append(asic.name)
                made.what = f"{fault} of {', '.join(names)}"

        def undo() -> None:
            site.asked.remove(turns_bad)
            for name in names:
                fleet.set_fault(name, "")

        def occasion() -> None:
            if not names and self.soak.clock.now >= made.began + OCCASION:
                self.soak.calls.squeeze()

        site.asked.append(turns_bad)
        made = self._fault("acks, no drop", f"{fault} of whoever is asked", (5, 14), undo, answers=UNBELIEVED, goes_on=occasion,
                           shows=lambda: any(shows(n) for n in names))  # fmt: skip
        return made

    def does_not_answer(self) -> Fault | None:
        kind = self.dice.choice(("hang", "refuse", "error_status"))
        names, site = self._machines(self.dice.randrange(1, 4)), self.soak.site
        return self._on("no answer / stale", kind, names, answers=UNREAD,
                        shows=lambda: any(not site._answers(n) for n in names))  # fmt: skip

    def odd_readings(self) -> Fault | None:
        kind = self.dice.choice(("wattage_off", "frozen_reading", "slow_ramp"))
        return self._on("no answer / stale", kind, self._machines(1))

    def reboots(self) -> Fault | None:
        kind = self.dice.choice(("reboot_running", "asleep_after_reboot"))
        names, fleet = self._machines(2), self.soak.site.physics.fleet
        return self._on("power returns after an outage", kind, names, lifts=self._all(),
                        shows=lambda: any(fleet.boot_left[fleet.index[n]] > 0 for n in names))  # fmt: skip

    def _all(self) -> frozenset[str]:
        """What boots hashing draws at once, before anybody has slept it: any node may be over its cap until then."""
        return frozenset(self.soak.site.physics.node_names)

    def network_of_a_pdu(self) -> Fault:
        site = self.soak.site
        pdu = self.dice.choice([n for n in site.nodes if n.startswith("pdu")])
        site.deaf_pdus.add(pdu)
        return self._fault("no answer / stale", f"the network of {pdu}", (4, 8), lambda: site.deaf_pdus.discard(pdu),
                           answers=UNREAD, shows=lambda: pdu in site.deaf_pdus)  # fmt: skip

    # --- meters and copper
    def meter_stale(self) -> Fault | None:
        """Not of a node that somebody loads beyond what the books know: no one could see it there, and its breaker trips rightly."""
        physics = self.soak.site.physics
        able = [i for i in range(len(physics.nodes)) if self.plugged[i] < 1]
        if not able:
            return None
        i = self.dice.choice(able)
        physics.meter_stale[i] = True

        def undo() -> None:
            physics.meter_stale[i] = False

        # 150 s of silence is stale; what was commanded in the second before is still counted a turn later.
        return self._fault("meter stale", f"the meter of {physics.node_names[i]}", (5, 12), undo,
                           never=("grants", "wakes"), settled=timedelta(seconds=165),
                           shows=lambda: self.soak.clock.now.timestamp() - physics.meter_at[i] > STALE_S)  # fmt: skip

    def over_95_percent(self) -> Fault | None:
        fleet, found = self.soak.site.physics.fleet, self._pdus()
        able = [i for i in found if (~fleet.asleep & (self.soak.site.physics.miner_node == i)).any()]
        return self._intruder("meter > 95 % of cap", able, 0.965, ("sleeps under",))

    def over_the_cap(self) -> Fault | None:
        physics = self.soak.site.physics
        able = [i for i in self._pdus() if physics.true_w[i] + self._spare(i) > OVER * physics.cap[i]]
        return self._intruder("meter > cap", able, OVER, [f"{rung} for" for rung in OWN])

    def _pdus(self) -> list[int]:
        """Positions of PDUs with power and a meter that speaks."""
        physics = self.soak.site.physics
        names, live = physics.node_names, physics.energised() & ~physics.meter_stale
        return [i for i in np.flatnonzero(live).tolist() if names[i].startswith("pdu")]

    def _spare(self, i: int) -> float:
        """W that may still be plugged in at a PDU: with all else asleep it carries them."""
        return float(self.soak.site.physics.cap[i]) * ASLEEP_LEAVES - self.plugged[i]

    def _intruder(self, row: str, able: list[int], share: float, answers: Sequence[str]) -> Fault | None:
        """Somebody plugs in what no book knows of, until a PDU draws this share of its cap, and more when others leave."""
        physics = self.soak.site.physics
        if not able:
            return None
        i = self.dice.choice(able)
        up = [i]
        while physics.parent[up[-1]] >= 0:
            up.append(int(physics.parent[up[-1]]))
        mine = 0.0

        def plug(watts: float) -> None:
            nonlocal mine
            mine += watts
            for n in up:
                physics.fixed[n] += watts
                self.plugged[n] += watts

        def more() -> None:
            if physics.energised()[i] and not physics.meter_stale[i]:
                plug(min(max(0.0, self._spare(i)), max(0.0, share * float(physics.cap[i]) - float(physics.true_w[i]))))
                made.what = f"{mine / 1000:.1f} kW nobody knows of at {physics.node_names[i]}"

        made = self._fault(row, "", (3, 8), lambda: plug(-mine), answers=[f"{what} {physics.node_names[i]}" for what in answers],
                           lifts=frozenset(physics.node_names[n] for n in up), goes_on=more,
                           shows=lambda: physics.meter_w[i] > (0.95 if share < 1 else 1) * physics.cap[i])  # fmt: skip
        more()
        return made

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

        return self._fault("power returns after an outage", f"an outage of {physics.node_names[i]}", (1, 6), undo,
                           lifts=self._all(), shows=lambda: not physics.energised()[i])  # fmt: skip

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

        return self._fault("price or hashprice stale", "no feed answers", (75, 110), undo, never=("wakes",),
                           settled=timedelta(minutes=61))  # fmt: skip

    def doubled_beats(self) -> Fault:
        """Reports are told twice and out of order, and two loops of the site run at once."""
        self.soak.doubled = True

        def undo() -> None:
            self.soak.doubled = False

        return self._fault("duplicate beat, two schedulers", "reports doubled, two loops", (3, 10), undo,
                           answers=("loops beside each other",))  # fmt: skip

    def workers_die(self) -> Fault:
        self.soak.kills = 400

        def undo() -> None:
            self.soak.kills = 0

        return self._fault("restart mid-event", "workers killed at some statement", (3, 10), undo,
                           answers=("workers killed",))  # fmt: skip


ROWS = (
    "acknowledges_and_ignores", "lies", "does_not_answer", "odd_readings", "reboots", "network_of_a_pdu", "meter_stale",
    "over_95_percent", "over_the_cap", "outage", "control_away", "link_cut", "prices_stale", "doubled_beats", "workers_die",
)  # fmt: skip
