"""Organizations, card, team, keys, usage and invoices on the pages; errors; and the rules of every page."""

import re
from datetime import UTC, datetime, timedelta

import pytest
from django.test import Client
from django.urls import get_resolver
from django.utils import timezone

from billing.models import BillingAccount, Invoice
from marketplace.models import ApiKey, Invitation, Membership, Organization
from marketplace.web import charts, tags
from tests import factories

pytestmark = pytest.mark.django_db


def text(response) -> str:
    return response.content.decode()


def test_sign_up_leads_to_an_organization_and_that_to_the_card(market, browser):
    client = browser()
    response = client.post(
        "/accounts/signup/",
        {"email": "ada@example.org", "password1": "correct-horse-battery", "next": "/organizations/new"},
    )
    assert response["Location"] == "/organizations/new"
    response = client.post(
        "/organizations/new", {"name": "Ada Labs", "country": "us", "currency": "USD", "mode": "live"}
    )
    assert response["Location"] == "/billing/card"
    made = Organization.objects.get(name="Ada Labs")
    assert (made.country, made.livemode) == ("US", True)
    assert Membership.objects.get(organization=made).role == "owner"
    assert "No card yet" in text(client.get("/billing/card"))


def test_without_an_organization_a_page_leads_to_one_and_back(market, browser):
    client = browser(person=factories.user())
    response = client.get(f"/listings/{market.listing.public_id}/quote")
    assert response["Location"] == f"/organizations/new?next=%2Flistings%2F{market.listing.public_id}%2Fquote"
    response = client.post(
        response["Location"],
        {"name": "X", "country": "US", "currency": "USD", "mode": "live", "next": "//evil.example/"},
    )
    assert response["Location"] == "/billing/card"  # never to a page that is not ours


def test_switching_acts_in_the_other_organization_and_only_in_ones_own(market, browser):
    person = factories.user()
    factories.member(market.customer, "owner", person)
    second = factories.organization("Second Labs")
    factories.member(second, "viewer", person)
    client = browser(person=person)
    assert client.post(f"/organizations/{second.public_id}/switch").status_code == 302
    assert "Second Labs, " in text(client.get("/team"))
    assert client.get("/jobs/new").status_code == 403  # a viewer here
    stranger = factories.organization()
    assert client.post(f"/organizations/{stranger.public_id}/switch").status_code == 404


def test_a_key_is_shown_once_and_never_again(market, browser):
    client = browser(market.customer)
    response = client.post("/keys", {"name": "ci", "scopes": ["jobs:read", "jobs:write"]})
    token = re.search(r"tr_live_[\w-]+", text(response))[0]
    key = ApiKey.objects.get()
    assert key.scopes == ["jobs:read", "jobs:write"]
    assert response["Cache-Control"] == "no-store"
    assert token not in text(client.get("/keys"))
    client.post(f"/keys/{key.public_id}/revoke")
    key.refresh_from_db()
    assert key.revoked_at is not None


def test_no_key_may_do_more_than_who_made_it(market, browser):
    admin = browser(market.customer, "admin")  # may not write billing
    response = admin.post("/keys", {"name": "x", "scopes": ["billing:write"]})
    assert response.status_code == 400
    assert not ApiKey.objects.exists()
    assert browser(market.customer, "engineer").post("/keys", {"name": "x", "scopes": ["jobs:read"]}).status_code == 403


def test_invite_join_change_remove(market, browser):
    owner = browser(market.customer)
    page = text(owner.post("/team/invite", {"email": "grace@example.org", "role": "engineer"}))
    link = re.search(r"/join\?token=[\w-]+", page)[0]
    assert link not in text(owner.get("/team"))
    grace = factories.user("grace@example.org")
    client = browser(person=grace)
    token = link.partition("=")[2]
    assert token in text(client.get(link))
    assert client.post("/join", {"token": token}).status_code == 302
    member = Membership.objects.get(user=grace)
    assert member.role == "engineer"
    assert client.post("/join", {"token": token}).status_code == 410
    owner.post(f"/team/{member.public_id}/role", {"role": "viewer"})
    member.refresh_from_db()
    assert member.role == "viewer"
    owner.post(f"/team/{member.public_id}/remove")
    assert not Membership.objects.filter(user=grace).exists()


def test_the_last_owner_stays_and_is_told_why(market, browser):
    client = browser(market.customer)
    owner = Membership.objects.get(organization=market.customer)
    page = text(client.post(f"/team/{owner.public_id}/role", {"role": "viewer"}, follow=True))
    assert "An organization keeps at least one owner" in page
    owner.refresh_from_db()
    assert owner.role == "owner"


def test_strangers_touch_no_member_and_no_invitation(market, browser):
    member = factories.member(market.customer, "viewer")
    invitation = Invitation.objects.create(
        organization=market.customer, email="x@example.org", role="viewer", digest="d", expires_at=timezone.now()
    )
    stranger = browser(factories.organization())
    assert stranger.post(f"/team/{member.public_id}/remove").status_code == 404
    assert stranger.post(f"/team/invitations/{invitation.public_id}/withdraw").status_code == 404
    assert (
        browser(market.customer, "engineer").post("/team/invite", {"email": "a@b.co", "role": "viewer"}).status_code
        == 403
    )


def invoice(organization, **fields):
    account, _ = BillingAccount.objects.get_or_create(
        organization=organization, defaults={"currency": "USD", "created_at": factories.NOW}
    )
    return Invoice.objects.create(
        account=account, organization=organization, kind="period", legal_entity="Tailrace Inc.", currency="USD",
        period_start=factories.NOW - timedelta(days=30), period_end=factories.NOW, created_at=factories.NOW, **fields,
    )  # fmt: skip


def test_invoices_are_their_owners_and_billing_peoples(market, browser):
    row = invoice(market.customer)
    for role in ("owner", "admin", "billing"):
        client = browser(market.customer, role)
        assert row.public_id in text(client.get("/invoices"))
        assert client.get(f"/invoices/{row.public_id}").status_code == 200
        answer = client.get(f"/invoices/{row.public_id}/usage.csv")
        assert b"".join(answer.streaming_content).startswith(b"line,contract,placement")
    assert browser(market.customer, "engineer").get(f"/invoices/{row.public_id}").status_code == 403
    stranger = browser(factories.organization())
    for path in ("", "/usage.csv"):
        assert stranger.get(f"/invoices/{row.public_id}{path}").status_code == 404
    assert stranger.post(f"/invoices/{row.public_id}/pay").status_code == 404
    page = browser(market.customer).post(f"/invoices/{row.public_id}/pay", follow=True)
    assert "only an open one can be paid" in text(page)


def test_usage_counts_running_seconds_in_the_period_so_far(market, browser):
    began = timezone.now() - timedelta(hours=2)
    contract = market.contract(starts_at=began - timedelta(days=1), created_at=began)
    job = factories.job(contract, state="running")
    factories.placement(job, market.hosts[0], [0, 1], state="running", running_at=began)
    page = text(browser(market.customer).get("/usage"))
    assert re.search(r"\$(9\.9\d|10\.0\d)", page)  # 2 GPUs x 2 h x 2.50
    assert "$" not in re.sub(r"<script.*?</script>", "", text(browser(market.customer, "engineer").get("/usage")))


def test_amounts_and_prices_are_exact():
    assert tags.price(2_490_000) == "$2.49"
    assert tags.price(125_500) == "$0.1255"
    assert tags.amount(-123_456) == "−$1,234.56"
    assert tags.amount(500, "JPY") == "¥500"
    assert tags.gpu_hours(5_400_000) == "1.500"
    assert tags.span(7320) == "2 h 2 min"


def test_a_chart_speaks():
    day = datetime(2026, 11, 1, tzinfo=UTC).date()
    svg = charts.bars(
        [(day, 7_200_000), (day + timedelta(days=1), 0)], label="two <days>", unit="GPU-hours", per_unit=3_600_000
    )
    assert "1 Nov: 2.0 GPU-hours" in svg
    assert "two &lt;days&gt;" in svg
    assert "style=" not in svg


def test_errors_have_pages(market, browser):
    missing = browser().get("/contracts/nothing/here")
    assert missing.status_code == 404
    assert "There is no such page" in text(missing)
    refused = browser(market.customer, "viewer").post("/team/invite", {})
    assert refused.status_code == 403
    assert "The role viewer may not do members:write" in text(refused)
    assert browser(market.customer).put("/jobs").status_code == 405


def pages() -> list[str]:
    return ["/", "/contracts", "/jobs", "/jobs/new", "/usage", "/invoices", "/billing/card", "/team", "/keys",
                        "/organizations/new", "/join", "/accounts/2fa/"]  # fmt: skip


def test_the_policy_is_strict_and_the_pages_keep_it(market, browser):
    """No inline style or handler, no script but files of ours, no other host named."""
    job = factories.job(market.contract(), name="x")
    quote = factories.quote(market.listing, market.customer)
    client: Client = browser(market.customer)
    rows = [f"/{row._meta.model_name}s/{row.public_id}" for row in (market.listing, quote, job, job.contract)]
    for path in (*pages(), *rows, f"/listings/{market.listing.public_id}/quote", "/?count=99"):
        response = client.get(path)
        policy, page = response["Content-Security-Policy"], text(response)
        assert response.status_code == 200, path
        assert "style-src 'self'" in policy
        assert "unsafe" not in policy
        assert not re.search(r"\sstyle=|\son\w+=|<style|javascript:", page), path
        assert not re.search(r"<script(?![^>]*\ssrc=\"/static/)", page), path
        assert not re.search(r"(src|href)=\"(https?:)?//", page), path
        assert page.count("<h1") == 1, path


def test_every_page_names_its_action():
    """Whoever adds a page without `@page` opens it to everybody; the matrix could not tell."""
    resolver = next(r for r in get_resolver().url_patterns if getattr(r, "namespace", None) == "web")
    bare = [p.name for p in resolver.url_patterns if not getattr(p.callback, "actions", None)]
    assert not bare
