"""A host's history while many change it at once, and while a writer dies between: exact, whoever was first."""

from datetime import timedelta
from itertools import pairwise

import pytest
from django.db import connection, transaction

from marketplace.locks import Lock, acquire
from marketplace.models import HostCondition
from marketplace.services import conditions, leases, listings, sites
from scheduler import site_loop
from tests import factories as f
from tests.factories import NOW
from tests.threads import at_once, in_thread

pytestmark = pytest.mark.django_db(transaction=True)


def at(seconds):
    return NOW + timedelta(seconds=seconds)


def world(hosts=2):
    site = f.site(pdus=1)
    made = [f.host(site, beat_at=NOW) for _ in range(hosts)]
    f.agent(site, last_sync_at=NOW, lease_until=at(900))
    listing = f.listing(site, hosts=made)
    with transaction.atomic():
        conditions.record(sites=[site.pk], now=NOW)
    return site, made, listing, f.actor(site.organization)


def exact(host, seconds=80):
    """No gap, no overlap, one that is open, and it says what the rows say."""
    rows = list(HostCondition.objects.filter(host=host).order_by("id"))
    assert all(a.ends_at == b.starts_at >= a.starts_at for a, b in pairwise(rows))
    assert [row.ends_at is None for row in rows] == [False] * (len(rows) - 1) + [True]
    assert all(a.kind != b.kind for a, b in pairwise(rows))
    with transaction.atomic():
        assert conditions.record(hosts=[host.pk], now=at(seconds)) == 0
    return [row.kind for row in rows]


def test_writers_of_every_kind_at_once():
    site, (one, two), listing, actor = world()
    calls = [
        lambda: sites.drain_host(one, actor=actor, now=at(3), reason="fan"),
        lambda: sites.drain_host(two, actor=actor, now=at(2), reason="fan"),
        lambda: sites.undrain_host(one, actor=actor, now=at(4)),
        lambda: sites.set_site_mode(site, "off", actor=actor, now=at(1)),
        lambda: listings.pause(actor, listing, now=at(5)),
        lambda: listings.update(actor, listing, {}, hosts=[one.pk], now=at(6)),
        lambda: site_loop.run(site.pk, now=at(7)),
        lambda: sites.drain_site(site, actor=actor, now=at(8), reason="all"),
    ]
    for round_ in range(3):
        answers = at_once([calls[(i + round_) % len(calls)] for i in range(len(calls))])
        assert not [a for a in answers if isinstance(a, str) and a.startswith(("Integrity", "Operational"))], answers
        for host in (one, two):
            exact(host)


def test_rivals_that_write_between_looking_and_writing(monkeypatch):
    """They change the same host after this one has seen that something changed, and before it holds the host."""
    _, (one, _), listing, actor = world()
    look, rivals = conditions._changed, []

    def rival(wanted):
        found = look(wanted)
        if not rivals:
            rivals.append(None)
            acts = (listings.pause, listings.retire)
            rivals.extend(in_thread(lambda act=act: act(actor, listing, now=at(5)))() for act in acts)
        return found

    monkeypatch.setattr(conditions, "_changed", rival)
    with transaction.atomic():
        conditions.record(hosts=[one.pk], now=at(400))  # silent by now: something to write
    monkeypatch.undo()
    assert [type(answer).__name__ for answer in rivals[1:]] == ["Listing", "Listing"]
    assert exact(one, 400) == ["able", "not_offered"]


def test_a_writer_that_dies_leaves_neither_the_state_nor_its_history():
    site, (one, _), _, actor = world()

    def die():
        with transaction.atomic():
            sites.drain_host(one, actor=actor, now=at(3), reason="fan")
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    answer = in_thread(die)()
    assert isinstance(answer, Exception)
    one.refresh_from_db()
    assert (one.state, exact(one)) == ("active", ["able"])
    with transaction.atomic():
        acquire((Lock.SITE, site.pk))
        leases.watch(site, now=at(10))
    assert exact(one) == ["able"]
