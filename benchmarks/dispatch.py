"""Dispatch of 20,000 and 200,000 miners under a four-level power tree: time of one whole plan, and its distance to the optimum.

Beside it, in the same run: HiGHS solving the LP relaxation (mode shares per miner, no hull, no greedy) where `highspy` is
installed, and the module's own divisible bound, which HiGHS confirms. The gap is the worst over three kinds of fleet: every
machine with a ladder of its own, identical machines by model, and the first again with its caps cut by a third.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.harness import Options, Report, require
from scheduler.core.dispatch import (
    Fleet,
    Ints,
    Plan,
    Prices,
    lp_bound_uusd_h,
    miner_budget_mw,
    mode_values,
    plan_dispatch,
    plan_fast,
)
from scheduler.core.power import MINER, Load, NodeSpec, PowerTree, margins_w, reserved_mw

# $39.53 per PH/s-day, $45 per MWh, 1 % pool fee, PUE 1.04: research/power.md section 4.
PRICES = Prices(39_530_000, 45_000_000, pool_fee_ppm=10_000, pue_permille=1040)
# Nameplate W and TH/s of machines in the field: research/power.md section 2.
MODELS = ((3250, 110), (3500, 200), (3010, 140), (3068, 104), (3510, 234), (3645, 270), (2760, 120))
LEVELS = (0.30, 0.42, 0.55, 0.68, 0.80, 0.90, 1.00)  # power levels of a ladder, share of nameplate
PER_PDU, PDUS_PER_TRANSFORMER, TRANSFORMERS_PER_BUILDING = 150, 8, 2


@dataclass(frozen=True)
class Problem:
    tree: PowerTree
    fleet: Fleet
    budget_mw: Ints


def problem(miners: int, seed: int, *, identical: bool = False, caps: float = 1.0) -> Problem:
    """A seeded site: hash rate goes as watts^0.75 (research/power.md section 6); caps bind at every level of the tree."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, len(MODELS), miners)
    ladders = []
    for kind in range(len(MODELS)) if identical else kinds:
        watts, ths = MODELS[kind]
        skew = 1.0 if identical else rng.normal(1.0, 0.03)
        noise = np.zeros(len(LEVELS)) if identical else rng.normal(0.0, 0.004, len(LEVELS))
        steps = [
            (int(watts * share * skew), int(1000 * ths * share**0.75 * (1 + e)))
            for share, e in zip(LEVELS, noise, strict=True)
        ]
        ladders.append([(watts // 50, 0), *steps])
    pdus = -(-miners // PER_PDU)
    transformers = -(-pdus // PDUS_PER_TRANSFORMER)
    buildings = -(-transformers // TRANSFORMERS_PER_BUILDING)
    home = rng.integers(0, pdus, miners)
    top = np.array([ladders[kind if identical else i][-1][0] for i, kind in enumerate(kinds)])
    pdu_w = (np.bincount(home, top, minlength=pdus) * rng.uniform(0.75, 1.1, pdus) * caps).astype(int)
    transformer_w = np.bincount(np.arange(pdus) // PDUS_PER_TRANSFORMER, pdu_w, minlength=transformers)
    transformer_w = (transformer_w * rng.uniform(0.9, 1.05, transformers)).astype(int)
    building_w = np.bincount(np.arange(transformers) // TRANSFORMERS_PER_BUILDING, transformer_w, minlength=buildings)
    building_w = (building_w * rng.uniform(0.9, 1.05, buildings)).astype(int)
    site = NodeSpec("site", None, int(building_w.sum() * 0.92 * 1.04), overhead_miner_permille=1040)
    nodes = [site]
    nodes += [NodeSpec(("b", b), "site", int(w)) for b, w in enumerate(building_w)]
    nodes += [NodeSpec(("t", t), ("b", t // TRANSFORMERS_PER_BUILDING), int(w)) for t, w in enumerate(transformer_w)]
    nodes += [NodeSpec(("p", p), ("t", p // PDUS_PER_TRANSFORMER), int(w)) for p, w in enumerate(pdu_w)]
    tree = PowerTree.of(nodes)
    fleet = Fleet.of([tree.index["p", int(p)] for p in home], kinds if identical else np.arange(miners), ladders)
    return Problem(tree, fleet, miner_budget_mw(tree, Load.of(tree, [], [], []), margins_w(tree)))


def check(given: Problem, plan: Plan) -> None:
    """Every node within its budget, by the ledger's own sums, and most machines at work."""
    watts = given.fleet.watts[given.fleet.at(plan.modes)]
    load = Load.of(given.tree, given.fleet.node, np.full(len(watts), MINER), watts)
    require(
        not plan.over and bool((reserved_mw(given.tree, load) <= given.budget_mw).all()), "a node is over its budget"
    )
    require((plan.modes > 0).mean() > 0.5, "most machines sleep")


def highs_lp(given: Problem, values: Ints) -> tuple[float, float] | None:
    """Optimum and seconds of HiGHS on the LP relaxation as textbooks write it, or None without `highspy`."""
    try:
        import highspy
    except ImportError:
        return None
    tree, fleet = given.tree, given.fleet
    n, nodes, infinite = len(fleet.node), len(tree.keys), highspy.kHighsInf
    sizes = np.diff(fleet.off)[fleet.ladder]
    owner = np.repeat(np.arange(n), sizes)
    entry = fleet.off[fleet.ladder][owner] + np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    paths = [tree.paths[fleet.node[i]] for i in range(n)]
    depth = np.array([len(path) for path in paths])[owner]
    start = np.r_[0, np.cumsum(depth + 1)]
    index, value = np.empty(start[-1], np.int32), np.empty(start[-1])
    for column, (i, e) in enumerate(zip(owner.tolist(), entry.tolist(), strict=True)):
        at = start[column]
        index[at], value[at] = nodes + i, 1.0
        for offset, node in enumerate(paths[i]):
            index[at + 1 + offset], value[at + 1 + offset] = node, fleet.watts[e] / 1000
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = len(owner), nodes + n
    lp.col_cost_ = values[entry] / 1e6
    lp.col_lower_, lp.col_upper_ = np.zeros(len(owner)), np.ones(len(owner))
    lp.row_lower_ = np.r_[np.full(nodes, -infinite), np.ones(n)]
    lp.row_upper_ = np.r_[given.budget_mw / tree.k[:, MINER] / 1000, np.ones(n)]
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_ = start.astype(np.int32), index, value
    lp.sense_ = highspy.ObjSense.kMaximize
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    began = time.perf_counter()
    solver.passModel(lp)
    solver.run()
    took = time.perf_counter() - began
    require(solver.getModelStatus() == highspy.HighsModelStatus.kOptimal, "HiGHS found no optimum")
    return solver.getInfo().objective_function_value * 1e6, took


def timed_plans(given: Problem, repeats: int) -> tuple[Plan, list[float]]:
    asleep = np.zeros(len(given.fleet.node), np.int16)
    plan = plan_dispatch(given.tree, given.fleet, PRICES, asleep, budget_mw=given.budget_mw)  # compiled and warm
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        plan = plan_dispatch(given.tree, given.fleet, PRICES, asleep, budget_mw=given.budget_mw)
        taken.append(1000 * (time.perf_counter() - began))
    check(given, plan)
    return plan, taken


def run(options: Options) -> Report:
    seed = options.seeds[0] if options.seeds else 42
    table = [["fleet", "miners", "ms (least)", "ms (median)", "gap % to bound", "$/h"]]
    gaps: list[float] = []
    least: dict[int, float] = {}
    for miners in (20_000, 200_000):
        kinds: dict[str, dict[str, Any]] = {
            "own ladders": {},
            "identical": {"identical": True},
            "caps cut by a third": {"caps": 0.67},
        }
        for name, kind in kinds.items():
            if options.quick and miners > 20_000 and kind:
                continue
            given = problem(miners, seed, **kind)
            plan, taken = timed_plans(given, 9)
            bound = lp_bound_uusd_h(given.tree, given.fleet, mode_values(given.fleet, PRICES), given.budget_mw)
            require(plan.value_uusd_h <= bound * (1 + 1e-9), "a plan above its bound")
            gaps.append(100 * (bound - plan.value_uusd_h) / bound)
            least[miners] = max(least.get(miners, 0.0), min(taken))
            median = statistics.median(taken)
            row = [name, f"{miners:,}", f"{min(taken):.2f}", f"{median:.2f}", f"{gaps[-1]:.6f}"]
            table.append([*row, f"{plan.value_uusd_h / 1e6:,.2f}"])

    given = problem(20_000, seed)
    plan, _ = timed_plans(given, 1)
    cut = given.budget_mw.copy()
    cut[0] -= 5_000_000_000  # a call for 5 MW
    began = time.perf_counter()
    fast = plan_fast(given.tree, given.fleet, PRICES, plan.modes, budget_mw=cut)
    fast_ms = 1000 * (time.perf_counter() - began)
    began = time.perf_counter()
    limited = plan_dispatch(given.tree, given.fleet, PRICES, plan.modes, budget_mw=cut, change_limit=fast.changes)
    limited_ms = 1000 * (time.perf_counter() - began)
    check(given, fast)
    require(limited.changes <= fast.changes, "more changes than allowed")

    small = problem(2_000, seed) if options.quick else given
    values = mode_values(small.fleet, PRICES)
    bound = lp_bound_uusd_h(small.tree, small.fleet, values, small.budget_mw)
    peer = {"fast_tier_5mw_ms": fast_ms, "change_limited_5mw_ms": limited_ms}
    solved = highs_lp(small, values)
    if solved is not None:
        optimum, seconds = solved
        require(abs(optimum - bound) <= 1e-6 * abs(bound), f"HiGHS says {optimum}, the divisible bound {bound}")
        peer |= {"highs_lp_ms": 1000 * seconds, "highs_against_bound_pct": 100 * (bound - optimum) / optimum}
    return Report(
        "dispatch",
        figures={"ms_20k": least[20_000], "ms_200k": least[200_000], "gap_pct": max(gaps)},
        peer=peer,
        must={"ms_20k": ("<=", 10), "ms_200k": ("<=", 100), "gap_pct": ("<=", 0.01)},
        table=table,
        conditions={
            "seed": seed,
            "ladder": f"asleep + {len(LEVELS)} levels",
            "ms": "least of 9 whole plans, the slowest kind of fleet",
            "bound": f"HiGHS LP on {len(small.fleet.node):,} miners agrees"
            if solved
            else "own divisible bound; highspy is not installed",
        },
    )
