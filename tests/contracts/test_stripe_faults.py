"""Armed faults: what a caller sees, and what is true afterwards."""

import uuid

import httpx
import pytest
import stripe

pytestmark = pytest.mark.serverless


def arm(sandbox, kind, **more):
    sandbox.control("faults", {"api": [{"kind": kind, **more}]})


def names(sandbox, name):
    found = sandbox.client().v1.customers.search({"query": f"name:'{name}'"})
    return [c.name for c in found.data]


def test_429_happens_once_and_nothing_was_done(sandbox):
    name = uuid.uuid4().hex
    arm(sandbox, "429", method="POST", path="/v1/customers")
    with pytest.raises(stripe.RateLimitError):
        sandbox.client().v1.customers.create({"name": name})
    assert names(sandbox, name) == []
    sandbox.client().v1.customers.create({"name": name})
    assert names(sandbox, name) == [name]


def test_500_is_retried_by_the_sdk_to_success(sandbox):
    name = uuid.uuid4().hex
    arm(sandbox, "500", times=2)
    assert sandbox.client(max_network_retries=3).v1.customers.create({"name": name}).name == name
    assert names(sandbox, name) == [name]


def test_timeout_after_commit_then_the_same_key_gives_the_answer(sandbox):
    name, key = uuid.uuid4().hex, {"idempotency_key": uuid.uuid4().hex}
    arm(sandbox, "timeout_after_commit", path="/v1/customers")
    with pytest.raises(stripe.APIConnectionError):
        sandbox.client().v1.customers.create({"name": name}, key)
    assert names(sandbox, name) == [name]
    replayed = sandbox.client().v1.customers.create({"name": name}, key)
    assert replayed.last_response.headers["idempotent-replayed"] == "true"
    assert names(sandbox, name) == [name]


def test_timeout_before_anything_happened(sandbox):
    name = uuid.uuid4().hex
    arm(sandbox, "timeout", path="/v1/customers")
    with pytest.raises(stripe.APIConnectionError):
        sandbox.client().v1.customers.create({"name": name})
    assert names(sandbox, name) == []


def test_500_after_commit_is_what_the_key_remembers(sandbox):
    name, key = uuid.uuid4().hex, {"idempotency_key": uuid.uuid4().hex}
    arm(sandbox, "500_after_commit", path="/v1/customers")
    for _ in range(2):
        with pytest.raises(stripe.APIError) as broken:
            sandbox.client().v1.customers.create({"name": name}, key)
        assert broken.value.http_status == 500
    assert names(sandbox, name) == [name]


def test_a_fault_hits_only_what_it_names(sandbox):
    arm(sandbox, "500", method="POST", path="/v1/invoices*")
    assert sandbox.client().v1.customers.create({"name": "Untouched"}).name == "Untouched"


def test_the_rate_limit_counts_per_endpoint(sandbox):
    sandbox.control("faults", {"rate_limit_per_s": 2})
    api = sandbox.client()
    with pytest.raises(stripe.RateLimitError):
        [api.v1.customers.list({"limit": 1}) for _ in range(30)]
    assert api.v1.events.list({"limit": 1}) is not None


def test_an_unknown_switch_is_refused(sandbox):
    for wrong in ({"webhooks": {"explode": 1}}, {"api": [{"kind": "explode"}]}, {"everything": 1}):
        assert httpx.post(f"{sandbox.url}/_sandbox/faults", json=wrong).status_code == 400


def test_the_clock_moves_what_is_created(sandbox):
    sandbox.control("clock", {"now": 2_000_000_000})
    created = sandbox.client().v1.customers.create({}).created
    assert 2_000_000_000 <= created < 2_000_000_100


def test_money_settles_after_the_configured_wait(sandbox):
    sandbox.control("faults", {"settle_s": 86_400})
    api = sandbox.client()
    customer = api.v1.customers.create({})
    method = api.v1.payment_methods.attach("pm_card_visa", {"customer": customer.id})
    before = {a.currency: a.amount for a in api.v1.balance.retrieve().pending}.get("usd", 0)
    api.v1.payment_intents.create(
        {"amount": 1_000, "currency": "usd", "customer": customer.id, "payment_method": method.id, "confirm": True}
    )
    after = {a.currency: a.amount for a in api.v1.balance.retrieve().pending}["usd"]
    assert after - before == 1_000 - 59  # 2.9 % + 30


def test_a_dispute_opened_by_hand_and_won_gives_the_money_back(sandbox):
    api = sandbox.client()
    customer = api.v1.customers.create({})
    method = api.v1.payment_methods.attach("pm_card_visa", {"customer": customer.id})
    intent = api.v1.payment_intents.create(
        {"amount": 4_000, "currency": "usd", "customer": customer.id, "payment_method": method.id, "confirm": True}
    )
    start = sandbox.control("state")["balances"]["platform"]["usd"]
    dispute = sandbox.control("disputes", {"charge": intent.latest_charge, "reason": "product_not_received"})
    assert sandbox.control("state")["balances"]["platform"]["usd"] == start - 4_000 - 1_500
    sandbox.control("disputes", {"dispute": dispute["id"], "won": True})
    assert api.v1.disputes.retrieve(dispute["id"]).status == "won"
    assert sandbox.control("state")["balances"]["platform"]["usd"] == start - 1_500
