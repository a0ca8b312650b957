from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.db import IntegrityError, connection, transaction

from billing import drafts, invoices, ledger, usage
from billing.core import metering
from billing.models import BillingAccount, BillingCase, Invoice, InvoiceLine, UsageRecord
from marketplace.errors import MarketError
from marketplace.models import Curtailment, OutboxMessage, Placement, PlacementEvent
from tests import factories
from tests.billing.conftest import World, after, assert_invariants, make_world
from tests.factories import NOW

pytestmark = pytest.mark.django_db
HOUR = 3600
DAY = 86400


def check_now() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")


def amounts(invoice: Invoice) -> list[tuple[str, int, int]]:
    return [(line.kind, line.quantity, line.amount_minor) for line in invoice.lines.all()]


def test_an_interim_invoice_bills_running_seconds_rounded_once(world: World):
    for start in range(3):
        world.ran(start * 10, 1)
    invoice = world.close(HOUR)
    assert amounts(invoice) == [("usage", 3000, 0)]
    world.ran(2 * HOUR, HOUR, gpus=2)
    invoice = world.close(4 * HOUR)
    assert amounts(invoice) == [("usage", 2 * 1000 * HOUR, 500)]
    line = invoice.lines.get()
    assert (line.operator_minor, line.platform_minor) == (425, 75)
    assert (invoice.state, invoice.total_minor, invoice.due_minor) == ("open", 500, 500)
    assert (invoice.period_start, invoice.period_end) == (after(HOUR), after(4 * HOUR))
    assert invoice.display_number == "TR-000002"
    assert OutboxMessage.objects.filter(topic=invoices.MIRROR, key=str(invoice.pk)).count() == 1
    check_now()
    assert ledger.totals("USD") == {"receivable": 500, "operator_accrued": -425, "platform_fee": -75}
    assert_invariants()


def test_the_edge_may_cut_a_running_placement_and_closing_twice_bills_once(world: World):
    placement = world.ran(100, None)
    first = world.close(1000)
    assert world.close(1000, now=5000).pk == first.pk
    second = world.close(3700, now=3700)
    assert [line.quantity for line in (first.lines.get(), second.lines.get())] == [900_000, 2_700_000]
    Placement.objects.filter(pk=placement.pk).update(state="released", finished_at=after(4000))
    third = world.close(9000)
    assert third.lines.get().quantity == 300_000
    assert world.close(9999) is None
    with pytest.raises(MarketError, match="Already billed"):
        world.close(50, now=9999)
    with pytest.raises(MarketError, match="to come"):
        world.close(99_999, now=9999)
    assert_invariants()


def test_a_past_edge_inside_recorded_hours_is_exact(world: World):
    world.ran(0, None)
    usage.meter_all(after(5 * HOUR))
    assert world.close(HOUR + 7, now=5 * HOUR).lines.get().quantity == 1000 * (HOUR + 7)
    assert world.close(5 * HOUR).lines.get().quantity == 1000 * (4 * HOUR - 7)


def test_preview_is_what_the_close_will_say_and_writes_no_usage(world: World):
    world.ran(0, 500)
    world.ran(100, None, gpus=4)
    draft = invoices.preview(world.customer, after(1234.6))
    assert UsageRecord.objects.count() == 0
    assert not draft.error
    invoice = world.close(1234.6)
    assert draft.total_minor == invoice.total_minor > 0
    assert [row.description for row in draft.lines] == list(invoice.lines.values_list("description", flat=True))
    assert invoices.preview(world.customer, after(1234.6)).lines == []
    later = invoices.preview(world.customer, after(2000))
    assert later.total_minor == world.close(2000).total_minor


def test_late_usage_is_a_marked_adjustment_on_the_next_invoice(world: World):
    world.ran(0, 100)
    assert world.close(1000).total_minor == 7
    world.ran(200, HOUR / 2)  # reported only now
    invoice = world.close(3 * HOUR)
    lines = [(line.adjustment, line.quantity, line.amount_minor) for line in invoice.lines.all()]
    assert lines == [(False, 1_000_000, 69), (True, 800_000, 56)]
    assert_invariants()


def test_late_usage_of_an_earlier_month_is_found_and_a_correction_gives_money_back(world: World):
    november = world.ran(0, 10 * HOUR)
    december = (datetime(2026, 12, 1, tzinfo=UTC) - NOW) / timedelta(seconds=1)
    assert world.close(december).total_minor == 2500
    Placement.objects.filter(pk=november.pk).update(
        finished_at=after(9 * HOUR), release_requested_at=after(9 * HOUR), metered_through=None
    )
    usage.meter_all(after(december + 5))
    invoice = world.close(december + DAY)
    (line,) = invoice.lines.all()
    assert (line.adjustment, line.quantity, line.amount_minor) == (True, -1000 * HOUR, -250)
    assert line.month_s == metering.floor_second(datetime(2026, 11, 1, tzinfo=UTC))
    assert (invoice.state, invoice.due_minor) == ("paid", 0)
    world.ran(december + 2 * DAY, 2 * HOUR)
    following = world.close(december + 3 * DAY)
    assert (following.total_minor, following.credit_minor, following.due_minor) == (500, 250, 250)
    check_now()
    assert_invariants()


def test_a_credit_is_applied_to_the_next_invoice_once_nothing_else_is_owed(world: World):
    placement = world.ran(0, 10 * HOUR)
    first = world.close(11 * HOUR)
    paid(first)
    Placement.objects.filter(pk=placement.pk).update(finished_at=after(8 * HOUR), release_requested_at=after(8 * HOUR))
    world.close(12 * HOUR)
    world.ran(12 * HOUR, HOUR)
    third = world.close(14 * HOUR)
    assert (third.total_minor, third.credit_minor, third.due_minor, third.state) == (250, 250, 0, "paid")
    world.ran(15 * HOUR, 2 * HOUR)
    fourth = world.close(18 * HOUR)
    assert (fourth.total_minor, fourth.credit_minor, fourth.due_minor) == (500, 250, 250)
    check_now()
    assert_invariants()


def test_what_is_too_small_to_charge_is_carried_and_settled_with_the_next(world: World):
    world.ran(0, 600)
    first = world.close(HOUR)
    assert (first.total_minor, first.credit_minor, first.due_minor, first.state) == (42, 42, 0, "open")
    assert not OutboxMessage.objects.filter(topic=invoices.MIRROR).exists()
    world.ran(HOUR, 60)
    second = world.close(2 * HOUR)
    assert (second.total_minor, second.credit_minor, second.due_minor, second.state) == (4, 4, 0, "open")
    world.ran(2 * HOUR, HOUR)
    third = world.close(4 * HOUR)
    assert (third.total_minor, third.credit_minor, third.due_minor) == (250, -46, 296)
    assert ledger.balance("operator_payable", "USD", world.operator.pk) == 0
    paid(third)
    assert set(Invoice.objects.values_list("state", flat=True)) == {"paid"}
    assert ledger.balance("receivable", "USD", world.customer.pk) == 0
    assert ledger.balance("operator_accrued", "USD", world.operator.pk) == 0
    check_now()
    assert_invariants()


def paid(invoice: Invoice) -> None:
    from billing import payments

    assert payments.mark_paid(invoice.pk, "", now=NOW)


def test_a_reservation_is_billed_used_or_not_and_overage_on_top(db):
    month = datetime(2026, 11, 1, tzinfo=UTC)
    world = make_world(
        kind="reserved", gpu_count=2, starts_at=month, ends_at=month + timedelta(days=30), overage_price=3_000_000
    )
    ten_days = (month + timedelta(days=10) - NOW) / timedelta(seconds=1)
    first = world.close(ten_days)
    assert amounts(first) == [("commitment", 2000 * 10 * DAY, 2 * 240 * 200)]
    end = (month + timedelta(days=30) - NOW) / timedelta(seconds=1)
    world.ran(ten_days, 10 * DAY, gpus=8)  # 80 GPU-days of the 60 that were committed
    second = world.close(end)
    assert amounts(second) == [
        ("commitment", 2000 * 20 * DAY, 2 * 480 * 200),
        ("overage", 20_000 * DAY, 480 * 300),
    ]
    assert world.close(end + DAY) is None
    assert_invariants()


def test_a_flexible_contract_is_not_billed_while_curtailed(db):
    world = make_world(kind="flexible", gpu_count=1, starts_at=NOW, ends_at=NOW + timedelta(days=2))
    site = world.host.site
    Curtailment.objects.create(
        site=site, node=factories.a_node(site), reference="c1", cap_w=1, starts_at=after(HOUR), ends_at=after(3 * HOUR),
        state="completed", created_by="grid",
    )  # fmt: skip
    Curtailment.objects.create(  # took nothing from the contract, though it drained it meanwhile: another's doing
        site=site, node=factories.a_node(site), reference="c2", cap_w=1, starts_at=after(12 * HOUR), ends_at=after(15 * HOUR),
        state="completed", created_by="grid",
    )  # fmt: skip
    Curtailment.objects.update(created_at=after(HOUR - 60))
    invoice = world.close(10 * HOUR)
    assert invoice.total_minor == 10 * 160  # no job of the contract was touched: nothing was taken away
    placement = world.ran(0, HOUR)
    PlacementEvent.objects.create(
        placement=placement,
        at=after(HOUR),
        actor="power",
        from_state="running",
        to_state="draining",
        reason=f"curtailment {Curtailment.objects.get(reference='c1').public_id}",
    )
    following = world.close(20 * HOUR)
    assert following.total_minor == (10 - 2) * 160


def test_a_final_invoice_cannot_be_changed(world: World):
    world.ran(0, HOUR)
    invoice = world.close(2 * HOUR)
    line = invoice.lines.get()
    attempts = [
        lambda: Invoice.objects.filter(pk=invoice.pk).update(total_minor=1),
        lambda: Invoice.objects.filter(pk=invoice.pk).update(number=77),
        lambda: Invoice.objects.filter(pk=invoice.pk).update(state="draft"),
        lambda: InvoiceLine.objects.filter(pk=line.pk).update(amount_minor=1, operator_minor=1, platform_minor=0),
        lambda: InvoiceLine.objects.filter(pk=line.pk).delete(),
        lambda: InvoiceLine.objects.bulk_create([_copy(line)]),
    ]
    for attempt in attempts:
        with pytest.raises(IntegrityError, match=r"final invoice|is final|cannot go"), transaction.atomic():
            attempt()


def _copy(line: InvoiceLine) -> InvoiceLine:
    line.pk, line.position = None, 99
    return line


def test_a_draft_whose_total_is_wrong_cannot_be_finalized(world: World):
    draft = Invoice.objects.create(
        account=world.account, organization=world.customer, kind="interim", legal_entity="T", currency="USD",
        period_start=NOW, period_end=after(5), total_minor=100, due_minor=100, created_at=NOW,
    )  # fmt: skip
    with pytest.raises(IntegrityError, match="do not agree"), transaction.atomic():
        Invoice.objects.filter(pk=draft.pk).update(state="open", number=1, finalized_at=NOW)


def test_numbers_have_no_gap_when_a_close_fails(world: World):
    world.ran(0, HOUR)
    world.close(2 * HOUR)
    world.ran(3 * HOUR, HOUR)

    def killed(execute: Any, sql: str, params: Any, many: bool, context: dict[str, Any]) -> Any:
        if "INSERT INTO billing_posting" in sql:
            raise RuntimeError("killed before the commit")
        return execute(sql, params, many, context)

    with connection.execute_wrapper(killed), pytest.raises(RuntimeError, match="killed"), transaction.atomic():
        world.close(5 * HOUR)
    assert Invoice.objects.count() == 1
    assert world.close(5 * HOUR).number == 2
    assert_invariants()


def test_what_cannot_be_rated_parks_its_account_and_the_run_goes_on(world: World):
    other = make_world()
    factories.contract(world.listing, world.customer, currency="EUR", kind="reserved")
    for each in (world, other):
        each.ran(0, HOUR)
    both = [world.account, other.account]
    assert invoices.close_many(both, after(2 * HOUR), "period", now=after(2 * HOUR)) == 1
    world.account.refresh_from_db()
    assert world.account.state == BillingAccount.State.PARKED
    case = BillingCase.objects.get(kind="parked", closed_at=None)
    assert "EUR" in case.detail
    with pytest.raises(MarketError, match="parked"):
        world.close(3 * HOUR)
    invoices.unpark(world.account, now=NOW, closed_by="staff@example.org")
    assert not BillingCase.objects.filter(closed_at=None).exists()


def test_a_total_out_of_all_proportion_parks_the_account(world: World, monkeypatch):
    monkeypatch.setattr(invoices, "UNUSUAL_FROM_MINOR", 1000)
    world.ran(0, HOUR // 10)
    world.close(HOUR)
    world.ran(HOUR, 10 * HOUR, gpus=8)
    with pytest.raises(MarketError, match="parked"):
        world.close(12 * HOUR)
    assert Invoice.objects.count() == 1


def test_a_line_leads_to_its_records(world: World):
    mine = world.ran(0, 100)
    world.ran(0, 50, contract=factories.contract(world.listing, world.customer))
    invoice = world.close(HOUR)
    line = invoice.lines.get(contract=world.contract)
    (record,) = invoices.records_of(line)
    assert record.placement == mine
    assert record.quantity == line.quantity


def test_closing_many_accounts_needs_a_constant_number_of_statements(db, django_assert_max_num_queries):
    worlds = [make_world() for _ in range(3)]
    for each in worlds:
        each.ran(0, HOUR)
        usage.meter(each.customer.pk, through=after(HOUR), now=after(HOUR))
    accounts = [each.account for each in worlds]
    with django_assert_max_num_queries(40):
        assert invoices.close_many(accounts, after(2 * HOUR), "period", now=after(2 * HOUR)) == 3
    assert sorted(Invoice.objects.values_list("number", flat=True)) == [1, 2, 3]
    assert drafts.starts(accounts, after(2 * HOUR))
    assert_invariants()
