"""A holder sells part of a contract on: what moves, what stays, and what is refused."""

from datetime import timedelta

import pytest

from marketplace.errors import MarketError
from marketplace.models import AuditEvent, Fill, Listing, OutboxMessage, Resale, Reservation
from marketplace.services import availability, contracts, listings, quotes, search
from marketplace.services.forward import notices, resales, sales
from marketplace.services.forward.topics import TOLD, UNDO
from tests import factories
from tests.factories import NOW
from tests.marketplace.reselling import ASK, DAY, END, HOUR, START, Desk

pytestmark = pytest.mark.django_db
FROM, TO = START + 2 * DAY, START + 4 * DAY
LEAD = timedelta(minutes=4)


@pytest.fixture
def desk():
    return Desk()


def refused(code, call, *args, **kwargs):
    with pytest.raises(MarketError) as caught:
        call(*args, **kwargs)
    assert caught.value.code == code, caught.value
    return caught.value


# --- offering
def test_what_is_offered_leaves_the_contract_for_that_window_and_is_conserved(desk):
    resale = desk.offer()
    desk.sound()
    assert (resale.state, resale.left, resale.expires_at) == ("open", 4, FROM - LEAD)
    windows = sorted((r.claims_at, r.ends_at, sum(len(b.gpu_indices) for b in r.blocks.all())) for r in
                     desk.contract.reservations.filter(state="firm"))  # fmt: skip
    assert windows == [(START - LEAD, FROM - LEAD, 4), (START - LEAD, END, 4), (TO, END, 4)]
    aside = Reservation.objects.get(pk=resale.reservation_id)
    assert (aside.contract_id, aside.claims_at, aside.starts_at, aside.ends_at) == (None, FROM - LEAD, FROM, TO)


def test_an_offer_is_a_listing_that_others_find_and_its_operator_cannot_touch(desk):
    resale = desk.offer()
    buyer = desk.buyer()
    found = search.search(buyer, search.Filters(resale=True, kind="reserved"), now=NOW)
    (row,) = found.rows
    listing = row.listing
    assert (listing.pk, listing.is_resale, listing.reserved_price) == (resale.listing_id, True, ASK)
    assert (listing.on_demand_price, listing.spot_floor, listing.flexible_price) == (None, None, None)
    inside = search.search(buyer, search.Filters(resale=True, start=FROM, end=TO, count=4), now=NOW)
    assert [r.stock.gpus for r in inside.rows] == [4]
    assert not search.search(buyer, search.Filters(resale=True, start=FROM, end=TO, count=5), now=NOW).rows
    assert not search.search(buyer, search.Filters(resale=True, start=FROM, end=TO + HOUR, count=1), now=NOW).rows
    original = search.search(buyer, search.Filters(resale=False, start=FROM, end=TO, count=1), now=NOW)
    assert original.rows == []  # the holder's GPUs do not come back to the operator's offer
    operator = factories.actor(desk.site.organization)
    assert listings.actions(listing) == []
    refused("forbidden", listings.retire, operator, listing, now=NOW)


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"gpus": 9}, "/gpu_count"),
        ({"gpus": 0}, "/gpu_count"),
        ({"price": 0}, "/price"),
        ({"start": START - HOUR}, "/starts_at"),
        ({"end": END + HOUR}, "/ends_at"),
        ({"end": FROM + timedelta(minutes=59)}, "/ends_at"),
        ({"start": FROM + timedelta(seconds=1)}, "/starts_at"),
        ({"expires_at": FROM}, "/expires_at"),
        ({"at": FROM - LEAD}, "/starts_at"),
    ],
)
def test_an_offer_that_cannot_be_meant_is_refused_by_field(desk, asked, field):
    assert field in refused("invalid_request", desk.offer, **asked).fields
    assert desk.whole()


def test_gpus_go_by_the_chunk_that_the_contract_was_sold_by():
    desk = Desk(hosts=2, min_gpus=4)
    assert refused("invalid_request", desk.offer, gpus=6).fields == {"/gpu_count": "a multiple of 4"}
    resale = desk.offer(gpus=12)
    assert refused("invalid_request", desk.quote, desk.buyer(), resale, 2)
    desk.buy(desk.buyer(), resale, 8)
    desk.sound()
    assert resale.listing.min_gpus == 4


def test_only_the_holder_offers_and_only_what_holds_in_force(desk):
    asked = resales.Asked(4, FROM, TO, ASK)
    refused("forbidden", resales.offer, desk.buyer(), desk.contract, asked, now=NOW)
    loose = factories.contract(desk.listing, factories.organization())
    refused("illegal_transition", resales.offer, factories.actor(loose.organization), loose, asked, now=NOW)
    contracts.terminate(desk.holder, desk.contract, now=NOW)
    desk.contract.refresh_from_db()
    refused("illegal_transition", desk.offer)


def test_nothing_is_offered_twice(desk):
    desk.offer(gpus=6)
    error = refused("no_capacity", desk.offer, gpus=4, start=FROM + DAY)
    assert error.extra == {"largest": 2}
    desk.offer(gpus=2, start=FROM + DAY)
    desk.offer(gpus=8, start=TO + HOUR, end=END)
    desk.sound()


def test_what_running_jobs_may_use_then_is_not_offered(desk):
    at = START + DAY
    contracts.clock(at)
    host = desk.hosts[0]
    endless = factories.job(desk.contract, gpus=3, state="running")
    factories.placement(endless, host, [5, 6, 7], running_at=at)
    short = factories.job(desk.contract, gpus=4, state="running", max_seconds=3600)
    factories.placement(short, host, [0, 1, 2, 3], running_at=at)
    error = refused("in_use", desk.offer, gpus=6, at=at)
    assert error.extra == {"largest": 5}
    resale = desk.offer(gpus=5, at=at)
    assert resale.reservation.blocks.get().gpu_indices == [0, 1, 2, 3, 4]
    desk.sound(at)


def test_the_fee_and_the_money_are_shown_before_the_offer(desk, settings):
    settings.RESALE_FEE_PERMILLE = 40
    asked = resales.Asked(4, FROM, TO, ASK)
    told = resales.preview(desk.holder, desk.contract, asked, now=NOW)
    assert (told.gpus, told.chunk, told.fee_permille, told.expires_at) == (8, 1, 40, FROM - LEAD)
    assert (told.buyer_pays_minor, told.credited_minor, told.stays_due_minor) == (
        4 * 48 * 150,
        4 * 48 * 144,
        4 * 48 * 200,
    )
    assert Resale.objects.count() == 0
    assert desk.whole()


# --- buying
def test_a_buyer_gets_a_contract_of_exactly_that(desk):
    resale = desk.offer()
    buyer = desk.buyer()
    quote = desk.quote(buyer, resale)
    assert (quote.starts_at, quote.ends_at, quote.total_minor) == (FROM, TO, 4 * 48 * 150)
    items = quotes.itemise(quote)
    assert (items["upfront_minor"], items["seller_minor"], items["operator_minor"]) == (28_800, 27_360, 0)
    contract = contracts.accept(buyer, quote.pk, now=NOW)
    assert (contract.state, contract.upfront_minor) == ("pending_payment", 28_800)
    assert (contract.listing, contract.operator, contract.gpu_count) == (desk.listing, desk.site.organization, 4)
    assert (contract.starts_at, contract.ends_at, contract.price) == (FROM, TO, ASK)
    assert contract.overage_price == desk.contract.overage_price == 2_500_000
    row = contract.reservation
    assert (row.state, row.claims_at, row.starts_at, row.ends_at) == ("firm", FROM - LEAD, FROM, TO)
    assert (row.within_id, row.listing) == (None, desk.listing)
    assert contracts.confirm_payment(contract.pk, now=NOW)
    resale.refresh_from_db()
    assert (resale.state, resale.sold_gpus, resale.listing.state) == ("sold", 4, "paused")
    fill = Fill.objects.get()
    assert (fill.resale, fill.contract, fill.price, fill.gpu_count, fill.region) == (
        resale,
        contract,
        ASK,
        4,
        desk.site.region,
    )
    assert OutboxMessage.objects.filter(topic=TOLD).count() == 1
    assert "sold on" in desk.contract.events.last().reason
    desk.sound()


def test_the_terms_of_the_original_stay_frozen_in_what_is_resold(desk):
    Listing.objects.filter(pk=desk.listing.pk).update(
        eviction_notice_s=600, interconnect="other", on_demand_price=9_000_000
    )
    contract = desk.buy(desk.buyer(), desk.offer())
    assert contract.eviction_notice_s == 120
    assert (contract.terms["interconnect"], contract.overage_price) == ("", 2_500_000)


def test_an_offer_is_sold_in_parts_to_several(desk):
    resale = desk.offer(gpus=8)
    first, second = desk.buy(desk.buyer(), resale, 5), desk.buy(desk.buyer(), resale, 2)
    resale.refresh_from_db()
    assert (resale.state, resale.left) == ("open", 1)
    a, b = (set(c.reservation.blocks.get().gpu_indices) for c in (first, second))
    assert not a & b
    refused("no_capacity", desk.quote, desk.buyer(), resale, 2)
    desk.sound()


def test_a_hold_keeps_others_away_and_lapses(desk):
    resale = desk.offer()
    quote = desk.quote(desk.buyer(), resale)
    assert quote.reservation.within_id == resale.reservation_id
    late = desk.buyer()
    refused("no_capacity", desk.quote, late, resale, 1)
    desk.sound()
    later = NOW + timedelta(seconds=121)
    assert search.search(late, search.Filters(resale=True, start=FROM, end=TO, count=4), now=later).rows
    desk.buy(late, resale, at=later)
    refused("capacity_gone", contracts.accept, factories.actor(quote.organization), quote.pk, now=later)
    desk.sound(later)


def test_a_resale_is_taken_for_all_of_its_window_and_not_by_its_own_holder(desk):
    resale = desk.offer()
    refused("forbidden", desk.quote, desk.holder, resale)
    shorter = quotes.Request("reserved", 4, starts_at=FROM, ends_at=TO - HOUR)
    error = refused("term_not_offered", quotes.quote, desk.buyer(), resale.listing_id, shorter, now=NOW)
    assert error.extra == {"starts_at": FROM, "ends_at": TO}
    refused("kind_not_offered", desk.quote, desk.buyer(), resale, kind="on_demand")


def test_flexible_stays_flexible():
    desk = Desk(kind="flexible", flexible_hours_per_month=30, emergency_notice_s=90)
    contract = desk.buy(desk.buyer(), desk.offer(), kind="flexible")
    assert (contract.kind, contract.flexible_hours_per_month, contract.price) == ("flexible", 30, ASK)
    assert contract.emergency_notice_s == 90, "what its holder had agreed to"
    desk.sound()


def test_what_was_bought_can_be_sold_on_again_but_not_extended_or_left_early(desk):
    contract = desk.buy(desk.buyer(), desk.offer())
    owner = factories.actor(contract.organization)
    refused("illegal_transition", contracts.terminate, owner, contract, now=NOW)
    refused("illegal_transition", contracts.amendments.extend, owner, contract, TO + DAY, now=NOW)
    refused("illegal_transition", contracts.amendments.resize, desk.holder, desk.contract, 9, now=NOW)
    again = resales.offer(owner, contract, resales.Asked(2, FROM + HOUR, TO, 2 * ASK), now=NOW)
    third = desk.buy(desk.buyer(), again, 2)
    assert third.price == 2 * ASK
    desk.sound()


def test_a_sale_that_is_not_paid_is_undone_and_on_offer_again(desk):
    resale = desk.offer(gpus=6)
    kept = desk.buy(desk.buyer(), resale, 2)
    contract = desk.buy(desk.buyer(), resale, 4, paid=False)
    late = contract.pay_by
    contracts.clock(late)
    contract.refresh_from_db()
    assert contract.state == "cancelled"
    assert contract.reservation.state == "firm"  # nobody else's meanwhile
    assert OutboxMessage.objects.get(topic=UNDO).payload == {"contract": contract.pk}
    assert sales.undo(contract.pk, now=late)
    assert not sales.undo(contract.pk, now=late)
    assert not sales.undo(kept.pk, now=late)
    resale.refresh_from_db()
    assert (resale.state, resale.left, resale.listing.state) == ("open", 4, "published")
    desk.sound(late)
    desk.buy(desk.buyer(), resale, 4, at=late)
    desk.sound(late)


def test_an_undone_sale_of_a_withdrawn_offer_goes_back_to_its_holder(desk):
    resale = desk.offer(gpus=6)
    contract = desk.buy(desk.buyer(), resale, 4, paid=False)
    resales.withdraw(desk.holder, resale, now=NOW)
    desk.sound()
    contracts.terminate(factories.actor(contract.organization), contract, now=NOW)
    assert sales.undo(contract.pk, now=NOW)
    assert desk.whole()
    desk.sound()


# --- the end of an offer
def test_what_is_withdrawn_is_the_holders_again_in_one_piece(desk):
    resale = desk.offer(gpus=6)
    quote = desk.quote(desk.buyer(), resale, 2)
    resales.withdraw(desk.holder, resale, now=NOW)
    assert desk.whole()
    refused("illegal_transition", resales.withdraw, desk.holder, resale, now=NOW)
    refused("forbidden", resales.withdraw, factories.actor(quote.organization), resale, now=NOW)
    refused("listing_unavailable", contracts.accept, factories.actor(quote.organization), quote.pk, now=NOW)
    assert AuditEvent.objects.filter(verb="resale.withdrawn").count() == 1


def test_a_running_job_keeps_its_gpu_when_an_offer_comes_back(desk):
    at = START + DAY
    contracts.clock(at)
    resale = desk.offer(gpus=4, at=at)
    ours = resale.reservation.blocks.get().gpu_indices
    job = factories.job(desk.contract, gpus=1, state="running")
    factories.placement(job, desk.hosts[0], ours[:1], running_at=at)
    resale.reservation.blocks.update(gpu_indices=[i + 8 for i in ours])  # as if renumbered meanwhile
    resales.withdraw(desk.holder, resale, now=at)
    (row,) = desk.contract.reservations.filter(state="firm")
    assert row.blocks.get().gpu_indices == list(range(8))


def test_part_sold_part_withdrawn(desk):
    resale = desk.offer(gpus=6)
    desk.buy(desk.buyer(), resale, 2)
    resales.withdraw(desk.holder, resale, now=NOW)
    resale.refresh_from_db()
    assert (resale.state, resale.sold_gpus, resale.left) == ("withdrawn", 2, 0)
    desk.sound()


def test_an_unsold_offer_expires_before_its_gpus_would_have_to_be_clear(desk):
    resale = desk.offer()
    assert contracts.clock(resale.expires_at - timedelta(seconds=1)).resales_expired == 0
    quote = desk.quote(desk.buyer(), resale, at=resale.expires_at - HOUR / 6)
    buyer = factories.actor(quote.organization)
    refused("listing_unavailable", contracts.accept, buyer, quote.pk, now=resale.expires_at)
    assert contracts.clock(resale.expires_at).resales_expired == 1
    resale.refresh_from_db()
    assert (resale.state, resale.listing.state) == ("expired", "retired")
    assert desk.whole()


def test_an_offer_expires_also_on_a_host_that_has_fewer_gpus_by_then():
    """Its hours are the holder's, room or not; whoever lacks GPUs later is made good then, and the clock goes on."""
    desk = Desk(gpus=4)
    later = desk.sign(desk.buyer(), desk.listing, 4, start=START + 6 * DAY)
    resale = desk.offer()
    for block in later.reservation.blocks.all():
        block.host.gpus.filter(index=block.gpu_indices[0]).update(healthy=False)
    assert contracts.clock(resale.expires_at).resales_expired == 1
    resale.refresh_from_db()
    assert resale.state == "expired"
    assert desk.whole()


def test_a_job_that_ends_before_the_promise_is_in_nobodys_way_when_an_offer_comes_back():
    """A job by use was let onto promised GPUs for the hour that it may last; what comes back is numbered around it."""
    desk = Desk()
    resale = desk.offer()
    guest = factories.contract(desk.listing, factories.organization(), kind="on_demand", gpu_count=1)
    job = factories.job(guest, max_seconds=3600)
    factories.placement(job, desk.hosts[0], [0], state="running", running_at=NOW)
    resales.withdraw(desk.holder, resale, now=NOW)
    assert desk.whole()


def test_the_holder_is_told(desk, mailoutbox):
    factories.member(desk.contract.organization)
    resale = desk.offer()
    desk.buy(desk.buyer(), resale)
    payload = OutboxMessage.objects.get(topic=TOLD).payload
    notices.send(payload)
    notices.send({**payload, "what": "undone"})
    notices.send({**payload, "what": "expired"})
    assert [m.subject.split(resale.public_id)[1] for m in mailoutbox] == [
        " are sold", " were not paid by their buyer", " has expired"
    ]  # fmt: skip
    assert "less the fee of 5 %" in mailoutbox[0].body


# --- the seller's contract ends early
def test_an_early_end_takes_the_offers_back_and_leaves_the_buyers(desk):
    bought = desk.buy(desk.buyer(), desk.offer(start=END - 2 * DAY, end=END))
    still = desk.offer(gpus=2, start=END - 2 * DAY, end=END)
    before = contracts.leaving(desk.contract, NOW)
    assert before.stays_due_minor == 8 * 60 * 200 + 4 * 48 * 200  # a quarter of ten days, and what is sold
    contracts.terminate(desk.holder, desk.contract, now=NOW)
    desk.contract.refresh_from_db()
    still.refresh_from_db()
    assert still.state == "withdrawn"
    assert desk.contract.ends_at == START + 2.5 * DAY
    bought.refresh_from_db()
    assert (bought.state, bought.reservation.state, bought.reservation.ends_at) == ("active", "firm", END)
    assert availability.largest(desk.listing, now=NOW, starts_at=START + 3 * DAY, ends_at=START + 4 * DAY) == 8
    assert availability.largest(desk.listing, now=NOW, starts_at=END - DAY, ends_at=END) == 4
    desk.sound()


def test_a_default_leaves_the_buyers_their_capacity(desk):
    bought = desk.buy(desk.buyer(), desk.offer())
    still = desk.offer(gpus=2)
    contracts.default(desk.contract.organization_id, now=NOW, reason="unpaid")
    still.refresh_from_db()
    bought.refresh_from_db()
    assert (still.state, bought.state, bought.reservation.state) == ("withdrawn", "active", "firm")
    assert availability.largest(desk.listing, now=NOW, starts_at=FROM, ends_at=TO) == 4
    assert not Reservation.objects.filter(resale__isnull=False, state="firm").exists()


def test_the_buyers_limit_counts_and_the_sellers_is_relieved(desk):
    resale = desk.offer()
    small = factories.organization(gpu_limit=3)
    refused("limit_exceeded", desk.quote, factories.actor(small), resale)
    type(small).objects.filter(pk=desk.contract.organization_id).update(gpu_limit=8)
    other = factories.listing(desk.site, hosts=[factories.host(desk.site)])
    again = quotes.quote(desk.holder, other.pk, quotes.Request("reserved", 4, starts_at=FROM, ends_at=TO), now=NOW)
    refused("limit_exceeded", contracts.accept, desk.holder, again.pk, now=NOW)
    desk.buy(desk.buyer(), resale)
    assert contracts.accept(desk.holder, again.pk, now=NOW).gpu_count == 4
