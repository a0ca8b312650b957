"""What a site-year is made of: prices by the hour, calls of the grid, and jobs by the five minutes. Seeded, or loaded from a file.

Statistics that others published set the level of what is generated; what nobody published is an assumption, and says so. A file
`year_prices.csv` in the trace folder (or `--traces NAME` for NAME.csv) with the columns `energy_usd_mwh` and
`hashprice_usd_ph_day`, a line an hour, takes the place of the generated prices. Jobs: weeks drawn from the Philly trace (or the
generator of `benchmarks.philly`), thinned to the site's GPUs.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks import philly, traces
from benchmarks.harness import Options, require
from benchmarks.simulator import Workload
from scheduler.core.types import F64, I64

TICK = 300  # s: the site is planned, and jobs come and go, on this grid
HOUR, WEEK = 3600, 7 * 86_400
CALLS = 20

# (value, source)
PARAMETERS: dict[str, tuple[float, str]] = {
    "energy_mean_usd_mwh": (27.33, "ERCOT North day-ahead, mean of 2024: E3, ERCOT Year-End Snapshot, 2024-12-23"),
    "energy_spread": (0.45, "assumption: sd of the log around the day's shape"),
    "energy_spike_share": (0.01, "assumption: share of hours at five to fifty times the mean"),
    "energy_negative_share": (0.03, "assumption: share of hours below zero, at night and in spring, as wind zones see"),
    "hashprice_mean_usd_ph_day": (41.43, "mean of $43.33 (2025-11-03) and $39.53 (2026-01-12), Luxor's index as published"),
    "hashprice_low_usd_ph_day": (38.2, "the lowest in five years, November 2025: Luxor as quoted in the news"),
    "hashprice_spread": (0.08, "assumption: sd of the log, over weeks"),
    "gpu_usd_h": (2.35, "H100, one year reserved, March 2026: SemiAnalysis as quoted"),
    "host_draw_share": (0.83, "8.48 kW peak of 10.2 kW nameplate: Latif et al., IEEE Access 2025"),
    "pool_fee": (0.01, "FPPS pools ask 1 to 4 %: common knowledge"),
}  # fmt: skip


def parameter(name: str) -> float:
    return PARAMETERS[name][0]


@dataclass(frozen=True)
class Prices:
    """By the hour [H]: uUSD per MWh, and uUSD per PH/s-day."""

    energy: I64
    hashprice: I64
    source: str


@dataclass(frozen=True)
class Call:
    """The grid asks for less from tick `start` to tick `end`: `share` of the contract may be drawn."""

    start: int
    end: int
    share: float


def prices(hours: int, seed: int, options: Options) -> Prices:
    """Loaded, or generated: a day's shape and a season on a slow swing, spikes, hours below zero."""
    folder = traces.directory(options.trace_dir)
    for name in options.traces or ("year_prices",):
        path = folder / f"{name}.csv" if folder else Path(f"{name}.csv")
        if path.exists():
            return _read(path, hours)
        require(not options.traces, f"--traces {name}: no {path}")
    dice = np.random.default_rng(seed)
    hour = np.arange(hours)
    of_day, of_year = hour % 24, hour / 8760
    shape = (
        1 + 0.55 * np.exp(-((of_day - 19) ** 2) / 8) - 0.25 * np.exp(-((of_day - 12) ** 2) / 10) - 0.15 * (of_day < 5)
    )
    season = 1 + 0.25 * np.exp(-((of_year - 0.63) ** 2) / 0.006) + 0.15 * np.exp(-((of_year - 0.04) ** 2) / 0.001)
    usd = shape * season * np.exp(_swing(dice, hours, 30.0) * parameter("energy_spread"))
    tight = dice.random(hours) < parameter("energy_spike_share") * shape**3 / np.mean(shape**3)
    usd[tight] *= 5 * (1 + dice.pareto(1.6, int(tight.sum()))).clip(max=10)
    windy = dice.random(hours) < parameter("energy_negative_share")
    usd *= parameter("energy_mean_usd_mwh") / usd.mean()
    usd[windy & ~tight] = -dice.exponential(4.0, int((windy & ~tight).sum()))
    hashes = np.exp(_swing(dice, hours, 24.0 * 40) * parameter("hashprice_spread")) * parameter(
        "hashprice_mean_usd_ph_day"
    )
    hashes = hashes.clip(min=parameter("hashprice_low_usd_ph_day"))
    return Prices((usd * 1e6).astype(np.int64), (hashes * 1e6).astype(np.int64), "generated from published statistics")


def _swing(dice: np.random.Generator, hours: int, memory_h: float) -> F64:
    """A stationary swing of unit variance that forgets in `memory_h` hours."""
    keep = float(np.exp(-1 / memory_h))
    steps = dice.normal(0, np.sqrt(1 - keep * keep), hours).tolist()
    out, at = np.empty(hours), float(dice.normal())
    for i, step in enumerate(steps):
        at = keep * at + step
        out[i] = at
    return out


def _read(path: Path, hours: int) -> Prices:
    with path.open() as file:
        rows = [(float(r["energy_usd_mwh"]), float(r["hashprice_usd_ph_day"])) for r in csv.DictReader(file)]
    require(len(rows) >= hours, f"{path}: {len(rows)} hours, {hours} wanted")
    table = np.array(rows[:hours])
    require(bool((table[:, 1] > 0).all()), f"{path}: a hashprice that is not above zero")
    return Prices((table[:, 0] * 1e6).astype(np.int64), (table[:, 1] * 1e6).astype(np.int64), path.name)


def calls(ticks: int, seed: int) -> list[Call]:
    """`CALLS` a year and three at least, of one to four hours, in the evening's tight hours, to 35 to 70 % of the contract."""
    dice = np.random.default_rng(seed + 1)
    days = ticks * TICK // 86_400
    count = max(3, round(CALLS * days / 365))
    found = []
    for day in np.sort(dice.choice(days, count, replace=False)).tolist():
        start = (day * 86_400 + int(dice.integers(14, 20)) * HOUR + 1800) // TICK
        length = int(dice.integers(1, 5)) * HOUR // TICK
        found.append(Call(start, start + length, float(dice.uniform(0.35, 0.70))))
    return found


def jobs(ticks: int, gpus: int, load: float, seed: int, options: Options) -> tuple[Workload, str]:
    """Weeks of the trace drawn with replacement and thinned until they ask for `load` of the GPUs; run times on the tick grid."""
    whole, source = philly.load(replace(options, traces=(), quick=False))
    dice = np.random.default_rng(seed + 2)
    week = whole.submit // WEEK
    counts = np.bincount(week)
    full = np.flatnonzero(counts[:-1] >= np.median(counts[:-1]) / 2)
    duration = np.maximum(TICK, -(-whole.duration // TICK) * TICK)
    offered = [float((whole.width * np.minimum(duration, 4 * WEEK))[week == w].sum()) for w in full]
    keep = min(1.0, load * gpus * WEEK / float(np.mean(offered)))
    rows, submit = [], []
    for n in range(-(-ticks * TICK // WEEK)):
        of = np.flatnonzero(week == dice.choice(full))
        of = of[dice.random(len(of)) < keep]
        rows.append(of)
        submit.append(whole.submit[of] % WEEK + n * WEEK)
    chosen, at = np.concatenate(rows), -(-np.concatenate(submit) // TICK) * TICK
    fits = (at < ticks * TICK) & (whole.width[chosen] <= gpus // 4)
    chosen, at = chosen[fits], at[fits]
    order = np.argsort(at, kind="stable")
    chosen, at = chosen[order], at[order]
    work = replace(
        whole, submit=at, duration=np.minimum(duration[chosen], 4 * WEEK), gpus=whole.gpus[chosen],
        replicas=whole.replicas[chosen], tenant=whole.tenant[chosen],
    )  # fmt: skip
    return philly.estimated(replace(work, estimate=work.duration), seed), source
