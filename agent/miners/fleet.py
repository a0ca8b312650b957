"""All miners of a site: one asyncio fan-out that commands, reads, re-asserts and reports them.

A command carries control's generation; an older one than the last applied is ignored. Lowering (sleep, a lower mode) is
done at once and repeated until the firmware says so; raising needs a generation newer than anything the safety loop
latched, and is held while `may_wake` says no. A machine found hashing although it was sent to sleep is sent again; one found
asleep although it was woken is left to control, which sees the reading.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from agent.events import Events
from agent.miners import MinerDriver, MinerError, MinerReading
from agent.miners.luxos import LuxosMiner
from agent.reports import Reports
from agent.safety import MinerFacts
from agent.store import Store
from agent.times import to_wire

log = logging.getLogger("agent.miners")
FAST_S = 1.0
SETTLE_LIMIT_S = 120.0
PATIENCE = 2  # commands without effect before an event tells of it


@dataclass
class Miner:
    row: dict[str, Any]
    driver: MinerDriver
    want: str = ""  # mode; "" = control never commanded this machine
    generation: int = 0  # of `want`
    applied: int = 0  # last generation whose command was acknowledged
    latched: int = -1  # the safety loop slept it: only a generation above this wakes it
    reading: MinerReading | None = None
    read_at: float = 0.0
    due: float = 0.0
    settle_until: float = 0.0
    commanded_at: float = 0.0
    tries: int = 0
    failures: int = 0
    busy: bool = False
    obeyed: bool = False  # it slept when it was told to
    watts_of: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.row["name"])

    @property
    def sleep_mode(self) -> str:
        return str(self.row["modes"][0][0])

    @property
    def target(self) -> str:
        """The mode that shall be: what control wants, or sleep while latched."""
        return self.sleep_mode if self.latched >= self.generation else self.want

    def watts_in(self, mode: str) -> int:
        """Nameplate W of a mode; an unknown mode counts as the top."""
        return self.watts_of.get(mode, max(self.watts_of.values()))


class Fleet:
    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        store: Store,
        reports: Reports,
        events: Events,
        *,
        poll_s: float,
        timeout_s: float,
        retry_s: float,
        concurrency: int,
        may_wake: Callable[[str], bool],
    ) -> None:
        self.store, self.reports, self.events, self.may_wake = store, reports, events, may_wake
        self.poll_s, self.retry_s = poll_s, retry_s
        self.gate = asyncio.Semaphore(concurrency)
        self.wake_up = asyncio.Event()
        self.miners: dict[str, Miner] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        known = store.all("miner")
        now = time.monotonic()
        for i, row in enumerate(rows):
            host, _, port = str(row["address"]).rpartition(":")
            driver = LuxosMiner(host, int(port), row["modes"], timeout_s=timeout_s)
            miner = Miner(row, driver, watts_of={str(m): int(w) for m, w, _ in row["modes"]})
            # Spread the first readings over a poll interval of at most a few seconds.
            miner.due = now + min(poll_s, 5.0) * i / max(1, len(rows))
            if kept := known.get(miner.name):
                miner.want, miner.generation = kept["want"], kept["generation"]
                miner.applied, miner.latched = kept["applied"], kept["latched"]
            self.miners[miner.name] = miner

    # --- what shall be

    def apply(self, rows: Iterable[Sequence[Any]]) -> None:
        """[name, mode, generation] rows of a sync. Older generations, unknown machines and unknown modes change nothing."""
        with self.store.batch():
            for name, mode, generation in rows:
                miner = self.miners.get(name)
                if miner is None or generation <= miner.generation:
                    continue
                if mode not in miner.watts_of:
                    self.events.add("miner_command_refused", name, mode=mode, generation=generation)
                    continue
                miner.want, miner.generation, miner.tries, miner.obeyed = mode, int(generation), 0, False
                miner.due, miner.settle_until = 0.0, time.monotonic() + SETTLE_LIMIT_S
                self._keep(miner)
        self.wake_up.set()

    def shed(self, names: Iterable[str], *, reason: str, node: str = "") -> None:
        """The agent's own lowering: sleeps machines and latches them until control sends a newer generation."""
        with self.store.batch():
            for name in names:
                miner = self.miners.get(name)
                if miner is None or miner.latched >= miner.generation:
                    continue
                miner.latched, miner.tries = miner.generation, 0
                miner.due, miner.settle_until = 0.0, time.monotonic() + SETTLE_LIMIT_S
                self._keep(miner)
                self.events.add("miner_shed", name, reason=reason, node=node)
        self.wake_up.set()

    def _keep(self, miner: Miner) -> None:
        kept = {"want": miner.want, "generation": miner.generation, "applied": miner.applied, "latched": miner.latched}
        self.store.put("miner", miner.name, kept)

    def facts(self) -> dict[str, MinerFacts]:
        found = {}
        for name, miner in self.miners.items():
            watts = miner.reading.watts if miner.reading else miner.watts_in("")
            sleep_w = miner.watts_of[miner.sleep_mode]
            shed = miner.latched >= miner.generation or (miner.target == miner.sleep_mode and miner.want != "")
            found[name] = MinerFacts(name, str(miner.row["power_node"]), watts, sleep_w, shed)
        return found

    def busy(self) -> bool:
        """Some machine is on its way to another mode."""
        now = time.monotonic()
        return any(m.settle_until > now for m in self.miners.values())

    # --- the fan-out

    async def run(self) -> None:
        try:
            while True:
                self.wake_up.clear()
                now = time.monotonic()
                nearest = now + 5.0
                for miner in self.miners.values():
                    if miner.busy:
                        continue
                    if miner.due <= now:
                        miner.busy = True
                        task = asyncio.create_task(self._turn(miner))
                        self.tasks.add(task)
                        task.add_done_callback(self.tasks.discard)
                    else:
                        nearest = min(nearest, miner.due)
                try:
                    async with asyncio.timeout(max(0.1, nearest - time.monotonic())):
                        await self.wake_up.wait()
                except TimeoutError:
                    pass
        finally:
            for task in self.tasks:
                task.cancel()
            await asyncio.gather(*self.tasks, return_exceptions=True)

    async def _turn(self, miner: Miner) -> None:
        async with self.gate:
            started = time.monotonic()
            miner.due = started + self.poll_s
            try:
                if self._must_command(miner, started):
                    await self._command(miner)
                miner.reading = await miner.driver.read()
                miner.read_at = time.time()
                miner.failures = 0
                self._after_reading(miner)
            except MinerError as error:
                self._failed(miner, error)
            except Exception:
                log.exception("miner %s", miner.name)
            finally:
                miner.busy = False

    def _must_command(self, miner: Miner, now: float) -> bool:
        target = miner.target
        if not target:
            return False
        fresh = miner.generation > miner.applied
        mode = miner.reading.mode if miner.reading else ""
        lowering = miner.watts_in(target) < miner.watts_in(mode) or target == miner.sleep_mode
        rested = now - miner.commanded_at > self._pause(miner)
        if lowering:
            return rested and (mode != target or (fresh and miner.latched < miner.generation))
        if not fresh and (mode == target or miner.tries == 0 or miner.tries >= PATIENCE or now > miner.settle_until):
            # Woken and asleep again (or it never rose): control sees the reading, and a raise is control's to order.
            return False
        if not rested:
            return False
        if not self.may_wake(str(miner.row["power_node"])):
            miner.due = now + FAST_S
            return False
        return True

    def _pause(self, miner: Miner) -> float:
        return 0.0 if miner.tries == 0 else self.retry_s if miner.tries < PATIENCE else 3 * self.retry_s

    async def _command(self, miner: Miner) -> None:
        target, generation = miner.target, miner.generation
        latched = miner.latched >= generation
        miner.commanded_at = time.monotonic()
        miner.tries += 1
        await miner.driver.set_mode(target)
        if not latched and generation > miner.applied and generation == miner.generation:
            miner.applied = generation
            self._keep(miner)

    def _after_reading(self, miner: Miner) -> None:
        assert miner.reading is not None
        now = time.monotonic()
        reading, target = miner.reading, miner.target
        if miner.settle_until > now:
            goal = miner.watts_in(target) if target else reading.watts
            settled = reading.mode == target and abs(reading.watts - goal) <= 0.15 * miner.watts_in("")
            if settled:
                miner.settle_until = min(miner.settle_until, now + 3 * FAST_S)
            miner.due = min(miner.due, now + FAST_S)
        if target == miner.sleep_mode and reading.mode == target:
            miner.obeyed = True
        elif target == miner.sleep_mode and miner.obeyed:
            # It came back by itself (a reboot, another controller): down again.
            miner.obeyed, miner.tries = False, 0
            miner.settle_until, miner.due = now + SETTLE_LIMIT_S, 0.0
            self.wake_up.set()
            self.events.add("miner_found_hashing", miner.name, mode=reading.mode, watts=reading.watts)
        if miner.tries == PATIENCE and target and reading.mode != target and now - miner.commanded_at > 1.0:
            miner.tries += 1
            self.events.add("miner_unresponsive", miner.name, mode=reading.mode, wanted=target, watts=reading.watts)
        self.report(miner, urgent=miner.settle_until > now)

    def _failed(self, miner: Miner, error: MinerError) -> None:
        miner.failures += 1
        log.debug("%s", error)
        if miner.failures == 3:
            self.events.add("miner_not_answering", miner.name, problem=error.kind, text=str(error))
        # A machine that must go down is asked again soon; another one waits its turn, longer while it keeps failing.
        urgent = miner.settle_until > time.monotonic() and miner.failures < 10
        miner.due = time.monotonic() + (2 * FAST_S if urgent else self.poll_s * min(4, miner.failures))

    def report(self, miner: Miner, *, urgent: bool = False) -> None:
        if miner.reading is None:
            return
        reading = miner.reading
        row = [miner.name, reading.mode, miner.applied, reading.watts, reading.gh_s, to_wire(miner.read_at)]
        self.reports.set("miners", miner.name, row, urgent=urgent)
