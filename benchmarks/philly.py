"""A cluster over time: the Philly trace with departures, gangs and its tenants at 90 % load; FIFO, EASY and best fit beside us.

Any csv with the columns timestamp, duration, num_gpus, cluster works (`philly.csv` of the trace folder, or `--traces NAME`: the
file NAME.csv); without traces a generator of the same shape. A job of n GPUs is one replica up to a host's 8, else a gang of
replicas of 8 (or the largest of 4, 2, 1 that divides n). The cluster has as many 8-GPU hosts as make the offered load 90 %:
GPU-seconds that could run between the first and the last submission, over all GPU-seconds there. Jobs wider than half of the
cluster are left out and counted. What a discipline is told of a run time is the true one times a factor drawn uniformly from
[1, 3], seeded, the same for all. `--quick` takes consecutive submissions from the middle of the trace, with a cluster of their own.

Figures: mean queueing delay (submission to start, over all jobs) and GPU utilisation (first to last submission) over EASY's;
the worst tenant's fair share in windows of a week (`benchmarks.fairness`; by the day and by the instant beside it, and how much
of the last the run could have given at most); promises missed: jobs that started after the first start time promised to them,
plus promises that a later plan put off.
"""

from __future__ import annotations

import csv
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np

from benchmarks import fairness, traces
from benchmarks.disciplines import BEST_FIT, EASY, FIFO, Core, Peer
from benchmarks.harness import Options, Report, require, timed
from benchmarks.simulator import Cluster, Outcome, Workload, simulate
from scheduler.core.types import I64, Policy

LOAD, PER_HOST = 0.9, 8
SLACK = 3.0  # estimates are up to so many times the truth
HALF_LIFE = 3 * 86_400
POLICY = Policy(queue="age", preemption=False, explain=False, backfill_depth=12)
QUICK_JOBS = 3000
QUANTILES = {"least": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "p99": 0.99, "most": 1.0}
PEERS = {"fifo": FIFO, "easy": EASY, "best_fit": BEST_FIT}
MUST = {
    "queueing_delay_vs_easy": ("<=", 0.7),
    "worst_fair_share": (">=", 0.9),
    "utilisation_vs_easy": (">=", 1.0),
    "promise_misses": ("<=", 0.0),
}


def read(path: Path) -> Workload:
    """A workload without estimates from a philly-shaped csv."""
    with path.open() as file:
        rows = [
            (datetime.fromisoformat(r["timestamp"]).timestamp(), float(r["duration"]), int(r["num_gpus"]), r["cluster"])
            for r in csv.DictReader(file)
        ]
    rows = [r for r in rows if r[1] > 0 and r[2] > 0]
    require(len(rows) > 100, f"{path}: only {len(rows)} jobs")
    rows.sort(key=lambda r: r[0])
    return shape(
        np.array([r[0] - rows[0][0] for r in rows]).astype(np.int64),
        np.ceil([r[1] for r in rows]).astype(np.int64),
        np.array([r[2] for r in rows], np.int64),
        [r[3] for r in rows],
    )


def shape(submit: np.ndarray, duration: np.ndarray, width: np.ndarray, tenant: list[str]) -> Workload:
    """Columns -> workload: gangs split into replicas, tenants numbered."""
    each = [next(g for g in (8, 4, 2, 1) if w % g == 0) if w > PER_HOST else w for w in width.tolist()]
    gpus = np.array(each, np.int32)
    names = sorted(set(tenant))
    number = {name: i for i, name in enumerate(names)}
    return Workload(
        submit=submit,
        duration=duration,
        estimate=duration,
        gpus=gpus,
        replicas=(width // gpus).astype(np.int32),
        tenant=np.array([number[t] for t in tenant], np.int32),
        tenants=tuple(names),
    )


def generate(jobs: int, seed: int = 7) -> Workload:
    """The same shape without the trace: 15 tenants of very unequal size, bursts, heavy tails in width and duration."""
    dice = np.random.default_rng(seed)
    tenants = 15
    weight = 1.0 / np.arange(1, tenants + 1) ** 1.3
    tenant = dice.choice(tenants, jobs, p=weight / weight.sum())
    width = np.where(
        dice.random(jobs) < 0.9, 1, dice.choice((2, 4, 8, 16, 32), jobs, p=(0.3, 0.32, 0.3, 0.06, 0.02))
    ).astype(np.int64)
    duration = np.minimum(np.exp(dice.normal(6.8, 2.0, jobs)), 30 * 86_400).astype(np.int64) + 1
    gaps = dice.exponential(100, jobs) * np.where(np.arange(jobs) // 500 % 3 == 0, 0.5, 1.25)
    return shape(np.cumsum(gaps).astype(np.int64), duration, width, [f"t{t:02}" for t in tenant])


def window(work: Workload, start: int, count: int) -> Workload:
    """`count` consecutive submissions."""
    part = slice(start, start + count)
    return replace(
        work,
        submit=work.submit[part] - work.submit[start],
        **{name: getattr(work, name)[part] for name in ("duration", "estimate", "gpus", "replicas", "tenant")},
    )


def only(work: Workload, keep: np.ndarray) -> Workload:
    """The jobs of a mask."""
    return replace(
        work,
        **{
            name: getattr(work, name)[keep] for name in ("submit", "duration", "estimate", "gpus", "replicas", "tenant")
        },
    )


def estimated(work: Workload, seed: int) -> Workload:
    """With a run-time bound for each job: the truth times U[1, SLACK]."""
    factor = np.random.default_rng(seed).uniform(1.0, SLACK, len(work))
    return replace(work, estimate=np.maximum(work.duration, np.ceil(work.duration * factor)).astype(np.int64))


def sized(work: Workload) -> tuple[Workload, Cluster, int]:
    """(jobs, cluster, jobs left out) such that the offered load is LOAD."""
    last = int(work.submit[-1])
    offered = (work.width * np.minimum(work.duration, last - work.submit)).sum() / max(1, last)
    hosts = max(2, round(offered / LOAD / PER_HOST))
    fits = work.width <= hosts * PER_HOST // 2
    return only(work, fits), Cluster(hosts, PER_HOST), int((~fits).sum())


def misses(core: Core, ours: Outcome) -> tuple[int, I64]:
    """(promises missed, by how many s each job that was promised a start began before the first one promised; late: below 0)."""
    made = np.flatnonzero(core.promises)
    early: I64 = core.promises[made] - ours.start[made]
    return int((early < 0).sum()) + core.moved, early


def errors(early: I64) -> dict[str, float]:
    """Errors of promises in minutes, as quantiles: how much too late the promised start was, and the worst by which it was missed."""
    at = {name: float(np.quantile(early, share)) for name, share in QUANTILES.items()}
    return {name: round(s / 60, 1) for name, s in at.items()} | {
        "late, at most": round(max(0, -int(early.min())) / 60, 1)
    }


def worst_share(work: Workload, cluster: Cluster, found: Outcome, window: int) -> float:
    return float(np.nanmin(fairness.shares(work, cluster, found.start, window)))


def load(options: Options) -> tuple[Workload, str]:
    """The workload asked for, and where it is from."""
    folder = traces.directory(options.trace_dir)
    for name in options.traces or ("philly",):
        path = folder / f"{name}.csv" if folder else None
        if path and path.exists():
            return read(path), str(path.name)
        require(not options.traces, f"--traces {name}: no {name}.csv in {folder}")
    return generate(QUICK_JOBS if options.quick else 20_000), "built-in generator (no philly.csv)"


def run(options: Options) -> Report:
    whole, source = load(options)
    if options.quick and len(whole) > QUICK_JOBS:
        whole = window(whole, (len(whole) - QUICK_JOBS) // 2, QUICK_JOBS)
    work, cluster, left_out = sized(whole)
    table = [
        [
            "seed, discipline",
            "mean delay h",
            "median s",
            "p99 h",
            "GPU util %",
            "worst fair share: week",
            "day",
            "instant",
            "s",
        ]
    ]
    worst: dict[str, float] = {}
    reach: list[float] = []
    peers: dict[str, list[float]] = {
        f"{name}_{key}": [] for name in PEERS for key in ("delay_h", "utilisation", "fair_share")
    }
    plans, promised = 0, []
    for seed in options.seeds or (42,):
        told = estimated(work, seed)
        took: dict[str, list[float]] = {}
        found: dict[str, Outcome] = {}
        core = Core(told, cluster, POLICY, half_life=HALF_LIFE)
        for name in (*PEERS, "tailrace"):
            with timed(took.setdefault(name, [])):
                found[name] = simulate(told, cluster, core if name == "tailrace" else Peer(PEERS[name], told, cluster))
            table.append(row(f"{seed} {name}", told, cluster, found[name], took[name][0]))
            if name in PEERS:
                peers[f"{name}_delay_h"].append(found[name].delay(told) / 3600)
                peers[f"{name}_utilisation"].append(found[name].utilisation(cluster))
                peers[f"{name}_fair_share"].append(worst_share(told, cluster, found[name], fairness.WEEK))
        ours, easy = found["tailrace"], found["easy"]
        require(core.plans > len(told) // 50, f"only {core.plans} plans for {len(told)} jobs")
        missed, early = misses(core, ours)
        require(len(early) > 0, "no start was ever promised")
        figures = {
            "queueing_delay_vs_easy": ours.delay(told) / max(easy.delay(told), 1e-9),
            "worst_fair_share": worst_share(told, cluster, ours, fairness.WEEK),
            "utilisation_vs_easy": ours.utilisation(cluster) / easy.utilisation(cluster),
            "promise_misses": float(missed),
        }
        for key, value in figures.items():
            pick = max if MUST[key][0] == "<=" else min
            worst[key] = pick(worst.get(key, value), value)
        reach.append(float(np.nanmin(fairness.reachable(told, cluster, ours))))
        plans += core.plans
        promised.append(early)
    return Report(
        "philly",
        worst,
        {name: sum(values) / len(values) for name, values in peers.items()},
        {
            "source": source,
            "jobs": len(work),
            "jobs_left_out": left_out,
            "tenants": len(set(work.tenant.tolist())),
            "gpus": cluster.gpus,
            "load": LOAD,
            "estimates": f"truth x U[1, {SLACK:g}]",
            "promises": sum(map(len, promised)),
            "plans": plans,
            "minutes_before_promise": errors(np.concatenate(promised)),
            "worst_instant_share_reachable": round(min(reach), 3),
            "figure": "worst of the seeds" if len(options.seeds) > 1 else "one run",
        },
        MUST,
        table,
    )


def row(name: str, work: Workload, cluster: Cluster, found: Outcome, seconds: float) -> list[str]:
    delay = found.start - work.submit
    return [
        name,
        f"{delay.mean() / 3600:.2f}",
        f"{np.median(delay):.0f}",
        f"{np.percentile(delay, 99) / 3600:.1f}",
        f"{100 * found.utilisation(cluster):.2f}",
        *(
            f"{worst_share(work, cluster, found, window):.3f}"
            for window in (fairness.WEEK, fairness.DAY, fairness.INSTANT)
        ),
        f"{seconds:.1f}",
    ]
