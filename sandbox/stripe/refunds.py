"""Refunds: never more than is left of the charge, never twice over a dispute."""

from __future__ import annotations

from sandbox.stripe import balance
from sandbox.stripe.app import Call, merge, route
from sandbox.stripe.errors import bad_param, invalid
from sandbox.stripe.payment_methods import card_of
from sandbox.stripe.store import Obj, new_id


def refund_charge(call: Call, charge: Obj, amount: int | None, *, reason: str | None, metadata: Obj) -> Obj:
    """Write one refund of `amount` minor units (None: all that is left); 400 beyond that."""
    left = charge["amount_captured"] - charge["amount_refunded"]
    if charge["status"] != "succeeded" or not charge["captured"]:
        raise invalid(f"Charge {charge['id']} cannot be refunded: it is not captured.", param="charge")
    if charge["disputed"] and any(
        not d["is_charge_refundable"] for d in call.store.find("dispute", charge=charge["id"], account=call.account)
    ):
        raise invalid(f"Charge {charge['id']} has been charged back; cannot issue a refund.", code="charge_disputed")
    if left == 0:
        raise invalid(f"Charge {charge['id']} has already been refunded.", code="charge_already_refunded")
    amount = left if amount is None else amount
    if amount < 1:
        raise invalid("Invalid positive integer", param="amount", code="parameter_invalid_integer")
    if amount > left:
        raise invalid(
            f"Refund amount ({_money(amount)}) is greater than unrefunded amount on charge ({_money(left)})",
            param="amount",
        )
    method = call.load("payment_method", charge["payment_method"], param="payment_method")
    outcome = card_of(method).refund
    refund: Obj = {
        "id": new_id("re"),
        "object": "refund",
        "amount": amount,
        "balance_transaction": None,
        "charge": charge["id"],
        "created": call.now,
        "currency": charge["currency"],
        "destination_details": {
            "type": "card",
            "card": {"type": "refund", "reference_status": "pending", "reference_type": "acquirer_reference_number"},
        },
        "metadata": metadata,
        "payment_intent": charge["payment_intent"],
        "reason": reason,
        "status": "pending" if outcome == "pending" else "succeeded",
    }
    refund["balance_transaction"] = balance.move(call, "refund", -amount, charge["currency"], refund["id"])["id"]
    call.save(refund)
    charge["amount_refunded"] += amount
    charge["refunded"] = charge["amount_refunded"] == charge["amount"]
    call.save(charge)
    call.emit("refund.created", refund)
    call.emit("charge.refunded", charge)
    if outcome == "pending":
        call.emit("refund.updated", call.save({**refund, "status": "succeeded"}))
    elif outcome == "failed":
        _fail(call, refund, charge)
    return refund


def _fail(call: Call, refund: Obj, charge: Obj) -> None:
    """The published refund-fail card: answered `succeeded`, then failed, and the money comes back to the balance."""
    back = balance.move(
        call, "refund_failure", refund["amount"], refund["currency"], refund["id"], category="refund_failure"
    )
    failed = {**refund, "status": "failed", "failure_reason": "unknown", "failure_balance_transaction": back["id"]}
    call.save(failed)
    charge["amount_refunded"] -= refund["amount"]
    charge["refunded"] = False
    call.save(charge)
    call.emit("refund.failed", failed)


def _money(amount: int) -> str:
    return f"${amount // 100:,}.{amount % 100:02d}"


@route("POST", "/v1/refunds", "RefundCreateParams")
def create_refund(call: Call) -> Obj:
    p = call.params
    if "charge" in p:
        charge = call.load("charge", p["charge"], param="charge")
    elif "payment_intent" in p:
        intent = call.load("payment_intent", p["payment_intent"], param="payment_intent")
        if not intent["latest_charge"] or intent["status"] != "succeeded":
            raise invalid(
                f"This PaymentIntent ({intent['id']}) does not have a successful charge to refund.",
                param="payment_intent",
            )
        charge = call.load("charge", intent["latest_charge"], param="charge")
    else:
        raise bad_param(
            "One of the following params should be provided for this request: payment_intent or charge.", param="charge"
        )
    return refund_charge(call, charge, p.get("amount"), reason=p.get("reason"), metadata=p.get("metadata") or {})


@route("GET", "/v1/refunds", "RefundListParams")
def list_refunds(call: Call) -> Obj:
    p = call.params
    return call.page("refund", "/v1/refunds", charge=p.get("charge"), payment_intent=p.get("payment_intent"))


@route("GET", "/v1/refunds/{refund}", "RefundRetrieveParams")
def retrieve_refund(call: Call) -> Obj:
    return call.load("refund", call.ids["refund"])


@route("POST", "/v1/refunds/{refund}", "RefundUpdateParams")
def update_refund(call: Call) -> Obj:
    refund = call.load("refund", call.ids["refund"])
    call.save(merge(refund, call.params, ("metadata",)))
    call.emit("refund.updated", refund)
    return refund
