"""Calendars of maintenance for calendar programs (RFC 5545), each read at a secret address that can be revoked."""

from collections.abc import Iterable
from datetime import datetime

from django.conf import settings
from django.db import transaction

from marketplace.errors import MarketError
from marketplace.models import CalendarFeed, Maintenance, MaintenanceNotice
from marketplace.services import audit, drains, tokens
from marketplace.services.maintenance.notices import concerned_of
from marketplace.tenancy import Actor

MOST = 20  # feeds of an organization
SHOWN = 500  # events of a feed, the newest


def issue(actor: Actor, name: str, *, now: datetime) -> tuple[CalendarFeed, str]:
    """(feed, token): the token is shown once, and whoever has it reads the calendar."""
    if actor.organization_id is None:
        raise MarketError("organization_required", "A calendar is of an organization.")
    with transaction.atomic():
        live = CalendarFeed.objects.owned_by(actor.organization_id).filter(revoked_at=None)
        if live.count() >= MOST:
            raise MarketError("limit_exceeded", f"There are {MOST} calendar feeds; revoke one first.")
        token = tokens.new("tr_cal_")
        row = CalendarFeed.objects.create(
            organization_id=actor.organization_id, name=name, digest=tokens.digest(token), created_by=actor.label[:120],
            created_at=now,
        )  # fmt: skip
        audit.record(actor, "calendar_feed.issued", row.public_id, now=now)
    return row, token


def revoke(actor: Actor, row: CalendarFeed, *, now: datetime) -> None:
    """From now on its address answers nothing. Twice is no error."""
    with transaction.atomic():
        if CalendarFeed.objects.filter(pk=row.pk, revoked_at=None).update(revoked_at=now):
            audit.record(actor, "calendar_feed.revoked", row.public_id, now=now, organization_id=row.organization_id)


def address(token: str) -> str:
    return f"{settings.PUBLIC_URL}/calendar/{token}.ics"


def read(token: str, *, now: datetime) -> str | None:
    """The calendar behind a token; None where there is none, or none any more."""
    row = CalendarFeed.objects.filter(digest=tokens.digest(token), revoked_at=None).first()
    if row is None:
        return None
    CalendarFeed.objects.filter(pk=row.pk).update(last_used_at=now)
    told = (
        concerned_of(row.organization_id)
        .order_by("-maintenance__starts_at", "-pk")
        .select_related("maintenance__site", "contract")
    )
    return calendar(told[:SHOWN], now)


def calendar(notices: Iterable[MaintenanceNotice], now: datetime) -> str:
    """One event for each maintenance, with the contracts that it touches."""
    by_row: dict[Maintenance, list[str]] = {}
    for notice in notices:
        row = notice.maintenance
        if notice.what != MaintenanceNotice.What.CANCELLED or row.state == Maintenance.State.CANCELLED:
            by_row.setdefault(row, []).append(notice.contract.public_id)
    lines = [
        "BEGIN:VCALENDAR",
        "VERSION:2.0",
        "PRODID:-//Tailrace//Maintenance//EN",
        "X-WR-CALNAME:Tailrace maintenance",
    ]
    for row, contracts in by_row.items():
        about = "\n".join(filter(None, [row.text, row.impact, f"Contracts: {', '.join(sorted(contracts))}"]))
        lines += [
            "BEGIN:VEVENT",
            f"UID:{row.public_id}@tailrace",
            f"DTSTAMP:{now:%Y%m%dT%H%M%SZ}",
            f"SEQUENCE:{row.version}",
            f"DTSTART:{row.starts_at:%Y%m%dT%H%M%SZ}",
            f"DTEND:{row.ends_at:%Y%m%dT%H%M%SZ}",
            f"STATUS:{'CANCELLED' if row.state == Maintenance.State.CANCELLED else 'CONFIRMED'}",
            f"SUMMARY:{_text(f'{row.site.name}: {drains.CATEGORIES[row.category]}')}",
            f"DESCRIPTION:{_text(about)}",
            f"URL:{settings.PUBLIC_URL}/maintenance/{row.public_id}",
            "END:VEVENT",
        ]
    return "".join(f"{_folded(line)}\r\n" for line in [*lines, "END:VCALENDAR"])


def _text(text: str) -> str:
    """A value of type TEXT (RFC 5545, 3.3.11)."""
    plain = text.replace("\\", "\\\\").replace(";", "\\;").replace(",", "\\,").replace("\r\n", "\n").replace("\r", "\n")
    return plain.replace("\n", "\\n")


def _folded(line: str) -> str:
    """Lines of at most 75 octets, the rest on further ones that begin with a space; no character is torn (RFC 5545, 3.1)."""
    out, room = "", 75
    for character in line:
        size = len(character.encode())
        if size > room:
            out, room = f"{out}\r\n ", 74
        out, room = out + character, room - size
    return out
