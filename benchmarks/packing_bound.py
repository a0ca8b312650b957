"""What nobody can beat in the packing benchmark: a linear program over kinds of hosts, solved by HiGHS.

Jobs are divided over kinds of hosts as a fluid; of each kind there is so much CPU, memory and GPU. Shares of a GPU are held to it twice:
by their milli, and by their hole prices, which are dual feasible for the cutting-stock problem of the shares that arrived: no GPU holds
shares priced above 1000 together (`score.hole_prices`; prices are exact for shares that are multiples of 10 milli). Whatever any
policy allocates, with any number of moves, is a point of this program, so its optimum is a bound; holes that only whole hosts
leave (a job of 8 GPUs needs one host) are not in it.
"""

from __future__ import annotations

import numpy as np

from benchmarks.harness import require
from benchmarks.traces import Nodes
from scheduler.core.score import GRID, hole_prices
from scheduler.core.types import I64, WHOLE


def allocated(nodes: Nodes, arrived: I64, kept: I64) -> float | None:
    """Most GPU that can be allocated of the pods `arrived` [P, 5] with all of `kept` [K, 5] (some of them) placed, in % of the
    GPUs; None without `highspy`.
    """
    try:
        import highspy
    except ImportError:
        return None
    kinds, hosts = np.unique(np.array([nodes.cpu, nodes.ram, nodes.gpus, nodes.model]).T, axis=0, return_counts=True)
    shapes, count = np.unique(arrived, axis=0, return_counts=True)
    least = np.zeros(len(shapes))
    for row, n in zip(*np.unique(kept, axis=0, return_counts=True), strict=True) if len(kept) else ():
        least[int(np.flatnonzero((shapes == row).all(axis=1))[0])] = n
    cpu, ram, gpus, milli, models = shapes.T
    require(not (milli % GRID).any(), f"a share that is no multiple of {GRID} milli: its price would not be exact")
    shares = np.unique(milli[(gpus > 0) & (milli < WHOLE)]).tolist()
    prices = hole_prices({v: float(count[(milli == v) & (gpus > 0)].sum()) for v in shares})
    asked = (gpus * milli).astype(float)
    priced = np.array(
        [prices.get(m, float(WHOLE * g)) if g else 0.0 for g, m in zip(gpus.tolist(), milli.tolist(), strict=True)]
    )
    fits = (cpu <= kinds[:, :1]) & (ram <= kinds[:, 1:2]) & (gpus <= kinds[:, 2:3])
    fits &= (models == 0) | (gpus == 0) | ((models >> kinds[:, 3:4]) & 1 == 1)
    kind, shape = np.nonzero(fits)
    if not len(shape):
        return 0.0
    of_kind = np.stack([asked[shape], priced[shape], cpu[shape], ram[shape]]).astype(float)  # [4, columns]
    room = np.stack([kinds[:, 2] * WHOLE, kinds[:, 2] * WHOLE, kinds[:, 0], kinds[:, 1]]) * hosts
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = len(shape), 4 * len(kinds) + len(shapes)
    lp.col_cost_ = asked[shape]
    lp.col_lower_, lp.col_upper_ = np.zeros(len(shape)), np.full(len(shape), highspy.kHighsInf)
    lp.row_lower_ = np.r_[np.full(4 * len(kinds), -highspy.kHighsInf), least]
    lp.row_upper_ = np.r_[room.T.ravel(), count].astype(float)
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_ = np.arange(0, 5 * len(shape) + 1, 5, dtype=np.int32)
    lp.a_matrix_.index_ = (
        np.column_stack([4 * kind[:, None] + np.arange(4), 4 * len(kinds) + shape]).ravel().astype(np.int32)
    )
    lp.a_matrix_.value_ = np.vstack([of_kind, np.ones(len(shape))]).T.ravel()
    lp.sense_ = highspy.ObjSense.kMaximize
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.passModel(lp)
    solver.run()
    require(solver.getModelStatus() == highspy.HighsModelStatus.kOptimal, "HiGHS found no optimum")
    return 100 * float(solver.getInfo().objective_function_value) / (WHOLE * nodes.gpu_total)
