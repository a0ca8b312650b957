"""A site's P&L, its devices' energy and receipts, over HTTP."""

import csv
import io
from datetime import timedelta

import pytest
from django.utils import timezone

from marketplace.models import ProfitHour, Receipt, Site
from marketplace.services import profit
from tests import factories as f

pytestmark = pytest.mark.django_db
HOUR = timedelta(hours=1)


@pytest.fixture
def begun():
    return timezone.now().replace(minute=0, second=0, microsecond=0) - 2 * HOUR


@pytest.fixture
def site(begun):
    made = f.site()
    f.host(made, measured_w=1_000)
    f.miner(made, measured_at=begun)
    Site.objects.update(sampled_at=begun)
    f.accounted(Site.objects.get(pk=made.pk), now=begun + timedelta(seconds=36))
    profit.rebuild(made, begun, begun + HOUR)
    return made


@pytest.fixture
def url(site):
    return f"/api/v1/sites/{site.public_id}"


@pytest.fixture
def api(site):
    return f.client(site.organization, role="owner")


def error(answer, status, code):
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.json()


def test_hours_by_kind_with_their_sums_and_as_csv(url, api, begun):
    asked = {"start": begun.isoformat(), "end": (begun + HOUR).isoformat()}
    shown = api.get(f"{url}/profit", asked).json()
    assert [row["kind"] for row in shown["data"]] == ["ai", "hashing", "demand_response", "energy"]
    ai, hashing, _, rest = shown["data"]
    kept = [row["energy_mwh"] for row in (ai, hashing, rest)]
    assert kept == [12_500, 36_750, 0]  # 36 s with PUEs of 1.25 and 1.05
    # 562.5 and 1,653.75 at 4.5 cents, 2,216.25 together: hashing has the larger rest
    assert [row["energy_microusd"] for row in (ai, hashing, rest)] == [562, 1_654, 0]
    assert (ai["margin_microusd"], ai["seen_s"]) == (-562, 36)
    assert shown["sums"][0]["energy_mwh"] == 12_500
    table = list(csv.DictReader(io.StringIO(api.get(f"{url}/profit.csv", asked).content.decode())))
    assert [(row["kind"], int(row["energy_mwh"])) for row in table] == [
        (r["kind"], r["energy_mwh"]) for r in shown["data"]
    ]
    assert api.get(f"{url}/profit", asked | {"end": (begun - HOUR).isoformat()}).status_code == 400
    error(api.get(f"{url}/profit", {"start": "soon"}), 400, "invalid_request")
    error(api.get(f"{url}/profit", {"start": "2020-01-01T00:00:00Z"}), 400, "invalid_request")


def test_energy_of_each_device(site, url, api, begun):
    asked = {"start": begun.isoformat()}
    for of, device, mwh in (("host", site.hosts.get(), 10_000), ("miner", site.miners.get(), 35_000)):
        assert api.get(f"{url}/energy", asked | {"of": of}).json()["data"] == [
            {"id": device.public_id, "energy_mwh": mwh}
        ]
    assert api.get(f"{url}/energy", asked).json()["data"] == []
    error(api.get(f"{url}/energy", {"of": "cats"}), 400, "invalid_request")


def test_a_receipt_is_taken_once_and_told_in_its_hours(site, url, api, begun):
    body = {
        "kind": "hashing", "source": "a pool", "reference": "7", "start": begun.isoformat(), "end": (begun + HOUR).isoformat(),
        "amount_microusd": 123_456,
    }  # fmt: skip
    made = api.post(f"{url}/receipts", body, format="json")
    assert made.status_code == 201
    assert api.post(f"{url}/receipts", body, format="json").json()["id"] == made.json()["id"]
    error(api.post(f"{url}/receipts", body | {"amount_microusd": 1}, format="json"), 409, "conflict")
    file = "kind,source,reference,start,end,amount_usd\n" + ",".join(
        ["hashing", "a pool", "7", body["start"], body["end"], "0.123456"]
    )
    taken = api.post(f"{url}/receipts/import", {"csv": file}, format="json")
    assert [r["id"] for r in taken.json()["data"]] == [made.json()["id"]]
    assert [r["reference"] for r in api.get(f"{url}/receipts", {"kind": "hashing"}).json()["data"]] == ["7"]
    profit.rebuild(site, begun, begun + HOUR)
    row = ProfitHour.objects.get(site=site, kind="hashing")
    assert row.paid_microusd == 123_456


def test_strangers_and_viewers(site, url, begun):
    stranger = f.client(f.organization(is_operator=True))
    for path in ("profit", "profit.csv", "energy", "receipts"):
        error(stranger.get(f"{url}/{path}"), 404, "not_found")
    viewer = f.client(site.organization, role="viewer")
    error(viewer.get(f"{url}/profit"), 403, "forbidden")
    assert viewer.get(f"{url}/energy").status_code == 200
    error(viewer.post(f"{url}/receipts", {}, format="json"), 403, "forbidden")
    assert not Receipt.objects.exists()


def test_power_tells_every_feed_with_time_source_and_tariff(site, url, api):
    peak = {"kind": "time_of_use", "uusd_mwh": 7_000_000}
    changed = api.patch(
        url, {"tariff": [peak | {"from": "00:00", "to": "00:00"}], "pool_fee_ppm": 20_000}, format="json"
    )
    assert (changed.json()["tariff"][0]["uusd_mwh"], changed.json()["pool_fee_ppm"]) == (7_000_000, 20_000)
    shown = api.get(f"{url}/power").json()
    assert (shown["energy_microusd_per_mwh"], shown["tariff_microusd_per_mwh"], shown["feeds"]) == (
        52_000_000,
        7_000_000,
        [],
    )
    error(api.patch(url, {"tariff": [{"kind": "moon"}]}, format="json"), 400, "invalid_request")
