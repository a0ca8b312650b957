"""Host drivers: how the agent reaches the hosts, their GPUs' power limits, and the meters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class HostReading:
    name: str
    alive: bool
    power_state: str  # off | parked | capped | full
    limits_w: tuple[int, ...]
    measured_w: int
    gpu_errors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Poll:
    """What one look at the site gave: hosts that changed (all, the first time), all meters, changed virtual work."""

    at: float
    hosts: list[HostReading] = field(default_factory=list)
    meters: list[tuple[str, int, float]] = field(default_factory=list)
    work: list[dict[str, Any]] = field(default_factory=list)
    complete: bool = True  # not only what changed: what is not listed is not there


class HostError(Exception):
    """The host (or the whole management network) did not do what was asked; the text says why."""


class HostDriver(Protocol):
    async def inventory(self) -> dict[str, list[dict[str, Any]]]:
        """{"hosts": [...], "miners": [...]} as in docs/agent-protocol.md. Raises HostError."""

    async def poll(self) -> Poll:
        """Raises HostError when nothing answers."""

    async def read(self, name: str) -> HostReading:
        """A fresh reading of one host. Raises HostError."""

    async def set_limits(self, name: str, limits_w: list[int]) -> tuple[int, ...]:
        """Sets the power limits of all GPUs; answers what the host reads back. Raises HostError."""

    async def power(self, name: str, *, on: bool) -> None: ...

    async def attach(self, name: str, key: str, gpus: tuple[int, ...], utilisation: float) -> None:
        """Tells the host that work runs on its GPUs (a simulated host then draws for it; a real one just does)."""

    async def detach(self, name: str, key: str) -> None: ...

    async def close(self) -> None: ...
