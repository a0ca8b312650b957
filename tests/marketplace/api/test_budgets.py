import pytest

from marketplace.models import AuditEvent, Budget
from marketplace.services import spending
from tests import factories as f
from tests.factories import NOW

pytestmark = pytest.mark.django_db
URL = "/api/v1/budget"


@pytest.fixture
def customer():
    return f.organization("Lumen Labs")


def test_nothing_is_set_until_somebody_sets_it(customer):
    assert f.client(customer, role="admin").get(URL).json() == {
        "object": "budget", "hourly": None, "running": {"amount_minor": 0, "currency": "USD"}, "monthly": None, "month": None,
        "spent": {"amount_minor": 0, "currency": "USD"}, "measured_at": None, "told_percent": 0,
    }  # fmt: skip
    assert not Budget.objects.exists()


@pytest.mark.parametrize(("role", "status"), [("owner", 200), ("billing", 200), ("admin", 403), ("engineer", 403)])
def test_owners_and_billing_people_set_it(customer, role, status):
    answer = f.client(customer, role=role).patch(URL, {"monthly_minor": 50_000}, format="json")
    assert answer.status_code == status
    assert Budget.objects.filter(organization=customer, monthly_minor=50_000).exists() == (status == 200)
    assert AuditEvent.objects.filter(organization=customer, verb="budget.changed").exists() == (status == 200)


def test_what_is_not_named_stays_and_null_takes_a_limit_away(customer):
    api = f.client(customer)
    api.patch(URL, {"monthly_minor": 50_000, "hourly_minor": 900}, format="json")
    body = api.patch(URL, {"monthly_minor": None}, format="json").json()
    assert (body["hourly"], body["monthly"]) == ({"amount_minor": 900, "currency": "USD"}, None)
    for wrong in ({"monthly_minor": -1}, {"monthly_minor": "x"}, {"weekly_minor": 3}, {"hourly_minor": 10**15}):
        assert api.patch(URL, wrong, format="json").status_code == 400
    assert api.get(URL).json() == body


def test_a_stranger_sees_and_sets_their_own(customer):
    spending.set_limits(f.actor(customer), customer, now=NOW, monthly_minor=50_000)
    stranger = f.client(f.organization("Rival"))
    assert stranger.get(URL).json()["monthly"] is None
    stranger.patch(URL, {"monthly_minor": 7}, format="json")
    assert Budget.objects.get(organization=customer).monthly_minor == 50_000


def test_what_runs_is_shown_in_the_organizations_currency():
    customer = f.organization(currency="JPY")
    site = f.site()
    host = f.host(site)
    contract = f.contract(f.listing(site, hosts=[host]), customer, price=300_000_000, currency="JPY", kind="on_demand")
    held = f.contract(f.listing(site), customer, price=9_000_000_000, currency="JPY", kind="reserved")
    f.placement(f.job(contract, gpus=2, state="running"), host, [0, 1], state="running")
    f.placement(f.job(held, gpus=1, state="running"), host, [2], state="running")
    assert f.client(customer).get(URL).json()["running"] == {"amount_minor": 600, "currency": "JPY"}
