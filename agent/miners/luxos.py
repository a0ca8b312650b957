"""LuxOS over TCP 4028: one JSON object per connection, privileged commands under a session."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Sequence
from typing import Any

from agent.miners import Capabilities, Identity, MinerError, MinerReading

MAX_ANSWER = 1024 * 1024


class LuxosMiner:
    """A miner at (host, port). `modes` is its ladder [(name, W, GH/s)], index 0 is sleep; other names are profiles."""

    def __init__(self, host: str, port: int, modes: Sequence[Sequence[Any]], *, timeout_s: float = 4.0) -> None:
        self.host, self.port, self.timeout_s = host, port, timeout_s
        self.modes = tuple((str(m), int(w), int(g)) for m, w, g in modes)

    @property
    def sleep_mode(self) -> str:
        return self.modes[0][0]

    # --- the wire

    async def call(self, command: str, parameter: str = "") -> dict[str, Any]:
        """The answer to one command, whatever its status. Raises MinerError unreachable, timeout or garbled."""
        request = {"command": command, "parameter": parameter} if parameter else {"command": command}
        try:
            async with asyncio.timeout(self.timeout_s):
                raw = await self._exchange(json.dumps(request).encode())
        except TimeoutError as error:
            raise MinerError("timeout", f"{self.host}: no answer to {command} in {self.timeout_s:g} s") from error
        except OSError as error:
            raise MinerError("unreachable", f"{self.host}: {error.strerror or type(error).__name__}") from error
        try:
            answer = json.loads(raw.rstrip(b"\0\r\n "))
        except ValueError as error:
            kind = "garbled" if raw else "unreachable"
            raise MinerError(kind, f"{self.host}: {len(raw)} bytes that are not JSON, to {command}") from error
        if not isinstance(answer, dict):
            raise MinerError("garbled", f"{self.host}: not an object, to {command}")
        return answer

    async def _exchange(self, request: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            writer.write(request)
            await writer.drain()
            data = b""
            while not data.endswith(b"\0") and len(data) < MAX_ANSWER:
                more = await reader.read(65_536)
                if not more:
                    break
                data += more
            return data
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def checked(self, command: str, parameter: str = "") -> dict[str, Any]:
        """As `call`; an E status raises MinerError session (the session is not ours) or refused."""
        answer = await self.call(command, parameter)
        self._check(answer, command)
        return answer

    def _check(self, answer: dict[str, Any], command: str) -> None:
        try:
            status = answer["STATUS"][0]
            flag, message = str(status["STATUS"]), str(status.get("Msg", ""))
        except (KeyError, IndexError, TypeError) as error:
            raise MinerError("garbled", f"{self.host}: no status, to {command}") from error
        if flag in ("E", "F"):
            raise MinerError(
                "session" if "session" in message.lower() else "refused", f"{self.host}: {command}: {message}"
            )

    @staticmethod
    def _row(answer: dict[str, Any], section: str, index: int = 0) -> dict[str, Any]:
        try:
            row = answer[section][index]
        except (KeyError, IndexError, TypeError) as error:
            raise MinerError("garbled", f"no {section} in the answer") from error
        return row if isinstance(row, dict) else {}

    # --- the protocol

    async def identify(self) -> Identity:
        version = self._row(await self.checked("version"), "VERSION")
        config = self._row(await self.checked("config"), "CONFIG")
        return Identity(
            str(version.get("Type", "")), f"LUXminer {version.get('LUXminer', '')}", str(config.get("SerialNumber", ""))
        )

    async def read(self) -> MinerReading:
        answer = await self.call("config+power+stats")
        parts = []
        for name in ("config", "power", "stats"):
            try:
                part = answer[name][0]
            except (KeyError, IndexError, TypeError) as error:
                # A firmware in trouble answers the whole with one error status.
                self._check(answer, "config+power+stats")
                raise MinerError("garbled", f"{self.host}: no {name} in the answer") from error
            self._check(part, name)
            parts.append(part)
        config, power = self._row(parts[0], "CONFIG"), self._row(parts[1], "POWER")
        try:
            watts = int(power["Watts"])
            gh_s = int(float(self._row(parts[2], "STATS", 1)["GHS 5s"]))
            asleep = str(config["CurtailMode"]).lower() == "sleep"
            profile = str(config["Profile"])
        except (KeyError, TypeError, ValueError) as error:
            raise MinerError("garbled", f"{self.host}: a field is missing: {error}") from error
        return MinerReading(self.sleep_mode if asleep else profile, watts, gh_s)

    async def _privileged(self, *commands: tuple[str, str]) -> None:
        """Runs commands under one session; once more with a fresh one when somebody took it. Ends the session."""
        for attempt in (1, 2):
            try:
                session = str(self._row(await self.checked("logon"), "SESSION").get("SessionID", ""))
                try:
                    for command, argument in commands:
                        await self.checked(command, f"{session},{argument}")
                finally:
                    with contextlib.suppress(MinerError):
                        await self.call("logoff", session)
            except MinerError as error:
                if error.kind != "session" or attempt == 2:
                    raise
                await asyncio.sleep(1.0)
            else:
                return

    async def sleep(self) -> None:
        await self._privileged(("curtail", "sleep"))

    async def wake(self) -> None:
        await self._privileged(("curtail", "wakeup"))

    async def set_mode(self, mode: str) -> None:
        """Any mode of the ladder by name. A profile is set before the wake, so that the machine never ramps past it."""
        if mode == self.sleep_mode:
            await self.sleep()
        elif mode in [name for name, _, _ in self.modes]:
            await self._privileged(("profileset", mode), ("curtail", "wakeup"))
        else:
            raise MinerError("refused", f"{self.host} has no mode {mode!r}")

    async def set_watts(self, watts: int) -> str:
        fitting = [(w, name) for name, w, _ in self.modes[1:] if w <= watts]
        if not fitting:
            raise MinerError("refused", f"{self.host}: {watts} W is below its lowest mode")
        name = max(fitting)[1]
        await self._privileged(("profileset", name))
        return name

    async def capabilities(self) -> Capabilities:
        rows = (await self.checked("profiles")).get("PROFILES", [])
        try:
            profiles = [(str(r["Profile Name"]), int(r["Watts"]), round(float(r["Hashrate"]) * 1000)) for r in rows]
        except (KeyError, TypeError, ValueError) as error:
            raise MinerError("garbled", f"{self.host}: profiles: {error}") from error
        return Capabilities(sleep=True, set_watts=True, modes=(self.modes[0], *profiles))
