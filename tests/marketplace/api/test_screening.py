"""GET and PUT /verification, and the refusal that leads there."""

from datetime import timedelta

import pytest
from django.utils import timezone

from marketplace.models import Screening
from tests import factories

pytestmark = pytest.mark.django_db
BODY = {
    "legal_name": "Lumen Labs Inc.", "registration_number": "C-4711", "address": "1 Main St", "beneficial_owners": ["Ada Park"],
    "end_use": "training", "end_use_countries": ["us", "DE"],
}  # fmt: skip


@pytest.fixture
def fresh():
    return factories.organization("Lumen Labs", screened=False)


def test_what_is_asked_and_told(fresh):
    api = factories.client(fresh, "admin")
    before = api.get("/api/v1/verification").json()
    assert (before["verification"], before["needed"], before["profile"]) == ("new", True, None)
    assert [(c["kind"], c["state"]) for c in before["checks"]] == [
        ("business", "pending"), ("sanctions", "pending"), ("export", "pending"),
    ]  # fmt: skip
    assert before["checks"][2]["missing"] == ["legal_name", "end_use", "end_use_countries"]
    after = api.put("/api/v1/verification", BODY, format="json", headers={"Idempotency-Key": "v1"})
    assert after.status_code == 200, after.json()
    assert after.json()["profile"]["end_use_countries"] == ["DE", "US"]
    assert {tuple(c["missing"]) for c in after.json()["checks"]} == {()}
    assert Screening.objects.owned_by(fresh.pk).exclude(ask_at=None).count() == 3
    again = api.put("/api/v1/verification", BODY, format="json", headers={"Idempotency-Key": "v1"})
    assert again.json() == after.json()


@pytest.mark.parametrize(
    ("field", "value"),
    [("beneficial_owners", []), ("end_use_countries", ["USA"]), ("legal_name", ""), ("verification", "verified")],
)
def test_what_is_wrong_is_named(fresh, field, value):
    answer = factories.client(fresh).put("/api/v1/verification", {**BODY, field: value}, format="json")
    assert answer.status_code == 400
    assert answer.json()["errors"][0]["pointer"].startswith(f"/{field}")
    assert not Screening.objects.exists()


def test_evidence_and_notes_are_not_for_the_organization(fresh):
    api = factories.client(fresh)
    api.put("/api/v1/verification", BODY, format="json")
    Screening.objects.filter(kind="sanctions").update(
        state="review", needs_person=True, message="Send us the register.", decided_by="dana", provider="acme"
    )
    text = api.get("/api/v1/verification").content.decode()
    assert "Send us the register." in text
    assert "acme" not in text
    assert "dana" not in text


def test_signing_without_it_says_where_to_tell(fresh):
    site = factories.site()
    listing = factories.listing(site, hosts=[factories.host(site)])
    quote = factories.quote(
        listing, fresh, gpu_count=17, ends_at=None, firm_until=timezone.now() + timedelta(minutes=15)
    )  # fmt: skip
    answer = factories.client(fresh).post("/api/v1/contracts", {"quote": quote.public_id}, format="json")
    assert (answer.status_code, answer.json()["code"]) == (409, "screening_required")
    assert answer.json()["screening"]["tell"] == {"method": "PUT", "path": "/api/v1/verification"}
