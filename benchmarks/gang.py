"""A gang of 2,304 replicas on 2,500 hosts, 16 a rack, 16 racks a block (the shape of Kueue's topology-aware benchmark).

Measured: from the request to booked replicas on a warm planner state (count, choose the domain, book), then undone.
The peer is the same algorithm in plain Python on the same hosts.
"""

from __future__ import annotations

import numpy as np

from benchmarks.harness import Options, Report, best_of, require
from scheduler.core import gang
from scheduler.core.fit import HostRow, choose_gpus, fits_one, host_row
from scheduler.core.fit_kernels import request_vector
from scheduler.core.pack import make_state
from scheduler.core.state import State
from scheduler.core.types import Fleet, Level, Reason, Request, Topology

HOSTS, RACK, RACKS_A_BLOCK, REPLICAS = 2500, 16, 16, 2304
BLOCKS = -(-HOSTS // (RACK * RACKS_A_BLOCK))


def cell(hosts: int = HOSTS) -> Fleet:
    """Hosts of 96 CPU under a PDU a rack, a transformer a block and a site; every seventh is half taken."""
    racks = -(-hosts // RACK)
    nodes = [{"parent": -1, "k_gpu": 1200, "free_mw": 10**11}]
    nodes += [{"parent": 0, "free_mw": 10**10} for _ in range(BLOCKS)]
    nodes += [{"parent": 1 + r // RACKS_A_BLOCK, "free_mw": 10**9} for r in range(racks)]
    return Fleet.build(
        [
            {"host_id": i, "cpu_free": 48_000 if i % 7 == 0 else 96_000, "ram_free": 786_432, "gpus": 8, "vram": 81_920}
            | {"leaf": i // RACK, "spine": i // (RACK * RACKS_A_BLOCK), "power_node": 1 + BLOCKS + i // RACK}
            | {"parked_w": 500, "base_w": 1500, "gpu_min_w": 100, "gpu_max_w": 700}
            for i in range(hosts)
        ],
        nodes,
    )


def plain(rows: list[HostRow], request: Request) -> int:
    """The same in plain Python: count, sum per block, choose the tightest block or the cell, book one by one."""
    counts = []
    for row in rows:
        n = 0
        if fits_one(row, request, ()).reason == Reason.OK:
            n = min(row.cpu_free // max(1, request.cpu), row.ram_free // max(1, request.ram))
            if request.gpus:
                n = min(n, sum(g >= 1000 for g in row.gpu_free[: row.gpu_count]) // request.gpus)
        counts.append(n)
    blocks: dict[int, int] = {}
    for i, n in enumerate(counts):
        block = i // (RACK * RACKS_A_BLOCK)
        blocks[block] = blocks.get(block, 0) + n
    enough = [b for b, n in blocks.items() if n >= request.replicas]
    chosen = {min(enough, key=lambda b: blocks[b])} if enough else set(blocks)
    done = 0
    for i in sorted(range(len(rows)), key=lambda i: -counts[i]):
        if i // (RACK * RACKS_A_BLOCK) not in chosen:
            continue
        row = rows[i]
        for _ in range(min(counts[i], request.replicas - done)):
            reason, gpus = choose_gpus(row, request)
            if reason:
                break
            free = [0 if g in gpus else v for g, v in enumerate(row.gpu_free)]
            row = row._replace(cpu_free=row.cpu_free - request.cpu, ram_free=row.ram_free - request.ram, gpu_free=free)
            done += 1
    return done


def measure(fleet: Fleet, state: State, request: Request, options: Options) -> tuple[int, float, float]:
    """(hosts used, ms, ms of the peer) of one gang."""
    q = request_vector(request)
    before = state.rows.copy()

    def book() -> gang.Gang:
        placed = gang.place_gang(state, q, request.replicas, request.topology)
        require(placed is not None and len(placed.host) == request.replicas, f"job {request.job}: not placed whole")
        assert placed is not None
        gang.release_kernel(q, state, placed.host, placed.mask, request.replicas)
        return placed

    placed = book()
    blocks = {int(h) // (RACK * RACKS_A_BLOCK) for h in placed.host}
    require(not request.topology.required or len(blocks) == 1, f"job {request.job}: over {len(blocks)} blocks")
    ms = 1000 * best_of(20 if options.quick else 100, book)
    require(bool((state.rows == before).all()), f"job {request.job}: undo left something")
    rows = [host_row(fleet, h) for h in range(len(fleet))]
    done: list[int] = []
    plain_ms = 1000 * best_of(1 if options.quick else 3, lambda: done.append(plain(rows, request)))
    require(done[0] == request.replicas, f"job {request.job}: the peer placed {done[0]}")
    return len(np.unique(placed.host)), ms, plain_ms


def run(options: Options) -> Report:
    fleet = cell()
    state = make_state(fleet)
    block, anywhere = Topology(Level.SPINE, required=True), Topology(Level.SPINE)
    requests = {
        "8 CPU each, one block": Request(job=1, replicas=REPLICAS, cpu=8000, ram=16_384, topology=block),
        "8 GPU each, whole cell": Request(job=2, replicas=REPLICAS, gpus=8, cpu=32_000, topology=anywhere),
        "1 GPU each, one block": Request(job=3, replicas=1900, gpus=1, cpu=4000, topology=block),
    }
    table = [["gang", "replicas", "hosts used", "ms", "plain Python ms"]]
    times = []
    for name, request in requests.items():
        hosts, ms, plain_ms = measure(fleet, state, request, options)
        table.append([name, str(request.replicas), str(hosts), f"{ms:.3f}", f"{plain_ms:.1f}"])
        times.append((ms, plain_ms))
    return Report(
        "gang",
        {"ms": max(t[0] for t in times)},
        {"plain_python_ms": max(t[1] for t in times), "kueue_same_shape_elsewhere_ms": 31.9},
        {
            "hosts": HOSTS,
            "rack": RACK,
            "racks_a_block": RACKS_A_BLOCK,
            "figure": "slowest gang, best of repeats, booked and undone",
        },
        {"ms": ("<=", 2.0)},
        table,
    )
