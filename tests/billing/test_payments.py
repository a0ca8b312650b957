import urllib.request
from datetime import timedelta
from urllib.parse import urlencode

import pytest

from billing import gateway, invoices, ledger, payments, payouts, reconcile
from billing.models import (
    BillingAccount,
    BillingCase,
    DunningStep,
    Invoice,
    OperatorAccount,
    Payment,
    Payout,
    StripeCall,
)
from billing.standing import dun
from marketplace.errors import MarketError
from marketplace.models import BillingStanding
from tests import factories
from tests.billing.conftest import Stripe, World, add_card, after, assert_invariants, drain, make_world, unclaim
from tests.factories import NOW

pytestmark = pytest.mark.django_db(transaction=True)
HOUR = 3600


class Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_args):
        return None


def submit(url: str, **form: str) -> int:
    """Post a form of one of the sandbox's pages; a redirect is the answer, not followed."""
    try:
        with urllib.request.build_opener(Stay).open(url, urlencode(form).encode(), timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def billed(world: World, seconds: float = HOUR, at: float = 2 * HOUR) -> Invoice:
    world.ran(at - 1.5 * HOUR, seconds)
    invoice = world.close(at)
    assert invoice is not None
    return invoice


def standing(world: World) -> str:
    return BillingStanding.objects.get(organization=world.customer).state


def onboard(stripe_api: Stripe, world: World) -> OperatorAccount:
    link = payouts.onboarding_link(
        world.operator, refresh_url="http://127.0.0.1:1/again", return_url="http://127.0.0.1:1/back", now=NOW
    )
    assert submit(link, registered_name="Basin Power", bank_account="1", result="complete") in {302, 303}
    return payouts.refresh_recipient(world.operator, now=NOW)


def test_a_card_added_on_the_checkout_page_opens_the_account(stripe_api: Stripe):
    world = make_world()
    url = payments.start_card_setup(
        world.customer, success_url="http://127.0.0.1:1/ok", cancel_url="http://127.0.0.1:1/no", now=NOW
    )
    assert url.startswith(stripe_api.url)
    payments.refresh_card(world.customer, now=NOW)
    assert standing(world) == "no_card"
    assert submit(url, number="4242424242424242", expiry="12/34", cvc="123", name="A") in {302, 303}
    account = payments.use_newest_card(world.customer, now=NOW)
    assert (account.card_brand, account.card_last4, account.card_expires) == ("visa", "4242", "2034-12")
    assert standing(world) == "good"
    assert StripeCall.objects.filter(answered_at=None).count() == 0
    assert len(stripe_api.objects("customer")) == 1
    assert payments.portal_url(world.customer, return_url="http://127.0.0.1:1/", now=NOW).startswith(stripe_api.url)


def test_from_usage_to_paid_invoice_to_transfer(stripe_api: Stripe, paying: World):
    onboard(stripe_api, paying)
    invoice = billed(paying)
    drain()
    drain()
    invoice.refresh_from_db()
    assert (invoice.state, invoice.due_minor) == ("paid", 250)
    (remote,) = stripe_api.objects("invoice")
    assert (remote["status"], remote["total"], remote["number"]) == ("paid", 250, invoice.display_number)
    payment = Payment.objects.get()
    assert payment.state == "succeeded"
    assert payment.stripe_payment_intent.startswith("pi_")
    payout = Payout.objects.get()
    share = sum(invoice.lines.values_list("operator_minor", flat=True))
    assert (payout.state, payout.amount_minor, share) == ("sent", 213, 213)
    (transfer,) = stripe_api.objects("transfer")
    assert (transfer["amount"], transfer["id"]) == (213, payout.stripe_transfer)
    assert ledger.totals("USD") == {
        "receivable": 0, "operator_accrued": 0, "operator_payable": 0, "platform_fee": -37, "stripe_clearing": 37,
    }  # fmt: skip
    assert reconcile.compare_mirror(NOW, since=NOW - timedelta(days=400)) == 0
    assert_invariants()


def test_everything_may_run_twice(stripe_api: Stripe, paying: World):
    onboard(stripe_api, paying)
    invoice = billed(paying)
    for _ in range(2):
        payments.mirror(invoice.pk, now=NOW)
    assert payments.pay(invoice.pk, now=NOW) is False  # nothing left to charge
    payouts.settle(paying.operator.pk, now=NOW)
    payouts.settle(paying.operator.pk, now=NOW)
    payout = Payout.objects.get()
    assert payouts.send(payout.pk, now=NOW)
    assert payouts.send(payout.pk, now=NOW)
    assert not payments.mark_paid(invoice.pk, "", now=NOW)
    assert [len(stripe_api.objects(kind)) for kind in ("invoice", "payment_intent", "transfer")] == [1, 1, 1]
    assert_invariants()


def test_a_declined_card_makes_the_account_past_due_until_another_pays(stripe_api: Stripe):
    world = make_world()
    add_card(stripe_api, world, "pm_card_chargeCustomerFail")
    assert standing(world) == "good"
    invoice = billed(world)
    drain()
    invoice.refresh_from_db()
    assert invoice.state == "open"
    assert "declined" in invoice.last_error
    assert invoice.next_attempt_at is not None
    assert standing(world) == "past_due"
    assert Payment.objects.get().failure_code == "card_declined"
    with pytest.raises(MarketError, match="declined") as refused:
        payments.pay_again(invoice, now=NOW)
    assert refused.value.code == "payment_failed"
    assert refused.value.extra["pay_url"].startswith(stripe_api.url)
    add_card(stripe_api, world)  # a good one: what waits is paid at once
    invoice.refresh_from_db()
    assert invoice.state == "paid"
    assert standing(world) == "good"
    assert [p.state for p in Payment.objects.order_by("attempt")] == ["failed", "failed", "succeeded"]
    assert_invariants()


def test_a_card_that_wants_its_owner_leaves_the_link(stripe_api: Stripe):
    world = make_world()
    add_card(stripe_api, world, "pm_card_authenticationRequired")
    invoice = billed(world)
    drain()
    invoice.refresh_from_db()
    assert Payment.objects.get().state == "requires_action"
    assert invoice.state == "open"
    assert invoice.next_attempt_at is None
    assert invoice.pay_url.startswith(stripe_api.url)


def test_without_a_card_the_invoice_waits_and_dunning_suspends(stripe_api: Stripe):
    world = make_world()
    invoice = billed(world)
    drain()
    invoice.refresh_from_db()
    assert (invoice.state, invoice.last_error, Payment.objects.count()) == ("open", "no card", 0)
    day = timedelta(days=1)
    issued = invoice.finalized_at
    assert dun(issued + 2 * day) == 0
    assert dun(issued + 3 * day) == 1
    assert dun(issued + 15 * day) == 2
    assert dun(issued + 15 * day) == 0
    assert list(DunningStep.objects.order_by("day").values_list("action", flat=True)) == ["notify", "notify", "suspend"]
    assert standing(world) == "suspended"
    add_card(stripe_api, world)
    invoice.refresh_from_db()
    assert invoice.state == "paid"
    assert standing(world) == "good"
    assert dun(issued + 30 * day) == 0


PATHS = (
    "/v1/invoices",
    "/v1/invoices/*/add_lines",
    "/v1/invoices/*/finalize",
    "/v1/invoices/*/pay",
    "/v1/transfers",
)


def settle_down(stripe_api: Stripe, world: World, invoice: Invoice, nth: int) -> None:
    """Time passes until nothing waits; then the nth invoice is paid and paid out, once."""
    for _ in range(4):
        unclaim()
        drain()
    invoice.refresh_from_db()
    assert invoice.state == "paid"
    assert list(Payout.objects.values_list("state", flat=True)) == ["sent"] * nth
    live = [remote for remote in stripe_api.objects("invoice") if remote["status"] != "draft"]
    assert [remote["total"] for remote in live] == [250] * nth
    paid = [intent for intent in stripe_api.objects("payment_intent") if intent["status"] == "succeeded"]
    assert len(paid) == nth
    assert len(stripe_api.objects("transfer")) == nth
    assert_invariants()


@pytest.mark.parametrize("kind", ["429", "500", "500_after_commit", "timeout", "timeout_after_commit"])
def test_a_fault_at_any_call_loses_and_doubles_nothing(stripe_api: Stripe, paying: World, kind: str):
    onboard(stripe_api, paying)
    for nth, path in enumerate(PATHS, start=1):
        invoice = billed(paying, at=2 * HOUR * nth)
        stripe_api.control("faults", {"api": [{"kind": kind, "method": "POST", "path": path, "times": 1}]})
        for _ in range(2):
            drain()
        assert stripe_api.control("faults", method="GET")["api"] == [], path
        settle_down(stripe_api, paying, invoice, nth)


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_beside_any_call_loses_and_doubles_nothing(
    stripe_api: Stripe, paying: World, monkeypatch: pytest.MonkeyPatch, when: str
):
    onboard(stripe_api, paying)

    class Killed(BaseException):
        pass

    steps = ("create_invoice", "add_lines", "finalize_invoice", "pay_invoice", "transfer")
    for nth, step in enumerate(steps, start=1):
        invoice = billed(paying, at=2 * HOUR * nth)
        real = getattr(gateway, step)

        def dying(*args, real=real, **kwargs):
            if when == "after":
                real(*args, **kwargs)
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(gateway, step, dying)
            with pytest.raises(Killed):
                drain()
        settle_down(stripe_api, paying, invoice, nth)


def test_a_total_that_differs_is_never_charged(stripe_api: Stripe, paying: World):
    invoice = billed(paying)
    draft = payments._remote_draft(invoice, NOW)  # and here the worker dies
    gateway.add_lines(draft.id, [("by hand, on Stripe's page", 1)], key="by-hand")
    payments.mirror(invoice.pk, now=NOW)
    invoice.refresh_from_db()
    assert invoice.state == "open"
    assert stripe_api.objects("payment_intent") == []
    assert BillingCase.objects.filter(kind="mirror", subject=invoice.public_id, closed_at=None).exists()
    assert BillingAccount.objects.get(organization=paying.customer).state == "parked"
    payments.mirror(invoice.pk, now=NOW)  # nothing happens until a person has looked
    assert stripe_api.objects("payment_intent") == []


def test_no_call_is_made_inside_a_transaction(paying: World):
    from django.db import transaction

    with transaction.atomic(), pytest.raises(RuntimeError, match="inside a transaction"):
        gateway.cards("cus_1")


def test_many_lines_are_aggregated_for_stripe(stripe_api: Stripe, paying: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gateway, "MAX_LINES", 3)
    others = [factories.contract(paying.listing, paying.customer) for _ in range(4)]
    for contract in others:
        paying.ran(0, HOUR, contract=contract)
    invoice = paying.close(2 * HOUR)
    assert invoice is not None
    assert payments.lines_for_stripe(invoice) == [(f"GPU capacity: see invoice {invoice.display_number}", 1000)]
    drain()
    invoice.refresh_from_db()
    assert invoice.state == "paid"


def test_operators_wait_until_onboarded_and_a_refused_transfer_is_tried_again(stripe_api: Stripe, paying: World):
    invoice = billed(paying)
    drain()
    assert not Payout.objects.exists()
    assert payouts.unsettled(paying.operator.pk) == {"USD": 213}
    with pytest.raises(MarketError, match="no operator"):
        payouts.onboarding_link(paying.customer, refresh_url="http://x", return_url="http://x", now=NOW)
    stripe_api.control("faults", {"settle_s": 1000})
    onboard(stripe_api, paying)
    payout = Payout.objects.get()
    other = factories.organization("Other")
    OperatorAccount.objects.filter(organization=paying.operator).update(stripe_account="acct_unknown")
    assert payouts.send(payout.pk, now=NOW) is False
    payout.refresh_from_db()
    assert payout.state == "failed"
    OperatorAccount.objects.filter(organization=paying.operator).update(
        stripe_account=stripe_api.objects("v2.core.account")[0]["id"]
    )
    assert payouts.retry_failed() == 1
    drain()
    payout.refresh_from_db()
    assert (payout.state, payout.attempt) == ("sent", 2)
    assert list(Payout.objects.visible_to(factories.actor(other))) == []
    assert list(Payout.objects.visible_to(factories.actor(paying.operator))) == [payout]
    assert list(Invoice.objects.visible_to(factories.actor(paying.operator))) == []
    assert list(Invoice.objects.visible_to(factories.actor(paying.customer))) == [invoice]
    assert_invariants()


def test_stripe_away_is_a_clear_answer(settings, stripe_api: Stripe):
    world = make_world()
    settings.STRIPE_BASE_URL = "http://127.0.0.1:9"
    with pytest.raises(MarketError) as refused:
        payments.start_card_setup(world.customer, success_url="http://x/", cancel_url="http://x/", now=after(0))
    assert refused.value.code == "service_unavailable"
    settings.STRIPE_BASE_URL = stripe_api.url
    payments.start_card_setup(world.customer, success_url="http://x/", cancel_url="http://x/", now=after(1))
    assert len(stripe_api.objects("customer")) == 1
    assert invoices.account_of(world.customer, now=NOW).stripe_customer
