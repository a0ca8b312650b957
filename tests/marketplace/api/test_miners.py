"""Miners over the API."""

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
    site = factories.site(operator)
    miner = factories.miner(site, manual=True, power_node="pdu-2")
    factories.miner(site, model="M60", state="unresponsive", mode=0)
    shown = api.get(f"/api/v1/miners/{miner.public_id}").json()
    assert (shown["mode"], shown["reserved_w"], shown["manual"]) == ("normal", 3500, True)
    assert shown["modes"][0] == {"name": "sleep", "watts": 25, "ghs": 0}
    for query in ("manual=true", "model=S21", "state=ok", "power_node=pdu-2"):
        assert [m["id"] for m in api.get(f"/api/v1/miners?{query}").json()["data"]] == [miner.public_id], query
    assert api.get("/api/v1/miners?manual=perhaps").status_code == 400


def test_held_by_hand_and_given_back(api, operator):
    miner = factories.miner(factories.site(operator))
    url = f"/api/v1/miners/{miner.public_id}"
    held = api.patch(url, {"manual": True, "mode": "eco"}, format="json").json()
    assert (held["manual"], held["mode"], held["reserved_w"]) == (True, "eco", 3500)
    assert api.patch(url, {"manual": False}, format="json").json()["manual"] is False
    assert api.patch(url, {"manual": True, "mode": "turbo"}, format="json").json()["code"] == "invalid_request"
    assert api.patch(url, {}, format="json").status_code == 400


def test_a_wake_over_the_cap_is_refused(api, operator):
    site = factories.site(operator, power_w=5_000)
    factories.miner(site)
    asleep = factories.miner(site, mode=0)
    response = api.patch(f"/api/v1/miners/{asleep.public_id}", {"manual": True, "mode": "normal"}, format="json")
    assert (response.status_code, response.json()["code"]) == (409, "over_power_cap")
