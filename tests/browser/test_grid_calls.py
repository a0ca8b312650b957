"""The operator's pages of grid calls and signals: no violation of axe's rules in what is ours, no overflow, nothing from elsewhere."""

import os
from datetime import timedelta
from pathlib import Path

import pytest
from django.db import transaction
from django.utils import timezone

from marketplace.models import Curtailment, MeterReading, PowerNode
from marketplace.services import curtailments, grid
from tests import factories
from tests.browser.test_pages import THEMES, market, open_page  # noqa: F401 - a fixture

pytestmark = [pytest.mark.browser, pytest.mark.django_db(transaction=True)]


def called(site):
    """A call of an hour ago, as its meter saw it: from 900 kW under 600 within 20 s."""
    now = timezone.now().replace(microsecond=0)
    start = now - timedelta(hours=1)
    node = PowerNode.objects.get(site=site, kind="site")
    actor = factories.actor(site.organization)
    row = curtailments.announce(
        actor, node, cap_w=600_000, starts_at=start, ends_at=now + timedelta(hours=1), reference="ercot-7", now=start
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
    values = {"name": "real-time price", "cap_w": 600_000, "strike_uusd_mwh": 90_000_000, "resume_uusd_mwh": 60_000_000}
    return Curtailment.objects.get(pk=row.pk), grid.add(actor, node, kind="price", now=now, **values)


@pytest.mark.parametrize(("width", "theme"), THEMES)
def test_calls_and_signals(chromium, market, width, theme):  # noqa: F811
    row, source = called(market["listing"].site)
    desk = open_page(chromium, {**market, "customer": market["listing"].organization}, width=width, theme=theme)
    paths = {
        "call": f"curtailment/{row.pk}/change/", "calls": "curtailment/", "signals": "gridsource/", "add": "gridsource/add/",
        "signal": f"gridsource/{source.pk}/change/",
    }  # fmt: skip
    for name, path in paths.items():
        assert desk.goto(f"{market['url']}/operator/marketplace/{path}").status == 200, path
        assert desk.evaluate("document.documentElement.scrollWidth") <= width, path
        if folder := os.environ.get("SCREENSHOTS"):
            desk.screenshot(path=str(Path(folder) / f"{name}-{width}-{theme}.png"), full_page=True)
    assert not [problem for problem in desk.problems if "404" not in problem]
