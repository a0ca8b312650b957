"""Spot over HTTP and on the pages: public history, standing of a contract, and its limit under an ETag."""

from datetime import UTC, datetime, timedelta

import pytest
from django.test import Client
from django.urls import reverse

from marketplace.models import SpotInterval
from marketplace.services import spot
from marketplace.web import charts
from scheduler import cycle, why
from tests import factories as f

pytestmark = pytest.mark.django_db
FLOOR = 1_000_000
FIVE = timedelta(minutes=5)


@pytest.fixture
def now():
    return datetime.now(UTC)


@pytest.fixture
def listing(now):
    """With an hour of prices: 1, 2, 3, ... and the interval in force at 12."""
    site = f.site()
    made = f.listing(site, hosts=[f.host(site)], spot_floor=FLOOR)
    begun = spot.interval_of(now)
    SpotInterval.objects.bulk_create(
        SpotInterval(
            listing=made, cell=site.cell, gpu_model=made.gpu_model, start=begun - (11 - n) * FIVE, price=(n + 1) * FLOOR, floor=FLOOR,
            currency="USD", supply_milli=8000, demand_milli=2500, sold_milli=2500, closed_at=now,
        )
        for n in range(12)
    )  # fmt: skip
    return made


@pytest.fixture
def contract(listing):
    return f.contract(listing, kind="spot", limit_price=5 * FLOOR, price=FLOOR)


def test_anybody_reads_the_history_of_a_public_listing(listing):
    api = f.client(None)
    body = api.get("/api/v1/spot-prices?limit=5").json()
    assert [row["price"]["per_gpu_hour"] // FLOOR for row in body["data"]] == [12, 11, 10, 9, 8]
    following = api.get("/api/v1/spot-prices", {"limit": 5, "cursor": body["cursor"]}).json()
    assert [row["price"]["per_gpu_hour"] // FLOOR for row in following["data"]] == [7, 6, 5, 4, 3]
    row = body["data"][0]
    assert (row["listing"], row["gpu_model"], row["region"], row["cell"]) == (
        listing.public_id, "H100-SXM", listing.site.region, listing.site.cell.name
    )  # fmt: skip
    assert (row["supply_gpus"], row["demand_gpus"], row["sold_gpus"], row["carried"]) == (8.0, 2.5, 2.5, False)


def test_the_history_is_narrowed_by_place_model_and_time(listing, now):
    api, begun = f.client(None), spot.interval_of(now)

    def count(**query):
        return len(api.get("/api/v1/spot-prices", {"limit": 100, **query}).json()["data"])

    assert count(listing=listing.public_id) == count(gpu_model="H100-SXM") == count(region=listing.site.region) == 12
    assert count(gpu_model="B200") == count(cell="nowhere") == 0
    assert count(**{"from": (begun - 2 * FIVE).isoformat(), "to": begun.isoformat()}) == 2
    assert api.get("/api/v1/spot-prices?from=soon").json()["code"] == "invalid_request"
    assert api.get("/api/v1/spot-prices?model=x").json()["code"] == "unknown_field"


def test_prices_of_a_listing_for_partners_are_not_public(listing):
    type(listing).objects.filter(pk=listing.pk).update(visibility="partners")
    assert f.client(None).get("/api/v1/spot-prices").json()["data"] == []
    assert len(f.client(listing.organization).get("/api/v1/spot-prices").json()["data"]) == 12
    assert f.client(f.organization()).get("/api/v1/spot-prices").json()["data"] == []


def test_a_listing_and_a_contract_say_the_price_of_now(listing, contract):
    api = f.client(contract.organization)
    assert api.get(f"/api/v1/listings/{listing.public_id}").json()["spot_price"]["per_gpu_hour"] == 12 * FLOOR
    (found,) = api.get("/api/v1/listings").json()["data"]
    assert (found["spot_price"]["per_gpu_hour"], found["prices"]["spot"]["per_gpu_hour"]) == (12 * FLOOR, FLOOR)
    body = api.get(f"/api/v1/contracts/{contract.public_id}").json()
    assert (body["spot_price"]["per_gpu_hour"], body["limit_price"]["per_gpu_hour"]) == (12 * FLOOR, 5 * FLOOR)
    assert body["actions"] == ["set_limit", "submit_job", "terminate"]
    assert (
        "set_limit"
        not in f.client(listing.organization).get(f"/api/v1/contracts/{contract.public_id}").json()["actions"]
    )


def test_the_limit_is_changed_by_who_has_read_it(contract):
    api, url = f.client(contract.organization), f"/api/v1/contracts/{contract.public_id}"
    etag = api.get(url).headers["ETag"]

    def put(limit, **headers):
        return api.patch(url, {"limit_price": limit}, format="json", headers=headers)

    changed = put(6 * FLOOR, **{"If-Match": etag})
    assert (changed.status_code, changed.json()["limit_price"]["per_gpu_hour"], changed.headers["ETag"]) == (
        200, 6 * FLOOR, f'"{6 * FLOOR}"'
    )  # fmt: skip
    late = put(7 * FLOOR, **{"If-Match": etag})
    assert (late.status_code, late.json()["code"]) == (409, "conflict")
    assert put(FLOOR - 1).json()["code"] == "invalid_request"
    seller = f.client(contract.operator).patch(url, {"limit_price": 9 * FLOOR}, format="json")
    assert seller.status_code == 403
    contract.refresh_from_db()
    assert contract.limit_price == 6 * FLOOR


def test_results_are_for_the_two_sides_of_the_contract(contract, now):
    job = f.job(contract, gpus=2)
    start = spot.interval_of(now) + FIVE
    spot.close(contract.cell_id, now=start - FIVE / 5)
    url = f"/api/v1/contracts/{contract.public_id}/spot-results"
    for side in (contract.organization, contract.operator):
        (row,) = f.client(side).get(url).json()["data"]
        assert (row["outcome"], row["won_gpus"], row["price"]["per_gpu_hour"]) == ("won", 2.0, FLOOR)
    assert f.client(f.organization()).get(url).status_code == 404
    assert row["lost_jobs"] == []
    assert job.pk


def test_a_job_that_waits_for_a_lower_price_is_told_so(contract):
    job = f.job(contract)
    cycle.run(contract.cell_id)
    job.refresh_from_db()
    assert job.state == "queued"
    said = why.explain(job)
    assert said["reason"] == "price_limit"
    assert said["text"].startswith(
        "The job waits: the spot price is 12 USD per GPU-hour, the limit 5. The next auction is for "
    )


# --- pages
@pytest.fixture
def page(contract):
    client = Client()
    client.force_login(f.member(contract.organization, "owner").user)
    return client


def test_the_listing_shows_the_price_and_its_day(listing):
    html = Client().get(reverse("web:listing", args=[listing.public_id])).content.decode()
    assert "Spot price of the last day: now $12.00 per GPU-hour" in html
    assert "$1.00 to $12.00" in html


def test_the_contract_has_the_form_for_its_limit(page, contract):
    url = reverse("web:contract", args=[contract.public_id])
    assert 'name="limit_price" value="5"' in page.get(url).content.decode()
    to = reverse("web:contract-limit", args=[contract.public_id])
    said = page.post(to, {"limit_price": "2.5", "seen": 5 * FLOOR}, follow=True)
    assert "counts from the next auction on" in said.content.decode()
    contract.refresh_from_db()
    assert contract.limit_price == 2_500_000
    page.post(to, {"limit_price": "9", "seen": 5 * FLOOR})
    page.post(to, {"limit_price": "much", "seen": 2_500_000})
    contract.refresh_from_db()
    assert contract.limit_price == 2_500_000


def test_a_chart_of_one_interval_is_drawn(now):
    drawn = charts.steps([(now, 5)], floor=2, label="one", show=str)
    assert 'class="line"' in drawn
    assert ">5</text>" in drawn
