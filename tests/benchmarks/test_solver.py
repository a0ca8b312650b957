"""CP-SAT as a peer: it keeps the rules, and finds the most of a batch that can be worked out by hand."""

import pytest

from benchmarks import solver
from benchmarks.traces import Nodes
from scheduler.core.types import Request

NODES = Nodes(cpu=[8000, 8000], ram=[1000, 1000], gpus=[2, 1], model=[0, 1], models=["a", "b"])


def ask(gpus=1, gpu_milli=1000, cpu=0, ram=0, models=0):
    return Request(job=1, cpu=cpu, ram=ram, gpus=gpus, gpu_milli=gpu_milli, models=models)


@pytest.mark.parametrize(
    ("asked", "milli"),
    [
        ([ask(gpus=3)], 0),  # no host has three
        ([ask(gpus=2), ask(), ask()], 3000),
        ([ask(gpus=2, models=0b10)], 0),  # the host of that model has one
        ([ask(cpu=9000)], 0),
        ([ask(cpu=5000), ask(cpu=5000), ask(cpu=5000)], 2000),  # one a host
        ([ask(ram=600), ask(ram=600), ask(ram=600)], 2000),
        ([ask(gpu_milli=600)] * 4, 1800),  # a share never spans two GPUs: one a GPU
        ([ask(gpu_milli=500)] * 7, 3000),
        ([ask(gpus=2), ask(gpu_milli=700), ask(gpu_milli=400), ask(gpu_milli=300)], 3000),
        ([ask(gpus=2), ask(gpu_milli=700, models=0b01)], 2000),  # a GPU is whole or cut, never both
    ],
)
def test_the_most_of_a_batch(asked, milli):
    found = solver.fill(NODES, [0, 1], asked, limit_s=10)
    assert (found.milli, found.bound) == (milli, milli)
    assert found.seconds > 0
