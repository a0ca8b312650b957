"""Journey 1: book and run. From nobody to a paid invoice: an account, an organization, a card; a search with every filter, offers side by
side, a quote, a contract; a job that waits for machines' watts, and says so; its log, its cost as it runs, its end; the bill.

An account is made on its page, and a card on Stripe's (our sandbox, a process of its own). The rest is the API.
"""

import asyncio
import csv
import io
import json
import re
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from django.db import transaction

import billing.tasks  # noqa: F401 - the handlers of its messages
from marketplace import tasks
from marketplace.models import Listing, Site
from marketplace.services import conditions, reliability
from sandbox.client import CARD, DECLINED_CARD, fill_in
from tests import factories as f
from tests.billing.conftest import _stripe_process, stripe_api  # noqa: F401 - fixtures
from tests.faults.yard import Yard
from tests.journeys.people import Person
from tests.marketplace.test_stream import Call, connections  # noqa: F401 - a fixture

pytestmark = pytest.mark.django_db(transaction=True)
DAY = timedelta(days=1)
WANTED = {
    "gpu_model": "H100-SXM,A100-SXM", "vram_min_mib": 80_000, "count": 8, "level": "host", "interconnect": "InfiniBand",
    "fabric_gbps_min": 400, "region": "us-tx", "kind": "on_demand", "price_max": 3_000_000, "reliability_min": 900,
    "carbon_max_g": 300,
}  # fmt: skip
FABRIC = {"interconnect": "InfiniBand", "fabric_gbps": 400, "runtime": "bubblewrap"}
POOR_CARD = {**CARD, "number": "4000 0000 0000 0341"}  # is saved, and declined when it is to pay
HOURLY = 8 * 250  # cents


@pytest.fixture
def yard(stripe_api):  # noqa: F811
    made = Yard()
    made.stripe = stripe_api
    Site.objects.update(carbon_g_per_kwh=210)
    Listing.objects.update(**FABRIC)
    with transaction.atomic():
        conditions.record(sites=[made.site.pk], now=made.now - DAY)
    made.turn(3)
    return made


def offer(yard, *, carbon=210, region="us-tx", heard=None, gpus=8, model=None, **listing):
    """Another operator's, of two hosts: as the yard's, but for what is given."""
    site = f.site(carbon_g_per_kwh=carbon, region=region)
    hosts = [f.host(site, gpus=gpus, gpu_model=model, beat_at=yard.now) for _ in range(2)]
    made = f.listing(site, hosts=hosts, **{**FABRIC, "gpu_model": model or f.gpu_model(), **listing})
    with transaction.atomic():
        conditions.record(sites=[site.pk], now=yard.now - DAY)
        if heard is not None:
            f.agent(site, last_sync_at=heard)
            conditions.record(sites=[site.pk], now=yard.now)
    return made.public_id


def lacking(yard):
    """An offer for each filter that fails by it alone."""
    return {
        "gpu_model": offer(yard, model=f.gpu_model("H200-SXM")),
        "vram_min_mib": offer(yard, model=f.gpu_model("A100-SXM", vram_mib=40_960)),
        "count": offer(yard, gpus=4),
        "interconnect": offer(yard, interconnect="Ethernet"),
        "fabric_gbps_min": offer(yard, fabric_gbps=200),
        "region": offer(yard, region="no-1"),
        "kind": offer(yard, on_demand_price=None),
        "price_max": offer(yard, on_demand_price=3_100_000, reserved_price=None, flexible_price=None, spot_floor=None),
        "reliability_min": offer(yard, heard=yard.now - DAY / 2),
        "carbon_max_g": offer(yard, carbon=400),
    }


def settle(ada):
    """What the workers do, for as long as there is something to do."""
    while ada.at(tasks.drain_outbox):
        pass


def says(yard, job, text, offset=0):
    """The site's agent hands in what a job has written."""
    (placement,) = job["placements"]
    chunk = {"placement": placement["id"], "stream": "stdout", "offset": offset, "data": text}
    answer = f.client(agent=yard.agent_key).post("/api/v1/agent/logs", {"chunks": [chunk]}, format="json")
    assert answer.status_code == 200, answer.content


def follow(token, job):
    """All of a job's output, as it is streamed until the job is over."""
    call = asyncio.run(Call(f"/api/v1/jobs/{job}/logs/follow", token=token, method="GET")())
    assert call.status == 200
    assert call.body.endswith(b"event: end\ndata: {}\n\n")
    return "".join(json.loads(data)["data"] for data in re.findall(rb"\ndata: (.+)\n", call.body)[:-1])


def test_from_nobody_to_a_paid_invoice(yard, connections):  # noqa: F811
    ada = Person(yard)
    ada.page("/accounts/signup/", {"email": "ada@example.org", "password1": "correct-horse-battery"})
    assert ada.get("organizations")["data"] == []
    labs = ada.post("organizations", {"name": "Ada Labs", "country": "DE"})
    assert (labs["role"], labs["livemode"]) == ("owner", True)

    # --- search: each filter takes somebody out
    ours, dearer, out = yard.contract.listing.public_id, offer(yard, on_demand_price=2_900_000), lacking(yard)
    reliability.roll_up(now=yard.now)
    found = ada.get("listings", sort="price", **WANTED)["data"]
    assert [row["id"] for row in found] == [ours, dearer]
    for name, missed in out.items():
        wider = {k: v for k, v in WANTED.items() if k != name}
        assert missed in {row["id"] for row in ada.get("listings", **wider)["data"]}, name
    none = ada.get("listings", **{**WANTED, "price_max": 1_000_000})
    assert (none["data"], none["nothing"]["removed_by"]) == ([], "price_max")

    # --- compare: the same facts of both
    cheap, dear = (ada.get(f"listings/{row['id']}", level="host") for row in found)
    assert cheap.keys() == dear.keys()
    assert [each["prices"]["on_demand"]["per_gpu_hour"] for each in (cheap, dear)] == [2_500_000, 2_900_000]
    assert cheap["stock"]["gpus"] == dear["stock"]["gpus"] == 8
    assert (cheap["site"]["carbon_g_per_kwh"], cheap["reliability"]["score_permille"] > 900) == (210, True)

    # --- no contract without a card that is good
    quote = ada.post("quotes", {"listing": ours, "kind": "on_demand", "gpu_count": 8})
    accept = quote["accept"]
    assert quote["price"]["per_gpu_hour"] == cheap["prices"]["on_demand"]["per_gpu_hour"]
    assert ada.post("contracts", accept["body"], status=402)["code"] == "card_required"
    assert fill_in(ada.post("payment-methods")["url"], DECLINED_CARD).status_code == 402
    assert ada.get("payment-methods")["standing"] == "no_card"
    fill_in(ada.post("payment-methods")["url"], POOR_CARD)
    ada.page("/billing/card", added=1)
    assert ada.get("payment-methods")["standing"] == "good"
    contract = ada.post("contracts", accept["body"])
    assert contract["state"] == "active"

    # --- a job waits for watts, runs, and is heard; the next one waits for it
    train = {"contract": contract["id"], "command": ["train"], "gpus": 8, "vcpu_milli": 8000, "checkpoint_grace_s": 30}
    first = ada.post("jobs", train)["id"]
    assert (ada.get(f"jobs/{first}")["state"], ada.get(f"jobs/{first}/cost")["milli_gpu_seconds"]) == ("queued", 0)
    yard.turn()
    (placement,) = ada.get(f"jobs/{first}")["placements"]
    assert placement["state"] in {"intended", "shedding"}, "first a machine must sleep for it"
    yard.until(lambda: ada.get(f"jobs/{first}")["state"] == "running", seconds=120)
    stands = ada.get(f"jobs/{first}/explain")
    assert (stands["outcome"], stands["placed"]["replicas"][0]["host"]) == ("placed", placement["host"])
    second = ada.post("jobs", train)["id"]
    yard.turn(2)
    waits = ada.get(f"jobs/{second}/explain")
    assert (waits["outcome"], waits["reason"]) == ("waiting", "over_quota")
    assert "ceiling is 8 GPUs; 8 are in use" in waits["text"]
    assert [first] in [change["jobs"] for change in waits["changes"]], "what would let it run"
    token = ada.post("keys", {"name": "logs", "scopes": ["jobs:read"]})["token"]
    with ThreadPoolExecutor(1) as elsewhere:
        followed = elsewhere.submit(follow, token, first)
        running = ada.get(f"jobs/{first}")
        says(yard, running, "step 1\n")
        assert ada.get(f"jobs/{first}/logs")["data"] == "step 1\n"

        # --- the cost as it runs
        yard.now += timedelta(minutes=44)
        yard.turn()
        cost = ada.get(f"jobs/{first}/cost")
        ran = cost["milli_gpu_seconds"] // 8_000
        assert cost["per_hour"]["amount_minor"] == HOURLY
        assert cost["amount"]["amount_minor"] == round(HOURLY * ran / 3600)
        assert ada.get("invoices/preview")["total"] == cost["amount"]

        # --- cancelled: it ends, its log too, and the next one has its place
        yard.saves = timedelta(seconds=10)
        assert ada.post(f"jobs/{first}/cancel", status=200)["actions"] == []
        says(yard, running, "saved\n", offset=len("step 1\n"))
        yard.until(lambda: ada.get(f"jobs/{first}")["state"] == "cancelled", seconds=30)
        assert followed.result(timeout=60) == "step 1\nsaved\n"
    stopped = ada.get(f"jobs/{first}/cost")
    yard.until(lambda: ada.get(f"jobs/{second}")["state"] == "running", seconds=120)
    yard.turn()
    assert ada.get(f"jobs/{first}/cost")["amount"] == stopped["amount"], "billed no further"
    ada.post(f"jobs/{second}/cancel", status=200)
    yard.until(lambda: ada.get(f"jobs/{second}")["state"] == "cancelled", seconds=30)

    # --- the bill: it adds up, the poor card does not pay it, a good one does
    seconds = sum(ada.get(f"jobs/{job}/cost")["milli_gpu_seconds"] for job in (first, second)) // 8_000
    staff = Person(yard, f.client(user=f.staff()))
    yard.now += timedelta(minutes=1)
    staff.post("staff/close-period", {"organization": labs["id"], "through": yard.now.isoformat()}, status=200)
    settle(ada)
    (invoice,) = ada.get("invoices")["data"]
    total = round(HOURLY * seconds / 3600)
    assert (invoice["state"], invoice["total"]["amount_minor"], invoice["actions"]) == ("open", total, ["pay"])
    assert ada.get("payment-methods")["standing"] == "past_due"
    assert ada.post(f"invoices/{invoice['id']}/pay", status=402)["code"] == "payment_failed"
    more = ada.post("quotes", {"listing": ours, "kind": "on_demand", "gpu_count": 1})["accept"]["body"]
    assert ada.post("contracts", more, status=402)["code"] == "billing_suspended"
    lines = ada.get(f"invoices/{invoice['id']}")["lines"]
    records = list(csv.DictReader(io.StringIO(ada.get(f"invoices/{invoice['id']}/usage"))))
    assert (
        sum(int(r["milli_gpu_seconds"]) for r in records)
        == sum(line["milli_gpu_seconds"] for line in lines)
        == 8_000 * seconds
    )
    assert {r["placement"] for r in records} == {p["id"] for p in ada.get("placements")["data"] if p["running_at"]}
    fill_in(ada.post("payment-methods")["url"], CARD)
    ada.page("/billing/card", added=1)
    settle(ada)
    paid = ada.get(f"invoices/{invoice['id']}")
    assert (paid["state"], paid["actions"]) == ("paid", [])
    assert ada.get("payment-methods")["standing"] == "good"
    (remote,) = yard.stripe.objects("invoice")
    assert (remote["id"], remote["status"], remote["total"]) == (invoice["stripe_invoice"], "paid", total)
    assert not yard.physics.trips
