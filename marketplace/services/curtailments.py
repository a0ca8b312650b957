"""Curtailments: a call to hold a node under a cap for a window. The limit stands on the node; the site loop sheds to it.

    announced -> active -> restoring -> completed | failed          (announced -> cancelled)

A mandatory call takes hashing, then jobs in the order of `sheds`. An economic one binds hashing alone: no job waits for it, or leaves.
A call restores until the machines that were awake before it are again, or those that fit: `QUIET` after the last has changed,
`RESTORED` at the most; `failed`: a mandatory call to less than the node drew before, under which its meter (without one: its books) never
came while it stood. What it delivered: `curtailment_reports`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from django.db import connection, transaction
from django.db.models import F

from marketplace import outbox, prepared
from marketplace.errors import MarketError
from marketplace.locks import Lock, acquire
from marketplace.models import Curtailment, CurtailmentReport, GridSource, Miner, PowerNode, Site
from marketplace.services import audit, curtailment_notices, curtailment_reports
from marketplace.tenancy import SYSTEM, Actor

RESTORED = timedelta(minutes=30)
QUIET = timedelta(minutes=6)  # longer than the slow tier of the dispatch waits
OPEN = ("announced", "active")


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
    emergency: bool = False,
    origin: GridSource | None = None,
) -> Curtailment:
    """Record the call, once by (site, source, reference): announcing the same again answers the same row."""
    if emergency and not mandatory:
        raise MarketError("invalid_request", "An emergency is mandatory.", {"/mandatory": "an emergency is"})
    if ends_at <= max(starts_at, now):
        raise MarketError(
            "invalid_request", f"The window ends at {ends_at:%F %R}; it must end after it begins and after now."
        )
    _check_cap(node, cap_w)
    terms: dict[str, Any] = {
        "node": node, "cap_w": cap_w, "starts_at": starts_at, "ends_at": ends_at, "mandatory": mandatory, "emergency": emergency,
    }  # fmt: skip
    with transaction.atomic():
        row, created = Curtailment.objects.get_or_create(
            site_id=node.site_id, source=source, reference=reference,
            defaults={**terms, "created_by": actor.label[:120], "origin": origin},
        )  # fmt: skip
        if not created and any(getattr(row, name) != value for name, value in terms.items()):
            raise MarketError(
                "conflict", f"{source} {reference} was announced before with other terms: {row.public_id}."
            )
        if created:
            after = {
                "cap_w": cap_w,
                "node": node.name,
                "starts_at": starts_at.isoformat(),
                "ends_at": ends_at.isoformat(),
            }
            audit.record(
                actor,
                "curtailment.announced",
                row.public_id,
                now=now,
                organization_id=row.site.organization_id,
                after=after,
            )
            curtailment_notices.announced(row, now=now)
            _nudge(row)
    return row


def amend(
    actor: Actor, row: Curtailment, *, now: datetime, cap_w: int | None = None, ends_at: datetime | None = None
) -> bool:
    """Give an announced or active call another cap or end, as its source does. False: nothing changed."""
    with transaction.atomic():
        acquire((Lock.SITE, row.site_id))
        row.refresh_from_db()
        cap, end = row.cap_w if cap_w is None else cap_w, ends_at or row.ends_at
        before = {"cap_w": str(row.cap_w), "ends_at": str(row.ends_at)}
        if (cap, end) == (row.cap_w, row.ends_at):
            return False
        if row.state not in OPEN:
            raise MarketError("illegal_transition", f"The curtailment is {row.state}; only an open one can be changed.")
        if end <= max(row.starts_at, now):
            raise MarketError("invalid_request", "It must end after it begins and after now; cancel it to end it now.")
        _check_cap(row.node, cap)
        Curtailment.objects.filter(pk=row.pk, state__in=OPEN).update(cap_w=cap, ends_at=end)
        row.cap_w, row.ends_at = cap, end
        audit.record(
            actor, "curtailment.changed", row.public_id, now=now, organization_id=row.site.organization_id,
            before=before, after={"cap_w": str(cap), "ends_at": str(end)},
        )  # fmt: skip
        curtailment_notices.changed(row, now=now)
        _nudge(row)
    return True


def cancel(actor: Actor, row: Curtailment, *, now: datetime) -> None:
    """Before it begins: cancelled. While active: it ends now."""
    with transaction.atomic():
        to = "cancelled" if row.state == "announced" else "restoring"
        _move(row, to, now)
        audit.record(actor, f"curtailment.{to}", row.public_id, now=now, organization_id=row.site.organization_id)
        if to == "cancelled":
            curtailment_notices.over(row, now=now)
        _nudge(row)


_LIMIT = """
UPDATE marketplace_powernode n SET limit_w = w.limit_w, hashing_limit_w = w.hashing_w FROM (
  SELECT p.id, c.limit_w, h.hashing_w FROM marketplace_powernode p
    LEFT JOIN unnest(%s::bigint[], %s::bigint[]) c(id, limit_w) ON c.id = p.id
    LEFT JOIN unnest(%s::bigint[], %s::bigint[]) h(id, hashing_w) ON h.id = p.id
  WHERE p.site_id = %s) w
WHERE n.id = w.id AND (n.limit_w, n.hashing_limit_w) IS DISTINCT FROM (w.limit_w, w.hashing_w)
"""


@dataclass(frozen=True)
class Applied:
    """`active`: the site's calls that stand now; `changed`: whether a limit did."""

    active: list[Curtailment]
    changed: bool


def apply(site: Site, *, now: datetime) -> Applied:
    """Bring states and limits in line with the clock. The caller holds the site's lock."""
    standing = Curtailment.objects.filter(site=site, state__in=(*OPEN, "restoring")).select_related("site", "node")
    rows = list(standing.order_by("id"))
    for row in rows:
        if row.state == "announced" and row.starts_at <= now:
            _told(row, "active" if row.ends_at > now else "cancelled", now)
            if row.state == "active":
                curtailment_reports.begin(row)
            else:
                curtailment_notices.over(row, now=now)
    for row in rows:
        if row.state == "active" and row.ends_at <= now:
            _told(row, "restoring", now)
    active = [row for row in rows if row.state == "active"]
    wanted = limits_of(active), limits_of(active, mandatory=False)
    changed = prepared.count(_LIMIT, [*(list(part) for each in wanted for part in (each, each.values())), site.pk])
    if changed:
        Site.objects.filter(pk=site.pk).update(safety_generation=F("safety_generation") + 1)
    if active:
        curtailment_reports.watch(active, now=now)
    for row in rows:
        if row.state == "restoring":
            _settle(row, now)
    return Applied(active, bool(changed))


def limits_of(calls: Iterable[Curtailment], *, mandatory: bool = True) -> dict[int, int]:
    """W by node id under the calls of this kind; the least of several."""
    mine = [call for call in calls if call.mandatory == mandatory]
    return {call.node_id: call.cap_w for call in sorted(mine, key=lambda call: -call.cap_w)}


def _settle(row: Curtailment, now: datetime) -> None:
    """A call that has ended is over when the machines that were awake before it are awake again, or it has been long enough."""
    ended = row.over_at
    report = CurtailmentReport.objects.filter(curtailment=row).first()
    asleep = Miner.objects.filter(pk__in=report.before if report else (), desired_mode=0, state="ok", manual=False)
    back = not asleep.exists()
    if not back and now - ended < RESTORED and not _quiet(report, ended, now):
        return
    if report is None:
        _told(row, "completed", now)
        return
    restored_s = round((now - ended).total_seconds()) if back else None
    curtailment_reports.finish(report, row, restored_s=restored_s, now=now)
    failed = report.baseline_w > row.cap_w and report.under_after_s is None and row.mandatory
    _told(row, "failed" if failed else "completed", now)
    curtailment_notices.over(row, now=now)
    if row.origin_id is not None:
        outbox.emit(curtailment_reports.GRID_REPORT, key=str(row.pk), payload={"curtailment": row.pk})


def _quiet(report: CurtailmentReport | None, ended: datetime, now: datetime) -> bool:
    """None of its machines has changed for a while: what is still asleep has no watts, or hashing does not pay."""
    changed = Miner.objects.filter(pk__in=report.before if report else (), changed_at__gt=now - QUIET)
    return now - ended >= QUIET and not changed.exists()


def _check_cap(node: PowerNode, cap_w: int) -> None:
    if not 0 <= cap_w <= node.cap_w:
        raise MarketError(
            "invalid_request", f"cap_w is {cap_w}; the node carries 0 to {node.cap_w} W.", {"/cap_w": "out of range"}
        )


def _nudge(row: Curtailment) -> None:
    """The site's agent is handed its calls to come anew, and control's loop looks at once."""
    Site.objects.filter(pk=row.site_id).update(safety_generation=F("safety_generation") + 1)
    outbox.emit("scheduler.site_loop", key=str(row.site_id), payload={"site": row.site_id})


def _told(row: Curtailment, to: str, now: datetime) -> None:
    _move(row, to, now)
    audit.record(SYSTEM, f"curtailment.{to}", row.public_id, now=now, organization_id=row.site.organization_id)


def _move(row: Curtailment, to: str, now: datetime) -> None:
    assert connection.in_atomic_block
    if to not in Curtailment.TRANSITIONS[row.state]:
        raise MarketError("illegal_transition", f"The curtailment is {row.state}; it cannot become {to}.")
    columns: dict[str, Any] = {"settled_at": now if not Curtailment.TRANSITIONS[to] else None}
    if row.ended_at is None and to not in {"announced", "active"}:
        columns["ended_at"] = now
    moved = Curtailment.objects.filter(pk=row.pk, state=row.state).update(state=to, **columns)
    if not moved:  # somebody has moved it since `row` was read
        raise MarketError("illegal_transition", f"The curtailment is not {row.state} any more; look again.")
    row.state = to
    for name, value in columns.items():
        setattr(row, name, value)
