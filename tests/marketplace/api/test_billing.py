"""Money over HTTP: invoices, usage, cards, payouts, and our own people's doors; each side sees its own."""

import csv
import io
from datetime import UTC, datetime, timedelta

import pytest

from billing import invoices
from marketplace.models import Placement, PlacementEvent
from tests import factories as f

pytestmark = pytest.mark.django_db
V1 = "/api/v1/"


def error(answer, status, code):
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.json()


@pytest.fixture
def start():
    return datetime.now(UTC).replace(microsecond=0) - timedelta(hours=2)


@pytest.fixture
def contract():
    site = f.site()
    host = f.host(site)
    return f.contract(f.listing(site, hosts=[host]), f.organization())


@pytest.fixture
def ran(contract, start):
    """A placement of 8 GPUs that ran for an hour from `start`."""
    host = contract.listing.hosts.get()
    columns = {"granted_at": start, "running_at": start, "finished_at": start + timedelta(hours=1)}
    placement = f.placement(
        f.job(contract, gpus=8, state="succeeded"), host, state="released",
        release_requested_at=start + timedelta(hours=1), exit_code=0, **columns,
    )  # fmt: skip
    for before, after, at in (("granted", "running", start), ("running", "released", start + timedelta(hours=1))):
        PlacementEvent.objects.create(placement=placement, at=at, actor="agent", from_state=before, to_state=after)
    return placement


@pytest.fixture
def invoice(contract, ran, start):
    end = start + timedelta(minutes=90)
    return invoices.close_period(contract.organization, end, "interim", now=end)


def test_the_preview_is_the_invoice_to_be(contract, ran, start):
    api = f.client(contract.organization, "billing")
    shown = api.get(V1 + "invoices/preview").json()
    assert shown["total"] == {"amount_minor": 8 * 250, "currency": "USD"}
    assert [line["milli_gpu_seconds"] for line in shown["lines"]] == [8 * 3600 * 1000]
    assert Placement.objects.get().metered_through is None  # a look writes no usage


def test_an_invoice_its_lines_and_the_usage_behind_them(contract, invoice, ran, start):
    api = f.client(contract.organization, "billing")
    (row,) = api.get(V1 + "invoices").json()["data"]
    shown = api.get(V1 + f"invoices/{row['id']}").json()
    (line,) = shown["lines"]
    assert shown["total"] == line["amount"] == {"amount_minor": 2_000, "currency": "USD"}
    assert line["operator_share"]["amount_minor"] + line["platform_fee"]["amount_minor"] == 2_000
    assert line["platform_fee"]["amount_minor"] == 300  # 150 permille
    text = api.get(V1 + f"invoices/{row['id']}/usage")
    assert text["content-type"].startswith("text/csv")
    records = list(csv.DictReader(io.StringIO(text.content.decode())))
    assert sum(int(r["milli_gpu_seconds"]) for r in records) == line["milli_gpu_seconds"]
    assert {r["placement"] for r in records} == {ran.public_id}
    assert min(int(r["start"]) for r in records) == int(start.timestamp())
    usage = api.get(V1 + "usage", {"placement": ran.public_id}).json()["data"]
    assert sum(u["quantity"] for u in usage) >= line["milli_gpu_seconds"]


def test_nobody_else_sees_it(contract, invoice):
    for stranger in (f.client(f.organization(), "owner"), f.client(contract.operator, "owner")):
        assert stranger.get(V1 + "invoices").json()["data"] == []
        for path in ("", "/usage"):
            error(stranger.get(V1 + f"invoices/{invoice.public_id}{path}"), 404, "not_found")
        error(stranger.post(V1 + f"invoices/{invoice.public_id}/pay"), 404, "not_found")
    error(f.client(contract.organization, "engineer").post(V1 + f"invoices/{invoice.public_id}/pay"), 403, "forbidden")


def test_the_card_page_leads_back_to_us_alone(contract):
    api = f.client(contract.organization)
    shown = api.get(V1 + "payment-methods").json()
    assert (shown["card"], shown["standing"]) == (None, "good")
    for url in ("https://evil.example/", "http://testserver.evil.example/"):
        error(api.post(V1 + "payment-methods", {"success_url": url}, format="json"), 400, "invalid_request")


def test_payouts_are_operators(contract):
    error(f.client(contract.organization).get(V1 + "payouts/account"), 403, "forbidden")
    shown = f.client(contract.operator).get(V1 + "payouts/account").json()
    assert (shown["transfers_enabled"], shown["waiting"]) == (False, [])
    assert f.client(contract.operator).get(V1 + "payouts").json()["data"] == []


def test_closing_a_period_is_for_staff_and_repeats_nothing(contract, ran, start):
    body = {"organization": contract.organization.public_id, "through": (start + timedelta(minutes=90)).isoformat()}
    error(f.client(contract.organization).post(V1 + "staff/close-period", body, format="json"), 404, "not_found")
    staff = f.client(user=f.staff())
    first = staff.post(V1 + "staff/close-period", body, format="json").json()["invoice"]
    assert first["total"]["amount_minor"] == 2_000
    again = staff.post(V1 + "staff/close-period", body, format="json").json()["invoice"]
    assert again is None or again["id"] == first["id"]
    assert len(f.client(contract.organization).get(V1 + "invoices").json()["data"]) == 1
    health = staff.get(V1 + "staff/invariants").json()
    assert not any(v for k, v in health["invariants"].items())
    assert health["placements"] == {"released": 1}
    assert sum(health["ledger"].values()) == 0
