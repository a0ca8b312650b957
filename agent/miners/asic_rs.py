"""Machines of other firmwares, by the `pyasic-rs` package (an extra; docs/agent.md names what it drives).

The package finds the firmware by itself, at the ports that the firmware has; a machine's row gives the address alone. What it
does not say, we do not guess: it answers None alike where nobody is there, where the answer is cut off and where the firmware is in
trouble, so all of these are `unreachable`, and only our own timeout is told apart (its own are 5 and 10 s). It calls a sleeping LuxOS
machine mining: whether one sleeps is told from its watts and hashes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

from pyasic_rs import MinerFactory
from pyasic_rs.data import HashRateUnit

from agent.miners import Capabilities, Identity, MinerError, MinerReading

T = TypeVar("T")
PAUSE_S = 1.0


class AsicRsMiner:
    """A miner at `host`. `modes` is its ladder [(name, W, GH/s)], index 0 is sleep, the last what it does when it is resumed."""

    def __init__(self, host: str, modes: Sequence[Sequence[Any]], *, timeout_s: float = 4.0) -> None:
        self.host, self.timeout_s = host, timeout_s
        self.modes = tuple((str(m), int(w), int(g)) for m, w, g in modes)
        # Without a look at open ports first: a machine that we are told of is there, or says nothing.
        self.factory = MinerFactory().with_port_check(False)
        self.found: Any = None  # the firmware's handle

    @property
    def sleep_mode(self) -> str:
        return self.modes[0][0]

    async def _ask(self, what: str, answer: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(self.timeout_s):
                return await answer
        except TimeoutError as error:
            raise MinerError("timeout", f"{self.host}: no {what} in {self.timeout_s:g} s") from error
        except (RuntimeError, OSError) as error:
            raise MinerError(_kind(str(error)), f"{self.host}: {what}: {error}") from error

    async def _handle(self) -> Any:
        if self.found is None:
            self.found = await self._ask("firmware", self.factory.get_miner(self.host))
        if self.found is None:
            raise MinerError("unreachable", f"{self.host}: no machine that the driver knows")
        return self.found

    async def identify(self) -> Identity:
        miner = await self._handle()
        serial = await self._ask("serial number", miner.get_serial_number())
        version = await self._ask("firmware version", miner.get_firmware_version())
        return Identity(f"{miner.make} {miner.model}", " ".join(filter(None, (miner.firmware, version))), serial or "")

    async def read(self) -> MinerReading:
        miner = await self._handle()
        watts = await self._ask("wattage", miner.get_wattage())
        hashes = await self._ask("hash rate", miner.get_hashrate())
        if watts is None or hashes is None:
            raise MinerError("unreachable", f"{self.host}: no {'wattage' if watts is None else 'hash rate'}")
        gh_s = round(hashes.as_unit(HashRateUnit.GigaHash).value)
        if gh_s == 0 and watts <= (self.modes[0][1] + self.modes[1][1]) / 2:
            return MinerReading(self.sleep_mode, round(watts), 0)
        return MinerReading(await self._mode(miner), round(watts), gh_s)

    async def _mode(self, miner: Any) -> str:
        """The mode of the ladder nearest to the watts that it is set to; of a firmware that does not say, its top."""
        target = await self._ask("tuning target", miner.get_tuning_target())
        watts = getattr(target, "watts", None)
        if watts is None:
            return self.modes[-1][0]
        return min(self.modes[1:], key=lambda mode: abs(mode[1] - watts))[0]

    async def sleep(self) -> None:
        await self._do("pause", "supports_pause")

    async def wake(self) -> None:
        await self._do("resume", "supports_resume")

    async def _do(self, verb: str, supports: str, *arguments: Any) -> None:
        miner = await self._handle()
        if not getattr(miner, supports):
            raise MinerError("refused", f"{self.host}: {miner.firmware} has no {verb}")
        try:
            done = await self._ask(verb, getattr(miner, verb)(*arguments))
        except MinerError as error:
            if error.kind != "session":
                raise
            # Somebody took the session that the handle knows: once more, with a handle that knows none.
            self.found = None
            await asyncio.sleep(PAUSE_S)
            done = await self._ask(verb, getattr(await self._handle(), verb)(*arguments))
        if not done:
            raise MinerError("refused", f"{self.host}: {verb} was refused")

    async def set_mode(self, mode: str) -> None:
        """Any mode of the ladder by name; one that is not what it is set to needs a firmware that takes watts."""
        if mode == self.sleep_mode:
            await self.sleep()
            return
        watts = next((w for name, w, _ in self.modes if name == mode), None)
        if watts is None:
            raise MinerError("refused", f"{self.host} has no mode {mode!r}")
        if await self._mode(await self._handle()) != mode:
            await self._do("set_power_limit", "supports_set_power_limit", float(watts))
        await self.wake()

    async def set_watts(self, watts: int) -> str:
        fitting = [(w, name) for name, w, _ in self.modes[1:] if w <= watts]
        if not fitting:
            raise MinerError("refused", f"{self.host}: {watts} W is below its lowest mode")
        limit, name = max(fitting)
        await self._do("set_power_limit", "supports_set_power_limit", float(limit))
        return name

    async def capabilities(self) -> Capabilities:
        miner = await self._handle()
        settable = bool(miner.supports_set_power_limit)
        modes = self.modes
        if not settable:
            now = await self._mode(miner)
            modes = (self.modes[0], *(mode for mode in self.modes[1:] if mode[0] == now))
        return Capabilities(sleep=bool(miner.supports_pause and miner.supports_resume), set_watts=settable, modes=modes)


def _kind(text: str) -> str:
    """What the package's one kind of error means, by its words in the version that is pinned."""
    if "error status" not in text:
        return "unreachable"
    return "session" if "session" in text.lower() else "refused"
