"""What the site is told of the order in which work gives way to its copper."""

import random
from datetime import timedelta

import pytest

from marketplace.models import Contract
from marketplace.services import agents
from tests import factories as f
from tests.factories import NOW

pytestmark = pytest.mark.django_db


def test_spot_by_its_bid_then_flexible_on_demand_reserved_and_of_equals_the_youngest():
    site = f.site()
    agent, _ = f.agent(site)
    host = f.host(site)
    listing = f.listing(site, hosts=[host])
    kinds = [
        ("reserved", None, None, 0), ("on_demand", None, None, 0), ("flexible", None, None, 0), ("spot", 1_300_000, None, 0),
        ("spot", 900_000, None, 0), ("spot", 900_000, None, 60), ("spot", 2_000_000, 500_000, 0),
    ]  # fmt: skip
    wanted = []
    random.Random(5).shuffle(order := list(enumerate(kinds)))
    for gpu, (number, (kind, limit, own, later)) in enumerate(order):
        contract = f.contract(listing, f.organization(), kind=kind)
        Contract.objects.filter(pk=contract.pk).update(limit_price=limit)
        job = f.job(contract, state="running", price_limit=own)
        made = f.placement(
            job, host, state="running", running_at=NOW, gpu_indices=[gpu], created_at=NOW + timedelta(seconds=later)
        )
        wanted.append((number, made.public_id))
    told = agents.desired(agent, {"sequence": 1, "known_safety": -1}, now=NOW)["placements"]
    by_place = [row["id"] for row in sorted(told, key=lambda row: row["gives_way"])]
    numbers = {public_id: number for number, public_id in wanted}
    assert [numbers[i] for i in by_place] == [6, 5, 4, 3, 2, 1, 0]
