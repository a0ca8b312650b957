"""One placement as the agent knows it: what control lists, what became of it, and how it is reported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from agent.times import to_wire

FAILED = {"host_lost", "start_failed", "gang_member_failed", "supervisor_lost", "power_lost"}


@dataclass
class Placement:
    id: str
    spec: dict[str, Any]  # the row of the sync without its secrets
    generation: int
    desired: str
    phase: str = "waiting"
    listed: bool = True
    running_at: float | None = None
    finished_at: float | None = None
    exit_code: int | None = None
    reason: str = ""
    checkpoint_at: float | None = None
    stop_reason: str = ""
    secrets: dict[str, str] | None = field(default=None, repr=False)  # memory only; None until control sent them again
    stopped_at: float = 0.0
    attached: bool = False
    unknown: bool = False
    logs_done: bool = False
    told: bool = False  # its workspace holds the table of ranks as it is now

    @property
    def host(self) -> str:
        return str(self.spec["host"])

    @property
    def gpus(self) -> tuple[int, ...]:
        return tuple(int(g) for g in self.spec.get("gpus") or ())

    @property
    def grace_s(self) -> float:
        return float(self.spec.get("grace_s") or 0)

    @property
    def gives_way(self) -> tuple[int, ...]:
        """Its place in control's order: lower gives way first, of equals the youngest."""
        return (*(int(n) for n in self.spec.get("gives_way") or ()), -int(self.running_at or 0))

    def gang(self) -> dict[str, Any]:
        """What the work reads in gang.json: who runs beside it now. Fewer ranks than `world_size`: the rest is being placed again."""
        names = ("epoch", "rank", "world_size", "master_host", "ranks")
        return {name: self.spec[name] for name in names if name in self.spec}

    def learn(self, row: Mapping[str, Any]) -> bool:
        """Takes over the gang's table and its place in the order from a later row of the sync; says whether they have changed."""
        place = row.get("gives_way")
        moved = place != self.spec.get("gives_way")
        self.spec["gives_way"] = place
        names = ("epoch", "rank", "world_size", "master_host", "ranks")
        news = {name: row[name] for name in names if name in row and row[name] != self.spec.get(name)}
        if not news or int(row.get("epoch") or 0) < int(self.spec.get("epoch") or 0):
            return moved
        self.spec |= news
        self.told = False
        return True

    def saved(self, at: float | None) -> bool:
        """Takes over when the work last saved its state; says whether that is news."""
        if at is None or at == self.checkpoint_at:
            return False
        self.checkpoint_at = at
        return True

    def document(self) -> dict[str, Any]:
        keys = (
            "id",
            "spec",
            "generation",
            "desired",
            "phase",
            "listed",
            "running_at",
            "finished_at",
            "exit_code",
            "checkpoint_at",
            "reason",
            "stop_reason",
        )
        return {key: getattr(self, key) for key in keys}

    def row(self) -> dict[str, Any]:
        """As docs/agent-protocol.md reports it."""
        state = {"waiting": "starting", "ended": "failed" if self.reason in FAILED else "exited"}.get(
            self.phase, self.phase
        )
        return {
            "id": self.id,
            "generation": self.generation,
            "state": "unknown" if self.unknown and self.phase != "ended" else state,
            "running_at": to_wire(self.running_at),
            "finished_at": to_wire(self.finished_at),
            "checkpoint_at": to_wire(self.checkpoint_at),
            "exit_code": self.exit_code,
            "reason": self.reason,
        }
