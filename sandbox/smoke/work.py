"""The jobs of the smoke run: real processes with checked output, and the arrivals of a trace on a simulated cluster."""

import csv
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from benchmarks import traces
from sandbox.site.spec import Spec, openb_site, synthetic_site

SECONDS = (6, 20)  # of a replayed job: drawn by seed; the trace's own durations are months
SAVES = "4"  # seconds between its checkpoints


@dataclass(frozen=True)
class Arrivals:
    """A cluster and the jobs that arrive at it. `said`: where both come from."""

    spec: Spec
    jobs: list[dict[str, Any]]
    said: str


def arrivals(folder: Path | None, count: int, *, miners: int, miner_port: int, seed: int = 42) -> Arrivals:
    """The first `count` arrivals of openb `default`, or of our own generator where there is no trace."""
    rng = Random(seed)
    if folder is None:
        spec = synthetic_site(200, seed=seed, miners=miners // 4, miner_port=miner_port)
        jobs = [_generated(rng, i) for i in range(count // 4)]
        return Arrivals(
            spec,
            jobs,
            f"no traces: our own generator, {len(spec['hosts'])} hosts and {len(jobs)} jobs, watts synthesised",
        )
    spec = openb_site(folder, seed=seed, miners=miners, miner_port=miner_port)
    with (folder / "openb" / "openb_pod_list_default.csv").open(newline="") as file:
        pods = list(csv.DictReader(file))
    order, _ = traces.read_order(folder / "openb_orders" / f"openb_pod_list_default.{seed}.txt.gz")
    jobs = [_pod(pods[int(row)], rng, i) for i, row in enumerate(order[:count])]
    gpus = sum(h["gpus"] for h in spec["hosts"])
    return Arrivals(
        spec,
        jobs,
        f"openb: {len(spec['hosts'])} hosts, {gpus} GPUs; {count} arrivals of `default`, seed {seed}; watts and durations synthesised",
    )


def _pod(pod: dict[str, str], rng: Random, number: int) -> dict[str, Any]:
    gpus = int(pod["num_gpu"])
    return {
        "name": pod["name"],
        "command": ["train", str(rng.randint(*SECONDS)), SAVES],
        "gpus": gpus,
        "gpu_milli": int(pod["gpu_milli"]) if gpus == 1 else 1000,
        "vcpu_milli": int(pod["cpu_milli"]),
        "ram_mib": int(pod["memory_mib"]),
        "gpu_models": [m for m in pod["gpu_spec"].split("|") if m],
        "reference": f"arrival-{number}",
    }


def _generated(rng: Random, number: int) -> dict[str, Any]:
    gpus, milli = rng.choice([(0, 1000), (1, 1000), (1, 500), (1, 320), (2, 1000), (8, 1000)])
    return {
        "name": f"job-{number}",
        "command": ["train", str(rng.randint(*SECONDS)), SAVES],
        "gpus": gpus,
        "gpu_milli": milli,
        "vcpu_milli": 4000 * max(gpus, 1),
        "ram_mib": 16_384 * max(gpus, 1),
        "reference": f"arrival-{number}",
    }


def real_job(number: int) -> tuple[dict[str, Any], str]:
    """A shell that computes something, and what it must print."""
    spec = {
        "name": f"real-{number}",
        "command": [
            "/bin/sh",
            "-c",
            f"echo gpus=$CUDA_VISIBLE_DEVICES rank=$RANK of $WORLD_SIZE; sleep 2; echo answer $(({number} * 7))",
        ],
        "gpus": 1 + number % 2,
        "vcpu_milli": 4000,
        "ram_mib": 4096,
        "reference": f"real-{number}",
        "checkpoint_grace_s": 5,
    }
    return spec, f"answer {number * 7}\n"
