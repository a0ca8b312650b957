"""Payment intents: the state machine of one payment."""

from __future__ import annotations

from sandbox.stripe import cards, charges, payment_methods, setup_intents
from sandbox.stripe.app import Call, merge, route
from sandbox.stripe.errors import card_error, invalid
from sandbox.stripe.store import Obj, new_id

_MAX_AMOUNT = 99_999_999
_MINIMUM = {"usd": 50, "eur": 50, "gbp": 30, "cad": 50, "jpy": 50}
_AUTH_MESSAGE = "Your card was declined. This transaction requires authentication."


def build(
    call: Call,
    amount: int,
    currency: str,
    *,
    customer: str | None,
    metadata: Obj | None = None,
    description: str | None = None,
    capture_method: str = "automatic",
    transfer_group: str | None = None,
) -> Obj:
    """A new intent; 400 where the amount (minor units) is below Stripe's minimum or above its maximum."""
    low = _MINIMUM.get(currency, 1)
    if amount < low:
        raise invalid(
            f"Amount must be at least {low} {currency} in minor units", param="amount", code="amount_too_small"
        )
    if amount > _MAX_AMOUNT:
        raise invalid("Amount must be no more than 999,999.99", param="amount", code="amount_too_large")
    id_ = new_id("pi")
    intent: Obj = {
        "id": id_,
        "object": "payment_intent",
        "amount": amount,
        "amount_capturable": 0,
        "amount_details": {"tip": {}},
        "amount_received": 0,
        "automatic_payment_methods": None,
        "capture_method": capture_method,
        "client_secret": f"{id_}_secret_{new_id('', 24)[1:]}",
        "confirmation_method": "automatic",
        "created": call.now,
        "currency": currency,
        "customer": customer,
        "description": description,
        "last_payment_error": None,
        "latest_charge": None,
        "livemode": False,
        "metadata": metadata or {},
        "next_action": None,
        "payment_method": None,
        "payment_method_types": ["card"],
        "status": "requires_payment_method",
        "transfer_group": transfer_group,
        "_invoice": None,
    }
    call.save(intent)
    call.emit("payment_intent.created", intent)
    return intent


def needs_authentication(method: Obj, *, off_session: bool) -> bool:
    card = payment_methods.card_of(method)
    if card.auth == "unless_setup":
        return not (off_session and method["_set_up"])
    if card.auth == "on_session":
        return not off_session
    return card.auth == "always"


def confirm(
    call: Call,
    intent: Obj,
    method: Obj,
    *,
    off_session: bool = False,
    authenticated: bool = False,
    return_url: str | None = None,
    for_invoice: bool = False,
) -> Obj:
    """Charge the card. Raises 402 on a decline; `requires_action` is a state, except off-session (402) on a bare intent."""
    if needs_authentication(method, off_session=off_session) and not authenticated:
        if off_session and not for_invoice:
            error = card_error(_AUTH_MESSAGE, "authentication_required", "authentication_required")
            raise _failed(call, intent, method, error.error, None)
        action = setup_intents.next_action(call, intent, return_url)
        intent.update(status="requires_action", payment_method=method["id"], next_action=action)
        call.save(intent)
        call.emit("payment_intent.requires_action", intent)
        return intent
    manual = intent["capture_method"] == "manual"
    charge = charges.attempt(call, intent, method, capture=not manual)
    intent["latest_charge"] = charge["id"]
    if charge["status"] == "failed":
        code = payment_methods.card_of(method).charge or "generic_decline"
        raise _failed(call, intent, method, cards.decline(code).error, charge["id"])
    intent.update(payment_method=method["id"], next_action=None, last_payment_error=None)
    if manual:
        intent.update(status="requires_capture", amount_capturable=intent["amount"])
        call.save(intent)
        call.emit("payment_intent.amount_capturable_updated", intent)
        return intent
    intent.update(status="succeeded", amount_received=intent["amount"])
    call.save(intent)
    call.emit("payment_intent.succeeded", intent)
    return intent


def _failed(call: Call, intent: Obj, method: Obj, problem: Obj, charge: str | None) -> Exception:
    """Write the failure onto the intent; the 402 to raise, carrying intent and method as Stripe's does."""
    details: Obj = {k: problem[k] for k in ("code", "decline_code", "doc_url", "message", "type") if k in problem}
    if charge:
        details["charge"] = charge
    details["payment_method"] = setup_intents.payload(method)
    intent.update(status="requires_payment_method", payment_method=None, next_action=None, last_payment_error=details)
    call.save(intent)
    call.emit("payment_intent.payment_failed", intent)
    extra: Obj = {"payment_intent": setup_intents.payload(intent), "payment_method": details["payment_method"]}
    if charge:
        extra["charge"] = charge
    return card_error(problem["message"], problem["code"], problem.get("decline_code"), **extra)


@route("POST", "/v1/payment_intents", "PaymentIntentCreateParams")
def create_payment_intent(call: Call) -> Obj:
    p = call.params
    if "customer" in p:
        call.load("customer", p["customer"], param="customer")
    intent = build(
        call,
        p["amount"],
        p["currency"].lower(),
        customer=p.get("customer"),
        metadata=p.get("metadata"),
        description=p.get("description"),
        capture_method=p.get("capture_method", "automatic"),
        transfer_group=p.get("transfer_group"),
    )
    if "automatic_payment_methods" in p:
        intent["automatic_payment_methods"] = {"allow_redirects": "always", **p["automatic_payment_methods"]}
    merge(intent, p, ("receipt_email", "setup_future_usage", "statement_descriptor", "statement_descriptor_suffix"))
    call.save(intent)
    if p.get("off_session") and not p.get("confirm"):
        raise invalid(
            "You can only set `off_session` when confirming the PaymentIntent (confirm=true).", param="off_session"
        )
    if "payment_method" in p:
        method = _usable(call, p["payment_method"], p.get("customer"))
        intent.update(payment_method=method["id"], status="requires_confirmation")
        call.save(intent)
        if p.get("confirm"):
            return confirm(call, intent, method, off_session=bool(p.get("off_session")), return_url=p.get("return_url"))
    elif p.get("confirm"):
        raise invalid(
            "You cannot confirm this PaymentIntent because it's missing a payment method. You can either update the "
            "PaymentIntent with a payment method and then confirm it again, or confirm it again directly with a payment method.",
            code="payment_intent_unexpected_state",
        )
    return intent


def _usable(call: Call, id_: str, customer: str | None) -> Obj:
    method = payment_methods.find(call, id_)
    if method["customer"] is not None and method["customer"] != customer:
        raise invalid(
            f"The provided PaymentMethod ({id_}) belongs to a Customer. Please include the Customer in the `customer` "
            "parameter on the PaymentIntent.",
            param="payment_method",
        )
    return method


@route("GET", "/v1/payment_intents", "PaymentIntentListParams")
def list_payment_intents(call: Call) -> Obj:
    return call.page("payment_intent", "/v1/payment_intents", customer=call.params.get("customer"))


@route("GET", "/v1/payment_intents/{intent}", "PaymentIntentRetrieveParams")
def retrieve_payment_intent(call: Call) -> Obj:
    return call.load("payment_intent", call.ids["intent"])


@route("POST", "/v1/payment_intents/{intent}", "PaymentIntentUpdateParams")
def update_payment_intent(call: Call) -> Obj:
    intent = call.load("payment_intent", call.ids["intent"])
    names = ("metadata", "description", "receipt_email", "transfer_group", "setup_future_usage")
    if {"amount", "currency"} & set(call.params) and intent["status"] in ("succeeded", "canceled", "requires_capture"):
        raise _state(intent, "update")
    merge(intent, call.params, (*names, "amount", "currency", "customer"))
    if "payment_method" in call.params:
        intent.update(
            payment_method=_usable(call, call.params["payment_method"], intent["customer"])["id"],
            status="requires_confirmation",
        )
    return call.save(intent)


@route("POST", "/v1/payment_intents/{intent}/confirm", "PaymentIntentConfirmParams")
def confirm_payment_intent(call: Call) -> Obj:
    p, intent = call.params, call.load("payment_intent", call.ids["intent"])
    method = p.get("payment_method") or intent["payment_method"]
    if intent["status"] not in ("requires_payment_method", "requires_confirmation", "requires_action") or not method:
        raise _state(intent, "confirm")
    usable = _usable(call, method, intent["customer"])
    return confirm(call, intent, usable, off_session=bool(p.get("off_session")), return_url=p.get("return_url"))


@route("POST", "/v1/payment_intents/{intent}/capture", "PaymentIntentCaptureParams")
def capture_payment_intent(call: Call) -> Obj:
    intent = call.load("payment_intent", call.ids["intent"])
    if intent["status"] != "requires_capture":
        raise _state(intent, "capture")
    amount: int = (
        call.params["amount_to_capture"] if "amount_to_capture" in call.params else intent["amount_capturable"]
    )
    if not 0 < amount <= intent["amount_capturable"]:
        raise invalid(
            "The amount_to_capture is greater than what is capturable.",
            param="amount_to_capture",
            code="amount_too_large",
        )
    charges.capture(
        call,
        call.load("charge", intent["latest_charge"]),
        amount,
        call.load("payment_method", intent["payment_method"]),
    )
    intent.update(status="succeeded", amount_received=amount, amount_capturable=0)
    call.save(intent)
    call.emit("payment_intent.succeeded", intent)
    return intent


@route("POST", "/v1/payment_intents/{intent}/cancel", "PaymentIntentCancelParams")
def cancel_payment_intent(call: Call) -> Obj:
    intent = call.load("payment_intent", call.ids["intent"])
    if intent["_invoice"]:
        raise invalid("You cannot cancel a PaymentIntent created by an invoice; void the invoice instead.")
    return cancel(call, intent, call.params.get("cancellation_reason"))


def cancel(call: Call, intent: Obj, reason: str | None) -> Obj:
    if intent["status"] in ("succeeded", "canceled"):
        raise _state(intent, "cancel")
    intent.update(
        status="canceled", canceled_at=call.now, cancellation_reason=reason, amount_capturable=0, next_action=None
    )
    call.save(intent)
    call.emit("payment_intent.canceled", intent)
    return intent


def _state(intent: Obj, verb: str) -> Exception:
    message = f"This PaymentIntent's status is {intent['status']}: you cannot {verb} it."
    return invalid(message, code="payment_intent_unexpected_state")
