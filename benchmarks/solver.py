"""OR-Tools' CP-SAT as a packer: a whole batch of arrivals onto a sample of hosts, the most GPU capacity allocated.

It is given what no scheduler has, all arrivals at once, and the same rules: CPU and memory of each host, models, whole GPUs or a
share of one. Requests of one shape are counted, not told apart, so that no permutation of equals is searched twice.

It runs in a process of its own: OR-Tools brings a HiGHS, highspy another, and one process cannot hold both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.traces import Nodes
from scheduler.core.types import WHOLE, Request

if TYPE_CHECKING:
    from ortools.sat.python import cp_model


class Filled(NamedTuple):
    """`milli` allocated, at most `bound`; `seconds` of CPU."""

    milli: int
    bound: int
    seconds: float


def fill(nodes: Nodes, hosts: Sequence[int], requests: Sequence[Request], limit_s: float) -> Filled:
    """The best allocation of `requests` onto `hosts` (rows of `nodes`) that one thread finds within `limit_s`. Raises RuntimeError when
    it finds none.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
        return alone.submit(_fill, nodes, hosts, requests, limit_s).result()


def _fill(nodes: Nodes, hosts: Sequence[int], requests: Sequence[Request], limit_s: float) -> Filled:
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    shapes = Counter((r.cpu, r.ram, r.gpus, r.gpu_milli, r.models) for r in requests)
    placed: dict[tuple[int, int, int, int, int], list[cp_model.LinearExprT]] = {shape: [] for shape in shapes}
    for host in hosts:
        gpus = nodes.gpus[host]
        here = {
            shape: model.new_int_var(0, many, "")
            for shape, many in shapes.items()
            if shape[2] <= gpus and (not shape[4] or shape[4] >> nodes.model[host] & 1)
        }
        model.add(sum(shape[0] * count for shape, count in here.items()) <= nodes.cpu[host])
        model.add(sum(shape[1] * count for shape, count in here.items()) <= nodes.ram[host])
        whole = sum(shape[2] * count for shape, count in here.items() if shape[2] and shape[3] == WHOLE)
        shares = {shape: count for shape, count in here.items() if shape[2] and shape[3] < WHOLE}
        shared = [model.new_bool_var("") for _ in range(gpus)]  # this GPU is cut into shares
        model.add(whole + sum(shared) <= gpus)
        for one, other in pairwise(shared):
            model.add(one >= other)  # which of equal GPUs it is does not matter
        cuts = {shape: [model.new_int_var(0, WHOLE // shape[3], "") for _ in shared] for shape in shares}
        for shape, count in shares.items():
            model.add(sum(cuts[shape]) == count)
        for gpu, cut in enumerate(shared):
            model.add(sum(shape[3] * each[gpu] for shape, each in cuts.items()) <= WHOLE * cut)
        for shape, count in here.items():
            placed[shape].append(count)
        for count in (*here.values(), *shared, *(cut for each in cuts.values() for cut in each)):
            model.add_hint(count, 0)  # nothing placed is where the search may start
    for shape, many in shapes.items():
        model.add(sum(placed[shape]) <= many)
    model.maximize(sum(shape[2] * shape[3] * sum(counts) for shape, counts in placed.items()))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.max_time_in_seconds = limit_s
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        raise RuntimeError(f"CP-SAT found no allocation within {limit_s} s: {solver.status_name(status)}")
    return Filled(round(solver.objective_value), int(solver.best_objective_bound), solver.user_time)
