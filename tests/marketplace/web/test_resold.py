"""What a customer sells on, as others find it: whose hosts stand behind it, what is announced for them, and the filter for it."""

from datetime import timedelta

import pytest
from django.utils import timezone

from marketplace.models import HostVerification, SavedSearch
from marketplace.services import availability, contracts, maintenance, quotes
from marketplace.services.forward import resales
from tests import factories

pytestmark = pytest.mark.django_db
DAY = timedelta(days=1)


@pytest.fixture
def sold_on(market):
    """16 GPUs held for a month; from day 10 to day 12 eight of them, of one host, are offered to others."""
    now = timezone.now().replace(second=0, microsecond=0)
    holder = factories.actor(market.customer)
    asked = quotes.Request("reserved", 16, starts_at=now + DAY, ends_at=now + 30 * DAY)
    contract = contracts.accept(holder, quotes.quote(holder, market.listing.pk, asked, now=now).pk, now=now)
    row = resales.offer(holder, contract, resales.Asked(8, now + 10 * DAY, now + 12 * DAY, 1_500_000), now=now)
    market.now, market.host = now, row.reservation.blocks.get().host
    market.other = next(host for host in market.hosts if host != market.host)
    return row


def announce(market, host, start, end):
    operator = factories.actor(market.operator)
    row = maintenance.draft(
        operator, market.site, scope="hosts", hosts=[host], starts_at=market.now + start, ends_at=market.now + end,
        text="New fans.", now=market.now,
    )  # fmt: skip
    return maintenance.announce(operator, row, now=market.now)


def verify(host):
    HostVerification.objects.create(
        host=host, state="verified", score=900, verified_at=timezone.now(), next_at=timezone.now()
    )


def test_the_hosts_that_it_stands_on_are_counted_as_verified(market, browser, sold_on):
    there = f"/api/v1/listings/{sold_on.listing.public_id}"
    reader = factories.client(factories.organization())
    verify(market.other)  # the holder's other host is none of it
    assert reader.get(there).json()["verification"] == {"verified": 0, "hosts": 1, "score": None}
    verify(market.host)
    assert reader.get(there).json()["verification"] == {"verified": 1, "hosts": 1, "score": 900}
    assert f"/listings/{sold_on.listing.public_id}" in browser().get("/?resale=yes&verified=on").content.decode()
    page = browser().get(f"/listings/{sold_on.listing.public_id}").content.decode()
    assert "vCPU" in page  # the shape of its host, too


@pytest.mark.parametrize(
    ("whose", "start", "end", "shown"),
    [("host", 11 * DAY, 13 * DAY, True), ("host", 12 * DAY, 13 * DAY, False), ("other", 11 * DAY, 13 * DAY, False)],
    ids=["touches it", "after its window", "another host"],
)
def test_announced_work_is_shown_where_it_touches_the_window(market, browser, sold_on, whose, start, end, shown):
    work = announce(market, getattr(market, whose), start, end)
    for listing, expected in ((sold_on.listing, shown), (market.listing, True)):
        page = browser().get(f"/listings/{listing.public_id}").content.decode()
        told = factories.client(factories.organization()).get(f"/api/v1/listings/{listing.public_id}").json()
        assert ("New fans." in page) is expected
        assert [w["id"] for w in told["maintenance"]] == ([work.public_id] if expected else [])


def test_its_buyer_reads_it_on_the_quote(market, browser, sold_on):
    announce(market, market.host, 11 * DAY, 13 * DAY)
    home = factories.organization()
    buyer = factories.actor(home)
    made = quotes.quote(buyer, sold_on.listing_id, quotes.Request("reserved", 8), now=market.now)
    assert [work.text for work in maintenance.during(made, market.now)] == ["New fans."]
    page = browser(home).get(f"/quotes/{made.public_id}").content.decode()
    assert (
        "GPUs of this quote may be away then" in page
    )  # the window is a resale's own: nothing is held clear of the work
    assert "held clear" not in page


def test_search_and_the_offer_agree_while_maintenance_has_its_host(market, sold_on):
    market.host.state, market.host.back_at = "maintenance", market.now + 5 * DAY
    market.host.save()
    found = availability.stock([sold_on.listing], now=market.now, level="site")[sold_on.listing_id]
    shown = factories.client(factories.organization()).get("/api/v1/listings?resale=true").json()["data"]
    assert [row["stock"]["gpus"] for row in shown] == [found.gpus] == [8]


def test_a_kept_search_for_resales_asks_for_resales_also_on_the_pages(market, browser, sold_on):
    client = browser(market.customer, "engineer")
    asked = {"query": "resale=yes&gpu_model=H100-SXM", "name": "sold on", "cadence": "at_once", "pause_minutes": 60}
    client.post("/searches", asked)
    row = SavedSearch.objects.get()
    assert row.filters == {"gpu_model": ["H100-SXM"], "resale": True}
    back = client.get(f"/searches/{row.public_id}")["Location"]
    assert "resale=yes" in back
    page = browser().get(back).content.decode()
    assert f"/listings/{sold_on.listing.public_id}" in page
    assert f"/listings/{market.listing.public_id}" not in page
    operators = browser().get("/?resale=no").content.decode()
    assert f"/listings/{market.listing.public_id}" in operators
    assert f"/listings/{sold_on.listing.public_id}" not in operators
