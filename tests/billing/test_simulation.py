"""A seeded month in which everything goes wrong that may: late and corrected usage, closes at any instant, faults, kills,
webhooks twice and out of order. After each step the invariants hold; at the end nothing is lost and nothing doubled."""

import json
import random
import threading
from collections.abc import Callable

import pytest
from django.db import connection

from billing import gateway, invoices, ledger, reconcile, standing, usage
from billing.core import metering
from billing.models import Invoice, InvoiceLine, Payout, UsageRecord
from marketplace.errors import MarketError
from marketplace.models import Placement, PlacementEvent
from tests.billing.conftest import Stripe, World, add_card, after, assert_invariants, drain, make_world, unclaim
from tests.billing.test_payments import HOUR, onboard
from tests.billing.test_webhooks import post, signature

pytestmark = pytest.mark.django_db(transaction=True)
FAULTS = ("429", "500", "500_after_commit", "timeout", "timeout_after_commit")


class Killed(BaseException):
    """The worker is gone."""


class Simulation:
    def __init__(self, stripe_api: Stripe, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.random = random.Random(seed)
        self.stripe = stripe_api
        self.patch = monkeypatch
        self.world = make_world()
        self.now = 0.0
        onboard(stripe_api, self.world)
        add_card(stripe_api, self.world)

    def steps(self) -> list[Callable[[], None]]:
        return [
            self.run_job,
            self.run_job,
            self.begin,
            self.end,
            self.correct,
            self.meter,
            self.close,
            self.work,
            self.die,
            self.hear,
        ]

    def tick(self) -> None:
        self.now += self.random.randint(1, 6 * HOUR) + self.random.random()

    def run_job(self) -> None:
        """A job that ended; it may have ended before the last close, and be reported only now."""
        length = self.random.randint(1, 2 * HOUR)
        start = max(0.0, self.now - length - self.random.choice([0, 0, 12 * HOUR]))
        self.world.ran(start, length, gpus=self.random.randint(1, 8))

    def begin(self) -> None:
        self.world.ran(self.now, None, gpus=self.random.randint(1, 4))

    def end(self) -> None:
        running = Placement.objects.filter(state="running").first()
        if running is not None and running.running_at < after(self.now):
            end = after(max(self.now - 5, (running.running_at - after(0)).total_seconds() + 1))
            Placement.objects.filter(pk=running.pk).update(
                state="released", finished_at=end, release_requested_at=end, exit_code=0
            )

    def correct(self) -> None:
        """An end that turns out to have been earlier than what was recorded."""
        done = Placement.objects.filter(state="released", running_at__isnull=False).order_by("?").first()
        if done is not None and (done.finished_at - done.running_at).total_seconds() > 10:
            half = done.running_at + (done.finished_at - done.running_at) / 2
            PlacementEvent.objects.create(
                placement=done,
                at=half,
                actor="staff",
                from_state="running",
                to_state="unreachable",
                reason="host fault",
            )
            Placement.objects.filter(pk=done.pk).update(exit_code=None, release_requested_at=half)
            usage.remeter([done.pk], now=after(self.now))

    def meter(self) -> None:
        usage.meter_all(after(self.now))

    def close(self) -> None:
        through = self.now - self.random.choice([0, 0, 100])
        try:
            self.world.close(max(1.0, through), now=self.now)
        except MarketError as refused:
            assert refused.code == "conflict"  # noqa: PT017 - an older edge than the last

    def work(self) -> None:
        fault = {"kind": self.random.choice(FAULTS), "method": "POST", "path": "/v*", "times": 1}
        self.stripe.control("faults", {"api": [fault] if self.random.random() < 0.5 else []})
        drain()
        unclaim()

    def die(self) -> None:
        step = self.random.choice(["create_invoice", "add_lines", "finalize_invoice", "pay_invoice", "transfer"])
        late = self.random.random() < 0.5
        real = getattr(gateway, step)

        def dying(*args, **kwargs):
            if late:
                real(*args, **kwargs)
            raise Killed

        with self.patch.context() as patch:
            patch.setattr(gateway, step, dying)
            try:
                drain()
            except Killed:
                unclaim()

    def hear(self) -> None:
        events = self.stripe.objects("event")
        for event in self.random.choices(events, k=min(5, len(events))):
            body = json.dumps(event).encode()
            assert post(body, signature(body)).status_code == 200

    def settle(self) -> None:
        """Quiet returns: no faults, everything ends, one last close, all work done."""
        self.stripe.control("faults", {"api": []})
        while Placement.objects.filter(state="running").exists():
            self.now += 10
            self.end()
        self.now += 2 * HOUR
        self.world.ran(self.now - HOUR, HOUR, gpus=8)  # more than the least that can be charged
        self.world.close(self.now, now=self.now)
        for _ in range(12):
            unclaim()
            if not drain():
                break
        reconcile.sweep(after(self.now + HOUR))
        unclaim()
        drain()


@pytest.mark.parametrize("seed", [1, 3, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(4, 24))])
def test_a_month_of_trouble(stripe_api: Stripe, monkeypatch: pytest.MonkeyPatch, seed: int):
    sim = Simulation(stripe_api, seed, monkeypatch)
    for _ in range(40):
        sim.tick()
        sim.random.choice(sim.steps())()
        assert_invariants()
    sim.settle()
    assert_invariants()
    assert Invoice.objects.exclude(state="paid").count() == 0
    assert Payout.objects.exclude(state="sent").count() == 0
    billed = sum(InvoiceLine.objects.values_list("quantity", flat=True))
    recorded = sum(row.quantity - row.previous for row in UsageRecord.objects.all())
    assert billed == recorded > 0
    truth = 0
    for placement in Placement.objects.filter(running_at__isnull=False):
        pieces = usage.billable(placement, placement.events.all(), until=placement.finished_at)
        truth += placement.milli_gpus * sum(piece.seconds for piece in pieces)
    assert recorded == truth
    due = sum(Invoice.objects.values_list("due_minor", flat=True))
    assert sum(i["amount"] for i in stripe_api.objects("payment_intent") if i["status"] == "succeeded") == due
    assert sum(t["amount"] for t in stripe_api.objects("transfer")) == sum(
        Payout.objects.values_list("amount_minor", flat=True)
    )
    assert reconcile.compare_mirror(after(sim.now), since=after(-400 * 24 * HOUR)) == 0
    assert ledger.balance("operator_accrued", "USD", sim.world.operator.pk) == 0
    assert standing.dun(after(sim.now)) == 0


def test_two_workers_close_one_account_once(stripe_api: Stripe, paying: World):
    paying.ran(0, HOUR)
    gate = threading.Barrier(4)
    outcomes: list[object] = []

    def close() -> None:
        gate.wait()
        try:
            made = invoices.close_period(paying.customer, after(2 * HOUR), now=after(3 * HOUR))
            outcomes.append(made.pk if made else None)
        except MarketError as refused:
            outcomes.append(refused.code)
        finally:
            connection.close()

    threads = [threading.Thread(target=close) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    invoice = Invoice.objects.get()
    assert set(outcomes) <= {invoice.pk, "busy"}
    assert invoice.pk in outcomes
    assert sum(row.quantity for row in UsageRecord.objects.all()) == 1000 * HOUR
    assert metering.floor_second(invoice.period_end) == metering.floor_second(after(2 * HOUR))
    assert_invariants()
