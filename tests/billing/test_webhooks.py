import hashlib
import hmac
import json
import random
import time

import pytest
from django.test import RequestFactory

from billing import payments, reconcile, webhooks
from billing.models import Invoice, Payment, Payout, StripeEvent
from marketplace.models import OutboxMessage
from tests.billing.conftest import SECRETS, Stripe, World, add_card, after, assert_invariants, drain, make_world
from tests.billing.test_payments import HOUR, billed, onboard, submit
from tests.factories import NOW

pytestmark = pytest.mark.django_db(transaction=True)


def signature(body: bytes, secret: str = SECRETS[0], at: float | None = None) -> str:
    stamp = int(time.time() if at is None else at)
    digest = hmac.new(secret.encode(), f"{stamp}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={stamp},v1={digest}"


def event(type_: str, object_: dict, event_id: str = "evt_1") -> bytes:
    body = {
        "id": event_id, "object": "event", "type": type_, "created": 1_790_000_000, "livemode": False,
        "data": {"object": object_}, "api_version": "2026-10-28.endive",
    }  # fmt: skip
    return json.dumps(body).encode()


def post(body: bytes, header: str | None):
    headers = {} if header is None else {"HTTP_STRIPE_SIGNATURE": header}
    request = RequestFactory().post("/webhooks/stripe", body, content_type="application/json", **headers)
    return webhooks.stripe_webhook(request)


PAID = event("invoice.paid", {"id": "in_1", "object": "invoice"})


@pytest.mark.parametrize(
    ("body", "header"),
    [
        (PAID, None),
        (PAID, ""),
        (PAID, "t=1,v1=00"),
        (PAID, signature(PAID, "whsec_stolen")),
        (PAID, signature(PAID, at=1)),
        (PAID + b" ", signature(PAID)),
        (PAID, "v1=" + signature(PAID).split("v1=")[1]),
    ],
    ids=["missing", "empty", "nonsense", "other secret", "old", "changed body", "no time"],
)
def test_what_is_not_signed_by_us_is_refused(stripe_api: Stripe, body, header):
    answer = post(body, header)
    assert answer.status_code == 400
    assert json.loads(answer.content)["code"] == "signature_invalid"
    assert not StripeEvent.objects.exists()


@pytest.mark.parametrize("secret", SECRETS)
def test_each_live_secret_is_good_and_an_event_is_kept_once(stripe_api: Stripe, secret: str):
    assert post(PAID, signature(PAID, secret)).status_code == 200
    assert post(PAID, signature(PAID, secret)).status_code == 200
    assert StripeEvent.objects.get().object_id == "in_1"
    assert OutboxMessage.objects.filter(topic="billing.handle_event").count() == 1


def test_a_signed_body_that_is_no_event_is_refused(stripe_api: Stripe):
    for body in (b"{}", b"[1]", b"nonsense"):
        assert post(body, signature(body)).status_code == 400


def test_only_posts_are_taken(stripe_api: Stripe):
    assert webhooks.stripe_webhook(RequestFactory().get("/webhooks/stripe")).status_code == 405


def test_a_forged_success_pays_nothing(stripe_api: Stripe):
    world = make_world()
    add_card(stripe_api, world, "pm_card_chargeCustomerFail")
    invoice = billed(world)
    drain()
    invoice.refresh_from_db()
    body = event(
        "invoice.paid", {"id": invoice.stripe_invoice, "object": "invoice", "status": "paid", "amount_paid": 250}
    )
    post(body, signature(body))
    drain()
    invoice.refresh_from_db()
    assert invoice.state == "open"
    assert StripeEvent.objects.get(event_id="evt_1").handled_at is not None


def test_paid_on_stripes_page_reaches_us_by_any_order_of_events_twice(stripe_api: Stripe):
    world = make_world()
    onboard(stripe_api, world)
    add_card(stripe_api, world, "pm_card_chargeCustomerFail")
    invoice = billed(world)
    drain()
    invoice.refresh_from_db()
    assert submit(invoice.pay_url, number="4242424242424242", expiry="12/34", cvc="123", name="A") in {200, 302, 303}
    bodies = [json.dumps(each).encode() for each in stripe_api.objects("event")]
    shuffled = bodies * 2
    random.Random(7).shuffle(shuffled)
    for body in shuffled:
        assert post(body, signature(body)).status_code == 200
    assert StripeEvent.objects.count() == len(bodies)
    while drain():
        pass
    invoice.refresh_from_db()
    assert invoice.state == "paid"
    assert Payment.objects.filter(state="succeeded").count() == 1
    assert Payout.objects.get().state == "sent", Payout.objects.get().last_error
    assert StripeEvent.objects.filter(handled_at=None).count() == 0
    assert_invariants()


def test_lost_webhooks_are_found_by_the_hourly_look(stripe_api: Stripe):
    world = make_world()
    url = payments.start_card_setup(world.customer, success_url="http://x/", cancel_url="http://x/", now=NOW)
    submit(url, number="4242424242424242", expiry="12/34", cvc="123", name="A")
    assert not world.account.payment_method
    assert reconcile.missed_events(NOW) > 0
    while drain():
        pass
    assert world.account.card_last4 == "4242"
    assert reconcile.missed_events(NOW) == 1  # what making the card the default told
    known = StripeEvent.objects.count()
    assert reconcile.missed_events(NOW) == 0
    assert StripeEvent.objects.count() == known


def test_the_sweep_revives_a_lost_message_and_retries_when_due(stripe_api: Stripe, paying: World):
    invoice = billed(paying)
    OutboxMessage.objects.all().delete()
    assert reconcile.sweep(after(3 * HOUR))["mirrored"] == 1
    assert reconcile.sweep(after(3 * HOUR))["mirrored"] == 0
    drain()
    assert Invoice.objects.get(pk=invoice.pk).state == "paid"
    assert reconcile.reconcile(after(4 * HOUR))["ledger"] == 0


def test_a_declined_payment_is_tried_again_when_it_is_due(stripe_api: Stripe):
    world = make_world()
    add_card(stripe_api, world, "pm_card_chargeCustomerFail")
    invoice = billed(world)
    drain()
    good = stripe_api.attach_card(world.account.stripe_customer)
    type(world.account).objects.update(payment_method=good)
    invoice.refresh_from_db()
    assert reconcile.sweep(invoice.next_attempt_at - (after(1) - NOW))["paid"] == 0
    assert reconcile.sweep(invoice.next_attempt_at)["paid"] == 1
    assert_invariants()
