"""An operator changes the prices of a listing while buyers are quoted and sign: each quote is of one version, whole, and stays it."""

import pytest

from marketplace.models import Listing, Quote
from marketplace.services import contracts, listings, quotes
from tests import factories
from tests.factories import NOW
from tests.races.test_booking import END, START, world
from tests.threads import at_once, in_thread

pytestmark = pytest.mark.django_db(transaction=True)
ASKED = quotes.Request("reserved", 1, starts_at=START, ends_at=END, upfront_max_permille=1000)


def tiers(version):
    """What a listing of this version sells a day for: price and share at signing belong together."""
    return [{"kind": "reserved", "min_term_hours": 24, "upfront_permille": 10 * version, "price": 1_000_000 + version}]


def offered(buyers):
    listing, actors = world(buyers)
    Listing.objects.filter(pk=listing.pk).update(price_tiers=listings.price_tiers.completed(tiers(1)), runtime="kata")
    listing.refresh_from_db()
    return listing, actors


def change(listing):
    """The next version, by its operator."""
    fresh = Listing.objects.get(pk=listing.pk)
    operator = factories.actor(listing.organization)
    return listings.update(
        operator, fresh, {"price_tiers": tiers(fresh.version + 1)}, now=NOW, expected_version=fresh.version
    )


def whole(made):
    version = made.listing_version
    assert (made.price, made.terms["upfront_permille"]) == (1_000_000 + version, 10 * version)


def test_prices_that_change_between_the_look_and_the_lock(monkeypatch):
    listing, (buyer,) = offered(1)
    acquire = quotes.acquire

    def rival(*locks):
        in_thread(lambda: change(listing))()
        acquire(*locks)

    monkeypatch.setattr(quotes, "acquire", rival)
    made = quotes.quote(buyer, listing.pk, ASKED, now=NOW)
    assert (made.listing_version, Listing.objects.get(pk=listing.pk).version) == (1, 2)
    whole(made)
    contract = contracts.accept(buyer, made.pk, now=NOW)
    assert (contract.price, contract.listing_version, contract.terms["upfront_permille"]) == (1_000_001, 1, 10)


def test_buyers_and_an_operator_at_once():
    listing, actors = offered(8)
    calls = [lambda a=a: quotes.quote(a, listing.pk, ASKED, now=NOW) for a in actors]
    answers = at_once([call for buy in calls for call in (buy, lambda: change(listing))])
    assert {type(a).__name__ for a in answers} <= {"Quote", "Listing", "str"}
    assert {a for a in answers if isinstance(a, str)} <= {"conflict"}  # an operator whom another was faster than
    assert Quote.objects.count() == 8
    for made in Quote.objects.all():
        whole(made)
