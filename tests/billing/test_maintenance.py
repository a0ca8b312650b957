"""What maintenance takes of a commitment: borne for the hours that its terms say, and beyond that not charged."""

from datetime import timedelta

import pytest

from billing.models import InvoiceLine
from marketplace.models import Host
from marketplace.services import maintenance
from scheduler import site_loop
from tests import factories
from tests.billing.conftest import Stripe, World, add_card, after, assert_invariants, make_world
from tests.billing.test_kinds import DAY, MONTH, Contract, collect, lines, onboard, settled, sign
from tests.factories import NOW

pytestmark = pytest.mark.django_db(transaction=True)
HOUR = 3600
WEEK = 7 * DAY


@pytest.fixture
def market(stripe_api: Stripe) -> World:
    made = make_world()
    Contract.objects.filter(pk=made.contract.pk).update(state="cancelled", ended_at=NOW)
    onboard(stripe_api, made)
    add_card(stripe_api, made)
    return made


def work(world: World, begin: float, hours: float, *, announced: float = 0, **fields):
    """On the world's one host, from its announcement to its end, by the clock."""
    operator = factories.actor(world.operator)
    row = maintenance.draft(
        operator, world.host.site, scope="hosts", hosts=[world.host], text="New fans.", now=after(announced),
        starts_at=after(begin), ends_at=after(begin + hours * HOUR), **fields,
    )  # fmt: skip
    maintenance.announce(operator, row, now=after(announced))
    for at in (begin - 15 * 60, begin, begin + hours * HOUR):
        maintenance.clock(after(at))
        site_loop.run(world.host.site_id, now=after(at))
    row.refresh_from_db()
    assert row.state == "completed"
    return row


def test_announced_hours_are_borne_and_what_is_beyond_them_comes_back(market: World):
    contract = sign(market, "reserved", 8, start=MONTH, end=MONTH + 30 * DAY, maintenance_hours_per_month=4)
    work(market, MONTH + DAY, 1.75)  # two hours with the quarter before
    work(market, MONTH + 2 * DAY, 5.75)
    invoice = market.close(MONTH + 31 * DAY)
    whole = 8 * 30 * 24 * 200
    assert lines(invoice) == [("commitment", whole), ("credit", -8 * 4 * 200)]
    assert invoice.total_minor == whole - 8 * 4 * 200
    credit = InvoiceLine.objects.get(kind="credit")
    assert credit.contract == contract
    assert "GPU-hours reserved but missing" in credit.description
    assert Host.objects.get().state == "active"
    collect(invoice)
    settled(market, invoice)
    assert_invariants()


def test_an_emergency_is_never_borne_and_what_was_paid_at_signing_comes_back_with_it(market: World):
    sign(market, "flexible", 8, start=MONTH, end=MONTH + 30 * DAY, maintenance_hours_per_month=100)
    reason = {"emergency": True, "emergency_reason": "A pump leaks."}
    work(market, MONTH + DAY, 1.75, announced=MONTH + DAY - HOUR, **reason)
    invoice = market.close(MONTH + 31 * DAY)
    assert lines(invoice) == [("commitment", 8 * 30 * 24 * 160), ("credit", -8 * 2 * 160)]
    collect(invoice)
    settled(market, invoice)


def test_the_months_edge_and_an_early_end_are_exact(market: World):
    sign(market, "reserved", 8, start=MONTH, end=MONTH + 60 * DAY, maintenance_hours_per_month=0)
    edge = MONTH + 31 * DAY  # December
    operator = factories.actor(market.operator)
    row = maintenance.draft(
        operator, market.host.site, scope="site", text="Cooling.", now=NOW, starts_at=after(edge - 3600),
        ends_at=after(edge + 4 * HOUR),
    )  # fmt: skip
    maintenance.announce(operator, row, now=NOW)
    for at in (edge - HOUR - 15 * 60, edge - HOUR):
        maintenance.clock(after(at))
    december = market.close(edge)
    assert dict(lines(december))["credit"] == -round(8 * 1.25 * 200)
    maintenance.finish(operator, row, now=after(edge + HOUR) + timedelta(milliseconds=700))
    january = market.close(edge + 31 * DAY)
    assert dict(lines(january))["credit"] == -8 * 200
