"""Pages on maintenance: no violation of axe's rules, no overflow."""

from datetime import timedelta

import pytest
from django.utils import timezone

from marketplace.services import contracts, maintenance, quotes
from tests.browser.test_pages import THEMES, check, market, open_page  # noqa: F401 - a fixture
from tests.factories import actor

pytestmark = [pytest.mark.browser, pytest.mark.django_db(transaction=True)]
DAY = timedelta(days=1)


def work(world):
    """Announced on one of two hosts; a reserved and an on-demand contract are told."""
    now = timezone.now().replace(second=0, microsecond=0)
    buyer = actor(world["customer"])
    asked = quotes.Request("reserved", 16, starts_at=now + DAY, ends_at=now + 30 * DAY)
    contract = contracts.accept(buyer, quotes.quote(buyer, world["listing"].pk, asked, now=now).pk, now=now)
    operator = actor(world["listing"].organization)
    row = maintenance.draft(
        operator, world["listing"].site, scope="hosts", hosts=world["hosts"][:1], starts_at=now + 10 * DAY,
        ends_at=now + 10 * DAY + timedelta(hours=4), text="New fans in the second row of the north hall.",
        impact="Jobs there move; one switch restarts.", now=now,
    )  # fmt: skip
    return contract, maintenance.announce(operator, row, now=now)


@pytest.mark.parametrize(("width", "theme"), THEMES)
def test_no_page_on_maintenance_breaks_a_rule_or_overflows(chromium, market, width, theme):  # noqa: F811
    contract, row = work(market)
    maintenance.feeds.issue(actor(market["customer"]), "The team's calendar", now=timezone.now())
    rate = quotes.quote(
        actor(market["customer"]), market["listing"].pk, quotes.Request("on_demand", 8), now=timezone.now()
    )
    paths = [
        "/maintenance", f"/maintenance/{row.public_id}", f"/contracts/{contract.public_id}",
        f"/listings/{market['listing'].public_id}", f"/quotes/{rate.public_id}",
    ]  # fmt: skip
    found = check(open_page(chromium, market, width=width, theme=theme), market["url"], paths, width)
    assert not found, "\n".join(found)
    desk = open_page(chromium, {**market, "customer": market["listing"].organization}, width=width, theme=theme)
    for path in ("", "add/", f"{row.pk}/change/", f"{row.pk}/extend/"):
        assert desk.goto(f"{market['url']}/operator/marketplace/maintenance/{path}").status == 200, path
    assert not [problem for problem in desk.problems if "404" not in problem]
