"""The audit trail: one row for each change a person, key or operator's action makes."""

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from marketplace.models import AuditEvent
from marketplace.tenancy import Actor


def record(
    actor: Actor,
    verb: str,
    subject: str,
    *,
    now: datetime,
    organization_id: int | None = None,
    before: Any = None,
    after: Any = None,
) -> None:
    """`verb` such as "site.mode_changed", `subject` a public id. Runs in the caller's transaction."""
    AuditEvent.objects.create(
        organization_id=organization_id if organization_id is not None else actor.organization_id,
        at=now,
        actor=actor.label[:120],
        verb=verb,
        subject=subject,
        before=before,
        after=after,
    )


def record_many(actor: Actor, verb: str, rows: Iterable[tuple[int, str, Any]], *, now: datetime) -> None:
    """The same of several, in one statement: (organization's id, subject, after) of each."""
    AuditEvent.objects.bulk_create(
        AuditEvent(organization_id=pk, at=now, actor=actor.label[:120], verb=verb, subject=subject, after=after)
        for pk, subject, after in rows
    )
