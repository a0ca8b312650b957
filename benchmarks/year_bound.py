"""What nobody can beat: the year as one linear program that knows every price, call and job beforehand.

Work is a fluid: in hour h some GPU-hours x[h] are done, never more than the site has, and never before they were asked for; a
GPU-hour books the least that one can, on a full host. Watts left over hash in the hulls of all machines' ladders as if only the
site's cap bound. Both relax what holds in truth (gangs, whole hosts, PDUs, whole steps, ramps), and any real year is a point of
the program. So no policy earns more.
"""

from __future__ import annotations

from dataclasses import dataclass

import highspy
import numpy as np

from benchmarks.harness import require
from benchmarks.year_site import FEE_PPM, PUE_GPU, PUE_MINER
from scheduler.core.types import F64, I64


@dataclass(frozen=True)
class Bound:
    """USD: of the jobs (net of their energy), of hashing (net of its energy, without what sleeping machines draw)."""

    total: float
    gpu_hours: float


def solve(
    step_w: I64, step_ghs: I64, energy: I64, hashprice: I64, room_mw: F64, asked: F64, gpus: int, gpu_usd_h: float,
    book_w: float, draw_w: float,
) -> Bound:  # fmt: skip
    """`room_mw[h]`: what the root leaves to steps of miners and to GPUs in use, both counted with their overheads; `asked[h]`:
    GPU-hours that became due in h; `book_w`, `draw_w`: least that a GPU in use books, and draws.
    """
    order = np.argsort(-step_ghs / step_w, kind="stable")
    watts, ghs = step_w[order].astype(float), step_ghs[order].astype(float)
    top = np.concatenate([[0.0], np.cumsum(watts)])
    hours, infinite = len(energy), highspy.kHighsInf
    net = hashprice / 1e6 * (1 - FEE_PPM / 1e6) / 24e6  # USD per GH/s and hour
    cost = energy / 1e6 * PUE_MINER / 1e9  # USD per W and hour
    low = room_mw / PUE_MINER - gpus * book_w * PUE_GPU / PUE_MINER
    rows: list[tuple[int, float, float]] = []  # y[h] + slope * w_ratio * x[h] <= value
    ratio = book_w * PUE_GPU / PUE_MINER
    for h in range(hours):
        gain = np.maximum(0.0, ghs / watts * net[h] - cost[h])  # USD per W and hour of each step, falling
        worth = np.concatenate([[0.0], np.cumsum(gain * watts)])
        first, last = np.searchsorted(top, [max(0.0, low[h]), room_mw[h] / PUE_MINER])
        # A tangent of a concave curve lies above it everywhere: one for each step between "all GPUs busy" and "none".
        for s in range(max(1, first), min(len(watts), last) + 1):
            slope = gain[s - 1]
            rows.append((h, slope * ratio, worth[s] + slope * (room_mw[h] / PUE_MINER - top[s])))
        if last > len(watts):
            rows.append((h, 0.0, worth[-1]))
    value = gpu_usd_h - draw_w * PUE_GPU / 1e9 * energy / 1e6
    n, m = 3 * hours, len(rows)
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = n, m + hours
    lp.col_cost_ = np.concatenate([value, np.ones(hours), np.zeros(hours)])  # x, y, what waits
    lp.col_lower_ = np.zeros(n)
    lp.col_upper_ = np.concatenate([np.full(hours, float(gpus)), np.full(2 * hours, infinite)])
    lp.row_lower_ = np.concatenate([np.full(m, -infinite), asked])
    lp.row_upper_ = np.concatenate([[row[2] for row in rows], asked])
    index, entries, start = [], [], [0]
    for h, slope, _ in rows:
        index += [h, hours + h]
        entries += [slope, 1.0]
        start.append(len(index))
    for h in range(hours):  # x + waits - waited = asked
        index += [h, 2 * hours + h]
        entries += [1.0, 1.0]
        if h:
            index.append(2 * hours + h - 1)
            entries.append(-1.0)
        start.append(len(index))
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = np.array(start, np.int32)
    lp.a_matrix_.index_, lp.a_matrix_.value_ = np.array(index, np.int32), np.array(entries)
    lp.sense_ = highspy.ObjSense.kMaximize
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.passModel(lp)
    solver.run()
    require(solver.getModelStatus() == highspy.HighsModelStatus.kOptimal, "HiGHS found no optimum")
    done = np.array(solver.getSolution().col_value[:hours])
    return Bound(float(solver.getInfo().objective_function_value), float(done.sum()))
