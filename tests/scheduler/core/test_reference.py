"""Our FGD against the published simulator: the same node order gives the same placements."""

import os
from pathlib import Path

import numpy as np
import pytest

from benchmarks.packing import requests_of
from benchmarks.traces import ROOT, read_nodes, read_order, read_trace
from scheduler.core.pack import Packer, classes_of
from scheduler.core.plan import plan
from scheduler.core.score import tables_for
from scheduler.core.types import Policy, Request

pytestmark = pytest.mark.serverless

FOLDER = Path(os.environ.get("TAILRACE_TRACES") or ROOT.parent / "shared" / "traces")
ORDER = FOLDER / "openb_orders" / "default.42.node_order_of_reference_run.txt.gz"
needs_traces = pytest.mark.skipif(not ORDER.exists(), reason=f"no openb traces at {FOLDER} (set TAILRACE_TRACES)")


@needs_traces
def test_fgd_makes_the_placements_of_the_reference_run():
    nodes = read_nodes(FOLDER)
    trace = read_trace(FOLDER, "default", nodes.models, ())
    arrivals, rank = read_order(ORDER)
    fleet = nodes.fleet(np.argsort(rank).tolist())
    vectors, of = classes_of(requests_of(trace))
    packer = Packer(fleet, vectors, tables_for(fleet, trace.shapes(), "fgd"), steps=len(arrivals))
    run = packer.place(of[arrivals])
    placed = run.host >= 0
    pods = trace.pods[arrivals]
    assert len(arrivals) == 10_866
    assert placed.sum() == 8334
    assert (pods[:, 2] * pods[:, 3])[placed].sum() == 5_919_410
    assert pods[:, 0][placed].sum() == 89_928_302


@needs_traces
def test_the_planner_packs_openb_better_than_fgd():
    nodes = read_nodes(FOLDER)
    trace = read_trace(FOLDER, "default", nodes.models, (42,))
    arrivals, rank = trace.orders[42]
    fleet = nodes.fleet(np.argsort(rank).tolist())
    shapes = tuple((s.cpu, s.ram, s.gpus, s.gpu_milli, s.models, s.weight) for s in trace.shapes())
    requests = []
    for i, (cpu, ram, gpus, milli, models) in enumerate(trace.pods[arrivals].tolist()):
        requests.append(
            Request(i, cpu=cpu, ram=ram, gpus=gpus, gpu_milli=milli if gpus else 1000, models=models, queued_at=i)
        )
    milli = {}
    for packer in ("fgd", "tailrace"):
        result = plan(fleet, requests, policy=Policy(packer=packer, shapes=shapes))
        milli[packer] = sum(p.gpu_milli * len(p.gpus) for p in result.placements)
        assert len(result.decisions) == len(requests)
    assert milli["tailrace"] >= milli["fgd"] + 0.004 * 6_212_000
