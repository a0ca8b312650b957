"""What hosts were like is written down with every change of it: no gap, no overlap, nothing twice, nothing changed later."""

from datetime import timedelta
from itertools import pairwise

import pytest
from django.db import IntegrityError, transaction

from marketplace.locks import Lock, acquire
from marketplace.models import Agent, ControlPulse, Host, HostCondition
from marketplace.services import conditions, drains, leases, listings, sites
from scheduler import site_loop
from tests import factories as f
from tests.factories import NOW

pytestmark = pytest.mark.django_db


def at(seconds):
    return NOW + timedelta(seconds=seconds)


@pytest.fixture
def place():
    site = f.site(pdus=1)
    host = f.host(site, beat_at=NOW)
    f.agent(site, last_sync_at=NOW, lease_until=at(900))
    listing = f.listing(site, hosts=[host])
    with transaction.atomic():
        conditions.record(sites=[site.pk], now=NOW)
    return site, host, listing, f.actor(site.organization)


def story(host):
    """(kind, seconds since NOW), and that the intervals follow one another."""
    rows = list(host.conditions.order_by("id"))
    assert all(a.ends_at == b.starts_at for a, b in pairwise(rows))
    assert [row.ends_at for row in rows].count(None) == 1
    assert rows[-1].ends_at is None
    return [(row.kind, round((row.starts_at - NOW).total_seconds())) for row in rows]


def watch(site, seconds):
    with transaction.atomic():
        acquire((Lock.SITE, site.pk))
        leases.watch(site, now=at(seconds))


def test_every_writer_of_a_hosts_state_writes_its_condition(place):
    site, host, listing, actor = place
    sites.drain_host(host, actor=actor, now=at(10), reason="fan")
    sites.undrain_host(host, actor=actor, now=at(20))
    sites.set_site_mode(site, "off", actor=actor, now=at(30))
    sites.set_site_mode(site, "auto", actor=actor, now=at(40))
    listings.pause(actor, listing, now=at(45))  # contracts go on: still on offer
    listings.retire(actor, listing, now=at(50))
    assert story(host) == [
        ("able", 0), ("draining", 10), ("able", 20), ("off", 30), ("able", 40), ("not_offered", 50)
    ]  # fmt: skip
    assert host.conditions.get(kind="draining").reason == "fan"


def test_a_host_that_leaves_by_an_hour_is_able_until_then(place):
    site, host, _, actor = place
    sites.drain_host(host, actor=actor, now=at(10), reason="fan", by=at(100))
    assert story(host) == [("able", 0)]
    Agent.objects.update(last_sync_at=at(101))
    Host.objects.update(beat_at=at(101))
    site_loop.run(site.pk, now=at(101))
    assert story(host)[-1] == ("maintenance", 101)
    sites.undrain_host(host, actor=actor, now=at(150))
    assert [kind for kind, _ in story(host)][-2:] == ["maintenance", "able"]


def test_silence_begins_with_the_last_word_heard(place):
    site, host, *_ = place
    watch(site, 90)
    assert story(host) == [("able", 0)]
    watch(site, 91)
    assert story(host) == [("able", 0), ("silent", 0)]
    Agent.objects.update(last_sync_at=at(200))
    Host.objects.update(beat_at=at(200))
    watch(site, 201)
    assert story(host) == [("able", 0), ("silent", 0), ("able", 201)]


def test_a_silence_past_the_lease_is_one_silence(place):
    site, host, *_ = place
    for seconds in (91, 899, 901, 950):
        watch(site, seconds)
    assert Host.objects.get().state == "lost"
    assert story(host) == [("able", 0), ("silent", 0)]
    Agent.objects.update(last_sync_at=at(2000), lease_until=at(2900))
    Host.objects.update(beat_at=at(2000))
    watch(site, 2001)
    assert story(host) == [("able", 0), ("silent", 0), ("able", 2001)]


def test_nobody_is_silent_towards_a_control_plane_that_is_away(place):
    site, host, *_ = place
    ControlPulse.objects.create(at=NOW)
    leases.pulse(now=at(5000))
    Host.objects.update(beat_at=at(5000))
    watch(site, 5080)
    assert story(host) == [("able", 0)]
    watch(site, 5091)
    assert story(host) == [("able", 0), ("silent", 5000)]


def test_a_lost_host_is_away_from_its_last_beat(place):
    site, host, *_ = place
    Agent.objects.update(last_sync_at=at(200), lease_until=at(1000))
    Host.objects.update(beat_at=at(30))
    watch(site, 200)
    assert story(host) == [("able", 0), ("lost", 30)]
    Host.objects.update(beat_at=at(210))
    Agent.objects.update(last_sync_at=at(210))
    watch(site, 211)
    assert story(host)[-1] == ("able", 211)


def test_a_host_that_comes_by_inventory_has_a_condition_from_its_first_second(place):
    site, *_, actor = place
    row = {
        "name": "new", "gpu_model": "H100-SXM", "gpus": 8, "vram_mib": 81_920, "vcpu_milli": 1000, "ram_mib": 1024,
        "power_node": "pdu-1", "parked_w": 1100, "base_w": 4600, "gpu_min_w": 200, "gpu_max_w": 700,
    }  # fmt: skip
    sites.upsert_hosts(site, [row], now=at(7), actor=actor)
    assert story(Host.objects.get(name="new")) == [("not_offered", 7)]


def test_the_same_again_and_an_older_clock_change_nothing(place):
    site, host, _, actor = place
    sites.drain_host(host, actor=actor, now=at(10), reason="fan")
    with transaction.atomic():
        assert conditions.record(sites=[site.pk], hosts=[host.pk], now=at(11)) == 0
    sites.undrain_host(host, actor=actor, now=at(4))  # whose `now` was taken before the other's
    assert story(host) == [("able", 0), ("draining", 10), ("able", 10)]


def test_what_is_taken_back_is_not_written(place):
    _, host, _, actor = place
    with transaction.atomic():
        drains.drain_host(host, actor=actor, now=at(10), reason="fan")
        transaction.set_rollback(True)
    host.refresh_from_db()
    assert (host.state, story(host)) == ("active", [("able", 0)])


@pytest.mark.parametrize(
    "change",
    [
        lambda row: HostCondition.objects.filter(pk=row.pk).update(kind="lost"),
        lambda row: HostCondition.objects.filter(pk=row.pk).update(starts_at=at(-5)),
        lambda row: HostCondition.objects.create(host=row.host, kind="lost", starts_at=at(5), recorded_at=at(5)),
        lambda row: HostCondition.objects.create(
            host=row.host, kind="lost", starts_at=at(-9), ends_at=at(-5), recorded_at=at(5)
        ),
    ],
    ids=["another kind", "another start", "an overlap", "a gap"],
)
def test_the_database_refuses(place, change):
    _, host, *_ = place
    with pytest.raises(IntegrityError), transaction.atomic():
        change(host.conditions.get())
    with transaction.atomic():
        host.conditions.update(ends_at=at(9))
        with pytest.raises(IntegrityError), transaction.atomic():
            host.conditions.update(ends_at=at(10))
        transaction.set_rollback(True)
