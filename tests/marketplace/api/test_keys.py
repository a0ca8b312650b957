"""API keys: shown once, scoped, expiring, revocable."""

from datetime import timedelta

import pytest
from django.utils import timezone

from marketplace.models import ApiKey, IdempotencyKey
from tests import factories

pytestmark = pytest.mark.django_db


def code(response):
    return response.status_code, response.json()["code"]


def issue(api, **body):
    return api.post("/api/v1/keys", {"name": "ci", "scopes": ["keys:read"], **body}, format="json")


def test_a_key_is_shown_once_and_opens_what_its_scopes_say():
    boss = factories.client(factories.organization())
    made = issue(boss).json()
    assert made["token"].startswith("tr_live_")
    assert made["token"].startswith(made["prefix"])
    shown = boss.get(f"/api/v1/keys/{made['id']}").json()
    assert "token" not in shown
    partner = factories.client(key=made["token"])
    assert partner.get("/api/v1/keys").json()["data"][0]["id"] == made["id"]
    assert code(partner.get("/api/v1/members")) == (403, "scope_missing")
    assert "members:read" in partner.get("/api/v1/members").json()["detail"]
    assert ApiKey.objects.get().last_used_at is not None


def test_an_unknown_a_revoked_and_an_expired_key_are_refused_everywhere():
    organization = factories.organization()
    boss = factories.client(organization)
    row, token = factories.key(organization)
    late = factories.key(organization, expires_at=timezone.now() - timedelta(seconds=1))[1]
    assert factories.client(key=token).get("/api/v1/keys").status_code == 200
    assert boss.delete(f"/api/v1/keys/{row.public_id}").status_code == 204
    assert boss.delete(f"/api/v1/keys/{row.public_id}").status_code == 204
    for bad in (token, late, "tr_live_never"):
        response = factories.client(key=bad).get("/api/v1/keys")
        assert code(response) == (401, "key_invalid")
        assert response["WWW-Authenticate"] == "Bearer"
    assert boss.get(f"/api/v1/keys/{row.public_id}").json()["revoked_at"]


def test_a_key_cannot_make_a_stronger_one():
    organization = factories.organization()
    weak = factories.client(key=factories.key(organization, ["keys:write"])[1])
    assert code(issue(weak, scopes=["billing:write"])) == (403, "forbidden")
    assert issue(weak, scopes=["keys:write"]).status_code == 201


@pytest.mark.parametrize(
    "body",
    [{"scopes": []}, {"scopes": ["fly"]}, {"name": ""}, {"expires_at": "2001-01-01T00:00:00Z"}, {"expires_at": "soon"}],
)
def test_wrong_bodies(body):
    assert code(issue(factories.client(factories.organization()), **body)) == (400, "invalid_request")
    assert not ApiKey.objects.exists()


def test_a_replayed_answer_does_not_show_the_token_again():
    boss = factories.client(factories.organization())
    body = {"name": "ci", "scopes": ["keys:read"]}
    first = boss.post("/api/v1/keys", body, format="json", HTTP_IDEMPOTENCY_KEY="k")
    again = boss.post("/api/v1/keys", body, format="json", HTTP_IDEMPOTENCY_KEY="k")
    assert first.json()["token"]
    assert again.json()["token"] is None
    assert again.json()["id"] == first.json()["id"]
    assert first.json()["token"] not in str(IdempotencyKey.objects.values())


def test_a_test_tenants_key_says_so():
    assert issue(factories.client(factories.organization(livemode=False))).json()["token"].startswith("tr_test_")
