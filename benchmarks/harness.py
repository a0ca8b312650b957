"""What every benchmark shares: options, the report it hands back, how it is printed and judged."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# Counts of what must never happen: where one is not 0 the work was not right, and no speed of it is worth telling.
WRONGS = frozenset(
    {
        "violations", "refused_fitting", "promise_misses", "doubled_or_lost", "lost", "logs_lost", "false_confirms",
        "over_cap_instants", "firm_jobs_touched", "windows_late",
    }
)  # fmt: skip


class WorkNotDoneError(AssertionError):
    """The benchmark did not do the work that it wanted to time."""


@dataclass(frozen=True)
class Options:
    quick: bool = False
    trace_dir: str | None = None
    traces: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    weights: tuple[tuple[str, float], ...] = ()  # packing: of the score, instead of its own
    ablation: bool = False  # packing: each weight left out once, too


@dataclass
class Report:
    """`figures` and `peer` as the contract of the benchmark names them; `table` rows (the first: their heads) are printed as they
    are; `runs`: what each single run gave that the figures are made of. Both stand in the JSON.

    `must`: figure -> (comparison, bound), e.g. {"p99_us_10k": ("<=", 50)}; shown, and part of the JSON's conditions.
    """

    name: str
    figures: dict[str, float]
    peer: dict[str, float] = field(default_factory=dict)
    conditions: dict[str, Any] = field(default_factory=dict)
    must: dict[str, tuple[str, float]] = field(default_factory=dict)
    table: list[list[str]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)

    def missed(self) -> list[str]:
        """Figures that miss their bound."""
        return [
            k for k, (how, bound) in self.must.items() if k in self.figures and not holds(self.figures[k], how, bound)
        ]

    def wrong(self) -> list[str]:
        """Counts of what must never happen that are not 0 (or not a number)."""
        return [k for k, value in self.figures.items() if k in WRONGS and not value <= 0]

    def as_json(self) -> str:
        """One line."""
        return json.dumps(
            {
                "name": self.name,
                "figures": self.figures,
                "peer": self.peer,
                "conditions": {**machine(), **self.conditions, "must": self.must},
                "table": self.table,
                "runs": self.runs,
            }
        )

    def show(self) -> None:
        """The table, then figures beside their bounds, then peers and conditions."""
        if self.table:
            widths = [max(len(row[i]) for row in self.table) for i in range(len(self.table[0]))]
            for row in self.table:
                print(
                    "  ".join(
                        cell.rjust(w) if i else cell.ljust(w)
                        for i, (cell, w) in enumerate(zip(row, widths, strict=True))
                    )
                )
            print()
        for key, value in self.figures.items():
            how, bound = self.must.get(key, ("", 0.0))
            verdict = "" if not how else f"   must be {how} {bound:g}: {'yes' if holds(value, how, bound) else 'NO'}"
            print(f"{key:32} {value:14,.4g}{verdict}")
        for key, value in self.peer.items():
            print(f"  peer {key:25} {value:14,.4g}")
        print("; ".join(f"{k}: {v}" for k, v in self.conditions.items()))


def holds(value: float, how: str, bound: float) -> bool:
    """Whether a figure keeps to its bound."""
    return {"<=": value <= bound, ">=": value >= bound}[how]


def require(condition: bool, what: str) -> None:
    """Asserts that the work happened, also under `python -O`."""
    if not condition:
        raise WorkNotDoneError(what)


def machine() -> dict[str, Any]:
    """Where and when this ran."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": _processor(),
        "load": round(os.getloadavg()[0], 2),
    }


def _processor() -> str:
    """The model as Linux names it, else the architecture."""
    known = Path("/proc/cpuinfo")
    named = (line.partition(":")[2].strip() for line in known.read_text().splitlines() if line.startswith("model name"))
    return next(named, platform.machine()) if known.exists() else platform.machine()


@contextmanager
def timed(into: list[float]) -> Iterator[None]:
    """Appends elapsed seconds."""
    start = time.perf_counter()
    yield
    into.append(time.perf_counter() - start)


def best_of(times: int, work: Callable[[], Any]) -> float:
    """Least seconds of several runs: the machine is shared, and noise only ever adds."""
    taken: list[float] = []
    for _ in range(times):
        with timed(taken):
            work()
    return min(taken)


def names() -> list[str]:
    """Benchmarks there are: modules of this package that have `run`."""
    here = Path(__file__).parent
    return sorted(p.stem for p in here.glob("*.py") if "\ndef run(options: Options) -> Report:" in p.read_text())
