"""Seeded runs of a small cell under faults, and every rule of safety audited between any two of them: `runs`, `violations`.

A run (benchmarks.fault_run) draws a cell of one or two sites with hosts, miners, contracts of every kind and jobs with every
rule, and disturbs it: workers are killed (SIGKILL) or cut off between two statements, go between two statements of each other,
run twice and in any order; plans are held and committed late; agents' reports are lost, doubled, late; hosts and sites fall
silent; customers book, cancel and leave meanwhile. After every step benchmarks.auditor reads the rows by its own SQL, and the
simulated sites say what they really run and draw. Then the faults stop, and all that was submitted must come to its end, every
reservation to its GPUs.

`--seeds 7,8` runs these alone (what is printed for a violation names its seed). There is no peer: the bound is 0.

The harness can fail. It found, in the code as it stood, a plan committed onto GPUs that were reserved after its snapshot.
With each of these broken in a copy of the code it reported violations within ten runs: the fit rule is not run again at
commit (hosts say they have what is sold); an ended placement does not give back its share of the host (the same), or its
watts; a nudge is left out after a job's end (in five runs of eight). The fit rule, run again, refuses nearly all that a lock
or the fence of generations would have: for the moments in which such a guard is all there is, six runs of ten begin with one
that is made on purpose (benchmarks.fault_openings).
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from benchmarks.harness import Options, Report, require

RUNS = 1000
QUICK_S = 36.0  # of wall time from the start; how many runs that was is in the figures
SHOWN = 10
TOLD_EVERY = 50  # runs


@dataclass
class Totals:
    runs: int = 0
    violations: int = 0
    words: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def run(options: Options) -> Report:
    began = time.monotonic()
    seeds = options.seeds or tuple(range(1, RUNS + 1))
    workers = max(1, min(len(os.sched_getaffinity(0)), len(seeds)))
    deadline = began + QUICK_S if options.quick else None
    totals = _all(seeds, workers, deadline)
    seconds = round(time.monotonic() - began)
    require(totals.runs == len(seeds) or (options.quick and totals.runs > 0), "not every run came to its end")
    for kind in ("killed", "cut", "beside", "twice", "claims", "placements"):
        require(totals.counts[kind] > 0 or totals.runs < 20, f"no run had any of: {kind}")
    must = {"violations": ("<=", 0.0)}
    return Report(
        "safety",
        {"runs": totals.runs, "violations": totals.violations},
        conditions={"seeds": ",".join(map(str, seeds)) if len(seeds) < 5 else f"{seeds[0]}..{seeds[-1]}", "workers": workers,
                    "seconds": seconds, "fsync": False, **dict(sorted(totals.counts.items()))},
        must=must if options.quick or options.seeds else {"runs": (">=", RUNS), **must},
    )  # fmt: skip


def _all(seeds: tuple[int, ...], workers: int, deadline: float | None) -> Totals:
    """Every seed once, or as many as there is time for; each worker has a database of its own."""
    from sandbox.servers import Cluster

    with Cluster(unsafe_fast=True) as cluster:  # no server is killed here, so nothing hangs on fsync
        os.environ.update(cluster.environment(as_owner=True))
        names = _databases(workers)
        context = multiprocessing.get_context("fork")
        results: Any = context.SimpleQueue()
        parts = [context.Process(target=_work, args=(name, seeds[n::workers], deadline, results))
                 for n, name in enumerate(names)]  # fmt: skip
        for part in parts:
            part.start()
        totals = _gathered(results, workers)
        for part in parts:
            part.join()
            require(part.exitcode == 0, f"a worker of the harness ended with {part.exitcode}")
        return totals


def _gathered(results: Any, workers: int) -> Totals:
    totals, ended = Totals(), 0
    while ended < workers:
        outcome = results.get()
        if outcome is None:
            ended += 1
            continue
        require(not isinstance(outcome, str), str(outcome))
        totals.runs += 1
        totals.counts += outcome.counts
        totals.violations += len(outcome.violations)
        if outcome.violations:
            step, words = outcome.violations[0]
            totals.words.append(f"seed {outcome.seed}, step {step}: {words}\n    " + "\n    ".join(outcome.story[-5:]))
            if len(totals.words) <= SHOWN:  # at once: the whole takes half an hour, and may be stopped
                print(totals.words[-1], flush=True)
        if totals.runs % TOLD_EVERY == 0:
            print(f"{totals.runs} runs, {totals.violations} violations", file=sys.stderr, flush=True)
    return totals


def _databases(count: int) -> list[str]:
    """Set Django up on the server that DATABASE_URL names, migrate once, and copy that database `count` times."""
    os.environ.setdefault("DEVELOPMENT", "1")
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "marketplace.settings")
    import django
    import psycopg
    from django.core.management import call_command

    django.setup()
    from django.db import connection, connections

    call_command("migrate", verbosity=0, skip_checks=True)
    template = connection.settings_dict["NAME"]
    connections.close_all()
    names = [f"safety_{n}" for n in range(count)]
    with psycopg.connect(**{**connection.get_connection_params(), "dbname": "postgres"}, autocommit=True) as server:
        for name in names:
            server.execute(f'CREATE DATABASE {name} TEMPLATE "{template}"')
    from scheduler.core.warm import warm

    warm()  # before the fork: compiled once
    return names


def _work(name: str, seeds: tuple[int, ...], deadline: float | None, results: Any) -> None:
    import traceback

    from django.db import connection

    logging.disable(logging.CRITICAL)  # each fault is logged where it strikes
    connection.settings_dict["NAME"] = name
    from benchmarks import fault_run, faults

    surgeon = faults.Surgeon()
    try:
        for n, seed in enumerate(seeds):
            if n and deadline is not None and time.monotonic() > deadline:  # one each, however slow the machine
                break
            results.put(fault_run.once(seed, surgeon))
    except BaseException:
        results.put(traceback.format_exc())
    finally:
        surgeon.close()
        results.put(None)
