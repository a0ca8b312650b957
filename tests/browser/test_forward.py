"""The pages of the forward market in a browser: no violation of axe's rules, no overflow, in both themes."""

import os
from datetime import timedelta
from pathlib import Path

import pytest
from django.utils import timezone

from marketplace.services import contracts, quotes
from marketplace.services.forward import bids, resales
from tests import factories
from tests.browser.test_pages import THEMES, check, market, open_page

pytestmark = [pytest.mark.browser, pytest.mark.django_db(transaction=True)]
__all__ = ["market"]


@pytest.mark.parametrize(("width", "theme"), THEMES)
def test_its_pages_break_no_rule(chromium, market, width, theme):
    now = timezone.now()
    start = now.replace(second=0, microsecond=0) + timedelta(days=2)
    actor, listing = factories.actor(market["customer"]), market["listing"]
    wanted = quotes.Request("reserved", 8, starts_at=start, ends_at=start + timedelta(days=10))
    contract = contracts.accept(actor, quotes.quote(actor, listing.pk, wanted, now=now).pk, now=now)
    window = start + timedelta(days=2), start + timedelta(days=4)
    row = resales.offer(actor, contract, resales.Asked(6, *window, 1_500_000), now=now)
    buyer = factories.actor(factories.organization())
    bought = quotes.quote(buyer, row.listing_id, quotes.Request("reserved", 2), now=now)
    contracts.accept(buyer, bought.pk, now=now)
    for limit in (1_400_000, 1_250_000):
        asked = bids.Wanted(listing.gpu_model.name, listing.site.region, 4, window[0], 172_800, limit, window[0])
        bid = bids.place(actor, asked, now=now)
    here = f"/contracts/{contract.public_id}"
    terms = f"gpu_count=2&price=1.4&starts_at={window[0]:%Y-%m-%dT%H:%M}&ends_at={window[1]:%Y-%m-%dT%H:%M}"
    paths = [
        "/book", "/", here, f"{here}/resell", f"{here}/resell?{terms}", "/resales", f"/resales/{row.public_id}", "/bids", "/bids/new",
        f"/bids/{bid.public_id}", f"/listings/{row.listing.public_id}",
    ]  # fmt: skip
    page = open_page(chromium, market, width=width, theme=theme)
    found = check(page, market["url"], paths, width)
    if shots := os.environ.get("TAILRACE_SHOTS"):  # to look at them
        for n, path in enumerate(paths):
            page.goto(market["url"] + path)
            page.screenshot(path=Path(shots) / f"{n}-{width}-{theme}.png", full_page=True)
    found += check(open_page(chromium, market, role=None, width=width, theme=theme), market["url"], ["/book"], width)
    assert not found, "\n".join(found)
