"""Host power: limits and on/off as control's host generations ask, read back before anybody relies on them.

A generation is applied when the host reads back what it asks. The lowering part of it is done at once (but a GPU whose
work is still draining keeps its limit until the work has gone); the raising part waits while `may_raise` says no. Limits found
above what was applied (a driver reload) are lowered again; limits found below are left to control.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agent.events import Events
from agent.hosts import HostDriver, HostError, HostReading
from agent.reports import Reports
from agent.store import Store
from agent.times import to_wire

log = logging.getLogger("agent.hosts")
CONCURRENCY = 8


@dataclass
class Host:
    row: dict[str, Any]
    generation: int = 0  # of `state` and `limits`
    state: str = ""  # parked | capped | full | off; "" = never commanded
    limits: list[int] = field(default_factory=list)
    applied: int = 0
    latched: int = -1  # the safety loop put the limits to the floor: only a newer generation raises them
    reading: HostReading | None = None
    beat_at: float = 0.0  # epoch seconds of the last answer
    lost: bool = False

    @property
    def node(self) -> str:
        """The power node at which it hangs."""
        return str(self.row["power_node"])

    @property
    def name(self) -> str:
        return str(self.row["name"])

    @property
    def can_cap(self) -> bool:
        return bool(self.row.get("cap_control"))

    def floor(self) -> list[int]:
        return [int(self.row["gpu_min_w"])] * int(self.row["gpus"])

    def goal(self) -> list[int]:
        """The limits that shall hold now."""
        if not self.limits or self.latched >= self.generation:
            return self.floor()
        return self.limits

    @property
    def at_floor(self) -> bool:
        """Its limits cannot go any lower."""
        if not self.can_cap or self.latched >= self.generation or self.reading is None:
            return True
        return max(self.reading.limits_w, default=0) <= int(self.row["gpu_min_w"])

    @property
    def gain_w(self) -> int:
        """W that come free when all its GPUs are held at their floor, by its last reading."""
        if self.at_floor or self.reading is None:
            return 0
        floor_w = int(self.row["base_w"]) + int(self.row["gpus"]) * int(self.row["gpu_min_w"])
        return max(0, self.reading.measured_w - floor_w)

    @property
    def in_force(self) -> bool:
        """What control asked last is applied and read back."""
        return self.applied >= self.generation


class HostPower:
    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        driver: HostDriver,
        store: Store,
        reports: Reports,
        events: Events,
        *,
        beat_s: float,
        may_raise: Callable[[str], bool],
        draining: Callable[[str], set[int]],
    ) -> None:
        self.driver, self.store, self.reports, self.events = driver, store, reports, events
        self.beat_s, self.may_raise, self.draining = beat_s, may_raise, draining
        self.hosts = {str(row["name"]): Host(row) for row in rows}
        self.dirty: set[str] = set()
        self.gate = asyncio.Semaphore(CONCURRENCY)
        self.told_beats: dict[str, float] = {}
        for name, kept in store.all("host").items():
            if host := self.hosts.get(name):
                host.generation, host.state, host.limits = kept["generation"], kept["state"], kept["limits"]
                host.applied, host.latched = kept["applied"], kept["latched"]
                self.dirty.add(name)

    def _keep(self, host: Host) -> None:
        kept = {
            "generation": host.generation,
            "state": host.state,
            "limits": host.limits,
            "applied": host.applied,
            "latched": host.latched,
        }
        self.store.put("host", host.name, kept)

    # --- what shall be

    def apply(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Host rows of a sync. Older generations and unknown hosts change nothing; limits of a wrong length are refused."""
        with self.store.batch():
            for row in rows:
                host = self.hosts.get(row["name"])
                if host is None or int(row["generation"]) <= host.generation:
                    continue
                limits = [int(w) for w in row.get("limits_w") or self._default(host, str(row["power_state"]))]
                if len(limits) != int(host.row["gpus"]):
                    self.events.add("host_command_refused", host.name, generation=row["generation"], limits=len(limits))
                    continue
                host.generation, host.state, host.limits = int(row["generation"]), str(row["power_state"]), limits
                self._keep(host)
                self.dirty.add(host.name)

    @staticmethod
    def _default(host: Host, state: str) -> list[int]:
        return [int(host.row["gpu_max_w" if state == "full" else "gpu_min_w"])] * int(host.row["gpus"])

    def to_floor(self, names: Iterable[str], *, reason: str, node: str = "") -> None:
        """The agent's own lowering: all GPU limits to their minimum, latched until a newer generation."""
        for name in names:
            host = self.hosts.get(name)
            if host is None or not host.can_cap or host.latched >= host.generation:
                continue
            host.latched = host.generation
            self._keep(host)
            self.dirty.add(name)
            self.events.add("host_capped", name, reason=reason, node=node)

    # --- what is

    def observe(self, readings: Iterable[HostReading], at: float) -> None:
        """Readings of a poll. `at` is when the management network answered; unchanged hosts that live beat with it."""
        for reading in readings:
            host = self.hosts.get(reading.name)
            if host is None:
                continue
            before = host.reading
            host.reading = reading
            if before is None or (reading.power_state, reading.limits_w) != (before.power_state, before.limits_w):
                self.dirty.add(host.name)
        for host in self.hosts.values():
            if host.reading is None:
                continue
            if host.reading.alive:
                host.beat_at = at
                if host.lost:
                    host.lost = False
                    self.events.add("host_back", host.name)
                    self.dirty.add(host.name)
            elif not host.lost and at - host.beat_at > 3 * self.beat_s:
                host.lost = True
                self.events.add("host_lost", host.name, beat_at=to_wire(host.beat_at))
            self.report(host)

    def report(self, host: Host, *, urgent: bool = False) -> None:
        reading = host.reading
        if reading is None:
            return
        # A beat every three intervals is enough news by itself; watts within 4 % are not news.
        old = self.reports.rows["hosts"].get(host.name)
        row = {
            "name": host.name,
            "beat_at": to_wire(host.beat_at),
            "power_state": reading.power_state,
            "generation": host.applied,
            "limits_w": list(reading.limits_w),
            "measured_w": reading.measured_w,
            "gpu_errors": list(reading.gpu_errors),
        }
        if old is not None and not urgent:
            told = old[1]
            same = all(row[k] == told[k] for k in ("power_state", "generation", "limits_w", "gpu_errors"))
            near = abs(row["measured_w"] - told["measured_w"]) <= max(10, told["measured_w"] // 25)
            if (
                same
                and near
                and not (reading.alive and host.beat_at - self.told_beats.get(host.name, 0.0) > 12 * self.beat_s)
            ):
                return
        self.told_beats[host.name] = host.beat_at
        self.reports.set("hosts", host.name, row, urgent=urgent)

    # --- make it so

    async def step(self) -> None:
        """Works on every host whose wish or reading changed, a few at a time. Cheap when there is none."""
        names, self.dirty = self.dirty, set()
        if names:
            await asyncio.gather(*(self._work(self.hosts[name]) for name in names))

    async def _work(self, host: Host) -> None:
        if host.reading is None or not host.reading.alive or host.lost:
            return
        async with self.gate:
            try:
                done = await self._towards(host)
            except HostError as error:
                log.warning("host %s: %s", host.name, error)
                done = False
        if not done:
            self.dirty.add(host.name)

    async def _towards(self, host: Host) -> bool:
        """One step towards the goal; True when there is nothing left to do now.

        A newer wish may come at any `await`: what is in force afterwards is the generation that this step began with.
        """
        if not host.state and host.latched < host.generation:
            return True
        reading = host.reading
        assert reading is not None
        if host.state == "off" and host.latched < host.generation:
            return await self._off(host, reading)
        if reading.power_state == "off":
            if host.in_force or not self.may_raise(host.node):
                return host.in_force
            await self.driver.power(host.name, on=True)
            return False
        if not host.can_cap:
            return self._applied(host, host.generation)
        return await self._limits(host)

    async def _off(self, host: Host, reading: HostReading) -> bool:
        generation = host.generation
        if self.draining(host.name):
            return False
        if reading.power_state != "off":
            await self.driver.power(host.name, on=False)
            host.reading = await self.driver.read(host.name)
        return self._applied(host, generation) if host.reading and host.reading.power_state == "off" else False

    async def _limits(self, host: Host) -> bool:
        goal, generation = host.goal(), host.generation
        busy = self.draining(host.name)
        assert host.reading is not None
        now = list(host.reading.limits_w)
        floor, top = int(host.row["gpu_min_w"]), int(host.row["gpu_max_w"])
        goal = [min(max(w, floor), top) for w in goal]
        lower = [
            have if i in busy and have > want else min(have, want)
            for i, (have, want) in enumerate(zip(now, goal, strict=True))
        ]
        if lower != now:
            now = list(await self.driver.set_limits(host.name, lower))
        raising = any(want > have for want, have in zip(goal, now, strict=True))
        newest = host.generation == generation and host.latched < generation
        if raising and newest and not host.in_force and self.may_raise(host.node):
            now = list(await self.driver.set_limits(host.name, [max(a, b) for a, b in zip(now, goal, strict=True)]))
        # The truth is what is read afterwards, not what the setting call answered.
        host.reading = await self.driver.read(host.name)
        reached = list(host.reading.limits_w) == goal
        if reached and host.latched < generation:
            return self._applied(host, generation)
        self.report(host, urgent=True)
        return host.generation == generation and (reached or (raising and host.in_force))

    def _applied(self, host: Host, generation: int) -> bool:
        """`generation` is in force; whether it is still what is wanted."""
        if host.applied < generation:
            host.applied = generation
            self._keep(host)
        self.report(host, urgent=True)
        return host.generation == generation

    # --- for others

    def granted(self, name: str, gpus: Sequence[int]) -> bool:
        """True when the host's last generation is in force and the limits of these GPUs, as read back, stand above the floor."""
        host = self.hosts.get(name)
        if host is None or host.reading is None or not host.reading.alive or host.lost:
            return False
        if not host.in_force or host.reading.power_state == "off" or host.latched >= host.generation:
            return False
        if not host.can_cap:
            return True
        floor, top = int(host.row["gpu_min_w"]), int(host.row["gpu_max_w"])
        return top <= floor or all(host.reading.limits_w[g] > floor for g in gpus)
