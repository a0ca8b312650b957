"""More waits than one cycle takes: each contract has its turn, the cycle calls for the next, and nobody is left behind."""

from datetime import timedelta

import pytest

from marketplace import outbox
from marketplace.models import Agent, Job, OutboxMessage
from marketplace.services import jobs
from marketplace.services.jobs import CYCLE, nudge_cell
from scheduler import cycle, rules, tasks, waiting
from scheduler.models import Cycle, Decision
from tests import factories as f
from tests.factories import NOW
from tests.races.market import Market

pytestmark = pytest.mark.django_db(transaction=True)
assert tasks  # its handlers are registered by its import


@pytest.fixture
def market(monkeypatch):
    """Four hosts of 8 GPUs, of which a cycle considers three jobs at most."""
    monkeypatch.setattr(waiting, "MAX_JOBS", 3)
    made = Market(hosts=4)
    Agent.objects.update(last_sync_at=f.NOW + timedelta(days=3650), lease_until=f.NOW + timedelta(days=3650))
    return made


def rival(market, **terms):
    """Another customer's contract of the same listing, and what submits under it."""
    contract = f.contract(market.contract.listing, f.organization(), **{"gpu_count": 64, **terms})
    actor = f.actor(contract.organization)

    def submit(seconds=0, **spec):
        spec = {"command": ["true"], "gpus": 1, "vcpu_milli": 1000, "ram_mib": 1024, **spec}
        return jobs.submit(actor, contract, spec, now=NOW + timedelta(seconds=seconds))

    return submit


def considered(market, *, short=False):
    return [job.id for job in waiting.read(market.cell.pk, NOW, rules.repairs(market.cell.pk), short=short)]


def told():
    return OutboxMessage.objects.filter(topic=CYCLE).count()


def fill(market):
    """Seven of eight GPUs of each host work."""
    for _ in range(4):
        market.submit(gpus=7)
    for _ in range(2):
        market.cycle()
    assert Job.objects.filter(state="placed").count() == 4


def test_who_queues_many_does_not_hide_who_comes_after_him(market):
    submit = rival(market)
    many = [market.submit(gpus=1) for _ in range(5)]
    one, two = submit(60), submit(61)
    assert considered(market) == [many[0].pk, one.pk, many[1].pk]  # each contract's first, then each one's second
    market.cycle()
    placed = set(Job.objects.filter(state="placed").values_list("pk", flat=True))
    assert placed == {many[0].pk, one.pk, many[1].pk}
    assert considered(market) == [many[2].pk, two.pk, many[3].pk]


def test_a_contracts_own_turn_goes_by_priority_and_then_by_age(market):
    late = market.submit(gpus=1)
    Job.objects.filter(pk=late.pk).update(queued_at=NOW + timedelta(seconds=9))
    early, urgent = market.submit(gpus=1), market.submit(gpus=1, priority=7)
    assert considered(market) == [urgent.pk, early.pk, late.pk]


def test_who_may_not_be_placed_takes_nobodys_turn(market):
    cancelled, *_ = [market.submit(gpus=1) for _ in range(3)]
    Job.objects.filter(pk=cancelled.pk).update(cancel_requested_at=NOW)
    last = market.submit(gpus=1)
    assert considered(market)[-1] == last.pk


def test_a_cycle_that_took_all_it_may_calls_for_the_next_until_nobody_waits(market):
    for _ in range(7):
        market.submit(gpus=1)
    OutboxMessage.objects.all().delete()  # no nudge but the cycles' own
    nudge_cell(market.cell.pk)
    for placed, again in ((3, 1), (6, 1), (7, 0)):
        assert outbox.drain(limit=1, topic=CYCLE) == 1
        assert Job.objects.filter(state="placed").count() == placed
        assert told() == again
    assert list(Cycle.objects.order_by("pk").values_list("jobs_considered", flat=True)) == [3, 3, 1]
    market.sound()


def test_a_full_cell_is_not_asked_again_and_again(market):
    """As many wait as a cycle takes, and none finds room: what would the next do but the same?"""
    for _ in range(4):
        market.submit(gpus=8)
    for _ in range(2):
        market.cycle()
    for _ in range(3):
        market.submit(gpus=8)
    OutboxMessage.objects.all().delete()
    made = market.cycle()
    assert (made.jobs_considered, made.jobs_placed) == (3, 0)
    assert told() == 0


def test_who_finds_no_room_does_not_hide_who_would(market):
    """The first ask for whole hosts where none is idle; a small one waits behind them, and is found by itself."""
    fill(market)
    for _ in range(4):
        market.submit(gpus=8)
    small = market.submit(gpus=1)
    OutboxMessage.objects.all().delete()
    for placed, again in ((0, 1), (0, 1), (1, 1), (0, 0)):  # three are looked at, then one more each time
        made = market.cycle()
        assert (made.jobs_considered, made.jobs_placed, told()) == (3, placed, again)
        OutboxMessage.objects.all().delete()
    small.refresh_from_db()
    assert small.state == "placed"


def test_when_all_were_looked_at_half_of_a_cycle_goes_to_who_was_longest_ago(market):
    fill(market)
    jobs = [market.submit(gpus=8) for _ in range(5)]
    for minute in range(3):
        cycle.run(market.cell.pk, now=NOW + timedelta(minutes=minute))
    OutboxMessage.objects.all().delete()
    turns = []
    for minute in range(3, 9):
        turns.append(considered(market, short=True))
        cycle.run(market.cell.pk, now=NOW + timedelta(minutes=minute))
    first, *behind = [job.pk for job in jobs]
    assert {turn[0] for turn in turns} == {first}
    seen = [pk for turn in turns for pk in turn if pk in behind[1:]]
    assert all(seen[i : i + 3] and set(seen[i : i + 3]) == set(behind[1:]) for i in range(0, len(seen) - 2, 3))
    assert told() == 0


def test_a_promised_start_is_planned_however_many_wait_before_it(market):
    """A promise is kept by being booked again in every plan."""
    jobs = [market.submit(gpus=8) for _ in range(8)]
    market.cycle()
    market.cycle()
    last = jobs[-1]
    Decision.objects.update_or_create(
        job=last,
        defaults={
            "at": NOW,
            "outcome": "waiting",
            "earliest_start": NOW + timedelta(hours=9),
            "held_hosts": [market.hosts[0].pk],
        },
    )
    assert last.pk in considered(market, short=True)


def test_a_full_cycle_takes_no_rest_before_the_next(market, monkeypatch):
    rests = []
    monkeypatch.setattr(cycle, "sleep", rests.append)
    for _ in range(4):
        market.submit(gpus=1)
    cycle.attempt(market.cell.pk, now=NOW, rest_s=1)
    assert rests == []
    cycle.attempt(market.cell.pk, now=NOW, rest_s=1)
    assert len(rests) == 1


def test_replicas_that_a_running_gang_lost_come_on_top_of_those_that_queue(market):
    """What runs already is not kept waiting by a queue, however long."""
    gang = market.submit(gpus=1, replicas=2, on_replica_loss="replace_replica")
    market.cycle()
    market.report(gang, "running")
    assert considered(market) == []
    Job.objects.filter(pk=gang.pk).update(repair_since=NOW, lost_ranks=[1])
    for _ in range(4):
        market.submit(gpus=1)
    asked = considered(market)
    assert (asked[0], len(asked)) == (gang.pk, 1 + waiting.MAX_JOBS)
