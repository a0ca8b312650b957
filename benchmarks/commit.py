"""Committed placements a second: job rows in PostgreSQL -> real Celery workers -> cycles -> placements, events, grants and
decisions durable (fsync on), the fit rule run again on locked rows. Beside it two connections that write the same rows by raw
SQL in batches of 500, with nothing to decide.

Two cells, two workers of one process each; the machine's other processes share its cores, so the CPU time of workers and
PostgreSQL for each placement is shown too: two cores can do no more than 2 s / that.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from typing import Any

from benchmarks import cell, database
from benchmarks.harness import Options, Report, require
from scheduler.core.warm import warm

BATCH = 500
WORKERS = 2


def run(options: Options) -> Report:
    jobs = 3000 if options.quick else 40_000  # in each cell
    database.ready()
    from django.db import connection, transaction

    from marketplace.models import JobEvent, OutboxMessage, Placement, PlacementEvent, PowerGrant
    from marketplace.services.jobs import nudge_cell
    from scheduler.models import Cycle, Decision

    worlds = [cell.build(jobs * 2 // 9 + 100, customers=4) for _ in range(WORKERS)]
    small = [cell.build(8, customers=1) for _ in range(WORKERS)]
    queued = [cell.queue(world, jobs) for world in worlds]
    for world in small:
        cell.queue(world, 5)
    OutboxMessage.objects.all().delete()  # nobody begins before the clock
    workers = [start_worker(i) for i in range(WORKERS)]
    try:
        await_workers(WORKERS)

        def placed(of: list[cell.World]) -> int:
            rows = Cycle.objects.filter(cell__in=[w.cell for w in of]).values_list("placements", flat=True)
            return sum(rows)

        with transaction.atomic():
            for world in small:
                nudge_cell(world.cell.pk)
        wait(lambda: placed(small) == 5 * len(small), 120, "the first cycles of the workers")
        time.sleep(1)
        before = cpu_seconds(workers)
        start = time.perf_counter()
        with transaction.atomic():
            for world in worlds:
                nudge_cell(world.cell.pk)
        wait(lambda: placed(worlds) >= WORKERS * jobs, 300, "every job to be placed")
        taken = time.perf_counter() - start
        spent = cpu_seconds(workers) - before
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait(20)
    count = WORKERS * jobs
    cells = [world.cell.pk for world in worlds]
    live = Placement.objects.filter(cell_id__in=cells)
    require(live.filter(state="granted").count() == count, f"{live.count()} placements of {count}")
    ids = [pk for part in queued for pk in part]
    require(set(live.values_list("job_id", flat=True)) == set(ids), "another job was placed than was queued")
    require(PlacementEvent.objects.filter(placement__cell_id__in=cells).count() == 2 * count, "events are missing")
    require(JobEvent.objects.filter(job_id__in=ids, to_state="placed").count() == count, "events of jobs are missing")
    require(
        PowerGrant.objects.filter(placement__cell_id__in=cells, state="granted").count() == count, "grants are missing"
    )
    require(Decision.objects.filter(job_id__in=ids, outcome="placed").count() == count, "decisions are missing")
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT (SELECT sum(1000 * gpu_count - (SELECT sum(g) FROM unnest(gpu_free) g)) FROM marketplace_host WHERE cell_id = ANY(%s)),"
            " (SELECT sum(cardinality(gpu_indices) * gpu_milli) FROM marketplace_placement WHERE cell_id = ANY(%s))",
            [cells, cells],
        )
        taken_milli, held_milli = cursor.fetchone()
    require(taken_milli == held_milli, f"{taken_milli} milli-GPU are taken, placements hold {held_milli}")
    cycles = list(Cycle.objects.filter(cell_id__in=cells).values_list("snapshot_us", "plan_us", "commit_us"))
    peer = raw(worlds, min(jobs, 12_000))
    parts = [sum(c[i] for c in cycles) / count for i in range(3)]
    return Report(
        "commit",
        {"placements_per_s": count / taken, "share_of_raw_sql": count / taken / peer},
        peer={
            "raw_sql_per_s": peer, "cpu_us_each": 1e6 * spent / count, "two_cores_could_per_s": 2 * count / spent,
            "snapshot_us_each": parts[0], "plan_us_each": parts[1], "commit_us_each": parts[2],
        },
        conditions={
            "placements": count, "cells": WORKERS, "workers": WORKERS, "cycles": len(cycles), "hosts": sum(w.hosts for w in worlds),
            "raw_batch": BATCH, "raw_writers": 2, "fsync": True, "constraints": "all, both sides", "load_during": os.getloadavg()[0],
        },
        must={"placements_per_s": (">=", 10_000), "share_of_raw_sql": (">=", 0.3)},
    )  # fmt: skip


def start_worker(number: int) -> subprocess.Popen[bytes]:
    """A Celery worker as `make run` starts it: with the planner's kernels compiled before."""
    warm()
    command = [
        sys.executable,
        "-m",
        "celery",
        "-A",
        "marketplace",
        "worker",
        "-n",
        f"bench-{number}@%h",
        "--concurrency=1",
    ]
    return subprocess.Popen(
        [*command, "--loglevel=WARNING", "--without-gossip", "--without-mingle"], env=dict(os.environ)
    )


def await_workers(count: int) -> None:
    from marketplace.celery import app

    wait(lambda: len(app.control.ping(timeout=1)) >= count, 90, f"{count} workers to answer")


def wait(done: Any, seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not done():
        require(time.monotonic() < end, f"waited {seconds} s for {what}")
        time.sleep(0.02)


def cpu_seconds(workers: list[subprocess.Popen[bytes]]) -> float:
    """CPU time so far of the workers and of PostgreSQL's backends and helpers that live now."""
    import psutil
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute("SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
        pids = [pid for (pid,) in cursor.fetchall()]
    own = [p.pid for worker in workers for p in psutil.Process(worker.pid).children(recursive=True)]
    total = 0.0
    for pid in [*pids, *own, *(worker.pid for worker in workers)]:
        try:
            times = psutil.Process(pid).cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


_RAW = (
    "UPDATE marketplace_job SET state = 'placed', attempt = attempt + 1, state_reason = 'placed' WHERE id = ANY(%(ids)s)",
    (
        "INSERT INTO marketplace_jobevent (job_id, at, actor, from_state, to_state, reason)"
        " SELECT id, now(), 'raw', 'queued', 'placed', 'placed' FROM unnest(%(ids)s::bigint[]) id"
    ),
    (
        "INSERT INTO marketplace_placement (job_id, contract_id, organization_id, host_id, site_id, cell_id, attempt, rank, epoch,"
        " gpu_indices, gpu_milli, vram_mib, vcpu_milli, ram_mib, nvme_gib, watts_delta, state, desired, generation, reason, created_at,"
        " granted_at) SELECT j.id, j.contract_id, j.organization_id, h.id, h.site_id, j.cell_id, j.attempt, 0, 0, '{0}', j.gpu_milli,"
        " 0, j.vcpu_milli, j.ram_mib, 0, 700, 'granted', 'run', 1, '', now(), now()"
        " FROM unnest(%(ids)s::bigint[], %(hosts)s::bigint[]) u(id, host) JOIN marketplace_job j ON j.id = u.id"
        " JOIN marketplace_host h ON h.id = u.host"
    ),
    (
        "INSERT INTO marketplace_placementevent (placement_id, at, actor, from_state, to_state, reason)"
        " SELECT p.id, now(), 'raw', f, t, '' FROM marketplace_placement p, (VALUES ('', 'intended'), ('intended', 'granted')) e(f, t)"
        " WHERE p.job_id = ANY(%(ids)s)"
    ),
    (
        "INSERT INTO marketplace_powergrant (placement_id, host_id, site_id, delta_w, state, created_at, granted_at)"
        " SELECT id, host_id, site_id, 700, 'granted', now(), now() FROM marketplace_placement WHERE job_id = ANY(%(ids)s)"
    ),
    (
        "INSERT INTO scheduler_decision (job_id, at, outcome, reason, stages, candidates, binding, suggestion)"
        " SELECT id, now(), 'placed', 'OK', '{}', '{}', '', '' FROM unnest(%(ids)s::bigint[]) id"
    ),
    "UPDATE marketplace_host SET ram_free = ram_free + 1 WHERE id = ANY(%(hosts)s)",
)


def raw(worlds: list[cell.World], jobs: int) -> float:
    """The same rows by raw SQL, two connections side by side; rows a second."""
    from django.db import connection

    from marketplace.models import Host, Placement

    work = []
    for world in worlds:
        hosts = list(Host.objects.filter(cell=world.cell).order_by("id").values_list("id", flat=True)[:BATCH])
        work.append((cell.queue(world, jobs), hosts))
    before = Placement.objects.count()
    connection.close()
    context = multiprocessing.get_context("spawn")
    gate = context.Barrier(len(work) + 1)
    writers = [context.Process(target=_write, args=(gate, os.environ["DATABASE_URL"], *part)) for part in work]
    for writer in writers:
        writer.start()
    gate.wait()
    start = time.perf_counter()
    for writer in writers:
        writer.join()
    taken = time.perf_counter() - start
    require(all(writer.exitcode == 0 for writer in writers), "a raw writer failed")
    require(Placement.objects.count() == before + len(work) * jobs, "raw SQL did not write every row")
    return len(work) * jobs / taken


def _write(gate: Any, url: str, ids: list[int], hosts: list[int]) -> None:
    import psycopg

    with psycopg.connect(url) as connection:
        gate.wait()
        for at in range(0, len(ids), BATCH):
            part = ids[at : at + BATCH]
            for statement in _RAW:
                connection.execute(statement, {"ids": part, "hosts": hosts[: len(part)]})
            connection.commit()
