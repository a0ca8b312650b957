"""Standing bids: checked when placed, quoted price first then time, never over a limit, signed only where the bidder said so."""

from datetime import timedelta

import pytest

from marketplace.errors import MarketError
from marketplace.models import (
    BillingStanding,
    Contract,
    Fill,
    Listing,
    OutboxMessage,
    Quote,
    StandingBid,
)
from marketplace.services import contracts, listings, quotes
from marketplace.services.forward import bids, book, notices, sales
from marketplace.services.forward.topics import MATCH, TOLD
from tests import factories
from tests.factories import NOW
from tests.marketplace.reselling import ASK, DAY, END, HOUR, START, Desk

pytestmark = pytest.mark.django_db
FROM, TO = START + 2 * DAY, START + 4 * DAY


@pytest.fixture
def desk():
    return Desk()


def wanted(desk, **fields):
    given = {
        "gpu_model": desk.listing.gpu_model.name, "region": desk.site.region, "gpu_count": 4, "earliest": FROM,
        "duration_s": int((TO - FROM).total_seconds()), "limit_price": 2_000_000, "expires_at": FROM, **fields,
    }  # fmt: skip
    return bids.Wanted(**given)


def bid(desk, actor=None, at=NOW, **fields):
    return bids.place(actor or desk.buyer(), wanted(desk, **fields), now=at)


def look(desk, at=NOW):
    return bids.run(True, desk.listing.gpu_model_id, desk.site.region, now=at)


def refused(code, call, *args, **kwargs):
    with pytest.raises(MarketError) as caught:
        call(*args, **kwargs)
    assert caught.value.code == code, caught.value
    return caught.value


# --- placing
@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"gpu_model": "none"}, "/gpu_model"),
        ({"region": "nowhere"}, "/region"),
        ({"site_id": 1 << 40}, "/site"),
        ({"kind": "on_demand"}, "/kind"),
        ({"kind": "spot"}, "/kind"),
        ({"level": "rack"}, "/level"),
        ({"gpu_count": 0}, "/gpu_count"),
        ({"min_gpus": 5}, "/min_gpus"),
        ({"limit_price": 0}, "/limit_price"),
        ({"earliest": FROM + timedelta(seconds=5)}, "/earliest"),
        ({"latest": FROM - HOUR}, "/latest"),
        ({"latest": NOW + 366 * DAY}, "/latest"),
        ({"earliest": NOW - HOUR}, "/latest"),
        ({"duration_s": 3599}, "/duration_s"),
        ({"expires_at": NOW}, "/expires_at"),
        ({"expires_at": FROM + HOUR}, "/expires_at"),
    ],
)
def test_a_bid_that_cannot_be_meant_is_refused_by_field(desk, fields, name):
    assert name in refused("invalid_request", bid, desk, **fields).fields
    assert not StandingBid.objects.exists()


def test_the_usual_checks(desk):
    refused("limit_exceeded", bid, desk, factories.actor(factories.organization(gpu_limit=3)))
    refused("card_required", bid, desk, factories.actor(factories.organization(standing="no_card")))
    late = factories.organization()
    BillingStanding.objects.filter(organization=late).update(state="suspended")
    refused("billing_suspended", bid, desk, factories.actor(late))
    refused("terms_not_accepted", bid, desk, factories.actor(factories.organization(terms=False)))


def test_an_organization_has_so_many_bids_and_no_more(desk, monkeypatch):
    monkeypatch.setattr(bids, "MOST_OPEN", 2)
    buyer = desk.buyer()
    rows = [bid(desk, buyer) for _ in range(2)]
    refused("limit_exceeded", bid, desk, buyer)
    bids.cancel(buyer, rows[0], now=NOW)
    assert bid(desk, buyer).state == "open"


# --- turning into quotes
def test_a_resale_meets_a_bid_with_a_quote_and_nothing_is_bought_unasked(desk, mailoutbox):
    buyer = desk.buyer()
    row = bid(desk, buyer, reference="po-7")
    assert look(desk) == bids.Looked(bids=1)
    resale = desk.offer()
    assert OutboxMessage.objects.filter(topic=MATCH).count() == 1
    assert look(desk) == bids.Looked(bids=1, quoted=1)
    quote = Quote.objects.get(bid=row)
    assert (quote.listing_id, quote.price, quote.reference, quote.state) == (resale.listing_id, ASK, "po-7", "open")
    assert quote.reservation.within_id == resale.reservation_id
    assert Contract.objects.count() == 1
    assert look(desk) == bids.Looked()  # the quote is asked for already
    factories.member(row.organization)
    notices.send(OutboxMessage.objects.get(topic=TOLD).payload)
    assert "has a quote" in mailoutbox[0].subject
    assert f"/quotes/{quote.public_id}" in mailoutbox[0].body
    contract = contracts.accept(buyer, quote.pk, now=NOW)
    row.refresh_from_db()
    assert (row.state, row.filled_gpus) == ("filled", 4)
    fill = Fill.objects.get()
    assert (fill.bid, fill.resale, fill.contract) == (row, resale, contract)
    desk.sound()


def test_an_operators_listing_meets_a_bid_when_its_price_falls():
    desk = Desk(gpus=1, runtime="podman")
    row = bid(desk, limit_price=1_900_000)
    assert look(desk) == bids.Looked(bids=1)
    operator = factories.actor(desk.site.organization)
    factories.a_node(desk.site)
    OutboxMessage.objects.all().delete()
    listings.update(operator, desk.listing, {"reserved_price": 1_800_000}, now=NOW)
    assert OutboxMessage.objects.filter(topic=MATCH).count() == 1
    assert look(desk).quoted == 1
    assert Quote.objects.get(bid=row).price == 1_800_000


def test_an_early_end_meets_a_bid(desk):
    row = bid(desk, earliest=START + 5 * DAY, expires_at=START + DAY)
    assert look(desk) == bids.Looked(bids=1)
    OutboxMessage.objects.all().delete()
    contracts.terminate(desk.holder, desk.contract, now=NOW)
    assert OutboxMessage.objects.filter(topic=MATCH).count() == 1
    assert look(desk).quoted == 1
    assert Quote.objects.get(bid=row).listing == desk.listing


def test_consent_signs_and_is_on_the_record(desk):
    buyer = desk.buyer()
    row = bid(desk, buyer, auto_accept=True)
    assert row.consent["by"] == buyer.label
    assert "accepted for us at once" in row.consent["words"]
    desk.offer()
    assert look(desk) == bids.Looked(bids=1, bought=1)
    contract = Contract.objects.get(fill__bid=row)
    assert (contract.state, contract.price, contract.gpu_count) == ("pending_payment", ASK, 4)
    row.refresh_from_db()
    assert (row.state, row.filled_gpus) == ("filled", 4)
    contracts.clock(contract.pay_by)
    assert sales.undo(contract.pk, now=contract.pay_by)
    row.refresh_from_db()
    assert (row.state, row.filled_gpus) == ("cancelled", 0)
    desk.sound(contract.pay_by)


def test_consent_does_not_reach_to_an_emergency_clause():
    """Who gives way in a grid emergency has read so: the bid gets its quote, and a person decides."""
    desk = Desk(emergency_notice_s=300)
    row = bid(desk, auto_accept=True)
    desk.offer()
    assert look(desk) == bids.Looked(bids=1, quoted=1)
    made = Quote.objects.get(bid=row)
    assert (made.state, made.terms["emergency_notice_s"]) == ("open", 300)


def test_consent_does_not_reach_over_the_checks_of_a_signature(desk):
    row = bid(desk, auto_accept=True)
    desk.offer()
    BillingStanding.objects.filter(organization=row.organization).update(state="past_due")
    assert look(desk) == bids.Looked(bids=1, refused=1)
    row.refresh_from_db()
    assert (row.state, Quote.objects.filter(bid=row).count()) == ("open", 0)
    assert "past due" in row.note


def test_price_first_then_time(desk):
    later = bid(desk, limit_price=1_700_000, at=NOW + timedelta(seconds=9))
    first = bid(desk, limit_price=1_700_000)
    low = bid(desk, limit_price=1_600_000)
    under = bid(desk, limit_price=ASK - 1)
    resale = desk.offer()
    served = []
    for _ in range(3):
        assert look(desk).quoted == 1
        quote = Quote.objects.latest("pk")
        served.append(quote.bid)
        quotes.release(factories.actor(quote.organization), quote.pk, now=NOW)
    assert served == [first, later, low]
    assert look(desk) == bids.Looked(bids=1)
    assert not under.quotes.exists()
    assert resale.fills.count() == 0


def test_a_line_too_long_for_one_look_is_served_from_its_best_end(desk, monkeypatch):
    monkeypatch.setattr(bids, "LINE", 1)
    bid(desk, limit_price=1_600_000)
    best = bid(desk, limit_price=1_700_000, at=NOW + timedelta(seconds=9))
    desk.offer()
    assert look(desk).quoted == 1
    assert Quote.objects.latest("pk").bid == best


def test_bids_that_nothing_can_meet_keep_nobody_from_what_there_is(desk, monkeypatch):
    monkeypatch.setattr(bids, "LINE", 2)
    monkeypatch.setattr(bids, "LINES", 3)
    for _ in range(4):
        bid(desk, gpu_count=1024, limit_price=9_000_000)
    row = bid(desk)
    desk.offer()
    assert look(desk) == bids.Looked(bids=5, quoted=1)
    assert Quote.objects.latest("pk").bid == row


def test_offers_that_suit_nobody_keep_nobody_from_those_that_do(desk, monkeypatch):
    monkeypatch.setattr(bids, "OFFERS", 1)
    row = bid(desk)
    desk.offer(gpus=1, start=START + 5 * DAY, end=START + 6 * DAY, price=ASK - 9)
    dearer = desk.offer(gpus=row.gpu_count)
    assert look(desk).quoted == 1
    assert Quote.objects.latest("pk").listing_id == dearer.listing_id


def test_parts_and_all_or_nothing(desk):
    bid(desk, gpu_count=6, limit_price=1_900_000)
    row = bid(desk, gpu_count=6, min_gpus=2)
    desk.offer(gpus=3)
    desk.offer(gpus=2, price=ASK + 1)
    assert look(desk) == bids.Looked(bids=2, quoted=2)
    assert sorted(Quote.objects.filter(bid=row).values_list("gpu_count", "price")) == [(2, ASK + 1), (3, ASK)]
    assert bids.pending([row.pk], NOW) == {row.pk: 5}


def test_a_bidder_who_lets_a_quote_lapse_waits_before_the_next(desk):
    row = bid(desk)
    desk.offer()
    assert look(desk).quoted == 1
    firm = Quote.objects.get(bid=row).firm_until
    assert look(desk, firm) == bids.Looked()
    assert look(desk, firm + bids.REST).quoted == 1


def test_a_site_a_seller_and_partners_alone(desk):
    elsewhere = factories.site(desk.site.organization, region=desk.site.region)
    bid(desk, site_id=elsewhere.pk)
    bid(desk, desk.holder)
    resale = desk.offer()
    Listing.objects.filter(pk=resale.listing_id).update(visibility="partners")
    bid(desk)
    assert look(desk) == bids.Looked(bids=3)
    friend = bid(desk, limit_price=1_600_000)
    resale.listing.partners.add(friend.organization)
    assert look(desk).quoted == 1
    assert friend.quotes.count() == 1


def test_a_bid_that_is_over_looks_for_nothing(desk, mailoutbox):
    gone = bid(desk)
    bids.cancel(factories.actor(gone.organization), gone, now=NOW)
    refused("illegal_transition", bids.cancel, factories.actor(gone.organization), gone, now=NOW)
    refused("forbidden", bids.cancel, desk.buyer(), gone, now=NOW)
    old = bid(desk, expires_at=NOW + HOUR)
    desk.offer()
    OutboxMessage.objects.all().delete()
    assert bids.tick(NOW + HOUR) == 0
    old.refresh_from_db()
    assert (gone.state, old.state) == ("cancelled", "expired")
    assert look(desk, NOW + HOUR) == bids.Looked()
    factories.member(old.organization)
    notices.send(OutboxMessage.objects.get(topic=TOLD).payload)
    assert "has expired" in mailoutbox[0].subject


def test_every_book_with_bids_is_looked_at(desk):
    bid(desk)
    OutboxMessage.objects.all().delete()
    assert bids.tick(NOW) == 1
    (message,) = OutboxMessage.objects.filter(topic=MATCH)
    assert message.payload == {"livemode": True, "gpu_model": desk.listing.gpu_model_id, "region": desk.site.region}


def test_the_line_is_read_by_its_index(desk, django_assert_num_queries):
    bid(desk)
    with django_assert_num_queries(3):  # the line, its quotes, the offers: none is within reach
        StandingBid.objects.update(limit_price=1)
        bids._line(True, desk.listing.gpu_model_id, desk.site.region, NOW)
    assert OutboxMessage.objects.filter(topic=MATCH).count() == 1


# --- the book
def test_depth_says_how_much_at_which_price_and_not_who():
    desk = Desk(hosts=2, gpus=8)
    bid(desk, gpu_count=3)
    bid(desk, gpu_count=2)
    bid(desk, limit_price=1_000_000, earliest=END + 40 * DAY)
    desk.offer(gpus=5)
    month = book.months(NOW)[0]
    found = book.depth(desk.listing.gpu_model, desk.site.region, month, livemode=True, currency="USD", now=NOW)
    assert found.bids == (book.Level(2_000_000, 5, 2),)
    assert found.offers == (book.Level(ASK, 5, 1), book.Level(2_000_000, 8, 1))
    later = book.depth(
        desk.listing.gpu_model, desk.site.region, book.months(NOW)[1], livemode=True, currency="USD", now=NOW
    )
    assert later.bids == (book.Level(1_000_000, 4, 1),)
    assert later.offers == (book.Level(2_000_000, 16, 1),)
    assert book.books(livemode=True) == [(desk.listing.gpu_model.name, desk.site.region)]
    assert book.books(livemode=False) == []


def test_fills_are_public_and_undone_ones_are_not(desk):
    paid = desk.buy(desk.buyer(), desk.offer(gpus=6), 2)
    resale = paid.fill.resale
    contract = desk.buy(desk.buyer(), resale, 4, paid=False)
    stranger = desk.buyer()
    assert book.fills(stranger).count() == 2
    contracts.terminate(factories.actor(contract.organization), contract, now=NOW)
    sales.undo(contract.pk, now=NOW)
    (left,) = book.fills(stranger, gpu_model=desk.listing.gpu_model.name, region=desk.site.region)
    assert (left.gpu_count, left.price) == (2, ASK)
    assert not book.fills(stranger, region="nowhere").exists()
    other = factories.actor(factories.organization(livemode=False))
    assert not book.fills(other).exists()


def test_twelve_months_from_this_one():
    assert [m.month for m in book.months(NOW)] == [11, 12, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
