"""One machine as the agent knows it: what shall be, what was read, and how it has answered."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from agent.miners import MinerDriver, MinerReading

BREAK_AFTER = 3  # turns in a row without an answer: from then on it is probed, and asked for nothing


@dataclass(eq=False)
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
    settled: int = 0  # readings in a row that show it where it shall be
    commanded_at: float = 0.0
    tries: int = 0
    failures: int = 0
    problem: str = ""  # of the last failure: MinerError.kind
    busy: bool = False
    obeyed: bool = False  # it slept when it was told to
    watts_of: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.row["name"])

    @property
    def pdu(self) -> str:
        return str(self.row["power_node"])

    @property
    def sleep_mode(self) -> str:
        return str(self.row["modes"][0][0])

    @property
    def target(self) -> str:
        """The mode that shall be: what control wants, or sleep while latched."""
        return self.sleep_mode if self.latched >= self.generation else self.want

    @property
    def broken(self) -> bool:
        """The circuit is open: it does not answer."""
        return self.failures >= BREAK_AFTER

    def awaited(self, now: float) -> bool:
        """Each of its readings is waited for: it is on its way to another mode, and answers (`now`: monotonic seconds)."""
        return self.settle_until > now and not self.broken

    def watts_in(self, mode: str) -> int:
        """Nameplate W of a mode; an unknown mode counts as the top."""
        return self.watts_of.get(mode, max(self.watts_of.values()))
