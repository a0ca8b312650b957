"""Customers and their tax ids."""

from __future__ import annotations

import re

from sandbox.stripe.app import Call, merge, route
from sandbox.stripe.errors import bad_param
from sandbox.stripe.store import Obj, new_id

_FIELDS = (
    "address",
    "business_name",
    "description",
    "email",
    "individual_name",
    "metadata",
    "name",
    "phone",
    "preferred_locales",
    "shipping",
    "tax_exempt",
    "invoice_prefix",
    "next_invoice_sequence",
)
_QUERY = re.compile(r"^(email|name|phone|metadata\[['\"](?P<key>[^'\"]+)['\"]\])\s*:\s*['\"](?P<value>[^'\"]*)['\"]$")


def _settings(call: Call, customer: Obj) -> None:
    given = call.params.get("invoice_settings", {})
    method = given.get("default_payment_method")
    if method:
        attached = call.load(
            "payment_method", method, noun="PaymentMethod", param="invoice_settings[default_payment_method]"
        )
        if attached["customer"] != customer["id"]:
            message = "The customer does not have a payment method with the ID {}. The payment method must be attached to the customer."
            raise bad_param(
                message.format(method), param="invoice_settings[default_payment_method]", code="resource_missing"
            )
    for key, value in given.items():
        customer["invoice_settings"][key] = None if value == "" else value


@route("POST", "/v1/customers", "CustomerCreateParams")
def create_customer(call: Call) -> Obj:
    p = call.params
    customer: Obj = {
        "id": new_id("cus", 14),
        "object": "customer",
        "balance": p.get("balance", 0),
        "created": call.now,
        "currency": None,
        "default_source": None,
        "delinquent": False,
        "invoice_prefix": new_id("", 8)[1:].upper(),
        "invoice_settings": {"custom_fields": None, "default_payment_method": None, "footer": None},
        "livemode": False,
        "metadata": {},
        "next_invoice_sequence": 1,
        "preferred_locales": [],
        "tax_exempt": "none",
    }
    merge(customer, p, _FIELDS)
    call.save(customer)
    if "payment_method" in p:
        from sandbox.stripe.payment_methods import attach

        method = attach(call, p["payment_method"], customer["id"])
        if p.get("invoice_settings", {}).get("default_payment_method") == p["payment_method"]:
            p["invoice_settings"]["default_payment_method"] = method["id"]
    _settings(call, customer)
    call.save(customer)
    for data in p.get("tax_id_data", []):
        _add_tax_id(call, customer["id"], data["type"], data["value"])
    call.emit("customer.created", customer)
    return customer


@route("GET", "/v1/customers", "CustomerListParams")
def list_customers(call: Call) -> Obj:
    return call.page("customer", "/v1/customers", email=call.params.get("email"))


@route("GET", "/v1/customers/search", "CustomerSearchParams")
def search_customers(call: Call) -> Obj:
    """One clause, `field:"value"` or `metadata["key"]:"value"`; Stripe's fuller language is not imitated."""
    found = _QUERY.match(call.params["query"].strip())
    if found is None:
        raise bad_param("The sandbox understands one clause: email, name, phone or metadata['key'].", param="query")
    field = found.group(1)
    rows = [
        c
        for c in call.store.find("customer", account=call.account, newest_first=True)
        if (c["metadata"].get(found["key"]) if found["key"] else c.get(field)) == found["value"]
    ]
    limit = call.params.get("limit", 10)
    return {
        "object": "search_result",
        "url": "/v1/customers/search",
        "has_more": len(rows) > limit,
        "data": rows[:limit],
    }


@route("GET", "/v1/customers/{customer}", "CustomerRetrieveParams")
def retrieve_customer(call: Call) -> Obj:
    return call.load("customer", call.ids["customer"])


@route("POST", "/v1/customers/{customer}", "CustomerUpdateParams")
def update_customer(call: Call) -> Obj:
    customer = live_customer(call, call.ids["customer"])
    before = dict(customer)
    merge(customer, call.params, _FIELDS)
    _settings(call, customer)
    call.save(customer)
    previous = {k: before.get(k) for k in customer if before.get(k) != customer[k]}
    call.emit("customer.updated", customer, previous=previous)
    return customer


@route("DELETE", "/v1/customers/{customer}", "CustomerDeleteParams")
def delete_customer(call: Call) -> Obj:
    customer = live_customer(call, call.ids["customer"])
    call.emit("customer.deleted", customer)
    for method in call.store.find("payment_method", account=call.account, customer=customer["id"]):
        call.save({**method, "customer": None})
    return call.save({**customer, "deleted": True})


def live_customer(call: Call, id_: str | None, *, param: str = "customer") -> Obj:
    customer = call.load("customer", id_, param=param)
    if customer.get("deleted"):
        raise bad_param(f"No such customer: '{id_}'; it was deleted", param=param, code="resource_missing")
    return customer


def _add_tax_id(call: Call, customer: str, type_: str, value: str) -> Obj:
    tax_id = {
        "id": new_id("txi"),
        "object": "tax_id",
        "country": type_[:2].upper() if "_" in type_ and not type_.startswith("eu_") else value[:2],
        "created": call.now,
        "customer": customer,
        "livemode": False,
        "owner": {"type": "customer", "customer": customer},
        "type": type_,
        "value": value,
        "verification": {"status": "pending", "verified_address": None, "verified_name": None},
    }
    call.emit("customer.tax_id.created", tax_id)
    return call.save(tax_id)


@route("POST", "/v1/customers/{customer}/tax_ids", "CustomerTaxIdCreateParams")
def create_tax_id(call: Call) -> Obj:
    customer = live_customer(call, call.ids["customer"])
    return _add_tax_id(call, customer["id"], call.params["type"], call.params["value"])


@route("GET", "/v1/customers/{customer}/tax_ids", "CustomerTaxIdListParams")
def list_tax_ids(call: Call) -> Obj:
    customer = call.load("customer", call.ids["customer"])
    return call.page("tax_id", f"/v1/customers/{customer['id']}/tax_ids", customer=customer["id"])


@route("DELETE", "/v1/customers/{customer}/tax_ids/{id}", "CustomerTaxIdDeleteParams")
def delete_tax_id(call: Call) -> Obj:
    tax_id = call.load("tax_id", call.ids["id"])
    call.store.delete(tax_id["id"])
    call.emit("customer.tax_id.deleted", tax_id)
    return {"id": tax_id["id"], "object": "tax_id", "deleted": True}


@route("GET", "/v1/customers/{customer}/payment_methods", "CustomerPaymentMethodListParams")
def list_customer_payment_methods(call: Call) -> Obj:
    customer = call.load("customer", call.ids["customer"])
    url = f"/v1/customers/{customer['id']}/payment_methods"
    return call.page("payment_method", url, customer=customer["id"], type=call.params.get("type"))


def default_method(call: Call, customer: Obj) -> Obj | None:
    """The customer's default payment method for invoices, if one is set and still attached."""
    id_ = customer["invoice_settings"].get("default_payment_method")
    method = call.store.get(id_, kind="payment_method", account=call.account) if id_ else None
    return method if method and method["customer"] == customer["id"] else None
