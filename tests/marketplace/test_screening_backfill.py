"""Organizations that could sign, or had sold, before there were checks: the clock begins theirs, once."""

import pytest

from marketplace.models import BillingStanding, OutboxMessage, Screening
from marketplace.services import screening
from tests import factories
from tests.factories import NOW

pytestmark = pytest.mark.django_db
ALL = [(kind, "pending") for kind in ("business", "export", "sanctions")]


def checks(organization):
    return list(Screening.objects.filter(organization=organization).order_by("kind").values_list("kind", "state"))


def told():
    return OutboxMessage.objects.filter(topic=screening.NOTICE).count()


@pytest.mark.parametrize("standing", ["good", "past_due", "suspended"])
def test_who_has_had_a_card_is_asked_once(standing):
    older = factories.organization(standing=standing, screened=False)
    assert checks(older) == []
    for _ in range(2):
        screening.tick(NOW)
        assert checks(older) == ALL
    assert told() == 1


def test_an_operator_who_has_sold_is_asked_and_nobody_else_is():
    operator = factories.organization(is_operator=True, standing="no_card", screened=False)
    idle = factories.organization(is_operator=True, standing="no_card", screened=False)
    tenant = factories.organization(livemode=False, screened=False)
    passed = factories.organization()
    house = factories.organization(is_house=True, screened=False)
    bare = factories.organization(standing="no_card", screened=False)
    BillingStanding.objects.filter(organization=bare).delete()
    site = factories.site(operator)
    factories.contract(factories.listing(site, hosts=[factories.host(site)]), passed)
    screening.tick(NOW)
    assert checks(operator) == ALL
    assert [checks(o) for o in (idle, tenant, house, bare)] == [[], [], [], []]
    assert {state for _, state in checks(passed)} == {"clear"}


def test_a_kind_of_check_that_is_new_begins_beside_those_there_are():
    older = factories.organization()
    Screening.objects.filter(organization=older, kind="export").delete()
    screening.tick(NOW)
    assert checks(older) == [("business", "clear"), ("export", "pending"), ("sanctions", "clear")]
