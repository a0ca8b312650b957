"""The money of a resale, from the buyer's card to three invoices: whatever happens, it balances and everybody has what is his."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing import invoices, ledger, upfront
from billing.core import share
from billing.models import Invoice
from marketplace.models import Curtailment, Fill, PlacementEvent, Resale
from marketplace.services import contracts, quotes, sheds
from marketplace.services.forward import resales, sales
from tests import factories
from tests.billing.conftest import World, add_card, after, assert_invariants, assert_known_at_once
from tests.billing.test_kinds import DAY, MONTH, collect, lines, market, paid_out, sign
from tests.billing.test_payments import HOUR
from tests.factories import NOW

pytestmark = pytest.mark.django_db(transaction=True)
__all__ = ["market"]
ASK = 1_500_000


@pytest.fixture
def buyer(stripe_api, market: World) -> World:
    made = replace(market, customer=factories.organization("Borealis", standing="no_card"))
    factories.member(made.customer)
    add_card(stripe_api, made)
    return made


def resold(market: World, gpus=2, start=2.0, end=4.0, price=ASK) -> Resale:
    """Part of the world's contract is offered; days after the first of the month."""
    asked = resales.Asked(gpus, after(MONTH + start * DAY), after(MONTH + end * DAY), price)
    return resales.offer(factories.actor(market.customer), market.contract, asked, now=NOW)


def bought(buyer: World, resale: Resale, gpus=2, kind="reserved"):
    actor = factories.actor(buyer.customer)
    made = quotes.quote(actor, resale.listing_id, quotes.Request(kind, gpus), now=NOW)
    buyer.contract = contracts.accept(actor, made.pk, now=NOW)
    first = upfront.issue(buyer.contract.pk, now=after(60))
    collect(first)
    buyer.contract.refresh_from_db()
    assert buyer.contract.state == "active"
    return first


def parts(invoice):
    rows = invoice.lines.order_by("position")
    return [(r.kind, r.amount_minor, r.operator_minor, r.platform_minor, r.seller_minor) for r in rows]


def balanced(market: World, *worlds: World) -> None:
    for world in (market, *worlds):
        assert ledger.balance("receivable", "USD", world.customer.pk) == 0
        assert ledger.balance("prepaid", "USD", world.customer.pk) == 0
        assert ledger.balance("resale", "USD", world.customer.pk) == 0
    assert_invariants()
    owners = [world.customer.pk for world in (market, *worlds)]
    assert_known_at_once(market, *Invoice.objects.filter(organization__in=owners))


def test_the_buyer_pays_the_seller_is_credited_and_the_operator_has_what_he_had(market: World, buyer: World):
    sign(market, "reserved", 4, start=MONTH, end=MONTH + 10 * DAY)
    first = bought(buyer, resold(market))
    assert lines(first) == [("upfront", 14_400)]
    theirs = buyer.close(MONTH + 11 * DAY)
    assert parts(theirs) == [("commitment", 14_400, 0, 720, 13_680), ("drawdown", -14_400, 0, 0, 0)]
    assert ledger.balance("resale", "USD", market.customer.pk) == -13_680
    assert_invariants()
    preview = invoices.preview(market.customer, after(MONTH + 11 * DAY))
    ours = market.close(MONTH + 11 * DAY)
    assert parts(ours) == [("commitment", 192_000, 163_200, 28_800, 0), ("resale", -13_680, 0, 0, -13_680)]
    assert [row.line.amount for row in preview.lines] == [192_000, -13_680]
    resale = Resale.objects.get()
    credit = ours.lines.get(kind="resale")
    assert (credit.quantity, credit.price_millionths, credit.contract) == (2 * 48 * 3_600_000, ASK, market.contract)
    assert f"96.000 GPU-hours sold on ({resale.public_id}), credited less a fee of 5 %" in credit.description
    assert resale.public_id in theirs.lines.get(kind="commitment").description
    assert invoices.records_of(credit) == []
    collect(ours)
    assert paid_out() == 163_200
    assert ledger.totals("USD")["platform_fee"] == -(28_800 + 720)
    balanced(market, buyer)
    assert market.close(MONTH + 12 * DAY) is None  # nothing is credited twice


def test_sold_hours_are_no_part_of_what_may_be_drawn_down(market: World, buyer: World):
    sign(market, "reserved", 2, start=MONTH, end=MONTH + 10 * DAY)
    bought(buyer, resold(market, 1), 1)
    market.ran(MONTH, 9.5 * DAY, gpus=2)
    buyer.ran(MONTH + 2 * DAY, 3 * DAY, gpus=1)
    ours, theirs = market.close(MONTH + 11 * DAY), buyer.close(MONTH + 11 * DAY)
    assert lines(ours) == [("commitment", 2 * 240 * 200), ("overage", (2 * 228 - (2 * 240 - 48)) * 250)]
    assert parts(theirs)[:2] == [("commitment", 7_200, 0, 360, 6_840), ("overage", 24 * 250, 5_100, 900, 0)]
    collect(ours, theirs)
    credit = market.close(MONTH + 12 * DAY)
    assert lines(credit) == [("resale", -6_840)]
    assert ledger.balance("receivable", "USD", market.customer.pk) == -6_840  # the next invoice is less by so much
    assert ledger.balance("resale", "USD", market.customer.pk) == 0
    assert_invariants()


def test_billed_in_several_windows_comes_to_the_same(market: World, buyer: World):
    sign(market, "reserved", 3, start=MONTH, end=MONTH + 10 * DAY)
    bought(buyer, resold(market, 3, price=1_333_333), 3)
    credited = 0
    for day in (2.3, 3.1, 3.7, 5, 11):
        buyer.close(MONTH + day * DAY)
        made = market.close(MONTH + day * DAY)
        credited -= sum(made.lines.filter(kind="resale").values_list("amount_minor", flat=True)) if made else 0
        assert_invariants()
    paid = Fill.objects.get().contract.upfront_minor
    fee = -ledger.totals("USD")["platform_fee"] - round(3 * 240 * 200 * 0.15)
    assert abs(credited + fee - paid) <= 2  # each line is rounded once
    assert ledger.balance("resale", "USD", market.customer.pk) == 0


def test_an_unpaid_sale_moves_no_money(market: World, buyer: World):
    sign(market, "reserved", 4, start=MONTH, end=MONTH + 10 * DAY)
    resale = resold(market)
    actor = factories.actor(buyer.customer)
    contract = contracts.accept(
        actor, quotes.quote(actor, resale.listing_id, quotes.Request("reserved", 2), now=NOW).pk, now=NOW
    )
    first = upfront.issue(contract.pk, now=after(60))
    contracts.clock(contract.pay_by)
    upfront.withdraw(contract.pk, now=contract.pay_by)
    assert sales.undo(contract.pk, now=contract.pay_by)
    first.refresh_from_db()
    assert first.state == "void"
    assert buyer.close(MONTH + 11 * DAY) is None
    ours = market.close(MONTH + 11 * DAY)
    assert lines(ours) == [("commitment", 4 * 240 * 200)]
    collect(ours)
    balanced(market, buyer)


def test_what_is_sold_stays_due_when_its_seller_leaves_early(market: World, buyer: World):
    contract = sign(market, "reserved", 4, start=MONTH, end=MONTH + 20 * DAY)
    bought(buyer, resold(market, 2, 10, 20))
    contracts.terminate(factories.actor(market.customer), contract, now=after(HOUR))
    contract.refresh_from_db()
    assert contract.ends_at == after(MONTH + 5 * DAY)
    theirs, ours = buyer.close(MONTH + 21 * DAY), market.close(MONTH + 21 * DAY)
    assert parts(theirs)[0] == ("commitment", 72_000, 0, 3_600, 68_400)
    assert lines(ours) == [("commitment", 4 * 120 * 200 + 2 * 240 * 200), ("resale", -68_400)]
    collect(ours)
    balanced(market, buyer)


def test_after_its_sellers_default_the_buyer_pays_the_operator(market: World, buyer: World):
    contract = sign(market, "reserved", 4, start=MONTH, end=MONTH + 20 * DAY)
    bought(buyer, resold(market, 2, 4, 8))
    contracts.default(market.customer.pk, now=after(HOUR), reason="unpaid")
    contract.refresh_from_db()
    assert (contract.state, contract.ends_at) == ("defaulted", after(MONTH + 5 * DAY))
    buyer.contract.refresh_from_db()
    assert buyer.contract.state == "active"
    theirs, ours = buyer.close(MONTH + 21 * DAY), market.close(MONTH + 21 * DAY)
    day = 2 * 24 * 150
    fee = (day * 50 + 3 * day * 150) // 1000
    assert parts(theirs)[0] == ("commitment", 4 * day, 3 * day * 850 // 1000, fee, day * 950 // 1000)
    assert lines(ours) == [("commitment", 4 * 120 * 200), ("resale", -day * 950 // 1000)]
    assert_invariants()


def test_flexible_is_free_while_it_gave_way_for_seller_and_buyer(market: World, buyer: World):
    sign(market, "flexible", 4, start=MONTH, end=MONTH + 10 * DAY)
    bought(buyer, resold(market), 2, "flexible")
    placement = buyer.ran(MONTH + 2 * DAY, 6 * HOUR, gpus=2)
    start, end = after(MONTH + 2 * DAY + 6 * HOUR), after(MONTH + 2 * DAY + 9 * HOUR)
    site = market.host.site
    call = Curtailment.objects.create(
        site=site, node=factories.a_node(site), reference="grid-7", cap_w=1, starts_at=start, ends_at=end, state="completed",
        settled_at=end, created_by="grid",
    )  # fmt: skip
    Curtailment.objects.update(created_at=start - timedelta(hours=1))
    PlacementEvent.objects.create(
        placement=placement,
        at=start,
        actor="power",
        from_state="running",
        to_state="draining",
        reason=f"{sheds.REASON}{call.public_id}",
    )
    theirs = buyer.close(MONTH + 11 * DAY)
    due = 2 * 45 * 150
    assert parts(theirs) == [
        ("commitment", due, 0, 675, due - 675),
        ("drawdown", -14_400, 0, 0, 0),
    ]  # the rest goes back
    ours = market.close(MONTH + 11 * DAY)
    assert lines(ours)[-1] == ("resale", -(due - 675))
    assert_invariants()


@given(
    st.integers(-(10**12), 10**12),
    st.integers(0, 10**7),
    st.integers(0, 10**7),
    st.integers(0, 1000),
    st.integers(0, 1000),
)
def test_the_parts_of_a_resold_line_are_the_line(amount, seller_s, operator_s, fee, resale_fee):
    of = share.split_resold(amount, seller_s, operator_s, fee, resale_fee)
    assert of.seller + of.operator + of.platform == amount
    if not operator_s:
        assert of.operator == 0
        assert (of.seller, of.platform) == (
            share.split(amount, resale_fee).operator,
            share.split(amount, resale_fee).platform,
        )
    if operator_s and not seller_s:
        assert of.seller == 0


def test_parts_of_less_than_nothing_are_refused():
    with pytest.raises(ValueError, match="permille"):
        share.split_resold(1, -1, 0, 150, 50)


def test_two_months_are_credited_month_by_month(market: World, buyer: World):
    sign(market, "reserved", 2, start=MONTH, end=MONTH + 60 * DAY)
    bought(buyer, resold(market, 1, 20, 40), 1)
    january = (datetime(2027, 1, 1, tzinfo=UTC) - NOW).total_seconds()
    for world in (buyer, market):
        world.close(january)
    assert -market.contract.invoice_lines.get(kind="resale").amount_minor == 11 * 24 * 150 * 95 // 100
    assert_invariants()
