"""Site loops beside commits and beside each other, and workers that die between them, on real connections."""

from collections import Counter
from datetime import timedelta

import pytest
from django.db import connection

from marketplace.models import (
    Host,
    Miner,
    Placement,
    PowerGrant,
    PowerNode,
)
from scheduler import commit, site_loop
from tests.factories import NOW
from tests.races.market import Market
from tests.threads import at_once, in_thread

pytestmark = pytest.mark.django_db(transaction=True)


def shed_market():
    """A site where a host's 8 GPUs start only when miners sleep."""
    market = Market(hosts=2, miners=14, power_w=62_000)
    Host.objects.update(measured_w=1100, beat_at=NOW)
    PowerNode.objects.update(measured_w=51_200, measured_at=NOW)
    return market


def test_two_site_loops_at_once():
    market = shed_market()
    job, other = market.submit(), market.submit()
    market.cycle()
    assert set(Placement.objects.values_list("state", flat=True)) == {"shedding"}
    for turn in range(1, 5):
        now = NOW + timedelta(seconds=5 * turn)
        at_once([lambda now=now: site_loop.run(market.site.pk, now=now)] * 3)
        for miner in Miner.objects.filter(desired_mode=0):
            Miner.objects.filter(pk=miner.pk).update(
                measured_w=25, measured_at=now, low_samples=2, applied_generation=miner.desired_generation
            )
        drawn = sum(Miner.objects.values_list("measured_w", flat=True)) + 2200
        PowerNode.objects.update(measured_w=drawn, measured_at=now + timedelta(seconds=1))
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
