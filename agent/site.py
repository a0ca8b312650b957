"""The agent of one site: all parts wired together, and the loops that run them."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from agent import __version__
from agent.config import Config
from agent.control import Control
from agent.events import Events
from agent.hosts import HostDriver, HostError, Poll
from agent.hosts.bmc import Bmc
from agent.hosts.health import Health
from agent.hosts.local import LocalHost
from agent.hosts.power import HostPower
from agent.logs import LogShipper
from agent.miners.fleet import Fleet
from agent.placements import Placements
from agent.reports import Reports
from agent.runtime import Runtime
from agent.runtime.process import ProcessRuntime
from agent.runtime.virtual import VirtualRuntime
from agent.safety import Decision, HostFacts, Memory, Tree, decide
from agent.store import Store, write_private
from agent.supervise import read
from agent.sync import Sync, lease_end
from agent.times import to_wire

log = logging.getLogger("agent")
LEASE_STEP_S = 20.0
MODES = ("auto", "hold", "shed", "off")


class Site:
    def __init__(self, config: Config, identity: dict[str, Any], store: Store) -> None:
        self.config, self.identity, self.store = config, identity, store
        self.reports = Reports()
        self.events = Events(store, self._news)
        self.health = Health(store, self.events)
        self.control = Control(
            identity["url"], stream_url=identity.get("stream_url", ""), key=identity["key"], version=__version__
        )
        self.driver: HostDriver = (
            Bmc(config.host_url) if config.host_driver == "sandbox" else LocalHost(config.local_host)
        )
        self.lease_file = store.folder / "lease.json"
        self.runtime = self._runtime()
        fact = store.get("fact", "control") or {}
        self.generation = int(fact.get("generation", 0))
        self.safety_generation = int(fact.get("safety_generation", -1))
        self.safety: dict[str, Any] = fact.get("safety") or {"nodes": [], "shed_order": []}
        self.mode = str(fact.get("mode", "hold"))
        self.tree = Tree(self.safety["nodes"])
        self.memory = Memory()
        self.decision = Decision()
        self.meters: dict[str, tuple[int, float]] = {}
        self.site_down_since: float | None = None
        self.stale_told: tuple[str, ...] = ()
        self.inventory: dict[str, Any] = {"hosts": [], "miners": []}
        until = read(str(self.lease_file)).get("until")
        self.until: float | None = float(until) if until else None
        self.lease_written = 0.0
        self.kept_mode = ""
        self.kick = asyncio.Event()  # there is something new for the hosts

    def _runtime(self) -> Runtime:
        if self.config.runtime == "virtual":
            assert isinstance(self.driver, Bmc)
            return VirtualRuntime(self.driver)
        return ProcessRuntime(
            self.store.folder / "work", log_limit=self.config.log_limit_bytes, lease_file=self.lease_file
        )

    def _news(self) -> None:
        if hasattr(self, "sync"):
            self.sync.news.set()

    # --- life

    async def run(self) -> None:
        """Runs until cancelled. What it started goes on: only the control plane, a lease's end or a command stops work."""
        await self._find_inventory()
        self.hosts = HostPower(
            self.inventory["hosts"],
            self.driver,
            self.store,
            self.reports,
            self.events,
            beat_s=self.config.beat_s,
            may_raise=lambda node: not self.blocked(node),
            draining=lambda name: self.placements.draining(name),  # noqa: PLW0108 - made after this
        )
        self.miners = Fleet(
            self.inventory["miners"],
            self.store,
            self.reports,
            self.events,
            poll_s=self.config.miner_poll_s,
            timeout_s=self.config.miner_timeout_s,
            retry_s=self.config.miner_retry_s,
            concurrency=self.config.miner_concurrency,
            driver_name=self.config.miner_driver,
            may_wake=self.may_wake,
        )
        self.placements = Placements(
            self.runtime,
            self.hosts,
            self.driver,
            self.store,
            self.reports,
            self.events,
            site=str(self.identity.get("site", "")),
            addresses=self.config.host_addresses,
            blocked=self.blocked,
            lease_until=self.lease_until,
        )
        self.sync = Sync(
            self.control,
            self.reports,
            self.events,
            wait_s=self.config.wait_s,
            report_s=self.config.report_s,
            backoff_s=self.config.backoff_s,
            apply=self.apply,
            inventory=lambda: self.inventory,
            known=lambda: (self.generation, self.safety_generation),
            hurry=lambda: self.miners.busy() or bool(self.hosts.dirty),
        )
        self.shipper = LogShipper(self.placements, self.runtime, self.control, self.store)
        try:
            await self._look()
            await self.placements.adopt()
            async with asyncio.TaskGroup() as group:
                for loop in (
                    self._watch(),
                    self.miners.run(),
                    self.placements.run(),
                    self.sync.run(),
                    self.shipper.run(),
                ):
                    group.create_task(loop)
                group.create_task(self._forward_news())
        finally:
            await self.control.close()
            await self.driver.close()

    async def _find_inventory(self) -> None:
        said = 0.0
        while True:
            try:
                found = await self.driver.inventory()
            except HostError as error:
                if time.monotonic() - said > 60 or not said:
                    said = time.monotonic()
                    log.warning("the hosts' management network does not answer, trying again (%s)", error)
                await asyncio.sleep(2)
                continue
            self.inventory["hosts"] = found["hosts"]
            self.inventory["miners"] = found["miners"] if self.config.miners is None else self.config.miners
            log.info("%d hosts, %d miners", len(self.inventory["hosts"]), len(self.inventory["miners"]))
            return

    async def _forward_news(self) -> None:
        """Urgent rows wake the telling lane; a look ten times a second is cheaper than a callback in every row."""
        while True:
            await asyncio.sleep(0.1)
            if self.reports.news:
                self.sync.news.set()

    # --- looking and lowering

    async def _watch(self) -> None:
        while True:
            try:
                await self._look()
                await self.hosts.step()
            except Exception:
                log.exception("site loop")
            try:
                async with asyncio.timeout(self.config.poll_s):
                    await self.kick.wait()
                self.kick.clear()
            except TimeoutError:
                pass

    async def _look(self) -> None:
        try:
            poll = await self.driver.poll()
        except HostError as error:
            if self.site_down_since is None:
                self.site_down_since = time.time()
                log.warning("the management network does not answer: nothing is raised (%s)", error)
            self._decide()
            return
        if self.site_down_since is not None:
            self.events.add(
                "management_network_back", self.config.name, down_s=round(time.time() - self.site_down_since)
            )
            self.site_down_since = None
        if isinstance(self.runtime, VirtualRuntime):
            await self._virtual(poll)
        self.hosts.observe(poll.hosts, time.time())
        self.health.observe(poll.hosts)
        if self.config.meter_driver != "none":
            for node, watts, at in poll.meters:
                self.meters[node] = (watts, at)
                self.reports.set("meters", node, [node, watts, to_wire(at)])
        self._decide()

    async def _virtual(self, poll: Poll) -> None:
        assert isinstance(self.runtime, VirtualRuntime)
        if not poll.work and not poll.complete:
            return
        self.runtime.feed(poll.work, complete=poll.complete)
        for row in poll.work:
            item = self.placements.items.get(row["id"])
            if row["state"] == "running" and (item is None or item.phase == "ended"):
                # A host came back with work that was fenced meanwhile.
                self.events.add("stale_work_ended", row["id"], host=row["host"])
                await self.runtime.stop(row["id"], 0, "stopped")
        self.placements.news.set()

    def _decide(self) -> None:
        """The safety loop: only lowers. Facts of devices are gathered only when some node is over its cap."""
        now = time.time()
        over = any(
            w > node.bound_w(now) for name, node in self.tree.nodes.items() if (w := self.meters.get(name, (0, 0.0))[0])
        )
        decision = decide(
            self.tree,
            self.safety["shed_order"],
            self.meters,
            self.miners.facts() if over else {},
            self._host_facts() if over else {},
            self.memory,
            now,
            stale_s=self.config.meter_stale_s,
            settle_s=self.config.settle_s,
            gives_way=self.placements.gives_way() if over else {},
        )
        for node in set(decision.over) - set(self.decision.over):
            self.events.add("over_cap", node, watts=self.meters[node][0], cap_w=self.tree.nodes[node].bound_w(now))
        if decision.stale != self.decision.stale:
            kind = "meter_stale" if decision.stale else "meter_fresh"
            self.events.add(kind, ",".join(decision.stale[:10]), count=len(decision.stale))
        self.decision = decision
        self._lower(decision)

    def _lower(self, decision: Decision) -> None:
        for kind, rows in (("shed", decision.shed), ("cap_hosts", decision.cap_hosts), ("evict", decision.evict)):
            if rows:
                names = [name for name, _ in rows]
                self.events.add("over_cap_shed", rows[0][1], action=kind, count=len(rows), names=names[:50])
        self.miners.shed([name for name, _ in decision.shed], reason="over_cap")
        self.hosts.to_floor([name for name, _ in decision.cap_hosts], reason="over_cap")
        self.placements.evict([name for name, _ in decision.evict], reason="over_cap")
        if self.mode in ("shed", "off"):
            self.miners.shed(self.miners.miners, reason=f"mode_{self.mode}")

    def _host_facts(self) -> dict[str, HostFacts]:
        running = self.placements.running_on()
        return {
            name: HostFacts(name, host.node, host.at_floor, tuple(running.get(name, ())), host.gain_w)
            for name, host in self.hosts.hosts.items()
        }

    def blocked(self, node: str) -> str:
        """Why nothing that hangs at this node may be raised or started now; "" when it may."""
        return self.decision.blocks(
            self.tree.above(node),
            time.time(),
            mode=self.mode,
            lease_until=self.lease_until(),
            hosts_down=self.site_down_since is not None,
        )

    def may_wake(self, node: str) -> bool:
        return not self.blocked(node) and not self.decision.stops_wakes(self.tree.above(node))

    # --- what control says

    def lease_until(self) -> float | None:
        """The end of the site's lease on this machine's clock; None before the first sync."""
        return self.until

    async def apply(self, answer: dict[str, Any], received_at: float) -> None:
        """Puts an answer of a sync to work, unless a later one was applied already."""
        generation = int(answer["generation"])
        if generation < self.generation:
            return
        self.until = lease_end(answer, received_at)
        if not 0 <= self.until - self.lease_written < LEASE_STEP_S:
            # What the supervisors see may be a little older, and so a little stricter, than what the agent knows.
            self.lease_written = self.until
            write_private(self.lease_file, {"until": self.until})
        mode = str(answer.get("mode", "hold"))
        if mode not in MODES:
            log.warning("control names a mode that this agent does not know: %r; holding", mode)
            mode = "hold"
        if mode != self.mode:
            self.events.add("mode_changed", self.config.name, mode=mode, before=self.mode)
        self.mode = mode
        safety = answer.get("safety")
        if safety and int(safety["generation"]) > self.safety_generation:
            self.safety, self.safety_generation = safety, int(safety["generation"])
            self.tree = Tree(safety["nodes"])
        if answer.get("hosts"):
            self.hosts.apply(answer["hosts"])
        if answer.get("miners"):
            self.miners.apply(answer["miners"])
        if answer.get("placements") is not None:
            self.placements.apply(answer["placements"])
        if self.mode == "off":
            self.placements.drain_all()
        changed = generation != self.generation or safety
        self.generation = generation
        if changed or mode != self.kept_mode:
            self.kept_mode = mode
            fact = {
                "generation": generation,
                "safety_generation": self.safety_generation,
                "safety": self.safety,
                "mode": self.mode,
            }
            self.store.put("fact", "control", fact)
        self.kick.set()
