"""Invoices: draft -> open -> paid | void | uncollectible. Lines are the invoice's items; the first ten travel inside."""

from __future__ import annotations

from typing import Any

from sandbox.stripe import invoice_items
from sandbox.stripe.app import Call, listing, merge, route
from sandbox.stripe.customers import live_customer
from sandbox.stripe.errors import invalid
from sandbox.stripe.store import Obj, new_id

_FIELDS = (
    "auto_advance",
    "collection_method",
    "default_payment_method",
    "description",
    "due_date",
    "effective_at",
    "footer",
    "metadata",
    "number",
    "statement_descriptor",
    "custom_fields",
    "automatically_finalizes_at",
)
_INLINE_LINES = 10


def items(call: Call, invoice: str) -> list[Obj]:
    return call.store.find("invoiceitem", account=call.account, invoice=invoice)


def recount(call: Call, invoice: Obj) -> Obj:
    """Totals and inline lines from the items; what must be paid is never below zero, as a credit goes to the balance."""
    rows = items(call, invoice["id"])
    total = sum(i["amount"] for i in rows)
    lines = [invoice_items.line_of(i, invoice["id"]) for i in rows]
    tax = _tax(call, invoice, lines)
    due = max(0, total + tax)
    invoice.update(
        subtotal=total,
        subtotal_excluding_tax=total,
        total=total + tax,
        total_excluding_tax=total,
        total_taxes=_taxes(lines),
        amount_due=due,
        amount_remaining=due,
        lines=_inline(invoice["id"], lines),
    )
    return call.save(invoice)


def _inline(invoice: str, lines: list[Obj]) -> Obj:
    more = len(lines) > _INLINE_LINES
    return {**listing(lines[:_INLINE_LINES], f"/v1/invoices/{invoice}/lines", more=more), "total_count": len(lines)}


def _tax(call: Call, invoice: Obj, lines: list[Obj]) -> int:
    """Write each line's tax where automatic tax is on, by the customer's address; returns the sum in minor units."""
    from sandbox.stripe import tax

    if not invoice["automatic_tax"]["enabled"]:
        return 0
    customer = call.load("customer", invoice["customer"], param="customer")
    rate = tax.rate_for(customer.get("address") or {}, exempt=customer["tax_exempt"])
    invoice["automatic_tax"]["status"] = "requires_location_inputs" if rate is None else "complete"
    total = 0
    for line in lines:
        amount = tax.amount(line["amount"], rate or tax.NO_TAX)
        line["taxes"] = [tax.line_tax(rate, line["amount"], amount)] if rate else []
        total += amount
    return total


def _taxes(lines: list[Obj]) -> list[Obj]:
    every = [t for line in lines for t in line["taxes"]]
    if not every:
        return []
    first = every[0]
    return [
        {**first, "amount": sum(t["amount"] for t in every), "taxable_amount": sum(t["taxable_amount"] for t in every)}
    ]


@route("POST", "/v1/invoices", "InvoiceCreateParams")
def create_invoice(call: Call) -> Obj:
    p = call.params
    customer = live_customer(call, p.get("customer"))
    if p.get("collection_method") == "send_invoice" and not {"days_until_due", "due_date"} & set(p):
        raise invalid(
            "If invoice collection method is 'send_invoice' you must specify days_until_due or due_date.",
            param="days_until_due",
        )
    pending = (
        [i for i in call.store.find("invoiceitem", account=call.account, customer=customer["id"]) if not i["invoice"]]
        if p.get("pending_invoice_items_behavior", "exclude") == "include"
        else []
    )
    currency = (
        p.get("currency") or (pending[0]["currency"] if pending else None) or customer["currency"] or "usd"
    ).lower()
    invoice = _blank(call, customer, currency, p)
    merge(invoice, p, _FIELDS)
    check_number(call, invoice)
    if p.get("collection_method") == "send_invoice" and not invoice["due_date"]:
        invoice["due_date"] = call.now + p["days_until_due"] * 86_400
    if "default_payment_method" in p:
        call.load("payment_method", p["default_payment_method"], noun="PaymentMethod", param="default_payment_method")
    call.save(invoice)
    pending = [i for i in pending if i["currency"] == currency]
    if len(pending) > invoice_items.MAX_LINES:
        invoice_items.check_room(call, invoice["id"], len(pending))
    for item in pending:
        call.save({**item, "invoice": invoice["id"]})
    recount(call, invoice)
    call.emit("invoice.created", invoice)
    return invoice


def check_number(call: Call, invoice: Obj) -> None:
    """400 where another invoice already carries the number that the caller chose."""
    if not invoice["number"]:
        return
    others = call.store.find("invoice", account=call.account, number=invoice["number"])
    if any(other["id"] != invoice["id"] for other in others):
        raise invalid(f"An invoice with the number {invoice['number']} already exists.", param="number")


def _blank(call: Call, customer: Obj, currency: str, p: dict[str, Any]) -> Obj:
    id_ = new_id("in")
    zeros = (
        "amount_due",
        "amount_overpaid",
        "amount_paid",
        "amount_remaining",
        "amount_shipping",
        "attempt_count",
        "post_payment_credit_notes_amount",
        "pre_payment_credit_notes_amount",
        "starting_balance",
        "subtotal",
        "total",
    )
    return {
        "id": id_,
        "object": "invoice",
        "account_country": "US",
        "account_name": "Tailrace sandbox",
        "amount_paid_off_stripe": 0,
        "attempted": False,
        "auto_advance": False,
        "automatic_tax": {
            "enabled": p.get("automatic_tax", {}).get("enabled", False),
            "liability": None,
            "status": None,
        },
        "billing_reason": "manual",
        "collection_method": "charge_automatically",
        "created": call.now,
        "currency": currency,
        "customer": customer["id"],
        "customer_address": customer.get("address"),
        "customer_email": customer.get("email"),
        "customer_name": customer.get("name"),
        "customer_tax_exempt": customer["tax_exempt"],
        "customer_tax_ids": [
            {"type": t["type"], "value": t["value"]}
            for t in call.store.find("tax_id", account=call.account, customer=customer["id"])
        ],
        "default_tax_rates": [],
        "discounts": [],
        "due_date": None,
        "ending_balance": None,
        "hosted_invoice_url": None,
        "issuer": {"type": "self"},
        "lines": _inline(id_, []),
        "livemode": False,
        "metadata": {},
        "number": None,
        "payment_settings": {"default_mandate": None, "payment_method_options": None, "payment_method_types": None},
        "period_end": call.now,
        "period_start": call.now,
        "status": "draft",
        "status_transitions": {
            "finalized_at": None,
            "marked_uncollectible_at": None,
            "paid_at": None,
            "voided_at": None,
        },
        "total_discount_amounts": [],
        "total_pretax_credit_amounts": [],
        "total_taxes": [],
        **dict.fromkeys(zeros, 0),
    }


@route("GET", "/v1/invoices", "InvoiceListParams")
def list_invoices(call: Call) -> Obj:
    p = call.params
    return call.page(
        "invoice",
        "/v1/invoices",
        customer=p.get("customer"),
        status=p.get("status"),
        collection_method=p.get("collection_method"),
    )


@route("GET", "/v1/invoices/{invoice}", "InvoiceRetrieveParams")
def retrieve_invoice(call: Call) -> Obj:
    return call.load("invoice", call.ids["invoice"])


@route("POST", "/v1/invoices/{invoice}", "InvoiceUpdateParams")
def update_invoice(call: Call) -> Obj:
    invoice = call.load("invoice", call.ids["invoice"])
    free = {"metadata", "auto_advance", "default_payment_method", "description", "footer"}
    if invoice["status"] != "draft" and set(call.params) - free:
        raise invalid("Finalized invoices can't be updated in this way.", code="invoice_not_editable")
    merge(invoice, call.params, _FIELDS)
    check_number(call, invoice)
    if "automatic_tax" in call.params:
        invoice["automatic_tax"]["enabled"] = call.params["automatic_tax"]["enabled"]
        recount(call, invoice)
    call.save(invoice)
    call.emit("invoice.updated", invoice)
    return invoice


@route("DELETE", "/v1/invoices/{invoice}", "InvoiceDeleteParams")
def delete_invoice(call: Call) -> Obj:
    invoice = call.load("invoice", call.ids["invoice"])
    if invoice["status"] != "draft":
        raise invalid("You can only delete draft invoices.", code="invoice_not_editable")
    for item in items(call, invoice["id"]):
        call.store.delete(item["id"])
    call.store.delete(invoice["id"])
    call.emit("invoice.deleted", invoice)
    return {"id": invoice["id"], "object": "invoice", "deleted": True}


@route("POST", "/v1/invoices/{invoice}/add_lines", "InvoiceAddLinesParams")
def add_lines(call: Call) -> Obj:
    invoice = invoice_items.editable(call, call.ids["invoice"])
    given = call.params["lines"]
    invoice_items.check_room(call, invoice["id"], len(given))
    for line in given:
        if "invoice_item" in line:
            item = call.load("invoiceitem", line["invoice_item"], param="lines[0][invoice_item]")
            call.save({**item, "invoice": invoice["id"]})
        else:
            invoice_items.make(
                call, line, customer=invoice["customer"], currency=invoice["currency"], invoice=invoice["id"]
            )
    merge(
        invoice,
        {"metadata": call.params["invoice_metadata"]} if "invoice_metadata" in call.params else {},
        ("metadata",),
    )
    recount(call, invoice)
    call.emit("invoice.updated", invoice)
    return invoice


@route("GET", "/v1/invoices/{invoice}/lines", "InvoiceLineItemListParams")
def list_lines(call: Call) -> Obj:
    invoice = call.load("invoice", call.ids["invoice"])
    lines = [invoice_items.line_of(i, invoice["id"]) for i in items(call, invoice["id"])]
    _tax(call, invoice, lines)
    ids = [line["id"] for line in lines]
    start = ids.index(call.params["starting_after"]) + 1 if call.params.get("starting_after") in ids else 0
    limit = call.params.get("limit", 10)
    return listing(lines[start : start + limit], f"/v1/invoices/{invoice['id']}/lines", more=len(lines) > start + limit)


def require(invoice: Obj, *states: str, verb: str) -> None:
    """400 unless the invoice is in one of the states; paying twice has a code of its own."""
    if invoice["status"] in states:
        return
    if invoice["status"] == "paid":
        raise invalid("Invoice is already paid", code="invoice_already_paid" if verb == "pay" else None)
    raise invalid(
        f"You can't {verb} an invoice that is {invoice['status']}.",
        code="invoice_not_editable" if verb == "edit" else None,
    )
