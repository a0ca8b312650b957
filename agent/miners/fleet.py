"""All miners of a site: commanded, read, re-asserted and reported, a thousand to a fan-out.

A command carries control's generation; an older one than the last applied is ignored. Lowering (sleep, a lower mode) is
done at once and repeated until the firmware says so; raising needs a generation newer than anything the safety loop
latched, and is held while `may_wake` says no. A machine found hashing although it was sent to sleep is sent again; one found
asleep although it was woken is left to control, which sees the reading.

A machine that fails three turns in a row is given up (`Miner.broken`): it is only read, ever less often, until it answers; then
what it missed is commanded at once. Meanwhile it counts at its nameplate, and nothing is expected to come of it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from agent.events import Events
from agent.miners import MinerError
from agent.miners.adapters import LUXOS, driver_of
from agent.miners.fanout import FanOut, by_pdu, lanes, shards
from agent.miners.miner import BREAK_AFTER, Miner
from agent.miners.segments import Segment
from agent.reports import Reports
from agent.safety import MinerFacts
from agent.store import Store
from agent.times import to_wire

log = logging.getLogger("agent.miners")
FAST_S = 1.0
RAMP_S = 2.0  # a machine that goes down is not there sooner: a look before that is a look wasted
SETTLE_LIMIT_S = 120.0
PROOFS = 3  # readings of a machine that has settled: two prove a sleep, and two in one report count as one
PATIENCE = 2  # commands without effect before an event tells of it
LONGEST_S = 60.0  # between two probes of a machine that does not answer


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
        driver_name: str = LUXOS,
        may_wake: Callable[[str], bool],
    ) -> None:
        self.store, self.reports, self.events, self.may_wake = store, reports, events, may_wake
        self.poll_s, self.retry_s = poll_s, retry_s
        self.miners: dict[str, Miner] = {}
        self.unkept: set[Miner] = set()
        known = store.all("miner")
        now = time.monotonic()
        for i, row in enumerate(rows):
            driver = driver_of(row, default=driver_name, timeout_s=timeout_s)
            miner = Miner(row, driver, watts_of={str(m): int(w) for m, w, _ in row["modes"]})
            # Spread the first readings over a poll interval of at most a few seconds.
            miner.due = now + min(poll_s, 5.0) * i / max(1, len(rows))
            if kept := known.get(miner.name):
                miner.want, miner.generation = kept["want"], kept["generation"]
                miner.applied, miner.latched = kept["applied"], kept["latched"]
            self.miners[miner.name] = miner
        parts = shards(self.miners.values())
        lines = lanes(concurrency, len(parts))
        self.fanouts = [FanOut(part, lines, self._turn) for part in parts]
        self.home = {miner: fanout for fanout in self.fanouts for miner in fanout.miners}
        self.segments = {
            pdu: Segment(pdu, below, events, ask=self._ask, wait_s=timeout_s + FAST_S)
            for pdu, below in by_pdu(self.miners.values()).items()
        }

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
                self._hurry(miner)
                self._keep(miner)

    def shed(self, names: Iterable[str], *, reason: str, node: str = "") -> None:
        """The agent's own lowering: sleeps machines and latches them until control sends a newer generation."""
        with self.store.batch():
            for name in names:
                miner = self.miners.get(name)
                if miner is None or miner.latched >= miner.generation:
                    continue
                miner.latched, miner.tries = miner.generation, 0
                self._hurry(miner)
                self._keep(miner)
                self.events.add("miner_shed", name, reason=reason, node=node)

    def _ask(self, miner: Miner) -> None:
        self.home[miner].ask(miner)

    def _hurry(self, miner: Miner) -> None:
        miner.settle_until, miner.settled = time.monotonic() + SETTLE_LIMIT_S, 0
        self._ask(miner)

    def _keep(self, miner: Miner) -> None:
        kept = {"want": miner.want, "generation": miner.generation, "applied": miner.applied, "latched": miner.latched}
        self.store.put("miner", miner.name, kept)

    def facts(self) -> dict[str, MinerFacts]:
        found = {}
        for name, miner in self.miners.items():
            watts = miner.reading.watts if miner.reading and not miner.broken else miner.watts_in("")
            sleep_w = miner.watts_of[miner.sleep_mode]
            shed = miner.latched >= miner.generation or (miner.target == miner.sleep_mode and miner.want != "")
            found[name] = MinerFacts(name, miner.pdu, watts, sleep_w, shed, answers=not miner.broken)
        return found

    def busy(self) -> bool:
        """Some machine is on its way to another mode."""
        now = time.monotonic()
        return any(m.settle_until > now for m in self.miners.values())

    # --- turns

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for fanout in self.fanouts:
                    group.create_task(fanout.run())
                while True:
                    await asyncio.sleep(FAST_S)
                    try:
                        self._housekeep()
                    except Exception:
                        log.exception("miners")
        finally:
            self._housekeep()

    def _housekeep(self) -> None:
        """Judges who is silent, and writes what was applied: a command that is forgotten is only given once more."""
        for segment in self.segments.values():
            segment.judge(time.monotonic())
        if self.unkept:
            with self.store.batch():
                for miner in self.unkept:
                    self._keep(miner)
            self.unkept.clear()

    async def _turn(self, miner: Miner) -> None:
        """A command or a reading: what a command has done shows some time after it."""
        started = time.monotonic()
        regular = miner.due = started + self.poll_s
        try:
            if not miner.broken and self._must_command(miner, started):
                await self._command(miner)
                down = miner.target == miner.sleep_mode
                miner.due = min(miner.due, time.monotonic() + (RAMP_S if down else FAST_S))
                self._answered(miner)
            else:
                miner.reading = await miner.driver.read()
                miner.read_at = time.time()
                self._answered(miner)
                self._after_reading(miner)
        except MinerError as error:
            self._failed(miner, error, asked=miner.due < regular)
        except Exception:
            log.exception("miner %s", miner.name)

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
        if not self.may_wake(miner.pdu):
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
            self.unkept.add(miner)

    def _after_reading(self, miner: Miner) -> None:
        assert miner.reading is not None
        now = time.monotonic()
        reading, target = miner.reading, miner.target
        if miner.settle_until > now:
            goal = miner.watts_in(target) if target else reading.watts
            near = reading.mode == target and abs(reading.watts - goal) <= 0.1 * miner.watts_in("")
            miner.settled = miner.settled + 1 if near else 0
            if miner.settled >= PROOFS:
                miner.settle_until = now
            else:
                miner.due = min(miner.due, now + FAST_S)
        if target == miner.sleep_mode and reading.mode == target:
            miner.obeyed = True
        elif target == miner.sleep_mode and miner.obeyed:
            # It came back by itself (a reboot, another controller): down again.
            miner.obeyed, miner.tries = False, 0
            self._hurry(miner)
            self.events.add("miner_found_hashing", miner.name, mode=reading.mode, watts=reading.watts)
        if miner.tries == PATIENCE and target and reading.mode != target and now - miner.commanded_at > 1.0:
            miner.tries += 1
            self.events.add("miner_unresponsive", miner.name, mode=reading.mode, wanted=target, watts=reading.watts)
        self.report(miner, urgent=miner.settle_until >= now)

    def _answered(self, miner: Miner) -> None:
        given_up, miner.failures, miner.problem = miner.broken, 0, ""
        if given_up:
            miner.due = 0.0  # what it missed
            self.segments[miner.pdu].answered(miner, time.monotonic())

    def _failed(self, miner: Miner, error: MinerError, *, asked: bool) -> None:
        """Soon once more where something is waited for; twice as late each time when it has been given up."""
        log.debug("%s", error)
        now = time.monotonic()
        miner.failures += 1
        miner.problem = error.kind
        if miner.failures == BREAK_AFTER:
            self.segments[miner.pdu].broke(miner, str(error), now)
        pause = 2 * FAST_S if miner.settle_until > now else self.poll_s
        if miner.broken:
            pause = max(pause, min(LONGEST_S, pause * 2.0 ** (miner.failures - BREAK_AFTER)))
        if not asked:  # meanwhile, by somebody: that turn is still to come
            miner.due = now + pause

    def report(self, miner: Miner, *, urgent: bool = False) -> None:
        if miner.reading is None:
            return
        reading = miner.reading
        row = [miner.name, reading.mode, miner.applied, reading.watts, reading.gh_s, to_wire(miner.read_at)]
        self.reports.set("miners", miner.name, row, urgent=urgent)
