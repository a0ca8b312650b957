"""Fields that Stripe sends only when they are asked for with `expand`."""

from __future__ import annotations

from sandbox.stripe import checkout
from sandbox.stripe.app import Call, listing
from sandbox.stripe.store import Obj


def included(call: Call, obj: Obj, name: str) -> Obj | None:
    """The list behind an includable field, or None where `name` is none of them."""
    kind, id_ = obj.get("object"), obj.get("id")
    if kind == "invoice" and name == "payments":
        return listing(call.store.find("invoice_payment", account=call.account, invoice=id_), "/v1/invoice_payments")
    if kind == "charge" and name == "refunds":
        rows = call.store.find("refund", account=call.account, charge=id_, newest_first=True)
        return listing(rows, f"/v1/charges/{id_}/refunds")
    if kind == "customer" and name == "tax_ids":
        return listing(call.store.find("tax_id", account=call.account, customer=id_), f"/v1/customers/{id_}/tax_ids")
    if kind == "tax.calculation" and name == "line_items":
        return listing(obj["_lines"], f"/v1/tax/calculations/{id_}/line_items")
    if kind == "checkout.session" and name == "line_items":
        return listing(checkout.line_items(obj), f"/v1/checkout/sessions/{id_}/line_items")
    return None
