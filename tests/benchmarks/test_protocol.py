"""The dice of the published protocol: known numbers, and the order files made again from their seeds."""

import numpy as np
import pytest

from benchmarks import protocol, traces
from benchmarks.traces import directory, read_nodes, read_order, read_trace

pytestmark = pytest.mark.serverless
FOLDER = directory(None)
needs_traces = pytest.mark.skipif(FOLDER is None, reason="no openb traces (set TAILRACE_TRACES)")


def test_the_generator_gives_the_numbers_that_everybody_knows():
    dice = protocol.Dice(1)
    assert [dice.below(100) for _ in range(10)] == [81, 87, 47, 59, 81, 18, 25, 40, 56, 0]


def test_a_permutation_and_a_shuffle_are_that():
    dice = protocol.Dice(7)
    assert sorted(dice.permutation(100)) == list(range(100))
    items = list(range(50))
    dice.shuffle(items)
    assert sorted(items) == list(range(50)) != items


def test_an_order_asks_for_what_it_should():
    nodes, trace = traces.generate(60, (1,))
    for ratio in (0.2, 1.3):
        arrivals, listed, rank = protocol.order(trace.pods, nodes.gpu_total, 5, len(nodes), ratio)
        demand = (trace.pods[arrivals, 2] * trace.pods[arrivals, 3]).sum() / (1000 * nodes.gpu_total)
        assert ratio - 0.05 < demand < ratio + 0.02
        assert sorted(listed) == sorted(rank) == list(range(60))
        assert listed != rank


@needs_traces
@pytest.mark.parametrize(("name", "seed"), [("default", 42), ("gpuspec33", 44), ("multigpu50", 46)])
def test_the_order_files_come_from_their_seeds(name, seed):
    nodes = read_nodes(FOLDER)
    trace = read_trace(FOLDER, name, nodes.models, (seed,))
    arrivals, listed, rank = protocol.order(trace.pods, nodes.gpu_total, seed, len(nodes))
    assert (arrivals == trace.orders[seed][0]).all()
    assert listed == trace.orders[seed][1]
    if (name, seed) == ("default", 42):
        assert rank == read_order(FOLDER / "openb_orders" / "default.42.node_order_of_reference_run.txt.gz")[1]
    assert np.all(np.bincount(rank) == 1)
