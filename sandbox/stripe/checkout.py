"""Checkout sessions: `setup` keeps a card, `payment` charges one; both by redirect to a page of ours."""

from __future__ import annotations

from sandbox.stripe import cards, invoice_items, payment_intents, payment_methods, setup_intents
from sandbox.stripe.app import Call, listing, merge, route
from sandbox.stripe.customers import live_customer
from sandbox.stripe.errors import bad_param, invalid
from sandbox.stripe.store import Obj, new_id


@route("POST", "/v1/checkout/sessions", "checkout.SessionCreateParams")
def create_session(call: Call) -> Obj:
    p = call.params
    mode = p.get("mode", "payment")
    if mode == "subscription":
        raise invalid("The sandbox has no subscriptions.", param="mode")
    if "success_url" not in p and p.get("ui_mode", "hosted_page") == "hosted_page":
        raise bad_param("Missing required param: success_url.", param="success_url", code="parameter_missing")
    if mode == "setup" and not ({"currency", "allowed_payment_method_types"} & set(p)):
        raise invalid("`currency` or `allowed_payment_method_types` is required in setup mode.", param="currency")
    customer = live_customer(call, p["customer"])["id"] if "customer" in p else None
    id_ = new_id("cs_test", 58)
    session: Obj = {
        "id": id_,
        "object": "checkout.session",
        "automatic_tax": {"enabled": False, "liability": None, "provider": None, "status": None},
        "cancel_url": p.get("cancel_url"),
        "client_reference_id": p.get("client_reference_id"),
        "created": call.now,
        "currency": (p.get("currency") or "").lower() or None,
        "custom_fields": [],
        "custom_text": {},
        "customer": customer,
        "customer_email": p.get("customer_email"),
        "expires_at": p.get("expires_at", call.now + 86_400),
        "livemode": False,
        "metadata": p.get("metadata", {}),
        "mode": mode,
        "payment_method_collection": "always",
        "payment_method_types": p.get("allowed_payment_method_types", ["card"]),
        "payment_status": "no_payment_required" if mode == "setup" else "unpaid",
        "shipping_options": [],
        "status": "open",
        "success_url": p.get("success_url"),
        "ui_mode": "hosted_page",
        "url": f"{call.base_url}/c/{id_}",
        "_usage": "off_session",
    }
    if mode == "setup":
        data = p.get("setup_intent_data", {})
        intent = setup_intents.build(
            call, customer=customer, metadata=data.get("metadata"), description=data.get("description")
        )
        session["setup_intent"] = intent["id"]
    else:
        _price(call, session)
    return call.save(session)


def _price(call: Call, session: Obj) -> None:
    p = call.params
    if not p.get("line_items"):
        raise invalid("You must pass line_items in payment mode.", param="line_items")
    total, rows = 0, []
    for given in p["line_items"]:
        price = given.get("price_data")
        if not price:
            raise invalid("The sandbox prices line items by price_data only.", param="line_items[0][price]")
        amount, _, _ = invoice_items.amount_of({"price_data": price, "quantity": given.get("quantity", 1)})
        session["currency"] = price["currency"].lower()
        total += amount
        rows.append({"name": price.get("product_data", {}).get("name", ""), "amount": amount})
    session.update(
        amount_subtotal=total, amount_total=total, _items=rows, _intent_data=p.get("payment_intent_data", {})
    )


def submit(call: Call, session: Obj, card: cards.TestCard, *, billing: Obj, exp: tuple[int, int]) -> Obj:
    """What the page's button does. Raises 402 on a refused card; the intent may be left `requires_action`."""
    method = payment_methods.make(call, card, billing=billing, exp=exp)
    back = f"{call.base_url}/c/{session['id']}"
    if session["mode"] == "setup":
        intent = call.load("setup_intent", session["setup_intent"])
        return setup_intents.confirm(call, intent, method["id"], return_url=back)
    data = session["_intent_data"]
    intent = payment_intents.build(
        call,
        session["amount_total"],
        session["currency"],
        customer=session["customer"],
        metadata=data.get("metadata"),
        description=data.get("description"),
    )
    session["payment_intent"] = intent["id"]
    call.save(session)
    if data.get("setup_future_usage") and session["customer"]:
        payment_methods.attach(call, method["id"], session["customer"], set_up=True)
    return payment_intents.confirm(call, intent, method, return_url=back)


def complete(call: Call, session: Obj, email: str | None = None) -> Obj:
    """Close the session once its intent succeeded, and tell the platform."""
    session.update(status="complete", url=None)
    if session["mode"] == "payment":
        session["payment_status"] = "paid"
    session["customer_details"] = {"email": email or session["customer_email"], "tax_exempt": "none", "tax_ids": []}
    call.save(session)
    call.emit("checkout.session.completed", session)
    return session


def expired(call: Call, session: Obj) -> bool:
    """Whether the session may no longer be used; the first look after its time records the expiry."""
    if session["status"] == "open" and session["expires_at"] <= call.now:
        _expire(call, session)
    return bool(session["status"] == "expired")


def _expire(call: Call, session: Obj) -> Obj:
    session.update(status="expired", url=None)
    call.save(session)
    call.emit("checkout.session.expired", session)
    return session


@route("GET", "/v1/checkout/sessions", "checkout.SessionListParams")
def list_sessions(call: Call) -> Obj:
    p = call.params
    return call.page("checkout.session", "/v1/checkout/sessions", customer=p.get("customer"), status=p.get("status"))


@route("GET", "/v1/checkout/sessions/{session}", "checkout.SessionRetrieveParams")
def retrieve_session(call: Call) -> Obj:
    session = call.load("checkout.session", call.ids["session"])
    expired(call, session)
    return session


@route("POST", "/v1/checkout/sessions/{session}", "checkout.SessionUpdateParams")
def update_session(call: Call) -> Obj:
    return call.save(merge(call.load("checkout.session", call.ids["session"]), call.params, ("metadata",)))


@route("POST", "/v1/checkout/sessions/{session}/expire", "checkout.SessionExpireParams")
def expire_session(call: Call) -> Obj:
    session = call.load("checkout.session", call.ids["session"])
    if session["status"] != "open":
        raise invalid(
            f'Only Checkout Sessions with a status in ["open"] can be expired; this one is {session["status"]}.'
        )
    return _expire(call, session)


@route("GET", "/v1/checkout/sessions/{session}/line_items", "checkout.SessionLineItemListParams")
def list_line_items(call: Call) -> Obj:
    session = call.load("checkout.session", call.ids["session"])
    return listing(line_items(session), f"/v1/checkout/sessions/{session['id']}/line_items")


def line_items(session: Obj) -> list[Obj]:
    return [
        {
            "id": f"li_{session['id'][-14:]}{index}",
            "object": "item",
            "amount_discount": 0,
            "amount_subtotal": row["amount"],
            "amount_tax": 0,
            "amount_total": row["amount"],
            "currency": session["currency"],
            "description": row["name"],
            "quantity": 1,
        }
        for index, row in enumerate(session.get("_items", []))
    ]
