"""Journey 2: reserve ahead. A calendar, a refusal with what would fit, a signed window; at its hour the capacity is there, whatever
ran and hashed until then: spot leaves, machines sleep first, and no cap is crossed on the way (`Yard.turn` asserts it each second).
"""

from datetime import timedelta

import pytest

from marketplace.models import Contract, Miner
from marketplace.services import contracts
from tests.faults.yard import Yard
from tests.journeys.people import Member

pytestmark = pytest.mark.django_db
HOUR = timedelta(hours=1)


@pytest.fixture
def yard():
    made = Yard()
    made.turn(3)
    return made


def test_from_the_calendar_to_gpus_that_run_at_the_hour(yard):
    spot = yard.submit(contract=yard.book("spot"))
    yard.until(lambda: yard.state(spot) == "running", seconds=120)
    customer = Member(yard, yard.contract.organization)
    begins = (yard.now + 2 * HOUR).replace(minute=0, second=0)
    listing = customer.get("listings", count=16, level="leaf", kind="reserved")["data"][0]["id"]
    window = {"start": begins.isoformat(), "end": (begins + 3 * HOUR).isoformat()}
    calendar = customer.get(
        f"listings/{listing}/calendar", **window, step_hours=1, level="leaf", count=16, term_hours=1
    )
    assert calendar["data"][0]["fits"]

    body = {
        "listing": listing, "kind": "reserved", "starts_at": begins.isoformat(), "ends_at": (begins + HOUR).isoformat(),
        "level": "leaf",
    }  # fmt: skip
    refused = customer.post("quotes", {**body, "gpu_count": 24}, status=409)
    assert refused["code"] == "no_capacity"
    assert any(each["quote"]["body"]["gpu_count"] <= 16 for each in refused["alternatives"]["nearest"])
    quote = customer.post("quotes", {**body, "gpu_count": 16})
    assert quote["holds_capacity"]
    signed = customer.post("contracts", quote["accept"]["body"])
    assert (
        customer.post("quotes", {**body, "gpu_count": 1}, status=409)["code"] == "no_capacity"
    )  # all of it is promised

    yard.now = begins - timedelta(minutes=10)
    for _ in range(24):
        contracts.clock(yard.now)
        yard.turn()
        if Contract.objects.get(reservation__starts_at=begins).state == "active" and yard.now >= begins:
            break
        yard.now += timedelta(seconds=20)
    yard.now = max(yard.now, begins)
    contracts.clock(yard.now)
    gang = {
        "contract": signed["id"], "command": ["train"], "replicas": 2, "gpus": 8, "vcpu_milli": 8000, "ram_mib": 1024,
        "topology": "leaf",
    }  # fmt: skip
    job = customer.post("jobs", gang)["id"]
    yard.until(lambda: customer.get(f"jobs/{job}")["state"] == "running", seconds=240)
    assert yard.state(spot) != "running"
    assert len(yard.physics.hosts.workloads) == 2
    assert Miner.objects.filter(desired_mode=0).exists()
    assert not yard.physics.trips
