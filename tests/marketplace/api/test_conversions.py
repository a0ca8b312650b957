"""Conversion plans over HTTP: from nothing but a name, from given halls, refused by the field, and seen by nobody else."""

import csv
import io
from dataclasses import fields
from datetime import timedelta

import pytest
from django.utils import timezone

from marketplace.models import AuditEvent, ConversionPlan, PowerNode
from marketplace.services import feeds
from scheduler.core.conversion import inputs
from scheduler.core.conversion.defaults import DEFAULTS
from tests import factories as f

pytestmark = pytest.mark.django_db


@pytest.fixture
def site():
    return f.site(pdus=2)


@pytest.fixture
def api(site):
    return f.client(site.organization)


def make(api, site, **body):
    return api.post(f"/api/v1/sites/{site.public_id}/conversion-plans", {"name": "Plan A", **body}, format="json")


HALL = {
    "name": "Hall 1", "gross_w": 12_000_000, "cooling": "liquid", "usable_permille": 900,
    "miners": [{"model": "S21", "count": 2000, "watts": 3500, "ghs": 200_000}],
}  # fmt: skip


def test_a_plan_of_nothing_but_a_name_reads_the_site(site, api):
    for n in range(3):
        f.miner(site, f"m{n}")
    made = make(api, site)
    assert made.status_code == 201, made.content
    body = made.json()
    assert sum(hall["phases"][0]["month"] == 0 for hall in body["halls"]) == len(body["halls"]) >= 1
    assert len(body["months"]) == DEFAULTS["horizon_months"].value
    said = {a["name"]: a for a in body["assumptions"]}
    assert said["energy_uusd_mwh"]["source"].startswith("Tariff of")
    assert said["energy_uusd_mwh"]["value"] == site.energy_price_microusd_per_kwh * 1000
    assert said["cents_per_kw_month"]["confidence"] == "medium"
    assert all(a["source"] and a["date"] and a["confidence"] for a in body["assumptions"])
    assert body["months"][0]["hashing_w"] > 0
    assert AuditEvent.objects.get(verb="conversion.planned").subject == body["id"]


OF_THE_SITE = {"name", "gross_w", "miners", "halls", "income", "market"}  # what a plan is of; the rest are values


@pytest.mark.parametrize("kind", ["lease", "rental"])
def test_no_value_is_used_that_does_not_say_where_it_is_from(site, api, kind):
    """Whoever adds an input with a silent default finds it here: each field of the inputs is among what the plan says."""
    f.miner(site)
    body = make(api, site, **({} if kind == "lease" else {"income": {"kind": "rental"}})).json()
    names = (a["name"].rpartition(": ")[2].partition(".")[0] for a in body["assumptions"])
    said = {name.removeprefix(f"{kind}_") for name in names}
    income = {"lease": inputs.Lease, "rental": inputs.Rental}[kind]
    parts = (inputs.Site, inputs.Hall, inputs.Market, income)
    wanted = {field.name for part in parts for field in fields(part)} - OF_THE_SITE
    assert wanted <= said
    assert {"cooling", "income", "resale_cents"} <= said
    assert all(a["source"] and a["date"] and a["confidence"] for a in body["assumptions"])
    rows = list(
        csv.DictReader(io.StringIO(api.get(f"/api/v1/conversion-plans/{body['id']}/assumptions.csv").content.decode()))
    )
    assert [(r["name"], r["source"], r["date"], r["confidence"]) for r in rows] == [
        (a["name"], a["source"], a["date"], a["confidence"]) for a in body["assumptions"]
    ]
    by_name = {a["name"]: a for a in body["assumptions"]}
    assert (by_name["income"]["value"], by_name["income"]["confidence"]) == (
        kind,
        "medium" if kind == "lease" else "given",
    )


def test_a_plan_for_years_takes_no_price_of_an_hour(site, api):
    now = timezone.now()
    for days, dollars in ((10, 30), (5, 50), (0, 4000)):
        at = now - timedelta(days=days)
        feeds.store(
            "energy_microusd_per_mwh", dollars * 10**6, source="grid", observed_at=at, now=at, scope=site.region
        )
    said = {a["name"]: a for a in make(api, site).json()["assumptions"]}["energy_uusd_mwh"]
    assert said["value"] == 1_360_000_000
    assert (said["source"][:42], said["confidence"]) == ("Mean of the energy feed's last 10 days, wi", "medium")


def test_given_values_are_used_and_marked_as_given(site, api):
    body = make(
        api, site, halls=[HALL, {**HALL, "name": "Hall 2"}], crews=1, wacc_permille=60,
        income={"kind": "lease", "cents_per_kw_month": 20_000},
    ).json()  # fmt: skip
    said = {a["name"]: a for a in body["assumptions"]}
    assert (said["cents_per_kw_month"]["value"], said["cents_per_kw_month"]["confidence"]) == (20_000, "given")
    assert said["Hall 1: usable_permille"]["confidence"] == "given"
    assert said["Hall 1: pue_permille"]["value"] == DEFAULTS["pue_permille.liquid"].value
    starts = sorted(hall["start"] for hall in body["halls"])
    assert starts[1] - starts[0] >= 7  # one crew builds and commissions for seven months
    assert body["halls"][0]["it_w"] == 12_000_000 * 900 // 1200
    assert body["gain_cents"] == body["npv_cents"] - body["npv_hashing_on_cents"] > 0
    assert body["given"]["crews"] == 1


def test_a_rental_pays_for_its_gpus(site, api):
    body = make(api, site, halls=[HALL], income={"kind": "rental", "price_uusd": 4_000_000}).json()
    gpus = body["halls"][0]["it_w"] // DEFAULTS["gpu_w"].value
    assert body["capital_cents"] == 9_000_000 * 1000 + gpus * DEFAULTS["gpu_cents"].value
    assert {a["name"] for a in body["assumptions"]} >= {
        "gpu_w",
        "gpu_cents",
        "decline_permille",
        "rental_cost_permille",
    }


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"halls": [{**HALL, "miners": [{**HALL["miners"][0], "count": 9000}]}]}, "/halls/0/miners"),
        ({"halls": [HALL, HALL]}, "/halls"),
        ({"horizon_months": 7}, "/horizon_months"),
        ({"halls": [{**HALL, "pue_permille": 900}]}, "/halls/0/pue_permille"),
        ({"nonsense": 1}, "/nonsense"),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_field(site, api, body, pointer):
    refused = make(api, site, **body)
    assert refused.status_code in (400, 422), refused.content
    assert pointer in str(refused.json()["errors"]), refused.json()
    assert not ConversionPlan.objects.exists()


def test_the_months_as_csv_add_up(site, api):
    made = make(api, site, halls=[{**HALL, "name": "=HYPERLINK(1)"}], wacc_permille=50).json()
    answer = api.get(f"/api/v1/conversion-plans/{made['id']}/months.csv")
    rows = list(csv.DictReader(io.StringIO(answer.content.decode())))
    assert len(rows) == len(made["months"])
    for row, month in zip(rows, made["months"], strict=True):
        assert int(row["cash_cents"]) == sum(
            v for k, v in month.items() if k.endswith("_cents") and "hashing_on" not in k
        )
        assert int(row["hashing_on_cents"]) == month["hashing_on_cents"]
    assert {row["'=HYPERLINK(1)"] for row in rows} >= {"permit and orders", "building", "commissioning", "live"}


def test_nobody_else_sees_a_plan(site, api):
    made = make(api, site).json()
    stranger = f.client(f.organization())
    assert stranger.get(f"/api/v1/conversion-plans/{made['id']}").status_code == 404
    assert stranger.get(f"/api/v1/conversion-plans/{made['id']}/months.csv").status_code == 404
    assert stranger.get("/api/v1/conversion-plans").json()["data"] == []
    assert make(stranger, site).status_code == 404
    assert [p["id"] for p in api.get(f"/api/v1/conversion-plans?site={site.public_id}").json()["data"]] == [made["id"]]
    viewer = f.client(site.organization, "viewer")
    assert make(viewer, site).status_code == 403


def test_buildings_are_halls_and_their_miners_are_counted_below_them(site, api):
    root = site.power_nodes.get(parent=None)
    hall = PowerNode.objects.create(site=site, parent=root, name="Hall B", kind="building", depth=1, cap_w=5_000_000)
    PowerNode.objects.filter(name="tx-1").update(parent=hall)
    f.miner(site, "below", power_node=site.power_nodes.get(name="pdu-1"))
    body = make(api, site).json()
    assert [h["name"] for h in body["halls"]] == ["Hall B"]
    assert body["months"][0]["hashing_w"] > 0
