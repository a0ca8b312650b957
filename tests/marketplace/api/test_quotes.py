"""/quotes over HTTP."""

from datetime import UTC, datetime, timedelta

import pytest

from marketplace.models import Quote
from tests import factories

pytestmark = pytest.mark.django_db
URL = "/api/v1/quotes"


def day(n):
    return (datetime.now(UTC).replace(minute=0, second=0, microsecond=0) + timedelta(days=n)).isoformat()


@pytest.fixture
def listing():
    site = factories.site()
    return factories.listing(site, hosts=[factories.host(site)])


@pytest.fixture
def organization():
    return factories.organization()


@pytest.fixture
def api(organization):
    return factories.client(organization)


def ask(api, listing, **fields):
    body = {"listing": listing.public_id, "kind": "reserved", "gpu_count": 8, "starts_at": day(2), "ends_at": day(4)}
    return api.post(URL, {k: v for k, v in {**body, **fields}.items() if v is not None}, format="json")


def test_a_quote_says_everything_that_is_asked_before_signing(api, listing):
    answer = ask(api, listing, reference="po-1", metadata={"k": "v"})
    body = answer.json()
    assert answer.status_code == 201
    assert body["total"] == {"amount_minor": 8 * 48 * 200, "currency": "USD"}
    assert body["items"]["platform_fee"]["amount_minor"] == 8 * 48 * 200 * 15 // 100
    assert body["price"]["text"] == "2.00 USD per GPU-hour"
    assert body["overage_price"]["per_gpu_hour"] == 2_500_000
    assert (body["listing_version"], body["terms"]["eviction_notice_s"]) == (listing.version, listing.eviction_notice_s)
    assert (body["state"], body["holds_capacity"], body["actions"]) == ("open", True, ["accept", "release"])
    assert (body["reference"], body["metadata"], body["contract"]) == ("po-1", {"k": "v"}, None)
    accepted = api.post(body["accept"]["path"], body["accept"]["body"], format="json")
    assert accepted.status_code == 201
    after = api.get(f"{URL}/{body['id']}").json()
    assert (after["state"], after["contract"], after["accept"]) == ("accepted", accepted.json()["id"], None)


def test_a_refusal_carries_the_reason_and_what_would_fit(api, listing):
    assert ask(factories.client(factories.organization()), listing, gpu_count=6).status_code == 201
    answer = ask(api, listing)
    body = answer.json()
    assert (answer.status_code, body["code"], body["reason"]) == (409, "no_capacity", "no_capacity_in_window")
    assert answer["Retry-After"] == "120"
    assert answer["Content-Type"] == "application/problem+json"
    offer = body["alternatives"]
    assert offer["gpu_count"]["site"] == 2
    assert (
        ask(api, listing, starts_at=offer["later"]["starts_at"], ends_at=offer["later"]["ends_at"]).status_code == 201
    )


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"colour": "red"}, "unknown_field"),
        ({"listing": "lst_zzz"}, "invalid_request"),
        ({"listing": "lst_000000000000"}, "invalid_request"),
        ({"kind": "lease"}, "invalid_request"),
        ({"gpu_count": 0}, "invalid_request"),
        ({"starts_at": "tomorrow"}, "invalid_request"),
        ({"ends_at": None}, "invalid_request"),
    ],
)
def test_a_bad_body_is_refused(api, listing, fields, code):
    answer = api.post(
        URL,
        {
            "listing": listing.public_id,
            "kind": "reserved",
            "gpu_count": 8,
            "starts_at": day(2),
            "ends_at": day(4),
            **fields,
        },
        format="json",
    )
    assert answer.json()["code"] in {code, "not_found"}
    assert answer.status_code in {400, 404}
    assert not Quote.objects.exists()


def test_the_same_key_gets_the_same_quote_and_another_body_is_refused(api, listing):
    body = {"listing": listing.public_id, "kind": "on_demand", "gpu_count": 2}
    first = api.post(URL, body, format="json", HTTP_IDEMPOTENCY_KEY="q1")
    again = api.post(URL, body, format="json", HTTP_IDEMPOTENCY_KEY="q1")
    assert first.json() == again.json()
    assert Quote.objects.count() == 1
    other = api.post(URL, {**body, "gpu_count": 3}, format="json", HTTP_IDEMPOTENCY_KEY="q1")
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_mismatch")


def test_quotes_are_listed_filtered_and_released_by_their_owner(api, listing, organization):
    mine = ask(api, listing, gpu_count=1, reference="a").json()
    ask(api, listing, gpu_count=1, reference="b")
    stranger = factories.client(factories.organization())
    assert stranger.get(URL).json()["data"] == []
    assert stranger.get(f"{URL}/{mine['id']}").status_code == 404
    assert stranger.post(f"{URL}/{mine['id']}/release").status_code == 404
    assert len(api.get(URL).json()["data"]) == 2
    assert [q["id"] for q in api.get(URL, {"reference": "a", "listing": listing.public_id}).json()["data"]] == [
        mine["id"]
    ]
    assert api.post(f"{URL}/{mine['id']}/release").json()["state"] == "released"
    assert api.get(URL, {"state": "released"}).json()["data"][0]["actions"] == []


def test_viewers_and_narrow_keys_only_look(listing, organization):
    viewer = factories.client(organization, "viewer")
    assert viewer.get(URL).status_code == 200
    assert ask(viewer, listing).json()["code"] == "forbidden"
    _, token = factories.key(organization, ["quotes:read"])
    assert ask(factories.client(key=token), listing).json()["code"] == "scope_missing"


def test_a_price_that_is_no_longer_firm_reads_as_expired(api, listing, organization):
    quote = factories.quote(listing, organization, firm_until=datetime.now(UTC) - timedelta(seconds=1))
    assert api.get(f"{URL}/{quote.public_id}").json()["state"] == "expired"
