"""The sync loop: two lanes, one waiting at control for news, one telling ours; both level-triggered and safe to lose.

What an answer says is applied only if its `generation` is not older than one already applied.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

from agent.control import Control, ControlError
from agent.events import Events
from agent.reports import Reports
from agent.times import from_wire, to_wire

log = logging.getLogger("agent.sync")
FULL_S = 60.0
DEBOUNCE_S = 0.25
SAY_S = 60.0
BACKOFF_FROM_S = 0.5


class Sync:
    """`apply(answer, received_at)` puts an answer to work; `inventory()` is what control shall know of the site's hardware."""

    def __init__(
        self,
        control: Control,
        reports: Reports,
        events: Events,
        *,
        wait_s: float,
        report_s: float,
        backoff_s: float,
        apply: Callable[[dict[str, Any], float], Awaitable[None]],
        inventory: Callable[[], dict[str, Any]],
        known: Callable[[], tuple[int, int]],
        hurry: Callable[[], bool],
    ) -> None:
        self.control, self.reports, self.events = control, reports, events
        self.wait_s, self.report_s, self.backoff_s = wait_s, report_s, backoff_s
        self.apply, self.inventory, self.known, self.hurry = apply, inventory, known, hurry
        self.boot = str(uuid.uuid4())
        self.sequence = 0
        self.full_at = 0.0
        self.inventory_due = True
        self.news = asyncio.Event()
        self.random = Random()
        self.failures = 0
        self.said_at = 0.0
        self.last_ok = 0.0
        self.answered = asyncio.Event()  # set by the first good sync
        self._apply_lock = asyncio.Lock()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._wait_lane())
            group.create_task(self._tell_lane())

    async def _wait_lane(self) -> None:
        while True:
            if await self._guarded(self.wait_s):
                # A control plane that answers at once without news must not turn this into a storm.
                await asyncio.sleep(0.05)
            else:
                await asyncio.sleep(self._pause())

    async def _tell_lane(self) -> None:
        await self.answered.wait()
        while True:
            period = min(1.0, self.report_s) if self.hurry() else self.report_s
            try:
                async with asyncio.timeout(period):
                    await self.news.wait()
                await asyncio.sleep(DEBOUNCE_S)
            except TimeoutError:
                pass
            self.news.clear()
            self.reports.news = False
            if (self.reports.pending() or self.events.waiting) and not await self._guarded(0):
                await asyncio.sleep(self._pause())
                self.news.set()

    def _pause(self) -> float:
        """Exponential with full jitter, so that a thousand sites do not return in one instant."""
        return self.random.uniform(
            BACKOFF_FROM_S / 2, min(self.backoff_s, BACKOFF_FROM_S * 2 ** min(self.failures, 10))
        )

    async def _guarded(self, wait_s: float) -> bool:
        """One sync; False when it failed. Says so at most once a minute."""
        try:
            await self.once(wait_s)
        except ControlError as error:
            self.failures += 1
            now = time.monotonic()
            if now - self.said_at >= SAY_S or self.failures == 1:
                self.said_at = now
                log.warning("%s", self._explain(error))
            if error.retry_after:
                await asyncio.sleep(min(error.retry_after, 60.0))
            return False
        except Exception:
            self.failures += 1
            log.exception("sync")
            return False
        if self.failures:
            log.info("the control plane answers again after %d failed calls", self.failures)
        self.failures = 0
        return True

    @staticmethod
    def _explain(error: ControlError) -> str:
        if error.kind == "unauthorized":
            return f"the control plane refuses this agent's key: enrol again, or ask the operator ({error})"
        if error.kind == "clock_skew":
            return (
                f"this machine's clock differs by more than 30 s from the control plane's: nothing is applied ({error})"
            )
        if error.kind == "refused":
            return f"the control plane refuses what this agent tells it; mend the configuration: running work goes on ({error})"
        return f"the control plane does not answer; running work goes on, nothing is raised, trying again ({error})"

    async def once(self, wait_s: float) -> None:
        """One call: what is seen goes up, what shall be comes down. Raises ControlError."""
        now = time.monotonic()
        full = now - self.full_at >= FULL_S
        if full:
            self.full_at = now
        self.sequence += 1
        rows, versions = self.reports.collect(full=full)
        generation, safety = self.known()
        with_inventory = self.inventory_due
        body = {
            "boot": self.boot,
            "sequence": self.sequence,
            "agent_time": to_wire(time.time()),
            "full": full,
            "known_generation": generation,
            "known_safety": safety,
            "wait_s": wait_s,
            "inventory": self.inventory() if with_inventory else None,
            "events": self.events.batch(),
            **rows,
        }
        try:
            answer = await self.control.sync(body)
        except BaseException:
            if full:
                self.full_at = 0.0
            raise
        async with self._apply_lock:
            self.reports.acknowledge(versions)
            self.events.acknowledge(str(key) for key in answer.get("acknowledged_events", []))
            self.inventory_due = bool(answer.get("inventory_wanted")) or (self.inventory_due and not with_inventory)
            self.last_ok = time.time()
            await self.apply(answer, time.time())
        self.answered.set()
        self.news.set() if self.reports.news or self.inventory_due else None


def lease_end(answer: dict[str, Any], received_at: float) -> float:
    """The lease's end on this machine's clock (epoch seconds): control's clock may differ by some seconds."""
    return received_at + from_wire(answer["lease_until"]) - from_wire(answer["server_time"])
