"""The simulated site's face: BMC, meters and executor over HTTP on loopback, the miners over TCP, and the truth.

    GET  /inventory                       hosts, miners, nodes
    GET  /state?since=V                   {"boot", "version", "at", "hosts", "work"} changed after V, and all meters
    GET  /hosts/NAME                      one host
    POST /hosts/NAME/limits               {"limits_w": [..]} -> what now holds
    POST /hosts/NAME/power                {"state": "on"|"off"}
    POST /hosts/NAME/workloads            {"id", "gpus", "utilisation"}; DELETE /hosts/NAME/workloads/ID
    POST /hosts/NAME/work                 {"id", "command", "gpus", "env"}; GET/DELETE /hosts/NAME/work/ID
    POST /hosts/NAME/work/ID/signal       {"signal": "TERM"|"KILL"};  GET /hosts/NAME/work/ID/stdout?offset=N
    GET  /meters, GET /truth
    POST /control/fault                   {"kind": "miner"|"host"|"gpu"|"benchmark"|"meter"|"link", "name",
                                          "fault": "..."|"", "factor"}
    POST /control/reset-breaker           {"node"}
    POST /control/uplink                  {"cut": true|false}

A host that is dead answers 504, one that is off 409 to work and limits. While the link is cut nothing but /truth and
/control answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from sandbox.miners import FleetServer
from sandbox.site.executor import Executor
from sandbox.site.httpd import Drop, Httpd, Request
from sandbox.site.physics import BOOT_S, Physics
from sandbox.site.spec import Spec
from sandbox.site.uplink import Uplink

TICK_S = 0.25
Answer = tuple[int, Any]


def problem(status: int, code: str, message: str) -> Answer:
    return status, {"error": {"code": code, "message": message}}


class SiteServer:
    """A running simulated site. `port` and `miner_port` 0 take free ones (addresses in the inventory follow)."""

    def __init__(
        self, spec: Spec, *, port: int = 0, speed: float = 1.0, record: Path | None = None, uplink: Uplink | None = None
    ) -> None:
        self.spec, self.record, self.uplink = spec, record, uplink
        self.physics = Physics(spec, speed=speed)
        self.executor = Executor()
        self.httpd = Httpd(self.handle, port)
        self.miners = FleetServer(self.physics.fleet, int(spec.get("miner_port", 0)))
        self.boot = uuid4().hex  # versions count from here
        self.version = 1
        self.host_version = np.ones(len(spec["hosts"]), dtype=int)
        self.published = np.full(
            (4, len(spec["hosts"])), -1.0
        )  # W, sum of limits, state, errors of each host as last told
        self.link_cut = False
        self._ticker: asyncio.Task[None] | None = None

    # --- life

    async def start(self) -> None:
        """Raises OSError when a port is taken."""
        await self.miners.start()
        for row in self.spec["miners"]:
            row["address"] = f"{row['address'].split(':')[0]}:{self.miners.port}"
        await self.httpd.start()
        if self.uplink:
            await self.uplink.start()
        self._ticker = asyncio.create_task(self._tick())

    async def stop(self) -> None:
        if self._ticker:
            self._ticker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._ticker
        if self.uplink:
            await self.uplink.stop()
        await self.httpd.stop()
        await self.miners.stop()
        self.write_record()

    def write_record(self) -> None:
        if self.record:
            self.record.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.record.with_suffix(".tmp")
            temporary.write_text(json.dumps(self.physics.truth(), indent=1))
            temporary.replace(self.record)

    async def _tick(self) -> None:
        last = time.monotonic()
        ticks = 0
        while True:
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            self.advance(now - last, time.time())
            last = now
            ticks += 1
            if ticks % 40 == 0:
                self.write_record()

    def advance(self, dt: float, at: float) -> None:
        """One step of everything. A long pause of this process is played in steps of at most a second."""
        while dt > 0:
            step = min(dt, 1.0)
            dt -= step
            lost = self.physics.step(step, at - dt)
            self.executor.lose(lost, at)
        for key in self.executor.step(at):
            work = self.executor.work.get(key)
            if work:
                self.version += 1
                work.version = self.version
                if work.finished_at is not None:
                    self.physics.hosts.detach(key)
        self.miners.energised = self.physics.energised()[self.physics.miner_node]
        self._publish_hosts()

    def _publish_hosts(self) -> None:
        """Gives every host that changed in a way worth telling (state, limits, errors, 4 % of its watts) a new version."""
        physics = self.physics
        hosts = physics.hosts
        if not hosts.rows:
            return
        watts = hosts.watts()
        limits = np.bincount(hosts.host_of, hosts.limit, len(hosts.rows))
        state = physics.energised()[physics.host_node] * 4 + hosts.alive * 2 + (hosts.powered & (hosts.boot_left <= 0))
        changed = np.abs(watts - self.published[0]) > np.maximum(10.0, 0.04 * self.published[0])
        changed |= (
            (limits != self.published[1]) | (state != self.published[2]) | (hosts.error_count != self.published[3])
        )
        if changed.any():
            self.version += 1
            self.host_version[changed] = self.version
            self.published[:, changed] = np.stack([watts, limits, state, hosts.error_count])[:, changed]

    def _answers(self, h: int | np.integer[Any]) -> bool:
        node = self.physics.host_node[h]
        return bool(self.physics.hosts.alive[h] and self.physics.energised()[node])

    # --- HTTP

    def host_row(self, h: int | np.integer[Any]) -> dict[str, Any]:
        hosts = self.physics.hosts
        alive = self._answers(h)
        return {
            "name": hosts.names[h],
            "alive": alive,
            "power_state": hosts.power_state(h),
            "limits_w": hosts.limits(h),
            "measured_w": round(float(hosts.watts()[h])),
            "gpu_errors": hosts.errors(h),
        }

    async def handle(self, request: Request) -> Answer:
        parts = [p for p in request.path.split("/") if p]
        if parts[:1] == ["control"]:
            return self._control(parts[1:], request.json())
        if parts == ["truth"]:
            return 200, self.physics.truth()
        if self.link_cut:
            raise Drop
        match request.method, parts:
            case "GET", ["inventory"]:
                return 200, {key: self.spec[key] for key in ("name", "nodes", "hosts", "miners")}
            case "GET", ["state"]:
                return 200, self._state(int(request.query.get("since", "0")))
            case "GET", ["meters"]:
                return 200, {"meters": self.physics.meters()}
            case _, ["hosts", name, *rest]:
                return self._host(request, self.physics.hosts.index[name], rest)
        return problem(404, "not_found", f"no such endpoint: {request.method} {request.path}")

    def _state(self, since: int) -> dict[str, Any]:
        hosts = [self.host_row(h) for h in np.flatnonzero(self.host_version > since)]
        work = [w.row() for w in self.executor.work.values() if w.version > since]
        return {
            "boot": self.boot,
            "version": self.version,
            "at": time.time(),
            "hosts": hosts,
            "work": work,
            "meters": self.physics.meters(),
        }

    def _host(self, request: Request, h: int, rest: list[str]) -> Answer:
        hosts, name = self.physics.hosts, self.physics.hosts.names[h]
        if not self._answers(h):
            return problem(504, "host_unreachable", f"host {name} does not answer")
        body = request.json() if request.method == "POST" else {}
        match request.method, rest:
            case "GET", []:
                return 200, self.host_row(h)
            case "POST", ["power"]:
                return self._power(h, str(body["state"]))
        if hosts.power_state(h) == "off":
            return problem(409, "host_off", f"host {name} is off")
        match request.method, rest:
            case "POST", ["limits"]:
                held = hosts.set_limits(h, [int(w) for w in body["limits_w"]])
                return 200, {"limits_w": held}
            case "POST", ["workloads"]:
                hosts.attach(str(body["id"]), h, [int(g) for g in body["gpus"]], float(body.get("utilisation", 0.9)))
                return 201, {}
            case "DELETE", ["workloads", key]:
                hosts.detach(key)
                return 200, {}
            case _, ["work", *more]:
                return self._work(request, h, more, body)
        return problem(404, "not_found", f"no such endpoint: {request.method} {request.path}")

    def _power(self, h: int, state: str) -> Answer:
        hosts = self.physics.hosts
        if state not in ("on", "off"):
            raise ValueError(f"power state {state!r}: on or off")
        if state == "on" and not hosts.powered[h]:
            hosts.powered[h], hosts.boot_left[h] = True, BOOT_S
        elif state == "off" and hosts.powered[h]:
            hosts.powered[h] = False
            self.executor.lose(hosts.dark(np.arange(len(hosts.rows)) == h), time.time())
        return 200, self.host_row(h)

    def _work(self, request: Request, h: int, rest: list[str], body: dict[str, Any]) -> Answer:
        executor, hosts = self.executor, self.physics.hosts
        match request.method, rest:
            case "POST", []:
                key, gpus = str(body["id"]), [int(g) for g in body["gpus"]]
                if key not in executor.work:
                    hosts.attach(key, h, gpus, float(body.get("utilisation", 0.9)))
                command = [str(c) for c in body["command"]]
                figures = hosts.benchmark(h, gpus) if command[:1] == ["tailrace-verify"] else ""
                work = executor.start(
                    key, hosts.names[h], command, gpus, body.get("env", {}), time.time(), figures=figures
                )
                if work.finished_at is not None:
                    hosts.detach(key)
                return 201, work.row()
            case "GET", [key]:
                return 200, executor.work[key].row()
            case "GET", [key, "stdout"]:
                return 200, executor.work[key].stdout.encode()[int(request.query.get("offset", "0")) :]
            case "POST", [key, "signal"]:
                work = executor.signal(key, str(body["signal"]), time.time())
                if work.finished_at is not None:
                    hosts.detach(key)
                return 200, work.row()
            case "DELETE", [key]:
                executor.signal(key, "KILL", time.time()) if key in executor.work else None
                hosts.detach(key)
                executor.forget(key)
                return 200, {}
        return problem(404, "not_found", f"no such endpoint: {request.method} {request.path}")

    def _control(self, parts: list[str], body: dict[str, Any]) -> Answer:
        match parts:
            case ["fault"]:
                self._fault(
                    str(body["kind"]), str(body.get("name", "")), str(body["fault"]), float(body.get("factor", 1.2))
                )
            case ["reset-breaker"]:
                self.physics.reset_breaker(str(body["node"]))
            case ["uplink"] if self.uplink:
                self.uplink.cut = bool(body["cut"])
            case _:
                return problem(404, "not_found", f"no such control: {'/'.join(parts)}")
        return 200, {}

    def _fault(self, kind: str, name: str, fault: str, factor: float) -> None:
        if kind == "miner":
            self.physics.fleet.set_fault(name, fault, factor=factor)
        elif kind == "host" and fault == "dies":
            self.executor.lose(self.physics.kill_host(name), time.time())
        elif kind == "benchmark" and fault in ("slow", ""):
            self.physics.hosts.slowness[self.physics.hosts.index[name]] = factor if fault else 1.0
        elif kind == "benchmark" and fault.startswith("is "):
            self.physics.hosts.really[self.physics.hosts.index[name]] = fault.removeprefix("is ")
        elif kind == "host" and not fault:
            self.physics.revive_host(name)
        elif kind == "gpu":  # HOST/INDEX
            host, _, index = name.rpartition("/")
            self.physics.hosts.set_error(host, int(index), fault)
        elif kind == "meter" and fault in ("stale", ""):
            self.physics.meter_stale[self.physics.node_index[name]] = bool(fault)
        elif kind == "link" and fault in ("cut", ""):
            self.link_cut = bool(fault)
        else:
            raise ValueError(
                f"unknown fault {fault!r} of {kind!r}; kinds: miner, host (dies), gpu (xid N, ecc), "
                "benchmark (slow, is MODEL), meter (stale), link (cut)"
            )
