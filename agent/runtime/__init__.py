"""Runtimes: what runs a placement. All pass one conformance suite (tests/agent/test_runtimes.py)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

STREAMS = ("stdout", "stderr")


@dataclass(frozen=True)
class Work:
    """One placement, ready to run. `env` is complete (secrets included) and must not be written to disk."""

    id: str
    host: str
    gpus: tuple[int, ...]
    command: tuple[str, ...]
    env: dict[str, str] = field(repr=False)
    grace_s: float = 30.0
    max_seconds: float | None = None
    ram_mib: int = 0
    utilisation: float = 0.9


@dataclass(frozen=True)
class Status:
    """`state`: missing (never started here) | running | exited | lost (ended without a record). Times are epoch seconds;
    `checkpoint_at`: when the work last said that it has saved its state.
    """

    state: str
    started_at: float | None = None
    finished_at: float | None = None
    exit_code: int | None = None
    reason: str = ""
    checkpoint_at: float | None = None


class StartError(Exception):
    """The work could not be started; the text says why."""


class Runtime(Protocol):
    """Every call is safe to repeat: starting twice runs once, stopping what has ended changes nothing."""

    name: str

    async def prepare(self, work: Work) -> None:
        """Makes what `start` needs. Raises StartError."""

    async def tell(self, key: str, gang: dict[str, Any]) -> None:
        """Puts the gang's table into the workspace as gang.json, whole or not at all. Raises OSError or HostError."""

    async def start(self, work: Work) -> None:
        """Starts the work, once. Raises StartError; a command that cannot be executed is an exit with 126 or 127."""

    async def signal(self, key: str, number: int) -> None:
        """Sends a signal to all processes of the work; nothing when it has ended."""

    async def status(self, key: str) -> Status: ...

    async def logs(self, key: str, stream: str, offset: int, limit: int) -> bytes:
        """Up to `limit` raw bytes of a stream from `offset`; empty when there are none."""

    async def stop(self, key: str, grace_s: float, reason: str) -> None:
        """Asks the work to checkpoint and end, and kills it after the grace; 0 kills at once. Does not wait."""

    async def forget(self, key: str) -> None:
        """Kills what still runs and removes all trace."""
