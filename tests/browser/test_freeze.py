"""The freeze's button and its banner: one click freezes, one lifts; no overflow, no foreign host."""

import os
from pathlib import Path

import pytest

from marketplace.models import PowerFreeze
from tests import factories
from tests.browser.test_pages import THEMES, market, open_page  # noqa: F401 - a fixture

pytestmark = [pytest.mark.browser, pytest.mark.django_db(transaction=True)]


@pytest.mark.parametrize(("width", "theme"), THEMES)
def test_the_button_and_where_it_is_seen(chromium, market, width, theme):  # noqa: F811
    site = market["listing"].site

    def shot(desk, name):
        assert desk.evaluate("document.documentElement.scrollWidth") <= width, name
        if folder := os.environ.get("SCREENSHOTS"):
            desk.screenshot(path=str(Path(folder) / f"{name}-{width}-{theme}.png"), full_page=True)

    staff = open_page(chromium, {**market, "person": factories.staff()}, width=width, theme=theme)
    assert staff.goto(f"{market['url']}/staff/").status == 200
    shot(staff, "staff")
    staff.fill("#freeze-reason", "flood at the substation")
    staff.click("text=Freeze all power")
    staff.wait_for_selector("text=Let sites go on")
    shot(staff, "staff-frozen")
    staff.goto(f"{market['url']}/staff/marketplace/site/")
    shot(staff, "staff-sites")
    staff.goto(f"{market['url']}/staff/marketplace/powerfreeze/")
    shot(staff, "staff-freezes")
    desk = open_page(chromium, {**market, "customer": site.organization}, width=width, theme=theme)
    for name, path in {"desk": "", "sites": "marketplace/site/", "site": f"marketplace/site/{site.pk}/change/"}.items():
        assert desk.goto(f"{market['url']}/operator/{path}").status == 200, path
        assert "flood at the substation" in desk.inner_text("body"), path
        shot(desk, name)
    staff.goto(f"{market['url']}/staff/")
    staff.click("text=Let sites go on")
    staff.wait_for_selector("text=Freeze all power")
    assert PowerFreeze.objects.get().ended_at is not None
    assert not [problem for page in (staff, desk) for problem in page.problems if "404" not in problem]
