"""What the churn benchmark offers to a cell: jobs with arrivals and lives from a seed, and the least that stays unallocated under it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.traces import Nodes, Trace
from scheduler.core.score import hole_prices
from scheduler.core.types import F64, I64, WHOLE

LOAD = 0.98
MEAN_S = 7200.0
SIGMA = 1.0
MOVABLE = 0.7


@dataclass(frozen=True)
class Load:
    """Jobs in order of arrival; those at time 0 stand there already."""

    at: F64  # s
    life: F64  # s
    pod: I64  # row of the pod list
    movable: np.ndarray
    settled: float  # counting starts
    end: float


def load_of(nodes: Nodes, trace: Trace, seed: int, lifetimes: float) -> Load:
    """A seeded load over `lifetimes` mean lifetimes after the one that settles."""
    dice = np.random.default_rng(seed)
    asked = (trace.pods[:, 2] * trace.pods[:, 3]).astype(float)
    rate = LOAD * nodes.gpu_total * 1000 / (asked.mean() * MEAN_S)
    settled, end = MEAN_S, MEAN_S * (1 + lifetimes)
    standing = int(rate * MEAN_S)
    arrivals = np.cumsum(dice.exponential(1 / rate, int(rate * end * 1.1) + 100))
    arrivals = arrivals[arrivals < end]
    mu = np.log(MEAN_S) - SIGMA**2 / 2
    # Who stands there at time 0 was met with a chance in proportion to his life, at an even point of it.
    residual = np.exp(mu + SIGMA**2 + SIGMA * dice.standard_normal(standing)) * dice.random(standing)
    fresh = np.exp(mu + SIGMA * dice.standard_normal(len(arrivals)))
    pod = dice.integers(0, len(trace.pods), standing + len(arrivals))
    # The load asked for, not the one that the dice happened to give: a few long lives of large jobs carry much of it.
    fresh *= LOAD * nodes.gpu_total * 1000 * end / float(asked[pod[standing:]] @ fresh)
    count = standing + len(arrivals)
    return Load(
        at=np.concatenate([np.zeros(standing), arrivals]),
        life=np.concatenate([residual, fresh]),
        pod=pod,
        movable=dice.random(count) < MOVABLE,
        settled=settled,
        end=end,
    )


def bound(trace: Trace) -> float:
    """Least share of the GPUs that any policy leaves unallocated under this load in the long run, moves unlimited.

    Hole prices are dual feasible: no GPU holds shares priced above 1000 together. So what runs, priced, is at most the capacity,
    and of each shape no more than is offered: a fractional knapsack, shapes that waste least first.
    """
    demand: dict[int, float] = {}
    for _, _, gpus, milli, _ in trace.pods.tolist():
        if gpus:
            demand[milli] = demand.get(milli, 0.0) + gpus
    shares = {v: n for v, n in demand.items() if v < WHOLE}
    prices = {**hole_prices(shares), WHOLE: float(WHOLE)}
    scale = LOAD / sum(v * n for v, n in demand.items())
    room, allocated = 1.0, 0.0
    for v in sorted(demand, key=lambda v: prices[v] / v):
        offered = scale * v * demand[v]
        taken = min(offered, room * v / prices[v] if prices[v] else offered)
        allocated += taken
        room -= taken * prices[v] / v
    return 1 - allocated
