"""Changes of contracts beside others who want the same GPUs, at the same moment: one wins, nothing is sold twice or half."""

from datetime import timedelta

import pytest
from django.db import transaction

from marketplace.errors import MarketError
from marketplace.models import Amendment, Contract, Quote, Reservation
from marketplace.services import contracts, documents, quotes
from tests import factories
from tests.factories import NOW
from tests.races.test_booking import END, LATER, START, outcome, sound, wanted, world
from tests.threads import at_once, in_thread

pytestmark = pytest.mark.django_db(transaction=True)
BEYOND = END + timedelta(days=1)


def signed(actor, listing, gpus=8):
    return contracts.accept(actor, quotes.quote(actor, listing.pk, wanted(gpus), now=NOW).pk, now=NOW)


def after_it(actor, listing, gpus=8):
    """A firm quote for the day after END whose hold has lapsed."""
    asked = quotes.Request("reserved", gpus, starts_at=END + timedelta(minutes=4), ends_at=BEYOND)
    made = quotes.quote(actor, listing.pk, asked, now=NOW)
    Reservation.objects.filter(quote=made).update(held_until=NOW)
    return made


def agree(actor, row):
    return contracts.accept_amendment(actor, row, now=LATER)


@pytest.mark.parametrize("rivals", [1, 15])
def test_a_longer_contract_and_buyers_of_the_same_gpus(rivals):
    listing, (holder, *buyers) = world(1 + rivals)
    contract = signed(holder, listing)
    row = contracts.amendments.extend(holder, contract, BEYOND, now=NOW)
    made = [after_it(buyer, listing) for buyer in buyers]
    calls = [lambda b=b, q=q: contracts.accept(b, q.pk, now=LATER) for b, q in zip(buyers, made, strict=True)]
    answers = outcome(at_once([lambda: agree(holder, row), *calls]))
    assert answers["Amendment"] + answers["Contract"] == 1
    assert answers["capacity_gone"] == rivals
    contract.refresh_from_db()
    assert (contract.ends_at == BEYOND) == (answers["Amendment"] == 1)
    assert contract.reservation.ends_at == contract.ends_at
    sound(listing)


def test_a_buyer_who_comes_while_a_contract_is_being_extended_waits_and_is_refused(monkeypatch):
    """The rival is injected between the look and the write: under the cell's lock there is no such gap."""
    listing, (holder, buyer) = world(2)
    contract = signed(holder, listing)
    row = contracts.amendments.extend(holder, contract, BEYOND, now=NOW)
    quote = after_it(buyer, listing)
    rival = []
    keep = documents.keep_amendment

    def meanwhile(*args, **kwargs):
        rival.append(in_thread(lambda: contracts.accept(buyer, quote.pk, now=LATER)))
        return keep(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(documents, "keep_amendment", meanwhile)
        agree(holder, row)
    refused = rival[0]()
    assert isinstance(refused, MarketError)
    assert refused.code == "capacity_gone"
    sound(listing)


def test_an_extension_that_breaks_off_leaves_nothing(monkeypatch):
    listing, (holder,) = world(1)
    contract = signed(holder, listing)
    row = contracts.amendments.extend(holder, contract, BEYOND, now=NOW)

    def broken(*_args, **_kwargs):
        raise RuntimeError("killed before the commit")

    with monkeypatch.context() as patch:
        patch.setattr(documents, "keep_amendment", broken)
        with pytest.raises(RuntimeError, match="killed"), transaction.atomic():
            agree(holder, row)
    contract.refresh_from_db()
    row.refresh_from_db()
    assert (contract.ends_at, contract.reservation.ends_at, row.state) == (END, END, "open")


def test_more_gpus_and_an_early_end_at_once():
    """Both may go through, in that order; an end first makes the proposal stale. Never GPUs beyond the contract's end."""
    listing, (holder,) = world(1)
    asked = quotes.Request("reserved", 4, starts_at=START, ends_at=START + timedelta(days=8))
    contract = contracts.accept(holder, quotes.quote(holder, listing.pk, asked, now=NOW).pk, now=NOW)
    row = contracts.amendments.resize(holder, contract, 8, now=NOW)
    answers = at_once([lambda: agree(holder, row), lambda: contracts.terminate(holder, contract, now=LATER)])
    assert outcome(answers) in ({"Amendment": 1, "Contract": 1}, {"conflict": 1, "Contract": 1})
    contract.refresh_from_db()
    held = sum(len(block.gpu_indices) for block in contract.reservation.blocks.all())
    assert contract.reservation.ends_at == contract.ends_at == START + timedelta(days=2)
    assert held == contract.gpu_count == (8 if outcome(answers)["Amendment"] else 4)
    sound(listing)


def test_more_gpus_and_a_buyer_of_the_same():
    listing, (holder, buyer) = world(2)
    contract = signed(holder, listing, 4)
    row = contracts.amendments.resize(holder, contract, 8, now=NOW)
    quote = quotes.quote(buyer, listing.pk, wanted(4), now=NOW)
    Reservation.objects.filter(quote=quote).update(held_until=NOW)
    answers = outcome(at_once([lambda: agree(holder, row), lambda: contracts.accept(buyer, quote.pk, now=LATER)]))
    assert answers["capacity_gone"] == 1
    assert answers["Amendment"] + answers["Contract"] == 1
    sound(listing)


def test_one_proposal_accepted_many_times_at_once_counts_once():
    listing, (holder,) = world(1)
    contract = signed(holder, listing, 4)
    row = contracts.amendments.resize(holder, contract, 6, now=NOW)
    assert outcome(at_once([lambda: agree(holder, row)] * 8)) == {"Amendment": 1, "illegal_transition": 7}
    contract.refresh_from_db()
    assert (contract.gpu_count, contract.documents.count()) == (6, 2)


def test_a_quote_accepted_in_the_second_in_which_it_expires():
    """The clock and its buyers meet at the edge of the firm price: a contract or an expired quote, never both."""
    listing, actors = world(6, gpus=6)
    made = [quotes.quote(a, listing.pk, wanted(1), now=NOW) for a in actors]
    edge = made[0].firm_until
    last = edge - timedelta(seconds=1)
    calls = [lambda a=a, q=q: contracts.accept(a, q.pk, now=last) for a, q in zip(actors, made, strict=True)]
    answers = outcome(at_once([*calls, *[lambda: contracts.clock(edge)] * 3]))
    assert answers["Contract"] + answers["quote_expired"] == 6
    for quote in Quote.objects.all():
        signed_ = Contract.objects.filter(quote=quote).exists()
        assert quote.state == ("accepted" if signed_ else "expired")
    assert Contract.objects.count() == answers["Contract"]
    sound(listing)


def test_a_payment_and_the_end_of_its_hour_meet():
    """Active or cancelled: never a cancelled contract that holds GPUs, nor an active one without."""
    listing, (actor,) = world(1)
    type(listing).objects.update(upfront_permille=500)
    contract = signed(actor, listing)
    edge = contract.pay_by
    at_once([lambda: contracts.confirm_payment(contract.pk, now=edge), *[lambda: contracts.clock(edge)] * 3])
    contract.refresh_from_db()
    assert (contract.state, contract.reservation.state) in {("active", "firm"), ("cancelled", "released")}
    assert contract.events.count() == 2


def test_consent_and_the_last_second_of_its_day_meet():
    listing, (actor,) = world(1)
    rate = quotes.quote(actor, listing.pk, quotes.Request("on_demand", 8), now=NOW)
    contract = contracts.accept(actor, rate.pk, now=NOW)
    day = NOW + timedelta(days=30)
    operator = factories.actor(listing.organization)
    row = contracts.prices.propose(operator, contract, 3_000_000, day, now=NOW)
    last = day - timedelta(seconds=1)
    at_once([lambda: contracts.accept_amendment(actor, row, now=last), *[lambda: contracts.clock(day)] * 3])
    contracts.clock(day)
    contract.refresh_from_db()
    state = Amendment.objects.get().state
    assert (state, contract.state, contract.price) in {
        ("accepted", "active", 3_000_000), ("expired", "terminated", 2_500_000)
    }  # fmt: skip
