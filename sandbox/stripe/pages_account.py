"""The customer portal and the operator's onboarding."""

from __future__ import annotations

from sandbox.stripe import accounts, customers, html, payment_methods, setup_intents
from sandbox.stripe.app import Call
from sandbox.stripe.errors import ApiError, missing
from sandbox.stripe.html import Page, esc
from sandbox.stripe.pages import Form, RefusedError, read_card
from sandbox.stripe.store import Obj


def portal(call: Call, token: str, form: Form | None) -> Page:
    found = call.store.find("billing_portal.session", _token=token)
    if not found:
        raise missing("portal session", token)
    session = found[0]
    here = f"{call.base_url}/p/session/{token}"
    customer = customers.live_customer(call, session["customer"])
    if form is None:
        return html.page("Billing details", _portal(call, session, customer, ""))
    try:
        intent = _act(call, customer, form, here)
    except RefusedError as exc:
        return html.page("Billing details", _portal(call, session, customer, str(exc)), status=400)
    except ApiError as exc:
        if exc.status != 402:
            raise
        return html.page("Billing details", _portal(call, session, customer, exc.error["message"]), status=402)
    if intent and intent["status"] == "requires_action":
        return html.redirect(intent["next_action"]["redirect_to_url"]["url"])
    return html.redirect(here)


def _act(call: Call, customer: Obj, form: Form, here: str) -> Obj | None:
    action, method_id = form.get("action"), form.get("payment_method", "")
    if action in ("default", "remove"):
        method = call.load("payment_method", method_id)
        if method["customer"] != customer["id"]:
            raise missing("PaymentMethod", method_id)
        if action == "remove":
            payment_methods.detach(call, method_id)
            return None
        customer["invoice_settings"]["default_payment_method"] = method_id
        call.save(customer)
        call.emit("customer.updated", customer)
        return None
    card, exp, billing = read_card(form)
    method = payment_methods.make(call, card, billing=billing, exp=exp)
    intent = setup_intents.build(call, customer=customer["id"])
    return setup_intents.confirm(call, intent, method["id"], return_url=here)


def _portal(call: Call, session: Obj, customer: Obj, problem: str) -> str:
    default = customer["invoice_settings"]["default_payment_method"]
    rows = "".join(
        _card_row(m, is_default=m["id"] == default) for m in call.store.find("payment_method", customer=customer["id"])
    )
    invoices = "".join(
        f'<tr><td><a href="/i/{esc(i["id"])}">{esc(i["number"])}</a></td><td>{esc(i["status"])}</td>'
        f"<td class=r>{html.money(i['total'], i['currency'])}</td></tr>"
        for i in call.store.find("invoice", customer=customer["id"], newest_first=True, limit=24)
        if i["status"] != "draft"
    )
    back = f'<p><a href="{esc(session["return_url"])}">Return</a></p>' if session["return_url"] else ""
    return (
        f"{back}{html.error(problem)}<p>{esc(customer.get('name') or customer.get('email') or customer['id'])}</p>"
        f"<h2>Cards</h2><table>{rows or '<tr><td>No card yet.</td></tr>'}</table>"
        f'<h2>Add a card</h2><form method="post"><input type="hidden" name="action" value="add">{html.card_fields({})}'
        f"<button>Add card</button></form><h2>Invoices</h2><table>{invoices or '<tr><td>None yet.</td></tr>'}</table>"
    )


def _card_row(method: Obj, *, is_default: bool) -> str:
    card = method["card"]

    def button(action: str, label: str) -> str:
        return (
            f'<form class="inline" method="post"><input type="hidden" name="payment_method" value="{esc(method["id"])}">'
            f'<button class="plain small" name="action" value="{action}">{label}</button></form>'
        )

    mark = "<strong>default</strong>" if is_default else button("default", "Make default")
    text = f"{esc(card['brand'])} ending {esc(card['last4'])}, {card['exp_month']:02d}/{card['exp_year']}"
    return f"<tr><td>{text}</td><td class=r>{mark} {button('remove', 'Remove')}</td></tr>"


def onboarding(call: Call, token: str, form: Form | None) -> Page:
    """Single use, ten minutes; a stale link leads to the platform's refresh URL, as Stripe's does."""
    link = call.store.get(f"aclk_{token}", kind="sandbox.account_link")
    if link is None:
        raise missing("account link", token)
    case = link["use_case"][link["use_case"]["type"]]
    if link["used"] or link["until"] <= call.now:
        return html.redirect(case["refresh_url"])
    account = accounts.load(call, link["account"])
    if form is None:
        return html.page("Receive payouts", _onboarding_form(account))
    call.store.put({**link, "used": True}, kind="sandbox.account_link")
    if form.get("result") != "later":
        identity = {"business_details": {"registered_name": form.get("registered_name") or account["display_name"]}}
        accounts.set_onboarded(call, account, done=form.get("result") != "refuse", identity=identity)
    return html.redirect(case.get("return_url") or case["refresh_url"])


def _onboarding_form(account: Obj) -> str:
    name = esc(account["display_name"] or "")
    return (
        '<form method="post"><label for="registered_name">Registered business name</label>'
        f'<input id="registered_name" name="registered_name" required value="{name}">'
        '<label for="iban">Bank account</label><input id="iban" name="bank_account" value="000123456789" required>'
        '<p class="muted">Nothing typed here leaves this machine; the bank account is not kept.</p>'
        '<button name="result" value="complete">Agree and submit</button> '
        '<button class="plain" name="result" value="refuse">Submit, but fail the checks</button> '
        '<button class="plain" name="result" value="later" formnovalidate>Save for later</button></form>'
    )
