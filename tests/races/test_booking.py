"""Buyers of the last host, at the same moment, on real connections: one wins, the others get a clear conflict, none pays."""

from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from marketplace.models import Contract, OutboxMessage, Quote, Reservation, ReservationBlock
from marketplace.services import availability, contracts, quotes
from scheduler.core import capacity
from tests import factories
from tests.factories import NOW
from tests.threads import at_once

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


@pytest.mark.parametrize("buyers", [2, 16, pytest.param(64, marks=pytest.mark.full)])
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
