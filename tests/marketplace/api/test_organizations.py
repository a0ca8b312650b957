"""Organizations and people over the API: shapes, ids, errors, idempotency."""

import base64

import pytest

from marketplace.models import AuditEvent, IdempotencyKey, Invitation, Membership, Organization
from tests import factories

pytestmark = pytest.mark.django_db


def code(response):
    return response.status_code, response.json()["code"]


def test_a_person_without_an_organization_makes_one_and_acts_in_it():
    person = factories.user()
    api = factories.client(user=person)
    assert code(api.get("/api/v1/sites")) == (409, "organization_required")
    response = api.post(
        "/api/v1/organizations", {"name": "Acme", "currency": "eur", "is_operator": True}, format="json"
    )
    assert response.status_code == 201
    body = response.json()
    assert (body["object"], body["currency"], body["role"], body["verification"]) == (
        "organization",
        "EUR",
        "owner",
        "new",
    )
    assert api.get("/api/v1/sites").status_code == 200
    assert [row["id"] for row in api.get("/api/v1/organizations").json()["data"]] == [body["id"]]
    assert api.get(f"/api/v1/organizations/{body['id']}").json()["name"] == "Acme"


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "/name"),
        ({"name": "x", "country": "USA"}, "/country"),
        ({"name": "x", "currency": "$"}, "/currency"),
        ({"name": "x", "colour": "red"}, "/colour"),
        ({"name": "x", "is_customer": False}, "/is_customer"),
        ({"name": "x\x00y"}, "/name"),
    ],
)
def test_a_wrong_field_is_named(body, pointer):
    response = factories.client(user=factories.user()).post("/api/v1/organizations", body, format="json")
    assert response.status_code == 400
    assert response["Content-Type"] == "application/problem+json"
    assert pointer in [e["pointer"] for e in response.json()["errors"]]
    assert not Organization.objects.exists()


def test_update_and_switch():
    first, second = factories.organization("First"), factories.organization("Second")
    person = factories.member(first, "owner").user
    factories.member(second, "viewer", person)
    api = factories.client(user=person)
    assert api.patch(f"/api/v1/organizations/{first.public_id}", {"name": "New"}, format="json").json()["name"] == "New"
    assert code(api.patch(f"/api/v1/organizations/{second.public_id}", {"name": "x"}, format="json")) == (
        404,
        "not_found",
    )
    assert api.post(f"/api/v1/organizations/{second.public_id}/switch").json()["role"] == "viewer"
    assert code(api.patch(f"/api/v1/organizations/{second.public_id}", {"name": "x"}, format="json")) == (
        403,
        "forbidden",
    )
    assert code(api.post("/api/v1/organizations/org_000000000000/switch")) == (404, "not_found")
    assert code(api.post("/api/v1/organizations/nonsense/switch")) == (404, "not_found")


def test_inviting_and_joining():
    organization = factories.organization()
    boss = factories.client(organization)
    made = boss.post("/api/v1/invitations", {"email": "bob@example.org", "role": "engineer"}, format="json")
    assert made.status_code == 201
    assert made["Cache-Control"] == "no-store"
    token = made.json()["token"]
    assert "token" not in boss.get("/api/v1/invitations").json()["data"][0]
    bob = factories.client(user=factories.user("bob@example.org"))
    joined = bob.post("/api/v1/invitations/accept", {"token": token}, format="json").json()
    assert (joined["email"], joined["role"]) == ("bob@example.org", "engineer")
    assert code(bob.post("/api/v1/invitations/accept", {"token": token}, format="json")) == (410, "invitation_invalid")
    assert bob.get("/api/v1/members").json()["data"][1]["id"] == joined["id"]


def test_withdrawing_an_invitation():
    organization = factories.organization()
    boss = factories.client(organization)
    made = boss.post("/api/v1/invitations", {"email": "bob@example.org", "role": "viewer"}, format="json").json()
    assert boss.delete(f"/api/v1/invitations/{made['id']}").status_code == 204
    assert not Invitation.objects.exists()


def test_roles_and_removal():
    organization = factories.organization()
    owner = factories.member(organization, "owner")
    viewer = factories.member(organization, "viewer")
    boss, admin = factories.client(user=owner.user), factories.client(organization, "admin")
    url = f"/api/v1/members/{viewer.public_id}"
    assert boss.patch(url, {"role": "billing"}, format="json").json()["role"] == "billing"
    assert code(admin.patch(url, {"role": "owner"}, format="json")) == (403, "forbidden")
    assert code(boss.patch(f"/api/v1/members/{owner.public_id}", {"role": "viewer"}, format="json")) == (
        409,
        "last_owner",
    )
    assert boss.delete(url).status_code == 204
    assert code(boss.get(url)) == (404, "not_found")
    assert Membership.objects.filter(organization=organization).count() == 2


def test_the_audit_trail_is_for_those_who_run_the_house():
    organization = factories.organization()
    boss = factories.client(organization)
    boss.patch(f"/api/v1/organizations/{organization.public_id}", {"name": "New"}, format="json")
    page = boss.get(f"/api/v1/audit-events?subject={organization.public_id}&verb=organization.updated").json()
    assert [(e["verb"], e["after"]) for e in page["data"]] == [("organization.updated", {"name": "New"})]
    assert code(factories.client(organization, "viewer").get("/api/v1/audit-events")) == (403, "forbidden")


def test_a_list_goes_on_where_it_stopped_and_refuses_what_it_does_not_know():
    organization = factories.organization()
    for _ in range(4):
        factories.member(organization, "viewer")
    api = factories.client(organization)
    seen, cursor = [], ""
    while True:
        page = api.get("/api/v1/members", {"limit": "2", **({"cursor": cursor} if cursor else {})}).json()
        seen += [row["id"] for row in page["data"]]
        cursor = page["cursor"]
        if not page["has_more"]:
            break
    assert len(seen) == len(set(seen)) == 5
    assert code(api.get("/api/v1/members?limit=0")) == (400, "invalid_request")
    assert code(api.get("/api/v1/members?colour=red")) == (400, "unknown_field")
    assert code(api.get("/api/v1/members?cursor=x")) == (400, "invalid_request")
    far = base64.urlsafe_b64encode(b"[null, Infinity]").decode()
    assert code(api.get(f"/api/v1/members?cursor={far}")) == (400, "invalid_request")


def test_the_same_key_is_the_same_write():
    organization = factories.organization()
    api = factories.client(organization)
    body = {"email": "bob@example.org", "role": "viewer"}
    first = api.post("/api/v1/invitations", body, format="json", HTTP_IDEMPOTENCY_KEY="k1")
    again = api.post("/api/v1/invitations", body, format="json", HTTP_IDEMPOTENCY_KEY="k1")
    assert (again.status_code, again["Idempotent-Replayed"]) == (201, "true")
    assert again.json() == {**first.json(), "token": None}  # a secret is shown once
    assert first.json()["token"] not in str(IdempotencyKey.objects.values())
    other = api.post("/api/v1/invitations", {**body, "role": "admin"}, format="json", HTTP_IDEMPOTENCY_KEY="k1")
    assert code(other) == (422, "idempotency_mismatch")
    assert Invitation.objects.count() == 1
    assert AuditEvent.objects.filter(verb="invitation.created").count() == 1
