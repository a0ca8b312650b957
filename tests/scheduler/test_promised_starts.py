"""A start that was promised is in the job's decision, and the next cycle begins with it."""

from datetime import timedelta

import pytest

from marketplace import outbox
from marketplace.models import Agent, Host, OutboxMessage, Placement, PowerNode
from marketplace.services import availability
from marketplace.services.availability import LAG_S, WATTS_S
from scheduler import cycle, site_loop, snapshot, standing, tasks, why, words
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
    end = placed.created_at.replace(microsecond=0) + timedelta(
        seconds=600 + 30 + snapshot.LAG_S
    )  # its limit, its grace
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


@pytest.mark.parametrize("other", [False, True])
def test_a_promise_that_breaks_is_said_in_the_cycle_the_log_the_jobs_story_and_its_explanation(market, caplog, other):  # noqa: F811
    site, host, _, _, contract = market
    first = submit(contract, max_seconds=600)
    cycle.run(first.cell_id, now=NOW)
    second = submit(contract, max_seconds=300)
    whole = cycle.run(first.cell_id, now=later(10))
    assert (whole.promises_broken, "cannot be kept" in why.explain(second, fresh=True)["text"]) == (0, False)
    promised = words.moment(Decision.objects.get(job=second).earliest_start)
    then = "no other can be promised yet"
    if other:  # one that is busy, and free later
        PowerNode.objects.update(cap_w=500_000)
        beside = f.host(site, power_node="pdu-1", name="beside")
        contract.listing.hosts.add(beside)
        theirs = f.contract(contract.listing, f.organization())
        long = f.job(theirs, gpus=8, max_seconds=5000)
        f.placement(long, beside, state="running", running_at=later(11))
        then = "it is now promised for"
    Host.objects.filter(pk=host.pk).update(state="draining")
    broken = cycle.run(first.cell_id, now=later(20))
    assert broken.promises_broken == 1
    assert f"promised starts of 1 jobs cannot be kept: [{second.pk}]" in caplog.text
    story = second.events.order_by("-id").first()
    assert (story.from_state, story.to_state) == ("queued", "queued")
    assert story.reason.startswith(f"the start promised for {promised} cannot be kept")
    assert then in story.reason
    second.refresh_from_db()
    assert f"The start promised for {promised} cannot be kept" in why.explain(second, fresh=True)["text"]
    # Said once: the next cycle keeps the new one, or has none to break.
    assert cycle.run(first.cell_id, now=later(30)).promises_broken == 0
    assert second.events.filter(reason__startswith=words.BROKEN).count() == 1


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
            assert timedelta(seconds=2.9) < ahead < timedelta(seconds=6)  # the clock of the machine goes on meanwhile


# --- what is promised to the next is what the one before may take at most
def waits_for_watts(market):  # noqa: F811
    """A job of ten minutes that waits for its watts, and the start that is promised to the next on its GPUs."""
    site, _, _, _, contract = market
    PowerNode.objects.update(measured_w=43_100, measured_at=NOW)
    Agent.objects.update(last_sync_at=later(300))
    first = submit(contract, max_seconds=600, checkpoint_grace_s=45)
    cycle.run(first.cell_id, now=NOW)
    assert Placement.objects.get(job=first).state == "shedding"
    site_loop.run(site.pk, now=NOW)
    second = submit(contract, max_seconds=300)
    cycle.run(first.cell_id, now=later(1))
    return first, Decision.objects.get(job=second).earliest_start


@pytest.mark.parametrize(("free_at", "granted"), [(WATTS_S - 1, True), (WATTS_S, False), (WATTS_S + 200, False)])
def test_whose_watts_come_too_late_to_end_in_time_goes_instead_of_being_granted(market, free_at, granted):  # noqa: F811
    site, *_ = market
    first, promised = waits_for_watts(market)
    PowerNode.objects.update(cap_w=200_000, measured_at=later(free_at))  # they come free otherwise
    site_loop.run(site.pk, now=later(free_at))
    placement = Placement.objects.get(job=first)
    assert (placement.state == "granted") is granted
    if granted:
        ends = placement.granted_at + timedelta(seconds=600 + 45)
        assert ends + timedelta(seconds=LAG_S - WATTS_S) <= promised  # which is left for its start and its end
    else:
        first.refresh_from_db()
        assert (placement.state, first.state) == ("released", "requeued")


def test_the_grace_after_its_limit_is_counted_before_and_after_a_job_is_placed(market):  # noqa: F811
    _, host, _, _, contract = market
    job = submit(contract, max_seconds=600, checkpoint_grace_s=900)
    (request,) = snapshot.take(job.cell, now=NOW).requests
    assert request.duration_s == 1500
    f.placement(job, host, state="running", running_at=later(7))
    (running,) = standing.running(job.cell_id, [host.pk], {}, later(8))
    assert running.ends_at == int(later(7 + 1500 + LAG_S).timestamp())
    taken = availability.unreserved_gpus([host.pk], later(8), limits=True)
    assert set(taken[host.pk].values()) == {running.ends_at}


def test_who_starts_slowly_is_not_said_to_end_before_he_can(market):  # noqa: F811
    _, host, _, _, contract = market
    job = submit(contract, max_seconds=600)
    f.placement(job, host, state="starting")
    for waited in (5, WATTS_S, 500):  # an image is fetched
        (running,) = standing.running(job.cell_id, [host.pk], {}, later(waited))
        assert running.ends_at == int(later(max(0, waited - WATTS_S) + 630 + LAG_S).timestamp())
