"""A market of a few hours with everybody in it, over the end of a month; `full`: some days of several seeds."""

from collections import Counter
from datetime import timedelta
from random import Random
from types import SimpleNamespace

import pytest
from django.db.models import F

from sandbox.market import environment, report
from sandbox.market.clock import Clock
from sandbox.market.house import House
from sandbox.market.market import Market
from tests.factories import NOW
from tests.marketplace.works import DAY, Yard

pytestmark = pytest.mark.django_db(transaction=True)
KEPT = (
    "every running second billed once",
    "window begins at its hour",
    "reserved capacity at the hour",
    "screening: nobody paid out without it",
    "screening: nothing signed that asks for it without it",
)


@pytest.mark.parametrize(
    ("seed", "days"), [(1, 0.5), *(pytest.param(seed, 3, marks=pytest.mark.full) for seed in (2, 3, 4))]
)
def test_every_promise_is_kept_and_the_books_balance(seed, days):
    environment.empty()
    outcome = Market(seed, days=days).run()
    assert not outcome.violations, "\n".join(report.lines(outcome))
    counts, money = outcome.counts, outcome.money
    assert counts["closes"] == 1
    happened = ("jobs", "Stripe events heard", "organizations that signed up later", "audits", *(
        f"contracts: {kind}" for kind in ("on_demand", "reserved", "flexible", "spot")
    ))  # fmt: skip
    assert not [what for what in happened if not counts[what]], counts
    assert counts["moves of states"] >= 4 * counts["jobs"]
    for promise in KEPT:
        assert outcome.promises[promise]["kept"] > 0, promise
    assert outcome.promises["terms frozen"]["made"] >= 8
    assert 0 < money["collected"] <= money["invoiced"]
    assert 0 < money["paid out"] <= money["operators' share"]
    assert money["our fee"] > 0
    assert outcome.occupancy["running"] > 0 < outcome.occupancy["reserved"]


@pytest.fixture
def house():
    """Nobody is there but who is made; its clock is the test's."""
    made = House(Clock(NOW), None, None, Random(1), Counter())  # type: ignore[arg-type]
    yield made
    made.end()


def test_a_window_that_is_signed_at_its_own_hour_begins_at_once(house: House):
    house.turn()
    contract = Yard().contract(gpus=8, term=(NOW, NOW + DAY))
    house.turn()
    contract.refresh_from_db()
    assert contract.began_at == NOW


def test_an_hour_that_work_on_something_else_steps_over_is_seen_to_next(house: House, monkeypatch):
    start = NOW + timedelta(minutes=5)
    contract = Yard().contract(gpus=8, term=(start, start + DAY))
    late = start + timedelta(seconds=40)
    with monkeypatch.context() as patched:
        patched.setattr(house, "settle", lambda: house.clock.to(late))
        house.turn()
    contract.refresh_from_db()
    assert contract.began_at is None
    assert house.next_mark() == contract.reservation.claims_at
    house.turn()
    contract.refresh_from_db()
    assert contract.began_at == late
    assert house.next_mark() == start + DAY


def test_watts_that_nobody_needs_any_more_have_the_loop_turn_before_who_comes_next(house: House):
    """Nobody is at work between two instants: what ended in between is still booked, and a claim at its hour needs it."""
    yard = Yard()
    host, site = yard.hosts[0], SimpleNamespace(pk=yard.site.pk, silent=False)
    house.sites = [site]  # type: ignore[list-item]
    type(host).objects.update(cap_control=True, reserved_w=F("parked_w"))
    assert house.slack() == set()
    type(host).objects.filter(pk=host.pk).update(reserved_w=F("parked_w") + 1)
    assert house.slack() == {yard.site.pk}
    site.silent = True
    assert house.slack() == set()
