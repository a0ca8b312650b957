"""What happens to a finished invoice: finalize, pay, void, mark uncollectible, send; and its invoice payments."""

from __future__ import annotations

from sandbox.stripe import customers, invoices, payment_intents, payment_methods
from sandbox.stripe.app import Call, route
from sandbox.stripe.errors import ApiError, card_error, invalid
from sandbox.stripe.store import Obj, new_id

_ACTION = (
    "This payment requires additional user action before it can be completed successfully. Payment can be completed "
    "using the PaymentIntent associated with the invoice."
)


@route("POST", "/v1/invoices/{invoice}/finalize", "InvoiceFinalizeInvoiceParams")
def finalize(call: Call) -> Obj:
    invoice = call.load("invoice", call.ids["invoice"])
    if invoice["status"] != "draft":
        raise invalid(
            "This invoice is already finalized, you can't re-finalize a non-draft invoice.", code="invoice_not_editable"
        )
    if "auto_advance" in call.params:
        invoice["auto_advance"] = call.params["auto_advance"]
    return _finalize(call, invoice)


def _finalize(call: Call, invoice: Obj) -> Obj:
    customer = call.load("customer", invoice["customer"], param="customer")
    if not invoice["number"]:
        invoice["number"] = f"{customer['invoice_prefix']}-{customer['next_invoice_sequence']:04d}"
        customer["next_invoice_sequence"] += 1
    customer["currency"] = customer["currency"] or invoice["currency"]
    call.save(customer)
    invoice.update(
        status="open",
        effective_at=invoice.get("effective_at") or call.now,
        ending_balance=0,
        hosted_invoice_url=f"{call.base_url}/i/{invoice['id']}",
        invoice_pdf=f"{call.base_url}/i/{invoice['id']}?pdf=1",
    )
    invoice["status_transitions"]["finalized_at"] = call.now
    call.save(invoice)
    call.emit("invoice.finalized", invoice)
    if invoice["amount_due"] == 0:
        return _paid(call, invoice, None)
    intent = payment_intents.build(
        call,
        invoice["amount_due"],
        invoice["currency"],
        customer=invoice["customer"],
        description=f"Payment for Invoice {invoice['number']}",
        metadata={},
    )
    intent["_invoice"] = invoice["id"]
    call.save(intent)
    _payment(call, invoice, intent["id"])
    return invoice


def _payment(call: Call, invoice: Obj, intent: str | None) -> Obj:
    """The invoice payment that ties an intent to the invoice; without one it is paid out of band."""
    payment = {
        "id": new_id("inpay"),
        "object": "invoice_payment",
        "amount_paid": None,
        "amount_requested": invoice["amount_due"],
        "created": call.now,
        "currency": invoice["currency"],
        "invoice": invoice["id"],
        "is_default": True,
        "livemode": False,
        "payment": {"type": "payment_intent", "payment_intent": intent},
        "status": "open",
        "status_transitions": {"canceled_at": None, "paid_at": None},
    }
    return call.save(payment)


def payment_of(call: Call, invoice: str) -> Obj | None:
    rows = call.store.find("invoice_payment", account=call.account, invoice=invoice)
    return rows[-1] if rows else None


def _paid(call: Call, invoice: Obj, payment: Obj | None) -> Obj:
    paid = invoice["amount_due"]
    invoice.update(status="paid", amount_paid=paid, amount_remaining=0, attempted=True, next_payment_attempt=None)
    invoice["status_transitions"]["paid_at"] = call.now
    call.save(invoice)
    if payment:
        payment.update(status="paid", amount_paid=paid)
        payment["status_transitions"]["paid_at"] = call.now
        call.save(payment)
        call.emit("invoice_payment.paid", payment)
    call.emit("invoice.paid", invoice)
    call.emit("invoice.payment_succeeded", invoice)
    return invoice


@route("POST", "/v1/invoices/{invoice}/pay", "InvoicePayParams")
def pay(call: Call) -> Obj:
    p, invoice = call.params, call.load("invoice", call.ids["invoice"])
    if invoice["status"] == "draft":
        _finalize(call, invoice)
        if invoice["status"] == "paid":
            return invoice
    invoices.require(invoice, "open", "uncollectible", verb="pay")
    if p.get("paid_out_of_band"):
        invoice["amount_paid_off_stripe"] = invoice["amount_due"]
        _cancel_intent(call, invoice)
        return _paid(call, invoice, None)
    method = _method(call, invoice, p.get("payment_method"))
    return collect(call, invoice, method, off_session=p.get("off_session", True))


def _method(call: Call, invoice: Obj, given: str | None) -> Obj:
    customer = call.load("customer", invoice["customer"], param="customer")
    if given:
        method = payment_methods.find(call, given)
        if method["customer"] not in (None, customer["id"]):
            raise invalid("The payment method does not belong to the invoice's customer.", param="payment_method")
        return method
    if invoice.get("default_payment_method"):
        return call.load("payment_method", invoice["default_payment_method"], param="default_payment_method")
    default = customers.default_method(call, customer)
    if default is None:
        raise invalid(
            "There is no `default_payment_method` set on this Customer or Invoice. Please attach a payment method and "
            "set it as default, or pass one.",
            code="resource_missing",
        )
    return default


def collect(call: Call, invoice: Obj, method: Obj, *, off_session: bool, authenticated: bool = False) -> Obj:
    """Try a card on an open invoice. Raises 402 (kept) on a decline and where 3-D Secure is needed."""
    payment = payment_of(call, invoice["id"])
    if payment is None:
        raise invalid("This invoice has no payment to attempt.")
    intent = call.load("payment_intent", payment["payment"]["payment_intent"], param="payment_intent")
    invoice.update(attempted=True, attempt_count=invoice["attempt_count"] + 1)
    call.save(invoice)
    try:
        payment_intents.confirm(
            call,
            intent,
            method,
            off_session=off_session,
            authenticated=authenticated,
            for_invoice=True,
            return_url=invoice["hosted_invoice_url"],
        )
    except ApiError as error:
        call.emit("invoice.payment_failed", invoice)
        error.error.pop("param", None)
        raise
    if intent["status"] == "requires_action":
        call.emit("invoice.payment_action_required", invoice)
        call.emit("invoice.payment_failed", invoice)
        raise card_error(_ACTION, "invoice_payment_intent_requires_action")
    return _paid(call, invoice, payment)


def _cancel_intent(call: Call, invoice: Obj) -> None:
    payment = payment_of(call, invoice["id"])
    if payment is None:
        return
    intent = call.load("payment_intent", payment["payment"]["payment_intent"], param="payment_intent")
    payment_intents.cancel(call, intent, "void_invoice" if invoice["status"] == "void" else None)
    payment["status"] = "canceled"
    payment["status_transitions"]["canceled_at"] = call.now
    call.save(payment)


@route("POST", "/v1/invoices/{invoice}/void", "InvoiceVoidInvoiceParams")
def void(call: Call) -> Obj:
    invoice = call.load("invoice", call.ids["invoice"])
    invoices.require(invoice, "open", "uncollectible", verb="void")
    invoice.update(status="void")
    invoice["status_transitions"]["voided_at"] = call.now
    _cancel_intent(call, invoice)
    call.save(invoice)
    call.emit("invoice.voided", invoice)
    return invoice


@route("POST", "/v1/invoices/{invoice}/mark_uncollectible", "InvoiceMarkUncollectibleParams")
def mark_uncollectible(call: Call) -> Obj:
    invoice = call.load("invoice", call.ids["invoice"])
    invoices.require(invoice, "open", verb="mark uncollectible")
    invoice.update(status="uncollectible")
    invoice["status_transitions"]["marked_uncollectible_at"] = call.now
    call.save(invoice)
    call.emit("invoice.marked_uncollectible", invoice)
    return invoice


@route("POST", "/v1/invoices/{invoice}/send", "InvoiceSendInvoiceParams")
def send(call: Call) -> Obj:
    invoice = call.load("invoice", call.ids["invoice"])
    if invoice["collection_method"] != "send_invoice":
        raise invalid("You can only manually send an invoice if its collection method is 'send_invoice'.")
    if invoice["status"] == "draft":
        _finalize(call, invoice)
    call.emit("invoice.sent", invoice)
    return invoice


@route("GET", "/v1/invoice_payments", "InvoicePaymentListParams")
def list_invoice_payments(call: Call) -> Obj:
    p = call.params
    intent = p.get("payment", {}).get("payment_intent")
    return call.page(
        "invoice_payment",
        "/v1/invoice_payments",
        invoice=p.get("invoice"),
        status=p.get("status"),
        payment__payment_intent=intent,
    )


@route("GET", "/v1/invoice_payments/{invoice_payment}", "InvoicePaymentRetrieveParams")
def retrieve_invoice_payment(call: Call) -> Obj:
    return call.load("invoice_payment", call.ids["invoice_payment"])
