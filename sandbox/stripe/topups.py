"""Top-ups: money from the platform's own bank account into its balance, there at once (`succeeded`), with an event for each step."""

from __future__ import annotations

from sandbox.stripe import balance
from sandbox.stripe.app import Call, route
from sandbox.stripe.errors import invalid
from sandbox.stripe.store import Obj, new_id


@route("POST", "/v1/topups", "TopupCreateParams")
def create_topup(call: Call) -> Obj:
    p = call.params
    amount, currency = p["amount"], p["currency"].lower()
    if amount < 1:
        raise invalid("Invalid positive integer", param="amount", code="parameter_invalid_integer")
    topup: Obj = {
        "id": new_id("tu"),
        "object": "topup",
        "amount": amount,
        "balance_transaction": None,
        "created": call.now,
        "currency": currency,
        "description": p.get("description"),
        "expected_availability_date": call.now,
        "failure_code": None,
        "failure_message": None,
        "livemode": False,
        "metadata": p.get("metadata", {}),
        "source": None,
        "statement_descriptor": p.get("statement_descriptor"),
        "status": "pending",
        "transfer_group": p.get("transfer_group"),
    }
    topup["balance_transaction"] = balance.move(call, "topup", amount, currency, topup["id"])["id"]
    call.save(topup)
    call.emit("topup.created", topup)
    arrived = call.save({**topup, "status": "succeeded"})
    call.emit("topup.succeeded", arrived)
    return arrived


@route("GET", "/v1/topups", "TopupListParams")
def list_topups(call: Call) -> Obj:
    return call.page("topup", "/v1/topups", status=call.params.get("status"))


@route("GET", "/v1/topups/{topup}", "TopupRetrieveParams")
def retrieve_topup(call: Call) -> Obj:
    return call.load("topup", call.ids["topup"])
