"""/saved-searches over HTTP."""

import pytest

from marketplace.models import SavedSearch
from marketplace.services import catalogue, saved_matches
from tests import factories
from tests.factories import NOW

pytestmark = pytest.mark.django_db
URL = "/api/v1/saved-searches"
BODY = {"name": "64 H100 in one fabric", "filters": {"gpu_model": "H100-SXM", "count": 64, "level": "spine"}}


@pytest.fixture
def organization():
    return factories.organization()


@pytest.fixture
def api(organization):
    return factories.client(organization, "engineer")


def test_a_search_is_kept_changed_paused_resumed_and_deleted(api, organization):
    made = api.post(URL, BODY, format="json")
    assert made.status_code == 201, made.json()
    row = made.json()
    assert (row["filters"], row["cadence"], row["state"]) == (BODY["filters"], "at_once", "active")
    here = f"{URL}/{row['id']}"
    assert [each["id"] for each in api.get(URL, {"state": "active"}).json()["data"]] == [row["id"]]
    changed = api.patch(
        here, {"cadence": "daily", "filters": {"region": "us-tx,no-north", "where": "vram_mib>=81920"}}, format="json"
    )
    assert changed.json()["filters"] == {"region": "us-tx,no-north", "where": "vram_mib>=81920"}
    assert SavedSearch.objects.get().regions == ["no-north", "us-tx"]
    assert api.post(f"{here}/resume").json()["code"] == "illegal_transition"
    assert api.post(f"{here}/pause").json()["actions"] == ["change", "delete", "resume"]
    assert api.post(f"{here}/resume").json()["state"] == "active"
    assert factories.client(factories.organization()).get(here).status_code == 404
    assert factories.client(organization, "viewer").delete(here).status_code == 403
    assert api.delete(here).status_code == 204
    assert api.get(here).status_code == 404


def test_its_matches_are_those_one_may_see(api, organization):
    catalogue.forget()
    row = api.post(URL, {"name": "any", "filters": {}}, format="json").json()
    site = factories.site()
    listing = factories.listing(site, hosts=[factories.host(site)])
    saved_matches.follow(now=NOW)
    found = api.get(f"{URL}/{row['id']}/matches").json()["data"]
    assert [(each["listing"], each["told_at"]) for each in found] == [(listing.public_id, None)]
    type(listing).objects.update(visibility="partners")
    assert api.get(f"{URL}/{row['id']}/matches").json()["data"] == []


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"name": "x"}, 400),
        ({**BODY, "filters": {"planet": 3}}, 400),
        ({**BODY, "filters": {"where": "moon>3"}}, 400),
        ({**BODY, "filters": {"start": "2020-01-01T00:00:00Z", "end": "2020-01-02T00:00:00Z"}}, 400),
        ({**BODY, "sort": "luck"}, 400),
        ({**BODY, "cadence": "hourly"}, 400),
        ({**BODY, "pause_minutes": -1}, 400),
    ],
)
def test_what_cannot_be_kept_is_refused(api, body, code):
    assert api.post(URL, body, format="json").status_code == code
    assert not SavedSearch.objects.exists()
