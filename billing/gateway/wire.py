"""How a call to Stripe is made: client, pace, idempotency keys, errors."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any, TypeVar

import stripe
from django.conf import settings
from django.db import connection
from django.utils import timezone

from billing.models import StripeCall
from marketplace.errors import MarketError

T = TypeVar("T")

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


@cache
def _client(key: str, base_url: str) -> stripe.StripeClient:
    return stripe.StripeClient(
        key,
        stripe_version=stripe.api_version,
        base_addresses={"api": base_url} if base_url else {},
        max_network_retries=RETRIES,
        http_client=stripe.RequestsClient(timeout=20),
    )


def api() -> stripe.StripeClient:
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


def ask(endpoint: str, call: Callable[[], T]) -> T:
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
            payment_intent=id_of(intent) or None,
        ) from error
    except (stripe.APIConnectionError, stripe.RateLimitError) as error:
        raise Unavailable(f"{endpoint}: {error}") from error
    except (stripe.InvalidRequestError, stripe.AuthenticationError, stripe.PermissionError) as error:
        raise Refused(f"{endpoint}: {error}") from error
    except stripe.StripeError as error:
        raise Unavailable(f"{endpoint}: {error}") from error


def keyed(endpoint: str, key: str, call: Callable[[str], T]) -> T:
    """`ask` with an idempotency key. Stripe replays a stored 500 under its key for a day, so a 500 burns the key: the
    next attempt uses another, after its caller has looked whether the first had its effect (`burnt`).
    """
    times = burnt(key)
    try:
        return ask(endpoint, lambda: call(f"{key}-{times}" if times else key))
    except Unavailable as error:
        if isinstance(error.__cause__, stripe.APIError) and (error.__cause__.http_status or 0) >= 500:
            row, _ = StripeCall.objects.get_or_create(key=key, defaults={"operation": endpoint})
            StripeCall.objects.filter(pk=row.pk, burnt=times).update(burnt=times + 1, error=str(error)[:200])
        raise


@contextmanager
def person_waits() -> Iterator[None]:
    """Around calls that a person waits for: no answer is told at once, as MarketError `service_unavailable`."""
    try:
        yield
    except Unavailable as error:
        raise MarketError(
            "service_unavailable", "The payment service does not answer. Try again in a minute."
        ) from error


def burnt(key: str) -> int:
    """How often a call with this key ended in a 500: whether it took effect is not known."""
    return StripeCall.objects.filter(key=key).values_list("burnt", flat=True).first() or 0


def id_of(value: Any) -> str:
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


def noted(metadata: Any, name: str) -> str:
    """A value of an object's metadata; empty where it has none."""
    try:
        return str(metadata[name])
    except (KeyError, TypeError):
        return ""
