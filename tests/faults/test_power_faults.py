"""Every row of the failure table in design/power.md, played on a site whose physics, not our books, say what was drawn."""

import pytest

from marketplace.models import Miner, PowerNode, ShedClaim
from tests.faults.yard import Yard

pytestmark = pytest.mark.django_db


@pytest.fixture
def yard():
    made = Yard()
    made.turn(3)  # three looks at calm
    return made


def booked(pdu):
    return PowerNode.objects.get(name=pdu).reserved_mw // 1000


def test_honest_machines_give_their_watts_within_a_minute_and_take_them_back(yard):
    one, two = yard.submit(), yard.submit()
    yard.until(lambda: yard.state(one) == yard.state(two) == "running", seconds=60)
    assert not ShedClaim.objects.filter(state="failed").exists()
    yard.turn(6)
    yard.end(one)
    yard.end(two)
    yard.until(lambda: not Miner.objects.filter(desired_mode=0).exists(), seconds=400)
    assert Miner.objects.filter(state="ok").count() == 14


# --- acks, no drop: once more with a fresh session; mark unresponsive; choose a replacement; never grant on it
def asked(yard, job_gpus=8):
    """Submit a job; the machines that are asked for its watts, before they have heard of it."""
    job = yard.submit(gpus=job_gpus)
    yard.link = False
    yard.turn()
    yard.link = True
    return job, list(Miner.objects.filter(shed_claims__state="commanded").order_by("pk").values_list("name", flat=True))


@pytest.mark.parametrize("fault", ["phantom", "ack_ignore"])
def test_acks_and_does_not_drop(yard, fault):
    job, batch = asked(yard)
    liar = batch[0]
    yard.fleet.set_fault(liar, fault)
    generation = yard.miner(liar).desired_generation
    yard.until(lambda: yard.state(job) == "running", seconds=120)
    yard.until(lambda: yard.miner(liar).state == "unresponsive", seconds=60)
    assert yard.miner(liar).desired_generation > generation  # commanded once more
    assert yard.miner(liar).reserved_w >= 3500  # nameplate
    failed = next(c for c in yard.claims(liar) if c.state == "failed")
    assert (failed.attempts, failed.reason) == (2, "phantom_load" if fault == "phantom" else "acknowledged_no_drop")
    replaced = set(Miner.objects.filter(desired_mode=0, state="ok").values_list("name", flat=True)) - set(batch)
    assert replaced, "somebody else sleeps in its place"
    yard.fleet.set_fault(liar, "")
    yard.until(lambda: not Miner.objects.filter(state="unresponsive").exists(), seconds=600)
    assert yard.claims(liar)[-1].state == "confirmed"  # a test of its own, which the meter believed


def test_a_liar_that_is_tested_and_lies_again_is_not_believed(yard):
    _, batch = asked(yard)
    liar = batch[0]
    yard.fleet.set_fault(liar, "phantom")
    failed = lambda: sum(c.state == "failed" for c in yard.claims(liar))  # noqa: E731
    yard.until(lambda: failed() == 2, seconds=600)
    assert yard.miner(liar).state == "unresponsive"
    assert yard.miner(liar).reserved_w >= 3500
