"""What customers read of maintenance: the list, one of it, their contract, the offer, a quote; calendars."""

import re
from datetime import timedelta

import pytest
from django.utils import timezone

from marketplace.models import CalendarFeed
from marketplace.services import contracts, maintenance, quotes
from tests import factories

pytestmark = pytest.mark.django_db
DAY = timedelta(days=1)


@pytest.fixture
def told(market):
    """A contract of all 16 GPUs, and work announced on one host."""
    now = timezone.now().replace(second=0, microsecond=0)
    actor = factories.actor(market.customer)
    asked = quotes.Request("reserved", 16, starts_at=now + DAY, ends_at=now + 30 * DAY)
    contract = contracts.accept(actor, quotes.quote(actor, market.listing.pk, asked, now=now).pk, now=now)
    operator = factories.actor(market.operator)
    row = maintenance.draft(
        operator, market.site, scope="hosts", hosts=market.hosts[:1], starts_at=now + 10 * DAY, ends_at=now + 11 * DAY,
        text="New fans.", impact="Half of the hall is dark.", now=now,
    )  # fmt: skip
    return contract, maintenance.announce(operator, row, now=now)


def test_whom_it_touches_reads_what_it_means(market, browser, told):
    contract, row = told
    page = browser(market.customer).get("/maintenance").content.decode()
    assert "New fans." in page
    assert "8 of 8 GPUs missing" in page
    one = browser(market.customer).get(f"/maintenance/{row.public_id}").content.decode()
    assert "8 are missing" in one
    assert "Half of the hall is dark." in one
    assert "8 are missing" in browser(market.customer).get(f"/contracts/{contract.public_id}").content.decode()
    maintenance.cancel(factories.actor(market.operator), row, now=timezone.now())
    assert "New fans." not in browser(market.customer).get("/maintenance").content.decode()
    assert "New fans." in browser(market.customer).get("/maintenance?show=all").content.decode()


def test_a_stranger_reads_it_on_the_offer_alone(market, browser, told):
    contract, row = told
    stranger = factories.organization()
    assert "New fans." not in browser(stranger).get("/maintenance").content.decode()
    assert browser(stranger).get(f"/maintenance/{row.public_id}").status_code == 404
    offer = browser().get(f"/listings/{market.listing.public_id}").content.decode()
    assert "New fans." in offer
    assert contract.public_id not in offer
    now = timezone.now()
    wanted = quotes.Request("on_demand", 8)
    made = quotes.quote(factories.actor(stranger), market.listing.pk, wanted, now=now)
    assert "Notice of maintenance" in browser(stranger).get(f"/quotes/{made.public_id}").content.decode()


def test_a_calendars_address_is_shown_once_and_revoked(market, browser, told, client):
    person = browser(market.customer)
    shown = person.post("/maintenance", {"name": "ops"})
    address = re.search(r"/calendar/[\w-]+\.ics", shown.content.decode())[0]
    assert shown.headers["Cache-Control"] == "no-store"
    assert "New fans." in client.get(address).content.decode()
    assert address not in person.get("/maintenance").content.decode()
    feed = CalendarFeed.objects.get()
    assert browser(factories.organization()).post(f"/calendar-feeds/{feed.public_id}/revoke").status_code == 404
    person.post(f"/calendar-feeds/{feed.public_id}/revoke")
    assert client.get(address).status_code == 404
    assert person.post("/maintenance", {"name": ""}).status_code == 400
    assert told
