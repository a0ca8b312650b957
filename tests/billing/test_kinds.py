"""The money of each kind of contract, from signing to the operator's transfer, through the sandbox's Stripe."""

from datetime import UTC, datetime, timedelta

import pytest

from billing import invoices, ledger, payments, payouts, standing, upfront, usage
from billing.models import Invoice, InvoiceLine, Payment, Payout
from marketplace.models import BillingStanding, Contract, Curtailment, PlacementEvent
from marketplace.services import contracts, quotes
from tests import factories
from tests.billing.conftest import (
    Stripe,
    World,
    add_card,
    after,
    assert_invariants,
    assert_known_at_once,
    drain,
    make_world,
    unclaim,
)
from tests.billing.test_payments import HOUR, onboard
from tests.factories import NOW

pytestmark = pytest.mark.django_db(transaction=True)
DAY = 86_400
MONTH = (datetime(2026, 12, 1, tzinfo=UTC) - NOW) / timedelta(seconds=1)  # the first of a month, in seconds after NOW


@pytest.fixture
def market(stripe_api: Stripe) -> World:
    """A customer with a card and an operator who can be paid; no contract yet."""
    made = make_world()
    Contract.objects.filter(pk=made.contract.pk).update(state="cancelled", ended_at=NOW)
    onboard(stripe_api, made)
    add_card(stripe_api, made)
    return made


def sign(
    world: World, kind: str, gpus: int, *, start: float | None = None, end: float | None = None, at: float = 0,
    upfront_max: int | None = None, **terms,
):  # fmt: skip
    """A contract by quote and signature at NOW + at; `terms` are set on the listing first."""
    type(world.listing).objects.filter(pk=world.listing.pk).update(**terms)
    actor = factories.actor(world.customer)
    wanted = quotes.Request(
        kind, gpus, starts_at=None if start is None else after(start), ends_at=None if end is None else after(end),
        upfront_max_permille=upfront_max,
    )  # fmt: skip
    made = quotes.quote(actor, world.listing.pk, wanted, now=after(at))
    world.contract = contracts.accept(actor, made.pk, now=after(at))
    return world.contract


def lines(invoice: Invoice) -> list[tuple[str, int]]:
    return [(line.kind, line.amount_minor) for line in invoice.lines.order_by("position")]


def collect(*made: Invoice | None) -> None:
    """Everything that waits for Stripe: mirrored, paid, transferred."""
    for invoice in made:
        assert invoice is not None
        payments.mirror(invoice.pk, now=invoice.finalized_at)
        invoice.refresh_from_db()
        assert invoice.state == "paid", invoice.last_error
    while drain():
        unclaim()


def paid_out() -> int:
    assert set(Payout.objects.values_list("state", flat=True)) <= {"sent"}
    return sum(Payout.objects.values_list("amount_minor", flat=True))


def settled(world: World, *made: Invoice) -> None:
    """Everybody has what is theirs, and nothing hangs between the accounts."""
    total = sum(invoice.total_minor for invoice in made)
    operator = sum(sum(i.lines.values_list("operator_minor", flat=True)) for i in made)
    assert paid_out() == operator
    assert ledger.balance("receivable", "USD", world.customer.pk) == 0
    assert ledger.balance("prepaid", "USD", world.customer.pk) == 0
    assert ledger.totals("USD").get("platform_fee", 0) == -(total - operator)
    assert_invariants()
    assert_known_at_once(world, *made)


def test_on_demand_is_billed_by_the_second(market: World):
    sign(market, "on_demand", 8)
    market.ran(100, 1801, gpus=3)
    market.ran(4000, 59, gpus=8)
    invoice = market.close(2 * HOUR)
    seconds = 3 * 1801 + 8 * 59
    assert lines(invoice) == [("usage", round(seconds * 250 / 3600))]
    collect(invoice)
    settled(market, invoice)


def test_reserved_bills_its_commitment_first_and_what_goes_beyond_as_overage(market: World):
    sign(market, "reserved", 2, start=MONTH, end=MONTH + 10 * DAY)
    market.ran(MONTH, 10 * DAY, gpus=3)
    half = market.close(MONTH + 5 * DAY)
    assert lines(half) == [("commitment", 2 * 120 * 200)]  # 15 of 20 GPU-days are drawn, nothing is beyond yet
    rest = market.close(MONTH + 11 * DAY)
    assert lines(rest) == [("commitment", 2 * 120 * 200), ("overage", 240 * 250)]
    collect(half, rest)
    settled(market, half, rest)


def test_a_reservation_that_nobody_used_is_due_all_the_same(market: World):
    sign(market, "reserved", 8, start=MONTH, end=MONTH + 2 * DAY)
    invoice = market.close(MONTH + 3 * DAY)
    assert lines(invoice) == [("commitment", 8 * 48 * 200)]
    collect(invoice)
    settled(market, invoice)


@pytest.mark.parametrize(
    ("kind", "cents", "terms"), [("flexible", 160, {}), ("reserved", 200, {"emergency_notice_s": 300})]
)
def test_what_gives_way_is_free_meanwhile(market: World, kind, cents, terms):
    """Flexible for any call, reserved for an emergency that its contract names."""
    contract = sign(market, kind, 8, start=MONTH, end=MONTH + 2 * DAY, **terms)
    assert contract.price == cents * 10_000
    placement = market.ran(MONTH, 6 * HOUR, gpus=8)
    site = market.host.site
    Curtailment.objects.create(
        site=site, node=factories.a_node(site), reference="grid-7", cap_w=1, starts_at=after(MONTH + 6 * HOUR),
        ends_at=after(MONTH + 9 * HOUR), state="completed", ended_at=after(MONTH + 8.5 * HOUR),
        settled_at=after(MONTH + 8.6 * HOUR), created_by="grid",
    )  # fmt: skip
    Curtailment.objects.update(created_at=after(MONTH + 5 * HOUR))
    PlacementEvent.objects.create(
        placement=placement, at=after(MONTH + 6 * HOUR), actor="power", from_state="running", to_state="draining",
        reason=f"curtailment {Curtailment.objects.get().public_id}",
    )  # fmt: skip
    invoice = market.close(MONTH + 3 * DAY)
    assert lines(invoice) == [("commitment", round(8 * (48 - 2.5) * cents))]
    words = f"364.000 GPU-hours reserved, {contract.public_id}, less 20.000 for the grid: {Curtailment.objects.get().public_id}"
    assert invoice.lines.get().description.endswith(words)
    collect(invoice)
    settled(market, invoice)


def test_an_early_end_bills_what_its_rule_leaves_due(market: World):
    contract = sign(market, "reserved", 4, start=MONTH, end=MONTH + 20 * DAY)
    contracts.terminate(factories.actor(market.customer), contract, now=after(MONTH + 4 * DAY))
    contract.refresh_from_db()
    assert contract.ends_at == after(MONTH + 8 * DAY)  # a quarter of 16 days
    invoice = market.close(MONTH + 21 * DAY)
    assert lines(invoice) == [("commitment", 4 * 8 * 24 * 200)]
    collect(invoice)
    settled(market, invoice)


# --- what is due at signing


def test_what_is_due_at_signing_is_collected_then_drawn_down_first(market: World):
    contract = sign(market, "reserved", 4, start=MONTH, end=MONTH + 10 * DAY, upfront_permille=300)
    total = 4 * 240 * 200
    assert (contract.state, contract.upfront_minor) == ("pending_payment", total * 3 // 10)
    first = upfront.issue(contract.pk, now=after(60))
    assert upfront.issue(contract.pk, now=after(60)).pk == first.pk
    assert lines(first) == [("upfront", total * 3 // 10)]
    assert (first.kind, first.due_minor, first.state) == ("upfront", total * 3 // 10, "open")
    collect(first)
    contract.refresh_from_db()
    assert (contract.state, contract.starts_at) == ("active", after(MONTH))
    assert ledger.balance("prepaid", "USD", market.customer.pk) == -first.total_minor
    assert paid_out() == 0  # nobody has earned it yet
    preview = invoices.preview(market.customer, after(MONTH + 2 * DAY))
    made = [market.close(MONTH + day * DAY) for day in (2, 5, 10)]
    assert lines(made[0]) == [("commitment", 38_400), ("drawdown", -38_400)]
    assert [row.line.amount for row in preview.lines] == [38_400, -38_400]
    assert lines(made[1]) == [("commitment", 57_600), ("drawdown", -19_200)]
    assert lines(made[2]) == [("commitment", 96_000)]
    assert made[0].state == "paid"
    collect(*made[1:])
    settled(market, first, *made)
    assert sum(invoice.due_minor for invoice in (first, *made)) == total


def test_a_price_tier_is_invoiced_at_its_price_with_its_share_due_at_signing(market: World):
    tiers = [
        {"kind": "reserved", "min_term_hours": 240, "upfront_permille": 400, "flexible_hours_per_month": 0, "price": 1_500_000},
        {"kind": "reserved", "min_term_hours": 480, "upfront_permille": 400, "flexible_hours_per_month": 0, "price": 1_000_000},
    ]  # fmt: skip
    contract = sign(market, "reserved", 4, start=MONTH, end=MONTH + 10 * DAY, upfront_max=500, price_tiers=tiers)
    total = 4 * 240 * 150
    assert (contract.price, contract.upfront_minor) == (1_500_000, total * 4 // 10)
    first = upfront.issue(contract.pk, now=after(60))
    collect(first)
    type(market.listing).objects.update(price_tiers=[])
    made = market.close(MONTH + 10 * DAY)
    assert lines(made) == [("commitment", total), ("drawdown", -total * 4 // 10)]
    collect(made)
    settled(market, first, made)


def test_what_is_left_of_it_at_an_early_end_goes_back(market: World):
    contract = sign(market, "reserved", 4, start=MONTH, end=MONTH + 10 * DAY, upfront_permille=1000)
    first = upfront.issue(contract.pk, now=after(60))
    collect(first)
    contract.refresh_from_db()
    contracts.terminate(factories.actor(market.customer), contract, now=after(MONTH + 2 * DAY))
    last = market.close(MONTH + 11 * DAY)
    owed = 4 * 4 * 24 * 200  # two days, and a quarter of the eight that were left
    assert lines(last) == [("commitment", owed), ("drawdown", -first.total_minor)]
    assert ledger.balance("prepaid", "USD", market.customer.pk) == 0
    assert ledger.balance("receivable", "USD", market.customer.pk) == owed - first.total_minor  # a credit
    rate = sign(market, "on_demand", 8, at=MONTH + 11 * DAY)
    market.ran(MONTH + 12 * DAY, 10 * HOUR, gpus=8, contract=rate)
    following = market.close(MONTH + 13 * DAY)
    assert (following.credit_minor, following.due_minor, following.state) == (20_000, 0, "paid")
    assert_invariants()


def test_a_declined_card_leaves_no_debt_and_a_good_one_activates(market: World, stripe_api: Stripe):
    add_card(stripe_api, market, "pm_card_chargeCustomerFail")
    contract = sign(market, "reserved", 4, end=10 * DAY, upfront_permille=500)
    first = upfront.issue(contract.pk, now=after(1))
    payments.mirror(first.pk, now=after(2))
    first.refresh_from_db()
    assert (first.state, first.next_attempt_at, Payment.objects.get().state) == ("open", None, "failed")
    assert first.last_error
    assert BillingStanding.objects.get(organization=market.customer).state == "good"
    assert standing.dun(after(40 * DAY)) == 0
    add_card(stripe_api, market)  # collects what is open
    contract.refresh_from_db()
    assert contract.state == "active"
    assert contract.starts_at == NOW
    assert_invariants()


def test_a_payment_that_does_not_come_voids_its_invoice(market: World, stripe_api: Stripe):
    add_card(stripe_api, market, "pm_card_chargeCustomerFail")
    contract = sign(market, "reserved", 4, end=10 * DAY, upfront_permille=500)
    first = upfront.issue(contract.pk, now=after(1))
    payments.mirror(first.pk, now=after(2))
    assert contracts.clock(after(HOUR)).payments_lapsed == 1
    for _ in range(2):
        upfront.withdraw(contract.pk, now=after(HOUR))
    first.refresh_from_db()
    assert first.state == "void"
    assert [row["status"] for row in stripe_api.objects("invoice")] == ["void"]
    assert ledger.balance("receivable", "USD", market.customer.pk) == 0
    assert ledger.balance("prepaid", "USD", market.customer.pk) == 0
    assert payments.pay(first.pk, now=after(HOUR)) is False
    assert market.close(11 * DAY) is None
    assert_invariants()


def test_an_invoice_voided_before_it_was_mirrored_is_never_charged(market: World, stripe_api: Stripe):
    contract = sign(market, "reserved", 4, end=10 * DAY, upfront_permille=500)
    first = upfront.issue(contract.pk, now=after(1))
    contracts.terminate(factories.actor(market.customer), contract, now=after(2))
    upfront.withdraw(contract.pk, now=after(3))
    payments.mirror(first.pk, now=after(4))
    first.refresh_from_db()
    assert (first.state, stripe_api.objects("invoice")) == ("void", [])
    assert_invariants()


def test_a_payment_that_was_faster_than_the_cancellation_comes_back_as_credit(market: World):
    contract = sign(market, "reserved", 4, end=10 * DAY, upfront_permille=500)
    first = upfront.issue(contract.pk, now=after(1))
    contracts.terminate(factories.actor(market.customer), contract, now=after(2))
    payments.mirror(first.pk, now=after(2))  # the worker was about to charge
    upfront.withdraw(contract.pk, now=after(3))
    first.refresh_from_db()
    contract.refresh_from_db()
    assert (first.state, contract.state) == ("paid", "cancelled")
    back = market.close(DAY)
    assert lines(back) == [("drawdown", -first.total_minor)]
    assert ledger.balance("receivable", "USD", market.customer.pk) == -first.total_minor
    assert ledger.balance("prepaid", "USD", market.customer.pk) == 0
    assert_invariants()


def test_credit_pays_what_is_due_at_signing(market: World):
    """Nothing is left to charge: the contract is active at once."""
    contract = sign(market, "reserved", 4, end=10 * DAY, upfront_permille=500)
    collect(upfront.issue(contract.pk, now=after(1)))
    contract.refresh_from_db()
    contracts.terminate(factories.actor(market.customer), contract, now=after(2))
    market.close(4 * DAY)
    again = sign(market, "reserved", 1, start=5 * DAY, end=6 * DAY, at=4 * DAY)
    invoice = upfront.issue(again.pk, now=after(4 * DAY))
    again.refresh_from_db()
    assert (invoice.state, invoice.due_minor, again.state) == ("paid", 0, "active")
    assert_invariants()


# --- changes


def test_an_extension_and_gpus_that_joined_are_billed_each_at_its_price(market: World):
    contract = sign(market, "reserved", 2, start=MONTH, end=MONTH + 2 * DAY)
    actor = factories.actor(market.customer)
    longer = contracts.amendments.extend(actor, contract, after(MONTH + 4 * DAY), now=after(60))
    contracts.accept_amendment(actor, longer, now=after(60))
    contract.refresh_from_db()
    type(market.listing).objects.filter(pk=market.listing.pk).update(reserved_price=3_000_000)
    more = contracts.amendments.resize(actor, contract, 6, now=after(MONTH + DAY))
    more = contracts.accept_amendment(actor, more, now=after(MONTH + DAY))
    first = market.close(MONTH + 2 * DAY)
    assert lines(first) == [("commitment", 2 * 48 * 200), ("commitment", 4 * 24 * 300)]
    market.ran(MONTH, 4 * DAY, gpus=6)
    rest = market.close(MONTH + 5 * DAY)
    beyond = 6 * 4 * DAY - 2 * 4 * DAY - 4 * 3 * DAY  # it ran before they had joined
    assert lines(rest) == [
        ("commitment", 2 * 48 * 200), ("commitment", 4 * 48 * 300), ("overage", round(beyond * 250 / 3600))
    ]  # fmt: skip
    billed = sum(i.lines.filter(price_millionths=3_000_000).get().amount_minor for i in (first, rest))
    assert more.total_minor == billed
    collect(first, rest)
    settled(market, first, rest)


def test_a_price_with_consent_is_billed_from_its_second_whenever_it_is_metered(market: World):
    contract = sign(market, "on_demand", 8)
    at = 30 * DAY
    rise = contracts.prices.propose(factories.actor(market.operator), contract, 3_000_000, after(at), now=NOW)
    contracts.accept_amendment(factories.actor(market.customer), rise, now=after(DAY))
    contracts.clock(after(at + 60))  # the contract's own column says the new price before anything was metered
    market.ran(at - HOUR, 2 * HOUR, gpus=2)
    invoice = market.close(at + 2 * HOUR)
    assert sorted(lines(invoice)) == [("usage", 2 * 250), ("usage", 2 * 300)]
    collect(invoice)
    settled(market, invoice)


# --- default


def test_an_invoice_unpaid_to_the_end_ends_the_contracts_and_bills_what_stays_due(market: World, stripe_api: Stripe):
    contract = sign(market, "reserved", 4, start=MONTH, end=MONTH + 100 * DAY)
    add_card(stripe_api, market, "pm_card_chargeCustomerFail")
    first = market.close(MONTH + DAY)
    payments.mirror(first.pk, now=after(MONTH + DAY))
    at = MONTH + 29 * DAY
    standing.dun(after(at - 1))
    assert standing.default_contracts(first.pk, now=after(at)) == [contract.pk]
    contract.refresh_from_db()
    assert (contract.state, contract.ended_at, contract.ends_at) == ("defaulted", after(at), after(at + 71 * DAY / 4))
    after_all = market.close(MONTH + 100 * DAY)
    billed = sum(InvoiceLine.objects.filter(contract=contract).values_list("quantity", flat=True))
    assert billed == 4000 * (29 * DAY + 71 * DAY // 4)
    assert after_all is not None
    assert standing.default_contracts(first.pk, now=after(at)) == []
    assert_invariants()


def test_the_last_step_of_dunning_is_taken_once_and_not_for_what_was_paid(market: World, stripe_api: Stripe):
    contract = sign(market, "on_demand", 8)
    add_card(stripe_api, market, "pm_card_chargeCustomerFail")
    market.ran(0, HOUR)
    invoice = market.close(2 * HOUR)
    payments.mirror(invoice.pk, now=after(2 * HOUR))
    assert [standing.dun(after(2 * HOUR + 28 * DAY)) for _ in range(2)] == [4, 0]
    add_card(stripe_api, market)
    payments.pay(invoice.pk, now=after(2 * HOUR + 28 * DAY))
    drain("billing.default_contracts")
    contract.refresh_from_db()
    assert contract.state == "active"


def test_nothing_is_metered_twice_by_all_that(market: World):
    sign(market, "on_demand", 8)
    market.ran(0, HOUR)
    market.close(2 * HOUR)
    assert usage.drift(since=after(0), until=after(3 * HOUR)) == 0
    assert payouts.unsettled(market.operator.pk) == {}
