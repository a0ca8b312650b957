"""Buyers of the last host, at the same moment, on real connections: one wins, the others get a clear conflict, none pays."""

import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from marketplace.models import Contract, OutboxMessage, Quote, Reservation, ReservationBlock
from marketplace.services import availability, contracts, documents, quotes
from scheduler.core import capacity
from tests import factories
from tests.factories import NOW
from tests.threads import at_once, in_thread

pytestmark = pytest.mark.django_db(transaction=True)
START, END = NOW + timedelta(days=2), NOW + timedelta(days=3)
LATER = NOW + timedelta(minutes=10)  # every hold has lapsed, every price is still firm


def world(buyers: int, gpus: int = 8):
    site = factories.site()
    listing = factories.listing(site, hosts=[factories.host(site, gpus=gpus)])
    return listing, [factories.actor(factories.organization()) for _ in range(buyers)]


def wanted(gpus: int = 8) -> quotes.Request:
    return quotes.Request("reserved", gpus, starts_at=START, ends_at=END)


def outcome(answers: list[Any]) -> Counter:
    return Counter(a if isinstance(a, str) else type(a).__name__ for a in answers)


def sound(listing) -> None:
    """No instant of any host is oversold, and no device is promised twice."""
    assert capacity.violations(availability.load([listing], LATER).pool) == ()
    firm = [
        (b.reservation, i)
        for b in ReservationBlock.objects.filter(reservation__state="firm").select_related("reservation")
        for i in b.gpu_indices
    ]
    for n, (a, i) in enumerate(firm):
        for b, j in firm[n + 1 :]:
            assert i != j or a.ends_at <= b.claims_at or b.ends_at <= a.claims_at


@pytest.mark.parametrize("buyers", [2, 16])
def test_the_last_host_is_held_for_one_of_many_quotes(buyers):
    listing, actors = world(buyers)
    answers = at_once([lambda a=a: quotes.quote(a, listing.pk, wanted(), now=NOW) for a in actors])
    assert outcome(answers) == {"Quote": 1, "no_capacity": buyers - 1}
    assert (Quote.objects.count(), Reservation.objects.count(), ReservationBlock.objects.count()) == (1, 1, 1)


@pytest.mark.parametrize("buyers", [2, 64])
def test_the_last_host_is_sold_to_one_of_many_firm_quotes(buyers):
    listing, actors = world(buyers)
    made = []
    for actor in actors:  # each is quoted when the hold of the one before has lapsed
        made.append(quotes.quote(actor, listing.pk, wanted(), now=NOW))
        Reservation.objects.filter(state="held").update(held_until=NOW)
    answers = at_once(
        [lambda a=a, q=q: contracts.accept(a, q.pk, now=LATER) for a, q in zip(actors, made, strict=True)]
    )
    assert outcome(answers) == {"Contract": 1, "capacity_gone": buyers - 1}
    assert Contract.objects.count() == 1
    assert OutboxMessage.objects.filter(topic=contracts.ACCEPTED).count() == 1  # nobody else is charged
    assert Reservation.objects.filter(state="firm").count() == 1
    sound(listing)


def test_half_of_sixteen_buyers_share_a_host():
    listing, actors = world(16)
    answers = at_once([lambda a=a: quotes.quote(a, listing.pk, wanted(1), now=NOW) for a in actors])
    assert outcome(answers) == {"Quote": 8, "no_capacity": 8}
    answers = at_once(
        [
            lambda a=a, q=q: contracts.accept(a, q.pk, now=NOW)
            for a, q in zip(actors, answers, strict=True)
            if isinstance(q, Quote)
        ]
    )
    assert outcome(answers) == {"Contract": 8}
    sound(listing)


def test_one_quote_accepted_many_times_at_once_is_one_contract():
    listing, (actor,) = world(1)
    quote = quotes.quote(actor, listing.pk, wanted(), now=NOW)
    answers = at_once([lambda: contracts.accept(actor, quote.pk, now=NOW)] * 8)
    assert outcome(answers) == {"Contract": 1, "illegal_transition": 7}


def test_an_organization_gets_three_holds_also_when_it_asks_for_eight_at_once():
    listing, (actor,) = world(1)
    answers = at_once([lambda: quotes.quote(actor, listing.pk, wanted(1), now=NOW)] * 8)
    assert outcome(answers) == {"Quote": 3, "too_many_holds": 5}


def test_the_clock_and_a_buyer_meet_at_the_last_second_of_a_hold():
    """Released or accepted, whoever comes first: never both a firm contract and a released reservation."""
    listing, actors = world(6, gpus=6)
    made = [quotes.quote(a, listing.pk, wanted(1), now=NOW) for a in actors]
    edge = NOW + timedelta(seconds=120)
    calls: list[Callable[[], Any]] = [
        lambda a=a, q=q: contracts.accept(a, q.pk, now=edge) for a, q in zip(actors, made, strict=True)
    ]
    answers = at_once([*calls, *[lambda: contracts.clock(edge)] * 4])
    assert outcome(answers) == {"Contract": 6, "Ticked": 4}
    assert Reservation.objects.filter(state="firm", contract__isnull=False).count() == 6
    assert Reservation.objects.filter(state="firm", blocks=None).count() == 0
    sound(listing)


def rival_during_accept(monkeypatch, act):
    """While a quote is being accepted, its row checked and locked, a rival acts; the joins of what it began."""
    begun: list[Callable[[], Any]] = []
    require = documents.require_terms

    def slowly(organization_id):
        if not begun:
            begun.append(in_thread(act))
            time.sleep(0.3)
        return require(organization_id)

    monkeypatch.setattr(documents, "require_terms", slowly)
    return begun


def test_the_clock_that_strikes_while_a_quote_is_accepted_comes_too_late(monkeypatch):
    """Accepted in its last second; the clock of another machine is a second ahead and expires quotes meanwhile."""
    listing, (actor,) = world(1)
    quote = quotes.quote(actor, listing.pk, wanted(), now=NOW)
    edge = quote.firm_until
    begun = rival_during_accept(monkeypatch, lambda: contracts.clock(edge))
    contract = contracts.accept(actor, quote.pk, now=edge - timedelta(seconds=1))
    begun[0]()
    quote.refresh_from_db()
    assert (quote.state, contract.reservation.state) == ("accepted", "firm")
    assert ReservationBlock.objects.filter(reservation__state="firm").exists()
    sound(listing)


def test_at_the_very_second_of_its_expiry_a_quote_is_expired_whoever_comes_first():
    listing, (actor,) = world(1)
    quote = quotes.quote(actor, listing.pk, wanted(), now=NOW)
    edge = quote.firm_until
    answers = at_once([lambda: contracts.accept(actor, quote.pk, now=edge), lambda: contracts.clock(edge)])
    assert outcome(answers) == {"quote_expired": 1, "Ticked": 1}
    assert not Contract.objects.exists()


def test_a_hold_that_lapses_while_its_quote_is_accepted_is_looked_for_again_or_gone(monkeypatch):
    """Between the check of the quote and the taking of its hold the clock releases it; nobody else can have come in between."""
    listing, (actor, other) = world(2)
    quote = quotes.quote(actor, listing.pk, wanted(), now=NOW)
    lapse = quote.held_until
    begun = rival_during_accept(
        monkeypatch, lambda: (contracts.clock(lapse), quotes.quote(other, listing.pk, wanted(), now=lapse))
    )
    contract = contracts.accept(actor, quote.pk, now=lapse - timedelta(seconds=1))
    lost = begun[0]()
    assert contract.reservation.state == "firm"
    assert getattr(lost, "code", "") == "no_capacity"
    sound(listing)


def test_who_gives_a_quote_back_while_it_is_accepted_is_refused(monkeypatch):
    listing, (actor,) = world(1)
    quote = quotes.quote(actor, listing.pk, wanted(), now=NOW)
    begun = rival_during_accept(monkeypatch, lambda: quotes.release(actor, quote.pk, now=NOW))
    contracts.accept(actor, quote.pk, now=NOW)
    assert begun[0]().code == "illegal_transition"
    assert Reservation.objects.get().state == "firm"
