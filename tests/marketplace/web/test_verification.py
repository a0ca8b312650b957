"""The page Verification: what is asked, what is told, and who sees it."""

from datetime import timedelta

import pytest
from django.utils import timezone

from marketplace.models import BusinessProfile, Screening
from tests import factories

pytestmark = pytest.mark.django_db
FORM = {
    "legal_name": "Lumen Labs Inc.", "registration_number": "C-4711", "address": "1 Main St", "website": "",
    "beneficial_owners": "Ada Park\r\n\r\n Ben Ode ", "end_use": "training", "end_use_countries": "us, DE",
}  # fmt: skip


@pytest.fixture
def fresh():
    return factories.organization("Lumen Labs", screened=False)


def test_told_once_it_is_shown_and_asked(fresh, browser):
    page = browser(fresh, "admin")
    assert (
        "Tell us legal name, registration number and registered address." in page.get("/verification").content.decode()
    )
    answer = page.post("/verification", FORM, follow=True)
    assert "Thank you." in answer.content.decode()
    profile = BusinessProfile.objects.owned_by(fresh.pk).get()
    assert (profile.beneficial_owners, profile.end_use_countries) == (["Ada Park", "Ben Ode"], ["DE", "US"])
    shown = page.get("/verification").content.decode()
    assert "It is being checked." in shown
    assert "Ada Park\nBen Ode" in shown


@pytest.mark.parametrize(
    ("field", "value"), [("beneficial_owners", " \n "), ("end_use_countries", "USA"), ("legal_name", "")]
)
def test_what_is_wrong_stands_beside_its_field(fresh, browser, field, value):
    answer = browser(fresh).post("/verification", {**FORM, field: value})
    assert answer.status_code == 400
    assert answer.context["form"].errors.keys() == {field}
    assert not Screening.objects.exists()


def test_a_test_tenant_and_a_viewer(browser):
    tenant = factories.organization(livemode=False)
    assert "test tenant" in browser(tenant).get("/verification").content.decode()
    assert browser(factories.organization(), "engineer").get("/verification").status_code == 403
    seen = browser(factories.organization(), "billing").get("/verification").content.decode()
    assert "Owners and admins tell" in seen


def test_the_quotes_page_leads_there(market, browser):
    fresh = factories.organization(screened=False)
    page = browser(fresh)
    until = timezone.now() + timedelta(minutes=15)
    quote = factories.quote(market.listing, fresh, gpu_count=17, ends_at=None, firm_until=until)
    answer = page.post(f"/quotes/{quote.public_id}/accept")
    assert answer.status_code == 409
    assert 'href="/verification"' in answer.content.decode()
