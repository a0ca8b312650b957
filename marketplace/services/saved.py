"""Saved searches: kept filters that tell when something fits them. The only writer of SavedSearch.

`services.saved_matches` finds what fits, `services.saved_notices` tells it.
"""

from collections.abc import Collection
from datetime import datetime, timedelta
from typing import Any, Final

from django.conf import settings
from django.core import signing
from django.db import transaction
from django.db.models import QuerySet

from marketplace.errors import MarketError
from marketplace.locks import Lock, acquire
from marketplace.models import OutboxMessage, SavedMatch, SavedSearch
from marketplace.services import audit, filters, saved_matches
from marketplace.services.filters import Filters
from marketplace.services.search import SORTS, on_offer
from marketplace.tenancy import SYSTEM, Actor

IDLE_NOTICE: Final = "marketplace.saved_idle"
WARNED_AHEAD = timedelta(days=7)
MAX_PAUSE_MINUTES = 30 * 1440
BATCH = 500
ACTIONS: Final = {
    "active": ("change", "delete", "pause"),
    "paused": ("change", "delete", "resume"),
    "expired": ("delete", "resume"),
}
_SALT: Final = "saved-search-unsubscribe"
_EDITABLE: Final = ("name", "cadence", "pause_minutes")


def save(
    actor: Actor, name: str, wanted: Filters, *, sort: str = "price", cadence: str = SavedSearch.Cadence.AT_ONCE,
    pause_minutes: int = 60, now: datetime,
) -> SavedSearch:  # fmt: skip
    """Keep a search. What fits it now is known to who saves it; each offer that fits later is told.

    MarketError: organization_required, invalid_request (a field; a search that fits too much to be worth a notice),
    limit_exceeded.
    """
    if actor.organization_id is None:
        raise MarketError("organization_required", "Searches are kept for an organization.")
    row = SavedSearch(
        organization_id=actor.organization_id, created_by_id=actor.user_id, created_at=now, touched_at=now, sort=sort
    )
    _set(row, {"name": name, "cadence": cadence, "pause_minutes": pause_minutes})
    _set_filters(row, wanted, now)
    if sort not in SORTS:
        raise MarketError("invalid_request", f"sort is {sort}", {"/sort": f"one of {', '.join(SORTS)}"})
    with transaction.atomic():
        acquire((Lock.ORG, actor.organization_id))
        mine = SavedSearch.objects.filter(organization_id=actor.organization_id).count()
        if mine >= settings.SAVED_SEARCHES:
            raise MarketError(
                "limit_exceeded", f"{mine} searches are kept, as many as an organization may; delete one first.",
                extra={"limit": "saved_searches", "allowed": settings.SAVED_SEARCHES},
            )  # fmt: skip
        saved_matches.still()
        row.save()
        saved_matches.begin(row, now=now)
        audit.record(
            actor, "saved_search.created", row.public_id, now=now, after={"name": name, "filters": row.filters}
        )
    return row


def change(
    actor: Actor, search_id: int, fields: dict[str, Any], *, wanted: Filters | None = None, now: datetime
) -> SavedSearch:
    """Another name, cadence, pause, or other filters: then what fits these now is known, too."""
    unknown = set(fields) - {*_EDITABLE, "sort"}
    if unknown:
        raise MarketError("unknown_field", ", ".join(sorted(unknown)), {f"/{u}": "unknown field" for u in unknown})
    with transaction.atomic():
        saved_matches.still()
        row = _locked(actor, search_id)
        _set(row, fields)
        if fields.get("sort", row.sort) not in SORTS:
            raise MarketError("invalid_request", f"sort is {fields['sort']}", {"/sort": f"one of {', '.join(SORTS)}"})
        row.sort = fields.get("sort", row.sort)
        if wanted is not None:
            _set_filters(row, wanted, now)
        row.touched_at, row.warned_at = now, None
        row.save()
        if wanted is not None and row.state == SavedSearch.State.ACTIVE:
            saved_matches.begin(row, now=now)
        audit.record(actor, "saved_search.changed", row.public_id, now=now, after={**fields, "filters": row.filters})
    return row


def pause(actor: Actor, search_id: int, *, now: datetime, why: str = "paused") -> SavedSearch:
    """Nothing is looked for until it is resumed."""
    with transaction.atomic():
        row = _locked(actor, search_id)
        _move(actor, row, SavedSearch.State.PAUSED, now, why)
        SavedMatch.objects.filter(search=row).delete()
    return row


def resume(actor: Actor, search_id: int, *, now: datetime) -> SavedSearch:
    """Look again. What fits now is known; what begins to fit from now on is told."""
    with transaction.atomic():
        saved_matches.still()
        row = _locked(actor, search_id)
        if row.window_ends is not None and row.window_ends <= now:
            raise MarketError("illegal_transition", "Its window is over; save it with another one.")
        _move(actor, row, SavedSearch.State.ACTIVE, now, "resumed", touched_at=now, warned_at=None)
        saved_matches.begin(row, now=now)
    return row


def delete(actor: Actor, search_id: int, *, now: datetime) -> None:
    with transaction.atomic():
        row = _locked(actor, search_id)
        audit.record(actor, "saved_search.deleted", row.public_id, now=now, before={"name": row.name})
        row.delete()


def touch(row: SavedSearch, *, now: datetime) -> None:
    """Somebody looked at it: it is of use."""
    SavedSearch.objects.filter(pk=row.pk, state=SavedSearch.State.ACTIVE).update(touched_at=now, warned_at=None)


def shown_matches(actor: Actor, row: SavedSearch) -> QuerySet[SavedMatch]:
    """Its matches that the actor may see now; the listing comes with each."""
    seen = on_offer(actor).values("pk")
    return SavedMatch.objects.filter(search=row, listing__in=seen).select_related("listing")


def actions(row: SavedSearch) -> list[str]:
    return list(ACTIONS[row.state])


# --- leaving, from the mail, without logging in
def unsubscribe_token(row: SavedSearch) -> str:
    """Good for this search alone, as long as it is kept."""
    return signing.dumps([row.pk, int(row.created_at.timestamp())], salt=_SALT)


def unsubscribe(token: str, *, now: datetime) -> SavedSearch | None:
    """Pause the search that the token was made for; again is no error. None: the search is gone. MarketError("not_found"):
    the token is not one of ours.
    """
    row = of_token(token)
    if row is not None and row.state == SavedSearch.State.ACTIVE:
        row = pause(SYSTEM, row.pk, now=now, why="unsubscribed")
    return row


def of_token(token: str) -> SavedSearch | None:
    try:
        pk, made = signing.loads(token, salt=_SALT)
    except (signing.BadSignature, ValueError, TypeError) as error:
        raise MarketError("not_found", "The link is not whole. Copy all of it from the mail.") from error
    row: SavedSearch | None = SavedSearch.objects.filter(pk=pk).first()
    return row if row is not None and int(row.created_at.timestamp()) == made else None


# --- what happens because time passes
def clock(now: datetime) -> int:
    """Searches nobody has looked at for long are told that they will expire, then expire; so do those whose window is over."""
    idle = timedelta(days=settings.SAVED_SEARCH_IDLE_DAYS)
    active = SavedSearch.objects.filter(state=SavedSearch.State.ACTIVE)
    silent = active.filter(warned_at=None, touched_at__lte=now - idle + WARNED_AHEAD).order_by("pk")
    for pk in silent.values_list("pk", flat=True)[:BATCH]:
        with transaction.atomic():
            if active.filter(pk=pk, warned_at=None).update(warned_at=now):
                _leave(IDLE_NOTICE, pk, now)
    expired = 0
    over = active.filter(window_ends__lte=now).order_by("pk")
    idle_long = active.filter(touched_at__lte=now - idle, warned_at__lte=now - WARNED_AHEAD).order_by("pk")
    for rows, why in ((over, "its window is over"), (idle_long, "nobody has looked at it")):
        for pk in rows.values_list("pk", flat=True)[:BATCH]:
            with transaction.atomic():
                row = active.select_for_update(no_key=True).filter(pk=pk).first()
                if row is not None and rows.filter(pk=pk).exists():
                    _move(SYSTEM, row, SavedSearch.State.EXPIRED, now, why)
                    SavedMatch.objects.filter(search=row).delete()
                    expired += 1
    return expired


def _leave(topic: str, pk: int, now: datetime) -> None:
    message = OutboxMessage(topic=topic, key=str(pk), payload={"search": pk}, available_at=now)
    OutboxMessage.objects.bulk_create([message], ignore_conflicts=True)


def _locked(actor: Actor, search_id: int) -> SavedSearch:
    rows = SavedSearch.objects.visible_to(actor).select_for_update(of=("self",), no_key=True)
    row: SavedSearch | None = rows.select_related("organization").filter(pk=search_id).first()
    if row is None:
        raise MarketError("not_found", "There is no such saved search.")
    return row


def _move(actor: Actor, row: SavedSearch, to: str, now: datetime, why: str, **columns: Any) -> None:
    expected = [state for state, after in SavedSearch.TRANSITIONS.items() if to in after]
    moved = SavedSearch.objects.filter(pk=row.pk, state__in=expected).update(state=to, **columns)
    if not moved:
        raise MarketError("illegal_transition", f"The search is {row.state}.")
    audit.record(
        actor, f"saved_search.{to}", row.public_id, now=now, organization_id=row.organization_id,
        before={"state": row.state}, after={"state": to, "why": why},
    )  # fmt: skip
    row.refresh_from_db()


def _set(row: SavedSearch, fields: dict[str, Any]) -> None:
    wrong: dict[str, str] = {}
    if "name" in fields and not fields["name"].strip():
        wrong["/name"] = "give it a name"
    if fields.get("cadence", row.cadence) not in SavedSearch.Cadence.values:
        wrong["/cadence"] = f"one of {', '.join(SavedSearch.Cadence.values)}"
    if not 0 <= fields.get("pause_minutes", row.pause_minutes) <= MAX_PAUSE_MINUTES:
        wrong["/pause_minutes"] = f"0 to {MAX_PAUSE_MINUTES}"
    if wrong:
        raise MarketError("invalid_request", "; ".join(f"{k}: {v}" for k, v in wrong.items()), wrong)
    for name in set(_EDITABLE) & set(fields):
        setattr(row, name, fields[name].strip() if name == "name" else fields[name])


def _set_filters(row: SavedSearch, wanted: Filters, now: datetime) -> None:
    if wanted.end is not None and wanted.end <= now:
        raise MarketError("invalid_request", "The window is over.", {"/end": "is in the past"})
    row.filters = filters.stored(wanted)
    row.gpu_models = named(wanted.gpu_model)
    row.regions = named(wanted.region)
    row.window_ends = wanted.end


def named(texts: Collection[str]) -> list[str]:
    return sorted(set(texts)) or [SavedSearch.ANY]
