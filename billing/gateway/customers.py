"""Customers and their cards."""

from dataclasses import dataclass
from typing import Any

from billing.gateway.wire import api, ask, id_of, keyed


@dataclass(frozen=True, slots=True)
class Card:
    id: str
    brand: str
    last4: str
    expires: str


def create_customer(*, name: str, email: str, reference: str, key: str) -> str:
    made = keyed("customers.create", key, lambda key: api().v1.customers.create(
            {"name": name, "email": email, "metadata": {"account": reference}} if email
            else {"name": name, "metadata": {"account": reference}},
            {"idempotency_key": key},
        ),
    )  # fmt: skip
    return made.id


def start_setup(*, customer: str, currency: str, success_url: str, cancel_url: str, key: str) -> str:
    """The URL of Stripe's page that keeps a card for later, off-session payments."""
    made = keyed(
        "checkout.sessions.create",
        key,
        lambda key: api().v1.checkout.sessions.create(
            {
                "mode": "setup",
                "customer": customer,
                "currency": currency.lower(),
                "allowed_payment_method_types": ["card"],
                "success_url": success_url,
                "cancel_url": cancel_url,
            },
            {"idempotency_key": key},
        ),
    )
    return made.url or ""


def portal(*, customer: str, return_url: str, key: str) -> str:
    made = keyed(
        "billing_portal.sessions.create",
        key,
        lambda key: api().v1.billing_portal.sessions.create(
            {"customer": customer, "return_url": return_url}, {"idempotency_key": key}
        ),
    )
    return made.url


def cards(customer: str) -> list[Card]:
    """The customer's cards, newest first."""
    page = ask(
        "customers.payment_methods.list",
        lambda: api().v1.customers.payment_methods.list(customer, {"type": "card", "limit": 100}),
    )
    found: list[Card] = []
    for method in page.data:
        card: Any = method.card
        found.append(Card(method.id, card.brand, card.last4, f"{card.exp_year:04d}-{card.exp_month:02d}"))
    return found


def default_card(customer: str) -> str:
    """Id of the customer's default payment method for invoices; empty without one."""
    got = ask("customers.retrieve", lambda: api().v1.customers.retrieve(customer))
    invoicing: Any = got.invoice_settings
    return id_of(invoicing.default_payment_method) if invoicing is not None else ""


def set_default_card(customer: str, payment_method: str, *, key: str) -> None:
    keyed(
        "customers.update",
        key,
        lambda key: api().v1.customers.update(
            customer, {"invoice_settings": {"default_payment_method": payment_method}}, {"idempotency_key": key}
        ),
    )


def event_customer(object_id: str) -> str:
    """The customer that a setup intent, checkout session or payment method belongs to, fetched again; may be empty."""
    if object_id.startswith("seti_"):
        return id_of(ask("setup_intents.retrieve", lambda: api().v1.setup_intents.retrieve(object_id)).customer)
    if object_id.startswith("cs_"):
        got = ask("checkout.sessions.retrieve", lambda: api().v1.checkout.sessions.retrieve(object_id))
        return id_of(got.customer)
    if object_id.startswith("pm_"):
        return id_of(ask("payment_methods.retrieve", lambda: api().v1.payment_methods.retrieve(object_id)).customer)
    return object_id if object_id.startswith("cus_") else ""
