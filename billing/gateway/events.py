"""What Stripe tells us: webhooks, and the list of events that repairs a lost one."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import stripe
from django.conf import settings

from billing.gateway.wire import SignatureInvalid, api, ask, id_of

TOLERANCE_S = 300


@dataclass(frozen=True, slots=True)
class RemoteEvent:
    """A verified or listed event: its object is never trusted, only its id, and fetched again."""

    id: str
    type: str
    object_id: str
    created: datetime
    livemode: bool
    invoice_id: str


def verify(body: bytes, signature: str | None) -> RemoteEvent:
    """The event of a webhook's raw body, signed by one of our live secrets within TOLERANCE_S. Raises SignatureInvalid."""
    if not signature:
        raise SignatureInvalid("the Stripe-Signature header is missing")
    for secret in settings.STRIPE_WEBHOOK_SECRETS:
        try:
            stripe.WebhookSignature.verify_header(body.decode(), signature, secret, TOLERANCE_S)
        except (stripe.SignatureVerificationError, UnicodeDecodeError):
            continue
        return _event(stripe.Event.construct_from(json.loads(body), None))
    raise SignatureInvalid("no live secret of ours made this signature, or it is older than 300 s")


def _event(got: Any) -> RemoteEvent:
    thing = got.data.object
    return RemoteEvent(
        id=got.id,
        type=got.type,
        object_id=id_of(thing),
        created=datetime.fromtimestamp(got.created, UTC),
        livemode=bool(got.livemode),
        invoice_id=id_of(getattr(thing, "invoice", None)),
    )


def events_since(since: datetime) -> Iterator[RemoteEvent]:
    """Events created since the instant, newest first: what a lost webhook would have told us."""
    created = int(since.timestamp())
    page = ask("events.list", lambda: api().v1.events.list({"created": {"gte": created}, "limit": 100}))
    yield from map(_event, page.auto_paging_iter())
