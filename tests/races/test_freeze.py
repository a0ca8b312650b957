"""Somebody freezes the platform while a commit or a turn of a site's loop is under way, and twice at once."""

from datetime import timedelta

import pytest

from marketplace.models import AuditEvent, Placement, PowerFreeze
from marketplace.services.power import freeze
from marketplace.tenancy import SYSTEM, Actor
from scheduler import commit, site_loop
from tests import factories
from tests.factories import NOW
from tests.races.market import Market
from tests.races.test_power import obeyed, shed_market
from tests.threads import at_once, in_thread

pytestmark = pytest.mark.django_db(transaction=True)


def frozen():
    return freeze.freeze(SYSTEM, reason="drill", now=NOW)


def test_two_at_once_are_one_freeze_and_one_line_in_the_audit_trail():
    assert len(set(at_once([frozen] * 4))) == 1
    assert PowerFreeze.objects.count() == AuditEvent.objects.filter(verb="power.frozen").count() == 1
    lifted = at_once([lambda: freeze.lift(SYSTEM, now=NOW)] * 4)
    assert sorted(lifted) == [False, False, False, True]
    assert AuditEvent.objects.filter(verb="power.freeze_lifted").count() == 1
    frozen()
    assert PowerFreeze.objects.count() == 2, "a later one is another"


def test_two_superusers_who_permit_at_once_permit_once():
    boss, colleague = factories.user(is_staff=True, is_superuser=True), factories.user(is_staff=True)
    actor = Actor(kind="staff", user_id=boss.pk, label=boss.email)
    said = at_once([lambda: freeze.permit(actor, colleague, allowed=True, now=NOW)] * 4)
    assert sorted(said) == [False, False, False, True]
    assert AuditEvent.objects.filter(verb="power.freeze_permitted").count() == 1


def test_a_plan_from_before_the_freeze_gets_no_watts():
    market = Market()
    market.submit()
    taken, made = market.planned()
    frozen()
    commit.commit(taken, made, now=NOW)
    assert Placement.objects.get().state == "shedding"
    market.sound()


def test_a_turn_under_way_may_end_and_the_next_gives_nothing(monkeypatch):
    """The person at the button waits for no site; what the turn had begun is whole."""
    market = shed_market()
    market.submit(gpus=4)
    market.submit(gpus=4)
    market.cycle()
    grant, states = site_loop.power.grant_pending, []

    def beside(*args, **named):
        if not states and (found := grant(*args, **named)):
            in_thread(frozen)()  # another connection, while this turn holds the site's lock
            states.extend(found)
            return found
        return grant(*args, **named)

    monkeypatch.setattr(site_loop.power, "grant_pending", beside)
    for turn in range(1, 9):
        now = NOW + timedelta(seconds=6 * turn)
        site_loop.run(market.site.pk, now=now)
        market.sound()
        if states and Placement.objects.filter(state="shedding").exists() is False:
            break
        obeyed(now)
    granted = set(Placement.objects.filter(state="granted").values_list("pk", flat=True))
    assert states
    assert granted == set(states)
    assert PowerFreeze.objects.filter(ended_at=None).count() == 1
