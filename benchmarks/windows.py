"""Reserved windows among other work: contracts for GPUs from one second to another, on the Philly trace, honoured by the real core.

Part of a cluster's GPU time is asked for by contracts with future windows (blocks of 2 to 64 GPUs inside one cell of the topology, a
day long as a rule, signed up to two weeks ahead); the trace's jobs are the rest of an offered load of 90 %. Contracts are admitted
or refused when they are signed (`benchmarks.reserving`); who was admitted takes all of his GPUs when his window begins and gives
them back when it ends. The simulator checks device by device that he stands on his own and nobody else does.

Figures: windows that did not begin on their second; start times promised to waiting jobs that were missed; `admitted`, the share
of the GPU time asked for by contracts that was sold. Beside them: the same jobs on the same cluster without any contract.

Jobs are consecutive submissions from the middle of the trace (`--quick`: fewer), read as `python -m benchmarks philly` reads them.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from benchmarks import philly
from benchmarks.disciplines import Core
from benchmarks.harness import Options, Report, require
from benchmarks.reserving import Reserving
from benchmarks.simulator import Cluster, Outcome, Window, Workload, simulate

HOUR: Final = 3600
JOBS, QUICK_JOBS = 4000, 600
SHARE = 0.15  # of the offered GPU time
# GPUs, of which on one host, inside one cell of, how often
BLOCKS: Final = (
    (2, 2, "host", 2), (4, 4, "host", 2), (8, 8, "leaf", 4), (16, 8, "leaf", 3), (32, 8, "leaf", 2), (64, 8, "spine", 1),
)  # fmt: skip
MUST = {"windows_late": ("<=", 0.0), "promise_misses": ("<=", 0.0)}


def drawn(cluster: Cluster, span: int, share: float, seed: int) -> list[Window]:
    """Windows that ask for `share` of the GPU time of `span` seconds, in order of signing; none is wider than a quarter of the cluster.

    Begins are even over the span, lengths lognormal about a day (a tenth of the span at most), notice even up to two weeks (a
    quarter of the span at most). All to the second.
    """
    dice = np.random.default_rng(seed)
    blocks = [b for b in BLOCKS if b[0] <= max(2, cluster.gpus // 4)]
    odds = np.array([b[3] for b in blocks], float)
    wanted, made = share * cluster.gpus * span, []
    while wanted > 0:
        gpus, chunk, level, _ = blocks[int(dice.choice(len(blocks), p=odds / odds.sum()))]
        length = int(min(np.exp(dice.normal(np.log(24 * HOUR), 1.0)), span / 10)) + 1
        start = int(dice.integers(1, max(2, span - length)))
        notice = int(dice.integers(0, max(1, min(14 * 24 * HOUR, span // 4))))
        made.append(Window(max(0, start - notice), start, start + length, gpus, chunk, level))
        wanted -= gpus * length
    return sorted(made)


def lateness(work: Workload, found: Outcome, windows: list[Window]) -> np.ndarray:
    """Seconds by which each window that was sold began late."""
    began = found.start[len(work) :]
    starts = np.array([w.start for w in windows], np.int64)
    return (began - starts)[began >= 0]


def gpu_seconds(windows: list[Window]) -> int:
    return sum(w.gpus * (w.end - w.start) for w in windows)


def run(options: Options) -> Report:
    whole, source = philly.load(options)
    count = min(len(whole), QUICK_JOBS if options.quick else JOBS)
    work, small, left_out = philly.sized(philly.window(whole, (len(whole) - count) // 2, count))
    cluster = Cluster(round(small.hosts / (1 - SHARE)), small.per_host)
    span = int(work.submit[-1])
    table = [
        [
            "seed",
            "windows",
            "sold",
            "sold, of GPU time",
            "begun late",
            "latest s",
            "jobs' mean delay h",
            "without contracts",
            "GPU util %",
        ]
    ]
    missed, promised, late, sold, asked, made, plans = 0, [], [], 0, 0, 0, 0
    delays: list[tuple[float, float]] = []
    for seed in options.seeds or (42,):
        told = philly.estimated(work, seed)
        windows = drawn(cluster, span, SHARE * philly.LOAD, seed)
        core = Reserving(told, cluster, philly.POLICY, half_life=philly.HALF_LIFE)
        found = simulate(told, cluster, core, windows)
        alone = simulate(told, cluster, Core(told, cluster, philly.POLICY, half_life=philly.HALF_LIFE))
        kept = [w for w, began in zip(windows, found.start[len(work) :].tolist(), strict=True) if began >= 0]
        require(len(kept) > len(windows) // 4, f"only {len(kept)} of {len(windows)} contracts were admitted")
        broken, early = philly.misses(core, found)
        require(len(early) > 0, "no start was ever promised")
        missed, plans, made = missed + broken, plans + core.plans, made + len(windows)
        promised.append(early)
        late.append(lateness(told, found, windows))
        sold, asked = sold + gpu_seconds(kept), asked + gpu_seconds(windows)
        delays.append((found.delay(told) / HOUR, alone.delay(told) / HOUR))
        table.append(
            [
                *(str(seed), str(len(windows)), str(len(kept)), f"{gpu_seconds(kept) / gpu_seconds(windows):.3f}"),
                *(
                    str(int((late[-1] > 0).sum())),
                    str(int(late[-1].max())),
                    f"{delays[-1][0]:.2f}",
                    f"{delays[-1][1]:.2f}",
                ),
                f"{100 * found.utilisation(cluster):.2f}",
            ]
        )
    every = np.concatenate(late)
    return Report(
        "windows",
        {"windows_late": float((every > 0).sum()), "promise_misses": float(missed), "admitted": sold / asked},
        {
            "windows_sold": float(len(every)),
            "latest_s": float(every.max()),
            "delay_h": float(np.mean([d[0] for d in delays])),
            "delay_without_contracts_h": float(np.mean([d[1] for d in delays])),
        },
        {
            "source": source,
            "jobs": len(work),
            "jobs_left_out": left_out,
            "gpus": cluster.gpus,
            "load": philly.LOAD,
            "asked for by contracts": f"{SHARE:g} of it",
            "windows": made,
            "seconds late": {name: float(np.quantile(every, q)) for name, q in philly.QUANTILES.items()},
            "estimates": f"truth x U[1, {philly.SLACK:g}]",
            "promises": sum(map(len, promised)),
            "minutes_before_promise": philly.errors(np.concatenate(promised)),
            "plans": plans,
        },
        MUST,
        table,
    )
