"""The pages a browser clicks through: checkout, 3-D Secure, portal, hosted invoice, onboarding."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from sandbox.stripe import cards, checkout, html
from sandbox.stripe.app import Call
from sandbox.stripe.errors import ApiError, missing
from sandbox.stripe.html import Page
from sandbox.stripe.store import Obj

if TYPE_CHECKING:
    from sandbox.stripe.server import Server

Form = dict[str, str]
View = Callable[[Call, str, "Form | None"], Page]


class RefusedError(Exception):
    """What the visitor typed cannot be used; the message is shown above the form."""


def handle(server: Server, method: str, path: str, query: str, body: str) -> Page:
    """Route a browser's request; errors become pages, and a declined card is kept as the API keeps it."""
    from sandbox.stripe import pages_account, pages_pay

    views: dict[str, View] = {
        "c": checkout_page,
        "3ds": pages_pay.three_d_secure,
        "i": pages_pay.hosted_invoice,
        "p": pages_account.portal,
        "o": pages_account.onboarding,
    }
    parts = path.strip("/").split("/")
    if path == "/":
        return html.page("Stripe sandbox", "<p>The API stands under <code>/v1</code> and <code>/v2</code>.</p>")
    if len(parts) < 2 or parts[0] not in views:
        return html.page("Nothing here", f"<p>No page at <code>{html.esc(path)}</code>.</p>", status=404)
    form = {k: v[0] for k, v in parse_qs(body, keep_blank_values=True).items()} if method == "POST" else None
    store = server.store
    with store.transaction():
        call = Call(store, {}, {k: v[0] for k, v in parse_qs(query).items()}, store.now(), server.base_url)
        store.savepoint()
        try:
            return views[parts[0]](call, parts[-1], form)
        except ApiError as exc:
            if not exc.commit:
                store.rollback_to_savepoint()
            return html.page("That did not work", html.error(exc.error["message"]), status=exc.status)


def read_card(form: Form) -> tuple[cards.TestCard, tuple[int, int], Obj]:
    """(card, (month, year), billing details) as typed; RefusedError with a sentence for the visitor otherwise."""
    number = re.sub(r"\D", "", form.get("number", ""))
    expiry = re.fullmatch(r"\s*(\d{1,2})\s*/?\s*(\d{2}|\d{4})\s*", form.get("expiry", ""))
    if not number or not cards.luhn(number):
        raise RefusedError("Your card number is invalid.")
    if number not in cards.BY_NUMBER:
        raise RefusedError("Your card was declined. The sandbox takes Stripe's published test cards only.")
    if not expiry or not 1 <= int(expiry.group(1)) <= 12:
        raise RefusedError("Your card's expiration date is incomplete.")
    year = int(expiry.group(2)) % 100 + 2000
    if not re.fullmatch(r"\d{3,4}", form.get("cvc", "").strip()):
        raise RefusedError("Your card's security code is incomplete.")
    billing = {"name": form.get("name") or None, "email": form.get("email") or None}
    return cards.BY_NUMBER[number], (int(expiry.group(1)), year), billing


def checkout_page(call: Call, id_: str, form: Form | None) -> Page:
    session = call.store.get(id_, kind="checkout.session")
    if session is None:
        raise missing("checkout session", id_)
    if checkout.expired(call, session):
        return html.page("This page has expired", f"<p>{_back(session)}</p>", status=410)
    if session["status"] == "complete":
        return html.page(
            "Done", f'<p>This page was completed. <a href="{html.esc(_success(session))}">Continue</a></p>'
        )
    intent = _intent(call, session)
    if intent and intent["status"] == "succeeded":  # back from 3-D Secure
        return _finish(call, session, form)
    if form is None:
        problem = (intent or {}).get("last_setup_error") or (intent or {}).get("last_payment_error") or {}
        return html.page(_title(session), _form(session, {}, problem.get("message", "")))
    try:
        card, exp, billing = read_card(form)
        _check_expiry(call, exp)
        intent = checkout.submit(call, session, card, billing=billing, exp=exp)
    except RefusedError as exc:
        return html.page(_title(session), _form(session, form, str(exc)), status=400)
    except ApiError as exc:
        if exc.status != 402:
            raise
        return html.page(_title(session), _form(session, form, exc.error["message"]), status=402)
    if intent["status"] == "requires_action":
        return html.redirect(intent["next_action"]["redirect_to_url"]["url"])
    return _finish(call, session, form)


def _check_expiry(call: Call, exp: tuple[int, int]) -> None:
    today = datetime.fromtimestamp(call.now, UTC)
    if (exp[1], exp[0]) < (today.year, today.month):
        raise RefusedError("Your card's expiration date is in the past.")


def _intent(call: Call, session: Obj) -> Obj | None:
    id_ = session.get("setup_intent") or session.get("payment_intent")
    return call.store.get(id_) if id_ else None


def _title(session: Obj) -> str:
    if session["mode"] == "setup":
        return "Save a card"
    return f"Pay {html.money(session['amount_total'], session['currency'])}"


def _form(session: Obj, values: Form, problem: str) -> str:
    button = "Save card" if session["mode"] == "setup" else "Pay"
    items = "".join(
        f"<tr><td>{html.esc(i['name'])}</td><td class=r>{html.money(i['amount'], session['currency'])}</td></tr>"
        for i in session.get("_items", [])
    )
    return (
        f"{f'<table>{items}</table>' if items else ''}{html.error(problem)}"
        f'<form method="post">{html.card_fields(values)}<button type="submit">{button}</button></form>'
        f"<p>{_back(session)}</p>{html.test_cards()}"
    )


def _back(session: Obj) -> str:
    return f'<a href="{html.esc(session["cancel_url"])}">Cancel and go back</a>' if session["cancel_url"] else ""


def _success(session: Obj) -> str:
    return str(session["success_url"]).replace("{CHECKOUT_SESSION_ID}", session["id"])


def _finish(call: Call, session: Obj, form: Form | None) -> Page:
    checkout.complete(call, session, (form or {}).get("email"))
    return html.redirect(_success(session))
