"""Screening: what it gates, how it begins and is decided, and what each step leaves on record."""

from datetime import timedelta

import pytest
from django.db import IntegrityError, transaction

from marketplace.errors import MarketError
from marketplace.models import (
    AuditEvent,
    BillingStanding,
    Contract,
    Membership,
    Organization,
    OutboxMessage,
    Screening,
    ScreeningEvent,
)
from marketplace.services import accounts, contracts, jobs, screening
from marketplace.services.screening import rule
from marketplace.tenancy import SYSTEM
from tests import factories
from tests.factories import NOW
from tests.marketplace.screened import (
    OTHER,
    STAFF,
    ask_all,
    clear_all,
    decide,
    history,
    row,
    states,
    tell,
)
from tests.marketplace.trade import DAY, HOUR, accept, ask, rate, refused

pytestmark = pytest.mark.django_db


@pytest.fixture
def fresh():
    return factories.organization("Lumen Labs", screened=False)


# --- the rule
@pytest.mark.parametrize(
    ("country", "kind", "gpus", "model", "needs"),
    [
        ("US", "on_demand", 16, "H100-SXM", ()),
        ("US", "spot", 17, "H100-SXM", ("business", "sanctions", "export")),
        ("US", "on_demand", 17, "V100", ("business", "sanctions")),
        ("US", "reserved", 1, "v100", ("business", "sanctions")),
        ("US", "flexible", 1, None, ("business", "sanctions", "export")),
        ("CN", "on_demand", 1, "H100-SXM", ("business", "sanctions", "export")),
        ("CN", "on_demand", 1, "V100", ()),
        ("IR", "on_demand", 1, "V100", ("business", "sanctions", "export")),
    ],
)
def test_the_published_rule(country, kind, gpus, model, needs):
    assert screening.needed(Organization(country=country, livemode=True), kind, gpus, model) == needs
    assert screening.needed(Organization(country=country, livemode=False), kind, gpus, model) == ()


def test_a_small_rate_needs_no_check_and_a_reserved_contract_does(listing, fresh):
    contract = accept(fresh, rate(fresh, listing))
    assert contract.state == "active"
    quote = ask(fresh, listing)
    error = refused("screening_required", accept, fresh, quote)
    assert error.kind.status == 409
    assert error.extra["screening"] == {
        "needed": ["business", "sanctions", "export"],
        "open": {"business": "pending", "sanctions": "pending", "export": "pending"},
        "page": "/verification",
        "tell": {"method": "PUT", "path": "/api/v1/verification"},
    }
    tell(fresh)
    clear_all(fresh)
    assert accept(fresh, quote).state == "active"


def test_a_large_contract_in_small_parts_is_a_large_one(fresh):
    site = factories.site()
    listing = factories.listing(site, hosts=[factories.host(site) for _ in range(4)])
    accept(fresh, rate(fresh, listing))
    accept(fresh, rate(fresh, listing))
    refused("screening_required", accept, fresh, rate(fresh, listing, gpus=1))


def test_a_test_tenant_is_asked_for_nothing():
    operator = factories.organization(livemode=False, is_operator=True)
    site = factories.site(operator)
    listing = factories.listing(site, hosts=[factories.host(site)])
    customer = factories.organization(livemode=False, screened=False)
    screening.begin(customer, now=NOW)
    assert states(customer) == {}
    assert screening.standing(customer) == []
    assert accept(customer, ask(customer, listing)).state == "active"


def test_more_gpus_ask_for_the_checks_again(listing, customer):
    """A check that has expired since stops what is added; what was signed goes on."""
    contract = accept(customer, ask(customer, listing, gpus=4))
    actor = factories.actor(customer)
    proposal = contracts.amendments.resize(actor, contract, 8, now=NOW)
    Screening.objects.filter(organization=customer, kind="business").update(state="expired")
    refused("screening_required", contracts.accept_amendment, actor, proposal, now=NOW)
    contract.refresh_from_db()
    assert (contract.gpu_count, contract.state) == (4, "active")


# --- beginning, telling
def test_checks_begin_when_the_organization_can_sign(fresh):
    assert states(fresh) == {}
    accounts.set_billing_standing(fresh.pk, state="no_card", available_minor=0, now=NOW)
    assert states(fresh) == {}
    for _ in range(2):
        BillingStanding.objects.filter(organization=fresh).update(state="no_card")
        accounts.set_billing_standing(fresh.pk, state="good", available_minor=0, now=NOW)
    assert states(fresh) == dict.fromkeys(Screening.Kind.values, "pending")
    assert row(fresh).ask_at is None  # nobody is asked about an organization that has told nothing
    assert [s.asked for s in screening.standing(fresh)][1] == ("legal_name", "beneficial_owners")
    told = OutboxMessage.objects.get(topic=screening.NOTICE)
    assert told.payload == {"organization": fresh.pk, "what": "asked"}
    tell(fresh)
    assert row(fresh).ask_at == NOW
    assert row(fresh).facts["beneficial_owners"] == ["Ada Park"]
    assert "end_use" not in row(fresh).facts
    assert OutboxMessage.objects.filter(topic=screening.ASK).count() == 3
    assert AuditEvent.objects.get(verb="screening.told").organization == fresh


@pytest.mark.parametrize("change", ["name", "country", "owner", "demoted", "removed", "profile"])
def test_a_change_of_name_country_or_owner_is_asked_about_at_once(fresh, change):
    owner = factories.member(fresh)
    second = factories.member(fresh, "admin" if change == "owner" else "owner")
    tell(fresh)
    clear_all(fresh)
    fresh.refresh_from_db()
    assert fresh.verification == "verified"
    actor, later = factories.actor(fresh), NOW + HOUR
    if change in {"name", "country"}:
        accounts.update_organization(fresh, actor=actor, now=later, **{change: "DE"})
    elif change == "profile":
        tell(fresh, later, beneficial_owners=["Somebody Else"])
    elif change == "removed":
        accounts.remove_member(second, actor=actor, now=later)
    else:
        accounts.change_role(second, "owner" if change == "owner" else "admin", actor=actor, now=later)
    found = row(fresh)
    assert (found.state, found.round, found.ask_at) == ("pending", 2, later)
    assert history(found)[-1] == ("changed", "clear", "pending")
    fresh.refresh_from_db()
    assert fresh.verification == "new"
    assert states(fresh)["export"] == ("pending" if change in {"name", "country"} else "clear")
    assert Membership.objects.filter(pk=owner.pk).exists()


def test_what_does_not_concern_it_is_not_asked_again(fresh):
    tell(fresh)
    clear_all(fresh)
    accounts.update_organization(fresh, actor=factories.actor(fresh), now=NOW + HOUR, is_operator=True)
    tell(fresh)
    assert set(states(fresh).values()) == {"clear"}


def test_a_rejected_organization_does_not_rename_itself_out_of_it(fresh):
    tell(fresh)
    decide(fresh, "rejected")
    accounts.update_organization(fresh, actor=factories.actor(fresh), now=NOW + HOUR, name="Innocent Ltd")
    found = row(fresh)
    assert (found.state, found.facts["name"]) == ("rejected", "Innocent Ltd")
    assert history(found)[-1] == ("changed", "rejected", "rejected")
    decide(fresh, "clear")
    assert row(fresh).state == "clear"


# --- decisions
def test_by_hand_everything_goes_to_the_queue_and_a_person_decides(fresh):
    tell(fresh)
    ask_all(fresh)
    assert states(fresh) == dict.fromkeys(Screening.Kind.values, "review")
    assert row(fresh).needs_person
    clear_all(fresh)
    fresh.refresh_from_db()
    assert fresh.verification == "verified"
    found = row(fresh)
    assert found.valid_until == NOW + timedelta(days=60)
    assert found.decided_by == STAFF.label
    assert history(found) == [
        ("begun", "pending", "pending"), ("answered", "pending", "review"), ("decided", "review", "clear"),
    ]  # fmt: skip
    assert AuditEvent.objects.filter(verb="screening.clear", organization=fresh).count() == 3
    with pytest.raises(IntegrityError, match="append-only"), transaction.atomic():
        ScreeningEvent.objects.filter(screening=found).update(reason="nothing happened")
    with pytest.raises(IntegrityError, match="append-only"), transaction.atomic():
        ScreeningEvent.objects.filter(screening=found).delete()


def test_only_our_own_people_decide_on_what_they_saw(fresh):
    tell(fresh)
    seen = row(fresh).version
    refused("forbidden", decide, fresh, "clear", actor=factories.actor(fresh))
    refused("invalid_request", screening.decide, STAFF, row(fresh).pk, "clear", seen=seen, reason=" ", now=NOW)
    decide(fresh, "rejected", seen=seen)
    assert "decided by dana" in refused("conflict", decide, fresh, "clear", actor=OTHER, seen=seen).detail
    refused("illegal_transition", decide, fresh, "review")
    assert row(fresh).state == "rejected"


def test_every_move_is_one_of_the_table(fresh):
    tell(fresh)
    for start in Screening.State.values:
        for to in ("clear", "rejected", "review"):
            until = {"valid_until": NOW + DAY} if start == "clear" else {}
            Screening.objects.filter(pk=row(fresh).pk).update(state=start, **until)
            fine = to in Screening.TRANSITIONS[start] or (to == start and to != "rejected")
            if fine:
                assert decide(fresh, to).state == to
            else:
                refused("illegal_transition", decide, fresh, to)


def test_four_eyes(fresh, settings):
    settings.SCREENING_FOUR_EYES = True
    tell(fresh)
    assert decide(fresh, "clear").state == "pending"
    assert decide(fresh, "clear").state == "pending"  # the same person again
    assert decide(fresh, "rejected", actor=OTHER).state == "pending"  # no agreement: a new proposal
    assert decide(fresh, "rejected").state == "rejected"
    assert [what for what, _, _ in history(row(fresh))] == ["begun", "proposed", "proposed", "proposed", "decided"]


def test_a_rejected_organization_gets_nothing_new_and_keeps_what_runs(listing, fresh):
    contract = accept(fresh, rate(fresh, listing))
    actor = factories.actor(fresh)
    job = jobs.submit(actor, contract, {"command": ["x"]}, now=NOW)
    tell(fresh)
    decide(fresh, "rejected", message="Ada Park stands on a list. Write to us.")
    fresh.refresh_from_db()
    assert fresh.verification == "refused"
    assert refused("screening_rejected", jobs.submit, actor, contract, {"command": ["x"]}, now=NOW).kind.status == 403
    refused("screening_rejected", accept, fresh, rate(fresh, listing))
    job.refresh_from_db()
    contract.refresh_from_db()
    assert (job.state, contract.state) == ("queued", "active")
    refused("forbidden", contracts.close_out, actor, fresh.pk, now=NOW, reason="x")
    assert contracts.close_out(STAFF, fresh.pk, now=NOW + HOUR, reason="on a list of sanctions") == [contract.pk]
    contract.refresh_from_db()
    assert (contract.state, contract.ends_at) == ("ending", NOW + HOUR)
    assert AuditEvent.objects.get(verb="contract.closed_out").actor == STAFF.label
    decide(fresh, "clear")
    assert accept(fresh, rate(fresh, listing)).state == "active"


def test_closing_out_a_commitment_leaves_nothing_due_and_frees_its_gpus(listing, customer):
    contract = accept(customer, ask(customer, listing))
    assert contracts.close_out(STAFF, customer.pk, now=NOW + HOUR, reason="x") == [contract.pk]
    contract.refresh_from_db()
    assert contract.ends_at == contract.starts_at + timedelta(seconds=1)
    assert contract.reservation.state == "released"


def test_a_rejected_export_check_stops_controlled_models_alone(listing, fresh):
    assert rule.refuse_rejected(["export"], "V100") is None
    with pytest.raises(MarketError):
        rule.refuse_rejected(["export"], "H100-SXM")
    with pytest.raises(MarketError):
        rule.refuse_rejected(["export", "business"], "V100")


# --- time
def test_an_answer_is_asked_for_anew_before_it_grows_old_and_expires_without_one(fresh):
    tell(fresh)
    clear_all(fresh)
    assert screening.tick(NOW + timedelta(days=29)) == 0
    due = NOW + timedelta(days=30)
    assert screening.tick(due) == 2  # renewed, and asked
    found = row(fresh)
    assert (found.state, found.round, found.ask_at) == ("clear", 2, due)
    screening.ask(found.pk, now=due)
    found.refresh_from_db()
    assert (found.state, found.needs_person) == ("clear", True)  # in the queue; what was clear stays so meanwhile
    over = NOW + timedelta(days=60)
    screening.tick(over)
    found.refresh_from_db()
    assert found.state == "expired"
    fresh.refresh_from_db()
    assert fresh.verification == "new"
    decide(fresh, "clear", now=over)
    assert row(fresh).valid_until == over + timedelta(days=60)


# --- payouts
def test_an_operator_is_paid_out_when_it_has_passed(fresh):
    from billing import payouts

    Organization.objects.filter(pk=fresh.pk).update(is_operator=True)
    fresh.refresh_from_db()
    payouts.operator_account(fresh, now=NOW)
    assert payouts.held(fresh)
    tell(fresh)
    clear_all(fresh)
    fresh.refresh_from_db()
    assert not payouts.held(fresh)
    assert OutboxMessage.objects.get(topic=screening.OPERATOR_CLEAR).payload == {"operator": fresh.pk}
    decide(fresh, "rejected")
    fresh.refresh_from_db()
    assert payouts.held(fresh)
    assert SYSTEM.is_staff
    assert Contract.objects.count() == 0
