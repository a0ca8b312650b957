"""From a POST to the API until the job is placed, at 100 jobs/s on 10,000 hosts: real API processes and workers, nudged through
the outbox and Redis, no sweep running. Beside it the API's answer alone, and a write that has nothing to write.

Arrivals are an open loop: a late answer delays no later job. A job is placed when another connection sees it so.
"""

from __future__ import annotations

import http.client
import json
import os
import queue
import subprocess
import sys
import threading
import time
from typing import Any

from benchmarks import cell, commit, database
from benchmarks.harness import Options, Report, require

HOSTS = 10_000
RATE = 100  # jobs/s
CLIENTS = 24  # connections that submit
LOOK_S = 0.01


def run(options: Options) -> Report:
    seconds = 8 if options.quick else 40
    database.ready()
    from marketplace import ids
    from marketplace.models import Placement
    from scheduler.models import Cycle
    from tests import factories

    world = cell.build(HOSTS, customers=8)
    keys = [factories.key(contract.organization)[1] for contract in world.contracts]
    contracts = [ids.encode("ctr", contract.pk) for contract in world.contracts]
    port, web = start_web()
    workers = [commit.start_worker(i) for i in range(commit.WORKERS)]
    try:
        commit.await_workers(commit.WORKERS)
        commit.wait(lambda: answers(port), 60, "the API to answer")
        load = Load(port, keys, contracts)
        load.offer(RATE // 4, 4)  # every process has been round once
        load.settle()
        empty = load.replays(200)
        load.clear()
        before = {name: commit.cpu_seconds(of) for name, of in (("all", [web, *workers]), ("web", [web]))}
        load.offer(RATE, seconds)
        load.settle()
        spent = {name: commit.cpu_seconds(of) - before[name] for name, of in (("all", [web, *workers]), ("web", [web]))}
    finally:
        for process in (*workers, web):
            process.terminate()
        for process in (*workers, web):
            process.wait(20)
    took = sorted(1000 * (load.placed[job] - sent) for job, sent in load.sent.items())
    count = RATE * seconds
    require(len(took) == count, f"{len(took)} jobs answered of {count}")
    require(Placement.objects.filter(job_id__in=load.sent).count() == count, "not every job has its placement")
    answered = sorted(1000 * (load.answered[job] - sent) for job, sent in load.sent.items())
    after = sorted(1000 * (load.placed[job] - answer) for job, answer in load.answered.items())
    cycles = list(
        Cycle.objects.filter(cell=world.cell)
        .order_by("-id")
        .values_list("jobs_placed", "snapshot_us", "plan_us", "commit_us")[:100]
    )
    means = [sum(c[i] for c in cycles) / len(cycles) for i in range(4)]
    return Report(
        "latency",
        {"p50_ms": at(took, 0.5), "p99_ms": at(took, 0.99)},
        peer={
            "empty_write_p50_ms": at(empty, 0.5), "empty_write_p99_ms": at(empty, 0.99), "answer_p50_ms": at(answered, 0.5),
            "answer_p99_ms": at(answered, 0.99), "answer_to_placed_p50_ms": at(after, 0.5), "answer_to_placed_p99_ms": at(after, 0.99),
            "cpu_ms_each": 1000 * spent["all"] / count, "cpu_ms_each_api_and_database": 1000 * spent["web"] / count,
            "worst_ms": took[-1], "jobs_a_cycle": means[0], "snapshot_ms": means[1] / 1000,
            "plan_ms": means[2] / 1000, "commit_ms": means[3] / 1000,
        },
        conditions={
            "jobs": count, "offered_per_s": RATE, "sent_per_s": round(count / load.span), "hosts": HOSTS, "api_processes": 2,
            "workers": commit.WORKERS, "fsync": True, "load_during": os.getloadavg()[0],
            "empty_write": "the same POST again with its Idempotency-Key: authenticated, locked, answered from what is stored",
        },
        must={"p50_ms": ("<=", 150), "p99_ms": ("<=", 500)},
    )  # fmt: skip


def at(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def start_web() -> tuple[int, subprocess.Popen[bytes]]:
    """gunicorn as `make run` starts it."""
    from sandbox.servers import ports

    port = ports.free_port()
    command = [
        sys.executable,
        "-m",
        "gunicorn",
        "marketplace.wsgi",
        "--bind",
        f"127.0.0.1:{port}",
        "--worker-class=gthread",
    ]
    more = ["--workers=2", "--threads=4", "--keep-alive=65", "--log-level=warning"]
    return port, subprocess.Popen([*command, *more], env=dict(os.environ), stdout=subprocess.DEVNULL)


def answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/api/v1/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


class Load:
    """Threads that submit on time, and one that looks for what has been placed."""

    def __init__(self, port: int, keys: list[str], contracts: list[str]) -> None:
        self.port, self.keys, self.contracts = port, keys, contracts
        self.clear()
        self.number = 0
        self.bodies: list[tuple[str, bytes, str]] = []

    def clear(self) -> None:
        self.sent: dict[int, float] = {}  # job id -> when its POST was due
        self.placed: dict[int, float] = {}
        self.answered: dict[int, float] = {}
        self.wrong: list[str] = []
        self.span = 0.0

    def offer(self, rate: int, seconds: int) -> None:
        """Submit rate x seconds jobs, each at its time; watch for placements until `settle`."""
        self.done = threading.Event()
        self.watcher = threading.Thread(target=self._watch)
        self.watcher.start()
        due: queue.Queue[tuple[int, float] | None] = queue.Queue()
        threads = [threading.Thread(target=self._client, args=(due,)) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        start = time.perf_counter()
        for i in range(rate * seconds):
            moment = start + i / rate
            time.sleep(max(0.0, moment - time.perf_counter()))
            self.number += 1
            due.put((self.number, moment))
        self.span = time.perf_counter() - start
        for _ in threads:
            due.put(None)
        for thread in threads:
            thread.join()
        require(not self.wrong, f"{len(self.wrong)} refused, the first: {self.wrong[:1]}")

    def settle(self) -> None:
        commit.wait(lambda: self.placed.keys() >= self.sent.keys(), 60, "the rest to be placed")
        self.done.set()
        self.watcher.join()

    def _client(self, due: queue.Queue[tuple[int, float] | None]) -> None:
        from marketplace import ids

        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        while (item := due.get()) is not None:
            number, moment = item
            status, answer = self._post(connection, number)
            now = time.perf_counter()
            if status != 201:
                self.wrong.append(f"{status} {answer!r}")
                continue
            pk = ids.decode("job", answer["id"])
            assert pk is not None
            self.answered[pk] = now
            self.sent[pk] = moment
        connection.close()

    def _post(self, connection: http.client.HTTPConnection, number: int) -> tuple[int, Any]:
        gpus, milli, cpu, ram = cell.SHAPES[number % len(cell.SHAPES)]
        who = number % len(self.keys)
        body = {
            "contract": self.contracts[who], "command": ["true"], "gpus": gpus, "gpu_milli": milli, "vcpu_milli": cpu, "ram_mib": ram,
        }  # fmt: skip
        headers = {
            "Authorization": f"Bearer {self.keys[who]}", "Content-Type": "application/json", "Idempotency-Key": f"bench-{number}",
        }  # fmt: skip
        connection.request("POST", "/api/v1/jobs", json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())

    def replays(self, count: int) -> list[float]:
        """Milliseconds of writes that have nothing to write, one after another."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        taken = []
        for i in range(count):
            start = time.perf_counter()
            status, _ = self._post(connection, 1 + i % self.number)
            taken.append(1000 * (time.perf_counter() - start))
            require(status == 201, f"a repeated write answered {status}")
        connection.close()
        return taken

    def _watch(self) -> None:
        """Events of a cell's cycles become visible in order, so those after the last one seen are the new ones."""
        from django.db import connection

        with connection.cursor() as cursor:
            cursor.execute("SELECT coalesce(max(id), 0) FROM marketplace_jobevent")
            (last,) = cursor.fetchone()
            while not self.done.is_set():
                cursor.execute(
                    "SELECT job_id, id FROM marketplace_jobevent WHERE id > %s AND to_state = 'placed' ORDER BY id",
                    [last],
                )
                now = time.perf_counter()
                for job, event in cursor.fetchall():
                    self.placed.setdefault(job, now)
                    last = event
                time.sleep(LOOK_S)
        connection.close()
