"""Stripe: the only module that imports its SDK. Plain values in, plain values out, one exception family.

Every call carries an idempotency key that the caller has committed before, and none runs inside a database transaction.
`STRIPE_BASE_URL` points at the sandbox; empty means Stripe itself.
"""

from billing.gateway.customers import (
    Card,
    cards,
    create_customer,
    default_card,
    event_customer,
    portal,
    set_default_card,
    start_setup,
)
from billing.gateway.events import RemoteEvent, events_since, verify
from billing.gateway.invoices import (
    MAX_LINES,
    RemoteInvoice,
    RemotePayment,
    add_lines,
    create_invoice,
    delete_draft,
    finalize_invoice,
    find_invoice,
    get_invoice,
    invoices_since,
    pay_invoice,
    payments_of,
    void_invoice,
)
from billing.gateway.operators import create_recipient, find_transfer, onboarding_link, transfer, transfers_enabled
from billing.gateway.wire import (
    Declined,
    GatewayError,
    Refused,
    SignatureInvalid,
    Unavailable,
    burnt,
    once,
    person_waits,
)

__all__ = [
    "MAX_LINES",
    "Card",
    "Declined",
    "GatewayError",
    "Refused",
    "RemoteEvent",
    "RemoteInvoice",
    "RemotePayment",
    "SignatureInvalid",
    "Unavailable",
    "add_lines",
    "burnt",
    "cards",
    "create_customer",
    "create_invoice",
    "create_recipient",
    "default_card",
    "delete_draft",
    "event_customer",
    "events_since",
    "finalize_invoice",
    "find_invoice",
    "find_transfer",
    "get_invoice",
    "invoices_since",
    "onboarding_link",
    "once",
    "pay_invoice",
    "payments_of",
    "person_waits",
    "portal",
    "set_default_card",
    "start_setup",
    "transfer",
    "transfers_enabled",
    "verify",
    "void_invoice",
]
