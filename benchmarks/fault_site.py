"""A site as it really is, for the fault harness: what runs there, what draws watts, and an agent that follows docs/agent-protocol.md.

It knows nothing of the control plane's rows: it goes by the answers it got, whenever they came. `wrong` collects what must
never be at a site: a GPU with more work on it than there is GPU, a node that draws more than it carries.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from marketplace import ids

RAMP_S = 3


@dataclass
class Work:
    """A placement as the agent knows it."""

    pk: int
    host: str
    gpus: tuple[int, ...]
    milli: int
    vram: int
    seconds: int  # of work, once it runs
    state: str = "starting"
    running_at: datetime | None = None
    over_at: datetime | None = None  # when it will have ended
    code: int | None = 0
    reason: str = ""
    draining: bool = False

    @property
    def ended(self) -> bool:
        return self.state in {"exited", "failed"}


@dataclass
class Machine:
    """A host. Its GPUs' limits are what it enforces now."""

    name: str
    node: str
    gpus: int
    vram: int
    base_w: int
    parked_w: int
    min_w: int
    max_w: int
    cap_control: bool
    limits: list[int]
    state: str = "parked"
    generation: int = 0
    dead: bool = False

    @property
    def watts(self) -> int:
        """The most that it may draw under its limits."""
        if not self.cap_control:
            return self.base_w + self.gpus * self.max_w
        return self.parked_w if self.state == "parked" else self.base_w + sum(self.limits)


@dataclass
class Asic:
    """A miner. `deaf` ones acknowledge and go on as before; `mute` ones do not answer at all."""

    name: str
    node: str
    modes: list[str]
    ladder: list[int]
    mode: int
    generation: int = 0
    before: int = 0  # W still drawn until `settled`
    settled: datetime | None = None
    deaf: bool = False
    mute: bool = False

    def watts(self, now: datetime) -> int:
        drawn = self.ladder[self.mode]
        return max(drawn, self.before) if self.settled and now < self.settled else drawn


@dataclass
class Node:
    name: str
    parent: str | None
    cap_w: int
    fixed_w: int
    k_gpu: int
    k_miner: int


@dataclass
class Yard:
    """One site: its machines, and its agent's memory."""

    pk: int
    agent_pk: int
    dice: random.Random
    machines: dict[str, Machine]
    asics: dict[str, Asic]
    nodes: dict[str, Node]
    lease_until: datetime
    work: dict[int, Work] = field(default_factory=dict)
    generation: int = 0
    boot: str = "boot-1"
    sequence: int = 0
    silent: bool = False
    wrong: list[str] = field(default_factory=list)
    said: list[dict[str, Any]] = field(default_factory=list)  # old reports, to be told again

    # --- time
    def pass_time(self, now: datetime) -> None:
        """What happens by itself up to `now`."""
        for w in self.work.values():
            if w.ended:
                continue
            if now >= self.lease_until - timedelta(seconds=90):
                self._end(w, "failed", 143, "lease_expired", now)
            elif self.machines[w.host].dead:
                self._end(w, "failed", None, "host_lost", now)
            elif w.over_at is not None and now >= w.over_at:
                self._end(w, "exited", w.code, w.reason, w.over_at)
            elif w.state == "starting" and self._may_start(w):
                w.state, w.running_at = "running", now
                w.over_at = now + timedelta(seconds=w.seconds)
        self._look()

    def _end(self, w: Work, state: str, code: int | None, reason: str, at: datetime) -> None:
        w.state, w.code, w.reason, w.over_at = state, code, reason, at

    def _may_start(self, w: Work) -> bool:
        m = self.machines[w.host]
        return not m.dead and (not m.cap_control or all(m.limits[i] > m.min_w for i in w.gpus)) and m.state != "parked"

    def _look(self) -> None:
        """No GPU has more work on it than there is of it."""
        milli: dict[tuple[str, int], int] = defaultdict(int)
        vram: dict[tuple[str, int], int] = defaultdict(int)
        for w in self.work.values():
            if not w.ended and w.state != "starting":
                for i in w.gpus:
                    milli[w.host, i] += w.milli
                    vram[w.host, i] += w.vram
        for (host, i), total in milli.items():
            if total > 1000 or vram[host, i] > self.machines[host].vram:
                self.wrong.append(f"at the site GPU {host}/{i} carries {total} milli-GPU, {vram[host, i]} MiB")

    def drawn(self, now: datetime) -> dict[str, int]:
        """MW at each node, its own overhead and fixed watts included."""
        total = {n.name: 1000 * n.fixed_w for n in self.nodes.values()}
        devices: Iterable[tuple[str, int, bool]] = [
            *((m.node, m.watts, True) for m in self.machines.values()),
            *((a.node, a.watts(now), False) for a in self.asics.values()),
        ]
        for name, watts, gpu in devices:
            at: str | None = name
            while at is not None:
                node = self.nodes[at]
                total[at] += watts * (node.k_gpu if gpu else node.k_miner)
                at = node.parent
        return total

    def over_cap(self, now: datetime) -> list[str]:
        """Nodes that draw more than they carry, and what was seen to be wrong so far."""
        drawn = self.drawn(now)
        over = [f"node {n.name} draws {drawn[n.name]} mW of {1000 * n.cap_w}" for n in self.nodes.values()
                if drawn[n.name] > 1000 * n.cap_w]  # fmt: skip
        seen, self.wrong = self.wrong, []
        return over + seen

    # --- the agent
    def report(self, now: datetime) -> dict[str, Any]:
        """What it sees, as `services.agents.observe` takes it."""
        self.sequence += 1
        drawn = self.drawn(now)
        told = {
            "boot": self.boot, "sequence": self.sequence, "agent_time": now, "known_safety": -1,
            "hosts": [
                {"name": m.name, "beat_at": now, "power_state": m.state, "generation": m.generation, "measured_w": m.watts}
                for m in self.machines.values() if not m.dead
            ],
            "miners": [
                (a.name, a.modes[a.mode], a.generation, a.watts(now), 0, now) for a in self.asics.values() if not a.mute
            ],
            "meters": [(name, mw // 1000, now) for name, mw in drawn.items()],
            "placements": [
                {"pk": w.pk, "generation": 1, "state": w.state, "running_at": w.running_at,
                 "finished_at": w.over_at if w.ended else None,
                 "exit_code": w.code if w.ended else None, "reason": w.reason}
                for w in self.work.values()
            ],
        }  # fmt: skip
        self.said = [*self.said[-5:], told]
        return told

    def take(self, answer: dict[str, Any], now: datetime) -> None:
        """Do what shall be. An answer older than one already taken is ignored."""
        if answer["generation"] < self.generation:
            return
        self.generation = answer["generation"]
        self.lease_until = max(self.lease_until, answer["lease_until"])
        listed = {ids.decode("plc", p["id"]) or 0: p for p in answer["placements"]}
        for pk in [pk for pk in self.work if pk not in listed]:
            del self.work[pk]  # stopped and forgotten
        for host in answer["hosts"]:
            self._limits(host)
        for name, mode, generation in answer["miners"]:
            self._mode(self.asics[name], mode, generation, now)
        for pk, p in listed.items():
            self._shall(pk, p, now)
        self.pass_time(now)

    def _limits(self, host: dict[str, Any]) -> None:
        m = self.machines[host["name"]]
        if not m.dead and host["generation"] > m.generation:
            m.generation = host["generation"]
            m.state, m.limits = host["power_state"], list(host["limits_w"])

    def _mode(self, a: Asic, mode: str, generation: int, now: datetime) -> None:
        if a.mute or generation < a.generation:
            return
        a.generation = generation
        if not a.deaf and a.modes[a.mode] != mode:
            a.before = a.watts(now)
            a.mode, a.settled = a.modes.index(mode), now + timedelta(seconds=RAMP_S)

    def _shall(self, pk: int, p: dict[str, Any], now: datetime) -> None:
        w = self.work.get(pk)
        if w is None:
            # How long it will run follows from its name alone: the same in every order of events.
            seconds = random.Random(pk).choice((1, 8, 25, 25))
            w = Work(pk, p["host"], tuple(p["gpus"]), p["gpu_milli"], p["vram_mib"], seconds)
            if random.Random(-pk).random() < 0.07:
                w.code = 3
            self.work[pk] = w
        if p["desired"] == "drain" and not w.draining and not w.ended:
            w.draining = True
            if w.state == "starting":
                self._end(w, "exited", None, "not_started", now)
            else:
                w.state = "draining"
                saved = self.dice.random() < 0.3
                w.code, w.reason = (0 if saved else 143), "drained"
                w.over_at = now + timedelta(seconds=self.dice.choice((1, 5, 20)))
        elif p["desired"] == "stop" and not w.ended:
            self._end(w, "exited", 137, "stopped", now)
