"""LuxOS over TCP 4028: JSON, privileged commands under a session.

Commands: version config profiles pools groups stats power for what is, logon curtail profileset logoff for what shall be, session
to see who holds the only session there is. A session ends after a minute without use; sessions guard against two who configure
at once, not against enemies (docs.luxor.tech/firmware/api/sessions).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Sequence
from typing import Any

from agent.miners import Capabilities, Identity, MinerError, MinerReading, Pool
from agent.miners.line import Line

PAUSE_S = 1.0  # before asking again for a session that somebody else holds


class LuxosMiner:
    """A miner at (host, port). `modes` is its ladder [(name, W, GH/s)], index 0 is sleep; other names are profiles."""

    def __init__(self, host: str, port: int, modes: Sequence[Sequence[Any]], *, timeout_s: float = 4.0) -> None:
        self.host, self.timeout_s = host, timeout_s
        self.line = Line(host, port)
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
                raw = await self.line.ask(json.dumps(request).encode())
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
        with contextlib.closing(self.line):
            version = self._row(await self.checked("version"), "VERSION")
            config = self._row(await self.checked("config"), "CONFIG")
        return Identity(
            str(version.get("Type", "")), f"LUXminer {version.get('LUXminer', '')}", str(config.get("SerialNumber", ""))
        )

    async def read(self) -> MinerReading:
        with contextlib.closing(self.line):
            config, power, stats = await self._joined("config", "power", "stats")
        try:
            watts = int(self._row(power, "POWER")["Watts"])
            gh_s = int(float(self._row(stats, "STATS", 1)["GHS 5s"]))
            asleep = str(self._row(config, "CONFIG")["CurtailMode"]).lower() == "sleep"
            profile = str(self._row(config, "CONFIG")["Profile"])
        except (KeyError, TypeError, ValueError) as error:
            raise MinerError("garbled", f"{self.host}: a field is missing: {error}") from error
        return MinerReading(self.sleep_mode if asleep else profile, watts, gh_s)

    async def pools(self) -> tuple[Pool, ...]:
        """Where its hashes go, with the share of its group's quota."""
        with contextlib.closing(self.line):
            pools, groups = await self._joined("pools", "groups")
        try:
            quota = {int(g["Group"]): int(g["Quota"]) for g in groups["GROUPS"]}
            return tuple(
                Pool(str(p["URL"]), str(p["User"]), str(p["Status"]).lower() == "alive", quota.get(int(p["Group"]), 0))
                for p in pools["POOLS"]
            )
        except (KeyError, TypeError, ValueError) as error:
            raise MinerError("garbled", f"{self.host}: pools: a field is missing: {error}") from error

    async def _joined(self, *commands: str) -> list[dict[str, Any]]:
        """Several questions in one request. A firmware in trouble answers the whole with one error status."""
        name = "+".join(commands)
        answer = await self.call(name)
        parts = []
        for command in commands:
            try:
                part = answer[command][0]
            except (KeyError, IndexError, TypeError) as error:
                self._check(answer, name)
                raise MinerError("garbled", f"{self.host}: no {command} in the answer") from error
            self._check(part, command)
            parts.append(part)
        return parts

    async def _privileged(self, *commands: tuple[str, str], borrow: bool = False) -> None:
        """Runs commands under one session; once more with a fresh one when somebody took it. Ends the session.

        `borrow`: when somebody else holds the session even then, the commands go under theirs.
        """
        with contextlib.closing(self.line):
            for attempt in (1, 2):
                try:
                    session = str(self._row(await self.checked("logon"), "SESSION").get("SessionID", ""))
                    await self._under(session, commands)
                except MinerError as error:
                    if error.kind != "session":
                        raise
                    if attempt == 2:
                        if not borrow:
                            raise
                        held = self._row(await self.checked("session"), "SESSION")
                        await self._under(str(held.get("SessionID", "")), commands, ours=False)
                        return
                    self.line.close()
                    await asyncio.sleep(PAUSE_S)
                else:
                    return

    async def _under(self, session: str, commands: Sequence[tuple[str, str]], *, ours: bool = True) -> None:
        try:
            for command, argument in commands:
                await self.checked(command, f"{session},{argument}")
        except MinerError as error:
            # Who does not answer is not asked to end a session: it ends by itself.
            if ours and error.kind == "refused":
                await self._log_off(session)
            raise
        if ours:
            await self._log_off(session)

    async def _log_off(self, session: str) -> None:
        with contextlib.suppress(MinerError):
            await self.call("logoff", session)

    async def sleep(self) -> None:
        """Under whoever's session it may be: watts do not wait until somebody's dashboard has logged off."""
        await self._privileged(("curtail", "sleep"), borrow=True)

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
        with contextlib.closing(self.line):
            rows = (await self.checked("profiles")).get("PROFILES", [])
        try:
            profiles = [(str(r["Profile Name"]), int(r["Watts"]), round(float(r["Hashrate"]) * 1000)) for r in rows]
        except (KeyError, TypeError, ValueError) as error:
            raise MinerError("garbled", f"{self.host}: profiles: {error}") from error
        return Capabilities(sleep=True, set_watts=True, modes=(self.modes[0], *profiles))
