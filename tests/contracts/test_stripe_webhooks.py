"""Delivery by the fake: signed as Stripe signs, at least once, and as badly as a switch says."""

import json
import time

import pytest
import stripe

from tests.contracts.conftest import receiving, start_sandbox

pytestmark = pytest.mark.serverless
SECRETS = ("whsec_old_one", "whsec_new_one")


@pytest.fixture
def hooked(tmp_path, receiver):
    """A fake of its own that posts every event to the receiver."""
    flags = ["--webhook", receiver.url]
    for secret in SECRETS:
        flags += ["--webhook-secret", secret]
    sandbox = start_sandbox(tmp_path / "state.db", *flags)
    yield sandbox
    sandbox.stop()


def names(events):
    return [json.loads(body)["data"]["object"].get("name") for body, _ in events]


@pytest.mark.parametrize("secret", SECRETS)
def test_both_live_secrets_verify(hooked, receiver, secret):
    made = hooked.client().v1.customers.create({"name": "Signed"})
    body, signature = receiver.take(1)[0]
    event = stripe.Webhook.construct_event(body, signature, secret)
    assert (event.type, event.data.object.id, event.api_version) == ("customer.created", made.id, "2026-10-28.endive")
    assert hooked.client().v1.events.retrieve(event.id).data.object.id == made.id


def test_a_wrong_secret_or_a_changed_body_does_not_verify(hooked, receiver):
    hooked.client().v1.customers.create({"name": "Signed"})
    body, signature = receiver.take(1)[0]
    with pytest.raises(stripe.SignatureVerificationError):
        stripe.Webhook.construct_event(body, signature, "whsec_stranger")
    with pytest.raises(stripe.SignatureVerificationError):
        stripe.Webhook.construct_event(body.replace(b"Signed", b"Forged"), signature, SECRETS[0])


def test_a_refusal_is_retried_with_a_fresh_signature(hooked, receiver):
    hooked.control("faults", {"webhooks": {"retry_base_s": 0.05}})
    receiver.answers.extend([500, 503])
    hooked.client().v1.customers.create({"name": "Stubborn"})
    attempts = receiver.take(3)
    assert len({json.loads(body)["id"] for body, _ in attempts}) == 1
    for body, signature in attempts:
        stripe.Webhook.construct_event(body, signature, SECRETS[1])


def test_duplicates(hooked, receiver):
    hooked.control("faults", {"webhooks": {"duplicate": 1.0}})
    hooked.client().v1.customers.create({"name": "Twice"})
    assert names(receiver.take(2)) == ["Twice", "Twice"]


def test_loss_leaves_the_event_to_be_found_by_a_sweep(hooked, receiver):
    hooked.control("faults", {"webhooks": {"loss": 1.0}})
    lost = hooked.client().v1.customers.create({"name": "Lost"})
    for _ in range(500):
        if hooked.control("state")["deliveries"].get("lost"):
            break
        time.sleep(0.02)
    else:
        pytest.fail("the delivery was never marked lost")
    hooked.control("faults", {"webhooks": {"loss": 0.0}})
    hooked.client().v1.customers.create({"name": "Found"})
    assert names(receiver.take(1)) == ["Found"]
    listed = hooked.client().v1.events.list({"type": "customer.created"}).data
    assert lost.id in {e.data.object.id for e in listed}


def test_reordering_is_seeded_and_changes_the_order(hooked, receiver):
    hooked.control("faults", {"seed": 3, "webhooks": {"reorder": 1.0, "reorder_window_s": 0.4, "paused": True}})
    for i in range(8):
        hooked.client().v1.customers.create({"name": str(i)})
    hooked.control("faults", {"webhooks": {"paused": False}})
    arrived = names(receiver.take(8))
    assert sorted(arrived) == [str(i) for i in range(8)]
    assert arrived != sorted(arrived)


def test_an_endpoint_made_through_the_api_gets_what_it_asked_for(hooked, receiver):
    api = hooked.client()
    with receiving() as second:
        endpoint = api.v1.webhook_endpoints.create({"url": second.url, "enabled_events": ["invoice.created"]})
        assert endpoint.secret.startswith("whsec_")
        assert api.v1.webhook_endpoints.retrieve(endpoint.id).secret is None
        customer = api.v1.customers.create({"name": "Quiet"})
        api.v1.invoices.create({"customer": customer.id})
        body, signature = second.take(1)[0]
        assert stripe.Webhook.construct_event(body, signature, endpoint.secret).type == "invoice.created"
        assert second.got.empty()
        assert api.v1.webhook_endpoints.delete(endpoint.id).deleted is True


def test_a_restart_forgets_nothing_and_delivers_what_was_left(tmp_path):
    with receiving() as receiver:
        flags = ("--webhook", receiver.url, "--webhook-secret", SECRETS[0])
        first = start_sandbox(tmp_path / "state.db", *flags)
        first.control("faults", {"webhooks": {"paused": True}})
        made = first.client().v1.customers.create({"name": "Kept"}, {"idempotency_key": "once"})
        first.process.kill()
        first.process.wait()
        first.process.stdout.close()
        assert receiver.got.empty()
        second = start_sandbox(tmp_path / "state.db", *flags)
        try:
            assert second.client().v1.customers.retrieve(made.id).name == "Kept"
            assert second.client().v1.customers.create({"name": "Kept"}, {"idempotency_key": "once"}).id == made.id
            second.control("faults", {"webhooks": {"paused": False}})
            assert names(receiver.take(1)) == ["Kept"]
        finally:
            second.stop()


def test_paid_invoice_tells_the_whole_story(hooked, receiver):
    api = hooked.client()
    customer = api.v1.customers.create({})
    api.v1.payment_methods.attach("pm_card_visa", {"customer": customer.id})
    method = api.v1.customers.payment_methods.list(customer.id).data[0]
    draft = api.v1.invoices.create({"customer": customer.id, "currency": "usd"})
    api.v1.invoices.add_lines(draft.id, {"lines": [{"amount": 900}]})
    api.v1.invoices.pay(draft.id, {"payment_method": method.id})
    wanted = {"invoice.created", "invoice.finalized", "invoice.paid", "payment_intent.succeeded", "charge.succeeded"}
    seen = set()
    while not wanted <= seen:
        seen.add(json.loads(receiver.take(1)[0][0])["type"])


def test_reset_forgets_objects_but_not_the_command_lines_endpoint(hooked, receiver):
    api = hooked.client()
    gone = api.v1.customers.create({"name": "Gone"})
    receiver.take(1)
    hooked.control("reset", {})
    with pytest.raises(stripe.InvalidRequestError):
        api.v1.customers.retrieve(gone.id)
    api.v1.customers.create({"name": "Here"})
    assert names(receiver.take(1)) == ["Here"]
