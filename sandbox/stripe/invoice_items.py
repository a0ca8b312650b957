"""Invoice items and the lines they become. A line's arithmetic is exact; an invoice holds at most 250 of them."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from sandbox.stripe.app import Call, listing, merge, route
from sandbox.stripe.customers import live_customer
from sandbox.stripe.errors import invalid
from sandbox.stripe.store import Obj, new_id

MAX_LINES = 250


def amount_of(p: dict[str, Any]) -> tuple[int, str, str]:
    """(amount in minor units, quantity, unit amount) from `amount`, or quantity x unit price rounded half away from zero."""
    price = p.get("price_data", {})
    unit = p.get("unit_amount_decimal") or price.get("unit_amount_decimal")
    unit = unit if unit is not None else price.get("unit_amount")
    quantity = Decimal(str(p.get("quantity_decimal", p.get("quantity", 1))))
    if "amount" in p:
        if unit is not None or "quantity" in p or "quantity_decimal" in p:
            raise invalid("You may only specify one of these parameters: amount, quantity.", param="amount")
        return p["amount"], "1", str(p["amount"])
    if unit is None:
        raise invalid(
            "You must pass either `amount`, `unit_amount_decimal`, `price_data` or `pricing`.", param="amount"
        )
    amount = (Decimal(str(unit)) * quantity).quantize(Decimal(1), rounding=ROUND_HALF_UP)
    return int(amount), str(quantity), str(unit)


def make(call: Call, p: dict[str, Any], *, customer: str, currency: str, invoice: str | None) -> Obj:
    """One invoice item; attached to `invoice`, or pending for the customer's next one."""
    amount, quantity, unit = amount_of(p)
    whole = Decimal(quantity) == int(Decimal(quantity))
    item: Obj = {
        "id": new_id("ii"),
        "object": "invoiceitem",
        "amount": amount,
        "currency": currency,
        "customer": customer,
        "date": call.now,
        "description": p.get("description"),
        "discountable": p.get("discountable", amount >= 0),
        "discounts": [],
        "invoice": invoice,
        "livemode": False,
        "metadata": p.get("metadata") or {},
        "net_amount": amount,
        "period": p.get("period", {"start": call.now, "end": call.now}),
        "pricing": {"type": "price_details", "unit_amount_decimal": unit, "price_details": None},
        "proration": False,
        "quantity": int(Decimal(quantity)) if whole else 0,
        "quantity_decimal": quantity,
        "tax_rates": [],
    }
    if item["period"]["end"] < item["period"]["start"]:
        raise invalid("The end of the period must be greater than or equal to the start.", param="period[end]")
    return call.save(item)


def line_of(item: Obj, invoice: str) -> Obj:
    return {
        "id": "il_" + item["id"].removeprefix("ii_"),
        "object": "line_item",
        "amount": item["amount"],
        "currency": item["currency"],
        "description": item["description"],
        "discount_amounts": [],
        "discountable": item["discountable"],
        "discounts": [],
        "invoice": invoice,
        "livemode": False,
        "metadata": item["metadata"],
        "parent": {
            "type": "invoice_item_details",
            "invoice_item_details": {
                "invoice_item": item["id"],
                "proration": False,
                "proration_details": None,
                "subscription": None,
            },
            "subscription_item_details": None,
        },
        "period": item["period"],
        "pretax_credit_amounts": [],
        "pricing": item["pricing"],
        "quantity": item["quantity"],
        "quantity_decimal": item["quantity_decimal"],
        "subtotal": item["amount"],
        "taxes": [],
    }


def check_room(call: Call, invoice: str, adding: int) -> None:
    if call.store.count("invoiceitem", invoice=invoice) + adding > MAX_LINES:
        raise invalid(f"Invoices can have at most {MAX_LINES} invoice items.", code="invoice_too_many_items")


def editable(call: Call, id_: str) -> Obj:
    """The draft invoice, else 400: a finalized invoice is not edited."""
    invoice = call.load("invoice", id_, param="invoice")
    if invoice["status"] != "draft":
        raise invalid("You can only modify invoice items and lines of a draft invoice.", code="invoice_not_editable")
    return invoice


@route("POST", "/v1/invoiceitems", "InvoiceItemCreateParams")
def create_invoice_item(call: Call) -> Obj:
    from sandbox.stripe import invoices

    p = call.params
    invoice = editable(call, p["invoice"]) if "invoice" in p else None
    customer = live_customer(call, p.get("customer") or (invoice or {}).get("customer"))
    if invoice and invoice["customer"] != customer["id"]:
        raise invalid("The invoice belongs to another customer.", param="invoice")
    currency = p.get("currency") or p.get("price_data", {}).get("currency") or (invoice or {}).get("currency") or "usd"
    if invoice and currency.lower() != invoice["currency"]:
        raise invalid(f"The invoice's currency is {invoice['currency']}, not {currency}.", param="currency")
    if invoice:
        check_room(call, invoice["id"], 1)
    item = make(call, p, customer=customer["id"], currency=currency.lower(), invoice=p.get("invoice"))
    call.emit("invoiceitem.created", item)
    if invoice:
        invoices.recount(call, invoice)
    return item


@route("GET", "/v1/invoiceitems", "InvoiceItemListParams")
def list_invoice_items(call: Call) -> Obj:
    p = call.params
    page = call.page("invoiceitem", "/v1/invoiceitems", customer=p.get("customer"), invoice=p.get("invoice"))
    if p.get("pending"):
        rows = [
            i
            for i in call.store.find("invoiceitem", customer=p.get("customer"), account=call.account, newest_first=True)
            if not i["invoice"]
        ]
        return listing(rows[: p.get("limit", 10)], "/v1/invoiceitems", more=len(rows) > p.get("limit", 10))
    return page


@route("GET", "/v1/invoiceitems/{invoiceitem}", "InvoiceItemRetrieveParams")
def retrieve_invoice_item(call: Call) -> Obj:
    return call.load("invoiceitem", call.ids["invoiceitem"])


@route("POST", "/v1/invoiceitems/{invoiceitem}", "InvoiceItemUpdateParams")
def update_invoice_item(call: Call) -> Obj:
    from sandbox.stripe import invoices

    item = call.load("invoiceitem", call.ids["invoiceitem"])
    invoice = editable(call, item["invoice"]) if item["invoice"] else None
    merge(item, call.params, ("description", "metadata", "period", "discountable"))
    if {"amount", "quantity", "quantity_decimal", "unit_amount_decimal", "price_data"} & set(call.params):
        item["amount"], item["quantity_decimal"], item["pricing"]["unit_amount_decimal"] = amount_of(call.params)
        item["quantity"] = int(Decimal(item["quantity_decimal"]))
    call.save(item)
    if invoice:
        invoices.recount(call, invoice)
    return item


@route("DELETE", "/v1/invoiceitems/{invoiceitem}", "InvoiceItemDeleteParams")
def delete_invoice_item(call: Call) -> Obj:
    from sandbox.stripe import invoices

    item = call.load("invoiceitem", call.ids["invoiceitem"])
    invoice = editable(call, item["invoice"]) if item["invoice"] else None
    call.store.delete(item["id"])
    call.emit("invoiceitem.deleted", item)
    if invoice:
        invoices.recount(call, invoice)
    return {"id": item["id"], "object": "invoiceitem", "deleted": True}
