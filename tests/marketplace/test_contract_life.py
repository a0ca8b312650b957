"""A contract's life: it begins, keeps its promise, and ends by the clock, by default or by its own rule."""

from datetime import timedelta

import pytest

from marketplace.models import AuditEvent, Contract, Job, OutboxMessage
from marketplace.services import availability, contracts, jobs, terms
from tests import factories
from tests.factories import NOW
from tests.marketplace.trade import DAY, END, HOUR, START, accept, ask, history, rate, refused, topics, upfront

pytestmark = pytest.mark.django_db


# --- begin and default
def test_the_clock_says_once_that_a_window_has_begun(listing, customer):
    contract = accept(customer, ask(customer, listing))
    assert contracts.clock(START - timedelta(seconds=1)).contracts_begun == 0
    assert [contracts.clock(START).contracts_begun for _ in range(2)] == [1, 0]
    contract.refresh_from_db()
    assert contract.began_at == START
    assert contract.events.last().reason == "its window has begun: 8 GPUs"
    assert AuditEvent.objects.get(verb="contract.began").organization == customer
    assert OutboxMessage.objects.filter(topic=contracts.NOTICE, payload__what="began").count() == 1


def test_who_does_not_pay_loses_all_contracts_and_owes_what_their_rules_leave(listing, customer):
    job_of = accept(customer, rate(customer, listing))
    factories.job(job_of, state="queued")
    held = accept(customer, ask(customer, listing, gpus=4))
    upfront(listing)
    waiting = accept(customer, ask(customer, listing, gpus=4))
    at = START + DAY
    moved = contracts.default(customer.pk, now=at, reason="TR-000001 stayed unpaid for 28 days")
    assert moved == [job_of.pk, held.pk]
    for row in (job_of, held, waiting):
        row.refresh_from_db()
    assert [row.state for row in (job_of, held, waiting)] == ["defaulted", "defaulted", "cancelled"]
    assert (job_of.ends_at, job_of.ended_at) == (at, at)
    assert (held.ends_at, held.ended_at) == (at + 6 * DAY / 4, at)
    assert held.reservation.state == waiting.reservation.state == "released"
    assert (contracts.END_JOBS, job_of.pk) in topics()
    assert held.events.last().reason == "TR-000001 stayed unpaid for 28 days"
    assert AuditEvent.objects.filter(verb="contract.defaulted", organization=customer).count() == 2
    assert contracts.actions(held, factories.actor(customer)) == []
    assert contracts.default(customer.pk, now=at, reason="again") == []
    ask(factories.organization(), listing, now=at, start=at + DAY)


def test_every_state_has_its_customers_words(listing, customer):
    contract = accept(customer, ask(customer, listing))
    said = set()
    for state in Contract.State.values:
        contract.state = state
        said.add(contracts.sentence(contract, NOW))
    assert len(said) == len(Contract.State.values)


def test_a_notice_is_a_mail_to_those_who_sign_and_pay(listing, customer, mailoutbox):
    for role in ("owner", "billing", "viewer"):
        factories.member(customer, role, factories.user(f"{role}@example.org"))
    contract = accept(customer, ask(customer, listing))
    contracts.send_notice(contract.pk, "began", "The day has come.")
    assert sorted(mail.to[0] for mail in mailoutbox) == ["billing@example.org", "owner@example.org"]
    mail = mailoutbox[0]
    assert len(mail.to) == 1  # nobody reads the others' addresses
    assert contract.public_id in mail.subject
    assert "The day has come." in mail.body
    assert f"/contracts/{contract.public_id}" in mail.body


# --- the end
def test_the_clock_ends_a_contract_with_its_window_and_its_jobs_drain(listing, customer):
    contract = accept(customer, ask(customer, listing))
    job = factories.job(contract, state="queued")
    OutboxMessage.objects.all().delete()
    assert contracts.clock(END - timedelta(seconds=1)).contracts_over == 0
    assert contracts.clock(END).contracts_over == 1
    contract.refresh_from_db()
    assert (contract.state, contract.reservation.state, contract.ended_at) == ("ending", "released", END)
    assert (contracts.END_JOBS, contract.pk) in topics()
    assert contracts.clock(END + timedelta(seconds=10)) == contracts.Ticked()
    jobs.end_contract(contract.pk, now=END)
    job.refresh_from_db()
    assert job.state == "cancelled"
    assert contracts.clock(END + timedelta(seconds=20)).contracts_settled == 1
    begun = ("active", "active")
    assert history(contract) == [("", "active"), begun, ("active", "ending"), ("ending", "ended")]


def test_a_contract_without_jobs_is_over_in_one_tick(listing, customer):
    contract = accept(customer, ask(customer, listing))
    OutboxMessage.objects.all().delete()
    contracts.clock(END)
    contract.refresh_from_db()
    assert contract.state == "ended"
    assert topics() == [(contracts.NOTICE, contract.pk)]  # nothing is left to end
    assert AuditEvent.objects.get(verb="contract.over").organization == customer
    ask(customer, listing, now=END, start=END + DAY, end=END + 2 * DAY)


def test_a_placement_that_still_drains_keeps_the_contract_ending(listing, customer):
    contract = accept(customer, rate(customer, listing))
    job = factories.job(contract, state="running")
    placement = factories.placement(job, listing.hosts.get(), [0], state="draining")
    contracts.terminate(factories.actor(customer), contract, now=NOW + HOUR)
    Job.objects.filter(pk=job.pk).update(state="cancelled")
    assert contracts.clock(NOW + 2 * HOUR).contracts_settled == 0
    type(placement).objects.filter(pk=placement.pk).update(state="released")
    assert contracts.clock(NOW + 3 * HOUR).contracts_settled == 1


@pytest.mark.parametrize("kind", ["on_demand", "spot"])
def test_a_rate_is_terminated_at_once_and_its_jobs_drain(listing, customer, kind):
    limit = {"limit_price": 1_000_000} if kind == "spot" else {}
    contract = accept(customer, rate(customer, listing, kind, **limit))
    factories.job(contract, state="queued")
    contract = contracts.terminate(factories.actor(customer), contract, now=NOW + HOUR)
    assert (contract.state, contract.ends_at, contract.ended_at) == ("ending", NOW + HOUR, NOW + HOUR)
    assert (contracts.END_JOBS, contract.pk) in topics()
    refused(
        "contract_inactive", jobs.submit, factories.actor(customer), contract, {"command": ["x"]}, now=NOW + 2 * HOUR
    )
    jobs.end_contract(contract.pk, now=NOW + HOUR)
    contracts.clock(NOW + HOUR)
    contract.refresh_from_db()
    assert contract.state == "terminated"
    refused("illegal_transition", contracts.terminate, factories.actor(customer), contract, now=NOW + 3 * HOUR)


@pytest.mark.parametrize(
    ("at", "ends_at"),
    [
        (NOW, START + 7 * DAY / 4),  # before its start: a quarter of it all
        (START + 3 * DAY, START + 4 * DAY),  # a quarter of what is left is a day
        (START + 5 * DAY, START + 6 * DAY),  # at least a day
    ],
)
def test_a_reserved_contract_owes_a_quarter_of_the_time_left(listing, customer, at, ends_at):
    contract = accept(customer, ask(customer, listing))
    found = contracts.leaving(contract, at)
    assert found.ends_at == ends_at
    begin = max(at, START)
    assert found.stays_due_minor == 8 * 200 * (ends_at - begin) // HOUR
    assert found.stays_due_minor + found.released_minor == 8 * 200 * (END - begin) // HOUR
    contract = contracts.terminate(factories.actor(customer), contract, now=at)
    refused("illegal_transition", contracts.leaving, contract, at)
    assert (contract.state, contract.ends_at, contract.reservation.ends_at) == ("active", ends_at, ends_at)
    assert contract.terms["ends_at"] == END.isoformat()
    assert "early termination" in contract.events.last().reason
    assert availability.largest(listing, now=at, starts_at=ends_at + HOUR, ends_at=END) == 8
    contracts.clock(ends_at)
    contract.refresh_from_db()
    assert contract.state == "terminated"


def test_on_its_last_day_a_reserved_contract_just_ends(listing, customer):
    contract = accept(customer, ask(customer, listing))
    refused("illegal_transition", contracts.terminate, factories.actor(customer), contract, now=END - HOUR)
    assert terms.termination(contract, END - HOUR) == END


def test_only_the_customer_terminates(listing, customer):
    contract = accept(customer, rate(customer, listing))
    for actor in (factories.actor(listing.organization), factories.actor(factories.organization())):
        refused("forbidden", contracts.terminate, actor, contract, now=NOW)
        assert contracts.actions(contract, actor) == []
    assert contracts.actions(contract, factories.actor(customer)) == ["submit_job", "terminate"]
    held = accept(customer, ask(customer, listing))
    assert contracts.actions(held, factories.actor(customer)) == ["extend", "resize", "submit_job", "terminate"]


@pytest.mark.parametrize("state", sorted(set(Contract.State.values) - {"active", "pending_payment"}))
def test_what_is_over_is_left_alone(listing, customer, state):
    contract = accept(customer, rate(customer, listing))
    Contract.objects.filter(pk=contract.pk).update(state=state, ends_at=NOW + HOUR)
    refused("illegal_transition", contracts.terminate, factories.actor(customer), contract, now=NOW)
    assert contracts.end([contract.pk], now=NOW + DAY) == []
    contracts.confirm_payment(contract.pk, now=NOW)
    contract.refresh_from_db()
    assert contract.state == state


def test_the_clock_is_a_bounded_number_of_queries(listing, customer, django_assert_max_num_queries):
    for _ in range(5):
        accept(customer, ask(customer, listing, gpus=1))
    with django_assert_max_num_queries(43):  # two of them look for what was resold
        assert contracts.clock(END).contracts_over == 5


# --- promises are kept
@pytest.mark.parametrize("what", ["running", "broken", "lost"])
def test_a_promise_whose_gpus_are_gone_moves_to_others_before_it_begins(customer, what):
    site = factories.site()
    hosts = [factories.host(site), factories.host(site)]
    listing = factories.listing(site, hosts=hosts)
    contract = accept(customer, ask(customer, listing, gpus=4))
    block = contract.reservation.blocks.get()
    if what == "running":
        job = factories.job(factories.contract(listing), gpus=4, state="running")
        factories.placement(job, block.host, block.gpu_indices, state="running")
    elif what == "broken":
        block.host.gpus.filter(index=0).update(healthy=False)
    else:
        type(block.host).objects.filter(pk=block.host_id).update(state="lost")
    assert contracts.clock(START - 2 * DAY).reservations_moved == 0  # still far away
    assert contracts.clock(START - DAY).reservations_moved == 1
    assert contracts.clock(START - DAY).reservations_moved == 0
    after = contract.reservation.blocks.get()
    assert len(after.gpu_indices) == 4
    if what == "lost":
        assert after.host_id != block.host_id
    elif what == "running":
        assert (after.host_id, after.gpu_indices) == (block.host_id, [4, 5, 6, 7])
    else:
        assert 0 not in after.gpu_indices or after.host_id != block.host_id


def test_a_promise_that_finds_no_room_is_reported_and_the_clock_goes_on(listing, customer, caplog):
    contract = accept(customer, ask(customer, listing, gpus=8))
    over = accept(customer, rate(customer, listing))
    type(over).objects.filter(pk=over.pk).update(ends_at=START - DAY)
    listing.hosts.update(state="lost")
    found = contracts.clock(START - DAY)
    assert (found.reservations_moved, found.contracts_over) == (0, 1)
    assert contract.public_id in caplog.text
    assert contract.reservation.blocks.get().gpu_indices == list(range(8))
