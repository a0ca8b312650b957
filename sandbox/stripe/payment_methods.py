"""Payment methods: cards only, made from Stripe's published `pm_card_*` and `tok_*` or on our checkout page."""

from __future__ import annotations

from sandbox.stripe import cards
from sandbox.stripe.app import Call, merge, route
from sandbox.stripe.errors import ApiError, invalid
from sandbox.stripe.store import Obj, new_id

_NOBODY: Obj = {"address": None, "email": None, "name": None, "phone": None, "tax_id": None}
_ADDRESS = ("city", "country", "line1", "line2", "postal_code", "state")


def card_of(method: Obj) -> cards.TestCard:
    return cards.BY_NUMBER[method["_number"]]


def make(
    call: Call,
    card: cards.TestCard,
    *,
    customer: str | None = None,
    billing: Obj | None = None,
    exp: tuple[int, int] = (12, 2034),
) -> Obj:
    """A stored card. The number stays in the sandbox's file under a private field and never travels."""
    details = {**_NOBODY, **(billing or {})}
    details["address"] = {k: (details["address"] or {}).get(k) for k in _ADDRESS}
    method: Obj = {
        "id": new_id("pm"),
        "object": "payment_method",
        "allow_redisplay": "unspecified",
        "billing_details": details,
        "card": {
            "brand": card.brand,
            "checks": {"address_line1_check": None, "address_postal_code_check": None, "cvc_check": "unchecked"},
            "country": card.country,
            "display_brand": card.brand,
            "exp_month": exp[0],
            "exp_year": exp[1],
            "fingerprint": f"fp{card.number[-12:]}",
            "funding": card.funding,
            "generated_from": None,
            "last4": card.last4,
            "networks": {"available": [card.brand], "preferred": None},
            "regulated_status": "unregulated",
            "three_d_secure_usage": {"supported": True},
            "wallet": None,
        },
        "created": call.now,
        "customer": customer,
        "livemode": False,
        "metadata": {},
        "type": "card",
        "_number": card.number,
        "_set_up": False,
    }
    return call.save(method)


def find(call: Call, id_: str, *, param: str = "payment_method") -> Obj:
    """The method, or a fresh one where the id is a published `pm_card_*`."""
    if id_ in cards.BY_ALIAS and id_.startswith("pm_"):
        return make(call, cards.BY_ALIAS[id_])
    return call.load("payment_method", id_, noun="PaymentMethod", param=param)


def attach(call: Call, id_: str, customer: str, *, set_up: bool = False) -> Obj:
    """Bind a card to a customer; 402 for cards that Stripe refuses at once, 400 where it belongs to someone else."""
    method = find(call, id_)
    if method["customer"] not in (None, customer):
        raise invalid(
            "The payment method you provided has already been attached to a customer.", param="payment_method"
        )
    code = card_of(method).setup
    if code:
        raise cards.decline(code)
    already = method["customer"] == customer
    method["customer"] = customer
    method["_set_up"] = method["_set_up"] or set_up
    call.save(method)
    if not already:
        call.emit("payment_method.attached", method)
    return method


@route("POST", "/v1/payment_methods", "PaymentMethodCreateParams")
def create_payment_method(call: Call) -> Obj:
    p = call.params
    if p.get("type") != "card":
        raise invalid("The sandbox keeps cards only; `type` must be card.", param="type")
    token = (p.get("card") or {}).get("token")
    if token is None:
        message = (
            "Sending credit card numbers directly to the Stripe API is generally unsafe. "
            "To continue use card[token] with a published tok_*, a pm_card_*, or the checkout page."
        )
        raise ApiError(402, message, remember=False)
    if token not in cards.BY_ALIAS:
        raise invalid(f"No such token: '{token}'", param="card[token]", code="resource_missing")
    method = make(call, cards.BY_ALIAS[token], billing=p.get("billing_details"))
    return call.save(merge(method, p, ("metadata", "allow_redisplay")))


@route("GET", "/v1/payment_methods", "PaymentMethodListParams")
def list_payment_methods(call: Call) -> Obj:
    if "customer" not in call.params:
        raise invalid(
            "You must provide a customer to list payment methods.", param="customer", code="parameter_missing"
        )
    p = call.params
    return call.page("payment_method", "/v1/payment_methods", customer=p["customer"], type=p.get("type"))


@route("GET", "/v1/payment_methods/{payment_method}", "PaymentMethodRetrieveParams")
def retrieve_payment_method(call: Call) -> Obj:
    return find(call, call.ids["payment_method"])


@route("POST", "/v1/payment_methods/{payment_method}", "PaymentMethodUpdateParams")
def update_payment_method(call: Call) -> Obj:
    method = call.load("payment_method", call.ids["payment_method"], noun="PaymentMethod")
    merge(method, call.params, ("metadata", "allow_redisplay"))
    method["billing_details"].update(call.params.get("billing_details", {}))
    method["card"].update(call.params.get("card", {}))
    call.save(method)
    call.emit("payment_method.updated", method)
    return method


@route("POST", "/v1/payment_methods/{payment_method}/attach", "PaymentMethodAttachParams")
def attach_payment_method(call: Call) -> Obj:
    customer = call.load("customer", call.params.get("customer"), param="customer")
    return attach(call, call.ids["payment_method"], customer["id"])


@route("POST", "/v1/payment_methods/{payment_method}/detach", "PaymentMethodDetachParams")
def detach_payment_method(call: Call) -> Obj:
    return detach(call, call.ids["payment_method"])


def detach(call: Call, id_: str) -> Obj:
    method = call.load("payment_method", id_, noun="PaymentMethod")
    customer = call.store.get(method["customer"], account=call.account) if method["customer"] else None
    if customer is None:
        raise invalid("The payment method you provided is not attached to a customer so detachment is impossible.")
    if customer["invoice_settings"]["default_payment_method"] == id_:
        customer["invoice_settings"]["default_payment_method"] = None
        call.save(customer)
    method["customer"] = None
    call.save(method)
    call.emit("payment_method.detached", method, previous={"customer": customer["id"]})
    return method
