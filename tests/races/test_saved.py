"""Workers that take up the same change of the market, or the same notice, at one moment: it is told once."""

from collections import Counter
from datetime import timedelta

import pytest
from django.core import mail as outbound

from marketplace.models import AuditEvent, OutboxMessage, SavedMatch
from marketplace.services import catalogue, saved, saved_matches, saved_notices
from marketplace.services.filters import Filters
from tests import factories
from tests.factories import NOW
from tests.threads import at_once, in_thread

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def search():
    catalogue.forget()
    organization = factories.organization()
    factories.member(organization)
    return saved.save(factories.actor(organization), "any", Filters(), now=NOW)


def an_offer():
    site = factories.site()
    return factories.listing(site, hosts=[factories.host(site)])


def test_two_workers_that_follow_the_same_change_make_one_notice(search):
    saved_matches.follow(now=NOW)
    an_offer()
    answers = at_once([lambda: saved_matches.follow(now=NOW)] * 6)
    assert not [a for a in answers if isinstance(a, str)]
    assert sum(a.began for a in answers if isinstance(a, saved_matches.Followed)) == 1
    assert SavedMatch.objects.count() == 1
    assert OutboxMessage.objects.filter(topic=saved_matches.NOTICE).count() == 1


def test_one_notice_taken_up_by_many_is_one_mail(search):
    an_offer()
    saved_matches.follow(now=NOW)
    told = at_once([lambda: saved_notices.tell(search.pk, now=NOW)] * 6)
    assert Counter(told) == {1: 1, 0: 5}
    assert OutboxMessage.objects.filter(topic=saved_notices.MAIL).count() == 1
    assert AuditEvent.objects.filter(verb="saved_search.matched").count() == 1


def test_a_change_between_the_reading_and_the_saving_of_a_search_is_not_missed(monkeypatch):
    """A rival publishes, and another follows the market, while the search is being written."""
    catalogue.forget()
    organization = factories.organization()
    factories.member(organization)
    saved_matches.follow(now=NOW)
    rivals = []
    begin = saved_matches.begin

    def slowly(row, *, now):
        begin(row, now=now)
        an_offer_by = in_thread(an_offer)
        an_offer_by()
        rivals.append(in_thread(lambda: saved_matches.follow(now=NOW))())

    monkeypatch.setattr(saved_matches, "begin", slowly)
    row = saved.save(factories.actor(organization), "any", Filters(), now=NOW)
    assert rivals == [None]  # it was kept from passing by
    assert saved_matches.follow(now=NOW + timedelta(seconds=10)).began == 1
    assert saved_notices.tell(row.pk, now=NOW + timedelta(seconds=10)) == 1
    assert outbound.outbox == []


def test_unsubscribing_while_a_notice_is_made_sends_nothing_after_it(search):
    an_offer()
    saved_matches.follow(now=NOW)
    token = saved.unsubscribe_token(search)
    at_once([lambda: saved_notices.tell(search.pk, now=NOW), lambda: saved.unsubscribe(token, now=NOW)])
    for row in OutboxMessage.objects.filter(topic=saved_notices.MAIL):
        assert not saved_notices.mail(row.payload["search"], row.payload["listings"], now=NOW)
    assert outbound.outbox == []
