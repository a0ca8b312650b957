"""Spot from the auction to the invoice: five-minute prices, the operator's part, and a preview that says what will be billed."""

from datetime import timedelta

import pytest

from billing import invoices
from marketplace.models import SpotInterval, SpotResult
from marketplace.services import contracts, quotes, spot
from tests import factories
from tests.billing.conftest import after, assert_invariants, make_world
from tests.billing.test_kinds import collect, market, paid_out, settled

pytestmark = pytest.mark.django_db
__all__ = ["market"]
FLOOR = 600_000
FIVE = timedelta(minutes=5)


@pytest.fixture
def world():
    made = make_world(kind="spot", limit_price=3_000_000, price=FLOOR)
    type(made.listing).objects.filter(pk=made.listing.pk).update(spot_floor=FLOOR)
    return made


def test_an_invoice_has_a_line_for_each_price_and_the_preview_says_the_same(world):
    world.ran(0, 1500, gpus=4)
    rival = factories.contract(world.listing, kind="spot", limit_price=1_200_000, price=FLOOR)
    for n, gpus in ((1, 8), (2, 0), (3, 0), (4, 4), (5, 0)):  # what else is wanted in each interval
        other = factories.job(rival, gpus=gpus, state="queued") if gpus else None
        spot.close(world.contract.cell_id, now=after(300 * n - 60))
        if other:
            type(other).objects.filter(pk=other.pk).update(state="cancelled")
    prices = list(SpotInterval.objects.order_by("start").values_list("price", flat=True))
    assert prices == [1_200_000, FLOOR, FLOOR, FLOOR, FLOOR]
    assert SpotResult.objects.filter(contract=world.contract).count() == 5
    shown = invoices.preview(world.customer, after(3600))
    invoice = world.close(3600)
    lines = [
        (line.price_millionths, line.quantity, line.amount_minor)
        for line in invoice.lines.order_by("price_millionths", "quantity")
    ]
    # Before the first auction the quoted price, which is the floor here, too: two versions of it, one line each.
    assert [(q, a) for _, q, a in lines] == [(4000 * 300, 20), (4000 * 900, 60), (4000 * 300, 40)]
    assert sorted(line.line.amount for line in shown.lines) == sorted(a for _, _, a in lines)
    assert invoice.total_minor == sum(line.line.amount for line in shown.lines) == 120
    for line in invoice.lines.all():
        assert line.operator_minor + line.platform_minor == line.amount_minor
    assert sum(line.operator_minor for line in invoice.lines.all()) == 102
    assert_invariants()


def test_seconds_whose_price_is_not_made_wait_for_the_next_invoice(world):
    world.ran(0, None, gpus=1)
    spot.close(world.contract.cell_id, now=after(240))
    first = world.close(3600)
    assert sum(line.quantity for line in first.lines.all()) == 600_000
    spot.close(world.contract.cell_id, now=after(3600 + 240))
    second = world.close(3900)
    assert sum(line.quantity for line in second.lines.all()) == 3_300_000
    assert_invariants()


@pytest.mark.django_db(transaction=True)
def test_the_money_of_intervals_reaches_the_operator(market):
    """Signed with a limit, outbid at nothing, priced every five minutes: what the auctions made is invoiced, collected and paid out."""
    type(market.listing).objects.filter(pk=market.listing.pk).update(spot_floor=FLOOR)
    actor = factories.actor(market.customer)
    made = quotes.quote(actor, market.listing.pk, quotes.Request("spot", 4, limit_price=3_000_000), now=after(0))
    market.contract = contracts.accept(actor, made.pk, now=after(0))
    market.ran(300, 3600, gpus=4)
    rival = factories.contract(market.listing, kind="spot", limit_price=1_200_000, price=FLOOR)
    for n in range(1, 13):  # every other interval somebody else wants the rest
        other = factories.job(rival, gpus=8, state="queued") if n % 2 else None
        spot.close(market.contract.cell_id, now=after(300 * n - 60))
        if other:
            type(other).objects.filter(pk=other.pk).update(state="cancelled")
    prices = list(SpotInterval.objects.order_by("start").values_list("price", flat=True))
    assert prices == [1_200_000, FLOOR] * 6
    invoice = market.close(7200)
    assert sum(line.quantity for line in invoice.lines.all()) == 4000 * 3600
    assert invoice.total_minor == sum(round(4 * price / 12 / 10_000) for price in prices) == 360
    for line in invoice.lines.all():
        assert line.price_millionths in set(prices)
        assert line.operator_minor + line.platform_minor == line.amount_minor
    collect(invoice)
    settled(market, invoice)
    assert paid_out() == 306
    assert_invariants()
