"""The card: to Stripe's page and back, with our sandbox of Stripe behind a real socket."""

import pytest

from billing.models import BillingAccount
from marketplace.models import BillingStanding
from tests import factories
from tests.billing.conftest import _stripe_process, stripe_api  # noqa: F401 - fixtures

pytestmark = pytest.mark.django_db(transaction=True)


def text(response) -> str:
    return response.content.decode()


def test_to_stripe_and_back_to_where_one_was_going(stripe_api, market, browser):  # noqa: F811
    poor = factories.organization("New Labs", standing="no_card")
    client = browser(poor)
    client.get("/billing/card?next=/quotes/quo_x")
    response = client.post("/billing/card")
    assert response.status_code == 302
    assert response["Location"].startswith(stripe_api.url)
    assert client.get("/billing/card?added=1")["Location"] == "/billing/card"  # came back without adding one
    account = BillingAccount.objects.get(organization=poor)
    assert not account.payment_method
    stripe_api.attach_card(account.stripe_customer)
    assert client.get("/billing/card?added=1")["Location"] == "/quotes/quo_x"
    assert BillingStanding.objects.get(organization=poor).state == "good"
    page = text(client.get("/billing/card"))
    assert "Visa ending in 4242" in page
    assert "is on file" in page
    assert client.post("/billing/portal")["Location"].startswith(stripe_api.url)


def test_who_may_only_read_cannot_make_a_card_count_by_coming_back(stripe_api, market, browser):  # noqa: F811
    poor = factories.organization("New Labs", standing="no_card")
    browser(poor).post("/billing/card")
    stripe_api.attach_card(BillingAccount.objects.get(organization=poor).stripe_customer)
    assert browser(poor, "admin").get("/billing/card?added=1").status_code == 200
    assert BillingStanding.objects.get(organization=poor).state == "no_card"
    assert browser(poor, "admin").post("/billing/card").status_code == 403


def test_without_stripe_the_page_says_so_and_nothing_breaks(stripe_api, market, browser):  # noqa: F811
    poor = factories.organization("New Labs", standing="no_card")
    client = browser(poor)
    client.post("/billing/card")
    stripe_api.control("faults", {"api": [{"kind": "500", "times": 100}]})
    assert "Stripe does not answer just now" in text(client.get("/billing/card?added=1", follow=True))
    assert "The payment service does not answer" in text(client.post("/billing/card", follow=True))
    assert "The payment service does not answer" in text(client.post("/billing/portal", follow=True))
    assert not BillingAccount.objects.get(organization=poor).payment_method
