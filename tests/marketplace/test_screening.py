"""Screening: what it gates, who answers, what happens while nobody does, and what each step leaves on record."""

from datetime import timedelta

import pytest
from django.core import mail
from django.db import IntegrityError, transaction
from hypothesis import given
from hypothesis import strategies as st

from marketplace import outbox
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
from marketplace.services.screening import lists, records, rule
from marketplace.tenancy import SYSTEM, Actor
from tests import factories
from tests.factories import NOW
from tests.marketplace.trade import DAY, HOUR, accept, ask, rate, refused
from tests.screener import running

pytestmark = pytest.mark.django_db
STAFF = Actor(kind="staff", user_id=1, label="dana@tailrace.example")
OTHER = Actor(kind="staff", user_id=2, label="kim@tailrace.example")
PROFILE = {
    "legal_name": "Lumen Labs Inc.", "registration_number": "C-4711", "address": "1 Main St, Austin", "website": "",
    "beneficial_owners": ["Ada Park"], "end_use": "training language models", "end_use_countries": ["US"],
}  # fmt: skip


@pytest.fixture
def fresh():
    return factories.organization("Lumen Labs", screened=False)


def tell(organization, now=NOW, **changes):
    return screening.tell(factories.actor(organization), organization, {**PROFILE, **changes}, now=now)


def states(organization):
    return dict(Screening.objects.owned_by(organization.pk).values_list("kind", "state"))


def row(organization, kind="sanctions"):
    return Screening.objects.get(organization=organization, kind=kind)


def ask_all(organization, now=NOW):
    for pk in Screening.objects.owned_by(organization.pk).order_by("pk").values_list("pk", flat=True):
        screening.ask(pk, now=now)


def decide(organization, to, kind="sanctions", actor=STAFF, now=NOW, **more):
    found = row(organization, kind)
    return screening.decide(actor, found.pk, to, seen=more.pop("seen", found.version), reason="looked", now=now, **more)


def clear_all(organization, now=NOW):
    for kind in Screening.Kind.values:
        decide(organization, "clear", kind, now=now)


def history(screened):
    return list(screened.events.values_list("what", "from_state", "to_state"))


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


# --- providers
@pytest.fixture
def service(settings):
    settings.SCREENING_PROVIDER, settings.SCREENING_KEY = "http", "sk_screen"
    with running(key="sk_screen") as screener:
        settings.SCREENING_URL = screener.url
        yield screener


def test_the_service_clears_and_finds(fresh, service):
    tell(fresh)
    ask_all(fresh)
    assert set(states(fresh).values()) == {"clear"}
    assert row(fresh).events.get(what="answered").evidence["found"] == 0
    denied = factories.organization("Denied Labs", screened=False)
    tell(denied)
    ask_all(denied)
    found = row(denied)
    assert (found.state, found.needs_person) == ("review", True)
    assert found.events.get(what="answered").evidence["matches"][0]["score"] == 97
    refused("screening_required", screening.require, denied, "reserved", 1, "H100", now=NOW)


def test_a_slow_service_is_polled_with_its_own_name_of_the_question(fresh, service):
    service.control(wait=60)
    tell(fresh)
    pk = row(fresh).pk
    screening.ask(pk, now=NOW)
    found = row(fresh)
    assert (found.state, found.ask_at, found.failures) == ("pending", NOW + timedelta(seconds=5), 0)
    assert found.ticket
    screening.ask(pk, now=NOW + timedelta(seconds=1))  # not yet
    assert service.service.asked == 1
    service.at = 61
    screening.ask(pk, now=NOW + timedelta(seconds=61))
    assert row(fresh).state == "clear"
    assert len(service.service.by_key) == 1


def test_a_service_that_forgets_is_asked_anew(fresh, service):
    service.control(wait=60)
    tell(fresh)
    pk = row(fresh).pk
    screening.ask(pk, now=NOW)
    service.control(forget=True)
    screening.ask(pk, now=NOW + timedelta(seconds=5))
    assert row(fresh).ticket == ""
    service.control(wait=0)
    screening.ask(pk, now=NOW + timedelta(seconds=20))
    assert row(fresh).state == "clear"


@pytest.mark.parametrize("fault", ["down", "error", "garbled"])
def test_while_the_service_does_not_answer_pending_stays_pending_and_says_so(fresh, service, fault):
    service.control(fault=fault)
    tell(fresh)
    pk, at = row(fresh).pk, NOW
    for failures, wait in ((1, 30), (2, 60), (3, 120)):
        screening.ask(pk, now=at)
        found = row(fresh)
        assert (found.state, found.failures, found.ask_at) == ("pending", failures, at + timedelta(seconds=wait))
        at = found.ask_at
    assert found.last_error.startswith("http: ")
    assert "sk_screen" not in found.last_error
    said = screening.standing(fresh)[1]
    assert said.waits
    assert "does not answer" in said.summary
    assert [what for what, _, _ in history(found)] == ["begun", "failed"]  # the first of a row, not each
    assert screening.tick(at) >= 1
    service.control(fault="")
    screening.ask(pk, now=at)
    assert (row(fresh).state, row(fresh).failures) == ("clear", 0)


def test_the_wrong_key_is_no_answer(fresh, service, settings):
    settings.SCREENING_KEY = "other"
    tell(fresh)
    ask_all(fresh)
    assert row(fresh).last_error == "http: HTTP 401"


def test_the_workers_ask_and_the_mails_say_what_became_of_it(fresh, service):
    import marketplace.tasks  # noqa: F401  the handlers

    factories.member(fresh, "admin")
    factories.member(fresh, "engineer")
    tell(fresh, now=NOW)
    Screening.objects.update(ask_at=NOW - timedelta(days=1))
    while outbox.drain():
        pass
    assert set(states(fresh).values()) == {"clear"}
    (letter,) = mail.outbox
    assert letter.subject == "Lumen Labs has passed its checks"
    assert "/verification" in letter.body
    (html, kind), = letter.alternatives  # fmt: skip
    assert kind == "text/html"
    assert "Passed; counts until" in html
    assert not OutboxMessage.objects.exclude(topic="billing.open_account").exists()


# --- late answers
def answer(found, outcome, round_=None):
    return records.answered(
        found.pk, round_ or found.round, outcome, provider="http", provider_version="", reason="", evidence={"n": 1}, now=NOW
    )  # fmt: skip


def test_an_answer_to_an_earlier_question_is_only_kept(fresh):
    tell(fresh)
    asked = row(fresh)
    tell(fresh, beneficial_owners=["Somebody Else"])
    answer(asked, "clear")
    assert row(fresh).state == "pending"
    assert "late" in row(fresh).events.last().reason


@pytest.mark.parametrize(
    ("decision", "outcome", "stands"),
    [("clear", "clear", "clear"), ("clear", "hit", "review"), ("rejected", "clear", "rejected"), ("rejected", "hit", "rejected")],
)  # fmt: skip
def test_an_answer_after_a_persons_decision(fresh, decision, outcome, stands):
    """A decision stands; but a hit that the person did not see goes back to the queue."""
    tell(fresh)
    asked = row(fresh)
    decide(fresh, decision)
    answer(asked, outcome)
    assert row(fresh).state == stands


def test_two_answers_to_one_question_count_once(fresh):
    tell(fresh)
    asked = row(fresh)
    answer(asked, "hit")
    decide(fresh, "clear")
    answer(asked, "hit")
    assert row(fresh).state == "clear"


# --- the list
CSV = (
    "_id,source,entity_number,type,programs,name,title,addresses,alt_names,source_information_url\n"
    '1,Entity List (EL),,Entity,EAR,"Northwind Heavy Industries Co., Ltd.",,,"NHI; Nordvind Schwerindustrie",https://bis.example\n'
    "2,Specially Designated Nationals (SDN),7,Individual,SDGT,Ádám Pérez-Kovács,,,,\n"
)


@pytest.fixture
def denied(settings, tmp_path):
    path = tmp_path / "parties.csv"
    path.write_text(CSV)
    settings.SCREENING_PROVIDER, settings.SCREENING_LIST = "list", str(path)
    return path


def test_the_list_hits_by_likeness_and_a_person_looks(denied):
    made = factories.organization("Fair Winds LLC", screened=False)
    tell(made, beneficial_owners=["Adam Perez Kovacs"])
    ask_all(made)
    assert states(made) == {"business": "review", "sanctions": "review", "export": "clear"}
    (match,) = row(made).events.get(what="answered").evidence["matches"]
    assert (match["asked"], match["name"], match["score"]) == ("Adam Perez Kovacs", "Ádám Pérez-Kovács", 100)


@pytest.mark.parametrize(
    ("name", "hit"),
    [
        ("NORTHWIND HEAVY INDUSTRIES", True), ("Nortwind Heavy Industry Company Limited", True),
        ("Industries Heavy, Northwind", True), ("Northwind Traders", False), ("Lumen Labs", False), ("nordvind schwerindustrie gmbh", True),
    ],
)  # fmt: skip
def test_likeness(denied, name, hit):
    assert bool(lists.matches([name], lists.load()[1], 85)) is hit


def test_listed_countries_go_to_a_person(denied):
    made = factories.organization("Ordinary Trade", country="IR", screened=False)
    tell(made, end_use_countries=["CN"])
    ask_all(made)
    assert states(made) == dict.fromkeys(Screening.Kind.values, "review")


def test_a_new_list_asks_about_everybody_again(fresh, denied):
    tell(fresh)
    ask_all(fresh)
    decide(fresh, "clear", "business")
    assert row(fresh).state == "clear"
    assert screening.tick(NOW) == 0
    denied.write_text(CSV + "3,SDN,8,Entity,SDGT,Lumen Labs,,,,\n")
    assert screening.tick(NOW + HOUR) == 4  # sanctions and export: renewed, and asked
    ask_all(fresh, NOW + HOUR)
    assert row(fresh).state == "review"


@pytest.mark.parametrize("broken", ["", "who,when\nx,y\n", None])
def test_a_list_that_cannot_be_read_clears_nobody(fresh, denied, broken):
    if broken is None:
        denied.unlink()
    else:
        denied.write_text(broken)
    tell(fresh)
    ask_all(fresh)
    assert row(fresh).state == "pending"
    assert "cannot be read" in row(fresh).last_error
    assert screening.tick(NOW) == 0


@given(st.text(max_size=30), st.text(max_size=30), st.integers(0, 100))
@pytest.mark.django_db(databases=[])
def test_likeness_is_even_handed(one, other, least):
    a, b = lists.words(one), lists.words(other)
    found = lists.score(a, b)
    assert 0 <= found <= 100
    assert found == lists.score(b, a)
    assert lists.score(a, b, least) == (found if found >= least else 0)
    assert lists.score(a, a) == (100 if a else 0)


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
