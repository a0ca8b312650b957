"""A browser's view: the journey by hand and by keyboard, no violation of axe's rules, no overflow at 360 px, nothing from elsewhere."""

from datetime import timedelta
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from django.conf import settings
from django.test import Client
from django.utils import timezone

from billing.models import BillingAccount, Invoice
from marketplace.models import Job, LogChunk, Placement
from marketplace.services import saved
from marketplace.services.search import Filters
from tests import factories

pytestmark = [pytest.mark.browser, pytest.mark.django_db(transaction=True)]
THEMES = [(1440, "light"), (360, "dark")]


@pytest.fixture
def market(live_server: Any) -> Any:
    operator = factories.organization("Caprock Power", is_operator=True)
    site = factories.site(operator)
    hosts = [factories.host(site, beat_at=timezone.now()) for _ in range(2)]
    listing = factories.listing(site, hosts=hosts, title="H100 at Bosque")
    customer = factories.organization("Lumen Labs")
    return {"url": live_server.url, "listing": listing, "customer": customer, "hosts": hosts}


def open_page(
    chromium: Any, market: Any, *, role: str | None = "owner", width: int = 1440, theme: str = "light"
) -> Any:
    """A page of a logged-in member, or of nobody, that fails on console errors, on other hosts, and on broken answers."""
    context = chromium.new_context(viewport={"width": width, "height": 850}, color_scheme=theme)
    if role:
        client = Client()
        client.force_login(market.get("person") or factories.member(market["customer"], role).user)
        cookie = client.cookies[settings.SESSION_COOKIE_NAME].value
        context.add_cookies([{"name": settings.SESSION_COOKIE_NAME, "value": cookie, "url": market["url"]}])
    page = context.new_page()
    page.problems = []
    page.on("console", lambda m: page.problems.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: page.problems.append(str(e)))
    page.on("request", lambda r: None if r.url.startswith((market["url"], "data:")) else page.problems.append(r.url))
    page.on("response", lambda r: page.problems.append(f"{r.status} {r.url}") if r.status >= 500 else None)
    return page


def live_job(market: Any) -> tuple[Job, Placement]:
    began = timezone.now() - timedelta(minutes=10)
    contract = factories.contract(market["listing"], market["customer"], gpu_count=16)
    job = factories.job(contract, gpus=4, name="fine-tune", state="running", started_at=began)
    placement = factories.placement(job, market["hosts"][0], range(4), state="running", running_at=began)
    LogChunk.objects.create(placement=placement, stream="stdout", offset=0, size=6, data="first\n")
    return job, placement


def test_from_the_market_to_a_job(chromium, market):
    page = open_page(chromium, market)
    page.goto(market["url"])
    page.get_by_label("GPUs in one block").fill("8")
    page.get_by_label("GPUs in one block").press("Enter")
    page.wait_for_url("**count=8*")
    page.get_by_role("link", name="Get a quote").click()
    page.get_by_label("GPUs", exact=True).fill("8")
    page.get_by_role("button", name="Get the quote").click()
    page.get_by_role("button", name="Accept and sign").click()
    page.get_by_role("link", name="Submit a job").first.click()
    page.get_by_label("Command").fill("nvidia-smi")
    with page.expect_response("**/jobs/estimate*"):
        page.get_by_label("GPUs per replica").fill("8")
    page.get_by_text("an hour for 8 GPUs").wait_for()
    page.get_by_role("button", name="Submit").click()
    page.get_by_role("heading", name="Why it waits").wait_for()
    assert Job.objects.get().gpus == 8
    assert not page.problems


def test_the_log_and_the_state_follow_without_a_reload(chromium, market):
    job, placement = live_job(market)
    page = open_page(chromium, market)
    page.goto(f"{market['url']}/jobs/{job.public_id}")
    page.locator("#log", has_text="first").wait_for()
    LogChunk.objects.create(placement=placement, stream="stdout", offset=6, size=7, data="second\n")
    page.locator("#log", has_text="second").wait_for()
    now = timezone.now()
    Placement.objects.filter(pk=placement.pk).update(
        state="released", finished_at=now, release_requested_at=now, exit_code=0
    )
    Job.objects.filter(pk=job.pk).update(state="succeeded", finished_at=now, exit_code=0)
    page.locator("#live", has_text="succeeded").wait_for()
    assert page.locator("#log").inner_text().split() == ["first", "second"]
    assert not page.problems


def test_the_keyboard_reaches_the_content_and_the_menu_closes(chromium, market):
    page = open_page(chromium, market)
    page.goto(market["url"])
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.locator("details.menu summary").focus()
    page.keyboard.press("Enter")
    page.get_by_role("link", name="API keys").wait_for()
    page.keyboard.press("Escape")
    assert page.evaluate("document.querySelector('details.menu').open") is False


def test_the_theme_is_kept(chromium, market):
    page = open_page(chromium, market, role=None)
    page.goto(market["url"])
    page.get_by_role("button", name="Switch between light and dark").click()
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


@pytest.mark.parametrize(("width", "theme"), THEMES)
def test_no_page_breaks_a_rule_of_axe_or_overflows(chromium, market, width, theme):
    job, _ = live_job(market)
    Job.objects.filter(pk=job.pk).update(command=["/bin/sh", "-c", "echo " + "a-long-word" * 40])
    listing, customer = market["listing"], market["customer"]
    quote = factories.quote(listing, customer, ends_at=None, firm_until=timezone.now() + timedelta(minutes=15))
    account = BillingAccount.objects.create(organization=customer, currency="USD", created_at=timezone.now())
    invoice = Invoice.objects.create(
        account=account, organization=customer, kind="period", legal_entity="Tailrace Inc.", currency="USD",
        period_start=factories.NOW - timedelta(days=30), period_end=factories.NOW, created_at=factories.NOW,
    )  # fmt: skip
    factories.key(customer)
    kept = saved.save(factories.actor(customer), "eight", Filters(count=8), now=timezone.now())
    paths = [
        "/", "/?count=900", "/?view=calendar&count=9",
        f"/listings/{listing.public_id}?count=9&level=spine", f"/listings/{listing.public_id}/quote", f"/quotes/{quote.public_id}",
        "/contracts", f"/contracts/{job.contract.public_id}", "/jobs", "/jobs/new", f"/jobs/{job.public_id}", "/usage", "/invoices",
        f"/invoices/{invoice.public_id}", "/billing/card", "/searches",
        "/verification", "/billing/budget", "/team", "/keys", "/organizations/new", "/join", "/reliability", "/nothing/here",
    ]  # fmt: skip
    found = check(open_page(chromium, market, width=width, theme=theme), market["url"], paths, width)
    public = [
        f"/searches/unsubscribe/{saved.unsubscribe_token(kept)}",
        "/",
        "/accounts/login/",
        "/accounts/signup/",
        "/accounts/password/reset/",
    ]
    found += check(open_page(chromium, market, role=None, width=width, theme=theme), market["url"], public, width)
    assert not found, "\n".join(found)


def check(page: Any, base: str, paths: list[str], width: int) -> list[str]:
    axe, found = Axe(), []
    for path in paths:
        page.goto(base + path)
        page.evaluate("document.querySelectorAll('main details').forEach((fold) => { fold.open = true })")
        found += [f"{path}: {v['id']}: {v['nodes'][0]['html'][:200]}" for v in axe.run(page).response["violations"]]
        if (wide := page.evaluate("document.documentElement.scrollWidth")) > width:
            found.append(f"{path}: {wide} px wide")
    return [*found, *(p for p in page.problems if "404" not in p)]


def test_the_first_view_is_small(chromium, market):
    """Everything that the market's first view loads, as it is sent without compression."""
    page = open_page(chromium, market, role=None)
    sizes: list[int] = []
    page.on("response", lambda r: sizes.append(len(r.body())))
    page.goto(market["url"], wait_until="networkidle")
    assert sum(sizes) < 110_000, sum(sizes)
