"""The virtual runtime: work is "run" by the executor of a simulated host. It lets thousands of jobs be replayed.

Status comes with the site's poll (`feed`), so that watching thousands of placements costs one request a second.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from agent.hosts import HostError
from agent.hosts.bmc import Bmc
from agent.runtime import StartError, Status, Work

SIGNALS = {9: "KILL", 15: "TERM"}


class VirtualRuntime:
    name = "virtual"

    def __init__(self, bmc: Bmc) -> None:
        self.bmc = bmc
        self.rows: dict[str, dict[str, Any]] = {}
        self.host_of: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        self.timers: dict[str, asyncio.Task[None]] = {}

    def bind(self, key: str, host: str) -> None:
        """Tells where a placement runs: after a restart of the agent, before its first status."""
        self.host_of[key] = host

    def feed(self, rows: list[dict[str, Any]], *, complete: bool = False) -> None:
        """Takes rows of a poll; a `complete` one forgets what it does not list (the executor was restarted)."""
        if complete:
            self.rows = {}
        for row in rows:
            self.rows[row["id"]] = row
            self.host_of[row["id"]] = row["host"]

    async def prepare(self, work: Work) -> None:
        self.host_of[work.id] = work.host

    async def tell(self, key: str, gang: dict[str, Any]) -> None:
        """Virtual work reads nothing."""

    async def start(self, work: Work) -> None:
        if not work.command:
            raise StartError("the command is empty")
        body = {
            "id": work.id,
            "command": list(work.command),
            "gpus": list(work.gpus),
            "utilisation": work.utilisation,
        }
        try:
            row = (await self.bmc.call("POST", f"/hosts/{work.host}/work", body)).json()
        except HostError as error:
            raise StartError(str(error)) from error
        self.feed([row])
        if work.max_seconds:
            self._later(work.id, work.max_seconds, work.grace_s, "max_seconds")

    async def status(self, key: str) -> Status:
        row = self.rows.get(key)
        if row is None and key in self.host_of:
            row = await self._look(key)
        if row is None:
            return Status("missing")
        if row["state"] == "running":
            return Status("running", started_at=row["started_at"], checkpoint_at=row["checkpoint_at"])
        reason = row["reason"]
        if not reason and row["exit_code"] in (137, 143):
            reason = self.reasons.get(key, "")
            if reason == "drained" and row["exit_code"] == 137:
                reason = "killed_after_grace"
        return Status("exited", row["started_at"], row["finished_at"], row["exit_code"], reason, row["checkpoint_at"])

    async def _look(self, key: str) -> dict[str, Any] | None:
        try:
            row: dict[str, Any] = (await self.bmc.call("GET", f"/hosts/{self.host_of[key]}/work/{key}")).json()
        except HostError as error:
            if str(error).startswith("not_found"):
                return None
            raise
        self.feed([row])
        return row

    async def signal(self, key: str, number: int) -> None:
        if key not in self.host_of:
            return
        name = SIGNALS.get(number, str(number))
        with contextlib.suppress(HostError):
            row = (
                await self.bmc.call("POST", f"/hosts/{self.host_of[key]}/work/{key}/signal", {"signal": name})
            ).json()
            self.feed([row])

    async def stop(self, key: str, grace_s: float, reason: str) -> None:
        row = self.rows.get(key)
        if row is not None and row["state"] != "running":
            return
        self.reasons.setdefault(key, reason)
        if grace_s > 0:
            await self.signal(key, 15)
            self._later(key, grace_s, 0, reason)
        else:
            await self.signal(key, 9)

    def _later(self, key: str, seconds: float, grace_s: float, reason: str) -> None:
        name = f"{key}:{reason}"
        if name in self.timers:
            return

        async def wait() -> None:
            await asyncio.sleep(seconds)
            self.timers.pop(name, None)
            if self.rows.get(key, {}).get("state") == "running":
                await self.stop(key, grace_s, reason)

        self.timers[name] = asyncio.create_task(wait())

    async def logs(self, key: str, stream: str, offset: int, limit: int) -> bytes:
        row = self.rows.get(key)
        if stream != "stdout" or row is None or row["stdout_bytes"] <= offset:
            return b""
        try:
            response = await self.bmc.call("GET", f"/hosts/{self.host_of[key]}/work/{key}/stdout?offset={offset}")
        except HostError:
            return b""
        return response.content[:limit]

    async def forget(self, key: str) -> None:
        for name in [n for n in self.timers if n.startswith(f"{key}:")]:
            self.timers.pop(name).cancel()
        host = self.host_of.pop(key, None)
        self.rows.pop(key, None)
        self.reasons.pop(key, None)
        if host is not None:
            with contextlib.suppress(HostError):
                await self.bmc.call("DELETE", f"/hosts/{host}/work/{key}")
