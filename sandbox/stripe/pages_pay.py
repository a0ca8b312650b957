"""3-D Secure, and the hosted page of an invoice."""

from __future__ import annotations

from sandbox.stripe import html, invoice_pay, payment_intents, payment_methods, setup_intents
from sandbox.stripe.app import Call
from sandbox.stripe.cards import decline
from sandbox.stripe.errors import ApiError, missing
from sandbox.stripe.html import Page
from sandbox.stripe.pages import Form, RefusedError, read_card
from sandbox.stripe.store import Obj

_AUTH_FAILED = (
    "We are unable to authenticate your payment method. Please choose a different payment method and try again."
)


def three_d_secure(call: Call, id_: str, form: Form | None) -> Page:
    """The bank's page: complete or fail, then back to where the payment came from."""
    intent = call.store.get(id_)
    if intent is None or intent.get("object") not in ("setup_intent", "payment_intent"):
        raise missing("intent", id_)
    if intent["status"] != "requires_action":
        return html.page("Nothing to confirm", "<p>This payment does not wait for a confirmation.</p>")
    if form is None:
        amount = f"<p>{html.money(intent['amount'], intent['currency'])}</p>" if "amount" in intent else ""
        buttons = (
            '<form method="post"><button name="result" value="complete">Complete authentication</button> '
            '<button class="plain" name="result" value="fail">Fail authentication</button></form>'
        )
        return html.page("3-D Secure", f"<p>Your bank asks you to confirm.</p>{amount}{buttons}")
    action = intent["next_action"].get("redirect_to_url") or {}
    if form.get("result") == "complete":
        _complete(call, intent)
    else:
        _fail(call, intent)
    back = action.get("return_url")
    return html.redirect(back) if back else html.page("Thank you", "<p>You may close this page.</p>")


def _complete(call: Call, intent: Obj) -> None:
    try:
        if intent["object"] == "setup_intent":
            setup_intents.confirm(call, intent, intent["payment_method"], authenticated=True)
            return
        method = call.load("payment_method", intent["payment_method"])
        if intent["_invoice"]:
            invoice = call.load("invoice", intent["_invoice"])
            invoice_pay.collect(call, invoice, method, off_session=False, authenticated=True)
        else:
            payment_intents.confirm(call, intent, method, authenticated=True)
    except ApiError as exc:
        if exc.status != 402:
            raise
        # The decline stands on the intent; the page that the visitor returns to shows it.


def _fail(call: Call, intent: Obj) -> None:
    setup = intent["object"] == "setup_intent"
    code = "setup_intent_authentication_failure" if setup else "payment_intent_authentication_failure"
    problem = decline("generic_decline").error | {
        "code": code,
        "message": _AUTH_FAILED,
        "type": "invalid_request_error",
    }
    problem.pop("decline_code", None)
    field = "last_setup_error" if setup else "last_payment_error"
    intent.update({"status": "requires_payment_method", "payment_method": None, "next_action": None, field: problem})
    call.save(intent)
    call.emit("setup_intent.setup_failed" if setup else "payment_intent.payment_failed", intent)
    if intent.get("_invoice"):
        call.emit("invoice.payment_failed", call.load("invoice", intent["_invoice"]))


def hosted_invoice(call: Call, id_: str, form: Form | None) -> Page:
    """The invoice with its lines; while it is open, a card pays it, with 3-D Secure where the card wants it."""
    invoice = call.store.get(id_, kind="invoice")
    if invoice is None or invoice["status"] == "draft":
        raise missing("invoice", id_)
    title = f"Invoice {invoice['number']}"
    if form is None or invoice["status"] != "open":
        payment = invoice_pay.payment_of(call, id_)
        intent = call.store.get(payment["payment"]["payment_intent"]) if payment else None
        if intent and intent["status"] == "requires_action" and invoice["status"] == "open":
            link = f'<p><a href="{call.base_url}/3ds/{intent["id"]}">Confirm with your bank</a></p>'
            return html.page(title, _summary(call, invoice) + link + _form({}, ""))
        problem = ((intent or {}).get("last_payment_error") or {}).get("message", "")
        return html.page(title, _summary(call, invoice) + (_form({}, problem) if invoice["status"] == "open" else ""))
    try:
        card, exp, billing = read_card(form)
        method = payment_methods.make(call, card, billing=billing, exp=exp)
        invoice_pay.collect(call, invoice, method, off_session=False)
    except RefusedError as exc:
        return html.page(title, _summary(call, invoice) + _form(form, str(exc)), status=400)
    except ApiError as exc:
        payment = invoice_pay.payment_of(call, id_)
        if exc.error.get("code") == "invoice_payment_intent_requires_action" and payment:
            return html.redirect(f"{call.base_url}/3ds/{payment['payment']['payment_intent']}")
        if exc.status != 402:
            raise
        return html.page(title, _summary(call, invoice) + _form(form, exc.error["message"]), status=402)
    return html.redirect(f"{call.base_url}/i/{id_}")


def _form(values: Form, problem: str) -> str:
    return f'{html.error(problem)}<form method="post">{html.card_fields(values)}<button>Pay invoice</button></form>{html.test_cards()}'


def _summary(call: Call, invoice: Obj) -> str:
    rows = "".join(
        f"<tr><td>{html.esc(i['description'] or '')}</td><td class=r>{html.money(i['amount'], i['currency'])}</td></tr>"
        for i in call.store.find("invoiceitem", invoice=invoice["id"])
    )
    currency = invoice["currency"]
    return (
        f"<p>Status: <strong>{html.esc(invoice['status'])}</strong></p><table>{rows}"
        f"<tr><th>Total</th><th class=r>{html.money(invoice['total'], currency)}</th></tr>"
        f"<tr><td>Still due</td><td class=r>{html.money(invoice['amount_remaining'], currency)}</td></tr></table>"
    )
