"""The site of a soak: what its devices draw says `sandbox.site.physics`; what its agent does follows docs/agent-protocol.md.

The jobs' half of the agent is the market simulation's; the agent's own safety loop is `agent.safety.decide`, each second, with what
control handed down last, and what it decides says also what may be raised or started (`Decision.blocks`): what may not waits, as at the
agent, until it may or something newer is said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from agent.safety import Decision, HostFacts, Memory, MinerFacts, Tree, decide
from benchmarks.fault_site import Asic, Work
from marketplace import ids
from marketplace.models import Agent
from marketplace.services import agents
from sandbox.market.site import Facility
from sandbox.site.physics import Physics

STALE_S, SETTLE_S = 15.0, 8.0  # as the agent's own settings
OWN = ("machines put to sleep", "hosts lowered to their floor", "jobs ended for the copper")  # by the site's own loop
HELD = "raises that the agent held back"


@dataclass
class Grounds(Facility):
    physics: Physics = None  # type: ignore[assignment]  # given always; the base's fields have defaults
    link: bool = True
    deaf_pdus: set[str] = field(default_factory=set)  # whose network is dead
    own: Counter[str] = field(default_factory=Counter)  # what the site's own loop did
    tree: Tree = field(default_factory=lambda: Tree([]))
    order: list[str] = field(default_factory=list)
    known_safety: int = -1
    memory: Memory = field(default_factory=Memory)
    read: dict[str, tuple[int, float]] = field(default_factory=dict)  # the agent's view of the meters
    decision: Decision = field(default_factory=Decision)
    mode: str = "hold"  # until control has said another, as at the agent
    latched: dict[str, int] = field(
        default_factory=dict
    )  # machine or host -> generation at which the own loop lowered it
    wakes: dict[str, tuple[str, int]] = field(
        default_factory=dict
    )  # machine -> (mode, generation) that waits until it may
    raises: dict[str, dict[str, Any]] = field(default_factory=dict)  # host -> row of an answer, its raising part waits
    let_go: int = 0  # machines woken since the last look by a command that had waited
    places: dict[str, tuple[int, ...]] = field(default_factory=dict)  # placement -> its place in control's order
    asked: list[Callable[[Asic, int], None]] = field(default_factory=list)  # wait for machines told to sleep
    at: float = 0.0  # of the last second, epoch seconds
    batch: int = 0  # machines that the answer in hand tells to sleep

    # --- time
    def second(self, now: datetime) -> None:
        """One second of the site, and of the agent's own loop."""
        self.at = now.timestamp()
        lost = self.physics.step(1.0, self.at)
        for pk in map(int, lost):
            if pk in self.work and not self.work[pk].ended:
                self._end(self.work[pk], "failed", None, "host_lost", now)
        self.pass_time(now)
        self.read = {name: (watts, at) for name, watts, at in self.physics.meters() if at}
        self._guard(now)
        self._let_go(now)

    def pass_time(self, now: datetime) -> None:
        super().pass_time(now)
        self._hang()

    def _hang(self) -> None:
        """The physics carries the work that runs."""
        hosts = self.physics.hosts
        wanted = {str(pk) for pk, w in self.work.items() if w.state in {"running", "draining"} and not w.ended}
        for key in set(hosts.workloads) - wanted:
            hosts.detach(key)
        for key in sorted(wanted - set(hosts.workloads), key=int):
            w = self.work[int(key)]
            if hosts.up(self.physics.energised()[self.physics.host_node])[hosts.index[w.host]]:
                hosts.attach(key, hosts.index[w.host], list(w.gpus), 1.0)

    def dark(self, host: str) -> bool:
        hosts = self.physics.hosts
        return not hosts.up(self.physics.energised()[self.physics.host_node])[hosts.index[host]]

    # --- the agent's own loop
    def _guard(self, now: datetime) -> None:
        over = any(
            w > self.tree.nodes[n].bound_w(now.timestamp()) for n, (w, _) in self.read.items() if n in self.tree.nodes
        )
        made = self.decision = decide(
            self.tree, self.order, self.read, self._facts() if over else {}, self._host_facts() if over else {}, self.memory,
            now.timestamp(), stale_s=STALE_S, settle_s=SETTLE_S, gives_way=self._gives_way() if over else {},
        )  # fmt: skip
        for rung, found in zip(OWN, (made.shed, made.cap_hosts, made.evict), strict=True):
            for _, node in found:
                self.own[rung] += 1
                self.own[f"{rung} for {node}"] += 1
        for name, _ in made.shed:
            self.latched[name] = self._told(name)
            self._sleep(self.asics[name])
        for name, _ in made.cap_hosts:
            self._floor(name)
        for key, _ in made.evict:
            self._end(self.work[int(key)], "failed", 143, "over_cap", now)
        for a in self.asics.values():  # found hashing although it was sent to sleep: down again
            if self._obeys(a.name) and self._is_to_sleep(a):
                self._sleep(a)

    def _told(self, name: str) -> int:
        """The newest generation that a machine or a host was told, also where it still waits."""
        if name in self.asics:
            return self.wakes[name][1] if name in self.wakes else self.asics[name].generation
        return int(self.raises[name]["generation"]) if name in self.raises else self.machines[name].generation

    def _is_latched(self, name: str) -> bool:
        return self.latched.get(name, -1) >= self._told(name)

    def _is_to_sleep(self, a: Asic) -> bool:
        return self._is_latched(a.name) or (a.mode == 0 and a.name not in self.wakes)

    # --- what is raised, and when
    def _blocked(self, node: str) -> str:
        """Why the agent raises and starts nothing there now, by its own judgement."""
        at = self.lease_until.timestamp()
        return self.decision.blocks(self.tree.above(node), self.at, mode=self.mode, lease_until=at)

    def _may_wake(self, node: str) -> bool:
        return not self._blocked(node) and not self.decision.stops_wakes(self.tree.above(node))

    def _may_start(self, w: Work) -> bool:
        return super()._may_start(w) and not self._blocked(self.machines[w.host].node)

    def _let_go(self, now: datetime) -> None:
        """What waited and may now."""
        for name, (mode, generation) in [*self.wakes.items()]:
            a = self.asics[name]
            if self._answers(name) and not self._is_latched(name) and self._may_wake(a.node):
                del self.wakes[name]
                self._mode(a, mode, generation, now)
                self.let_go += 1
        for name, row in [*self.raises.items()]:
            if not self._is_latched(name) and not self._blocked(self.machines[name].node):
                self._limits(row)

    def _facts(self) -> dict[str, MinerFacts]:
        fleet, found = self.physics.fleet, {}
        for name, a in self.asics.items():
            i = fleet.index[name]
            answers = self._answers(name)
            watts = round(fleet.reading(i)[0]) if answers else a.ladder[-1]
            found[name] = MinerFacts(name, a.node, watts, a.ladder[0], self._is_to_sleep(a), answers=answers)
        return found

    def _host_facts(self) -> dict[str, HostFacts]:
        hosts = self.physics.hosts
        running = {
            h: tuple(str(pk) for pk, w in self.work.items() if w.host == h and w.state == "running")
            for h in self.machines
        }
        return {
            name: HostFacts(
                name,
                m.node,
                self._is_latched(name) or hosts.power_state(hosts.index[name]) in {"parked", "off"},
                running[name],
            )
            for name, m in self.machines.items()
        }

    def _gives_way(self) -> dict[str, tuple[int, ...]]:
        """Of what runs, as the agent orders it: control's place, and of equals the last to have come first."""
        running = {str(pk): w.running_at for pk, w in self.work.items() if not w.ended}
        return {key: (*self.places.get(key, ()), -int(at.timestamp()) if at else 0) for key, at in running.items()}

    def _floor(self, name: str) -> None:
        m, hosts = self.machines[name], self.physics.hosts
        self.latched[name] = self._told(name)
        if not self.dark(name):
            m.limits = hosts.set_limits(hosts.index[name], [m.min_w] * m.gpus)

    # --- miners
    def _answers(self, name: str) -> bool:
        i = self.physics.fleet.index[name]
        a = self.asics[name]
        dark = not self.physics.energised()[self.physics.miner_node[i]] or self.physics.fleet.boot_left[i] > 0
        return not (
            dark
            or a.mute
            or a.node in self.deaf_pdus
            or self.physics.fleet.fault[i] in {"hang", "refuse", "error_status"}
        )

    def _obeys(self, name: str) -> bool:
        return self._answers(name) and self.physics.fleet.fault[self.physics.fleet.index[name]] != "ack_ignore"

    def _sleep(self, a: Asic) -> None:
        fleet = self.physics.fleet
        i = fleet.index[a.name]
        if self._obeys(a.name) and not fleet.asleep[i]:
            fleet.asleep[i] = True
            fleet._retarget(i)

    def _mode(self, a: Asic, mode: str, generation: int, now: datetime) -> None:  # noqa: ARG002 (the physics has its own time)
        if not self._answers(a.name) or generation <= self._told(a.name):
            return
        fleet = self.physics.fleet
        i = fleet.index[a.name]
        runs = 0 if fleet.asleep[i] else int(fleet.profile[i])
        if a.modes.index(mode) >= max(1, runs) and not self._may_wake(a.node):
            self.wakes[a.name] = (mode, generation)
            self.own[HELD] += 1
            return
        self.wakes.pop(a.name, None)
        if a.modes.index(mode) == 0 and a.mode:
            for waits in [*self.asked]:
                waits(a, self.batch)
        a.generation, a.mode = generation, a.modes.index(mode)  # acknowledged
        if not self._obeys(a.name):
            return
        fleet.asleep[i] = a.mode == 0
        fleet.profile[i] = a.mode or fleet.profile[i]
        fleet._retarget(i)

    # --- hosts
    def _limits(self, host: dict[str, Any]) -> None:
        """What is lower at once, what is higher when it may; only then the generation is in force."""
        m, hosts = self.machines[host["name"]], self.physics.hosts
        if self.dark(m.name) or host["generation"] <= m.generation or host["generation"] < self._told(m.name):
            return
        h, goal = hosts.index[m.name], list(host["limits_w"])
        have = hosts.limits(h)
        if any(want > w for want, w in zip(goal, have, strict=True)):
            waits = self.raises.get(m.name)
            self.raises[m.name] = host
            if self._is_latched(m.name) or self._blocked(m.node):
                m.limits = hosts.set_limits(h, [min(pair) for pair in zip(goal, have, strict=True)])
                self.own[HELD] += waits is None or waits["generation"] < host["generation"]
                return
        self.raises.pop(m.name, None)
        m.generation = host["generation"]
        m.state = host["power_state"]
        m.limits = hosts.set_limits(h, goal)

    # --- what it says and hears
    def report(self, now: datetime) -> dict[str, Any]:
        told = super().report(now)
        hosts, fleet = self.physics.hosts, self.physics.fleet
        watts = hosts.watts()
        told["known_safety"] = self.known_safety
        told["hosts"] = [
            {"name": name, "beat_at": now, "power_state": hosts.power_state(h), "generation": self.machines[name].generation,
             "measured_w": round(float(watts[h])), "limits_w": hosts.limits(h), "gpu_errors": []}
            for h, name in enumerate(hosts.names) if not self.dark(name)
        ]  # fmt: skip
        told["miners"] = []
        for name, a in self.asics.items():
            if self._answers(name):
                drawn, ghs = fleet.reading(fleet.index[name])
                told["miners"].append(
                    (name, fleet.mode(fleet.index[name]), a.generation, round(drawn), round(ghs), now)
                )
        told["meters"] = [(name, w, datetime.fromtimestamp(at, now.tzinfo)) for name, (w, at) in self.read.items()]
        return told

    def take(self, answer: dict[str, Any], now: datetime) -> None:
        if answer["safety"] is not None:
            self.known_safety = answer["safety"]["generation"]
            self.tree, self.order = Tree(answer["safety"]["nodes"]), answer["safety"]["shed_order"]
        self.mode = answer["mode"]
        self.places = {str(ids.decode("plc", p["id"])): tuple(p["gives_way"]) for p in answer["placements"]}
        asleep = {a.name: a.modes[0] for a in self.asics.values() if a.mode}
        self.batch = sum(asleep.get(name) == mode for name, mode, _ in answer["miners"])
        super().take(answer, now)

    def drawn(self, now: datetime) -> dict[str, int]:  # noqa: ARG002 (as above)
        return {name: round(1000 * float(self.physics.true_w[i])) for i, name in enumerate(self.physics.node_names)}

    def sync(self, now: datetime) -> None:
        if not self.link:
            return
        self.tell(self.report(now), now)

    def tell(self, report: dict[str, Any], now: datetime) -> None:
        """One call of the agent with a report, new or told before."""
        agent = Agent.objects.select_related("site").get(pk=self.agent_pk)
        agents.observe(agent, report, now=now)
        self.take(agents.desired(agent, report, now=now), now)
