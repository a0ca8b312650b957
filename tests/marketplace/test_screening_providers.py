"""Who answers a screening: the service over HTTP, the list, people; late answers, and what happens while nobody does."""

from datetime import timedelta

import pytest
from django.core import mail
from hypothesis import given
from hypothesis import strategies as st

from marketplace import outbox
from marketplace.models import (
    OutboxMessage,
    Screening,
)
from marketplace.services import screening
from marketplace.services.screening import lists, records
from tests import factories
from tests.factories import NOW
from tests.marketplace.screened import (
    ask_all,
    decide,
    history,
    row,
    states,
    tell,
)
from tests.marketplace.trade import HOUR, refused
from tests.screener import running

pytestmark = pytest.mark.django_db


@pytest.fixture
def fresh():
    return factories.organization("Lumen Labs", screened=False)


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
