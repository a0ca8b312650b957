"""The scheduler under faults: the harness of `python -m benchmarks safety` on a few seeds, a worker killed at every statement of a
cycle, and the harness itself: its faults are real. Its auditor: tests/benchmarks/test_auditor.py.
"""

from dataclasses import replace
from datetime import timedelta
from itertools import pairwise

import numpy as np
import pytest
from django.db import transaction
from django.utils import timezone

from benchmarks import fault_openings, fault_run
from benchmarks.auditor import Auditor
from benchmarks.faults import At, Surgeon
from marketplace import outbox
from marketplace.locks import Lock, acquire
from marketplace.models import Agent, Cell, Contract, Job, Miner, OutboxMessage, Placement, PowerGrant, PowerNode
from marketplace.services import jobs, power
from marketplace.services.jobs import CYCLE
from marketplace.services.power import grants
from scheduler import commit, cycle, fleet, site_loop
from scheduler.core import recheck
from tests import factories as f
from tests.factories import NOW
from tests.races.market import Market

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def surgeon():
    made = Surgeon()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _nothing_kept():
    fleet.forget()


def violations(outcome):
    return [f"step {step}: {words}" for step, words in outcome.violations] and [
        *outcome.story, *(f"step {step}: {words}" for step, words in outcome.violations)
    ]  # fmt: skip


@pytest.mark.parametrize("seed", [11, 2024])
def test_a_seeded_run_breaks_nothing(surgeon, seed):
    outcome = fault_run.once(seed, surgeon)
    assert violations(outcome) == []
    assert outcome.counts["jobs"]
    assert outcome.counts["audits"] > fault_run.STEPS


def without_the_cells_lock(monkeypatch):
    taken = commit.acquire
    monkeypatch.setattr(
        commit, "acquire", lambda *wanted: taken(*((kind, pk) for kind, pk in wanted if kind is not Lock.CELL))
    )


def without_the_fence(monkeypatch):
    """Every plan is of the cell's newest generation."""
    commits = commit.commit

    def unfenced(taken, made, *, now):
        newest = Cell.objects.values_list("generation", flat=True).get(pk=taken.cell.pk)
        return commits(replace(taken, generation=newest), made, now=now)

    monkeypatch.setattr(commit, "commit", unfenced)


def without_the_second_look(monkeypatch):
    """The fit rule is not run again on the locked rows: what was planned is taken off, whatever is left."""

    def admit(state, batch):
        reasons, watts = np.zeros(len(batch.of), np.int64), np.zeros(len(batch.host), np.int64)
        for j, (begin, end) in enumerate(pairwise(batch.first.tolist())):
            for p in range(begin, end):
                h, mask, q = batch.host[p], int(batch.mask[p]), batch.classes[batch.of[j]]
                watts[p] = recheck.delta_kernel(state.rows[h], mask)
                recheck._take(state, h, q, mask, max(batch.vram[p], q[recheck.Q_VRAM]), watts[p], 1)
                state.rows[h, recheck.ACTIVE] |= mask
        return reasons, watts

    monkeypatch.setattr(recheck, "admit", admit)


def same_watts_to_all(monkeypatch):
    def book(ledger, node_id, delta_w, kind):
        for n in ledger.tree.paths[ledger.tree.index[node_id]]:
            ledger.changes[ledger.tree.keys[n]] += delta_w * int(ledger.tree.k[n, kind])

    monkeypatch.setattr(power.Ledger, "book", book)


def watts_twice(monkeypatch):
    once = grants._raise_host

    def twice(ledger, host, use, extra, target):
        once(ledger, host, use, extra, target + max(0, target - host.reserved_w))

    monkeypatch.setattr(grants, "_raise_host", twice)


@pytest.mark.parametrize(
    ("opening", "broken", "words"),
    [
        ("booked_meanwhile", without_the_cells_lock, "came onto GPUs"),
        ("two_planners", without_the_fence, "milli-GPU of"),
        ("who_gives_way", without_the_second_look, "host_gpu_no"),  # the database itself refuses the whole cycle
        ("watts_for_some", same_watts_to_all, "sold of"),
        ("watts_for_some", watts_twice, "was raised to"),
    ],
)
def test_the_harness_sees_a_guard_that_is_gone(surgeon, monkeypatch, opening, broken, words):
    monkeypatch.setattr(fault_run, "OPENINGS", (getattr(fault_openings, opening),))
    broken(monkeypatch)
    for seed in range(1, 100):
        found = fault_run.once(seed, surgeon, steps=0, rest=False).violations
        if found:
            break
    assert any(words in line for _, line in found), found


@pytest.mark.full
@pytest.mark.parametrize("first", range(5000, 5200, 20))
def test_many_seeded_runs_break_nothing(surgeon, first):
    for seed in range(first, first + 20):
        outcome = fault_run.once(seed, surgeon)
        assert violations(outcome) == [], f"seed {seed}"


def test_the_same_seed_is_the_same_run(surgeon):
    # Without rivals on threads, whose order is the machine's: the steps, the faults and where they strike.
    stories = [[line.split(" ", 2)[2] for line in fault_run.once(7, surgeon, steps=6).story] for _ in range(2)]
    assert stories[0] == stories[1]


# --- a worker dies at every statement
def gap(number):
    """Between a call's statements: behind statement `number`, or before the first."""
    return At(number, after=True) if number else At(1, after=False)


def room_is_free(market):
    """Two hosts, nobody there."""
    return market.submit(gpus=4, replicas=2), {("queued", 0, 0), ("placed", 1, 2)}


def a_gang_gives_way(market):
    """Spot work stands where the job will: the cycle asks it to leave, the job waits for that."""
    night_owls = f.organization()
    owls = f.contract(market.contract.listing, night_owls, kind="spot", gpu_count=64, limit_price=9_000_000)
    spec = {"command": ["true"], "gpus": 8, "replicas": 2, "vcpu_milli": 1000, "ram_mib": 1024}
    victim = jobs.submit(f.actor(night_owls), owls, spec, now=NOW)
    market.cycle()
    market.report(victim, "running")
    OutboxMessage.objects.all().delete()
    return market.submit(gpus=8, replicas=2), {("queued", 0, 0)}


# What `make test` runs is every other gap of one scene; `full` runs every gap of both.
SWEEPS = [
    pytest.param(room_is_free, 0, 2, id="every other gap"),
    pytest.param(room_is_free, 0, 1, id="every gap", marks=pytest.mark.full),
    pytest.param(a_gang_gives_way, 0, 1, id="every gap of an eviction", marks=pytest.mark.full),
]


@pytest.mark.parametrize(("scene", "first", "step"), SWEEPS)
def test_a_worker_killed_between_any_two_statements_of_a_cycle_leaves_all_or_nothing(surgeon, scene, first, step):
    market = Market(hosts=2, miners=3)
    auditor = Auditor()
    number, ends = first, set()
    while True:
        job, may_be = scene(market)
        ended = surgeon.killed(market.cycle, gap(number))
        assert ended.error == ""
        assert auditor.audit(NOW) == []
        job.refresh_from_db()
        assert (job.state, job.attempt, job.placements.count()) in may_be
        spot = Job.objects.filter(contract__kind="spot").exclude(state="cancelled")
        ends |= set(spot.values_list("state", flat=True)) or {job.state}
        with transaction.atomic():  # whoever died holds nothing
            acquire((Lock.CELL, market.cell.pk), (Lock.SITE, market.site.pk), timeout_ms=200)
        if job.state == "queued":
            assert OutboxMessage.objects.filter(topic=CYCLE).exists()
            market.cycle()
        for victim in Job.objects.filter(state="preempting"):
            market.report(victim, "exited", exit_code=0, reason="drained")
            market.cycle()
        job.refresh_from_db()
        assert (job.state, job.attempt) == ("placed", 1)
        market.report(job, "running")
        market.report(job, "exited", exit_code=0)
        for other in Job.objects.filter(state="requeued"):
            jobs.cancel(f.actor(other.organization), other, now=NOW)
        OutboxMessage.objects.all().delete()
        if not ended.struck:
            break
        number += step
    assert ends == ({"running", "preempting"} if scene is a_gang_gives_way else {"queued", "placed"})
    assert number > 20
    assert set(Job.objects.exclude(contract__kind="spot").values_list("state", flat=True)) == {"succeeded"}
    market.sound()


def test_a_handler_killed_with_its_message_is_taken_over_by_the_next(surgeon):
    market = Market()
    Agent.objects.update(last_sync_at=timezone.now(), lease_until=timezone.now() + timedelta(hours=1))
    job = market.submit(gpus=8)
    assert surgeon.killed(lambda: outbox.drain(topic=CYCLE), At(20, after=True)).struck
    (message,) = OutboxMessage.objects.filter(topic=CYCLE)
    assert message.claimed_until is not None
    assert outbox.drain(topic=CYCLE) == 0  # its claim still runs
    OutboxMessage.objects.update(claimed_until=timezone.now() - timedelta(seconds=1))
    assert outbox.drain(topic=CYCLE) == 1
    job.refresh_from_db()
    assert (job.state, job.attempt) == ("placed", 1)
    market.sound()


# --- the faults are real
def test_a_killed_process_and_a_cut_connection_undo_what_they_had_not_committed(surgeon):
    market = Market()

    def change():
        with transaction.atomic():
            acquire((Lock.CELL, market.cell.pk))
            Cell.objects.update(region="nowhere")
            Cell.objects.update(region="nowhere else")

    for how, error in ((surgeon.killed, ""), (surgeon.cut, "OperationalError")):
        ended = how(change, At(2, after=True))
        assert ended.struck
        assert ended.error.startswith(error)
        assert set(Cell.objects.values_list("region", flat=True)) == {"us-tx"}
        with transaction.atomic():
            acquire((Lock.CELL, market.cell.pk), timeout_ms=200)
    assert surgeon.killed(change, At(99, after=True)).struck is False  # not reached: it ends in peace
    assert set(Cell.objects.values_list("region", flat=True)) == {"nowhere else"}


def test_what_a_call_raised_in_another_process_is_told(surgeon):
    market = Market()
    refused = surgeon.killed(
        lambda: jobs.cancel(market.actor, Job(pk=1, cell_id=market.cell.pk), now=NOW), At(99, after=True)
    )
    assert refused.error.startswith("DoesNotExist")
    assert "jobs.py" in refused.trace


def test_a_rival_goes_between_two_statements_as_far_as_locks_let_it(surgeon):
    market = Market()
    seen = []

    def first():
        with transaction.atomic():
            acquire((Lock.CELL, market.cell.pk))
            seen.append("first in")
            Cell.objects.update(region="first")
        seen.append("first out")

    def second():
        seen.append("second")
        with transaction.atomic():
            acquire((Lock.CELL, market.cell.pk))
            seen.append(Cell.objects.get().region)

    for end in surgeon.beside(first, second, At(2, after=True)):
        assert end.error == ""
    assert seen[:2] == ["first in", "second"]
    # It reads what was committed; which of the two speaks first then is the machine's.
    assert sorted(seen[2:]) == ["first", "first out"]
    seen.clear()
    surgeon.beside(first, second, At(1, after=False))  # before it has the lock
    assert seen == ["second", "first", "first in", "first out"]


def test_a_site_says_what_it_really_runs_and_draws(surgeon):
    """The physical side: a machine that is told nothing of a limit, and two placements on one GPU."""
    from benchmarks.fault_cell import Clock, build
    from benchmarks.fault_site import Work

    with Clock() as clock:
        yard = build(3, clock).yards[0]
        assert yard.over_cap(clock.now) == []
        name = next(iter(yard.machines))
        for pk in (1, 2):
            yard.work[pk] = Work(pk, name, (0,), 600, 100, 9, state="running")
        yard.pass_time(clock.now)
        assert any("1200 milli-GPU" in words for words in yard.over_cap(clock.now))
        yard.work.clear()
        for machine in yard.machines.values():
            machine.cap_control, machine.base_w = False, 10**6
        assert any("draws" in words for words in yard.over_cap(clock.now))


def test_watts_wait_for_proof_while_the_worker_that_commanded_them_dies(surgeon):
    """Killed between commanding the sleep and telling anybody: the books hold the old watts, the next turn goes on."""
    market = Market(hosts=2, miners=14, power_w=62_000)
    PowerNode.objects.update(measured_w=50_000, measured_at=NOW)
    market.submit()
    market.cycle()
    assert PowerGrant.objects.get().state == "shedding"
    auditor = Auditor()
    for statement in range(1, 80, 13):
        surgeon.killed(lambda: site_loop.run(market.site.pk, now=NOW + timedelta(seconds=5)), At(statement, after=True))
        assert auditor.audit(NOW) == []
        assert all(m.reserved_w == 3500 for m in Miner.objects.all())
    assert PowerGrant.objects.get().state == "shedding"
    assert Placement.objects.count() == 1
    assert Contract.objects.count() == 1
    assert cycle.run(market.cell.pk, now=NOW) is None
