"""Credit notes: the only way to correct a finalized invoice."""

from __future__ import annotations

from typing import Any

from sandbox.stripe import invoice_items, refunds
from sandbox.stripe.app import Call, listing, merge, route
from sandbox.stripe.errors import invalid
from sandbox.stripe.invoice_pay import payment_of
from sandbox.stripe.store import Obj, new_id


def _lines(call: Call, p: dict[str, Any], note: str) -> list[Obj]:
    out = []
    for given in p.get("lines", []):
        if given["type"] == "invoice_line_item":
            item = call.load("invoiceitem", "ii_" + given["invoice_line_item"].removeprefix("il_"), param="lines")
            amount = given.get("amount", item["amount"])
            description = item["description"]
        else:
            amount, _, _ = invoice_items.amount_of(
                {k: given[k] for k in ("quantity", "unit_amount_decimal") if k in given}
                | ({"price_data": {"unit_amount": given["unit_amount"]}} if "unit_amount" in given else {})
            )
            description = given.get("description")
        out.append(_line(note, amount, description, given))
    return out


def _line(note: str, amount: int, description: str | None, given: dict[str, Any]) -> Obj:
    return {
        "id": f"cnli_{note[-12:]}{new_id('', 8)[1:]}",
        "object": "credit_note_line_item",
        "amount": amount,
        "description": description,
        "discount_amount": 0,
        "discount_amounts": [],
        "invoice_line_item": given.get("invoice_line_item"),
        "livemode": False,
        "metadata": given.get("metadata", {}),
        "pretax_credit_amounts": [],
        "quantity": given.get("quantity"),
        "tax_rates": [],
        "taxes": [],
        "type": given.get("type", "custom_line_item"),
    }


@route("POST", "/v1/credit_notes", "CreditNoteCreateParams")
def create_credit_note(call: Call) -> Obj:
    p, id_ = call.params, new_id("cn")
    invoice = call.load("invoice", p["invoice"], param="invoice")
    if invoice["status"] not in ("open", "paid", "uncollectible"):
        raise invalid(f"You cannot create a credit note for an invoice that is {invoice['status']}.", param="invoice")
    lines = _lines(call, p, id_)
    total = sum(line["amount"] for line in lines) if lines else p.get("amount")
    if total is None or total < 1:
        raise invalid("One of `amount`, `lines` or `shipping_cost` must be provided.", param="amount")
    credited = invoice["pre_payment_credit_notes_amount"] + invoice["post_payment_credit_notes_amount"]
    if total + credited > max(0, invoice["total"]):
        raise invalid("The credit note's amount is greater than what is left of the invoice.", param="amount")
    number = 1 + call.store.count("credit_note", invoice=invoice["id"])
    note: Obj = {
        "id": id_,
        "object": "credit_note",
        "amount": total,
        "amount_shipping": 0,
        "created": call.now,
        "currency": invoice["currency"],
        "customer": invoice["customer"],
        "discount_amount": 0,
        "discount_amounts": [],
        "invoice": invoice["id"],
        "lines": listing(lines or [_line(id_, total, None, {})], f"/v1/credit_notes/{id_}/lines"),
        "livemode": False,
        "memo": p.get("memo"),
        "metadata": p.get("metadata", {}),
        "number": f"{invoice['number']}-CN-{number:02d}",
        "out_of_band_amount": p.get("out_of_band_amount"),
        "pdf": f"{call.base_url}/i/{invoice['id']}?credit_note={id_}",
        "post_payment_amount": 0,
        "pre_payment_amount": 0,
        "pretax_credit_amounts": [],
        "reason": p.get("reason"),
        "refunds": [],
        "status": "issued",
        "subtotal": total,
        "total": total,
        "total_taxes": [],
        "type": "pre_payment",
    }
    if invoice["status"] == "paid":
        _after_payment(call, p, note, invoice)
    else:
        _before_payment(call, note, invoice)
    call.save(note)
    call.emit("credit_note.created", note)
    call.emit("invoice.updated", invoice)
    return note


def _before_payment(call: Call, note: Obj, invoice: Obj) -> None:
    note["pre_payment_amount"] = note["total"]
    invoice["pre_payment_credit_notes_amount"] += note["total"]
    invoice["amount_due"] -= note["total"]
    invoice["amount_remaining"] -= note["total"]
    _ask_for(call, invoice)
    if invoice["amount_remaining"] == 0:
        invoice["status"] = "paid"
        invoice["status_transitions"]["paid_at"] = call.now
    call.save(invoice)
    if invoice["status"] == "paid":
        call.emit("invoice.paid", invoice)


def _ask_for(call: Call, invoice: Obj) -> None:
    """The intent of an open invoice asks for what is due now."""
    payment = payment_of(call, invoice["id"])
    if payment and invoice["amount_due"] > 0:
        intent = call.load("payment_intent", payment["payment"]["payment_intent"], param="payment_intent")
        call.save({**intent, "amount": invoice["amount_due"]})
        call.save({**payment, "amount_requested": invoice["amount_due"]})


def _after_payment(call: Call, p: dict[str, Any], note: Obj, invoice: Obj) -> None:
    """What was paid goes back as a refund, as credit on the customer's balance, or outside Stripe; the sum must fit."""
    by_refund, by_credit, outside = p.get("refund_amount", 0), p.get("credit_amount", 0), p.get("out_of_band_amount", 0)
    linked = [
        (r["refund"], r.get("amount_refunded") or call.load("refund", r["refund"], param="refunds")["amount"])
        for r in p.get("refunds", [])
        if "refund" in r
    ]
    if by_refund + by_credit + outside + sum(a for _, a in linked) != note["total"]:
        raise invalid(
            "The sum of refund_amount, credit_amount, out_of_band_amount and refunds must equal the post payment amount "
            f"({note['total']}) of the credit note.",
        )
    note.update(type="post_payment", post_payment_amount=note["total"])
    if by_refund:
        payment = payment_of(call, invoice["id"])
        if payment is None or payment["status"] != "paid":
            raise invalid("This invoice has no payment to refund.", param="refund_amount")
        intent = call.load("payment_intent", payment["payment"]["payment_intent"], param="payment_intent")
        charge = call.load("charge", intent["latest_charge"], param="charge")
        refund = refunds.refund_charge(call, charge, by_refund, reason=None, metadata={})
        linked.append((refund["id"], by_refund))
    if by_credit:
        customer = call.load("customer", invoice["customer"], param="customer")
        call.save({**customer, "balance": customer["balance"] - by_credit})
    note["refunds"] = [{"amount_refunded": a, "refund": r, "type": "refund"} for r, a in linked]
    invoice["post_payment_credit_notes_amount"] += note["total"]
    call.save(invoice)


@route("GET", "/v1/credit_notes", "CreditNoteListParams")
def list_credit_notes(call: Call) -> Obj:
    p = call.params
    return call.page("credit_note", "/v1/credit_notes", invoice=p.get("invoice"), customer=p.get("customer"))


@route("GET", "/v1/credit_notes/{id}", "CreditNoteRetrieveParams")
def retrieve_credit_note(call: Call) -> Obj:
    return call.load("credit_note", call.ids["id"])


@route("POST", "/v1/credit_notes/{id}", "CreditNoteUpdateParams")
def update_credit_note(call: Call) -> Obj:
    note = call.load("credit_note", call.ids["id"])
    call.save(merge(note, call.params, ("memo", "metadata")))
    call.emit("credit_note.updated", note)
    return note


@route("POST", "/v1/credit_notes/{id}/void", "CreditNoteVoidCreditNoteParams")
def void_credit_note(call: Call) -> Obj:
    note = call.load("credit_note", call.ids["id"])
    if note["status"] == "void" or note["type"] != "pre_payment":
        raise invalid("You can only void an issued credit note of an open invoice.")
    invoice = call.load("invoice", note["invoice"], param="invoice")
    if invoice["status"] != "open":
        raise invalid("You can only void credit notes of open invoices.")
    for name, sign in (("amount_due", 1), ("amount_remaining", 1), ("pre_payment_credit_notes_amount", -1)):
        invoice[name] += sign * note["total"]
    call.save(invoice)
    _ask_for(call, invoice)
    note.update(status="void", voided_at=call.now)
    call.save(note)
    call.emit("credit_note.voided", note)
    return note
