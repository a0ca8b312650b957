"""The operator's pages of grid calls, signals, pools and the P&L: axe finds nothing in what is ours, no overflow, no foreign host."""

import os
from datetime import timedelta
from pathlib import Path

import pytest
from django.db import transaction
from django.utils import timezone

from marketplace.models import Curtailment, HeldLower, MeterReading, PlacementEvent, PoolFeed, PowerNode, ProfitHour
from marketplace.services import curtailments, grid, pool_payouts, receipts
from tests import factories
from tests.browser.test_pages import THEMES, market, open_page  # noqa: F401 - a fixture

pytestmark = [pytest.mark.browser, pytest.mark.django_db(transaction=True)]


def told(call):
    """A firm job whose contract names emergencies left, a flexible one before it; a third ran on with its GPUs held lower."""
    host = factories.host(call.site)
    for kind, rank in (("flexible", 0), ("reserved", 1)):
        contract = factories.contract(factories.listing(call.site), kind=kind, emergency_notice_s=300)
        placed = factories.placement(factories.job(contract, state="requeued"), host, [rank], state="released")
        PlacementEvent.objects.create(
            placement=placed, at=call.starts_at + timedelta(seconds=300 * rank), actor="power", from_state="running",
            to_state="draining", reason=f"curtailment {call.public_id}",
        )  # fmt: skip
    contract = factories.contract(factories.listing(call.site), kind="on_demand")
    begun = call.starts_at + timedelta(seconds=600)
    factories.placement(
        factories.job(contract, state="running"), host, [2, 3], state="running", running_at=call.starts_at
    )
    HeldLower.objects.create(curtailment=call, host=host, gpu_w=480, full_w=700, starts_at=begun)


def earned(site):
    """Two days of the P&L, a pool's feed and what it paid."""
    now = timezone.now().replace(minute=0, second=0, microsecond=0)
    actor = factories.actor(site.organization)
    for n in range(48):
        for kind, revenue, energy in (("ai", 61_000_000, 9), ("hashing", 14_000_000 + n * 90_000, 5), ("energy", 0, 1)):
            ProfitHour.objects.create(
                site=site, start=now - timedelta(hours=n), kind=kind, revenue_microusd=revenue, energy_mj=energy * 10**11,
                energy_microusd=energy * 1_100_000, carbon_mg=energy * 9_000_000, seen_ms=3_600_000,
                paid_microusd=revenue * 97 // 100 if kind == "hashing" and n > 24 else None,
            )  # fmt: skip
    receipts.receive(
        site, actor=actor, now=now, kind="hashing", source="a pool", reference="20270301", start=now - timedelta(days=2),
        end=now - timedelta(days=1), amount_microusd=350_000_000, amount_sat=384_600,
    )  # fmt: skip
    feed = pool_payouts.add(actor, site, name="a pool", url="https://pool.example/payouts", now=now - timedelta(days=9))
    PoolFeed.objects.update(paid_until=now - timedelta(days=1), error="payout 20270302: pays 0 sat")
    return feed


def called(site):
    """A call of an hour ago, as its meter saw it: from 900 kW under 600 within 20 s."""
    now = timezone.now().replace(microsecond=0)
    start = now - timedelta(hours=1)
    node = PowerNode.objects.get(site=site, kind="site")
    actor = factories.actor(site.organization)
    row = curtailments.announce(
        actor,
        node,
        cap_w=600_000,
        starts_at=start,
        ends_at=now + timedelta(hours=1),
        reference="ercot-7",
        now=start,
        emergency=True,
    )
    factories.miner(site, manual=True)
    before = [MeterReading(node=node, at=start - timedelta(seconds=s), watts=900_000 + s) for s in range(1, 200)]
    after = [
        MeterReading(
            node=node, at=start + timedelta(seconds=s), watts=max(580_000, 900_000 - 16_000 * s) + 900 * (s % 7)
        )
        for s in range(0, 3600, 5)
    ]
    MeterReading.objects.bulk_create([*before, *after])
    with transaction.atomic():
        curtailments.apply(site, now=start)
    told(row)
    values = {"name": "real-time price", "cap_w": 600_000, "strike_uusd_mwh": 90_000_000, "resume_uusd_mwh": 60_000_000}
    return Curtailment.objects.get(pk=row.pk), grid.add(actor, node, kind="price", now=now, **values)


@pytest.mark.parametrize(("width", "theme"), THEMES)
def test_calls_and_signals(chromium, market, width, theme):  # noqa: F811
    row, source = called(market["listing"].site)
    feed = earned(market["listing"].site)
    desk = open_page(chromium, {**market, "customer": market["listing"].organization}, width=width, theme=theme)
    paths = {
        "call": f"curtailment/{row.pk}/change/", "calls": "curtailment/", "signals": "gridsource/", "add": "gridsource/add/",
        "signal": f"gridsource/{source.pk}/change/", "pools": "poolfeed/", "pool": f"poolfeed/{feed.pk}/change/",
        "profit": f"site/{row.site_id}/profit/", "week": f"site/{row.site_id}/profit/?window=7d",
    }  # fmt: skip
    for name, path in paths.items():
        assert desk.goto(f"{market['url']}/operator/marketplace/{path}").status == 200, path
        assert desk.evaluate("document.documentElement.scrollWidth") <= width, path
        if folder := os.environ.get("SCREENSHOTS"):
            desk.screenshot(path=str(Path(folder) / f"{name}-{width}-{theme}.png"), full_page=True)
    assert not [problem for problem in desk.problems if "404" not in problem]
