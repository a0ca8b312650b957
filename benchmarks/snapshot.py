"""A cell of 100,000 hosts: read cold, and brought up to date after 1,000 rows have changed; beside `COPY` out of the same rows.

Cold is the whole of `scheduler.snapshot.take`: hosts, power nodes, site flags, reservations, waiting jobs, the checked Fleet.
A refresh brings hosts and power nodes up to date; a whole snapshot when nothing has changed since is shown beside it.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks import cell, database
from benchmarks.harness import Options, Report, require

CHANGED = 1000


def run(options: Options) -> Report:
    hosts = 100_000
    database.ready()
    import numpy as np
    import psutil
    from django.db import connection, transaction
    from django.utils import timezone

    from marketplace.services.budgets import node_table
    from scheduler import fleet, snapshot

    world = cell.build(hosts, customers=2)
    memory = psutil.Process()
    before_mib = memory.memory_info().rss / 2**20

    def take() -> tuple[float, Any]:
        start = time.perf_counter()
        with transaction.atomic():
            taken = snapshot.take(world.cell, now=timezone.now(), running=False)
        return time.perf_counter() - start, taken

    def change(turn: int) -> None:
        with connection.cursor() as cursor:
            cursor.execute(
                "UPDATE marketplace_host SET vcpu_free = vcpu_free - 1, gpu_free[1] = %s WHERE cell_id = %s AND id %% %s = %s",
                [999 - turn, world.cell.pk, hosts // CHANGED, turn],
            )
            require(cursor.rowcount == CHANGED, f"{cursor.rowcount} rows changed, not {CHANGED}")

    def copy(where: str) -> float:
        rows = f"SELECT {', '.join(_columns())} FROM marketplace_host WHERE cell_id = {world.cell.pk} {where}"
        start = time.perf_counter()
        size = 0
        with connection.cursor() as cursor, cursor.copy(f"COPY ({rows}) TO STDOUT (FORMAT binary)") as out:
            for block in out:
                size += len(block)
        require(size > 0, "COPY gave nothing")
        return time.perf_counter() - start

    colds = []
    for _ in range(2 if options.quick else 5):
        fleet.forget()
        taken_s, taken = take()
        colds.append(taken_s)
        require(len(taken.fleet) == hosts, f"{len(taken.fleet)} hosts of {hosts}")
    refreshes, wholes = [], []
    for turn in range(10 if options.quick else 40):
        change(turn)
        start = time.perf_counter()
        with transaction.atomic():
            node_table(fleet.read(world.cell.pk).sites[0].tolist())
        refreshes.append(time.perf_counter() - start)
        taken_s, taken = take()
        wholes.append(taken_s)
        require(
            int((taken.fleet.gpu_free[:, 0] == 999 - turn).sum()) == CHANGED, "the changed rows are not in the snapshot"
        )
    rss = memory.memory_info().rss / 2**20
    warm = taken
    fleet.forget()
    _, cold = take()
    for name in ("host_id", "cpu_free", "gpu_free", "vram_free", "gpu_active", "power_node", "flags", "pool"):
        require(
            bool(np.array_equal(getattr(warm.fleet, name), getattr(cold.fleet, name))),
            f"{name} differs from a cold reading",
        )
    copies = [copy("") for _ in range(2)]
    small = [copy(f"AND id % {hosts // CHANGED} = 1") for _ in range(3)]
    ordered = sorted(refreshes)
    return Report(
        "snapshot",
        {"cold_s": min(colds), "refresh_ms": 1000 * ordered[len(ordered) // 2], "rss_mib": rss},
        peer={
            "copy_all_s": min(copies),
            "copy_1000_ms": 1000 * min(small),
            "refresh_worst_ms": 1000 * ordered[-1],
            "refresh_best_ms": 1000 * ordered[0],
            "whole_snapshot_ms": 1000 * sorted(wholes)[len(wholes) // 2],
        },
        conditions={
            "hosts": hosts,
            "changed": CHANGED,
            "gpus_each": cell.GPUS,
            "nodes": len(warm.fleet.node_parent),
            "fsync": True,
            "rss_before_mib": round(before_mib),
            "refresh_ms": "median",
            "cold_s": "best",
        },
        must={"cold_s": ("<=", 3), "refresh_ms": ("<=", 20), "rss_mib": ("<=", 1024)},
    )


def _columns() -> list[str]:
    return [
        "id", "site_id", "power_node_id", "listing_id", "gpu_model_id", "state", "power_state", "leaf", "spine", "gpu_count",
        "vcpu_milli", "ram_mib", "nvme_gib", "vram_mib", "vcpu_free", "ram_free", "nvme_free", "cpu_only_active", "standby_w",
        "parked_w", "base_w", "gpu_min_w", "gpu_max_w", "cap_control", "gpu_free", "vram_free", "nvlink_domains",
    ]  # fmt: skip
