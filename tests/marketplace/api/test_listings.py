"""/listings over HTTP: search, show, calendar, and the operator's writes."""

from datetime import UTC, datetime, timedelta

import pytest

from marketplace.models import Listing
from tests import factories

pytestmark = pytest.mark.django_db
URL = "/api/v1/listings"


@pytest.fixture
def site():
    return factories.site()


@pytest.fixture
def listing(site):
    return factories.listing(site, hosts=[factories.host(site)], interconnect="infiniband")


@pytest.fixture
def api():
    return factories.client(factories.organization())


def test_search_shows_offers_with_stock_and_facets(api, listing):
    body = api.get(URL, {"gpu_model": "H100-SXM,B200", "count": 8, "level": "host", "facets": "true"}).json()
    (offer,) = body["data"]
    assert offer["id"] == listing.public_id
    assert offer["prices"]["on_demand"] == {
        "per_gpu_hour": 2_500_000, "currency": "USD", "text": "2.50 USD per GPU-hour"
    }  # fmt: skip
    assert (offer["stock"]["gpus"], offer["stock"]["listed"], offer["stock"]["level"]) == (8, 8, "host")
    assert offer["stock"]["as_of"] == body["as_of"]
    assert offer["actions"] == ["quote"]
    assert body["facets"]["interconnect"] == {"infiniband": 1}
    assert (body["has_more"], body["cursor"]) == (False, None)


def test_any_field_is_compared(api, listing):
    def found(where, **query):
        return [o["id"] for o in api.get(URL, {"where": where, **query}).json()["data"]]

    assert found("vram_mib>=81920,gpu_model!=L40S|B200,price<=900000") == [listing.public_id]
    assert found("gpus_per_host>8", sort="-nvlink") == []


def test_an_empty_search_says_why(api, listing):
    body = api.get(URL, {"region": "moon"}).json()
    assert body["data"] == []
    assert body["nothing"] == {"removed_by": "region", "left_before": 1, "without": {"region": 1}}


@pytest.mark.parametrize(
    ("query", "code", "pointer"),
    [
        ({"colour": "red"}, "unknown_field", "/colour"),
        ({"count": "many"}, "invalid_request", "/count"),
        ({"sort": "best"}, "invalid_request", "/sort"),
        ({"kind": "free"}, "invalid_request", "/kind"),
        ({"limit": 101}, "invalid_request", "/limit"),
        ({"end": "2027-01-01T00:00:00Z"}, "invalid_request", "/start"),
        ({"cursor": "x"}, "invalid_request", "/cursor"),
        ({"where": "colour=red"}, "invalid_request", "/where"),
    ],
)
def test_a_bad_query_is_refused_by_name(api, query, code, pointer):
    answer = api.get(URL, query)
    assert (answer.status_code, answer.json()["code"]) == (400, code)
    assert pointer in [e["pointer"] for e in answer.json()["errors"]]


def test_pages(api, site):
    for _ in range(3):
        factories.listing(site)
    first = api.get(URL, {"limit": 2}).json()
    second = api.get(URL, {"limit": 2, "cursor": first["cursor"]}).json()
    assert (first["has_more"], second["has_more"]) == (True, False)
    assert len({o["id"] for o in first["data"] + second["data"]}) == 3


def test_one_listing_and_its_calendar(api, listing):
    answer = api.get(f"{URL}/{listing.public_id}")
    assert (answer.json()["stock"]["gpus"], answer["ETag"]) == (8, '"1"')
    calendar = api.get(f"{URL}/{listing.public_id}/calendar", {"step_hours": 24}).json()
    assert len(calendar["data"]) == 31
    assert {c["gpus"] for c in calendar["data"]} == {8}
    far = {"start": "2027-01-01T00:00:00Z", "end": "2028-01-01T00:00:00Z", "step_hours": 1}
    assert api.get(f"{URL}/{listing.public_id}/calendar", far).json()["code"] == "invalid_request"
    assert api.get(f"{URL}/{listing.public_id}", {"level": "x"}).status_code == 400


def test_what_one_may_not_see_is_not_there(api, site):
    draft = factories.listing(site, state="draft")
    for path in ("", "/calendar"):
        assert api.get(f"{URL}/{draft.public_id}{path}").status_code == 404
    assert api.get(f"{URL}/lst_000000000000").status_code == 404
    assert factories.client().get(URL).status_code == 401
    for verb in ("publish", "pause", "retire"):
        assert api.post(f"{URL}/{draft.public_id}/{verb}").status_code == 404
    assert factories.client(site.organization).get(f"{URL}/{draft.public_id}").json()["state"] == "draft"


def test_an_operators_road(site):
    factories.agent(site, runtime="podman")
    host = factories.host(site)
    api = factories.client(site.organization)
    body = {
        "site": site.public_id, "title": "Hall 2", "gpu_model": "H100-SXM", "reserved_price": 1_999_999,
        "hosts": [host.public_id], "min_gpus": 4,
    }  # fmt: skip
    made = api.post(URL, body, format="json", HTTP_IDEMPOTENCY_KEY="draft-1")
    assert (made.status_code, made.json()["state"]) == (201, "draft")
    assert made.json()["actions"] == ["publish", "retire", "update"]
    again = api.post(URL, body, format="json", HTTP_IDEMPOTENCY_KEY="draft-1")
    assert (again.json()["id"], again["Idempotent-Replayed"]) == (made.json()["id"], "true")
    url = f"{URL}/{made.json()['id']}"
    published = api.post(f"{url}/publish")
    assert (published.json()["state"], published.json()["runtime"]) == ("published", "podman")
    assert published.json()["prices"]["reserved"]["text"] == "1.999999 USD per GPU-hour"
    version = published["ETag"]
    assert api.patch(url, {"title": "Hall two"}, format="json", HTTP_IF_MATCH=version).json()["title"] == "Hall two"
    stale = api.patch(url, {"title": "Hall three"}, format="json", HTTP_IF_MATCH=version)
    assert (stale.status_code, stale.json()["code"]) == (409, "conflict")
    assert api.post(f"{url}/pause").json()["state"] == "paused"
    assert api.get(URL, {"mine": "true", "state": "paused"}).json()["data"][0]["id"] == made.json()["id"]
    assert api.post(f"{url}/retire").json()["actions"] == []
    assert api.post(f"{url}/publish").json()["code"] == "illegal_transition"
    assert Listing.objects.count() == 1


def test_an_incomplete_listing_names_its_fields(site):
    api = factories.client(site.organization)
    made = api.post(URL, {"site": site.public_id, "title": "bare"}, format="json").json()
    answer = api.post(f"{URL}/{made['id']}/publish")
    assert (answer.status_code, answer.json()["code"]) == (422, "listing_incomplete")
    assert {"/hosts", "/on_demand_price"} <= {e["pointer"] for e in answer.json()["errors"]}


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({"colour": 1}, "/colour"),
        ({"runtime": "podman"}, "/runtime"),
        ({"on_demand_price": -1}, "/on_demand_price"),
        ({"gpu_model": "Abacus"}, "/gpu_model"),
        ({"hosts": ["hst_000000000000"]}, "/hosts/0"),
        ({"partners": ["org_0000"]}, "/partners/0"),
    ],
)
def test_a_bad_change_is_refused_by_field(site, listing, change, pointer):
    answer = factories.client(site.organization).patch(f"{URL}/{listing.public_id}", change, format="json")
    assert answer.status_code == 400
    assert pointer in [e["pointer"] for e in answer.json()["errors"]]


def test_hosts_of_a_stranger_cannot_be_listed(site, listing):
    foreign = factories.host(factories.site())
    answer = factories.client(site.organization).patch(
        f"{URL}/{listing.public_id}", {"hosts": [foreign.public_id]}, format="json"
    )
    assert answer.json()["errors"][0]["pointer"] == "/hosts"
    stranger = factories.client(foreign.site.organization)
    assert stranger.patch(f"{URL}/{listing.public_id}", {"title": "mine"}, format="json").json()["code"] == "forbidden"
    other = stranger.post(URL, {"site": site.public_id, "title": "mine"}, format="json")
    assert (other.status_code, other.json()["code"]) == (404, "not_found")


def test_a_calendar_shows_a_booking(listing, api):
    day = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=3)
    quoted = api.post(
        "/api/v1/quotes",
        {
            "listing": listing.public_id, "kind": "reserved", "gpu_count": 6,
            "starts_at": day.isoformat(), "ends_at": (day + timedelta(days=2)).isoformat(),
        },
        format="json",
    )  # fmt: skip
    assert quoted.status_code == 201
    query = {"start": (day - timedelta(days=1)).isoformat(), "end": (day + timedelta(days=3)).isoformat()}
    cells = api.get(f"{URL}/{listing.public_id}/calendar", query).json()["data"]
    assert [c["gpus"] for c in cells] == [8, 2, 2, 8]
    # The lead reaches into the day before, and the next one's lead follows it: these days are shorter, and say so.
    assert [c["starts_at"][11:16] for c in cells] == ["00:00", "00:00", "00:00", "00:04"]
    assert [c["ends_at"][11:16] for c in cells] == ["23:56", "00:00", "00:00", "00:00"]
    assert cells[0]["levels"] == {"host": 8, "leaf": 8, "spine": 8, "site": 8}
    assert "fits" not in cells[0]
    assert api.get(f"{URL}/{listing.public_id}/calendar", query).json()["windows"] == []


def test_a_calendar_says_where_a_count_fits_and_its_windows_can_be_quoted(listing, api):
    day = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=3)
    body = {"listing": listing.public_id, "kind": "reserved", "gpu_count": 6}
    held = {**body, "starts_at": day.isoformat(), "ends_at": (day + timedelta(days=2)).isoformat()}
    assert api.post("/api/v1/quotes", held, format="json").status_code == 201
    query = {
        "start": (day - timedelta(days=1)).isoformat(), "end": (day + timedelta(days=30)).isoformat(), "count": 8,
        "level": "host", "term_hours": 20,
    }  # fmt: skip
    found = api.get(f"{URL}/{listing.public_id}/calendar", query).json()
    assert [c["fits"] for c in found["data"]][:4] == [True, False, False, True]
    assert len(found["windows"]) == 2
    for window in found["windows"]:
        asked = {**body, "gpu_count": 8, "level": "host", **window}
        assert api.post("/api/v1/quotes", asked, format="json").status_code == 201


def test_the_calendar_of_a_search_names_the_cheapest_offer_that_fits(listing, site, api):
    other = factories.listing(site, hosts=[factories.host(site) for _ in range(2)], reserved_price=3_000_000)
    query = {"count": 8, "step_hours": 24, "gpu_model": "H100-SXM", "kind": "reserved"}
    cells = api.get("/api/v1/calendar", query).json()["data"]
    assert len(cells) == 31
    assert {(c["gpus"], c["offers"], c["cheapest"]) for c in cells} == {(16, 2, listing.public_id)}
    cells = api.get("/api/v1/calendar", {**query, "count": 16}).json()["data"]
    assert {(c["gpus"], c["offers"], c["cheapest"]) for c in cells} == {(16, 1, other.public_id)}
    cells = api.get("/api/v1/calendar", {**query, "gpu_model": "B200"}).json()["data"]
    assert {(c["gpus"], c["offers"], c["cheapest"]) for c in cells} == {(0, 0, None)}
    far = {"start": "2027-01-01T00:00:00Z", "end": "2028-01-01T00:00:00Z", "step_hours": 1}
    assert api.get("/api/v1/calendar", far).json()["code"] == "invalid_request"
    assert api.get("/api/v1/calendar", {"moon": 1}).status_code == 400
