"""A commitment is not due while its GPUs cannot be used for want of a host: to the second, by itself, in the same month's invoice."""

import pytest

from billing.models import InvoiceLine
from marketplace.models import Host
from marketplace.services import agents, contracts, gpu_health
from marketplace.tenancy import SYSTEM
from scheduler import site_loop
from tests import factories
from tests.billing.conftest import Stripe, World, add_card, after, assert_invariants, make_world
from tests.billing.test_kinds import DAY, MONTH, Contract, collect, lines, onboard, settled, sign
from tests.factories import NOW

pytestmark = pytest.mark.django_db(transaction=True)
HOUR = 3600


@pytest.fixture
def market(stripe_api: Stripe) -> World:
    made = make_world()
    Contract.objects.filter(pk=made.contract.pk).update(state="cancelled", ended_at=NOW)
    onboard(stripe_api, made)
    add_card(stripe_api, made)
    return made


def falls(world: World, at: float):
    """A GPU of the world's one host is sick, and the clock looks eight seconds later."""
    agent = world.host.site.agents.first() or factories.agent(world.host.site)[0]
    type(agent).objects.filter(pk=agent.pk).update(last_sync_at=after(at), lease_until=after(at + DAY))
    Host.objects.update(beat_at=after(at))
    event = {
        "id": f"00000000-0000-4000-8000-{int(at):012d}", "at": after(at), "kind": "gpu_error", "subject": world.host.name,
        "data": {"gpu": 3, "kind": "xid", "code": 79},
    }  # fmt: skip
    agents.observe(agent, {"agent_time": after(at), "boot": f"b{at}", "sequence": 1, "events": [event]}, now=after(at))
    assert Host.objects.get().state == "draining"
    contracts.clock(after(at + 8))


def returns(world: World, at: float):
    type(world.host.site.agents.first()).objects.update(last_sync_at=after(at))
    gpu_health.well(Host.objects.get(), actor=SYSTEM, now=after(at), why="passed")
    contracts.clock(after(at + 8))


@pytest.mark.parametrize(("kind", "price"), [("reserved", 200), ("flexible", 160)])
def test_what_could_not_be_used_comes_back_on_the_same_invoice(market: World, kind, price):
    contract = sign(market, kind, 8, start=MONTH, end=MONTH + 30 * DAY, maintenance_hours_per_month=100)
    falls(market, MONTH + DAY)
    returns(market, MONTH + DAY + 2 * HOUR)
    falls(market, MONTH + 2 * DAY)
    returns(market, MONTH + 2 * DAY + HOUR + 1)
    invoice = market.close(MONTH + 31 * DAY)
    missing = 8 * (3 * HOUR + 1)
    whole = 8 * 30 * 24 * price
    assert lines(invoice) == [("commitment", whole), ("credit", -round(missing * price / 3600))]
    credit = InvoiceLine.objects.get(kind="credit")
    assert credit.contract == contract
    assert "GPU-hours reserved but missing" in credit.description
    collect(invoice)
    settled(market, invoice)
    assert_invariants()


def test_a_site_that_falls_silent_past_its_lease_costs_its_customers_nothing_from_its_last_word_on(market: World):
    sign(market, "reserved", 8, start=MONTH, end=MONTH + 30 * DAY)
    last, back = MONTH + DAY, MONTH + DAY + 5 * HOUR
    agent, _ = factories.agent(market.host.site, last_sync_at=after(last), lease_until=after(last + 900))
    Host.objects.update(beat_at=after(last))
    site_loop.run(market.host.site_id, now=after(last + 901))
    contracts.clock(after(last + 908))
    type(agent).objects.filter(pk=agent.pk).update(last_sync_at=after(back), lease_until=after(back + DAY))
    Host.objects.update(beat_at=after(back))
    site_loop.run(market.host.site_id, now=after(back))
    contracts.clock(after(back + 8))
    invoice = market.close(MONTH + 31 * DAY)
    assert lines(invoice) == [("commitment", 8 * 30 * 24 * 200), ("credit", -8 * 5 * 200)]
    collect(invoice)
    settled(market, invoice)
    assert_invariants()


def test_the_months_edge_while_it_goes_on(market: World):
    sign(market, "reserved", 8, start=MONTH, end=MONTH + 60 * DAY)
    edge = MONTH + 31 * DAY
    falls(market, edge - HOUR)
    assert dict(lines(market.close(edge)))["credit"] == -8 * 200
    returns(market, edge + 3 * HOUR)
    assert dict(lines(market.close(edge + 31 * DAY)))["credit"] == -3 * 8 * 200


def test_what_others_ran_beyond_it_is_measured_against_what_it_really_had(market: World):
    """Used as much as could be had, and nothing is overage: what was missing was not held either."""
    sign(market, "reserved", 2, start=MONTH, end=MONTH + 10 * DAY)
    market.ran(MONTH, 10 * DAY - HOUR, gpus=2)
    falls(market, MONTH + 10 * DAY - HOUR)
    made = dict(lines(market.close(MONTH + 11 * DAY)))
    assert made == {"commitment": 2 * 240 * 200, "credit": -2 * 200}
