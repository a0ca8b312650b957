"""Contracts: accepted once, on frozen terms, with what is due at signing."""

from datetime import timedelta

import pytest

from billing.models import BillingAccount
from marketplace import outbox
from marketplace.models import AuditEvent, BillingStanding, Contract, OutboxMessage, Quote, Reservation
from marketplace.services import availability, contracts, jobs, quotes
from tests import factories
from tests.factories import NOW
from tests.marketplace.trade import DAY, END, HOUR, START, accept, ask, history, rate, refused, topics, upfront

pytestmark = pytest.mark.django_db


def test_a_reserved_contract_is_active_at_once_with_its_capacity_firm(listing, customer):
    quote = ask(customer, listing)
    contract = accept(customer, quote, NOW + timedelta(seconds=60))
    held = contract.reservation
    assert (contract.state, contract.gpu_count, contract.starts_at, contract.ends_at) == ("active", 8, START, END)
    assert (held.state, held.held_until, held.quote) == ("firm", None, quote)
    assert START - held.claims_at == timedelta(seconds=240)
    assert held.blocks.get().gpu_indices == list(range(8))
    assert (contract.price, contract.overage_price, contract.fee_permille) == (2_000_000, 2_500_000, 150)
    assert contract.terms["total_minor"] == quote.total_minor == 8 * 168 * 200
    assert contract.terms["early_termination"]["part"] == "1/4"
    assert (contract.operator, contract.cell, contract.site) == (listing.organization, listing.site.cell, listing.site)
    quote.refresh_from_db()
    assert quote.state == "accepted"
    assert history(contract) == [("", "active")]
    assert topics() == [(contracts.ACCEPTED, contract.pk), (contracts.NOTICE, contract.pk)]
    assert AuditEvent.objects.get(verb="contract.accepted").subject == contract.public_id
    assert contracts.clock(NOW + DAY) == contracts.Ticked()
    assert availability.largest(listing, now=NOW + DAY, starts_at=START, ends_at=END) == 0


def test_what_was_promised_after_the_commit_is_handled(listing, customer):
    """Every message that a contract's life writes has a handler, and each may come twice."""
    import billing.tasks  # noqa: F401  the handlers
    import marketplace.tasks  # noqa: F401

    contract = accept(customer, rate(customer, listing))
    factories.job(contract, state="queued")
    contracts.terminate(factories.actor(customer), contract, now=NOW + HOUR)
    mine = {contracts.ACCEPTED, contracts.END_JOBS}
    assert {topic for topic, _ in topics()} >= mine
    for _ in range(2):
        assert [outbox.drain(topic=topic) for topic in sorted(mine)] == [1, 1]
        assert not OutboxMessage.objects.filter(topic__in=mine).exists()
        for topic in mine:
            outbox.emit(topic, payload={"contract": contract.pk})
    assert contracts.clock(NOW + 2 * HOUR).contracts_settled == 1
    assert BillingAccount.objects.filter(organization=customer).count() == 1


def test_a_rate_is_a_ceiling_without_a_hold(listing, customer):
    contract = accept(customer, rate(customer, listing), NOW + timedelta(minutes=10))
    assert (contract.state, contract.ends_at, contract.starts_at) == ("active", None, NOW + timedelta(minutes=10))
    assert not Reservation.objects.exists()
    spot = accept(customer, rate(customer, listing, "spot", limit_price=1_200_000))
    assert (spot.price, spot.limit_price) == (900_000, 1_200_000)
    assert jobs.submit(factories.actor(customer), contract, {"command": ["x"]}, now=NOW + HOUR).state == "queued"


@pytest.mark.parametrize(
    ("state", "code"),
    [
        (None, "card_required"),
        ("no_card", "card_required"),
        ("past_due", "billing_suspended"),
        ("suspended", "billing_suspended"),
    ],
)
def test_only_a_good_standing_signs(listing, customer, state, code):
    quote = ask(customer, listing)
    if state is None:
        BillingStanding.objects.filter(organization=customer).delete()
    else:
        BillingStanding.objects.filter(organization=customer).update(state=state)
    assert refused(code, accept, customer, quote).kind.status == 402
    assert not Contract.objects.exists()
    assert Reservation.objects.get().state == "held"  # add the card and accept again
    BillingStanding.objects.update_or_create(organization=customer, defaults={"state": "good", "updated_at": NOW})
    assert accept(customer, quote).state == "active"


def test_a_quote_is_accepted_once(listing, customer):
    quote = ask(customer, listing)
    contract = accept(customer, quote)
    assert refused("illegal_transition", accept, customer, quote).extra["contract"] == contract.public_id
    assert Contract.objects.count() == 1


def test_a_lapsed_hold_is_looked_for_again_while_the_price_is_firm(listing, customer):
    quote = ask(customer, listing)
    later = NOW + timedelta(minutes=5)
    assert contracts.clock(later).holds_released == 1
    listing.reserved_price = 9_000_000
    listing.save()
    contract = accept(customer, quote, later)
    assert contract.price == 2_000_000
    assert contract.reservation.state == "firm"
    assert contract.reservation.blocks.get().gpu_indices == list(range(8))


def test_a_lapsed_hold_that_somebody_took_is_gone_with_alternatives(listing, customer):
    quote = ask(customer, listing)
    later = NOW + timedelta(minutes=5)
    rival = factories.organization()
    accept(rival, ask(rival, listing, now=later), later)
    error = refused("capacity_gone", accept, customer, quote, later)
    assert error.extra["reason"] == "no_capacity_in_window"
    assert error.extra["alternatives"]["later"]["starts_at"] == END + timedelta(seconds=240)
    assert Contract.objects.count() == 1
    assert Quote.objects.get(pk=quote.pk).state == "open"


def test_a_held_host_that_died_is_replaced(customer):
    site = factories.site()
    first, second = factories.host(site), factories.host(site)
    listing = factories.listing(site, hosts=[first, second])
    quote = ask(customer, listing)
    held = quote.reservation.blocks.get().host
    held.state = "lost"
    held.save()
    contract = accept(customer, quote)
    assert {contract.reservation.blocks.get().host, held} == {first, second}


def test_a_held_gpu_that_broke_is_replaced(listing, customer):
    quote = ask(customer, listing, gpus=4)
    listing.hosts.get().gpus.filter(index=2).update(healthy=False)
    assert accept(customer, quote).reservation.blocks.get().gpu_indices == [0, 1, 3, 4]


def test_a_firm_quote_outlives_an_edit_of_the_minimum(listing, customer):
    quote = ask(customer, listing, gpus=6)
    type(listing).objects.filter(pk=listing.pk).update(min_gpus=4, state="paused")
    contract = accept(customer, quote, NOW + timedelta(minutes=5))
    assert contract.reservation.blocks.get().gpu_indices == [0, 1, 2, 3, 4, 5]


def test_on_demand_work_that_came_onto_held_gpus_is_not_promised_away(customer):
    """A hold of two minutes does not keep the scheduler out; the signature looks again, and moves or refuses."""
    site = factories.site()
    host = factories.host(site)
    listing = factories.listing(site, hosts=[host])
    moved, refused_ = ask(customer, listing, gpus=2), ask(customer, listing, gpus=4)
    job = factories.job(factories.contract(listing), gpus=4, state="running")
    factories.placement(job, host, [0, 1, 2, 3], state="running")
    error = refused("capacity_gone", accept, customer, refused_)
    assert error.extra["alternatives"]["gpu_count"]["site"] == 2
    quotes.release(factories.actor(customer), refused_.pk, now=NOW)
    assert accept(customer, moved).reservation.blocks.get().gpu_indices == [4, 5]


def test_a_price_is_firm_for_fifteen_minutes_and_no_longer(listing, customer):
    quote = rate(customer, listing)
    last = NOW + timedelta(seconds=899)
    error = refused("quote_expired", accept, customer, quote, last + timedelta(seconds=1))
    assert error.extra["quote_again"]["body"] == {
        "listing": listing.public_id, "kind": "on_demand", "gpu_count": 8, "level": "site"
    }  # fmt: skip
    assert contracts.clock(last).quotes_expired == 0
    assert accept(customer, quote, last).state == "active"
    reserved = ask(customer, listing)
    assert contracts.clock(NOW + timedelta(seconds=900)).quotes_expired == 1
    refused("quote_expired", accept, customer, reserved, NOW + timedelta(seconds=900))
    assert not Reservation.objects.get().blocks.exists()


def test_who_starts_at_once_pays_from_the_signature_on(listing, customer):
    quote = ask(customer, listing, start=None, end=NOW + 10 * HOUR)
    contract = accept(customer, quote, NOW + timedelta(seconds=100))
    assert contract.starts_at == contract.reservation.starts_at == NOW + timedelta(seconds=100)
    assert contract.terms["total_minor"] == round(8 * (36_000 - 100) / 3600 * 200)


@pytest.mark.parametrize(("gpus", "waits"), [(4, False), (8, True)])
def test_nobody_pays_for_gpus_that_spot_is_still_leaving(listing, customer, gpus, waits):
    job = factories.job(factories.contract(listing, kind="spot"), gpus=4, state="running")
    factories.placement(job, listing.hosts.get(), [4, 5, 6, 7], state="running")
    contract = accept(customer, ask(customer, listing, gpus=gpus, start=None, end=NOW + 10 * HOUR))
    assert contract.starts_at == contract.reservation.starts_at == NOW + timedelta(seconds=240 if waits else 0)
    assert contract.reservation.claims_at == NOW
    assert contract.ends_at == NOW + 10 * HOUR


def test_a_claim_takes_idle_gpus_first_then_those_of_the_lowest_bid(listing, customer):
    host = listing.hosts.get()
    for limit, indices in ((900_000, [0, 1]), (700_000, [2, 3])):
        spot = factories.contract(listing, kind="spot", limit_price=limit)
        factories.placement(factories.job(spot, gpus=2, state="running"), host, indices, state="running")
    taken = [
        accept(customer, ask(customer, listing, gpus=n, start=None, end=NOW + 10 * HOUR)).reservation.blocks.get()
        for n in (4, 2)
    ]
    assert [block.gpu_indices for block in taken] == [[4, 5, 6, 7], [2, 3]]


def test_the_organizations_limit_counts_what_is_held_at_the_worst_instant(customer):
    site = factories.site()
    listing = factories.listing(site, hosts=[factories.host(site) for _ in range(4)])
    customer.gpu_limit = 16
    customer.save()
    accept(customer, ask(customer, listing, gpus=8, start=START, end=START + 2 * DAY))
    accept(customer, ask(customer, listing, gpus=8, start=START + 2 * DAY, end=START + 4 * DAY))
    accept(customer, ask(customer, listing, gpus=8, start=START + DAY, end=START + 3 * DAY))  # 16 at every instant
    error = refused("limit_exceeded", accept, customer, ask(customer, listing, gpus=8, start=START, end=END))
    assert error.extra == {"limit": "gpus", "allowed": 16, "held": 16}
    accept(customer, rate(customer, listing, gpus=16))


# --- what is due at signing
def test_what_is_due_at_signing_is_waited_for(listing, customer):
    upfront(listing)
    contract = accept(customer, ask(customer, listing))
    due = 8 * 168 * 200 // 4
    assert (contract.state, contract.upfront_minor, contract.pay_by) == ("pending_payment", due, NOW + HOUR)
    assert contract.terms["upfront_minor"] == due
    assert contracts.actions(contract, factories.actor(customer)) == ["terminate"]
    assert contracts.leaving(contract, NOW) == contracts.Leaving(NOW, 0, 0)
    assert f"{due / 100:.2f} USD" in contracts.sentence(contract, NOW)
    refused("no_capacity", ask, factories.organization(), listing)
    assert [contracts.confirm_payment(contract.pk, now=NOW + HOUR / 2) for _ in range(2)] == [True, False]
    assert history(contract) == [("", "pending_payment"), ("pending_payment", "active")]
    assert AuditEvent.objects.get(verb="contract.activated").organization == customer
    assert (contracts.NOTICE, contract.pk) in topics()
    contract.refresh_from_db()
    assert (contract.state, contract.starts_at, contract.pay_by) == ("active", START, None)
    assert accept(customer, rate(customer, listing)).state == "active"  # nothing is due for a rate


def test_who_waited_for_the_payment_does_not_pay_for_the_wait(listing, customer):
    upfront(listing)
    contract = accept(customer, ask(customer, listing, start=None, end=NOW + 10 * HOUR))
    contracts.confirm_payment(contract.pk, now=NOW + timedelta(minutes=7, seconds=3))
    contract.refresh_from_db()
    assert contract.starts_at == contract.reservation.starts_at == NOW + timedelta(minutes=7, seconds=3)
    assert contract.reservation.claims_at == NOW


def test_a_payment_after_the_window_cancels(listing, customer):
    upfront(listing)
    contract = accept(customer, ask(customer, listing, start=None, end=NOW + HOUR))
    Contract.objects.filter(pk=contract.pk).update(pay_by=NOW + 2 * HOUR)
    assert not contracts.confirm_payment(contract.pk, now=NOW + HOUR)
    contract.refresh_from_db()
    assert (contract.state, contract.reservation.state) == ("cancelled", "released")


def test_a_payment_that_does_not_come_frees_the_capacity(listing, customer):
    upfront(listing)
    contract = accept(customer, ask(customer, listing))
    assert contracts.clock(NOW + HOUR - timedelta(seconds=1)).payments_lapsed == 0
    assert contracts.clock(NOW + HOUR).payments_lapsed == 1
    contract.refresh_from_db()
    assert (contract.state, contract.reservation.state) == ("cancelled", "released")
    assert {(contracts.CANCELLED, contract.pk), (contracts.NOTICE, contract.pk)} <= set(topics())
    assert AuditEvent.objects.filter(verb="contract.cancelled", organization=customer).count() == 1
    ask(factories.organization(), listing, now=NOW + HOUR)
    assert not contracts.confirm_payment(contract.pk, now=NOW + HOUR)


def test_too_little_to_be_charged_is_not_asked_for_at_signing(listing, customer):
    upfront(listing, 1)
    assert accept(customer, ask(customer, listing, gpus=1, end=START + 10 * HOUR)).upfront_minor == 0
    assert accept(customer, ask(customer, listing, gpus=1)).upfront_minor == 0  # 33.6 of 33,600 cents
    assert accept(customer, ask(customer, listing, gpus=2, end=START + 200 * HOUR)).state == "pending_payment"
