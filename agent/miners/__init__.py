"""Miner drivers: a narrow protocol, and one conformance suite (tests/agent/test_miner_conformance.py) for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class MinerError(Exception):
    """A miner did not do what was asked. `kind` is one of unreachable, timeout, garbled, refused, session."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


@dataclass(frozen=True)
class Identity:
    model: str
    firmware: str
    serial: str


@dataclass(frozen=True)
class MinerReading:
    """What the firmware says: the mode by name, W, GH/s. Only a falling W confirms a sleep."""

    mode: str
    watts: int
    gh_s: int


@dataclass(frozen=True)
class Capabilities:
    sleep: bool
    set_watts: bool
    modes: tuple[tuple[str, int, int], ...]  # (name, W, GH/s), index 0 is sleep


@dataclass(frozen=True)
class Pool:
    """A pool that a machine hashes for. `quota`: of its group among the groups."""

    url: str
    user: str
    alive: bool
    quota: int


class MinerDriver(Protocol):
    """One miner. Every call has its own timeout and raises MinerError; an acknowledgement is not a watt."""

    async def identify(self) -> Identity: ...

    async def read(self) -> MinerReading: ...

    async def sleep(self) -> None: ...

    async def wake(self) -> None: ...

    async def set_mode(self, mode: str) -> None: ...

    async def set_watts(self, watts: int) -> str:
        """Chooses the highest mode of at most `watts`; answers its name. Raises MinerError("refused") below the lowest."""

    async def capabilities(self) -> Capabilities: ...
