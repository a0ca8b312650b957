"""Stripe's events as we keep them: once each, with the message that handles them."""

from __future__ import annotations

from datetime import datetime

from django.db import transaction

from billing import gateway
from billing.models import StripeEvent
from marketplace import outbox

HANDLE = "billing.handle_event"


def keep(event: gateway.RemoteEvent, *, now: datetime) -> bool:
    """Insert the event unless we have it, and leave the message that handles it, in one transaction."""
    subject = event.invoice_id if event.type.startswith("invoice_payment.") else event.object_id
    with transaction.atomic():
        row, fresh = StripeEvent.objects.get_or_create(
            event_id=event.id,
            defaults={
                "type": event.type[:80],
                "object_id": subject[:255],
                "livemode": event.livemode,
                "event_created_at": event.created,
                "received_at": now,
            },
        )
        if fresh:
            outbox.emit(HANDLE, payload={"event": row.pk})
    return fresh
