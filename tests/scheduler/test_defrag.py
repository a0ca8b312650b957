"""Room is made for a job that waits: few moves, of those alone who may be moved, and everybody runs in the end."""

import threading
from datetime import timedelta

import pytest
from django.conf import settings as configured
from django.db import connection

from marketplace import outbox
from marketplace.models import Agent, BillingStanding, Job, OutboxMessage, Placement
from marketplace.services import job_views, jobs, placements
from scheduler import cycle, defrag, snapshot, tasks, why
from scheduler.models import Decision
from tests import factories as f
from tests.factories import NOW

pytestmark = pytest.mark.django_db

LONG_AGO = NOW - timedelta(minutes=20)


def later(seconds):
    return NOW + timedelta(seconds=seconds)


class Cell:
    """Hosts of 8 GPUs, on each of which somebody of one GPU runs here and there; a customer of spot, and one on demand."""

    def __init__(self, **spec):
        self.site = f.site()
        self.hosts = [f.host(self.site) for _ in range(3)]
        f.agent(self.site, last_sync_at=NOW, lease_until=NOW + timedelta(hours=1))
        listing = f.listing(self.site, hosts=self.hosts)
        self.spot, self.firm = (
            f.contract(listing, f.organization(), kind=kind, gpu_count=64) for kind in ("spot", "on_demand")
        )
        for contract in (self.spot, self.firm):
            BillingStanding.objects.update_or_create(
                organization=contract.organization, defaults={"state": "good", "updated_at": NOW}
            )
        self.pk = self.site.cell_id

    def runs(self, host, gpus, contract=None, since=LONG_AGO, **spec):
        job = f.job(contract or self.spot, state="running", attempt=1, gpus=len(gpus), **spec)
        f.placement(job, self.hosts[host], gpus, state="running", running_at=since, created_at=since, attempt=1)
        return job

    def waits(self, contract=None, now=NOW, **spec):
        contract = contract or self.spot
        spec = {"command": ["true"], "gpus": 8, "vcpu_milli": 8000, "ram_mib": 1024, **spec}
        job = jobs.submit(f.actor(contract.organization), contract, spec, now=now)
        cycle.run(self.pk, now=now)
        job.refresh_from_db()
        assert job.state == "queued"
        return job

    def fragmented(self):
        """(two who are in the way on host 0, three on host 1, four on host 2, who waits for eight)."""
        by_host = [[self.runs(h, [g]) for g in range(count)] for h, count in ((0, 2), (1, 3), (2, 4))]
        return *by_host, self.waits()


def states(*rows):
    return [Job.objects.get(pk=row.pk).state for row in rows]


def gone(now, *rows):
    """Their site says that they have left."""
    live = Placement.objects.filter(job__in=rows, state="draining")
    placements.finish(list(live.values_list("pk", flat=True)), to="released", now=now, actor="agent", reason="drained")


def test_a_few_move_and_who_waited_runs_and_they_run_again():
    cell = Cell()
    movers, _, _, big = cell.fragmented()
    assert sorted(defrag.run(cell.pk, now=later(5))) == [job.pk for job in movers]
    assert states(*movers, big) == ["preempting", "preempting", "queued"]
    promise = Decision.objects.get(job=big)
    start = later(5 + 30 + snapshot.LAG_S)
    assert (promise.earliest_start, promise.held_hosts) == (start, [cell.hosts[0].pk])

    cycle.run(cell.pk, now=later(6))  # the drain is counted on: the promise stands
    promise.refresh_from_db()
    assert (promise.earliest_start, promise.held_hosts) == (start, [cell.hosts[0].pk])

    gone(later(10), movers[0])
    cycle.run(cell.pk, now=later(11))  # who has left goes elsewhere at once, not back to the host that is held
    assert Placement.objects.get(job=movers[0], attempt=2).host_id in [cell.hosts[1].pk, cell.hosts[2].pk]
    assert states(big) == ["queued"]
    gone(later(20), movers[1])
    cycle.run(cell.pk, now=later(21))
    assert states(*movers, big) == ["placed"] * 3
    assert Placement.objects.get(job=big).host_id == cell.hosts[0].pk
    assert Job.objects.get(pk=movers[0].pk).restarts == 0


def test_it_is_said_why():
    cell = Cell()
    movers, _, _, big = cell.fragmented()
    defrag.run(cell.pk, now=later(5))
    event = movers[0].events.get(to_state="preempting")
    assert event.actor == "scheduler"
    assert event.reason.startswith("moved to make room: a job that needs 8 GPUs")
    placement = Placement.objects.get(job=movers[0])
    assert placement.release_requested_at == later(5)  # billing ends here
    told = big.events.last().reason
    assert (
        told
        == f"room is being made: 2 smaller jobs leave a host with a checkpoint, by {later(155):%H:%M:%S} UTC at the latest"
    )
    for moment in (later(5), later(6)):
        assert told in why.explain(Job.objects.get(pk=big.pk), deep=False)["text"]
        cycle.run(cell.pk, now=moment)
    gone(later(10), *movers)
    assert Job.objects.get(pk=movers[0].pk).state_reason.startswith("moved to make room")


def test_a_site_that_is_late_does_not_lose_the_room():
    cell = Cell()
    movers, _, _, big = cell.fragmented()
    defrag.run(cell.pk, now=later(5))
    gone(later(10), movers[0])
    Agent.objects.update(last_sync_at=later(199))
    cycle.run(cell.pk, now=later(200))  # past the promised start, and one still stands there
    assert states(big, movers[0]) == ["queued", "placed"]
    assert Placement.objects.get(job=movers[0], attempt=2).host_id != cell.hosts[0].pk
    assert Decision.objects.get(job=big).earliest_start == later(200 + snapshot.LAG_S)
    gone(later(210), movers[1])
    cycle.run(cell.pk, now=later(211))
    assert states(big) == ["placed"]


def no_grace(cell):
    Job.objects.filter(state="running").update(checkpoint_grace_s=0)


def not_spot(cell):
    for table in (Job, Placement):
        table.objects.exclude(state="queued").update(contract=cell.firm, organization=cell.firm.organization)


def new_there(cell):
    Placement.objects.update(running_at=NOW - timedelta(minutes=5))


def a_gang(cell):
    Job.objects.filter(state="running").update(replicas=2)


def with_rules(cell):
    Job.objects.filter(state="running").update(labels=["app=db"], ruled=True)


def over_ceiling(cell):
    """What leaves would queue behind a job of its own contract for the ceiling."""
    other = f.job(cell.spot)
    Decision.objects.create(job=other, at=NOW, outcome="waiting", reason="OVER_QUOTA")


@pytest.mark.parametrize("change", [no_grace, not_spot, new_there, a_gang, with_rules, over_ceiling])
def test_who_may_not_be_moved_is_not(change):
    cell = Cell()
    cell.fragmented()
    change(cell)
    assert defrag.run(cell.pk, now=later(5)) == []
    assert not Job.objects.filter(state="preempting").exists()


def test_who_agreed_to_it_is_moved_under_any_contract_and_the_moves_are_counted():
    cell = Cell()
    movers, _, _, big = cell.fragmented()
    not_spot(cell)
    Job.objects.filter(pk__in=[job.pk for job in movers]).update(movable=True)
    assert sorted(defrag.run(cell.pk, now=later(5))) == [job.pk for job in movers]
    gone(later(10), *movers)
    cycle.run(cell.pk, now=later(11))
    assert states(*movers, big) == ["placed"] * 3
    for job in movers:
        job.refresh_from_db()
        assert (job.moves, job.restarts, job_views.shown(job)["moves"]) == (1, 0, 1)


@pytest.mark.parametrize("change", [no_grace, new_there, a_gang, with_rules])
def test_consent_is_not_all(change):
    cell = Cell()
    cell.fragmented()
    not_spot(cell)
    Job.objects.update(movable=True)
    change(cell)
    assert defrag.run(cell.pk, now=later(5)) == []


def test_who_has_just_saved_his_work_moves_rather_than_others():
    """Two hosts with as much in the way: the one whose work is saved is cleared; and long unsaved work is not worth it."""
    cell = Cell()
    rows = [[cell.runs(h, [g]) for g in range(2)] for h in range(2)]
    cell.runs(2, [0], contract=cell.firm)
    big = cell.waits()
    saved = [job.pk for job in rows[1]]
    Job.objects.filter(pk__in=saved).update(checkpointed_at=later(-30))
    assert sorted(defrag.run(cell.pk, now=later(5))) == saved
    assert Decision.objects.get(job=big).held_hosts == [cell.hosts[1].pk]


def test_work_that_nobody_saved_for_hours_is_not_worth_a_move():
    cell = Cell()
    cell.fragmented()
    for table in (Job, Placement):
        table.objects.exclude(state="queued").update(created_at=later(-30_000))
    Placement.objects.update(running_at=later(-30_000))
    assert defrag.run(cell.pk, now=later(5)) == []
    Job.objects.filter(state="running").update(checkpointed_at=later(-30))
    assert len(defrag.run(cell.pk, now=later(5))) == 2


def test_a_host_with_one_who_may_not_be_moved_is_left_alone():
    cell = Cell()
    *_, big = cell.fragmented()
    for job in Job.objects.filter(state="running", placements__host=cell.hosts[0])[:1]:
        Job.objects.filter(pk=job.pk).update(checkpoint_grace_s=0)
    assert len(defrag.run(cell.pk, now=later(5))) == 3
    assert Decision.objects.get(job=big).held_hosts == [cell.hosts[1].pk]


def test_no_more_leave_than_are_allowed(settings):
    cell = Cell()
    cell.fragmented()
    for most, left in ((0, 0), (1, 0), (2, 2)):
        settings.DEFRAG_MOVES = most
        assert len(defrag.run(cell.pk, now=later(5))) == left


def test_only_where_it_pays(settings):
    cell = Cell()
    cell.fragmented()
    lost = 2 * 1000 * (20 * 60 + 5 + 30 + snapshot.LAG_S)
    won = 8000 * (defrag.HORIZON_S + 5)
    settings.DEFRAG_GAIN = won // lost + 1
    assert defrag.run(cell.pk, now=later(5)) == []
    settings.DEFRAG_GAIN = won // lost - 1
    assert len(defrag.run(cell.pk, now=later(5))) == 2


def test_nobody_moves_while_nobody_waits_for_room():
    cell = Cell()
    for host in range(3):
        cell.runs(host, [0])
    assert defrag.run(cell.pk, now=later(5)) == []
    waits = f.job(cell.spot, gpus=8)
    assert defrag.run(cell.pk, now=later(5)) == []  # no cycle has looked at it yet
    Decision.objects.create(job=waits, at=NOW, outcome="waiting", reason="PRICE_LIMIT")
    assert defrag.run(cell.pk, now=later(5)) == []
    Decision.objects.filter(job=waits).update(reason="NO_GPU")
    assert len(defrag.run(cell.pk, now=later(5))) == 1


def test_a_full_cell_is_left_alone():
    """Nobody leaves who has nowhere to go."""
    cell = Cell()
    for host in range(3):
        for gpu in range(7 if host else 2):
            cell.runs(host, [gpu], **({"contract": cell.firm} if host else {}))
    cell.runs(1, [7], contract=cell.firm)
    cell.waits()
    assert defrag.run(cell.pk, now=later(5)) == []


def test_a_host_that_is_held_for_another_is_not_touched():
    cell = Cell()
    movers, _, _, big = cell.fragmented()
    other = cell.waits(gpus=7)
    Decision.objects.filter(job=other).update(held_hosts=[cell.hosts[0].pk], earliest_start=later(3600))
    left = defrag.run(cell.pk, now=later(5))
    assert not {job.pk for job in movers} & set(left)
    where = Decision.objects.get(job=big).held_hosts
    assert where != [cell.hosts[0].pk]


def test_one_wave_at_a_time(settings):
    cell = Cell()
    cell.fragmented()
    cell.waits(gpus=8, now=later(1))
    settings.DEFRAG_MOVES = 2
    assert len(defrag.run(cell.pk, now=later(5))) == 2
    settings.DEFRAG_MOVES = 8
    assert defrag.run(cell.pk, now=later(6)) == []


def test_what_changed_since_the_search_is_not_done():
    cell = Cell()
    movers, _, _, big = cell.fragmented()
    found = defrag.rooms(snapshot.take(cell.site.cell, now=later(5)))
    assert [room.job for room in found] == [big.pk]
    Job.objects.filter(pk=movers[1].pk).update(cancel_requested_at=later(6))
    assert defrag._apply(cell.pk, found, later(7)) == []
    assert states(*movers) == ["running"] * 2
    Job.objects.filter(pk=movers[1].pk).update(cancel_requested_at=None)
    Job.objects.filter(pk=big.pk).update(state="cancelled")
    assert defrag._apply(cell.pk, found, later(7)) == []


def test_the_beat_asks_each_cell_where_jobs_wait():
    assert configured.CELERY_BEAT_SCHEDULE["defragment"]["task"] == tasks.tick_defrag.name
    cell = Cell()
    tasks.tick_defrag()
    assert not OutboxMessage.objects.filter(topic=defrag.TOPIC).exists()
    f.job(cell.spot)
    tasks.tick_defrag()
    tasks.tick_defrag()
    assert OutboxMessage.objects.get(topic=defrag.TOPIC).payload == {"cell": cell.pk}


class Elsewhere(threading.Thread):
    """Something done on a connection of its own."""

    def __init__(self, what):
        super().__init__()
        self.what, self.result = what, None

    def run(self):
        try:
            self.result = self.what()
        except outbox.Busy as busy:
            self.result = busy
        finally:
            connection.close()


@pytest.mark.django_db(transaction=True)
def test_two_at_once_move_nobody_twice():
    cell = Cell()
    movers, *_ = cell.fragmented()
    both = [Elsewhere(lambda: defrag.run(cell.pk, now=later(5))) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    left = [job for one in both if isinstance(one.result, list) for job in one.result]
    assert sorted(left) == [job.pk for job in movers]
    assert [job.events.filter(to_state="preempting").count() for job in movers] == [1, 1]
    assert Job.objects.filter(state="preempting").count() == 2


@pytest.mark.django_db(transaction=True)
def test_a_tick_waits_for_the_cycle_that_runs():
    cell = Cell()
    movers, *_ = cell.fragmented()
    begun, done = threading.Event(), threading.Event()

    def busy():
        with cycle.alone(cell.pk) as mine:
            begun.set()
            done.wait(30)
            return mine

    other = Elsewhere(busy)
    other.start()
    assert begun.wait(30)
    try:
        with pytest.raises(outbox.Busy) as raised:
            defrag.run(cell.pk, now=later(5))
        assert raised.value.still()
        assert states(*movers) == ["running"] * 2
    finally:
        done.set()
        other.join()
    assert other.result
    assert not raised.value.still()
    assert len(defrag.run(cell.pk, now=later(5))) == 2
