"""Maintenance over HTTP: its operator's, of those whom it touches, and of strangers; calendars of it."""

from datetime import UTC, datetime, timedelta

import pytest

from marketplace.models import CalendarFeed, Maintenance
from marketplace.services import contracts, maintenance, quotes
from tests import factories as f

pytestmark = pytest.mark.django_db
URL = "/api/v1/maintenances"
DAY, HOUR = timedelta(days=1), timedelta(hours=1)


class World:
    def __init__(self):
        self.now = datetime.now(UTC).replace(second=0, microsecond=0)
        self.site = f.site()
        self.hosts = [f.host(self.site) for _ in range(2)]
        self.listing = f.listing(self.site, hosts=self.hosts)
        self.api = f.client(self.site.organization)
        self.customer = f.organization()
        self.theirs = f.client(self.customer)
        self.start, self.end = self.now + 10 * DAY, self.now + 10 * DAY + 4 * HOUR

    def contract(self, gpus=16, customer=None):
        actor = f.actor(customer or self.customer)
        asked = quotes.Request("reserved", gpus, starts_at=self.now + DAY, ends_at=self.now + 30 * DAY)
        return contracts.accept(actor, quotes.quote(actor, self.listing.pk, asked, now=self.now).pk, now=self.now)

    def body(self, **fields):
        return {
            "site": self.site.public_id, "scope": "hosts", "hosts": [self.hosts[0].public_id], "text": "New fans.",
            "starts_at": self.start.isoformat(), "ends_at": self.end.isoformat(), "category": "cooling", **fields,
        }  # fmt: skip

    def post(self, path, body=None, client=None):
        return _post(client or self.api, path, body)

    def announced(self, **fields):
        made = self.post(URL, self.body(**fields)).json()
        return self.post(f"{URL}/{made['id']}/announce").json()


def _post(client, path, body):
    return client.post(path, body or {}, content_type="application/json")


@pytest.fixture
def world():
    return World()


def error(answer, status, code):
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.json()
    return answer.json()


def test_from_a_draft_through_its_impact_to_the_announcement(world):
    contract = world.contract()
    made = world.post(URL, world.body())
    assert made.status_code == 201, made.json()
    row = made.json()
    assert (row["state"], row["actions"], row["contracts"]) == ("draft", ["announce", "cancel", "update"], [])
    impact = world.api.get(f"{URL}/{row['id']}/impact").json()
    assert (impact["short_gpus"], impact["firm_contracts"]) == (8, 1)
    assert impact["contracts"] == [
        {"contract": contract.public_id, "kind": "reserved", "gpus": 8, "kept_gpus": 0, "short_gpus": 8, "jobs": 0}
    ]
    assert world.theirs.get(f"{URL}/{row['id']}").status_code == 404  # a draft is its operator's
    shown = world.post(f"{URL}/{row['id']}/announce").json()
    assert (shown["state"], shown["actions"]) == ("announced", ["cancel", "extend", "update"])
    assert shown["contracts"][0] | {"told_at": ""} == {
        "contract": contract.public_id, "what": "announced", "gpus": 8, "short_gpus": 8, "told_at": "",
    }  # fmt: skip
    error(world.post(f"{URL}/{row['id']}/announce"), 409, "illegal_transition")


def test_each_sees_what_touches_its_own(world):
    mine, other = world.contract(gpus=8), f.organization()
    theirs = world.contract(gpus=8, customer=other)
    row = world.announced(scope="domain", hosts=[], domain="leaf-1")
    assert {c["contract"] for c in row["contracts"]} == {mine.public_id, theirs.public_id}
    seen = world.theirs.get(f"{URL}/{row['id']}").json()
    assert [c["contract"] for c in seen["contracts"]] == [mine.public_id]
    assert (seen["domain"], row["domain"], seen["actions"]) == (None, "leaf-1", [])
    assert [r["id"] for r in world.theirs.get(URL).json()["data"]] == [row["id"]]
    stranger = f.client(f.organization())
    assert stranger.get(URL).json()["data"] == []
    for step in ("announce", "extend", "finish", "cancel"):
        body = {"ends_at": (world.end + HOUR).isoformat()} if step == "extend" else None
        error(_post(stranger, f"{URL}/{row['id']}/{step}", body), 404, "not_found")
        error(_post(world.theirs, f"{URL}/{row['id']}/{step}", body), 403, "forbidden")
    error(world.theirs.get(f"{URL}/{row['id']}/impact"), 403, "forbidden")
    error(_post(stranger, URL, world.body()), 404, "not_found")
    foreign = world.body(hosts=[f.host(f.site()).public_id])
    error(world.post(URL, foreign), 404, "not_found")


def test_the_market_shows_it_to_everybody(world):
    row = world.announced(impact="One host is away.")
    buyer = f.client(f.organization())
    said = {k: row[k] for k in ("id", "object", "state", "category", "starts_at", "ends_at", "text", "impact")}
    assert buyer.get(f"/api/v1/listings/{world.listing.public_id}").json()["maintenance"] == [said]
    (found,) = buyer.get("/api/v1/listings").json()["data"]
    assert found["maintenance"] == [said]
    asked = {
        "listing": world.listing.public_id,
        "kind": "reserved",
        "gpu_count": 8,
        "ends_at": (world.end + DAY).isoformat(),
    }
    quote = _post(buyer, "/api/v1/quotes", asked).json()
    assert quote["maintenance"] == [{**said, "touches": False}]
    assert quote["terms"]["maintenance_hours_per_month"] == 4
    rate = _post(
        buyer, "/api/v1/quotes", {"listing": world.listing.public_id, "kind": "on_demand", "gpu_count": 8}
    ).json()
    assert rate["maintenance"] == [{**said, "touches": True}]
    world.post(f"{URL}/{row['id']}/cancel")
    assert buyer.get(f"/api/v1/listings/{world.listing.public_id}").json()["maintenance"] == []


def test_changes_are_matched_and_extensions_have_their_reason(world):
    world.contract()
    row = world.announced()
    at = f"{URL}/{row['id']}"
    tag = world.api.get(at).headers["ETag"]
    answer = world.api.patch(at, {"text": "Other fans."}, content_type="application/json", headers={"If-Match": tag})
    assert answer.json()["version"] == 2
    stale = world.api.patch(at, {"text": "No."}, content_type="application/json", headers={"If-Match": tag})
    error(stale, 409, "conflict")
    error(world.api.patch(at, {"site": "x"}, content_type="application/json"), 400, "unknown_field")
    later = {"ends_at": (world.end + HOUR).isoformat()}
    longer = world.post(f"{at}/extend", later).json()
    assert (longer["noticed_until"], longer["version"]) == (longer["ends_at"], 3)
    soon = world.body(
        starts_at=(world.now + DAY).isoformat(),
        ends_at=(world.now + 2 * DAY).isoformat(),
        hosts=[world.hosts[1].public_id],
    )
    draft = world.post(URL, soon).json()
    refused = error(world.post(f"{URL}/{draft['id']}/announce"), 409, "notice_too_short")
    assert len(refused["contracts"]) == 1
    error(world.post(f"{at}/finish"), 409, "illegal_transition")
    wrong = error(world.post(URL, world.body(cap_w=5)), 400, "invalid_request")
    assert "/cap_w" in str(wrong)


def test_a_write_that_is_repeated_happens_once(world):
    world.contract()
    head = {"Idempotency-Key": "one"}
    first, again = (
        world.api.post(URL, world.body(), content_type="application/json", headers=head).json()["id"] for _ in range(2)
    )
    assert first == again
    assert Maintenance.objects.count() == 1


def test_a_calendar_feed_is_read_by_its_token_until_it_is_revoked(world, client):
    world.contract()
    row = world.announced(text="New fans; all of them, " + "é" * 80)
    made = world.post("/api/v1/calendar-feeds", {"name": "ops"}, world.theirs).json()
    url = made["url"].replace("{token}", made["token"]).split("//", 1)[1].split("/", 1)[1]
    answer = client.get(f"/{url}")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "text/calendar; charset=utf-8"
    text = answer.content.decode()
    assert all(len(line.encode()) <= 75 for line in text.split("\r\n"))
    whole = text.replace("\r\n ", "")
    assert f"UID:{row['id']}@tailrace" in whole
    assert f"DTSTART:{world.start:%Y%m%dT%H%M%SZ}" in whole
    assert "New fans\\; all of them\\, éé" in whole
    assert "STATUS:CONFIRMED" in whole
    assert CalendarFeed.objects.get().last_used_at is not None
    world.post(f"{URL}/{row['id']}/cancel")
    assert "STATUS:CANCELLED" in client.get(f"/{url}").content.decode()
    other = world.post("/api/v1/calendar-feeds", {"name": "x"}, f.client(f.organization())).json()
    assert "BEGIN:VEVENT" not in maintenance.feeds.read(other["token"], now=world.now)
    world.theirs.delete(f"/api/v1/calendar-feeds/{made['id']}")
    assert client.get(f"/{url}").status_code == 404
    assert world.theirs.get("/api/v1/calendar-feeds").json()["data"][0]["revoked_at"] is not None
    assert made["token"] not in str(world.theirs.get("/api/v1/calendar-feeds").json())
