"""A start that was promised is in the job's decision, and the next cycle begins with it."""

from datetime import timedelta

import pytest

from marketplace import outbox
from marketplace.models import Host, OutboxMessage, Placement
from scheduler import cycle, snapshot, tasks
from scheduler.models import Decision
from tests import factories as f
from tests.factories import NOW
from tests.scheduler.test_road import market, submit  # noqa: F401  # a fixture

pytestmark = pytest.mark.django_db


def later(seconds):
    return NOW + timedelta(seconds=seconds)


def test_a_promise_lives_from_cycle_to_cycle_and_is_kept(market):  # noqa: F811
    _, host, _, _, contract = market
    first = submit(contract, max_seconds=600)
    cycle.run(first.cell_id, now=NOW)
    second = submit(contract, max_seconds=300)
    cycle.run(first.cell_id, now=later(10))
    decision = Decision.objects.get(job=second)
    placed = Placement.objects.get(job=first)
    end = placed.created_at.replace(microsecond=0) + timedelta(seconds=600 + snapshot.LAG_S)
    assert (decision.earliest_start, decision.held_hosts) == (end, [host.pk])

    # Somebody comes who is smaller, and would go before it: he may not have the host for longer than that.
    other = submit(contract, gpus=2, max_seconds=3600)
    cycle.run(first.cell_id, now=later(20))
    decision.refresh_from_db()
    assert (decision.earliest_start, decision.held_hosts) == (end, [host.pk])
    request = {r.job: r for r in snapshot.take(first.cell, now=later(30)).requests}[second.pk]
    assert (request.promised_start, request.promised_hosts) == (int(end.timestamp()), (0,))

    # The first is done early, in part: what is promised starts first, then what is left is left.
    Placement.objects.filter(pk=placed.pk).update(state="released", finished_at=later(40))
    Host.objects.filter(pk=host.pk).update(
        gpu_free=[1000] * 8, vram_free=[host.vram_mib] * 8, vcpu_free=host.vcpu_milli, ram_free=host.ram_mib
    )
    cycle.run(first.cell_id, now=later(50))
    assert Placement.objects.filter(job=second).exists()
    assert not Placement.objects.filter(job=other).exists()
    decision.refresh_from_db()
    assert (decision.outcome, decision.held_hosts) == ("placed", None)


def test_a_refusal_at_the_commit_leaves_the_promise_as_it_was(market, monkeypatch):  # noqa: F811
    _, host, _, _, contract = market
    first = submit(contract, max_seconds=600)
    cycle.run(first.cell_id, now=NOW)
    second = submit(contract, max_seconds=300)
    cycle.run(first.cell_id, now=later(10))
    promised = Decision.objects.get(job=second)
    Placement.objects.filter(job=first).update(state="released", finished_at=later(15))
    Host.objects.filter(pk=host.pk).update(
        gpu_free=[1000] * 8, vram_free=[host.vram_mib] * 8, vcpu_free=host.vcpu_milli, ram_free=host.ram_mib
    )
    made = cycle.plan

    def overtaken(*args, **options):
        found = made(*args, **options)
        Host.objects.filter(pk=host.pk).update(state="draining")
        return found

    monkeypatch.setattr(cycle, "plan", overtaken)
    cycle.run(first.cell_id, now=later(20))
    decision = Decision.objects.get(job=second)
    assert (decision.outcome, decision.reason) == ("waiting", "HOST_UNSCHEDULABLE")
    assert (decision.earliest_start, decision.held_hosts) == (promised.earliest_start, promised.held_hosts)


def test_a_job_that_is_cancelled_takes_its_promise_with_it(market):  # noqa: F811
    _, _, _, _, contract = market
    first = submit(contract, max_seconds=600)
    cycle.run(first.cell_id, now=NOW)
    second = submit(contract, max_seconds=300)
    cycle.run(first.cell_id, now=later(10))
    assert Decision.objects.get(job=second).held_hosts
    second.state = "cancelled"
    second.save(update_fields=["state"])
    third = submit(contract, max_seconds=300)
    assert [r.promised_start for r in snapshot.take(first.cell, now=later(20)).requests if r.job == third.pk] == [0]


def test_usage_and_limits_reach_the_planner(market):  # noqa: F811
    _, host, _, _, contract = market
    running = f.job(contract, gpus=2)
    f.placement(running, host, [0, 1])
    waiting = submit(contract, gpus=1)
    taken = snapshot.take(running.cell, now=NOW)
    request = {r.job: r for r in taken.requests}[waiting.pk]
    assert request.usage >= 2000
    assert request.limit_milli == contract.organization.gpu_limit * 1000 - 2000
    assert request.quota_milli == contract.gpu_count * 1000 - 2000
    assert taken.policy.usage_scale == 8000


def test_a_cycle_runs_in_the_second_of_a_promised_start(market, monkeypatch):  # noqa: F811
    _, _, _, _, contract = market
    first = submit(contract, max_seconds=600)
    cycle.run(first.cell_id, now=NOW)
    submit(contract, max_seconds=300)
    cycle.run(first.cell_id, now=later(10))
    start = Decision.objects.get(held_hosts__isnull=False).earliest_start
    for early, told in ((outbox.NUDGED_S + 1, False), (3, True), (0, False)):
        OutboxMessage.objects.all().delete()
        monkeypatch.setattr(tasks.timezone, "now", lambda early=early: start - timedelta(seconds=early))
        tasks.tick_cells()
        tasks.tick_cells()
        mine = OutboxMessage.objects.exclude(key=str(first.cell_id))
        assert mine.count() == told
        if told:
            assert mine.get().payload == {"cell": first.cell_id}
            ahead = mine.get().available_at - OutboxMessage.objects.get(key=str(first.cell_id)).available_at
            assert timedelta(seconds=2.9) < ahead <= timedelta(seconds=3.1)
