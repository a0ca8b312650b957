"""The site of a soak: what its devices draw says `sandbox.site.physics`; what its agent does follows docs/agent-protocol.md.

The jobs' half of the agent is the market simulation's; the agent's own safety loop is `agent.safety.decide`, each second, with what
control handed down last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from agent.safety import HostFacts, Memory, MinerFacts, Tree, decide
from benchmarks.fault_site import Asic
from marketplace import ids
from marketplace.models import Agent
from marketplace.services import agents
from sandbox.market.site import Facility
from sandbox.site.physics import Physics

STALE_S, SETTLE_S = 15.0, 8.0  # as the agent's own settings
OWN = ("machines put to sleep", "hosts lowered to their floor", "jobs ended for the copper")  # by the site's own loop


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
    latched: dict[str, int] = field(default_factory=dict)  # miner -> generation at which the own loop slept it
    places: dict[str, tuple[int, ...]] = field(default_factory=dict)  # placement -> its place in control's order
    asked: list[Callable[[Asic, int], None]] = field(default_factory=list)  # wait for machines told to sleep
    batch: int = 0  # machines that the answer in hand tells to sleep

    # --- time
    def second(self, now: datetime) -> None:
        """One second of the site, and of the agent's own loop."""
        lost = self.physics.step(1.0, now.timestamp())
        for pk in map(int, lost):
            if pk in self.work and not self.work[pk].ended:
                self._end(self.work[pk], "failed", None, "host_lost", now)
        self.pass_time(now)
        self.read = {name: (watts, at) for name, watts, at in self.physics.meters() if at}
        self._guard(now)

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
        made = decide(
            self.tree, self.order, self.read, self._facts() if over else {}, self._host_facts() if over else {}, self.memory,
            now.timestamp(), stale_s=STALE_S, settle_s=SETTLE_S, gives_way=self._gives_way() if over else {},
        )  # fmt: skip
        for rung, found in zip(OWN, (made.shed, made.cap_hosts, made.evict), strict=True):
            for _, node in found:
                self.own[rung] += 1
                self.own[f"{rung} for {node}"] += 1
        for name, _ in made.shed:
            self.latched[name] = self.asics[name].generation
            self._sleep(self.asics[name])
        for name, _ in made.cap_hosts:
            self._floor(name)
        for key, _ in made.evict:
            self._end(self.work[int(key)], "failed", 143, "over_cap", now)
        for a in self.asics.values():  # found hashing although it was sent to sleep: down again
            if self._obeys(a.name) and (self.latched.get(a.name, -1) >= a.generation or a.mode == 0):
                self._sleep(a)

    def _facts(self) -> dict[str, MinerFacts]:
        fleet, found = self.physics.fleet, {}
        for name, a in self.asics.items():
            i = fleet.index[name]
            answers = self._answers(name)
            watts = round(fleet.reading(i)[0]) if answers else a.ladder[-1]
            shed = bool(fleet.asleep[i]) or self.latched.get(name, -1) >= a.generation
            found[name] = MinerFacts(name, a.node, watts, a.ladder[0], shed, answers=answers)
        return found

    def _host_facts(self) -> dict[str, HostFacts]:
        hosts = self.physics.hosts
        running = {
            h: tuple(str(pk) for pk, w in self.work.items() if w.host == h and w.state == "running")
            for h in self.machines
        }
        return {
            name: HostFacts(name, m.node, hosts.power_state(hosts.index[name]) in {"parked", "off"}, running[name])
            for name, m in self.machines.items()
        }

    def _gives_way(self) -> dict[str, tuple[int, ...]]:
        """Of what runs, as the agent orders it: control's place, and of equals the last to have come first."""
        running = {str(pk): w.running_at for pk, w in self.work.items() if not w.ended}
        return {key: (*self.places.get(key, ()), -int(at.timestamp()) if at else 0) for key, at in running.items()}

    def _floor(self, name: str) -> None:
        m, hosts = self.machines[name], self.physics.hosts
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
        if not self._answers(a.name) or generation <= a.generation:
            return
        if a.modes.index(mode) == 0 and a.mode:
            for waits in [*self.asked]:
                waits(a, self.batch)
        a.generation, a.mode = generation, a.modes.index(mode)  # acknowledged
        if not self._obeys(a.name):
            return
        fleet = self.physics.fleet
        i = fleet.index[a.name]
        fleet.asleep[i] = a.mode == 0
        fleet.profile[i] = a.mode or fleet.profile[i]
        fleet._retarget(i)

    # --- hosts
    def _limits(self, host: dict[str, Any]) -> None:
        m, hosts = self.machines[host["name"]], self.physics.hosts
        if not self.dark(m.name) and host["generation"] > m.generation:
            m.generation = host["generation"]
            m.state = host["power_state"]
            m.limits = hosts.set_limits(hosts.index[m.name], list(host["limits_w"]))

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
