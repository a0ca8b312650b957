"""What an operator does: drafts, looks at what it would mean, announces, changes, extends, finishes early, cancels.

Notice: NOTICE_DUE before the start where a firm contract (reserved, flexible) is touched. Less only as an emergency with its
reason: that time counts against the operator, and reserved time which it takes is not charged. An extension's own seconds need the
same notice. Each step holds the cell's lock: a contract is signed before it, and counted, or after it, and knows.
"""

from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from typing import Any

from django.db import transaction

from marketplace.errors import MarketError
from marketplace.locks import Lock, acquire
from marketplace.models import (
    Contract,
    Curtailment,
    Host,
    Maintenance,
    MaintenanceHost,
    MaintenanceNotice,
    PowerNode,
    Site,
)
from marketplace.services import audit, curtailments, terms
from marketplace.services.maintenance import notices, planning, taking
from marketplace.services.maintenance.planning import Impact
from marketplace.tenancy import Actor

NOTICE_DUE = timedelta(days=terms.MAINTENANCE_NOTICE_DAYS)
LONGEST = timedelta(days=31)
TEXTS = ("text", "impact", "category")
FIELDS = frozenset({*TEXTS, "starts_at", "ends_at", "emergency", "emergency_reason", "cap_w"})
State, Scope, What = Maintenance.State, Maintenance.Scope, MaintenanceNotice.What


def draft(
    actor: Actor, site: Site, *, scope: str, starts_at: datetime, ends_at: datetime, text: str, now: datetime,
    node: PowerNode | None = None, domain: str = "", hosts: Collection[Host] = (), **fields: Any,
) -> Maintenance:  # fmt: skip
    """Nobody sees it but the operator. `fields`: more of FIELDS. MarketError("invalid_request") names what is wrong."""
    _own(actor, site.organization_id)
    row = Maintenance(
        site=site, scope=scope, node=node, domain=domain, starts_at=starts_at, ends_at=ends_at, text=text,
        created_by=actor.label[:120], created_at=now, **fields,
    )  # fmt: skip
    _check_scope(row, hosts)
    _check(row)
    _check_start(row, now)
    with transaction.atomic():
        row.save()
        MaintenanceHost.objects.bulk_create(
            MaintenanceHost(maintenance=row, host=host) for host in sorted(hosts, key=lambda host: host.pk)
        )
        _audit(actor, row, "drafted", now)
    return row


def dry_run(actor: Actor, row: Maintenance, *, now: datetime) -> Impact:
    """What announcing it now would mean: announced, looked at, and undone. Of what is announced: what it means."""
    _own(actor, row.site.organization_id)
    with transaction.atomic():
        fresh = locked(row)
        if fresh.state in Maintenance.LIVE:
            return planning.impact(fresh, now=now)
        found = planning.take_room(fresh, now=now)
        transaction.set_rollback(True)
    return found


def announce(actor: Actor, row: Maintenance, *, now: datetime) -> Maintenance:
    """From now on no claim is admitted over it, those touched are told, and it happens by itself.

    MarketError: illegal_transition, invalid_request (the window has begun), notice_too_short (with what it touches).
    """
    _own(actor, row.site.organization_id)
    with transaction.atomic():
        fresh = locked(row)
        if fresh.state != State.DRAFT:
            raise MarketError("illegal_transition", f"{fresh.public_id} is {fresh.state}; a draft is announced.")
        _check(fresh)
        _check_start(fresh, now)
        found = planning.take_room(fresh, now=now)
        _check_notice(fresh, found.firm, fresh.starts_at, now)
        move(fresh, State.ANNOUNCED, announced_at=now, noticed_until=None if fresh.emergency else fresh.ends_at)
        _cap(actor, fresh, fresh.starts_at, now)
        notices.tell(fresh, found, What.ANNOUNCED, now=now)
        _audit(actor, fresh, "announced", now, touched=len(found.touched), short=found.short)
    return fresh


def change(
    actor: Actor, row: Maintenance, *, now: datetime, expected_version: int | None = None, **fields: Any
) -> Maintenance:
    """Words and window of what has not begun to take hosts; those touched are told again. `fields`: some of FIELDS.

    A window inside the announced one needs no new notice; any other is announced anew. MarketError as `announce`, and conflict where
    somebody was faster.
    """
    _own(actor, row.site.organization_id)
    assert fields.keys() <= FIELDS, fields
    with transaction.atomic():
        fresh = locked(row)
        if expected_version is not None and fresh.version != expected_version:
            raise MarketError("conflict", f"{fresh.public_id} is at version {fresh.version}, not {expected_version}.")
        begun = fresh.state == State.IN_PROGRESS or _taken(fresh)
        if not Maintenance.TRANSITIONS[fresh.state] or (begun and not fields.keys() <= {*TEXTS}):
            done = "begun; extend it or finish it early" if begun else "over"
            raise MarketError("illegal_transition", f"{fresh.public_id} is {done}.")
        was = (fresh.starts_at, fresh.ends_at)
        for name, value in fields.items():
            setattr(fresh, name, value)
        _check(fresh)
        if not begun:
            _check_start(fresh, now)
        fresh.version += 1
        fresh.save()
        if fresh.state in Maintenance.LIVE:
            _announce_again(actor, fresh, was, now)
        _audit(actor, fresh, "changed", now, fields=sorted(fields))
    return fresh


def _announce_again(actor: Actor, row: Maintenance, was: tuple[datetime, datetime], now: datetime) -> None:
    if (row.starts_at, row.ends_at) == was:
        found = planning.impact(row, now=now)
    else:
        planning.give_room(row)
        found = planning.take_room(row, now=now)
        if was[0] <= row.starts_at and row.ends_at <= was[1]:
            row.noticed_until = min(row.noticed_until, row.ends_at) if row.noticed_until else None
        else:
            _check_notice(row, found.firm, row.starts_at, now)
            row.noticed_until = None if row.emergency else row.ends_at
        row.save(update_fields=["noticed_until"])
        _uncap(actor, row, now)
        _cap(actor, row, row.starts_at, now)
    notices.tell(row, found, What.CHANGED, now=now)


def extend(actor: Actor, row: Maintenance, ends_at: datetime, *, now: datetime, reason: str = "") -> Maintenance:
    """A later end. `reason`: why so late, where firm contracts are touched and the added time has no due notice."""
    _own(actor, row.site.organization_id)
    with transaction.atomic():
        fresh = locked(row)
        if fresh.state not in Maintenance.LIVE:
            raise MarketError("illegal_transition", f"{fresh.public_id} is {fresh.state}; only live work is extended.")
        was = fresh.ends_at
        if ends_at <= max(was, now):
            raise MarketError(
                "invalid_request", f"It ends at {was:%F %R} UTC; extend it beyond that.", {"/ends_at": "not later"}
            )
        fresh.ends_at, fresh.version = ends_at, fresh.version + 1
        _check_window(fresh)
        fresh.save(update_fields=["ends_at", "version"])
        planning.lengthen(fresh, was, now=now)
        found = planning.impact(fresh, now=now)
        firm = planning.contracts_of(planning.held_there(fresh, was, ends_at))
        if was - now >= NOTICE_DUE or not firm:
            fresh.noticed_until = ends_at if fresh.noticed_until == was else fresh.noticed_until
        elif reason:
            fresh.emergency_reason = " ".join(filter(None, [fresh.emergency_reason, reason]))[:500]
        else:
            _check_notice(fresh, firm, was, now, field="/reason")
        fresh.save(update_fields=["noticed_until", "emergency_reason"])
        taking.lengthen(fresh, now=now)
        _cap(actor, fresh, was, now)
        notices.tell(fresh, found, What.CHANGED, now=now)
        _audit(actor, fresh, "extended", now, was=was.isoformat(), short=found.short)
    return fresh


def finish(actor: Actor, row: Maintenance, *, now: datetime) -> Maintenance:
    """Over before its end: its hosts are back at work now."""
    _own(actor, row.site.organization_id)
    with transaction.atomic():
        fresh = locked(row)
        if fresh.state != State.IN_PROGRESS:
            raise MarketError("illegal_transition", f"{fresh.public_id} is {fresh.state}; what has begun is finished.")
        _end(actor, fresh, State.COMPLETED, What.FINISHED, now)
        _audit(actor, fresh, "finished", now)
    return fresh


def cancel(actor: Actor, row: Maintenance, *, now: datetime) -> Maintenance:
    """It does not happen. Hosts that it has begun to empty are back at work."""
    _own(actor, row.site.organization_id)
    with transaction.atomic():
        fresh = locked(row)
        if fresh.state not in {State.DRAFT, State.ANNOUNCED}:
            raise MarketError("illegal_transition", f"{fresh.public_id} is {fresh.state}; finish it early instead.")
        _end(actor, fresh, State.CANCELLED, What.CANCELLED, now)
        _audit(actor, fresh, "cancelled", now)
    return fresh


def _end(actor: Actor, row: Maintenance, to: str, what: str, now: datetime) -> None:
    taking.give_back(row, now=now)
    planning.give_room(row)
    _uncap(actor, row, now)
    move(row, to, settled_at=now, version=row.version + 1)
    notices.tell_all(row, what, now=now)


def actions(row: Maintenance, actor: Actor) -> list[str]:
    """What its operator may do now."""
    if actor.organization_id != row.site.organization_id:
        return []
    return {
        "draft": ["announce", "cancel", "update"],
        "announced": ["cancel", "extend", "update"],
        "in_progress": ["extend", "finish", "update"],
    }.get(row.state, [])


# --- rules
def _own(actor: Actor, organization_id: int) -> None:
    if actor.kind != "system" and actor.organization_id != organization_id:
        raise MarketError("forbidden", "Only a site's operator plans work there.")


def _check(row: Maintenance) -> None:
    _check_window(row)
    if row.emergency and not row.emergency_reason:
        raise MarketError(
            "invalid_request",
            "Customers read why it cannot wait.",
            {"/emergency_reason": "an emergency needs a reason"},
        )
    if row.cap_w is None:
        return
    if row.category != Maintenance.Category.POWER or row.scope not in {Scope.SITE, Scope.NODE}:
        raise MarketError(
            "invalid_request",
            "Only work on the power of a site or node caps its watts.",
            {"/cap_w": "power of a site or node"},
        )
    node = _node(row)
    if not 0 <= row.cap_w <= node.cap_w:
        raise MarketError(
            "invalid_request",
            f"cap_w is {row.cap_w}; {node.name} carries 0 to {node.cap_w} W.",
            {"/cap_w": "out of range"},
        )


def _check_start(row: Maintenance, now: datetime) -> None:
    """What cannot wait may begin in the running minute."""
    soonest = now - timedelta(minutes=1) if row.emergency else now
    if row.starts_at < soonest:
        raise MarketError(
            "invalid_request",
            f"It would begin at {row.starts_at:%F %R} UTC, which is past.",
            {"/starts_at": "in the past"},
        )


def _check_window(row: Maintenance) -> None:
    wrong: dict[str, str] = {}
    for name, at in (("/starts_at", row.starts_at), ("/ends_at", row.ends_at)):
        if at.second or at.microsecond:
            wrong[name] = "to the minute"
    if row.ends_at <= row.starts_at:
        wrong["/ends_at"] = "after the start"
    elif row.ends_at - row.starts_at > LONGEST:
        wrong["/ends_at"] = (
            f"at most {LONGEST.days} days after the start; plan longer work in parts, or drain the hosts"
        )
    if wrong:
        raise MarketError("invalid_request", "; ".join(f"{k}: {v}" for k, v in wrong.items()), wrong)


def _check_scope(row: Maintenance, hosts: Collection[Host]) -> None:
    wrong: dict[str, str] = {}
    if (row.node is not None) != (row.scope == Scope.NODE) or (row.node and row.node.site_id != row.site_id):
        wrong["/node"] = "a power node of the site, with scope node alone"
    if bool(row.domain) != (row.scope == Scope.DOMAIN):
        wrong["/domain"] = "a leaf (rack) of the site, with scope domain alone"
    elif row.domain and not Host.objects.filter(site=row.site_id, leaf=row.domain).exists():
        wrong["/domain"] = f"no host of {row.site.name} stands in {row.domain}"
    if bool(hosts) != (row.scope == Scope.HOSTS) or any(host.site_id != row.site_id for host in hosts):
        wrong["/hosts"] = "hosts of the site, with scope hosts alone"
    if wrong:
        raise MarketError("invalid_request", "; ".join(f"{k}: {v}" for k, v in wrong.items()), wrong)


def _check_notice(
    row: Maintenance, firm: Sequence[Contract], begins: datetime, now: datetime, *, field: str = "/emergency"
) -> None:
    """A week where a firm contract is touched, or an emergency."""
    if row.emergency or not firm or begins - now >= NOTICE_DUE:
        return
    raise MarketError(
        "notice_too_short",
        f"{len(firm)} firm contract(s) would be touched from {begins:%F %R} UTC on; the earliest is {now + NOTICE_DUE:%F %R} UTC.",
        {field: "what cannot wait is an emergency, with its reason"},
        {"earliest": now + NOTICE_DUE, "contracts": [contract.public_id for contract in firm]},
    )


def _taken(row: Maintenance) -> bool:
    return row.hosts.filter(taken_at__isnull=False).exists()


def locked(row: Maintenance) -> Maintenance:
    """The row as it stands, under the locks of its cell and site."""
    acquire((Lock.CELL, row.site.cell_id), (Lock.SITE, row.site_id))
    rows = Maintenance.objects.select_for_update(no_key=True, of=("self",)).select_related("site", "node")
    found: Maintenance = rows.get(pk=row.pk)
    return found


def move(row: Maintenance, to: str, **columns: Any) -> None:
    """The guarded update of its state."""
    assert to in Maintenance.TRANSITIONS[row.state], (row.state, to)
    moved = Maintenance.objects.filter(pk=row.pk, state=row.state).update(state=to, **columns)
    assert moved == 1, "it is locked"
    row.state = to
    for name, value in columns.items():
        setattr(row, name, value)


# --- work on power: the node's cap in the window is a curtailment of its own
def _node(row: Maintenance) -> PowerNode:
    return row.node or PowerNode.objects.get(site=row.site_id, parent=None)


def _cap(actor: Actor, row: Maintenance, starts_at: datetime, now: datetime) -> None:
    if row.cap_w is not None:
        curtailments.announce(
            actor, _node(row), cap_w=row.cap_w, starts_at=starts_at, ends_at=row.ends_at, source="maintenance",
            reference=f"{row.public_id}/{row.version}", now=now,
        )  # fmt: skip


def _uncap(actor: Actor, row: Maintenance, now: datetime) -> None:
    calls = Curtailment.objects.filter(
        site=row.site_id,
        source="maintenance",
        reference__startswith=f"{row.public_id}/",
        state__in=("announced", "active"),
    )
    for call in calls:
        curtailments.cancel(actor, call, now=now)


def _audit(actor: Actor, row: Maintenance, verb: str, now: datetime, **after: Any) -> None:
    audit.record(
        actor, f"maintenance.{verb}", row.public_id, now=now, organization_id=row.site.organization_id,
        after={"state": row.state, "starts_at": row.starts_at.isoformat(), "ends_at": row.ends_at.isoformat(), **after},
    )  # fmt: skip
