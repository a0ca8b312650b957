"""Customers, cards and setup intents, as Stripe has them."""

import pytest
import stripe

pytestmark = pytest.mark.serverless


def test_customer_round_trip(api, customer):
    address = {"country": "US", "state": "TX", "city": "Austin", "line1": "1 Grid Rd", "postal_code": "78701"}
    updated = api.v1.customers.update(customer.id, {"address": address, "metadata": {"org": "7", "suite": ""}})
    assert updated.address.state == "TX"
    read = api.v1.customers.retrieve(customer.id)
    assert read.metadata.to_dict() == {"org": "7"}
    assert read.email == "ops@example.com"
    assert read.livemode is False


def test_deleted_customer_is_a_tombstone(api, customer):
    assert api.v1.customers.delete(customer.id).deleted is True
    assert api.v1.customers.retrieve(customer.id).deleted is True
    with pytest.raises(stripe.InvalidRequestError):
        api.v1.invoices.create({"customer": customer.id})


def test_tax_ids(api, customer):
    made = api.v1.customers.tax_ids.create(customer.id, {"type": "eu_vat", "value": "DE123456789"})
    assert [t.id for t in api.v1.customers.tax_ids.list(customer.id).data] == [made.id]


def test_a_card_is_attached_made_default_listed_and_detached(api, customer, card):
    method = card(customer, "pm_card_visa")
    assert (method.card.last4, method.card.brand, method.customer) == ("4242", "visa", customer.id)
    assert [m.id for m in api.v1.customers.payment_methods.list(customer.id).data] == [method.id]
    assert api.v1.customers.retrieve(customer.id).invoice_settings.default_payment_method == method.id
    assert api.v1.payment_methods.detach(method.id).customer is None
    assert api.v1.customers.retrieve(customer.id).invoice_settings.default_payment_method is None


def test_an_attached_card_cannot_go_to_somebody_else(api, customer, card):
    method = card(customer, "pm_card_visa")
    other = api.v1.customers.create({"name": "Stranger"})
    with pytest.raises(stripe.InvalidRequestError):
        api.v1.payment_methods.attach(method.id, {"customer": other.id})
    with pytest.raises(stripe.InvalidRequestError):
        api.v1.customers.update(other.id, {"invoice_settings": {"default_payment_method": method.id}})


@pytest.mark.parametrize(
    ("alias", "code", "decline"),
    [
        ("pm_card_chargeDeclined", "card_declined", "generic_decline"),
        ("pm_card_chargeDeclinedInsufficientFunds", "card_declined", "insufficient_funds"),
        ("pm_card_chargeDeclinedExpiredCard", "expired_card", None),
    ],
)
def test_a_dead_card_is_refused_when_it_is_attached(api, customer, alias, code, decline):
    with pytest.raises(stripe.CardError) as refused:
        api.v1.payment_methods.attach(alias, {"customer": customer.id})
    assert refused.value.http_status == 402
    assert refused.value.code == code
    if decline:
        assert refused.value.error.decline_code == decline
    assert api.v1.customers.payment_methods.list(customer.id).data == []


def test_setup_intent_saves_a_card(api, customer):
    intent = api.v1.setup_intents.create(
        {
            "customer": customer.id,
            "allowed_payment_method_types": ["card"],
            "usage": "off_session",
            "metadata": {"a": "b"},
        }
    )
    assert intent.status == "requires_payment_method"
    done = api.v1.setup_intents.confirm(intent.id, {"payment_method": "pm_card_visa"})
    assert done.status == "succeeded"
    assert api.v1.payment_methods.retrieve(done.payment_method).customer == customer.id
    expanded = api.v1.setup_intents.retrieve(intent.id, {"expand": ["payment_method"]})
    assert expanded.payment_method.card.last4 == "4242"


def test_setup_intent_with_3d_secure_waits_for_the_customer(api, customer):
    intent = api.v1.setup_intents.create(
        {
            "customer": customer.id,
            "allowed_payment_method_types": ["card"],
            "payment_method": "pm_card_authenticationRequired",
            "confirm": True,
            "return_url": "https://example.com/back",
        }
    )
    assert intent.status == "requires_action"
    assert intent.next_action.redirect_to_url.url.startswith("http")
    assert api.v1.setup_intents.cancel(intent.id).status == "canceled"


def test_a_declined_setup_intent_keeps_its_reason(api, customer):
    intent = api.v1.setup_intents.create({"customer": customer.id, "allowed_payment_method_types": ["card"]})
    with pytest.raises(stripe.CardError):
        api.v1.setup_intents.confirm(intent.id, {"payment_method": "pm_card_chargeDeclined"})
    read = api.v1.setup_intents.retrieve(intent.id)
    assert read.status == "requires_payment_method"
    assert read.last_setup_error.decline_code == "generic_decline"


def test_portal_session(api, customer):
    session = api.v1.billing_portal.sessions.create({"customer": customer.id, "return_url": "https://example.com/b"})
    assert session.url.startswith("http")
    assert session.customer == customer.id


def test_checkout_session_in_setup_mode(api, customer):
    session = api.v1.checkout.sessions.create(
        {
            "mode": "setup",
            "currency": "usd",
            "customer": customer.id,
            "success_url": "https://example.com/ok?session={CHECKOUT_SESSION_ID}",
            "cancel_url": "https://example.com/no",
            "setup_intent_data": {"metadata": {"account": "7"}},
        }
    )
    assert (session.mode, session.status, session.payment_status) == ("setup", "open", "no_payment_required")
    intent = api.v1.setup_intents.retrieve(session.setup_intent)
    assert (intent.customer, intent.metadata["account"]) == (customer.id, "7")
    assert api.v1.checkout.sessions.expire(session.id).status == "expired"
