"""Payouts from a balance to a bank: created `pending`, arrived (`paid`) right after, with an event for each."""

from __future__ import annotations

from sandbox.stripe import balance
from sandbox.stripe.app import Call, merge, route
from sandbox.stripe.errors import invalid
from sandbox.stripe.store import Obj, new_id


@route("POST", "/v1/payouts", "PayoutCreateParams")
def create_payout(call: Call) -> Obj:
    p = call.params
    amount, currency = p["amount"], p["currency"].lower()
    if amount < 1:
        raise invalid("Invalid positive integer", param="amount", code="parameter_invalid_integer")
    if balance.available(call, currency) < amount:
        raise invalid("You have insufficient funds in your Stripe account.", code="balance_insufficient")
    payout: Obj = {
        "id": new_id("po"),
        "object": "payout",
        "amount": amount,
        "arrival_date": call.now,
        "automatic": False,
        "balance_transaction": None,
        "created": call.now,
        "currency": currency,
        "description": p.get("description"),
        "livemode": False,
        "metadata": p.get("metadata", {}),
        "method": p.get("method", "standard"),
        "reconciliation_status": "not_applicable",
        "source_type": p.get("source_type", "card"),
        "statement_descriptor": p.get("statement_descriptor"),
        "status": "pending",
        "type": "bank_account",
    }
    payout["balance_transaction"] = balance.move(call, "payout", -amount, currency, payout["id"])["id"]
    call.save(payout)
    call.emit("payout.created", payout)
    arrived = call.save({**payout, "status": "paid"})
    call.emit("payout.paid", arrived)
    return payout


@route("GET", "/v1/payouts", "PayoutListParams")
def list_payouts(call: Call) -> Obj:
    return call.page("payout", "/v1/payouts", status=call.params.get("status"))


@route("GET", "/v1/payouts/{payout}", "PayoutRetrieveParams")
def retrieve_payout(call: Call) -> Obj:
    return call.load("payout", call.ids["payout"])


@route("POST", "/v1/payouts/{payout}", "PayoutUpdateParams")
def update_payout(call: Call) -> Obj:
    return call.save(merge(call.load("payout", call.ids["payout"]), call.params, ("metadata",)))
