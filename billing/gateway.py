"""Stripe: the only module that imports its SDK. Plain values in, plain values out, one exception family.

Every call carries an idempotency key that the caller has committed before, and none runs inside a database transaction.
`STRIPE_BASE_URL` points at the sandbox; empty means Stripe itself.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from threading import Lock
from typing import Any, TypeVar

import stripe
from django.conf import settings
from django.db import connection, transaction
from django.utils import timezone

from billing.models import StripeCall

log = logging.getLogger(__name__)
T = TypeVar("T")

TOLERANCE_S = 300
MAX_LINES = 250
RETRIES = 2  # by the SDK, at once and with the same key; the outbox repeats after that
PER_SECOND = 25  # Stripe's default limit per endpoint


class GatewayError(Exception):
    """Stripe did not do it. `retryable`: the same call with the same key may succeed later."""

    retryable = False


class Unavailable(GatewayError):  # noqa: N818 - names the state, as in HTTP 503
    """No answer, 429 or 5xx: whether it happened is not known; repeat with the same key."""

    retryable = True


class Refused(GatewayError):  # noqa: N818
    """Stripe answered that the request itself is wrong (4xx)."""


class Declined(GatewayError):  # noqa: N818
    """The card was declined or wants its owner's confirmation; `code` is Stripe's."""

    def __init__(self, message: str, *, code: str, payment_intent: str | None) -> None:
        super().__init__(message)
        self.code = code
        self.payment_intent = payment_intent

    @property
    def requires_action(self) -> bool:
        return self.code in {"authentication_required", "invoice_payment_intent_requires_action"}


class SignatureInvalid(GatewayError):  # noqa: N818
    """The webhook's signature is missing, old, or by no secret of ours."""


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


@dataclass(frozen=True, slots=True)
class Card:
    id: str
    brand: str
    last4: str
    expires: str


@dataclass(frozen=True, slots=True)
class RemoteEvent:
    """A verified or listed event: its object is never trusted, only its id, and fetched again."""

    id: str
    type: str
    object_id: str
    created: datetime
    livemode: bool
    invoice_id: str


@cache
def _client(key: str, base_url: str) -> stripe.StripeClient:
    return stripe.StripeClient(
        key,
        stripe_version=stripe.api_version,
        base_addresses={"api": base_url} if base_url else {},
        max_network_retries=RETRIES,
        http_client=stripe.RequestsClient(timeout=20),
    )


def _stripe() -> stripe.StripeClient:
    return _client(settings.STRIPE_SECRET_KEY, settings.STRIPE_BASE_URL.rstrip("/"))


class _Pace:
    """At most PER_SECOND calls a second and endpoint from this process; the rest is Stripe's 429 and a retry."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._recent: dict[str, deque[float]] = defaultdict(deque)

    def wait(self, endpoint: str) -> None:
        with self._lock:
            recent = self._recent[endpoint]
            now = time.monotonic()
            while recent and recent[0] <= now - 1:
                recent.popleft()
            pause = recent[0] + 1 - now if len(recent) >= PER_SECOND else 0.0
            recent.append(now + pause)
        if pause > 0:
            time.sleep(pause)


_pace = _Pace()


def _ask(endpoint: str, call: Callable[[], T]) -> T:
    """Make a call outside any transaction and translate its errors."""
    if connection.in_atomic_block:
        raise RuntimeError(f"{endpoint}: no call to Stripe inside a transaction; write an outbox message")
    if not settings.STRIPE_BASE_URL.startswith("http://127.0.0.1"):
        _pace.wait(endpoint)
    try:
        return call()
    except stripe.CardError as error:
        body: Any = error.error
        intent = getattr(body, "payment_intent", None) if body is not None else None
        raise Declined(
            error.user_message or "declined",
            code=str(error.code or "card_declined"),
            payment_intent=_id(intent) or None,
        ) from error
    except (stripe.APIConnectionError, stripe.RateLimitError) as error:
        raise Unavailable(f"{endpoint}: {error}") from error
    except (stripe.InvalidRequestError, stripe.AuthenticationError, stripe.PermissionError) as error:
        raise Refused(f"{endpoint}: {error}") from error
    except stripe.StripeError as error:
        raise Unavailable(f"{endpoint}: {error}") from error


def _keyed(endpoint: str, key: str, call: Callable[[str], T]) -> T:
    """`_ask` with an idempotency key. Stripe replays a stored 500 under its key for a day, so a 500 burns the key: the
    next attempt uses another, after its caller has looked whether the first had its effect (`burnt`).
    """
    times = burnt(key)
    try:
        return _ask(endpoint, lambda: call(f"{key}-{times}" if times else key))
    except Unavailable as error:
        if isinstance(error.__cause__, stripe.APIError) and (error.__cause__.http_status or 0) >= 500:
            row, _ = StripeCall.objects.get_or_create(key=key, defaults={"operation": endpoint})
            StripeCall.objects.filter(pk=row.pk, burnt=times).update(burnt=times + 1, error=str(error)[:200])
        raise


def burnt(key: str) -> int:
    """How often a call with this key ended in a 500: whether it took effect is not known."""
    return StripeCall.objects.filter(key=key).values_list("burnt", flat=True).first() or 0


def _id(value: Any) -> str:
    """An id, whether the field came expanded or not."""
    if value is None or isinstance(value, str):
        return value or ""
    return str(getattr(value, "id", "") or "")


def once(key: str, operation: str, organization_id: int | None, call: Callable[[str], str]) -> str:
    """Make a call whose answer (an id or URL) is kept: the key is committed first, a second call gives the answer again.

    A crash between call and answer leaves the row without one; calling again with the same key repairs it.
    """
    row, _ = StripeCall.objects.get_or_create(
        key=key, defaults={"operation": operation, "organization_id": organization_id}
    )
    if row.answered_at is not None:
        return row.answer
    try:
        answer = call(key)
    except GatewayError as error:
        StripeCall.objects.filter(pk=row.pk).update(error=str(error)[:200])
        raise
    StripeCall.objects.filter(pk=row.pk).update(answer=answer, answered_at=timezone.now(), error="")
    return answer


# --- customers and cards


def create_customer(*, name: str, email: str, reference: str, key: str) -> str:
    made = _keyed("customers.create", key, lambda key: _stripe().v1.customers.create(
            {"name": name, "email": email, "metadata": {"account": reference}} if email
            else {"name": name, "metadata": {"account": reference}},
            {"idempotency_key": key},
        ),
    )  # fmt: skip
    return made.id


def start_setup(*, customer: str, currency: str, success_url: str, cancel_url: str, key: str) -> str:
    """The URL of Stripe's page that keeps a card for later, off-session payments."""
    made = _keyed(
        "checkout.sessions.create",
        key,
        lambda key: _stripe().v1.checkout.sessions.create(
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
    made = _keyed(
        "billing_portal.sessions.create",
        key,
        lambda key: _stripe().v1.billing_portal.sessions.create(
            {"customer": customer, "return_url": return_url}, {"idempotency_key": key}
        ),
    )
    return made.url


def cards(customer: str) -> list[Card]:
    """The customer's cards, newest first."""
    page = _ask(
        "customers.payment_methods.list",
        lambda: _stripe().v1.customers.payment_methods.list(customer, {"type": "card", "limit": 100}),
    )
    found: list[Card] = []
    for method in page.data:
        card: Any = method.card
        found.append(Card(method.id, card.brand, card.last4, f"{card.exp_year:04d}-{card.exp_month:02d}"))
    return found


def default_card(customer: str) -> str:
    """Id of the customer's default payment method for invoices; empty without one."""
    got = _ask("customers.retrieve", lambda: _stripe().v1.customers.retrieve(customer))
    invoicing: Any = got.invoice_settings
    return _id(invoicing.default_payment_method) if invoicing is not None else ""


def set_default_card(customer: str, payment_method: str, *, key: str) -> None:
    _keyed(
        "customers.update",
        key,
        lambda key: _stripe().v1.customers.update(
            customer, {"invoice_settings": {"default_payment_method": payment_method}}, {"idempotency_key": key}
        ),
    )


def event_customer(object_id: str) -> str:
    """The customer that a setup intent, checkout session or payment method belongs to, fetched again; may be empty."""
    if object_id.startswith("seti_"):
        return _id(_ask("setup_intents.retrieve", lambda: _stripe().v1.setup_intents.retrieve(object_id)).customer)
    if object_id.startswith("cs_"):
        got = _ask("checkout.sessions.retrieve", lambda: _stripe().v1.checkout.sessions.retrieve(object_id))
        return _id(got.customer)
    if object_id.startswith("pm_"):
        return _id(_ask("payment_methods.retrieve", lambda: _stripe().v1.payment_methods.retrieve(object_id)).customer)
    return object_id if object_id.startswith("cus_") else ""


# --- invoices


def _invoice(got: Any) -> RemoteInvoice:
    return RemoteInvoice(
        id=got.id,
        status=got.status or "draft",
        total=got.total,
        amount_paid=got.amount_paid,
        currency=got.currency.upper(),
        pay_url=got.hosted_invoice_url or "",
        our_id=_noted(got.metadata, "invoice"),
    )


def _noted(metadata: Any, name: str) -> str:
    """A value of an object's metadata; empty where it has none."""
    try:
        return str(metadata[name])
    except (KeyError, TypeError):
        return ""


def create_invoice(*, customer: str, currency: str, number: str, our_id: str, key: str) -> RemoteInvoice:
    """A draft with none of the customer's pending items; Stripe does not advance it by itself."""
    return _invoice(
        _keyed(
            "invoices.create",
            key,
            lambda key: _stripe().v1.invoices.create(
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
    page = _ask("invoices.list", lambda: _stripe().v1.invoices.list({"customer": customer, "limit": 100}))
    return next((found for found in map(_invoice, page.auto_paging_iter()) if found.our_id == our_id), None)


def add_lines(invoice: str, lines: Sequence[tuple[str, int]], *, key: str) -> RemoteInvoice:
    """Add (description, minor units) lines, at most MAX_LINES, to a draft."""
    if len(lines) > MAX_LINES:
        raise ValueError(f"a Stripe invoice holds at most {MAX_LINES} lines, not {len(lines)}")
    return _invoice(
        _keyed(
            "invoices.add_lines",
            key,
            lambda key: _stripe().v1.invoices.add_lines(
                invoice,
                {"lines": [{"description": text[:500], "amount": amount} for text, amount in lines]},
                {"idempotency_key": key},
            ),
        )
    )


def get_invoice(invoice: str) -> RemoteInvoice:
    return _invoice(_ask("invoices.retrieve", lambda: _stripe().v1.invoices.retrieve(invoice)))


def delete_draft(invoice: str) -> None:
    _ask("invoices.delete", lambda: _stripe().v1.invoices.delete(invoice))


def finalize_invoice(invoice: str, *, key: str) -> RemoteInvoice:
    got = _keyed(
        "invoices.finalize",
        key,
        lambda key: _stripe().v1.invoices.finalize_invoice(invoice, {"auto_advance": False}, {"idempotency_key": key}),
    )
    return _invoice(got)


def pay_invoice(invoice: str, *, payment_method: str, key: str) -> RemoteInvoice:
    """Charge the card off-session. Raises Declined."""
    return _invoice(
        _keyed(
            "invoices.pay",
            key,
            lambda key: _stripe().v1.invoices.pay(
                invoice, {"payment_method": payment_method, "off_session": True}, {"idempotency_key": key}
            ),
        )
    )


def payments_of(invoice: str) -> list[RemotePayment]:
    """The payments tried for an invoice, by their intents."""
    page = _ask("invoice_payments.list", lambda: _stripe().v1.invoice_payments.list({"invoice": invoice}))
    found: list[RemotePayment] = []
    for row in page.data:
        payment: Any = row.payment
        intent = _id(getattr(payment, "payment_intent", None))
        if intent:
            got = _ask("payment_intents.retrieve", lambda intent=intent: _stripe().v1.payment_intents.retrieve(intent))  # type: ignore[misc]
            found.append(RemotePayment(got.id, got.status, got.amount))
    return found


def invoices_since(since: datetime) -> Iterator[RemoteInvoice]:
    """Every invoice created at Stripe since the instant, for the sweep and the mirror check."""
    created = int(since.timestamp())
    page = _ask("invoices.list", lambda: _stripe().v1.invoices.list({"created": {"gte": created}, "limit": 100}))
    yield from map(_invoice, page.auto_paging_iter())


# --- operators


def create_recipient(*, name: str, email: str, country: str, reference: str, key: str) -> str:
    """An Accounts v2 recipient: the platform collects, answers for losses, and transfers."""
    made = _keyed(
        "v2.core.accounts.create",
        key,
        lambda key: _stripe().v2.core.accounts.create(
            {
                "display_name": name,
                "contact_email": email,
                "dashboard": "express",
                "identity": {"country": country.lower()},
                "configuration": {
                    "recipient": {"capabilities": {"stripe_balance": {"stripe_transfers": {"requested": True}}}}
                },
                "defaults": {"responsibilities": {"fees_collector": "application", "losses_collector": "application"}},
                "metadata": {"operator": reference},
            },
            {"idempotency_key": key},
        ),
    )
    return made.id


def onboarding_link(account: str, *, refresh_url: str, return_url: str, key: str) -> str:
    made = _keyed(
        "v2.core.account_links.create",
        key,
        lambda key: _stripe().v2.core.account_links.create(
            {
                "account": account,
                "use_case": {
                    "type": "account_onboarding",
                    "account_onboarding": {
                        "refresh_url": refresh_url,
                        "return_url": return_url,
                    },
                },
            },
            {"idempotency_key": key},
        ),
    )
    return made.url


def transfers_enabled(account: str) -> bool:
    """May the account receive transfers now?"""
    got: Any = _ask(
        "v2.core.accounts.retrieve",
        lambda: _stripe().v2.core.accounts.retrieve(account, {"include": ["configuration.recipient"]}),
    )
    try:
        return bool(got.configuration.recipient.capabilities.stripe_balance.stripe_transfers.status == "active")
    except AttributeError:
        return False


def transfer(*, account: str, amount: int, currency: str, reference: str, key: str) -> str:
    made = _keyed(
        "transfers.create",
        key,
        lambda key: _stripe().v1.transfers.create(
            {
                "amount": amount,
                "currency": currency.lower(),
                "destination": account,
                "metadata": {"payout": reference},
            },
            {"idempotency_key": key},
        ),
    )
    return made.id


def find_transfer(account: str, reference: str) -> str:
    """Id of the transfer that carries our payout's id; empty where there is none."""
    page = _ask("transfers.list", lambda: _stripe().v1.transfers.list({"destination": account, "limit": 100}))
    for got in page.auto_paging_iter():
        if _noted(got.metadata, "payout") == reference:
            return got.id
    return ""


# --- events


def verify(body: bytes, signature: str | None) -> RemoteEvent:
    """The event of a webhook's raw body, signed by one of our live secrets within TOLERANCE_S. Raises SignatureInvalid."""
    if not signature:
        raise SignatureInvalid("the Stripe-Signature header is missing")
    for secret in settings.STRIPE_WEBHOOK_SECRETS:
        try:
            stripe.WebhookSignature.verify_header(body.decode(), signature, secret, TOLERANCE_S)
        except (stripe.SignatureVerificationError, UnicodeDecodeError):
            continue
        return _event(stripe.Event.construct_from(_json(body), None))
    raise SignatureInvalid("no live secret of ours made this signature, or it is older than 300 s")


def _json(body: bytes) -> Any:
    import json

    return json.loads(body)


def _event(got: Any) -> RemoteEvent:
    thing = got.data.object
    return RemoteEvent(
        id=got.id,
        type=got.type,
        object_id=_id(thing),
        created=datetime.fromtimestamp(got.created, UTC),
        livemode=bool(got.livemode),
        invoice_id=_id(getattr(thing, "invoice", None)),
    )


def events_since(since: datetime) -> Iterator[RemoteEvent]:
    """Events created since the instant, newest first: what a lost webhook would have told us."""
    created = int(since.timestamp())
    page = _ask("events.list", lambda: _stripe().v1.events.list({"created": {"gte": created}, "limit": 100}))
    yield from map(_event, page.auto_paging_iter())


def unanswered(before: datetime) -> list[StripeCall]:
    """Calls made before the instant whose answer we never stored."""
    with transaction.atomic():
        return list(StripeCall.objects.filter(answered_at=None, created_at__lt=before).order_by("id")[:100])
