"""What waits to be done: the outbox, with its parked messages, and what Stripe told us."""

from typing import Any

from django.contrib import admin
from unfold.decorators import display

from billing.models import StripeEvent
from marketplace import outbox
from marketplace.admin import look
from marketplace.admin.base import StaffAdmin
from marketplace.admin.doors import staff_site
from marketplace.admin.moves import Call, Move
from marketplace.errors import MarketError
from marketplace.models import OutboxMessage
from marketplace.services import audit


def _retry(call: Call) -> str:
    if not outbox.retry(call.row.pk, now=call.now):
        raise MarketError("illegal_transition", f"Message {call.row.pk} is not parked any more.")
    audit.record(
        call.actor,
        "outbox.retried",
        f"outbox {call.row.pk}",
        now=call.now,
        before={"topic": call.row.topic, "error": call.row.last_error[:200]},
    )
    return f"{call.row} is tried again."


@admin.register(OutboxMessage, site=staff_site)
class OutboxAdmin(StaffAdmin):
    list_display = ("id", "topic", "key", "shown_state", "attempts", "available_at", "shown_error")
    list_filter = ("topic", ("parked_at", admin.EmptyFieldListFilter))
    search_fields = ("topic", "key", "last_error")
    ordering = ("-parked_at", "available_at")
    moves = (
        Move(
            name="retry", label="Try again", action="audit:read", run=_retry, icon="replay", bulk=True,
            possible=lambda row: row.parked_at is not None, question="Its attempts begin anew, at once.",
        ),
    )  # fmt: skip

    @display(description="State", label={"parked": "danger", "claimed": "info", "waiting": "warning"})
    def shown_state(self, row: OutboxMessage) -> str:
        if row.parked_at is not None:
            return "parked"
        return "claimed" if row.claimed_until is not None else "waiting"

    @display(description="Last error")
    def shown_error(self, row: OutboxMessage) -> str:
        return row.last_error[:120]


@admin.register(StripeEvent, site=staff_site)
class StripeEventAdmin(look.Shown, StaffAdmin):
    list_display = (
        "event_id",
        "type",
        "object_id",
        "livemode",
        "received_at",
        "shown_handled",
        "attempts",
        "last_error",
    )
    list_filter = ("type", "livemode", ("handled_at", admin.EmptyFieldListFilter))
    search_fields = ("event_id", "type", "object_id")
    ordering = ("-id",)

    @display(description="Handled", label={"handled": "success", "waiting": "warning"})
    def shown_handled(self, row: Any) -> str:
        return "handled" if row.handled_at is not None else "waiting"
