"""Credits of GPUs held lower while their call ends beside the month's close, and two closers at once: once, and to the second."""

import threading
from datetime import timedelta

import pytest
from django.db import transaction

from billing import drafts, invoices
from billing.core import rating
from billing.models import InvoiceLine
from marketplace.locks import Lock, acquire
from marketplace.models import Curtailment, HeldLower, Host
from marketplace.services import power
from tests import factories
from tests.billing.conftest import World, after, make_world
from tests.races.market import blocked
from tests.threads import at_once, in_thread

pytestmark = pytest.mark.django_db(transaction=True)
HOUR = 3600
MONTH = int((after(0).replace(month=12, day=1, hour=0, minute=0, second=0) - after(0)).total_seconds())


@pytest.fixture
def world() -> World:
    """By use and of a commitment, 3 and 5 GPUs of one host, running over the end of a month; held to 500 of 700 W from 23:00 on, and
    told their full limits two minutes before midnight.
    """
    made = make_world()
    held = factories.contract(
        made.listing, made.customer, kind="reserved", gpu_count=5, starts_at=after(MONTH - 2 * HOUR), ends_at=after(MONTH + 9 * HOUR)
    )  # fmt: skip
    made.ran(MONTH - 2 * HOUR, 6 * HOUR, gpus=3)
    made.ran(MONTH - 2 * HOUR, 6 * HOUR, gpus=5, contract=held)
    site = made.host.site
    call = Curtailment.objects.create(
        site=site, node=factories.a_node(site), reference="deep", cap_w=1, starts_at=after(MONTH - HOUR),
        ends_at=after(MONTH - 120), state="restoring", created_by="grid",
    )  # fmt: skip
    Host.objects.filter(pk=made.host.pk).update(desired_generation=3, applied_generation=2)
    HeldLower.objects.create(
        curtailment=call, host=made.host, gpu_w=500, full_w=700, starts_at=after(MONTH - HOUR), lifted_generation=3
    )
    return made


def read_back(world: World, second: float, *, beside: threading.Event | None = None) -> str:
    """The host has read its full limits back, and the site's loop hears of it at that second; it commits once `beside` is set."""
    Host.objects.filter(pk=world.host.pk).update(applied_generation=3)
    with transaction.atomic():
        acquire((Lock.SITE, world.host.site_id))
        power.settle_held(power.Ledger.of(world.host.site_id), now=after(second))
        if beside is not None:
            assert beside.wait(30)
    return "over"


def credited(world: World) -> list[int]:
    """Milli-GPU-seconds, of use and of the commitment."""
    found: dict[int, int] = {}
    for line in InvoiceLine.objects.filter(kind="held_lower").order_by("contract_id"):
        found[line.contract_id] = found.get(line.contract_id, 0) - line.quantity
    return list(found.values())


def due(seconds: int) -> list[int]:
    return [seconds * rating.withheld(gpus * 1000, 500, 700) for gpus in (3, 5)]


def seconds_held() -> int:
    (row,) = HeldLower.objects.all()
    return int(row.ends_at.timestamp()) - int(row.starts_at.timestamp())


@pytest.mark.parametrize("edge", [MONTH, MONTH - 30], ids=["the month's end", "within the month"])
def test_a_call_that_ends_while_the_close_runs_is_credited_to_its_last_second_by_the_next(world: World, edge: int):
    """The close does not see what the site's loop has not committed, and credits through its edge; the next takes back what was too much,
    also in a month that is closed: it looks again at whatever was recorded in the hour before the close (`drafts.LATE_OVERLAP`).
    """
    late = threading.Event()
    over = in_thread(lambda: read_back(world, edge - 10, beside=late))
    try:
        first = world.close(edge)
        assert credited(world) == due(edge - MONTH + HOUR), "as far as anybody knew"
    finally:
        late.set()
    assert over() == "over"
    second = world.close(MONTH + HOUR)
    assert seconds_held() == edge - 10 - MONTH + HOUR
    assert credited(world) == due(seconds_held())
    lines = InvoiceLine.objects.filter(kind="held_lower")
    assert {line.month_s for line in lines} == {int(after(MONTH).replace(month=11).timestamp())}
    assert all(line.amount_minor > 0 for line in lines.filter(invoice=second))
    assert lines.filter(invoice=second).count() == lines.filter(invoice=first).count() == 2
    world.close(MONTH + 2 * HOUR)
    assert credited(world) == due(seconds_held()), "once"


def test_a_call_that_begins_while_the_month_is_closed_is_credited_from_its_first_second_by_the_next(world: World):
    row = HeldLower.objects.get()
    HeldLower.objects.all().delete()
    late = threading.Event()

    def begins():
        with transaction.atomic():
            acquire((Lock.SITE, world.host.site_id))
            row.pk, row.starts_at, row.lifted_generation = None, after(MONTH - 4), None
            row.save(force_insert=True)
            assert late.wait(30)

    begun = in_thread(begins)
    try:
        world.close(MONTH)
    finally:
        late.set()
    begun()
    assert credited(world) == []
    world.close(MONTH + HOUR)
    assert credited(world) == due(HOUR + 4)
    by_month = InvoiceLine.objects.filter(kind="held_lower").values_list("month_s", "adjustment")
    assert sorted(set(by_month)) == [
        (int(after(MONTH).replace(month=11).timestamp()), True),
        (int(after(MONTH).timestamp()), False),
    ]


def test_two_closers_through_different_instants_credit_each_second_once(world: World, monkeypatch):
    """The second waits for the first, and bills from where it has come to."""
    rate, rival, over = drafts.rate, [], threading.Event()

    def closes():
        try:
            return world.close(MONTH + HOUR)
        finally:
            over.set()

    def meanwhile(*args, **kwargs):
        if not rival:
            rival.append(in_thread(closes))
            while not blocked() and not over.wait(0.02):
                pass
        return rate(*args, **kwargs)

    monkeypatch.setattr(drafts, "rate", meanwhile)
    first = world.close(MONTH)
    second = rival[0]()
    assert first.period_end == second.period_start == after(MONTH)
    assert credited(world) == due(2 * HOUR)
    assert list(world.customer.invoices.values_list("pk", flat=True)) == [second.pk, first.pk]


@pytest.mark.parametrize("edge", [MONTH, MONTH - 30])
def test_an_end_and_many_closers_from_one_barrier_come_to_the_same_in_any_order(world: World, edge: int):
    closers = [lambda t=t: invoices.close_period(world.customer, after(t), now=after(edge + 5)).pk for t in [edge] * 3]
    answers = at_once([lambda: read_back(world, edge - 10), *closers])
    assert answers[0] == "over"
    assert len(set(answers[1:])) == 1, "one invoice, whoever asks"
    world.close(MONTH + HOUR)
    assert credited(world) == due(seconds_held())
    assert timedelta(seconds=seconds_held()) == timedelta(seconds=edge - 10 - MONTH + HOUR)
