"""Traces: openb node and pod lists with their orders of arrival, or a seeded generator of the same form.

A pod list is CSV with cpu_milli, memory_mib, num_gpu, gpu_milli and optionally gpu_spec (models joined by '|'); an order
file is two lines of integers: arrivals (row numbers of the pod list) and the node permutation. Any files of that form work.
"""

from __future__ import annotations

import csv
import gzip
import os
import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from scheduler.core.score import Shape, cut, mix_of
from scheduler.core.types import I64, Fleet

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (42, 43, 44, 45, 46)

# The generator: node kinds and pod shapes in the proportions of a cluster of shared and whole GPUs.
_NODES: tuple[tuple[int, int, int, str, int], ...] = (
    (96_000, 786_432, 8, "G2", 45),
    (96_000, 393_216, 2, "T4", 33),
    (64_000, 262_144, 2, "P100", 11),
)
_NODES += ((128_000, 786_432, 8, "G3", 3), (64_000, 262_144, 4, "V100M16", 5), (96_000, 524_288, 8, "V100M32", 3))
_GPU_SHAPES: tuple[tuple[int, int, float], ...] = (
    (1, 1000, 48.0),
    (1, 460, 8.0),
    (1, 810, 6.0),
    (1, 320, 6.0),
    (1, 220, 5.0),
    (1, 590, 5.0),
    (1, 160, 4.0),
)
_GPU_SHAPES += ((1, 650, 3.0), (8, 1000, 0.6), (4, 1000, 0.3), (2, 1000, 0.3), (0, 0, 13.0))


@dataclass(frozen=True)
class Nodes:
    cpu: list[int]
    ram: list[int]
    gpus: list[int]
    model: list[int]
    models: list[str]

    def __len__(self) -> int:
        return len(self.cpu)

    @property
    def gpu_total(self) -> int:
        return sum(self.gpus)

    def fleet(self, order: list[int] | None = None) -> Fleet:
        """Hosts of 16 GiB devices in `order`, each under no power node (no public trace carries watts)."""
        return Fleet.build(
            [
                {"host_id": i, "cpu_free": self.cpu[i], "ram_free": self.ram[i], "gpu_model": self.model[i]}
                | {"gpus": self.gpus[i]}
                for i in (order if order is not None else range(len(self)))
            ]
        )


@dataclass(frozen=True)
class Trace:
    """Pods as columns [P]: `models` is a bit mask of model ids, 0 = any."""

    name: str
    pods: I64  # [P, 5]: cpu milli, RAM MiB, GPUs, milli, models
    specs: tuple[str, ...] = ()  # gpu_spec of each pod as written: the published mix counts spellings apart
    orders: dict[int, tuple[I64, list[int]]] = field(default_factory=dict)  # seed -> arrivals, node permutation

    def shapes(self, ties: int = 0) -> list[Shape]:
        """The mix of the original list. `ties`: a seed that orders shapes asked for equally often (0: first seen, first)."""
        order = np.random.default_rng(ties).permutation(len(self.pods)) if ties else np.arange(len(self.pods))
        specs = [self.specs[i] for i in order] if self.specs else ()
        return mix_of(((c, m, n, g, y, 1) for c, m, n, g, y in self.pods[order].tolist()), specs)

    def tied(self) -> bool:
        """Whether the mix is cut among shapes asked for equally often, so that its order decides which are in."""
        every = self.shapes()
        mix = cut(every)
        return len(mix) < len(every) and every[len(mix)].weight == mix[-1].weight


def directory(given: str | None) -> Path | None:
    """Where traces are: given, TAILRACE_TRACES, the shared folder beside the project, or nowhere."""
    for place in (given, os.environ.get("TAILRACE_TRACES"), str(ROOT.parent / "shared" / "traces")):
        if place and (Path(place) / "openb" / "openb_node_list_gpu_node.csv").exists():
            return Path(place)
    if given:
        raise SystemExit(f"--trace-dir {given}: no openb/openb_node_list_gpu_node.csv there")
    return None


def read_nodes(folder: Path) -> Nodes:
    with (folder / "openb" / "openb_node_list_gpu_node.csv").open() as file:
        rows = list(csv.DictReader(file))
    models = sorted({r["model"] for r in rows})
    return Nodes(
        [int(r["cpu_milli"]) for r in rows],
        [int(r["memory_mib"]) for r in rows],
        [int(r["gpu"]) for r in rows],
        [models.index(r["model"]) for r in rows],
        models,
    )


def trace_names(folder: Path) -> list[str]:
    """Pod lists of the folder that have at least one order file."""
    names = [
        p.name.removeprefix("openb_pod_list_").removesuffix(".csv")
        for p in (folder / "openb").glob("openb_pod_list_*.csv")
    ]
    return sorted(n for n in names if any((folder / "openb_orders").glob(f"openb_pod_list_{n}.*.txt.gz")))


def read_order(path: Path) -> tuple[I64, list[int]]:
    with gzip.open(path, "rt") as file:
        arrivals, permutation = (np.array(file.readline().split(), np.int64) for _ in range(2))
    return arrivals, permutation.tolist()


def read_trace(folder: Path, name: str, models: list[str], seeds: tuple[int, ...]) -> Trace:
    """A pod list and the orders of those seeds that are there."""
    pods, specs = [], []
    with (folder / "openb" / f"openb_pod_list_{name}.csv").open() as file:
        for r in csv.DictReader(file):
            mask = 0
            for model in filter(None, (r.get("gpu_spec") or "").split("|")):
                mask |= 1 << models.index(model) if model in models else 1 << 62
            specs.append(r.get("gpu_spec") or "")
            gpus = int(r["num_gpu"])
            pods.append((int(r["cpu_milli"]), int(r["memory_mib"]), gpus, int(r["gpu_milli"]) if gpus else 0, mask))
    orders = {}
    for seed in seeds:
        path = folder / "openb_orders" / f"openb_pod_list_{name}.{seed}.txt.gz"
        if path.exists():
            orders[seed] = read_order(path)
    return Trace(name, np.array(pods, np.int64), tuple(specs), orders)


def generate(nodes: int, seeds: tuple[int, ...], load: float = 1.3) -> tuple[Nodes, Trace]:
    """A cluster of `nodes` hosts and arrivals up to `load` of its GPUs, for each seed."""
    dice = random.Random(7)
    kinds = dice.choices(_NODES, [k[4] for k in _NODES], k=nodes)
    models = sorted({k[3] for k in _NODES})
    cluster = Nodes(
        [k[0] for k in kinds], [k[1] for k in kinds], [k[2] for k in kinds], [models.index(k[3]) for k in kinds], models
    )
    pods: list[tuple[int, ...]] = []
    for gpus, milli, _ in dice.choices(_GPU_SHAPES, [s[2] for s in _GPU_SHAPES], k=8000):
        per_gpu = (
            dice.choice((2000, 4000, 6000, 8000, 11_400)) if milli == 1000 else max(1000, milli * 8 // 1000 * 1000)
        )
        cpu = per_gpu * gpus if gpus else dice.choice((1000, 2000, 4000, 8000, 16_000))
        pods.append((cpu, cpu * 3, gpus, milli, 0))
    columns = np.array(pods, np.int64)
    orders = {}
    for seed in seeds:
        own = random.Random(seed)
        arrivals, demand = [], 0
        while demand < load * cluster.gpu_total * 1000:
            i = own.randrange(len(pods))
            arrivals.append(i)
            demand += pods[i][2] * pods[i][3]
        orders[seed] = (np.array(arrivals, np.int64), own.sample(range(nodes), nodes))
    return cluster, Trace("generated", columns, (), orders)


def published(folder: Path) -> dict[tuple[str, str, int], tuple[float, float]]:
    """(trace, policy, seed) -> allocated GPU % at demand 100 % and 130 %."""
    path = folder / "fgd_published.csv"
    if not path.exists():
        return {}
    with path.open() as file:
        return {
            (r["trace"], r["policy"], int(r["seed"])): (
                float(r["allocated_pct_at_100"]),
                float(r["allocated_pct_at_130"]),
            )
            for r in csv.DictReader(file)
        }
