"""Site loops beside commits and beside each other, and workers that die between them, on real connections."""

import threading
from collections import Counter
from datetime import timedelta

import pytest
from django.db import connection

from marketplace.errors import MarketError
from marketplace.models import (
    Host,
    Miner,
    Placement,
    PowerGrant,
    PowerNode,
)
from marketplace.services import sites
from marketplace.services.power import Ledger
from scheduler import commit, site_loop
from tests import factories as f
from tests.factories import NOW
from tests.races.market import Market, blocked
from tests.threads import at_once, in_thread

pytestmark = pytest.mark.django_db(transaction=True)


def shed_market():
    """A site where a host's 8 GPUs start only when miners sleep."""
    market = Market(hosts=2, miners=14, power_w=62_000)
    Host.objects.update(measured_w=1100, beat_at=NOW)
    PowerNode.objects.update(measured_w=51_200, measured_at=NOW)
    return market


def obeyed(now):
    """The machines that were sent to sleep read so, and the meters say it a second later."""
    for miner in Miner.objects.filter(desired_mode=0):
        Miner.objects.filter(pk=miner.pk).update(
            measured_w=25, measured_at=now, low_samples=2, applied_generation=miner.desired_generation
        )
    drawn = sum(Miner.objects.values_list("measured_w", flat=True)) + 2200
    PowerNode.objects.update(measured_w=drawn, measured_at=now + timedelta(seconds=1))


def test_two_site_loops_at_once():
    market = shed_market()
    job, other = market.submit(), market.submit()
    market.cycle()
    assert set(Placement.objects.values_list("state", flat=True)) == {"shedding"}
    for turn in range(1, 5):
        now = NOW + timedelta(seconds=5 * turn)
        at_once([lambda now=now: site_loop.run(market.site.pk, now=now)] * 3)
        obeyed(now)
        market.sound()
    states = Counter(Placement.objects.values_list("state", flat=True))
    assert states["granted"] >= 1
    assert PowerGrant.objects.filter(state="granted").count() == states["granted"]
    granted = Placement.objects.filter(state="granted")
    assert all(p.events.filter(to_state="granted").count() == 1 for p in granted)
    assert {job.pk, other.pk} == set(Placement.objects.values_list("job_id", flat=True))


def test_a_commit_and_a_site_loop_at_once():
    market = shed_market()
    for _ in range(2):
        market.submit(gpus=4)
    at_once([market.cycle, *[lambda: site_loop.run(market.site.pk, now=NOW)] * 3])
    market.sound()
    assert Placement.objects.count() == 2


# --- a worker dies
def test_a_worker_that_dies_inside_the_commit_leaves_nothing(monkeypatch):
    market = Market()
    job = market.submit()
    place = commit._place

    def die(*args):
        place(*args)
        connection.connection.close()  # as the server sees a killed process

    monkeypatch.setattr(commit, "_place", die)
    assert isinstance(in_thread(market.cycle)(), Exception)
    monkeypatch.undo()
    assert not Placement.objects.exists()
    job.refresh_from_db()
    assert (job.state, job.attempt) == ("queued", 0)
    market.sound()
    assert market.cycle().jobs_placed == 1  # its locks went with it
    market.sound()
    market.finish()


def test_a_worker_that_dies_between_placing_and_granting_loses_nothing():
    market = shed_market()
    job = market.submit()
    market.cycle()  # and here the worker dies: no site loop follows
    placement = Placement.objects.get(job=job)
    assert placement.state == "shedding"
    market.sound()
    assert market.cycle() is None  # the next cycle has nothing to place again
    for turn in range(1, 4):
        now = NOW + timedelta(seconds=6 * turn)
        site_loop.run(market.site.pk, now=now)
        for miner in Miner.objects.filter(desired_mode=0):
            Miner.objects.filter(pk=miner.pk).update(
                measured_w=25, measured_at=now, low_samples=2, applied_generation=miner.desired_generation
            )
        PowerNode.objects.update(measured_w=sum(Miner.objects.values_list("measured_w", flat=True)), measured_at=now)
    placement.refresh_from_db()
    assert placement.state == "granted"
    assert Placement.objects.count() == 1
    market.sound()


# --- a rival between two statements of a turn
def beside(monkeypatch, module, name, rival):
    """At the next call of `module.name`, `rival` begins in a thread; the call goes on when the rival waits for something, or is over.
    Returns the rival's join.
    """
    real, over, joins = getattr(module, name), threading.Event(), []

    def run():
        try:
            return rival()
        finally:
            over.set()

    def between(*args, **named):
        monkeypatch.setattr(module, name, real)
        joins.append(in_thread(run))
        while not over.wait(0.01) and not blocked():
            pass
        return real(*args, **named)

    monkeypatch.setattr(module, name, between)

    def join():
        return joins[0]()

    return join


def two_loops(monkeypatch, module, name):
    """A job's way to its watts, and at each turn of the loop another loop of the site from `module.name` on."""
    market = shed_market()
    market.submit()
    market.cycle()
    for turn in range(1, 5):
        now = NOW + timedelta(seconds=7 * turn)
        join = beside(monkeypatch, module, name, lambda now=now: site_loop.run(market.site.pk, now=now))
        site_loop.run(market.site.pk, now=now)
        answer = join()
        assert not isinstance(answer, Exception), answer
        market.sound()
        obeyed(now)
    placement = Placement.objects.get()
    assert placement.state == "granted"
    assert placement.events.filter(to_state="granted").count() == 1


PLACES = [
    (site_loop.power, "settle_miners"),
    (site_loop.power, "lower_hosts"),
    (site_loop, "give_up"),
    (site_loop.sheds, "relieve"),
]


@pytest.mark.parametrize(("module", "name"), PLACES, ids=[name for _, name in PLACES])
def test_a_second_loop_waits_until_the_first_has_written(monkeypatch, module, name):
    two_loops(monkeypatch, module, name)


@pytest.mark.parametrize(("module", "name"), PLACES[1:], ids=[name for _, name in PLACES[1:]])
def test_without_its_lock_a_turn_is_seen_to_go_wrong(monkeypatch, module, name):
    """What the test above would not be worth without: the loop's lock is its only guard, and its absence shows in the books."""
    monkeypatch.setattr(site_loop, "acquire", lambda *_: None)
    with pytest.raises(AssertionError):
        two_loops(monkeypatch, module, name)


def wake_beside_another(monkeypatch):
    """Two machines sleep under a node with watts for one. While the loop's command is on its way, a person wakes the other."""
    market = Market()
    one, two = (f.miner(market.site, mode=0) for _ in range(2))
    pdu = PowerNode.objects.get(name="pdu-1")
    PowerNode.objects.filter(pk=pdu.pk).update(cap_w=pdu.reserved_mw // 1000 + pdu.fixed_w + 5_000)
    top, person = len(one.mode_watts) - 1, f.actor(market.site.organization)
    wake = site_loop.Thought([site_loop.power.Command(one.pk, top, one.desired_generation)])
    monkeypatch.setattr(site_loop, "think", lambda _seen: wake)

    def by_hand():
        return sites.set_miner_manual(two, True, actor=person, now=NOW, mode=two.mode_names[top])

    join = beside(monkeypatch, Ledger, "hot", by_hand)
    assert site_loop.run(market.site.pk, now=NOW)["commanded"] == 1
    answer = join()
    market.sound()
    assert isinstance(answer, MarketError)
    assert answer.code == "over_power_cap"


def test_what_a_turn_commands_is_counted_before_another_looks(monkeypatch):
    wake_beside_another(monkeypatch)


def test_without_its_lock_a_command_is_seen_to_go_wrong(monkeypatch):
    monkeypatch.setattr(site_loop, "acquire", lambda *_: None)
    with pytest.raises(AssertionError):
        wake_beside_another(monkeypatch)
