"""Days of hosts as they are counted, the errors that agents tell, and the scores of hosts, listings and operators."""

from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from django.db import transaction

from marketplace.models import GpuError, Host, HostDay, Reliability
from marketplace.services import conditions, drains, reliability
from scheduler.core import reliability as core
from tests import factories as f

pytestmark = pytest.mark.django_db
DAY0 = datetime(2026, 11, 2, tzinfo=UTC)
HOUR = timedelta(hours=1)


def at(hours):
    return DAY0 + hours * HOUR


def record(site, hours):
    with transaction.atomic():
        conditions.record(sites=[site.pk], now=at(hours))


@pytest.fixture
def place():
    site = f.site(pdus=1)
    hosts = [f.host(site) for _ in range(2)]
    listing = f.listing(site, hosts=hosts)
    record(site, 0)
    return site, hosts, listing, f.actor(site.organization)


def day(host, number=0):
    return HostDay.objects.get(host=host, day=(DAY0 + timedelta(days=number)).date())


def ended(host, listing, hours, **fields):
    """A placement that ended at that hour; ran for an hour, unless `running_at` says otherwise."""
    job = f.job(f.contract(listing), state="failed", checkpoint_grace_s=30)
    columns = {"state": "released", "reason": "", "finished_at": at(hours), "running_at": at(hours - 1), **fields}
    return f.placement(job, host, **columns)


def test_a_day_is_counted_from_the_intervals_that_touch_it(place):
    site, (host, other), _, actor = place
    drains.drain_host(host, actor=actor, now=at(6), reason="fan")
    drains.undrain_host(host, actor=actor, now=at(9))
    drains.drain_host(host, actor=actor, now=at(23), reason="fan")
    drains.undrain_host(host, actor=actor, now=at(25))
    Host.objects.filter(pk=other.pk).update(listing=None)
    record(site, 12)
    assert reliability.roll_up(now=at(30)) == 2
    first, second = day(host), day(host, 1)
    assert (first.offered_s, first.able_s, first.gpu_days) == (24 * 3600, 20 * 3600, 8)
    assert (second.offered_s, second.able_s) == (6 * 3600, 5 * 3600)  # as far as it has passed
    assert (day(other).offered_s, day(other).able_s) == (12 * 3600, 12 * 3600)
    assert (day(other, 1).offered_s, day(other, 1).gpu_days) == (0, 0)


def test_counting_again_replaces_what_was_counted(place):
    _, (host, _), *_ = place
    reliability.roll_up(now=at(5))
    reliability.roll_up(now=at(6))
    reliability.roll_up(now=at(6))
    assert (HostDay.objects.filter(host=host).count(), day(host).able_s) == (1, 6 * 3600)
    assert Reliability.objects.filter(host=host).count() == 1


def test_only_starts_that_failed_for_the_hosts_fault_count_against_it(place):
    _, (host, _), listing, _ = place
    ended(host, listing, 3)
    ended(host, listing, 4, state="failed", reason="exit code 1", exit_code=1)
    ended(host, listing, 5, state="failed", reason="start_failed", exit_code=127)  # no such command: the job's own
    ended(host, listing, 6, state="failed", reason="start_failed", running_at=None)
    ended(host, listing, 7, state="failed", reason="gang_member_failed", running_at=None)
    ended(host, listing, 8, state="failed", reason="start_failed", running_at=None, exit_code=126)
    reliability.roll_up(now=at(12))
    assert (day(host).starts, day(host).failed_starts) == (4, 1)
    found = reliability.events(host, now=at(12))
    assert [(e.kind, e.text, e.at) for e in found] == [("failed_start", "start_failed", at(6))]
    assert found[0].record.startswith("plc_")


def test_who_leaves_within_his_grace_and_a_minute_is_in_time(place):
    _, (host, _), listing, _ = place
    for seconds, hours in ((90, 3), (91, 4), (0, 5)):  # the last ended by itself
        ended(host, listing, hours, release_requested_at=at(hours) - timedelta(seconds=seconds))
    ended(host, listing, 6, state="lost", reason="site_lost", release_requested_at=at(5))
    reliability.roll_up(now=at(12))
    assert (day(host).drains, day(host).late_drains) == (2, 1)
    assert [e.kind for e in reliability.events(host, now=at(12))] == ["late_drain"]


def told(host, hours, **data):
    return {"id": str(uuid4()), "at": at(hours), "kind": "gpu_error", "subject": host.name, "data": data}


def test_errors_are_taken_once_by_their_id_and_count_once_a_gpu_and_day(place):
    site, (host, _), *_ = place
    told_ = [
        told(host, 3, gpu=2, kind="xid", code=79, text="fell off the bus"),
        told(host, 4, gpu=2, kind="ecc", code=1),
    ]
    wrong = [
        told(host, 3, gpu="2"),
        told(host, 3, gpu=-1, code=1),
        told(host, 3, gpu=1, code="x"),
        told(site, 3, gpu=1),
    ]
    assert reliability.take_errors(site.pk, [*told_, *wrong], now=at(5)) == 2
    assert reliability.take_errors(site.pk, [*told_, told(host, 40, gpu=3, kind="xid", code=48)], now=at(5)) == 1
    assert GpuError.objects.get(gpu=3).at == at(5)  # no clock is ahead of ours
    reliability.roll_up(now=at(12))
    assert day(host).sick_gpu_days == 2
    shown = reliability.events(host, now=at(12))
    assert [e.text for e in shown] == ["GPU 3: xid 48", "GPU 2: ecc 1", "GPU 2: xid 79 fell off the bus"]


def test_an_error_told_late_counts_on_its_day(place):
    site, (host, _), *_ = place
    reliability.roll_up(now=at(12))
    reliability.roll_up(now=at(24 * 6))
    reliability.take_errors(site.pk, [told(host, 3, gpu=1, kind="xid", code=79)], now=at(24 * 6))
    reliability.roll_up(now=at(24 * 6 + 1))
    assert day(host).sick_gpu_days == 1


def test_another_sites_hosts_are_not_told_of(place):
    _, (host, _), *_ = place
    assert reliability.take_errors(f.site().pk, [told(host, 3, gpu=1, code=1)], now=at(5)) == 0


def test_listings_and_operators_are_scored_from_the_sums_of_their_hosts(place):
    site, (host, _), listing, actor = place
    drains.drain_host(host, actor=actor, now=at(2), reason="fan")
    unlisted = f.host(site)
    record(site, 2)
    reliability.roll_up(now=at(20))
    of = {(r.host_id, r.listing_id, r.organization_id): r for r in Reliability.objects.all()}
    assert len(of) == 5  # three hosts, their listing, their operator
    both = of[None, listing.pk, None]
    assert (both.offered_s, both.able_s, both.gpu_days) == (40 * 3600, 22 * 3600, 16)
    assert both.score_permille == core.permille(reliability.counts_of(both))
    assert of[None, None, site.organization_id].able_s == 22 * 3600
    assert of[host.pk, None, None].score_permille < both.score_permille
    assert of[unlisted.pk, None, None].score_permille == core.permille(core.Counts())


def test_the_window_is_thirty_days(place):
    _, (host, _), *_ = place
    for number in range(40):
        reliability.count_day((DAY0 + timedelta(days=number)).date(), now=at(24 * 40))
    reliability.score_all(now=at(24 * 40 - 1))
    assert Reliability.objects.get(host=host).offered_s == 30 * 86_400
