"""The churn benchmark's own rules, on a small generated cell."""

import numpy as np
import pytest

from benchmarks import churn, packing, traces
from scheduler.core.pack import classes_of
from scheduler.core.score import tables_for

pytestmark = pytest.mark.serverless


@pytest.fixture(scope="module")
def small():
    nodes, trace = traces.generate(60, (1,))
    return nodes, trace, *classes_of(packing.requests_of(trace))


def test_the_load_is_the_one_asked_for_and_comes_from_its_seed(small):
    nodes, trace, _, _ = small
    load = churn.load_of(nodes, trace, 3, 1.0)
    again = churn.load_of(nodes, trace, 3, 1.0)
    assert (load.at == again.at).all()
    assert (load.life == again.life).all()
    fresh = load.at > 0
    asked = trace.pods[load.pod, 2] * trace.pods[load.pod, 3]
    offered = (asked * load.life)[fresh].sum() / (nodes.gpu_total * 1000 * load.end)
    assert offered == pytest.approx(churn.LOAD)


@pytest.mark.parametrize("policy", list(churn.POLICIES))
def test_every_policy_keeps_the_books_and_its_moves(small, policy):
    nodes, trace, vectors, of = small
    packer, moves = churn.POLICIES[policy]
    load = churn.load_of(nodes, trace, 3, 0.5)
    tables = tables_for(nodes.fleet(), trace.shapes(), packer)
    cell = churn.Cell(nodes, load, vectors, of, tables, moves=moves)
    done = cell.run()  # asserts that nothing is oversold and that the books balance
    assert done.placed > 0.5 * len(load.at)
    assert done.moves <= done.arrivals / churn.ARRIVALS_A_MOVE + 4 * churn.REACH
    assert moves or not done.moves
    started = int((cell.row >= 0).sum())
    assert sum(len(jobs) for jobs in cell.on.values()) == started
    for row, jobs in cell.on.items():
        assert all(cell.row[j] == row for j in jobs)


def test_the_bound_is_the_load_where_nothing_is_wasted_and_more_where_shares_leave_holes():
    whole = traces.Trace("whole", np.array([[1000, 1000, 1, 1000, 0]] * 4, np.int64))
    assert churn.bound(whole) == pytest.approx(1 - churn.LOAD)
    shares = traces.Trace("shares", np.array([[1000, 1000, 1, 600, 0]] * 4, np.int64))
    assert churn.bound(shares) == pytest.approx(0.4)  # one of 600 to a GPU
