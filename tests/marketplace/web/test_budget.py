"""The budget's page: what the month has come to, and the limits that owners and billing people set."""

from datetime import timedelta

import pytest
from django.utils import timezone

from marketplace.models import Budget
from marketplace.services import spending
from tests import factories

pytestmark = pytest.mark.django_db
HERE = "/billing/budget"


def text(response) -> str:
    return response.content.decode()


def month(moment):
    return moment.date().replace(day=1)


def test_it_is_set_in_the_major_unit_and_shown_with_what_is_spent(market, browser):
    client = browser(market.customer, "billing")
    assert "No budget is set for the month." in text(client.get(HERE))
    assert client.post(HERE, {"monthly": "1200.50", "hourly": ""})["Location"] == HERE
    row = Budget.objects.get()
    assert (row.monthly_minor, row.hourly_minor) == (120_050, None)
    now = timezone.now()
    spending.record_spend(market.customer.pk, month=month(now), spent_minor=60_025, now=now)
    page = text(client.get(HERE))
    assert "$600.25" in page
    assert "of $1,200.50, 50 %" in page
    assert 'value="1200.50"' in page
    assert "used up" not in page
    spending.record_spend(market.customer.pk, month=month(now), spent_minor=130_000, now=now)
    page = text(client.get(HERE))
    assert "of $1,200.50, 108 %" in page
    assert "It is used up" in page


def test_last_months_spend_is_not_this_months(market, browser):
    now = timezone.now()
    spending.set_limits(factories.actor(market.customer), market.customer, now=now, monthly_minor=100)
    old = now.replace(day=1) - timedelta(days=3)
    spending.record_spend(market.customer.pk, month=month(old), spent_minor=100, now=old)
    page = text(browser(market.customer).get(HERE))
    assert "used up" not in page
    assert "measured within a minute" in page


def test_who_may_only_read_gets_no_form(market, browser):
    client = browser(market.customer, "admin")
    assert "<form class=" not in text(client.get(HERE))
    assert client.post(HERE, {"monthly": "5"}).status_code == 403
    assert browser(market.customer, "engineer").get(HERE).status_code == 403


@pytest.mark.parametrize("wrong", ["-1", "1.234", "much"])
def test_what_is_no_amount_is_said_beside_the_field(market, browser, wrong):
    response = browser(market.customer).post(HERE, {"monthly": wrong, "hourly": ""})
    assert response.status_code == 400
    assert "errorlist" in text(response)
    assert not Budget.objects.exists()
