"""Placements: from what control lists to processes that run, and back to what control is told.

Phases: waiting -> starting -> running -> draining -> ended. Each change is on disk before it is acted upon, so that an agent
killed at any instant finds its place again: it adopts what still runs and reads the exits of what ended meanwhile.
What has ended is never started again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from zlib import crc32

from agent.events import Events
from agent.hosts import HostDriver, HostError
from agent.hosts.power import HostPower
from agent.placement import Placement
from agent.reports import Reports
from agent.runtime import Runtime, StartError, Status, Work
from agent.runtime.virtual import VirtualRuntime
from agent.store import Store

log = logging.getLogger("agent.placements")
LEASE_SLACK_S = 60.0
STOP_AGAIN_S = 5.0


class Placements:
    """`blocked(node)` names why nothing may start there now ("" = may); `lease_until()` is epoch seconds, None before the first sync."""

    def __init__(
        self,
        runtime: Runtime,
        hosts: HostPower,
        driver: HostDriver,
        store: Store,
        reports: Reports,
        events: Events,
        *,
        site: str,
        addresses: Mapping[str, str],
        blocked: Callable[[str], str],
        lease_until: Callable[[], float | None],
    ) -> None:
        self.runtime, self.hosts, self.driver = runtime, hosts, driver
        self.store, self.reports, self.events = store, reports, events
        self.site, self.addresses, self.blocked, self.lease_until = site, addresses, blocked, lease_until
        self.items: dict[str, Placement] = {}
        self.news = asyncio.Event()
        self.starting: set[asyncio.Task[None]] = set()

    # --- restart

    async def adopt(self) -> None:
        """Finds again what a former agent process started."""
        for key, kept in self.store.all("placement").items():
            item = Placement(**kept)
            self.items[key] = item
            if isinstance(self.runtime, VirtualRuntime):
                self.runtime.bind(key, item.host)
            if item.phase not in ("waiting", "ended"):
                await self._adopt(item)
            self._tell(item)
        self.news.set()

    async def _adopt(self, item: Placement) -> None:
        try:
            status = await self.runtime.status(item.id)
        except HostError:
            item.unknown = True
            return
        if status.state == "missing" and item.phase == "starting":
            item.phase = "waiting"
        elif status.state == "running" and item.phase == "starting":
            item.phase, item.running_at = "running", status.started_at
        elif status.state != "running":
            self._from_status(item, status)
        self._keep(item)

    # --- what shall be

    def apply(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """The complete list of a sync: what it does not hold is stopped and forgotten. Older generations change nothing."""
        seen = set()
        with self.store.batch():
            for row in rows:
                key = str(row["id"])
                seen.add(key)
                item = self.items.get(key)
                secrets = {str(k): str(v) for k, v in (row.get("secrets") or {}).items()}
                if item is None:
                    spec = {k: v for k, v in row.items() if k != "secrets"}
                    item = Placement(key, spec, int(row["generation"]), str(row["desired"]), secrets=secrets)
                    self.items[key] = item
                    self._keep(item)
                    self._tell(item)
                    continue
                item.secrets, item.listed = secrets, True
                if item.learn(row):
                    self._keep(item)
                if int(row["generation"]) > item.generation:
                    item.generation, item.desired = int(row["generation"]), str(row["desired"])
                    self._keep(item)
                    self._tell(item)
            for key, item in self.items.items():
                if key not in seen and item.listed:
                    item.listed, item.desired = False, "stop"
                    self._keep(item)
        self.news.set()

    def evict(self, keys: Iterable[str], *, reason: str) -> None:
        """The agent's own lowering: drains placements that run. One that waits draws nothing and goes on waiting."""
        for key in keys:
            item = self.items.get(key)
            if item and item.phase in ("starting", "running"):
                self.events.add("placement_shed", key, reason=reason)
                item.stop_reason = item.stop_reason or "power_shed"
        self.news.set()

    def drain_all(self) -> None:
        self.evict([k for k, i in self.items.items() if not i.stop_reason], reason="mode_off")

    # --- the watch

    async def run(self) -> None:
        while True:
            self.news.clear()
            try:
                await self.step()
            except Exception:
                log.exception("placements")
            busy = any(item.phase != "ended" or not item.listed for item in self.items.values())
            try:
                async with asyncio.timeout(0.5 if busy else 5.0):
                    await self.news.wait()
            except TimeoutError:
                pass

    async def step(self) -> None:
        now = time.time()
        until = self.lease_until()
        for item in list(self.items.values()):
            if (
                item.phase in ("waiting", "running", "starting")
                and until is not None
                and now >= until - item.grace_s - LEASE_SLACK_S
            ):
                item.stop_reason = item.stop_reason or "lease_expired"
            if item.phase == "waiting":
                await self._waiting(item)
            elif item.phase in ("running", "draining"):
                await self._watch(item, now)
            elif item.phase == "ended" and not item.listed and item.logs_done:
                await self._forget(item)

    async def _waiting(self, item: Placement) -> None:
        if item.desired != "run" or item.stop_reason:
            self._end(item, Status("exited", reason=item.stop_reason or "not_started", finished_at=time.time()))
            return
        gang = self._gang(item)
        if any(member.phase == "ended" for member in gang):
            self._end(item, Status("exited", reason="gang_member_failed", finished_at=time.time()))
            return
        reason = self._not_ready(item)
        if not reason and (
            len(gang) < len(set(item.spec.get("gang") or [item.id]))
            or any(self._not_ready(m) for m in gang if m.phase == "waiting")
        ):
            reason = "waiting_gang"
        if reason:
            if item.reason != reason:
                item.reason = reason
                self._tell(item)
            return
        # The barrier has opened for this member, hence for all of them in this very step.
        for member in gang:
            if member.phase == "waiting":
                member.phase, member.reason = "starting", ""
                self._keep(member)
                self._tell(member)
                task = asyncio.create_task(self._start(member))
                self.starting.add(task)
                task.add_done_callback(self.starting.discard)

    def _gang(self, item: Placement) -> list[Placement]:
        ids = dict.fromkeys([*(item.spec.get("gang") or []), item.id])
        members = [self.items[key] for key in ids if key in self.items]
        return [m for m in members if m.phase != "waiting" or m.desired == "run"]

    def _not_ready(self, item: Placement) -> str:
        host = self.hosts.hosts.get(item.host)
        if blocked := self.blocked(host.node if host else ""):
            return blocked
        if item.secrets is None:
            return "waiting_secrets"
        if host is None:
            return "waiting_host"
        return "" if self.hosts.granted(item.host, item.gpus) else "waiting_limits"

    async def _start(self, item: Placement) -> None:
        try:
            await self.runtime.prepare(work := self.work(item))
            await self._tell_work(item)
            await self.runtime.start(work)
            status = await self.runtime.status(item.id)
        except (StartError, HostError) as error:
            log.warning("placement %s: %s", item.id, error)
            self.events.add("start_failed", item.id, text=str(error))
            self._end(item, Status("exited", reason="start_failed", finished_at=time.time()))
            self._fail_gang(item)
            return
        except Exception:
            log.exception("placement %s", item.id)
            self._end(item, Status("exited", reason="start_failed", finished_at=time.time()))
            self._fail_gang(item)
            return
        item.phase, item.running_at = "running", status.started_at
        if status.state == "exited":
            self._from_status(item, status)
            if status.reason == "start_failed":
                self._fail_gang(item)
        else:
            await self._attach(item)
        self._keep(item)
        self._tell(item)
        self.news.set()

    def _fail_gang(self, item: Placement) -> None:
        for member in self._gang(item):
            if member is not item and member.phase != "ended":
                member.stop_reason = member.stop_reason or "gang_member_failed"
        self.news.set()

    async def _attach(self, item: Placement) -> None:
        """A simulated host draws for real processes too. Its own executor attaches virtual work itself."""
        if item.attached or isinstance(self.runtime, VirtualRuntime):
            return
        try:
            await self.driver.attach(item.host, item.id, item.gpus, self.utilisation(item))
            item.attached = True
        except HostError as error:
            log.debug("attach %s: %s", item.id, error)

    async def _watch(self, item: Placement, now: float) -> None:
        host = self.hosts.hosts.get(item.host)
        if host is not None and host.lost:
            # Its work is fenced: what may still run there is ended, whatever it says when the host comes back.
            await self._stop(item, 0, "host_lost")
            self._end(item, Status("exited", started_at=item.running_at, finished_at=host.beat_at, reason="host_lost"))
            return
        try:
            status = await self.runtime.status(item.id)
        except HostError:
            if not item.unknown:
                item.unknown = True
                self._tell(item)
            return
        if item.unknown:
            item.unknown = False
            self._tell(item)
        if status.state != "running":
            self._from_status(item, status)
            if not isinstance(self.runtime, VirtualRuntime):
                try:
                    await self.driver.detach(item.host, item.id)
                except HostError as error:
                    log.debug("detach %s: %s", item.id, error)
            return
        if item.saved(status.checkpoint_at):
            self._tell(item, urgent=False)
        if not item.told:
            await self._tell_work(item)
        await self._attach(item)
        maximum = item.spec.get("max_seconds")
        if maximum and item.running_at and now >= item.running_at + float(maximum):
            # A runtime's own timer may have died with a former agent.
            item.stop_reason = item.stop_reason or "max_seconds"
        if item.desired == "stop":
            if item.stop_reason != "stopped" or now - item.stopped_at > STOP_AGAIN_S:
                item.stop_reason = "stopped"
                await self._begin_stop(item, 0, now)
        elif (item.desired == "drain" or item.stop_reason) and (item.phase == "running" or not item.stopped_at):
            item.stop_reason = item.stop_reason or "drained"
            await self._begin_stop(item, item.grace_s, now)

    async def _begin_stop(self, item: Placement, grace_s: float, now: float) -> None:
        item.phase, item.stopped_at = "draining", now
        self._keep(item)
        self._tell(item)
        await self._stop(item, grace_s, item.stop_reason)

    async def _stop(self, item: Placement, grace_s: float, reason: str) -> None:
        try:
            await self.runtime.stop(item.id, grace_s, reason)
        except HostError as error:
            log.warning("stopping %s: %s", item.id, error)

    def _from_status(self, item: Placement, status: Status) -> None:
        if status.state in ("missing", "lost"):
            status = Status("exited", status.started_at or item.running_at, time.time(), None, "supervisor_lost")
        self._end(item, status)

    def _end(self, item: Placement, status: Status) -> None:
        item.phase, item.unknown = "ended", False
        item.running_at = status.started_at or item.running_at
        item.finished_at, item.exit_code = status.finished_at, status.exit_code
        item.saved(status.checkpoint_at)
        # The gang's reason explains more than the signal that ended this member.
        item.reason = item.stop_reason if item.stop_reason == "gang_member_failed" else status.reason
        if item.running_at is None:
            item.logs_done = True
        self._keep(item)
        self._tell(item)
        self.news.set()

    async def _forget(self, item: Placement) -> None:
        await self.runtime.forget(item.id)
        with self.store.batch():
            self.store.delete("placement", item.id)
            for stream in ("stdout", "stderr"):
                self.store.delete("log", f"{item.id}:{stream}")
        self.items.pop(item.id, None)
        self.reports.drop("placements", item.id)

    def _keep(self, item: Placement) -> None:
        self.store.put("placement", item.id, item.document())

    async def _tell_work(self, item: Placement) -> None:
        """The work finds who runs beside it in its workspace. Where its own doing is in the way, it does without."""
        table = item.gang()
        try:
            await self.runtime.tell(item.id, table)
        except (HostError, OSError) as error:
            log.warning("gang table of %s: %s", item.id, error)
        item.told = table == item.gang()

    def _tell(self, item: Placement, *, urgent: bool = True) -> None:
        self.reports.set("placements", item.id, item.row(), urgent=urgent)

    # --- facts for others

    def draining(self, host: str) -> set[int]:
        """GPU indices of a host whose work is on its way out but still there."""
        found: set[int] = set()
        for item in self.items.values():
            here = item.host == host and item.phase in ("starting", "running", "draining")
            if here and (item.phase == "draining" or item.desired != "run" or item.stop_reason):
                found.update(item.gpus or {-1})
        return found

    def running_on(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for item in self.items.values():
            if item.phase in ("starting", "running"):
                found.setdefault(item.host, []).append(item.id)
        return found

    def gives_way(self) -> dict[str, tuple[int, ...]]:
        """Placement that runs here -> its place in control's order."""
        return {item.id: item.gives_way for item in self.items.values() if item.phase in ("starting", "running")}

    @staticmethod
    def utilisation(item: Placement) -> float:
        return 0.9 * int(item.spec.get("gpu_milli") or 1000) / 1000

    def work(self, item: Placement) -> Work:
        """The complete work of a placement: the user's environment, then ours, then the secrets."""
        spec = item.spec
        master = str(spec.get("master_host") or item.host)
        ours = {
            "TAILRACE_PLACEMENT": item.id,
            "TAILRACE_JOB": str(spec.get("job", "")),
            "TAILRACE_SITE": self.site,
            "TAILRACE_HOST": item.host,
            "TAILRACE_GANG_SIZE": str(spec.get("world_size", len(spec.get("gang") or [item.id]))),
            "TAILRACE_GANG_EPOCH": str(spec.get("epoch", 0)),
            "TAILRACE_GPU_MILLI": str(spec.get("gpu_milli", 1000)),
            "TAILRACE_GRACE_SECONDS": str(int(item.grace_s)),
            "RANK": str(spec.get("rank", 0)),
            "WORLD_SIZE": str(spec.get("world_size", 1)),
            "LOCAL_RANK": "0",
            "MASTER_ADDR": self.addresses.get(master, "127.0.0.1" if self.runtime.name == "process" else master),
            "MASTER_PORT": str(20_000 + crc32(str(spec.get("job", item.id)).encode()) % 20_000),
            "CUDA_VISIBLE_DEVICES": ",".join(str(g) for g in item.gpus),
        }
        user = {str(k): str(v) for k, v in (spec.get("env") or {}).items()}
        return Work(
            item.id,
            item.host,
            item.gpus,
            tuple(str(c) for c in spec.get("command") or ()),
            user | ours | (item.secrets or {}),
            item.grace_s,
            float(spec["max_seconds"]) if spec.get("max_seconds") else None,
            int(spec.get("ram_mib") or 0),
            self.utilisation(item),
        )
