"""A quote that is refused, and a contract whose GPUs cannot be used: what a customer reads then, without a violation of axe's rules."""

from datetime import timedelta

import pytest
from axe_playwright_python.sync_playwright import Axe
from django.utils import timezone

from marketplace.models import Shortfall
from marketplace.services import contracts, quotes
from tests import factories
from tests.browser.test_pages import THEMES, check, market, open_page  # noqa: F401 - a fixture

pytestmark = [pytest.mark.browser, pytest.mark.django_db(transaction=True)]
DAY = timedelta(days=1)


def reserved(world, who, **window):
    buyer = factories.actor(who)
    made = quotes.quote(buyer, world["listing"].pk, quotes.Request("reserved", 8, **window), now=timezone.now())
    return contracts.accept(buyer, made.pk, now=timezone.now())


@pytest.mark.parametrize(("width", "theme"), THEMES)
def test_the_nearest_offers_are_a_table_and_each_opens_the_form_filled_in(chromium, market, width, theme):  # noqa: F811
    now = timezone.now().replace(second=0, microsecond=0)
    site, rival = market["listing"].site, factories.organization("Rival Labs")
    factories.listing(site, hosts=[factories.host(site, beat_at=now) for _ in range(2)], title="Another hall")
    for _ in range(2):
        reserved(market, rival, starts_at=now + 10 * DAY, ends_at=now + 20 * DAY)
    page = open_page(chromium, market, width=width, theme=theme)
    page.goto(f"{market['url']}/listings/{market['listing'].public_id}/quote")
    page.locator("input[name=kind][value=reserved]").check()
    page.get_by_label("GPUs", exact=True).fill("16")
    page.locator("[name=starts_at]").fill(f"{now + 12 * DAY:%Y-%m-%dT%H:%M}")
    page.locator("[name=ends_at]").fill(f"{now + 14 * DAY:%Y-%m-%dT%H:%M}")
    page.get_by_role("button", name="Get the quote").click()
    page.get_by_role("heading", name="What would fit, the nearest first").wait_for()
    assert not [v["id"] for v in Axe().run(page).response["violations"]]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.get_by_role("link", name="Later").click()
    page.wait_for_url("**starts_at=*")
    page.get_by_role("button", name="Get the quote").click()
    page.get_by_role("button", name="Accept and sign").wait_for()  # what is offered is had
    assert not [problem for problem in page.problems if "409" not in problem]


@pytest.mark.parametrize(("width", "theme"), THEMES)
def test_missing_gpus_stand_on_top_of_the_contracts_page(chromium, market, width, theme):  # noqa: F811
    now = timezone.now().replace(second=0, microsecond=0)
    contract = reserved(market, market["customer"], ends_at=now + 3 * DAY)
    host = contract.reservation.blocks.get().host
    Shortfall.objects.create(contract=contract, host=host, gpus=8, starts_at=now - DAY, ends_at=now + DAY)
    page = open_page(chromium, market, width=width, theme=theme)
    assert not check(page, market["url"], [f"/contracts/{contract.public_id}"], width)
    page.get_by_text("8 of its 8 GPUs cannot be used").wait_for()
