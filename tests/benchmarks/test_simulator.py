import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import philly
from benchmarks.disciplines import BEST_FIT, EASY, FIFO, Core, Peer
from benchmarks.fairness import DAY, INSTANT, balance, fair_division, reachable, shares
from benchmarks.harness import Options, WorkNotDoneError
from benchmarks.simulator import Cluster, Start, simulate
from scheduler.core.order import decayed
from scheduler.core.types import Policy

pytestmark = pytest.mark.serverless
POLICY = Policy(preemption=False, explain=False, backfill_depth=4)


def workload(jobs, tenants=("a", "b")):
    """Jobs as (submit, duration, estimate, GPUs, tenant)."""
    work = philly.shape(
        np.array([j[0] for j in jobs], np.int64),
        np.array([j[1] for j in jobs], np.int64),
        np.array([j[3] for j in jobs], np.int64),
        [tenants[j[4]] for j in jobs],
    )
    return philly.replace(work, estimate=np.array([j[2] for j in jobs], np.int64))


def starts(jobs, mode, hosts=1):
    work, cluster = workload(jobs), Cluster(hosts)
    return simulate(work, cluster, Peer(mode, work, cluster)).start.tolist()


HEAD = [  # six GPUs busy until 100; the second job needs all eight; then a short, a long and a narrow one
    (0, 100, 100, 6, 0),
    (1, 50, 50, 8, 0),
    (2, 90, 90, 2, 1),
    (3, 400, 400, 1, 1),
    (4, 96, 96, 1, 1),
]


def test_fifo_stops_at_the_first_that_does_not_fit():
    assert starts(HEAD, FIFO) == [0, 100, 150, 150, 150]


def test_easy_lets_through_what_does_not_delay_the_first():
    assert starts(HEAD, EASY) == [0, 100, 2, 150, 150]
    narrow = [HEAD[0], (1, 50, 50, 7, 0), HEAD[3], HEAD[4]]
    assert starts(narrow, EASY) == [
        0,
        100,
        3,
        4,
    ]  # one GPU is not part of the reservation, and the other is back by then


def test_best_fit_starts_whatever_fits():
    assert starts(HEAD, BEST_FIT) == [0, 492, 2, 92, 92]


def test_an_estimate_is_all_that_a_discipline_sees():
    vague = [HEAD[0], HEAD[1], (2, 90, 200, 2, 1)]
    assert starts(vague, EASY) == [0, 100, 150]


def test_gangs_take_whole_hosts_and_all_at_once():
    jobs = [(0, 10, 10, 1, 0), (1, 10, 10, 16, 0), (2, 5, 5, 24, 1)]
    assert starts(jobs, EASY, hosts=3) == [0, 1, 11]


class Greedy:
    """Starts everything at once on host 0, whatever is there."""

    wake = 0

    def decide(self, now, arrived, ended):
        return [Start(j, [0], [1]) for j in arrived]


def test_a_double_booking_is_caught():
    work = workload([(0, 10, 10, 1, 0), (1, 10, 10, 1, 0)])
    with pytest.raises(WorkNotDoneError, match="host 0 is taken"):
        simulate(work, Cluster(1), Greedy())


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(1, 60))
def test_fair_division_is_max_min(demand, capacity):
    share = np.zeros(len(demand))
    fair_division(np.array(demand, float), float(capacity), share)
    assert share.sum() == pytest.approx(min(capacity, sum(demand)))
    for wants, gets in zip(demand, share, strict=True):
        assert gets <= wants + 1e-9
        if gets < wants - 1e-9:  # who gets less than it wants gets as much as anybody
            assert gets == pytest.approx(share.max())


def test_the_fair_share_of_one_who_waits_is_what_it_was_owed():
    # Tenant a holds the host for 100 s; b wants all of it from 50 s on and is owed half until 100 s, then all.
    work, cluster = workload([(0, 100, 100, 8, 0), (50, 100, 100, 8, 1)]), Cluster(1)
    found = simulate(work, cluster, Peer(FIFO, work, cluster))
    received, owed = balance(work, cluster, found.start, INSTANT)
    assert received.tolist() == [800, 800]
    assert owed.tolist() == [8 * 50 + 4 * 50, 4 * 50 + 8 * 100]
    # In one window nobody is owed more than its work; cut at 100 s, b is owed half for 50 s and its 100 s of eight thereafter.
    assert shares(work, cluster, found.start, DAY).tolist() == [pytest.approx(800 / 600), 1.0]
    received, owed = balance(work, cluster, found.start, 100)
    assert owed.tolist() == [600, 200 + 800]
    # Nobody is preempted: when b came, a's end at 100 s was the first chance.
    assert reachable(work, cluster, found)[1] == pytest.approx(0.8)


def test_a_short_job_that_waits_is_owed_its_work_by_the_day_and_its_wait_by_the_instant():
    work, cluster = workload([(0, 1000, 1000, 8, 0), (0, 1000, 1000, 8, 0), (10, 10, 10, 8, 1)]), Cluster(1)
    found = simulate(work, cluster, Peer(FIFO, work, cluster))
    assert found.start.tolist() == [0, 1000, 2000]
    assert shares(work, cluster, found.start, DAY)[1] == 1.0
    assert shares(work, cluster, found.start, INSTANT)[1] == pytest.approx(80 / (4 * 1990 + 80))
    # With everybody else stopped it would have run at 1000, owed half of the host until then.
    assert reachable(work, cluster, found)[1] == pytest.approx(80 / (4 * 990 + 4 * 10))


@settings(max_examples=25)
@given(st.integers(0, 10**6))
def test_no_window_owes_more_than_the_instants_in_it_or_one_window_more_than_the_work(seed):
    dice = random.Random(seed)
    work, cluster = random_work(dice), Cluster(dice.choice((2, 3)))
    found = simulate(work, cluster, Peer(dice.choice((FIFO, EASY, BEST_FIT)), work, cluster))
    total = np.bincount(work.tenant, work.width * work.duration, len(work.tenants))
    _, most = balance(work, cluster, found.start, INSTANT)
    for window in (300, 5000, 10**7):
        received, owed = balance(work, cluster, found.start, window)
        assert received == pytest.approx(total)
        assert (owed <= most + 1e-6).all()
    assert (owed <= total + 1e-6).all()
    assert (reachable(work, cluster, found) >= shares(work, cluster, found.start, INSTANT) - 1e-9).all()


def random_work(dice, jobs=60):
    now, made = 0, []
    for _ in range(jobs):
        now += dice.choice((0, 0, 20, 200))
        duration = dice.choice((5, 60, 600, 3000))
        gpus = dice.choice((1, 1, 1, 2, 4, 8, 12, 16))
        made.append((now, duration, int(duration * dice.uniform(1, 3)), gpus, dice.randrange(3)))
    return workload(made, ("a", "b", "c"))


@settings(max_examples=25)
@given(st.integers(0, 10**6))
def test_everybody_finishes_the_same_work_and_no_promise_is_broken(seed):
    dice = random.Random(seed)
    work, cluster = random_work(dice), Cluster(dice.choice((2, 3)))
    core = Core(work, cluster, POLICY, half_life=3600, first=dice.choice((1, 4)))
    ours = simulate(work, cluster, core)
    assert philly.misses(core, ours)[0] == 0
    for mode in (FIFO, EASY, BEST_FIT):
        peer = simulate(work, cluster, Peer(mode, work, cluster))
        assert (peer.start >= work.submit).all()
        assert peer.delay(work) >= 0


@settings(max_examples=15)
@given(st.integers(0, 10**6))
def test_the_first_in_line_is_never_later_with_easy_than_first_come_first_served_promises(seed):
    """With exact estimates EASY's first blocked job starts when FIFO, given the same history up to then, would start it."""
    dice = random.Random(seed)
    work = random_work(dice, 12)
    work = philly.replace(work, estimate=work.duration, submit=np.zeros(len(work), np.int64))
    cluster = Cluster(2)
    fifo, easy = (simulate(work, cluster, Peer(mode, work, cluster)) for mode in (FIFO, EASY))
    blocked = int(np.flatnonzero(fifo.start > 0)[0]) if (fifo.start > 0).any() else None
    if blocked is not None:
        assert easy.start[blocked] <= fifo.start[blocked]


def test_usage_in_the_simulator_is_the_decayed_usage_of_the_core():
    work = workload([(0, 100, 100, 8, 0), (150, 50, 50, 4, 0)])
    core = Core(work, Cluster(1), POLICY, half_life=40)
    simulate(work, Cluster(1), core)
    assert core.usage[0] == pytest.approx(decayed([(8000, 0, 100), (4000, 150, 200)], 200, 40))


def test_a_workload_is_sized_to_the_load_whatever_its_shape(tmp_path):
    path = tmp_path / "other.csv"
    lines = ["timestamp,duration,num_gpus,gpu_time,cluster"]
    lines += [
        f"2020-01-0{1 + i // 60} {i % 24:02}:00:{i % 60:02},{600 + i * 37}.5,{1 << i % 5},0,vc{i % 4}"
        for i in range(200)
    ]
    path.write_text("\n".join(lines))
    work, cluster, left_out = philly.sized(philly.read(path))
    last = work.submit[-1]
    offered = (work.width * np.minimum(work.duration, last - work.submit)).sum() / last
    assert len(work) + left_out == 200
    assert offered / cluster.gpus == pytest.approx(philly.LOAD, abs=4 / cluster.gpus + 0.1 * left_out)
    assert (np.diff(work.submit) >= 0).all()
    told = philly.estimated(work, 3)
    assert (told.estimate >= told.duration).all()
    assert (told.estimate == philly.estimated(work, 3).estimate).all()


def test_the_generator_serves_where_there_is_no_trace(monkeypatch):
    monkeypatch.setattr(philly.traces, "directory", lambda given: None)
    monkeypatch.setattr(philly, "QUICK_JOBS", 400)
    report = philly.run(Options(quick=True))
    assert set(report.figures) == set(philly.MUST)
    assert report.figures["promise_misses"] == 0
    assert "generator" in report.conditions["source"]
