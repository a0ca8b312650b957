"""Invoices at Stripe and their payments."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from billing.gateway.wire import api, ask, id_of, keyed, noted

MAX_LINES = 250


@dataclass(frozen=True, slots=True)
class RemoteInvoice:
    """What we look at of a Stripe invoice; amounts in minor units. `status`: draft, open, paid, void, uncollectible."""

    id: str
    status: str
    total: int
    amount_paid: int
    currency: str
    pay_url: str
    our_id: str


@dataclass(frozen=True, slots=True)
class RemotePayment:
    """A payment of an invoice: `status` of its intent (succeeded, requires_action, requires_payment_method...)."""

    payment_intent: str
    status: str
    amount: int


def _invoice(got: Any) -> RemoteInvoice:
    return RemoteInvoice(
        id=got.id,
        status=got.status or "draft",
        total=got.total,
        amount_paid=got.amount_paid,
        currency=got.currency.upper(),
        pay_url=got.hosted_invoice_url or "",
        our_id=noted(got.metadata, "invoice"),
    )


def create_invoice(*, customer: str, currency: str, number: str, our_id: str, key: str) -> RemoteInvoice:
    """A draft with none of the customer's pending items; Stripe does not advance it by itself."""
    return _invoice(
        keyed(
            "invoices.create",
            key,
            lambda key: api().v1.invoices.create(
                {
                    "customer": customer,
                    "currency": currency.lower(),
                    "auto_advance": False,
                    "collection_method": "charge_automatically",
                    "pending_invoice_items_behavior": "exclude",
                    "number": number,
                    "metadata": {"invoice": our_id},
                },
                {"idempotency_key": key},
            ),
        )
    )


def find_invoice(customer: str, our_id: str) -> RemoteInvoice | None:
    """The customer's invoice that carries our id: for repair when the answer of `create_invoice` was lost long ago."""
    page = ask("invoices.list", lambda: api().v1.invoices.list({"customer": customer, "limit": 100}))
    return next((found for found in map(_invoice, page.auto_paging_iter()) if found.our_id == our_id), None)


def add_lines(invoice: str, lines: Sequence[tuple[str, int]], *, key: str) -> RemoteInvoice:
    """Add (description, minor units) lines, at most MAX_LINES, to a draft."""
    if len(lines) > MAX_LINES:
        raise ValueError(f"a Stripe invoice holds at most {MAX_LINES} lines, not {len(lines)}")
    return _invoice(
        keyed(
            "invoices.add_lines",
            key,
            lambda key: api().v1.invoices.add_lines(
                invoice,
                {"lines": [{"description": text[:500], "amount": amount} for text, amount in lines]},
                {"idempotency_key": key},
            ),
        )
    )


def get_invoice(invoice: str) -> RemoteInvoice:
    return _invoice(ask("invoices.retrieve", lambda: api().v1.invoices.retrieve(invoice)))


def delete_draft(invoice: str) -> None:
    ask("invoices.delete", lambda: api().v1.invoices.delete(invoice))


def finalize_invoice(invoice: str, *, key: str) -> RemoteInvoice:
    got = keyed(
        "invoices.finalize",
        key,
        lambda key: api().v1.invoices.finalize_invoice(invoice, {"auto_advance": False}, {"idempotency_key": key}),
    )
    return _invoice(got)


def pay_invoice(invoice: str, *, payment_method: str, key: str) -> RemoteInvoice:
    """Charge the card off-session. Raises Declined."""
    return _invoice(
        keyed(
            "invoices.pay",
            key,
            lambda key: api().v1.invoices.pay(
                invoice, {"payment_method": payment_method, "off_session": True}, {"idempotency_key": key}
            ),
        )
    )


def void_invoice(invoice: str, *, key: str) -> RemoteInvoice:
    """Take an open invoice back for good. Raises Refused where it was paid meanwhile."""
    return _invoice(
        keyed(
            "invoices.void", key, lambda key: api().v1.invoices.void_invoice(invoice, {}, {"idempotency_key": key})
        )
    )  # fmt: skip


def payments_of(invoice: str) -> list[RemotePayment]:
    """The payments tried for an invoice, by their intents."""
    page = ask("invoice_payments.list", lambda: api().v1.invoice_payments.list({"invoice": invoice}))
    found: list[RemotePayment] = []
    for row in page.data:
        payment: Any = row.payment
        intent = id_of(getattr(payment, "payment_intent", None))
        if intent:
            got = ask("payment_intents.retrieve", lambda intent=intent: api().v1.payment_intents.retrieve(intent))  # type: ignore[misc]
            found.append(RemotePayment(got.id, got.status, got.amount))
    return found


def invoices_since(since: datetime) -> Iterator[RemoteInvoice]:
    """Every invoice created at Stripe since the instant, for the sweep and the mirror check."""
    created = int(since.timestamp())
    page = ask("invoices.list", lambda: api().v1.invoices.list({"created": {"gte": created}, "limit": 100}))
    yield from map(_invoice, page.auto_paging_iter())
