import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import philly, windows
from benchmarks.harness import WRONGS, Options, WorkNotDoneError
from benchmarks.reserving import Reserving
from benchmarks.simulator import Cluster, Start, Window, simulate
from scheduler.core.types import Policy
from tests.benchmarks.test_simulator import random_work, workload

pytestmark = pytest.mark.serverless
POLICY = Policy(preemption=False, explain=False, backfill_depth=4)


def among(jobs, sold, hosts=1):
    """(starts of jobs, then of windows; discipline)."""
    work, cluster = workload(jobs), Cluster(hosts)
    core = Reserving(work, cluster, POLICY, half_life=3600)
    return simulate(work, cluster, core, sold).start.tolist(), core


def random_windows(dice, hosts, count=12):
    made = []
    for _ in range(count):
        gpus, chunk, level = dice.choice(
            [(1, 1, "host"), (2, 2, "host"), (4, 4, "host"), (8, 8, "leaf"), (16, 8, "leaf"), (4, 2, "leaf")]
        )
        signed = dice.randrange(4000)
        start = signed + dice.choice((0, 1, 300, 2000))
        made.append(Window(signed, start, start + dice.choice((1, 60, 700, 5000)), gpus, chunk, level))
    return sorted(w for w in made if w.gpus <= 8 * hosts)


def test_a_window_begins_on_its_second_and_what_would_be_in_its_way_waits():
    # The host is the window's from 100 to 200 s: who may run longer than until then waits for its end, who will not may come.
    jobs = [(0, 40, 40, 8, 0), (5, 50, 60, 8, 0), (6, 50, 61, 8, 1), (7, 5, 100, 1, 1)]
    starts, core = among(jobs, [Window(0, 100, 200, 8, 8, "host")])
    assert starts[:2] == [0, 40]
    assert min(starts[2], starts[3]) >= 200
    assert starts[4] == 100
    assert core.moved == 0


def test_part_of_a_host_is_reserved_and_the_rest_of_it_works_on():
    jobs = [(0, 300, 300, 4, 0), (10, 300, 300, 4, 1)]
    starts, _ = among(jobs, [Window(0, 50, 100, 4, 4, "host")])
    assert starts == [0, 100, 50]


def test_a_contract_that_running_work_stands_in_the_way_of_is_refused():
    jobs = [(0, 80, 120, 8, 0), (200, 5, 5, 1, 0)]
    late, full = Window(10, 120, 130, 8, 8, "host"), Window(10, 119, 130, 8, 8, "host")
    assert among(jobs, [late])[0][2] == 120
    assert among(jobs, [full])[0][2] == -1
    assert among(jobs, [late, late._replace(signed=11, start=129, end=140)])[0][2:] == [120, -1], "it is sold already"


def test_a_contract_does_not_take_what_a_waiting_job_was_promised():
    # The third job is promised the host from 100 s on when the second ends at 20.
    jobs = [(0, 100, 100, 7, 0), (0, 20, 20, 1, 1), (1, 100, 100, 8, 1), (400, 5, 5, 1, 0)]
    asked = Window(50, 150, 160, 8, 8, "host")
    starts, core = among(jobs, [asked])
    assert (starts[2], starts[4]) == (100, -1)
    assert core.promises.tolist() == [0, 0, 100, 0]
    assert among(jobs, [asked._replace(start=200, end=210)])[0][4] == 200


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_every_window_sold_is_kept_to_the_second_and_no_promise_is_broken_for_it(seed):
    dice = random.Random(seed)
    work, cluster = random_work(dice), Cluster(dice.choice((2, 3)))
    sold = random_windows(dice, cluster.hosts)
    core = Reserving(work, cluster, POLICY, half_life=3600, first=dice.choice((1, 4)))
    found = simulate(work, cluster, core, sold)
    assert windows.lateness(work, found, sold).tolist() == [0] * int((found.start[len(work) :] >= 0).sum())
    assert philly.misses(core, found)[0] == 0
    assert (found.start[: len(work)] >= work.submit).all()


class Elsewhere:
    """Sells GPU 0 and starts the holder on another one."""

    wake = 0

    def reserve(self, now, job, window):
        return {0: 1}

    def decide(self, now, arrived, ended):
        return [Start(job, [0], [2]) for job in arrived if job]


def test_a_holder_on_other_gpus_than_his_is_caught():
    with pytest.raises(WorkNotDoneError, match="window 0: not on its GPUs"):
        simulate(workload([(50, 1, 1, 1, 0)]), Cluster(1), Elsewhere(), [Window(0, 10, 20, 1, 1, "host")])


def test_a_window_that_begins_late_is_counted():
    class Late(Elsewhere):
        def decide(self, now, arrived, ended):
            self.wake = 13
            return [Start(1, [0], [1])] if now == 13 else [Start(0, [0], [4])] if 0 in arrived else []

    work, asked = workload([(50, 1, 1, 1, 0)]), [Window(0, 10, 20, 1, 1, "host")]
    found = simulate(work, Cluster(1), Late(), asked)
    assert windows.lateness(work, found, asked).tolist() == [3]
    assert {"windows_late", "promise_misses"} <= WRONGS


def test_contracts_ask_for_the_share_that_is_said_and_the_same_seed_asks_the_same():
    cluster, span = Cluster(40), 30 * 86_400
    made = windows.drawn(cluster, span, 0.2, 3)
    assert made == windows.drawn(cluster, span, 0.2, 3)
    assert windows.gpu_seconds(made) / (cluster.gpus * span) == pytest.approx(0.2, abs=0.04)
    assert all(0 <= w.signed <= w.start < w.end <= span and w.gpus % w.chunk == 0 for w in made)


def test_the_benchmark_runs_without_a_trace(monkeypatch):
    monkeypatch.setattr(philly.traces, "directory", lambda given: None)
    monkeypatch.setattr(windows, "QUICK_JOBS", 200)
    report = windows.run(Options(quick=True))
    assert report.figures["windows_late"] == report.figures["promise_misses"] == 0
    assert np.isfinite(list(report.figures.values())).all()
    assert report.peer["windows_sold"] > 0
