"""Sales of the forward market beside whoever wants the same GPUs at the same moment: exact, nothing sold twice, nothing lost."""

from datetime import timedelta

import pytest

from marketplace.errors import MarketError
from marketplace.models import Contract, Fill, Resale, Reservation
from marketplace.services import contracts, quotes
from marketplace.services.forward import buying, pieces, resales, sales
from tests import factories
from tests.factories import NOW
from tests.marketplace.reselling import DAY, END, START, Desk
from tests.races.test_booking import outcome
from tests.threads import at_once, in_thread

pytestmark = pytest.mark.django_db(transaction=True)
LATER = NOW + timedelta(minutes=10)  # every hold has lapsed, every price is still firm


def quoted(desk, resale, gpus=4):
    """A firm quote whose hold has lapsed."""
    made = desk.quote(desk.buyer(), resale, gpus)
    Reservation.objects.filter(quote=made).update(held_until=NOW)
    return made


def accept(quote, now=LATER):
    return contracts.accept(factories.actor(quote.organization), quote.pk, now=now)


def told(answers):
    return outcome([a.code if isinstance(a, MarketError) else a for a in answers])


@pytest.mark.parametrize("buyers", [2, 16])
def test_one_resale_and_many_buyers(buyers):
    desk = Desk()
    resale = desk.offer()
    made = [quoted(desk, resale) for _ in range(buyers)]
    answers = told(at_once([lambda q=q: accept(q) for q in made]))
    assert answers == {"Contract": 1, "capacity_gone": buyers - 1}
    assert (Fill.objects.count(), Contract.objects.count()) == (1, 2)
    desk.sound(LATER)


def test_a_resale_in_parts_and_more_buyers_than_it_has():
    desk = Desk()
    resale = desk.offer(gpus=6)
    made = [quoted(desk, resale, 1 + n % 2) for n in range(10)]
    answers = told(at_once([lambda q=q: accept(q) for q in made]))
    assert set(answers) <= {"Contract", "capacity_gone"}
    resale.refresh_from_db()
    assert resale.sold_gpus >= 5  # what is left is less than somebody was refused
    desk.sound(LATER)


def test_withdrawn_and_bought_at_once():
    """Either first: the sale stands and the rest comes back, or all of it is the holder's and nobody pays."""
    desk = Desk()
    resale = desk.offer()
    quote = quoted(desk, resale)
    answers = told(at_once([lambda: accept(quote), lambda: resales.withdraw(desk.holder, resale, now=LATER)]))
    assert answers in ({"Contract": 1, "illegal_transition": 1}, {"Resale": 1, "listing_unavailable": 1})
    assert Fill.objects.count() == answers["Contract"]
    assert desk.whole() == (answers["Contract"] == 0)
    desk.sound(LATER)


def test_a_withdrawal_injected_into_a_signature_waits_and_finds_it_sold(monkeypatch):
    desk = Desk()
    resale = desk.offer()
    quote = quoted(desk, resale)
    rival = []
    take = buying.take

    def meanwhile(*args):
        rival.append(in_thread(lambda: resales.withdraw(desk.holder, resale, now=LATER)))
        return take(*args)

    with monkeypatch.context() as patch:
        patch.setattr(buying, "take", meanwhile)
        accept(quote)
    refused = rival[0]()
    assert isinstance(refused, MarketError)
    assert refused.code == "illegal_transition"
    desk.sound(LATER)


def test_a_signature_injected_into_a_withdrawal_waits_and_is_refused(monkeypatch):
    desk = Desk()
    resale = desk.offer()
    quote = quoted(desk, resale)
    rival = []
    back = pieces.give_back

    def meanwhile(*args):
        rival.append(in_thread(lambda: accept(quote)))
        return back(*args)

    with monkeypatch.context() as patch:
        patch.setattr(pieces, "give_back", meanwhile)
        resales.withdraw(desk.holder, resale, now=LATER)
    refused = rival[0]()
    assert isinstance(refused, MarketError)
    assert refused.code == "listing_unavailable"
    assert desk.whole()
    desk.sound(LATER)


def test_the_seller_leaves_while_somebody_buys():
    desk = Desk()
    resale = desk.offer(start=END - 2 * DAY, end=END)
    quote = quoted(desk, resale)
    answers = told(at_once([lambda: accept(quote), lambda: contracts.terminate(desk.holder, desk.contract, now=LATER)]))
    assert answers in ({"Contract": 2}, {"Contract": 1, "listing_unavailable": 1})
    desk.contract.refresh_from_db()
    assert desk.contract.terminated_at == LATER
    bought = Fill.objects.first()
    assert (bought is not None) == (answers["Contract"] == 2)
    if bought is not None:
        assert bought.contract.reservation.ends_at == END > desk.contract.ends_at
    desk.sound(LATER)


def test_the_seller_is_ended_while_somebody_buys():
    desk = Desk()
    resale = desk.offer()
    quote = quoted(desk, resale)
    organization = desk.contract.organization_id
    answers = told(
        at_once([lambda: accept(quote), lambda: contracts.default(organization, now=LATER, reason="unpaid")])
    )
    assert answers in ({"Contract": 1, "list": 1}, {"listing_unavailable": 1, "list": 1})
    resale.refresh_from_db()
    assert (resale.state, resale.sold_gpus) == (("sold", 4) if answers["Contract"] else ("withdrawn", 0))
    desk.sound(LATER)


def test_an_offer_expires_in_the_second_in_which_it_is_bought():
    desk = Desk()
    resale = desk.offer(expires_at=LATER)
    quote = quoted(desk, resale)
    last = LATER - timedelta(seconds=1)
    answers = told(at_once([lambda: accept(quote, last), *[lambda: resales.expire(LATER)] * 3]))
    assert answers in ({"Contract": 1, "int": 3}, {"listing_unavailable": 1, "int": 3})
    resale.refresh_from_db()
    assert resale.state == ("sold" if answers["Contract"] else "expired")
    assert desk.whole() == (resale.state == "expired")
    desk.sound(LATER)


def test_a_payment_that_fails_and_another_buyer_meet():
    desk = Desk()
    resale = desk.offer()
    contract = desk.buy(desk.buyer(), resale, paid=False)
    contracts.clock(contract.pay_by)
    now = contract.pay_by
    answers = at_once(
        [*[lambda: sales.undo(contract.pk, now=now)] * 3, lambda: desk.quote(desk.buyer(), resale, at=now)]
    )
    assert sum(a is True for a in answers) == 1
    resale.refresh_from_db()
    assert (resale.state, resale.left) == ("open", 4)
    desk.sound(now)


def test_two_offers_of_the_same_gpus():
    desk = Desk()
    answers = told(at_once([lambda: desk.offer(gpus=5)] * 4))
    assert answers == {"Resale": 1, "no_capacity": 3}
    desk.sound()


def test_an_offer_and_work_of_the_operators_other_buyers():
    """The rest of the listing is sold while part of a contract is offered and taken back: never the same GPU."""
    desk = Desk(hosts=2, gpus=8)
    resale = desk.offer(gpus=8)
    wanted = quotes.Request("reserved", 4, starts_at=START, ends_at=END)
    buyers = [desk.buyer() for _ in range(4)]
    calls = [lambda b=b: quotes.quote(b, desk.listing.pk, wanted, now=NOW) for b in buyers]
    answers = told(at_once([*calls, lambda: resales.withdraw(desk.holder, resale, now=NOW)]))
    assert answers == {"Quote": 2, "no_capacity": 2, "Resale": 1}
    assert Resale.objects.get().state == "withdrawn"
    assert desk.whole()
