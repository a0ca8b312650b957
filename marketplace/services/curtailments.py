"""Curtailments: a call to hold a node under a cap for a window. The limit stands on the node; the site loop sheds to it."""

from datetime import datetime

from django.db import connection, transaction
from django.db.models import F

from marketplace import outbox
from marketplace.errors import MarketError
from marketplace.models import Curtailment, PowerNode, Site
from marketplace.services import audit
from marketplace.tenancy import SYSTEM, Actor


def announce(
    actor: Actor,
    node: PowerNode,
    *,
    cap_w: int,
    starts_at: datetime,
    ends_at: datetime,
    reference: str,
    now: datetime,
    source: str = "operator",
    mandatory: bool = True,
) -> Curtailment:
    """Record the call, once by (site, source, reference): announcing the same again answers the same row."""
    if ends_at <= max(starts_at, now):
        raise MarketError(
            "invalid_request", f"The window ends at {ends_at:%F %R}; it must end after it begins and after now."
        )
    if not 0 <= cap_w <= node.cap_w:
        raise MarketError(
            "invalid_request", f"cap_w is {cap_w}; the node carries 0 to {node.cap_w} W.", {"/cap_w": "out of range"}
        )
    with transaction.atomic():
        row, created = Curtailment.objects.get_or_create(
            site_id=node.site_id,
            source=source,
            reference=reference,
            defaults={
                "node": node, "cap_w": cap_w, "starts_at": starts_at, "ends_at": ends_at,
                "mandatory": mandatory, "created_by": actor.label[:120],
            },
        )  # fmt: skip
        if not created and (row.node_id, row.cap_w, row.starts_at, row.ends_at) != (node.pk, cap_w, starts_at, ends_at):
            raise MarketError(
                "conflict", f"{source} {reference} was announced before with other terms: {row.public_id}."
            )
        if created:
            audit.record(actor, "curtailment.announced", row.public_id, now=now, after={"cap_w": cap_w})
            outbox.emit("scheduler.site_loop", key=str(node.site_id), payload={"site": node.site_id})
    return row


def cancel(actor: Actor, row: Curtailment, *, now: datetime) -> None:
    """Before it begins: cancelled. While active: it ends now."""
    with transaction.atomic():
        to = "cancelled" if row.state == "announced" else "restoring"
        _move(row, to, now)
        audit.record(actor, f"curtailment.{to}", row.public_id, now=now)
        outbox.emit("scheduler.site_loop", key=str(row.site_id), payload={"site": row.site_id})


def apply(site: Site, *, now: datetime) -> bool:
    """Bring states and limits in line with the clock. The caller holds the site's lock. True when a limit changed."""
    for row in Curtailment.objects.filter(site=site, state="announced", starts_at__lte=now).order_by("id"):
        _move(row, "active" if row.ends_at > now else "cancelled", now)
        audit.record(SYSTEM, f"curtailment.{row.state}", row.public_id, now=now, organization_id=site.organization_id)
    for row in Curtailment.objects.filter(site=site, state="active", ends_at__lte=now).order_by("id"):
        _move(row, "restoring", now)
        audit.record(SYSTEM, "curtailment.restoring", row.public_id, now=now, organization_id=site.organization_id)
    limits: dict[int, int] = {}
    for row in Curtailment.objects.filter(site=site, state="active"):
        limits[row.node_id] = min(limits.get(row.node_id, row.cap_w), row.cap_w)
    changed = 0
    for node in PowerNode.objects.filter(site=site).order_by("id"):
        if node.limit_w != limits.get(node.pk):
            changed += PowerNode.objects.filter(pk=node.pk).update(limit_w=limits.get(node.pk))
    if changed:
        Site.objects.filter(pk=site.pk).update(safety_generation=F("safety_generation") + 1)
    for row in Curtailment.objects.filter(site=site, state="restoring").order_by("id"):
        _move(row, "completed", now)
        audit.record(SYSTEM, "curtailment.completed", row.public_id, now=now, organization_id=site.organization_id)
    return bool(changed)


def _move(row: Curtailment, to: str, now: datetime) -> None:
    assert connection.in_atomic_block
    if to not in Curtailment.TRANSITIONS[row.state]:
        raise MarketError("illegal_transition", f"The curtailment is {row.state}; it cannot become {to}.")
    settled = now if not Curtailment.TRANSITIONS[to] else None
    moved = Curtailment.objects.filter(pk=row.pk, state=row.state).update(state=to, settled_at=settled)
    if not moved:  # somebody has moved it since `row` was read
        raise MarketError("illegal_transition", f"The curtailment is not {row.state} any more; look again.")
    row.state = to
