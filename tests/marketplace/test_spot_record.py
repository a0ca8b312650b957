"""Old spot intervals go; what is in force, what is public and what billing still needs stays."""

from datetime import timedelta

import pytest
from django.conf import settings

from billing import usage
from billing.models import PriceVersion, UsageRecord
from marketplace.models import SpotInterval, SpotNotice, SpotResult
from marketplace.models.spot import INTERVAL
from marketplace.services import spot_prices, spot_record
from marketplace.tasks import forget_spot
from tests import factories as f
from tests.factories import NOW
from tests.marketplace.test_spot import FLOOR, Market

pytestmark = pytest.mark.django_db
KEPT = timedelta(days=settings.SPOT_HISTORY_DAYS)
OLD = NOW - KEPT - timedelta(hours=1)


@pytest.fixture
def market():
    return Market()


def interval(listing, start, price=FLOOR, **fields):
    return SpotInterval.objects.create(
        listing=listing, cell_id=listing.site.cell_id, gpu_model_id=listing.gpu_model_id, start=start, price=price, floor=FLOOR,
        currency="USD", supply_milli=8000, demand_milli=0, sold_milli=0, closed_at=start, **fields,
    )  # fmt: skip


def starts():
    return list(SpotInterval.objects.order_by("start").values_list("start", flat=True))


def test_what_is_older_than_it_is_kept_goes_with_its_results_and_notices(market):
    contract = market.bid(2 * FLOOR)
    old = interval(market.listing, OLD)
    SpotResult.objects.create(
        interval=old, contract=contract, start=OLD, limit_price=2 * FLOOR, price=FLOOR, wanted_milli=0, won_milli=0, outcome="won"
    )  # fmt: skip
    SpotNotice.objects.create(interval=old, job=f.job(contract), told_at=OLD, leaves_at=OLD)
    edge = NOW - KEPT  # it ends later: still public
    interval(market.listing, edge)
    interval(market.listing, NOW - INTERVAL)
    assert spot_record.forget(NOW) == 1
    assert starts() == [edge, NOW - INTERVAL]
    assert not SpotResult.objects.exists()
    assert not SpotNotice.objects.exists()
    assert spot_record.forget(NOW) == 0
    assert spot_record.forget(NOW + INTERVAL) == 1


def test_the_price_in_force_stays_however_old(market):
    for n in range(3):
        interval(market.listing, OLD + n * INTERVAL, price=FLOOR + n)
    spot_record.forget(NOW)
    assert starts() == [OLD + 2 * INTERVAL]
    assert spot_prices.in_force([market.listing.pk], NOW)[market.listing.pk].price == FLOOR + 2
    other = Market()
    interval(other.listing, OLD)
    assert spot_record.forget(NOW) == 0  # each listing has its own


def test_what_is_still_to_be_metered_is_billed_at_its_own_prices_first(market):
    contract = market.bid(3 * FLOOR, created_at=OLD - timedelta(hours=2), starts_at=OLD - timedelta(hours=2))
    begun = OLD - timedelta(hours=1)
    placement = market.runs(contract, since=begun)
    for n in range(24):  # two hours: the first at the floor, the second dearer
        interval(market.listing, begun + n * INTERVAL, price=FLOOR if n < 12 else 2 * FLOOR)
    interval(market.listing, NOW)
    other = market.bid(FLOOR)  # nothing of it was ever metered, nor ran
    assert spot_record.forget(NOW) == 0, "nothing has been metered yet"
    placement.metered_through = begun + timedelta(minutes=30)
    placement.save()
    assert spot_record.forget(NOW) == 6
    usage.meter(contract.organization_id, through=NOW, now=NOW)
    assert 2 * FLOOR in PriceVersion.objects.filter(contract=contract).values_list("millionths", flat=True)
    assert UsageRecord.objects.filter(placement=placement).exists()
    before = usage.pending(contract.organization_id, until=NOW)
    assert spot_record.forget(NOW) == 18
    assert usage.pending(contract.organization_id, until=NOW) == before
    assert other.price == FLOOR


def test_it_goes_by_batches_and_the_beat_runs_it(market, monkeypatch):
    monkeypatch.setattr(spot_record, "FORGOTTEN", 2)
    for n in range(4):
        interval(market.listing, OLD + n * INTERVAL)
    assert [forget_spot() for _ in range(3)] == [2, 1, 0]
    assert settings.CELERY_BEAT_SCHEDULE["spot-record"]["task"] == forget_spot.name
