"""What a month has come to, and who is told: at 50, 80 and 100 % once, by an event and a mail."""

from collections import Counter
from datetime import date, timedelta

import pytest
from django.core import mail

from billing import budgets, invoices, tasks
from billing.models import Invoice, InvoiceLine
from marketplace.errors import MarketError
from marketplace.models import AuditEvent, Budget, OutboxMessage
from marketplace.services import spending
from tests import factories
from tests.billing.conftest import World, after
from tests.factories import NOW
from tests.threads import at_once

pytestmark = pytest.mark.django_db
MONTH = date(NOW.year, NOW.month, 1)
HOUR = 3600


def limits(world: World, **minor: int | None) -> Budget:
    return spending.set_limits(factories.actor(world.customer), world.customer, now=NOW, **minor)


def told() -> list[tuple[int, int]]:
    rows = AuditEvent.objects.filter(verb="budget.reached").order_by("id")
    return [(row.after["percent"], row.after["spent_minor"]) for row in rows]


def measured(world: World, seconds: float) -> int:
    return budgets.measure_all(after(seconds))


def an_hour(world: World) -> int:
    """Minor units of one GPU-hour."""
    return world.contract.price // 10_000


def test_a_month_is_what_was_billed_and_what_runs(world: World):
    world.ran(0, HOUR)
    assert budgets.month_spent(world.customer, now=after(2 * HOUR)) == an_hour(world)
    world.ran(HOUR, None)
    assert budgets.month_spent(world.customer, now=after(2 * HOUR)) == 2 * an_hour(world)
    assert world.close(2 * HOUR) is not None
    assert budgets.month_spent(world.customer, now=after(2 * HOUR)) == 2 * an_hour(world)
    assert budgets.month_spent(world.customer, now=after(3 * HOUR)) == 3 * an_hour(world)
    assert InvoiceLine.objects.exists()
    Invoice.objects.update(state="void")  # billed again by the next
    assert budgets.month_spent(world.customer, now=after(3 * HOUR)) == 3 * an_hour(world)


def test_a_month_begins_at_nothing(world: World):
    world.ran(0, HOUR)
    assert budgets.month_spent(world.customer, now=after(40 * 86_400)) == 0


def test_each_step_is_told_once_a_month_by_event_and_mail(world: World):
    for role in ("billing", "engineer"):  # an owner is there
        factories.member(world.customer, role)
    limits(world, monthly_minor=10 * an_hour(world))
    world.ran(0, None)
    for n, steps in ((4, 0), (5, 1), (6, 0), (8, 1), (9, 0), (12, 1), (13, 0)):
        assert measured(world, n * HOUR) == steps
        for message in OutboxMessage.objects.filter(topic=spending.ALERT).order_by("id"):  # the older ones once more
            tasks.budget_alert(message.payload)
    assert told() == [(step, n * an_hour(world)) for step, n in ((50, 5), (80, 8), (100, 12))]
    subjects = Counter(m.subject.rpartition(" is ")[2] for m in mail.outbox)
    assert subjects == {"50 % used": 2 * 2, "80 % used": 2 * 2, "used up": 2 * 2}  # looked at twice, two people
    assert "What runs goes on" in mail.outbox[-1].body
    assert "/billing/budget" in mail.outbox[-1].body


def test_steps_that_were_jumped_over_are_one_mail(world: World):
    limits(world, monthly_minor=2 * an_hour(world))
    world.ran(0, None)
    assert measured(world, 5 * HOUR) == 1
    assert told() == [(100, 5 * an_hour(world))]


def test_the_next_month_is_told_anew(world: World):
    limits(world, monthly_minor=100)
    assert spending.record_spend(world.customer.pk, month=MONTH, spent_minor=85, now=NOW) == 80
    following = (MONTH + timedelta(days=32)).replace(day=1)
    later = NOW + timedelta(days=32)
    assert spending.record_spend(world.customer.pk, month=following, spent_minor=10, now=later) == 0
    assert spending.record_spend(world.customer.pk, month=following, spent_minor=55, now=later) == 50


def test_a_larger_budget_puts_steps_ahead_again_a_smaller_one_tells_at_the_next_look(world: World):
    limits(world, monthly_minor=100)
    assert spending.record_spend(world.customer.pk, month=MONTH, spent_minor=100, now=NOW) == 100
    limits(world, monthly_minor=200)
    assert spending.record_spend(world.customer.pk, month=MONTH, spent_minor=150, now=NOW) == 0
    assert spending.record_spend(world.customer.pk, month=MONTH, spent_minor=160, now=NOW) == 80
    limits(world, monthly_minor=160)
    assert spending.record_spend(world.customer.pk, month=MONTH, spent_minor=160, now=NOW) == 100


def test_a_round_that_has_no_time_for_all_begins_with_the_longest_unmeasured(world: World, monkeypatch):
    monkeypatch.setattr(budgets, "ROUND_S", -1.0)
    limits(world, monthly_minor=10_000)
    others = [factories.organization() for _ in range(2)]
    for other in others:
        spending.set_limits(factories.actor(other), other, now=NOW, monthly_minor=10_000)
    for n in range(4):
        measured(world, HOUR + n)
    rounds = {row.organization_id: row.measured_at for row in Budget.objects.all()}
    assert rounds == {world.customer.pk: after(HOUR + 3), others[0].pk: after(HOUR + 1), others[1].pk: after(HOUR + 2)}


def test_an_older_measurement_changes_nothing(world: World):
    limits(world, monthly_minor=100)
    spending.record_spend(world.customer.pk, month=MONTH, spent_minor=60, now=after(60))
    assert spending.record_spend(world.customer.pk, month=MONTH, spent_minor=90, now=after(0)) == 0
    assert Budget.objects.get().spent_minor == 60


@pytest.mark.django_db(transaction=True)
def test_two_measurements_at_once_tell_once():
    organization = factories.organization()
    spending.set_limits(factories.actor(organization), organization, now=NOW, monthly_minor=100)
    steps = at_once([lambda: spending.record_spend(organization.pk, month=MONTH, spent_minor=55, now=NOW)] * 4)
    assert sorted(steps) == [0, 0, 0, 50]
    assert OutboxMessage.objects.filter(topic=spending.ALERT).count() == 1


def test_an_alert_that_is_no_longer_true_is_not_mailed(world: World):
    factories.member(world.customer, "owner")
    limits(world, monthly_minor=100)
    spending.record_spend(world.customer.pk, month=MONTH, spent_minor=60, now=NOW)
    assert spending.alert(world.customer.pk, MONTH, 50) > 0
    limits(world, monthly_minor=1000)
    assert spending.alert(world.customer.pk, MONTH, 50) == 0


def test_an_account_that_cannot_be_rated_keeps_its_last_measurement(world: World, monkeypatch):
    limits(world, monthly_minor=100)
    spending.record_spend(world.customer.pk, month=MONTH, spent_minor=60, now=NOW)
    other = factories.organization()
    spending.set_limits(factories.actor(other), other, now=NOW, monthly_minor=0)
    whole = invoices.preview

    def preview(organization, now):
        if organization == world.customer:
            raise RuntimeError("no price")
        return whole(organization, now)

    monkeypatch.setattr(invoices, "preview", preview)
    assert measured(world, 60) == 1  # the other is told all the same
    assert Budget.objects.get(organization=world.customer).spent_minor == 60


def test_a_change_is_audited_with_what_it_was(world: World):
    limits(world, monthly_minor=100, hourly_minor=5)
    limits(world, hourly_minor=None)
    limits(world, hourly_minor=None)  # no change, no row
    rows = AuditEvent.objects.filter(verb="budget.changed").order_by("id")
    assert [(row.before, row.after) for row in rows] == [
        ({"hourly_minor": None, "monthly_minor": None}, {"hourly_minor": 5, "monthly_minor": 100}),
        ({"hourly_minor": 5, "monthly_minor": 100}, {"hourly_minor": None, "monthly_minor": 100}),
    ]
    with pytest.raises(MarketError, match="monthly_minor"):
        limits(world, monthly_minor=-1)
