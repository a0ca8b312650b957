"""The pages a visitor clicks through, by plain forms: what they type and where they end."""

import re

import httpx
import pytest
import stripe

from tests.contracts.conftest import new_recipient, onboarding_link

pytestmark = pytest.mark.serverless
GOOD = {"number": "4242 4242 4242 4242", "expiry": "12 / 34", "cvc": "123", "name": "Ada Example"}


@pytest.fixture
def stripe_client(sandbox):
    return sandbox.client()


@pytest.fixture
def buyer(stripe_client):
    return stripe_client.v1.customers.create({"name": "Buyer"})


@pytest.fixture
def session(stripe_client, buyer):
    return stripe_client.v1.checkout.sessions.create(
        {
            "mode": "setup",
            "currency": "usd",
            "customer": buyer.id,
            "success_url": "https://example.com/ok?session={CHECKOUT_SESSION_ID}",
            "cancel_url": "https://example.com/no",
        }
    )


def test_checkout_saves_the_card_and_comes_back(stripe_client, buyer, session):
    page = httpx.get(session.url)
    assert page.status_code == 200
    assert "not Stripe" in page.text
    assert 'href="https://example.com/no"' in page.text
    answer = httpx.post(session.url, data=GOOD)
    assert (answer.status_code, answer.headers["location"]) == (303, f"https://example.com/ok?session={session.id}")
    done = stripe_client.v1.checkout.sessions.retrieve(session.id, {"expand": ["setup_intent.payment_method"]})
    assert (done.status, done.setup_intent.status) == ("complete", "succeeded")
    assert done.setup_intent.payment_method.customer == buyer.id
    assert "completed" in httpx.get(session.url).text
    assert httpx.post(session.url, data=GOOD).status_code == 200
    assert len(stripe_client.v1.customers.payment_methods.list(buyer.id).data) == 1


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"number": "4000000000000002"}, 402, "Your card was declined."),
        ({"number": "4000000000009995"}, 402, "insufficient funds"),
        ({"number": "4242424242424241"}, 400, "card number is invalid"),
        ({"number": "4111111111111111"}, 400, "test cards only"),
        ({"expiry": "13 / 34"}, 400, "expiration date"),
        ({"expiry": "01 / 20"}, 400, "in the past"),
        ({"cvc": "1"}, 400, "security code"),
    ],
)
def test_checkout_says_what_is_wrong_and_stays_open(stripe_client, session, change, status, says):
    answer = httpx.post(session.url, data=GOOD | change)
    assert answer.status_code == status
    assert says in answer.text.replace("&#x27;", "'")
    assert stripe_client.v1.checkout.sessions.retrieve(session.id).status == "open"
    assert httpx.post(session.url, data=GOOD).status_code == 303


@pytest.mark.parametrize(("result", "status"), [("complete", "complete"), ("fail", "open")])
def test_3d_secure_from_checkout(stripe_client, session, result, status):
    asked = httpx.post(session.url, data=GOOD | {"number": "4000 0025 0000 3155"})
    bank = asked.headers["location"]
    assert "Complete authentication" in httpx.get(bank).text
    back = httpx.post(bank, data={"result": result}).headers["location"]
    landed = httpx.get(back)
    assert stripe_client.v1.checkout.sessions.retrieve(session.id).status == status
    assert (landed.status_code == 303) == (status == "complete")
    if status == "open":
        assert "unable to authenticate" in landed.text


def test_an_expired_session_is_gone(sandbox, session):
    sandbox.control("clock", {"now": session.expires_at + 1})
    assert httpx.get(session.url).status_code == 410
    assert sandbox.client().v1.checkout.sessions.retrieve(session.id).status == "expired"


def test_checkout_in_payment_mode(stripe_client, buyer):
    price = {"currency": "usd", "unit_amount": 2_500, "product_data": {"name": "Prepaid credit"}}
    session = stripe_client.v1.checkout.sessions.create(
        {
            "mode": "payment",
            "customer": buyer.id,
            "success_url": "https://example.com/ok",
            "line_items": [{"price_data": price, "quantity": 2}],
            "payment_intent_data": {"metadata": {"topup": "9"}},
        }
    )
    assert "Prepaid credit" in httpx.get(session.url).text
    assert httpx.post(session.url, data=GOOD).headers["location"] == "https://example.com/ok"
    done = stripe_client.v1.checkout.sessions.retrieve(session.id, {"expand": ["payment_intent"]})
    assert (done.payment_status, done.payment_intent.amount_received) == ("paid", 5_000)
    assert done.payment_intent.metadata["topup"] == "9"


def test_portal_adds_sets_default_and_removes(stripe_client, buyer):
    portal = stripe_client.v1.billing_portal.sessions.create(
        {"customer": buyer.id, "return_url": "https://example.com/b"}
    )
    assert "https://example.com/b" in httpx.get(portal.url).text
    assert httpx.post(portal.url, data=GOOD | {"action": "add"}).status_code == 303
    assert httpx.post(portal.url, data=GOOD | {"action": "add", "number": "4000000000000002"}).status_code == 402
    method = stripe_client.v1.customers.payment_methods.list(buyer.id).data[0].id
    httpx.post(portal.url, data={"action": "default", "payment_method": method})
    assert stripe_client.v1.customers.retrieve(buyer.id).invoice_settings.default_payment_method == method
    httpx.post(portal.url, data={"action": "remove", "payment_method": method})
    assert stripe_client.v1.customers.payment_methods.list(buyer.id).data == []


def test_portal_does_not_touch_a_strangers_card(stripe_client, buyer):
    stranger = stripe_client.v1.customers.create({})
    theirs = stripe_client.v1.payment_methods.attach("pm_card_visa", {"customer": stranger.id})
    portal = stripe_client.v1.billing_portal.sessions.create({"customer": buyer.id})
    assert httpx.post(portal.url, data={"action": "remove", "payment_method": theirs.id}).status_code == 404
    assert stripe_client.v1.payment_methods.retrieve(theirs.id).customer == stranger.id


def test_hosted_invoice_takes_3d_secure_to_the_end(stripe_client, buyer):
    draft = stripe_client.v1.invoices.create({"customer": buyer.id, "currency": "usd"})
    stripe_client.v1.invoices.add_lines(draft.id, {"lines": [{"amount": 700, "description": "8 x H100, March <b>"}]})
    invoice = stripe_client.v1.invoices.finalize_invoice(draft.id)
    page = httpx.get(invoice.hosted_invoice_url)
    assert "March &lt;b&gt;" in page.text
    asked = httpx.post(invoice.hosted_invoice_url, data=GOOD | {"number": "4000002760003184"})
    back = httpx.post(asked.headers["location"], data={"result": "complete"}).headers["location"]
    assert back == invoice.hosted_invoice_url
    assert "paid" in httpx.get(back).text
    assert stripe_client.v1.invoices.retrieve(invoice.id).status == "paid"


def test_onboarding_makes_the_account_active_and_the_link_is_used_up(stripe_client):
    account = new_recipient(stripe_client)
    link = onboarding_link(stripe_client, account.id)
    assert re.search("Registered business name", httpx.get(link.url).text)
    done = httpx.post(link.url, data={"result": "complete", "registered_name": "Hashrate GmbH"})
    assert done.headers["location"] == "https://example.com/return"
    read = stripe_client.v2.core.accounts.retrieve(
        account.id, {"include": ["configuration.recipient", "requirements", "identity"]}
    )
    assert read.configuration.recipient.capabilities.stripe_balance.stripe_transfers.status == "active"
    assert read.requirements.entries == []
    assert read.identity.business_details.registered_name == "Hashrate GmbH"
    assert httpx.get(link.url).headers["location"] == "https://example.com/refresh"


def test_failed_checks_leave_the_account_restricted(stripe_client):
    account = new_recipient(stripe_client)
    httpx.post(onboarding_link(stripe_client, account.id).url, data={"result": "refuse"})
    read = stripe_client.v2.core.accounts.retrieve(account.id, {"include": ["configuration.recipient", "requirements"]})
    assert read.configuration.recipient.capabilities.stripe_balance.stripe_transfers.status == "restricted"
    assert read.requirements.entries


def test_an_unknown_page_is_404(sandbox):
    assert httpx.get(f"{sandbox.url}/c/cs_test_nowhere").status_code == 404
    assert httpx.get(f"{sandbox.url}/nothing").status_code == 404


def test_a_topup_makes_a_transfer_possible(stripe_client):
    account = new_recipient(stripe_client)
    httpx.post(onboarding_link(stripe_client, account.id).url, data={"result": "complete"})
    before = sum(b.amount for b in stripe_client.v1.balance.retrieve().available)
    wanted = {"amount": before + 2_000, "currency": "usd", "destination": account.id}
    with pytest.raises(stripe.InvalidRequestError) as short:
        stripe_client.v1.transfers.create(wanted)
    assert short.value.code == "balance_insufficient"
    topup = stripe_client.v1.topups.create({"amount": 2_000, "currency": "usd", "description": "float"})
    assert stripe_client.v1.topups.retrieve(topup.id).status == "succeeded"
    assert stripe_client.v1.transfers.create(wanted).amount == before + 2_000


def test_a_connected_account_pays_out_its_own_balance(stripe_client, buyer):
    account = new_recipient(stripe_client)
    httpx.post(onboarding_link(stripe_client, account.id).url, data={"result": "complete"})
    method = stripe_client.v1.payment_methods.attach("pm_card_bypassPending", {"customer": buyer.id})
    paid = {"amount": 5_000, "currency": "usd", "customer": buyer.id, "payment_method": method.id, "confirm": True}
    stripe_client.v1.payment_intents.create(paid)
    stripe_client.v1.transfers.create({"amount": 1_000, "currency": "usd", "destination": account.id})
    on_account = {"stripe_account": account.id}
    payout = stripe_client.v1.payouts.create({"amount": 700, "currency": "usd"}, on_account)
    assert stripe_client.v1.payouts.retrieve(payout.id, None, on_account).status == "paid"
    assert stripe_client.v1.balance.retrieve(None, on_account).available[0].amount == 300
    transfer = stripe_client.v1.transfers.list({"destination": account.id}).data[0]
    with pytest.raises(stripe.InvalidRequestError) as short:
        stripe_client.v1.transfers.reversals.create(transfer.id, {"amount": 301})
    assert short.value.code == "balance_insufficient"
    assert stripe_client.v1.transfers.reversals.create(transfer.id, {"amount": 300}).amount == 300
