"""Virtual work: a simulated host "runs" a command whose duration and exit code are read from the command itself.

    ["sleep", "12"]            ends with 0 after 12 s
    ["exit", "3"]              ends with 3 at once
    ["fail-after", "5"]        ends with 1 after 5 s
    ["train", "600", "60"]     as sleep, and saves its state every 60 s
    ["stubborn", "60"]         as sleep, but ignores TERM
    ["print", "text", ...]     prints the words and ends with 0
    ["tailrace-verify"]        prints the figures of the host's benchmark (sandbox.site.physics) after 1 s and ends with 0

TERM ends a command with 143 (it saves its state first), KILL with 137. Anything else cannot be executed: 127.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Work:
    id: str
    host: str
    command: list[str]
    gpus: list[int]
    started_at: float
    ends_at: float
    will_exit: int
    stdout: str = ""
    finished_at: float | None = None
    exit_code: int | None = None
    reason: str = ""
    stubborn: bool = False
    saves_every: float = 0.0
    checkpoint_at: float | None = None
    version: int = 0
    env: dict[str, str] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "host": self.host,
            "state": "running" if self.finished_at is None else "exited",
            "started_at": self.started_at,
            "finished_at": self.finished_at,
            "exit_code": self.exit_code,
            "reason": self.reason,
            "checkpoint_at": self.checkpoint_at,
            "stdout_bytes": len(self.stdout.encode()),
        }


def parse(command: list[str]) -> tuple[float, int, str]:
    """(seconds, exit code, first output) of a virtual command. Raises ValueError for one that it does not know."""
    match command:
        case ["sleep" | "stubborn", seconds]:
            return float(seconds), 0, ""
        case ["train", seconds, every] if float(every) > 0:
            return float(seconds), 0, ""
        case ["exit", code]:
            return 0.0, int(code), ""
        case ["fail-after", seconds]:
            return float(seconds), 1, ""
        case ["print", *words]:
            return 0.0, 0, " ".join(words) + "\n"
    raise ValueError(
        f"not a virtual command: {command[:2]}; known: sleep N, train N EVERY, stubborn N, exit N, fail-after N, print ..."
    )


class Executor:
    """All virtual work of a site. Times are seconds since the epoch and passed in."""

    def __init__(self) -> None:
        self.work: dict[str, Work] = {}
        self._ends: list[tuple[float, str]] = []
        self._saves: list[tuple[float, str]] = []
        self.changed: list[str] = []

    def start(
        self,
        key: str,
        host: str,
        command: list[str],
        gpus: list[int],
        env: dict[str, str],
        now: float,
        *,
        figures: str = "",
    ) -> Work:
        """Starts work, or answers the work already known by that id: starting twice runs once."""
        if key in self.work:
            return self.work[key]
        try:
            seconds, code, out = (1.0, 0, f"{figures}\n") if figures else parse(command)
            reason = ""
        except ValueError as error:
            seconds, code, out, reason = 0.0, 127, f"{error}\n", "start_failed"
        text = f"virtual run of {' '.join(command)} on {host}\n{out}"
        work = Work(key, host, command, gpus, now, now + seconds, code, text, reason=reason, env=env)
        work.stubborn = command[:1] == ["stubborn"]
        self.work[key] = work
        if seconds <= 0:
            self._finish(work, code, now, reason)
        else:
            heapq.heappush(self._ends, (work.ends_at, key))
            if command[0] == "train":
                work.saves_every = float(command[2])
                heapq.heappush(self._saves, (now + work.saves_every, key))
            self.changed.append(key)
        return work

    def signal(self, key: str, name: str, now: float) -> Work:
        """TERM or KILL; others are noted only. Raises KeyError for unknown work."""
        work = self.work[key]
        if work.finished_at is None:
            if name == "KILL":
                self._finish(work, 137, now)
            elif name == "TERM" and not work.stubborn:
                work.stdout += "checkpoint written\n"
                work.checkpoint_at = now
                self._finish(work, 143, now)
        return work

    def forget(self, key: str) -> None:
        self.work.pop(key, None)

    def lose(self, keys: list[str], now: float) -> None:
        """Work whose host lost power."""
        for key in keys:
            if key in self.work and self.work[key].finished_at is None:
                self._finish(self.work[key], 137, now, "power_lost")

    def step(self, now: float) -> list[str]:
        """Saves and ends what is due; returns the ids that changed since the last step."""
        while self._saves and self._saves[0][0] <= now:
            at, key = heapq.heappop(self._saves)
            work = self.work.get(key)
            if work and work.finished_at is None and at <= work.ends_at:
                until, every = min(now, work.ends_at), work.saves_every
                at += (until - at) // every * every  # of several in one step the last
                work.checkpoint_at = at
                self.changed.append(key)
                heapq.heappush(self._saves, (at + work.saves_every, key))
        while self._ends and self._ends[0][0] <= now:
            ends_at, key = heapq.heappop(self._ends)
            work = self.work.get(key)
            if work and work.finished_at is None:
                self._finish(work, work.will_exit, ends_at)
        changed, self.changed = self.changed, []
        return changed

    def _finish(self, work: Work, code: int, at: float, reason: str = "") -> None:
        work.finished_at, work.exit_code, work.reason = at, code, reason
        self.changed.append(work.id)
