"""A later end, more GPUs, another price: proposed, looked at, accepted or not; and the papers that stay."""

from datetime import timedelta

import pytest
from django.db import IntegrityError, connection, transaction

from marketplace.models import AuditEvent, Contract, ContractDocument, OutboxMessage, ReservationBlock, TermsAcceptance
from marketplace.services import availability, contracts, documents, holds, jobs
from scheduler.core import capacity
from tests import factories
from tests.factories import NOW
from tests.marketplace.trade import DAY, END, HOUR, START, accept, ask, rate, refused

pytestmark = pytest.mark.django_db
LATER = END + 3 * DAY


def extend(contract, to, now=NOW):
    return contracts.amendments.extend(factories.actor(contract.organization), contract, to, now=now)


def resize(contract, gpus, now=NOW):
    return contracts.amendments.resize(factories.actor(contract.organization), contract, gpus, now=now)


def agree(row, now=NOW):
    return contracts.accept_amendment(factories.actor(row.contract.organization), row, now=now)


def held(contract):
    return {block.host_id: block.gpu_indices for block in contract.reservation.blocks.all()}


def sound(listing):
    assert capacity.violations(availability.load([listing], NOW).pool) == ()


# --- a later end
def test_an_extension_keeps_gpus_price_and_terms(listing, customer):
    contract = accept(customer, ask(customer, listing, gpus=4))
    type(listing).objects.filter(pk=listing.pk).update(reserved_price=9_000_000)
    before = held(contract)
    row = extend(contract, LATER)
    assert (row.state, row.price, row.total_minor) == ("open", 2_000_000, 4 * 3 * 24 * 200)
    contract.refresh_from_db()
    assert contract.ends_at == END  # looking changes nothing
    row = agree(row, NOW + timedelta(minutes=14))
    contract.refresh_from_db()
    assert (row.state, row.effective_at) == ("accepted", END)
    assert (contract.ends_at, contract.reservation.ends_at, contract.price) == (LATER, LATER, 2_000_000)
    assert held(contract) == before
    assert contract.events.last().reason == f"extended to {LATER:%F %R}Z"
    assert AuditEvent.objects.get(verb="contract.extend").after["ends_at"] == LATER.isoformat()
    assert availability.largest(listing, now=NOW, starts_at=END, ends_at=LATER) == 4
    assert refused("illegal_transition", agree, row)
    contracts.clock(END)
    contract.refresh_from_db()
    assert contract.state == "active"
    contracts.clock(LATER)
    contract.refresh_from_db()
    assert contract.state == "ended"


def test_gpus_that_are_promised_on_are_named_with_what_would_fit(listing, customer):
    contract = accept(customer, ask(customer, listing, gpus=8))
    rival = factories.organization()
    accept(rival, ask(rival, listing, gpus=4, start=END + DAY, end=LATER))
    error = refused("no_capacity", extend, contract, LATER)
    until = END + DAY - timedelta(seconds=240)  # the rival's GPUs must be clear by then
    assert error.extra["alternatives"]["ends_at"] == until
    assert error.extra["alternatives"]["quote"] is None
    agree(extend(contract, until))
    sound(listing)


def test_others_that_come_later_make_room_by_taking_other_gpus(listing, customer):
    """Devices of claims to come are only numbers: the running contract keeps its own."""
    contract = accept(customer, ask(customer, listing, gpus=4, start=None, end=NOW + 5 * DAY))
    rival = factories.organization()
    theirs = accept(rival, ask(rival, listing, gpus=4, start=NOW + 6 * DAY, end=NOW + 9 * DAY))
    assert held(contract) == held(theirs)
    mine = held(contract)
    agree(extend(contract, NOW + 8 * DAY, NOW + DAY), NOW + DAY)
    assert held(contract) == mine
    (indices,) = held(theirs).values()
    assert set(indices).isdisjoint(next(iter(mine.values())))
    sound(listing)


def test_before_its_start_a_contract_may_move_to_stay_longer(customer):
    site = factories.site()
    hosts = [factories.host(site), factories.host(site)]
    listing = factories.listing(site, hosts=hosts)
    contract = accept(customer, ask(customer, listing))
    rival = factories.organization()
    theirs = accept(rival, ask(rival, listing, start=END + DAY, end=LATER))
    if set(held(theirs)) != set(held(contract)):  # put the rival behind it, on the same host
        theirs.reservation.blocks.update(host_id=next(iter(held(contract))))
    agree(extend(contract, LATER))
    assert set(held(contract)).isdisjoint(held(theirs))
    sound(listing)


def test_a_running_contract_that_would_have_to_move_is_offered_another_quote(customer):
    site = factories.site()
    listing = factories.listing(site, hosts=[factories.host(site), factories.host(site)])
    contract = accept(customer, ask(customer, listing, start=None, end=NOW + 2 * DAY))
    rival = factories.organization()
    theirs = accept(rival, ask(rival, listing, start=NOW + 3 * DAY, end=NOW + 6 * DAY))
    theirs.reservation.blocks.update(host_id=next(iter(held(contract))))
    error = refused("no_capacity", extend, contract, NOW + 5 * DAY, NOW + DAY)
    again = error.extra["alternatives"]["quote"]["body"]
    assert (again["gpu_count"], again["starts_at"], again["ends_at"]) == (8, NOW + 2 * DAY, NOW + 5 * DAY)


def test_what_no_extension_may_be(listing, customer):
    type(listing).objects.filter(pk=listing.pk).update(max_term_days=10)
    listing.refresh_from_db()
    contract = accept(customer, ask(customer, listing))
    error = refused("term_not_offered", extend, contract, START + 11 * DAY)
    assert error.extra["alternatives"]["ends_at"] == START + 10 * DAY
    refused("invalid_request", extend, contract, END)
    refused("invalid_request", extend, contract, END + timedelta(seconds=30))
    refused("illegal_transition", extend, accept(customer, rate(customer, listing)), LATER)
    stranger = factories.actor(factories.organization())
    refused("forbidden", contracts.amendments.extend, stranger, contract, END + DAY, now=NOW)
    row = extend(contract, END + DAY)
    refused("quote_expired", agree, row, NOW + timedelta(minutes=15))
    assert contracts.clock(NOW + timedelta(minutes=15))
    row.refresh_from_db()
    assert row.state == "expired"
    contracts.terminate(factories.actor(customer), contract, now=NOW)
    contract.refresh_from_db()
    refused("illegal_transition", extend, contract, END + DAY)
    type(listing).objects.filter(pk=listing.pk).update(state="paused")
    refused("listing_unavailable", extend, contract, END + DAY)


def test_a_proposal_of_before_a_change_is_stale(listing, customer):
    contract = accept(customer, ask(customer, listing, gpus=4))
    first = extend(contract, END + DAY)
    second = resize(contract, 8)
    first.refresh_from_db()
    assert first.state == "expired"  # the newest counts
    contracts.terminate(factories.actor(customer), contract, now=NOW)
    refused("conflict", agree, second)


# --- more GPUs
def test_gpus_that_join_cost_what_is_asked_today(listing, customer):
    contract = accept(customer, ask(customer, listing, gpus=2, start=None, end=NOW + 2 * DAY))
    type(listing).objects.filter(pk=listing.pk).update(reserved_price=3_000_000)
    row = resize(contract, 6, NOW + DAY)
    assert (row.added_gpus, row.price, row.total_minor) == (4, 3_000_000, 4 * 24 * 300)
    row = agree(row, NOW + DAY + timedelta(minutes=6))
    contract.refresh_from_db()
    assert (contract.gpu_count, contract.price) == (6, 2_000_000)
    assert row.effective_at == NOW + DAY + timedelta(minutes=6)
    assert row.total_minor == round(4 * 23.9 * 300)
    (indices,) = held(contract).values()
    assert indices == [0, 1, 2, 3, 4, 5]
    assert availability.largest(listing, now=NOW + DAY) == 2
    job = {"command": ["x"], "gpus": 6}
    assert jobs.submit(factories.actor(customer), contract, job, now=NOW + DAY + HOUR).total_gpus == 6
    assert "extend" in contracts.actions(contract, factories.actor(customer))


def test_more_gpus_stay_in_the_part_of_the_fabric_that_was_asked_for(customer):
    site = factories.site()
    hosts = [factories.host(site, leaf=leaf) for leaf in ("leaf-1", "leaf-1", "leaf-2", "leaf-2")]
    listing = factories.listing(site, hosts=hosts)
    contract = accept(customer, ask(customer, listing, gpus=8, level="leaf"))
    leaf = {h.pk: h.leaf for h in hosts}
    error = refused("no_capacity", resize, contract, 24)
    assert error.extra["alternatives"]["gpu_count"] == 16
    agree(resize(contract, 16))
    assert len({leaf[host] for host in held(contract)}) == 1
    assert sum(map(len, held(contract).values())) == 16
    sound(listing)


def test_more_gpus_within_the_organizations_limit(listing, customer):
    customer.gpu_limit = 6
    customer.save()
    contract = accept(customer, ask(customer, listing, gpus=4))
    error = refused("limit_exceeded", resize, contract, 8)
    assert error.extra == {"limit": "gpus", "allowed": 6, "held": 4}
    refused("invalid_request", resize, contract, 4)
    row = resize(contract, 6)
    type(customer).objects.filter(pk=customer.pk).update(gpu_limit=5)
    refused("limit_exceeded", agree, row)


def test_gpus_that_spot_is_leaving_are_billed_when_they_are_clear(listing, customer):
    contract = accept(customer, ask(customer, listing, gpus=4, start=None, end=NOW + 2 * DAY))
    spot = factories.job(factories.contract(listing, kind="spot"), gpus=2, state="running")
    factories.placement(spot, listing.hosts.get(), [6, 7], state="running")
    row = agree(resize(contract, 8, NOW + HOUR), NOW + HOUR)
    assert row.effective_at == NOW + HOUR + timedelta(seconds=240)


# --- another price
RISE = NOW + 30 * DAY


def propose(contract, price=3_000_000, at=RISE, now=NOW):
    return contracts.prices.propose(factories.actor(contract.operator), contract, price, at, now=now, reason="energy")


def test_a_rise_with_consent_counts_from_its_day(listing, customer):
    contract = accept(customer, rate(customer, listing))
    row = propose(contract)
    assert contracts.amendment_actions(row, factories.actor(customer), NOW) == ["accept", "decline"]
    assert contracts.amendment_actions(row, factories.actor(contract.operator), NOW) == []
    assert OutboxMessage.objects.get(payload__what="price_proposed").payload["contract"] == contract.pk
    refused("conflict", propose, contract)
    refused("forbidden", contracts.accept_amendment, factories.actor(contract.operator), row, now=NOW)
    agree(row, NOW + DAY)
    assert contracts.clock(RISE - timedelta(seconds=1)).prices_applied == 0
    contract.refresh_from_db()
    assert contract.price == 2_500_000
    assert [contracts.clock(RISE).prices_applied for _ in range(2)] == [1, 0]
    contract.refresh_from_db()
    assert (contract.price, contract.ends_at) == (3_000_000, None)
    assert "energy" in contract.events.get(reason__contains="instead of").reason
    assert ContractDocument.objects.get(kind="amendment").amendment == row


def test_without_consent_the_old_price_holds_until_the_contract_ends(listing, customer):
    contract = accept(customer, rate(customer, listing))
    row = contracts.decline_amendment(factories.actor(customer), propose(contract), now=NOW + DAY)
    contract.refresh_from_db()
    assert (row.state, contract.ends_at, contract.price, contract.state) == ("declined", RISE, 2_500_000, "active")
    refused("illegal_transition", agree, row, NOW + 2 * DAY)
    contracts.clock(RISE)
    contract.refresh_from_db()
    assert (contract.state, contract.price) == ("terminated", 2_500_000)


def test_silence_is_no_consent(listing, customer):
    contract = accept(customer, rate(customer, listing))
    row = propose(contract)
    assert contracts.clock(RISE - timedelta(seconds=1)).prices_lapsed == 0
    assert contracts.clock(RISE).prices_lapsed == 1
    contract.refresh_from_db()
    row.refresh_from_db()
    assert (row.state, contract.state, contract.ends_at, contract.price) == ("expired", "terminated", RISE, 2_500_000)
    assert OutboxMessage.objects.filter(payload__what="price_lapsed").count() == 1
    refused("illegal_transition", agree, row, RISE)


def test_a_lower_price_needs_no_consent_and_counts_from_the_next_minute(listing, customer):
    contract = accept(customer, rate(customer, listing))
    row = propose(contract, 2_000_000, None, NOW + timedelta(seconds=20))
    assert (row.state, row.effective_at) == ("accepted", NOW + timedelta(minutes=1))
    contracts.clock(NOW + timedelta(minutes=1))
    contract.refresh_from_db()
    assert contract.price == 2_000_000


@pytest.mark.parametrize(
    ("price", "at"), [(3_000_000, RISE - timedelta(minutes=1)), (3_000_000, None), (2_500_000, RISE), (0, RISE)]
)
def test_what_no_proposal_may_be(listing, customer, price, at):
    refused("invalid_request", propose, accept(customer, rate(customer, listing)), price, at)


def test_only_an_open_price_can_be_proposed_anew(listing, customer):
    refused("illegal_transition", propose, accept(customer, ask(customer, listing)))
    contract = accept(customer, rate(customer, listing))
    refused("forbidden", contracts.prices.propose, factories.actor(customer), contract, 1, None, now=NOW)


# --- papers
def test_the_order_form_is_kept_as_it_was_signed(listing, customer):
    contract = accept(customer, ask(customer, listing))
    paper = contract.documents.get()
    assert paper.digest == documents.digest(paper.html)
    for text in (contract.public_id, customer.name, listing.organization.name, "$2.00", "1/4", documents.CURRENT):
        assert text in paper.title + paper.html
    for change in (
        lambda: ContractDocument.objects.update(html="x"),
        lambda: ContractDocument.objects.all()._raw_delete("default"),
    ):
        with pytest.raises(IntegrityError, match="append-only"), transaction.atomic():
            change()
    agree(extend(contract, LATER))
    assert list(contract.documents.order_by("pk").values_list("kind", flat=True)) == ["order_form", "amendment"]


def test_names_in_papers_are_text(listing, customer):
    customer.name = "<b>Acme</b>"
    customer.save()
    assert "&lt;b&gt;Acme" in accept(customer, rate(customer, listing)).documents.get().html


def test_terms_are_accepted_before_the_first_contract_and_again_when_they_change(listing, monkeypatch):
    buyer = factories.organization(terms=False)
    quote = rate(buyer, listing)
    error = refused("terms_not_accepted", accept, buyer, quote)
    assert error.extra["terms"]["version"] == documents.CURRENT
    refused(
        "terms_not_accepted", contracts.accept, factories.actor(buyer), quote.pk, now=NOW, terms_version="1999-01-01"
    )
    assert not Contract.objects.exists()
    contract = contracts.accept(factories.actor(buyer), quote.pk, now=NOW, terms_version=documents.CURRENT)
    row = TermsAcceptance.objects.get(organization=buyer)
    assert (row.accepted_by, row.accepted_at, row.digest) == ("owner@example.org", NOW, documents.terms().digest)
    assert AuditEvent.objects.get(verb="terms.accepted").subject == documents.CURRENT
    assert documents.CURRENT in contract.documents.get().html
    assert documents.accept_terms(factories.actor(buyer), documents.CURRENT, now=NOW + DAY).pk == row.pk
    accept(buyer, rate(buyer, listing))
    with monkeypatch.context() as patch:
        patch.setattr(documents, "CURRENT", "2027-01-01")
        patch.setattr(documents, "terms", lambda version="": documents.Terms("2027-01-01", "", ""))
        assert refused("terms_not_accepted", accept, buyer, rate(buyer, listing))
    with connection.cursor() as cursor, pytest.raises(IntegrityError, match="append-only"), transaction.atomic():
        cursor.execute("UPDATE marketplace_termsacceptance SET accepted_by = 'somebody else'")


def test_every_version_of_the_terms_can_be_read():
    assert all(documents.terms(version).html for version in documents.VERSIONS)
    refused("not_found", documents.terms, "1999-01-01")
    assert list(documents.VERSIONS) == sorted(documents.VERSIONS)


def test_more_gpus_come_from_the_same_leaf_and_not_from_one_of_the_same_name_under_another_spine():
    site = factories.site()
    near, same, far = (
        factories.host(site, spine=spine, leaf=leaf)
        for spine, leaf in (("spine-1", "leaf-1"), ("spine-1", "leaf-1"), ("spine-2", "leaf-1"))
    )
    bare = [factories.host(site, spine="", leaf="") for _ in range(2)]  # no name, no neighbour
    listing = factories.listing(site, hosts=[near, same, far, *bare])
    customer = factories.organization()
    contract = accept(customer, ask(customer, listing, gpus=8, level="leaf"))
    reservation = contract.reservation
    for host, leaf, spine in (
        (near, {near.pk, same.pk}, {near.pk, same.pk}), (far, {far.pk}, {far.pk}), (bare[0], {bare[0].pk}, {bare[0].pk})
    ):  # fmt: skip
        ReservationBlock.objects.filter(reservation=reservation).update(host=host)
        assert set(holds.neighbours(reservation, "leaf")) == leaf
        assert set(holds.neighbours(reservation, "spine")) == spine
        assert holds.neighbours(reservation, "site") is None
