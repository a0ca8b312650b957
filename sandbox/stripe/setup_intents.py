"""Setup intents: a card proven and kept for off-session use."""

from __future__ import annotations

from sandbox.stripe import cards, payment_methods
from sandbox.stripe.app import Call, merge, route
from sandbox.stripe.errors import invalid
from sandbox.stripe.store import Obj, new_id


def build(
    call: Call,
    *,
    customer: str | None,
    usage: str = "off_session",
    metadata: Obj | None = None,
    description: str | None = None,
) -> Obj:
    id_ = new_id("seti")
    intent: Obj = {
        "id": id_,
        "object": "setup_intent",
        "automatic_payment_methods": None,
        "client_secret": f"{id_}_secret_{new_id('', 24)[1:]}",
        "created": call.now,
        "customer": customer,
        "description": description,
        "last_setup_error": None,
        "livemode": False,
        "metadata": metadata or {},
        "next_action": None,
        "payment_method": None,
        "payment_method_types": ["card"],
        "status": "requires_payment_method",
        "usage": usage,
    }
    call.save(intent)
    call.emit("setup_intent.created", intent)
    return intent


def confirm(
    call: Call, intent: Obj, method_id: str, *, return_url: str | None = None, authenticated: bool = False
) -> Obj:
    """Prove the card. Raises 402 on a refused card; leaves `requires_action` where 3-D Secure is needed."""
    method = payment_methods.find(call, method_id)
    card = payment_methods.card_of(method)
    if card.auth in ("unless_setup", "always") and not authenticated:
        intent.update(
            payment_method=method["id"], status="requires_action", next_action=next_action(call, intent, return_url)
        )
        call.save(intent)
        call.emit("setup_intent.requires_action", intent)
        return intent
    if card.setup:
        error = cards.decline(card.setup)
        problem = {k: v for k, v in error.error.items() if k != "param"} | {"payment_method": payload(method)}
        intent.update(status="requires_payment_method", payment_method=None, next_action=None, last_setup_error=problem)
        call.save(intent)
        call.emit("setup_intent.setup_failed", intent)
        error.error["setup_intent"] = {k: v for k, v in intent.items() if k != "last_setup_error"}
        raise error
    if intent["customer"]:
        payment_methods.attach(call, method["id"], intent["customer"], set_up=True)
    intent.update(status="succeeded", payment_method=method["id"], next_action=None, last_setup_error=None)
    call.save(intent)
    call.emit("setup_intent.succeeded", intent)
    return intent


def payload(method: Obj) -> Obj:
    return {k: v for k, v in method.items() if not k.startswith("_")}


def next_action(call: Call, intent: Obj, return_url: str | None) -> Obj:
    url = f"{call.base_url}/3ds/{intent['id']}"
    if return_url is None:
        return {"type": "use_stripe_sdk", "use_stripe_sdk": {"type": "three_d_secure_redirect", "stripe_js": url}}
    return {"type": "redirect_to_url", "redirect_to_url": {"url": url, "return_url": return_url}}


@route("POST", "/v1/setup_intents", "SetupIntentCreateParams")
def create_setup_intent(call: Call) -> Obj:
    p = call.params
    if "customer" in p:
        call.load("customer", p["customer"], param="customer")
    intent = build(
        call,
        customer=p.get("customer"),
        usage=p.get("usage", "off_session"),
        metadata=p.get("metadata"),
        description=p.get("description"),
    )
    if "automatic_payment_methods" in p:
        intent["automatic_payment_methods"] = {"allow_redirects": "always", **p["automatic_payment_methods"]}
    if "payment_method" in p:
        intent.update(
            payment_method=payment_methods.find(call, p["payment_method"])["id"], status="requires_confirmation"
        )
    call.save(intent)
    if p.get("confirm"):
        if not intent["payment_method"]:
            raise invalid(
                "You cannot confirm this SetupIntent because it's missing a payment method.",
                code="setup_intent_unexpected_state",
            )
        return confirm(call, intent, intent["payment_method"], return_url=p.get("return_url"))
    return intent


@route("GET", "/v1/setup_intents", "SetupIntentListParams")
def list_setup_intents(call: Call) -> Obj:
    p = call.params
    return call.page(
        "setup_intent", "/v1/setup_intents", customer=p.get("customer"), payment_method=p.get("payment_method")
    )


@route("GET", "/v1/setup_intents/{intent}", "SetupIntentRetrieveParams")
def retrieve_setup_intent(call: Call) -> Obj:
    return call.load("setup_intent", call.ids["intent"], noun="setupintent")


@route("POST", "/v1/setup_intents/{intent}", "SetupIntentUpdateParams")
def update_setup_intent(call: Call) -> Obj:
    intent = call.load("setup_intent", call.ids["intent"], noun="setupintent")
    return call.save(merge(intent, call.params, ("metadata", "description", "customer")))


@route("POST", "/v1/setup_intents/{intent}/confirm", "SetupIntentConfirmParams")
def confirm_setup_intent(call: Call) -> Obj:
    intent = call.load("setup_intent", call.ids["intent"], noun="setupintent")
    method = call.params.get("payment_method") or intent["payment_method"]
    if intent["status"] in ("succeeded", "canceled") or not method:
        message = f"You cannot confirm this SetupIntent because it has a status of {intent['status']}."
        raise invalid(message, code="setup_intent_unexpected_state")
    return confirm(call, intent, method, return_url=call.params.get("return_url"))


@route("POST", "/v1/setup_intents/{intent}/cancel", "SetupIntentCancelParams")
def cancel_setup_intent(call: Call) -> Obj:
    intent = call.load("setup_intent", call.ids["intent"], noun="setupintent")
    if intent["status"] in ("succeeded", "canceled"):
        message = f"You cannot cancel this SetupIntent because it has a status of {intent['status']}."
        raise invalid(message, code="setup_intent_unexpected_state")
    intent.update(status="canceled", cancellation_reason=call.params.get("cancellation_reason"), next_action=None)
    call.save(intent)
    call.emit("setup_intent.canceled", intent)
    return intent
