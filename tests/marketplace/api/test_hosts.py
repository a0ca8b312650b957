"""Hosts over the API."""

import pytest

from tests import factories

pytestmark = pytest.mark.django_db


@pytest.fixture
def operator():
    return factories.organization(is_operator=True)


@pytest.fixture
def api(operator):
    return factories.client(operator, "engineer")


def test_shown_and_filtered(api, operator):
    a, b = factories.site(operator), factories.site(operator)
    host = factories.host(a, leaf="leaf-7")
    factories.host(b, gpu_model=factories.gpu_model("A100", 40_960, 400), state="maintenance")
    factories.host(factories.site())  # somebody else's
    shown = api.get(f"/api/v1/hosts/{host.public_id}").json()
    assert (shown["site"], shown["power_node"], shown["gpus"]) == (a.public_id, "pdu-1", 8)
    assert (shown["gpu_free"], shown["reserved_w"], shown["actions"]) == ([1000] * 8, 1100, ["drain"])
    assert len(api.get("/api/v1/hosts").json()["data"]) == 2
    for query in (f"site={a.public_id}", "gpu_model=H100-SXM", "state=active", "leaf=leaf-7"):
        assert [h["id"] for h in api.get(f"/api/v1/hosts?{query}").json()["data"]] == [host.public_id], query


@pytest.mark.parametrize(("query", "code"), [("site=abc", "invalid_request"), ("colour=red", "unknown_field")])
def test_a_filter_that_cannot_be(api, query, code):
    response = api.get(f"/api/v1/hosts?{query}")
    assert (response.status_code, response.json()["code"]) == (400, code)


def test_any_text_as_a_filter_is_no_crash(api):
    for text in ("%00", "a%00b", "'", "sit_", "%F0%9F%92%A9", "9" * 40):
        for name in ("site", "state", "gpu_model", "listing", "cursor", "limit"):
            assert api.get(f"/api/v1/hosts?{name}={text}").status_code in {200, 400}, (name, text)


def test_draining_and_coming_back(api, operator):
    host = factories.host(factories.site(operator))
    url = f"/api/v1/hosts/{host.public_id}"
    drained = api.post(f"{url}/drain", {"reason": "fan"}, format="json").json()
    assert (drained["state"], drained["state_reason"], drained["actions"]) == ("draining", "fan", ["drain", "undrain"])
    assert api.post(f"{url}/undrain").json()["state"] == "active"
    response = api.post(f"{url}/undrain")
    assert (response.status_code, response.json()["code"]) == (409, "illegal_transition")
    assert api.post(f"{url}/drain", {}, format="json").status_code == 400


def test_evicting_asks_what_runs_to_leave(api, operator):
    host = factories.host(factories.site(operator))
    job = factories.job(factories.contract(factories.listing(host.site, hosts=[host])), state="running")
    placement = factories.placement(job, host, state="running", running_at=factories.NOW)
    api.post(f"/api/v1/hosts/{host.public_id}/drain", {"reason": "fan", "evict": True}, format="json")
    placement.refresh_from_db()
    assert placement.state == "draining"


@pytest.mark.parametrize("text", ["hst_000000000000", "hst_", "nonsense", "sit_000000000000", "hst_zzzzzzzzzzzz"])
def test_an_id_that_is_none(api, text):
    assert api.get(f"/api/v1/hosts/{text}").status_code == 404
