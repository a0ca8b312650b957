"""Decayed usage out of placements, and promises from cycle to cycle, on real rows."""

from datetime import timedelta

import pytest

from marketplace.models import Placement
from scheduler import usage
from scheduler.core.order import decayed, weighed
from scheduler.models import FairUsage
from tests import factories as f
from tests.factories import NOW

pytestmark = pytest.mark.django_db
HALF = 600


@pytest.fixture(autouse=True)
def half_life(settings):
    settings.FAIR_SHARE_HALF_LIFE_SECONDS = HALF


@pytest.fixture
def held():
    """Makes a placement of so many GPUs of an organization that lived from and to so many seconds before NOW (0: it lives)."""
    sites = {}

    def make(customer, gpus, began, ended=0):
        if customer.pk not in sites:
            site = f.site(power_w=54_000)
            sites[customer.pk] = f.contract(f.listing(site, hosts=[f.host(site)]), customer, gpu_count=64)
        contract = sites[customer.pk]
        host = f.host(contract.listing.site)  # another cell's site than the others'
        placement = f.placement(f.job(contract, gpus=gpus), host, list(range(gpus)))
        Placement.objects.filter(pk=placement.pk).update(
            created_at=NOW - timedelta(seconds=began), vcpu_milli=0, ram_mib=0,
            **({"state": "released", "finished_at": NOW - timedelta(seconds=ended)} if ended else {}),
        )  # fmt: skip
        return placement

    return make


def expected(*spans, now=0):
    """Of (GPUs, began, ended) in seconds before NOW, at `now` seconds after it."""
    return decayed([(1000 * g, -b, -e if e else 10**9) for g, b, e in spans], now, HALF)


def test_usage_is_what_is_held_and_the_decayed_mean_weighed(held):
    one, two = f.organization(), f.organization()
    held(one, 4, 1200, 600)
    held(one, 2, 300)
    held(two, 8, 5000, 3000)
    found = usage.of([one.pk, two.pk], now=NOW)
    assert found[one.pk] == pytest.approx(weighed(2000, expected((4, 1200, 600), (2, 300, 0))))
    assert found[two.pk] == pytest.approx(weighed(0, expected((8, 5000, 3000))))
    assert f.organization().pk not in usage.of([one.pk], now=NOW)


def test_when_it_was_rolled_up_changes_nothing(held):
    one, two = f.organization(), f.organization()
    held(one, 4, 1200, 600)
    held(one, 2, 900)
    held(two, 8, 100, 50)
    before = usage.parts([one.pk, two.pk], now=NOW)
    for seconds in (1000, 650, 200):
        usage.roll(now=NOW - timedelta(seconds=seconds))
    assert FairUsage.objects.get(organization=one).as_of == NOW - timedelta(seconds=200)
    # Rows seen at a past moment show later ends, too; what had not ended then counts up to then.
    after = usage.parts([one.pk, two.pk], now=NOW)
    for org in before:
        assert after[org] == pytest.approx(before[org])


def test_an_older_roll_changes_nothing(held):
    one = f.organization()
    held(one, 4, 1200, 600)
    usage.roll(now=NOW)
    stood = FairUsage.objects.get(organization=one).milli
    assert usage.roll(now=NOW - timedelta(seconds=10)) == 0
    assert FairUsage.objects.get(organization=one).milli == stood


def test_who_used_nothing_for_long_is_forgotten_and_the_mark_stays(held):
    one, two = f.organization(), f.organization()
    held(one, 1, 20_000, 19_000)
    held(two, 1, 20_000, 19_000)
    usage.roll(now=NOW - timedelta(seconds=18_000))
    assert FairUsage.objects.count() == 2
    later = NOW + timedelta(seconds=200 * HALF)
    usage.roll(now=later)
    assert FairUsage.objects.get().as_of == later
    assert usage.of([one.pk, two.pk], now=later + timedelta(seconds=5)).get(two.pk, 0.0) == 0.0


def test_the_dominant_resource_of_the_host_counts(held):
    customer = f.organization()
    placement = held(customer, 1, 10**6)
    Placement.objects.filter(pk=placement.pk).update(vcpu_milli=placement.host.vcpu_milli // 2)
    found = usage.parts([customer.pk], now=NOW)[customer.pk]
    assert found[1] == pytest.approx(placement.host.gpu_count * 1000 / 2)
