"""Charges: one attempt at a card, and what it does to the balance."""

from __future__ import annotations

from sandbox.stripe import balance, cards, disputes
from sandbox.stripe.app import Call, merge, route
from sandbox.stripe.payment_methods import card_of
from sandbox.stripe.store import Obj, new_id


def attempt(call: Call, intent: Obj, method: Obj, *, capture: bool = True) -> Obj:
    """Try the card for the intent's amount; the charge, `failed` or `succeeded`, is written either way."""
    card = card_of(method)
    code = card.charge
    charge: Obj = {
        "id": new_id("ch"),
        "object": "charge",
        "amount": intent["amount"],
        "amount_captured": intent["amount"] if capture and not code else 0,
        "amount_refunded": 0,
        "balance_transaction": None,
        "billing_details": method["billing_details"],
        "captured": capture and not code,
        "created": call.now,
        "currency": intent["currency"],
        "customer": intent["customer"],
        "description": intent["description"],
        "disputed": False,
        "failure_code": None,
        "failure_message": None,
        "fraud_details": {},
        "livemode": False,
        "metadata": dict(intent["metadata"]),
        "outcome": _outcome(code),
        "paid": not code,
        "payment_intent": intent["id"],
        "payment_method": method["id"],
        "payment_method_details": {"type": "card", "card": _details(method)},
        "receipt_url": None,
        "refunded": False,
        "status": "failed" if code else "succeeded",
        "transfer_group": intent.get("transfer_group"),
    }
    if code:
        problem = cards.decline(code).error
        charge.update(failure_code=problem["code"], failure_message=problem["message"])
        call.save(charge)
        call.emit("charge.failed", charge)
        return charge
    if capture:
        _book(call, charge, card)
    call.save(charge)
    call.emit("charge.succeeded", charge)
    if capture and card.dispute:
        disputes.open_dispute(call, charge, card.dispute)
    return charge


def capture(call: Call, charge: Obj, amount: int, method: Obj) -> Obj:
    charge.update(captured=True, amount_captured=amount, amount_refunded=charge["amount"] - amount)
    _book(call, charge, card_of(method))
    call.save(charge)
    call.emit("charge.captured", charge)
    return charge


def _book(call: Call, charge: Obj, card: cards.TestCard) -> None:
    amount = charge["amount_captured"]
    transaction = balance.move(
        call,
        "charge",
        amount,
        charge["currency"],
        charge["id"],
        fee=balance.processing_fee(amount),
        available_now=card.bypass_pending,
        description=charge["description"],
    )
    charge["balance_transaction"] = transaction["id"]


def _outcome(code: str | None) -> Obj:
    return {
        "advice_code": None,
        "network_advice_code": None,
        "network_decline_code": None,
        "network_status": "declined_by_network" if code else "approved_by_network",
        "reason": code,
        "risk_level": "normal",
        "seller_message": "The bank did not return any further details with this decline."
        if code
        else "Payment complete.",
        "type": "issuer_declined" if code else "authorized",
    }


def _details(method: Obj) -> Obj:
    kept = ("brand", "country", "exp_month", "exp_year", "fingerprint", "funding", "last4")
    return {k: method["card"][k] for k in kept} | {"network": method["card"]["brand"]}


@route("GET", "/v1/charges", "ChargeListParams")
def list_charges(call: Call) -> Obj:
    p = call.params
    return call.page(
        "charge",
        "/v1/charges",
        customer=p.get("customer"),
        payment_intent=p.get("payment_intent"),
        transfer_group=p.get("transfer_group"),
    )


@route("GET", "/v1/charges/{charge}", "ChargeRetrieveParams")
def retrieve_charge(call: Call) -> Obj:
    return call.load("charge", call.ids["charge"])


@route("POST", "/v1/charges/{charge}", "ChargeUpdateParams")
def update_charge(call: Call) -> Obj:
    charge = call.load("charge", call.ids["charge"])
    call.save(merge(charge, call.params, ("metadata", "description", "transfer_group")))
    call.emit("charge.updated", charge)
    return charge
