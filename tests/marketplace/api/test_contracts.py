"""/contracts over HTTP: accept, look, terminate; both sides see, one side acts."""

from datetime import UTC, datetime, timedelta

import pytest

from marketplace.models import BillingStanding, Contract
from tests import factories

pytestmark = pytest.mark.django_db
URL = "/api/v1/contracts"


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


def quote(api, listing, kind="on_demand", gpus=8, **fields):
    window = {"starts_at": day(2), "ends_at": day(12)} if kind in {"reserved", "flexible"} else {}
    body = {"listing": listing.public_id, "kind": kind, "gpu_count": gpus, **window, **fields}
    answer = api.post("/api/v1/quotes", body, format="json")
    assert answer.status_code == 201, answer.json()
    return answer.json()["id"]


def accept(api, quote_id, **headers):
    return api.post(URL, {"quote": quote_id}, format="json", **headers)


def test_a_contract_shows_what_was_agreed(api, listing):
    answer = accept(api, quote(api, listing, "reserved", reference="po-9"))
    body = answer.json()
    assert answer.status_code == 201
    assert (body["state"], body["kind"], body["gpu_count"]) == ("active", "reserved", 8)
    assert body["total"] == {"amount_minor": 8 * 240 * 200, "currency": "USD"}
    assert body["terms"]["level"] == "site"
    assert body["actions"] == ["extend", "resize", "submit_job", "terminate"]
    assert body["reference"] == "po-9"
    assert body["summary"].startswith("Signed. 8 GPUs are yours from")
    assert api.get(f"{URL}/{body['id']}").json()["id"] == body["id"]
    (event,) = api.get(f"{URL}/{body['id']}/events").json()["data"]
    assert (event["from_state"], event["to_state"], event["reason"]) == ("", "active", "quote accepted")


def test_accepting_again_with_the_same_key_is_the_same_contract(api, listing):
    mine = quote(api, listing, "reserved")
    first, again = (accept(api, mine, HTTP_IDEMPOTENCY_KEY="sign-1") for _ in range(2))
    assert (first.json()["id"], again.status_code) == (again.json()["id"], 201)
    other = accept(api, mine)
    assert (other.status_code, other.json()["code"]) == (409, "illegal_transition")
    assert other.json()["contract"] == first.json()["id"]
    assert Contract.objects.count() == 1


def test_without_a_card_nothing_is_signed_and_the_key_may_try_again(api, listing, organization):
    mine = quote(api, listing)
    BillingStanding.objects.filter(organization=organization).update(state="no_card")
    answer = accept(api, mine, HTTP_IDEMPOTENCY_KEY="sign")
    assert (answer.status_code, answer.json()["code"]) == (402, "card_required")
    BillingStanding.objects.filter(organization=organization).update(state="good")
    assert accept(api, mine, HTTP_IDEMPOTENCY_KEY="sign").status_code == 201


def test_both_sides_see_and_only_the_customer_acts(api, listing):
    mine = accept(api, quote(api, listing, reference="secret", metadata={"k": "v"})).json()["id"]
    operator = factories.client(listing.organization)
    seen = operator.get(f"{URL}/{mine}").json()
    assert seen["actions"] == []
    assert "reference" not in seen
    assert "metadata" not in seen
    assert operator.get(URL, {"reference": "secret"}).json()["data"] == []
    assert operator.post(f"{URL}/{mine}/terminate").json()["code"] == "forbidden"
    stranger = factories.client(factories.organization())
    assert stranger.get(URL).json()["data"] == []
    for call in (
        stranger.get(f"{URL}/{mine}"),
        stranger.get(f"{URL}/{mine}/events"),
        stranger.post(f"{URL}/{mine}/terminate"),
    ):
        assert call.status_code == 404


def test_terminating_follows_the_terms(api, listing):
    rate = accept(api, quote(api, listing)).json()
    over = api.post(f"{URL}/{rate['id']}/terminate", {"reason": "done"}, format="json")
    assert (over.json()["state"], over.json()["actions"]) == ("terminated", [])
    assert api.post(f"{URL}/{rate['id']}/terminate").json()["code"] == "illegal_transition"
    reserved = accept(api, quote(api, listing, "reserved")).json()
    short = api.post(f"{URL}/{reserved['id']}/terminate").json()
    assert (short["state"], short["ends_at"]) == ("active", reserved["terminates_at"])
    assert short["terms"] == reserved["terms"]
    events = api.get(f"{URL}/{rate['id']}/events").json()["data"]
    assert [e["to_state"] for e in events] == ["active", "ending", "terminated"]


def test_engineers_look_and_owners_sign(listing, organization):
    engineer = factories.client(organization, "engineer")
    mine = quote(engineer, listing)
    assert accept(engineer, mine).json()["code"] == "forbidden"
    assert engineer.get(URL).status_code == 200
    _, token = factories.key(organization, ["contracts:write"])
    assert accept(factories.client(key=token), mine).status_code == 201


def test_contracts_are_filtered_and_paged(api, listing):
    ids = [accept(api, quote(api, listing, reference=f"r{i}")).json()["id"] for i in range(3)]
    page = api.get(URL, {"limit": 2, "kind": "on_demand", "state": "active"}).json()
    rest = api.get(URL, {"limit": 2, "kind": "on_demand", "state": "active", "cursor": page["cursor"]}).json()
    assert [c["id"] for c in page["data"] + rest["data"]] == ids[::-1]
    assert [c["id"] for c in api.get(URL, {"reference": "r1"}).json()["data"]] == [ids[1]]
    assert api.get(URL, {"colour": "red"}).json()["code"] == "unknown_field"


@pytest.mark.parametrize("body", [{}, {"quote": "quo_x"}, {"quote": 7}, {"quote": "quo_000000000000", "x": 1}])
def test_a_bad_body_is_refused(api, body):
    assert api.post(URL, body, format="json").status_code == 400


def test_a_list_costs_the_same_whatever_its_length(api, listing, django_assert_max_num_queries):
    for _ in range(3):
        accept(api, quote(api, listing))
    with django_assert_max_num_queries(6):
        assert len(api.get(URL).json()["data"]) == 3


def test_a_change_is_proposed_accepted_once_and_kept_on_paper(api, listing):
    mine = accept(api, quote(api, listing, "reserved", 4)).json()["id"]
    here = f"{URL}/{mine}/amendments"
    body = {"kind": "extend", "ends_at": day(14)}
    row = api.post(here, body, format="json", HTTP_IDEMPOTENCY_KEY="more").json()
    assert api.post(here, body, format="json", HTTP_IDEMPOTENCY_KEY="more").json()["id"] == row["id"]
    assert (row["state"], row["total"]["amount_minor"], row["actions"]) == ("open", 4 * 48 * 200, ["accept"])
    assert api.get(f"{here}/{row['id']}").json()["accept"] == row["accept"]
    answers = [api.post(row["accept"]["path"], {}, format="json", HTTP_IDEMPOTENCY_KEY="yes") for _ in range(2)]
    assert [a.json()["state"] for a in answers] == ["accepted", "accepted"]
    assert api.post(row["accept"]["path"], {}, format="json").json()["code"] == "illegal_transition"
    assert api.get(f"{URL}/{mine}").json()["ends_at"][:10] == day(14)[:10]
    kinds = [paper["kind"] for paper in api.get(f"{URL}/{mine}/documents").json()["data"]]
    assert sorted(kinds) == ["amendment", "order_form"]
    more = api.post(here, {"kind": "resize", "gpu_count": 16}, format="json").json()
    assert (more["code"], more["alternatives"]["gpu_count"]) == ("no_capacity", 8)
    assert api.post(here, {"kind": "resize"}, format="json").json()["code"] == "invalid_request"
    assert len(api.get(here).json()["data"]) == 1


def test_another_price_is_the_operators_to_propose_and_the_customers_to_answer(api, listing):
    mine = accept(api, quote(api, listing)).json()["id"]
    operator = factories.client(listing.organization)
    body = {"kind": "price", "price": 3_000_000, "effective_at": day(40), "reason": "energy"}
    assert api.post(f"{URL}/{mine}/amendments", body, format="json").json()["code"] == "forbidden"
    row = operator.post(f"{URL}/{mine}/amendments", body, format="json").json()
    assert (row["state"], row["actions"], row["old_price"]["per_gpu_hour"]) == ("open", [], 2_500_000)
    path = f"{URL}/{mine}/amendments/{row['id']}"
    assert operator.post(f"{path}/accept", {}, format="json").json()["code"] == "forbidden"
    assert api.post(f"{path}/decline", {}, format="json").json()["state"] == "declined"
    assert api.get(f"{URL}/{mine}").json()["ends_at"][:10] == day(40)[:10]


def test_an_early_end_has_a_price_before_it_is_one(api, listing):
    mine = accept(api, quote(api, listing, "reserved")).json()["id"]
    found = api.get(f"{URL}/{mine}/termination").json()
    both = found["stays_due"]["amount_minor"] + found["released"]["amount_minor"]
    assert both == 8 * 240 * 200
    assert found["stays_due"]["amount_minor"] == both // 4
    done = api.post(found["accept"]["path"], found["accept"]["body"], format="json").json()
    assert done["ends_at"] == found["ends_at"]
    assert api.get(f"{URL}/{mine}/termination").json()["code"] == "illegal_transition"


def test_the_terms_of_service_by_api(listing):
    buyer = factories.organization(terms=False)
    api = factories.client(buyer)
    assert api.get("/api/v1/terms").json()["accepted_at"] is None
    made = quote(api, listing)
    refused = accept(api, made).json()
    assert refused["code"] == "terms_not_accepted"
    body = refused["terms"]["accept"]
    assert api.post(body["path"], body["body"], format="json").json()["accepted_by"]
    assert accept(api, made).status_code == 201
    assert api.post("/api/v1/terms", {"version": "1999-01-01"}, format="json").json()["code"] == "terms_not_accepted"
    other = factories.client(factories.organization(terms=False))
    ready = other.get(f"/api/v1/quotes/{quote(other, listing)}").json()["accept"]  # posting it accepts both
    assert other.post(ready["path"], ready["body"], format="json").status_code == 201
