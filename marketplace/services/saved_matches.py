"""Which offers fit which saved searches, worked out from what has changed in the market and not from all that is kept.

`follow` reads which listings a change touched (the record that the catalogue itself lives on), finds the searches that name their GPU
models and regions through an index, or had matched them, and compares these alone. A match is a row as long as it lasts; a new one
leaves a notice in the outbox. One process follows at a time; a second finds the row locked and leaves.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

import numpy as np
from django.db import connection, transaction

from marketplace import outbox
from marketplace.errors import MarketError
from marketplace.models import Host, Listing, OutboxMessage, Resale, Reservation, SavedMatch, SavedMoment, SavedSearch
from marketplace.services import availability, catalogue, filters
from marketplace.services.catalogue import Moment
from marketplace.services.filters import Filters
from marketplace.services.offers import Mask, Offers
from marketplace.tenancy import Actor
from scheduler.core.claims import Ints

NOTICE: Final = "marketplace.saved_notice"
MOST_AT_FIRST = 1000  # offers that may fit a search when it is saved: beyond that a notice would say nothing
DAILY_AT_HOUR = 7  # UTC
SOME = 1000  # searches compared at once


@dataclass(frozen=True)
class Followed:
    """What one round did. `listings`: touched since the last (None: all); `compared`: searches looked at."""

    listings: int | None = 0
    compared: int = 0
    began: int = 0
    stopped: int = 0


class Fitting:
    """Which of some offers fit searches at `now`. Stock is worked out once for each window, level and kind that is asked for."""

    def __init__(self, offers: Offers, now: datetime) -> None:
        self.offers, self.now = offers, now
        self._stock: dict[tuple[str, str, datetime | None, datetime], Ints] = {}
        self._visible: dict[tuple[int, bool], Mask] = {}

    def of(self, organization_id: int, wanted: Filters, *, livemode: bool) -> set[int]:
        """Ids of the offers that a search of the organization would show."""
        offers = self.offers
        shown = self._visible_to(organization_id, livemode=livemode).copy()
        for _, mask in filters.conditions(offers, wanted, self.now):
            shown &= mask
        if shown.any() and (wanted.count is not None or wanted.start is not None):
            start, end = availability.window(wanted.start, wanted.end, self.now)
            asked = wanted.level, wanted.stock_kind, wanted.start and start, end
            if asked not in self._stock:
                free = offers.stock(now=self.now, level=asked[0], kind=asked[1], starts_at=start, ends_at=end)
                self._stock[asked] = free
                if wanted.start is None:
                    self._stock[asked] = np.maximum(free, offers.resold(now=self.now, level=wanted.level))
            shown &= self._stock[asked] >= np.maximum(wanted.count or 1, offers.listings["min_gpus"])
        return set(offers.listings["id"][shown].tolist())

    def _visible_to(self, organization_id: int, *, livemode: bool) -> Mask:
        key = organization_id, livemode
        if key not in self._visible:
            self._visible[key] = self.offers.visible(who(organization_id, livemode=livemode))
        return self._visible[key]


def who(organization_id: int, *, livemode: bool) -> Actor:
    """For whom a search looks: its organization."""
    return Actor(kind="user", organization_id=organization_id, livemode=livemode, label="saved search")


def still() -> None:
    """Until the running transaction ends nobody follows the market: a search that is being written misses no change. Before its
    row is locked.
    """
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1 FROM marketplace_savedmoment FOR SHARE")


def begin(row: SavedSearch, *, now: datetime) -> None:
    """What fits now is known to who saved it: it is not told."""
    wanted = filters.restored(row.filters)
    fits = Fitting(catalogue.read(), now).of(row.organization_id, wanted, livemode=row.organization.livemode)
    if len(fits) > MOST_AT_FIRST:
        raise MarketError(
            "invalid_request", f"{len(fits)} offers fit it now, and a notice of one more would say nothing: ask for more.",
            {"/filters": "fits too much"},
        )  # fmt: skip
    SavedMatch.objects.filter(search=row).delete()
    SavedMatch.objects.bulk_create(
        SavedMatch(search=row, listing_id=pk, found_at=now, told_at=now) for pk in sorted(fits)
    )


def follow(*, now: datetime) -> Followed | None:
    """Compare what has changed since the last round with the searches it could concern; None: somebody else is at it."""
    catalogue.read()  # kept by the process: inside a transaction that writes it would be read for this round alone
    with transaction.atomic():
        SavedMoment.objects.bulk_create([SavedMoment(pk=1, at=now)], ignore_conflicts=True)
        kept = SavedMoment.objects.select_for_update(skip_locked=True).first()
        if kept is None:
            return None
        before = Moment(*kept.moment) if kept.moment else None
        moment, changed = catalogue.since(before)
        touched = None if changed is None else _touched(*changed, since=kept.at, now=now)
        offers = catalogue.read()
        done = compare(offers, touched, now=now)
        kept.moment, kept.at = list(moment), now
        kept.save(update_fields=["moment", "at"])
    return done


def _touched(listings: Ints, hosts: Ints, *, since: datetime, now: datetime) -> set[int]:
    """Listings that a change could make fit, or stop fitting; also those whose capacity time itself has freed or opened."""
    found = set(listings.tolist())
    if len(hosts):
        of = Host.objects.filter(pk__in=hosts.tolist()).exclude(listing=None)
        found |= set(of.values_list("listing_id", flat=True).distinct())
        parts = Resale.objects.filter(state=Resale.State.OPEN, reservation__blocks__host__in=hosts.tolist())
        found |= set(parts.values_list("listing_id", flat=True))
    over = Reservation.objects.filter(state=Reservation.State.FIRM, ends_at__gt=since, ends_at__lte=now)
    # A search without a window asks about the hour ahead: what begins in it is gone from there.
    ahead = availability.NOW_WINDOW
    near = Reservation.objects.filter(
        state=Reservation.State.FIRM, claims_at__gt=since + ahead, claims_at__lte=now + ahead
    )
    for rows in (over, near):
        found |= set(rows.values_list("listing_id", flat=True).distinct())
    opened = Listing.objects.filter(state=Listing.State.PUBLISHED, available_from__gt=since, available_from__lte=now)
    return found | set(opened.values_list("pk", flat=True))


def compare(offers: Offers, touched: Collection[int] | None, *, now: datetime) -> Followed:
    """Matches of `touched` listings (None: of all) brought up to date; each search with new ones gets a notice to make."""
    if touched is None:
        active = SavedSearch.objects.filter(state=SavedSearch.State.ACTIVE)
        part, ids = offers, set(active.values_list("pk", flat=True))
    elif touched:
        part = offers.only(np.array(sorted(touched), np.int64))
        ids = _concerned(part, touched)
    else:
        return Followed()
    fitting, began, stopped = Fitting(part, now), 0, 0
    ordered = sorted(ids)
    for at in range(0, len(ordered), SOME):
        new, gone = _step(fitting, ordered[at : at + SOME], touched, now)
        began, stopped = began + new, stopped + gone
    return Followed(None if touched is None else len(touched), len(ids), began, stopped)


def _concerned(part: Offers, touched: Collection[int]) -> set[int]:
    """Ids of active searches that name a GPU model and a region of these offers, or matched one of the listings until now."""
    found = set(
        SavedMatch.objects.filter(listing_id__in=list(touched), search__state=SavedSearch.State.ACTIVE).values_list(
            "search_id", flat=True
        )
    )
    if len(part):
        models, regions = (
            [SavedSearch.ANY, *(part.names.text(code) for code in np.unique(part.listings[name]).tolist() if code > 0)]
            for name in ("gpu_model", "region")
        )
        active = SavedSearch.objects.filter(state=SavedSearch.State.ACTIVE)
        named = active.filter(gpu_models__overlap=models, regions__overlap=regions)
        found |= set(named.values_list("pk", flat=True))
    return found


def _step(fitting: Fitting, ids: Sequence[int], touched: Collection[int] | None, now: datetime) -> tuple[int, int]:
    rows = list(
        SavedSearch.objects.filter(pk__in=ids, state=SavedSearch.State.ACTIVE)
        .select_related("organization")
        .select_for_update(of=("self",), no_key=True)
        .order_by("pk")
    )
    matches = SavedMatch.objects.filter(search_id__in=[row.pk for row in rows])
    if touched is not None:
        matches = matches.filter(listing_id__in=list(touched))
    had: dict[int, dict[int, int]] = defaultdict(dict)
    for pk, search, listing in matches.values_list("pk", "search_id", "listing_id"):
        had[search][listing] = pk
    new: list[SavedMatch] = []
    gone: list[int] = []
    told: list[tuple[SavedSearch, datetime]] = []
    for row in rows:
        wanted = filters.restored(row.filters)
        fits = fitting.of(row.organization_id, wanted, livemode=row.organization.livemode)
        fresh = sorted(fits - had[row.pk].keys())
        new += [SavedMatch(search=row, listing_id=pk, found_at=now) for pk in fresh]
        gone += [pk for listing, pk in had[row.pk].items() if listing not in fits]
        if fresh:
            told.append((row, now))
    SavedMatch.objects.filter(pk__in=gone).delete()
    SavedMatch.objects.bulk_create(new, ignore_conflicts=True)
    ask(told, now)
    return len(new), len(gone)


def ask(rows: Iterable[tuple[SavedSearch, datetime]], now: datetime) -> None:
    """Leave a notice of each (search, when what it tells was found) in the running transaction, for when it is due; one that
    waits says it all.
    """
    messages = [
        OutboxMessage(topic=NOTICE, key=str(row.pk), payload={"search": row.pk}, available_at=max(now, due(row, found)))
        for row, found in rows
    ]
    if messages and OutboxMessage.objects.bulk_create(messages, ignore_conflicts=True):
        transaction.on_commit(lambda: outbox.nudge(NOTICE), robust=True)


def due(row: SavedSearch, found_at: datetime) -> datetime:
    """When what was found then may be told: not sooner than the search's pause after its last notice, or with the next digest."""
    earliest = found_at if row.told_at is None else max(found_at, row.told_at + timedelta(minutes=row.pause_minutes))
    if row.cadence == SavedSearch.Cadence.AT_ONCE:
        return earliest
    digest = earliest.replace(hour=DAILY_AT_HOUR, minute=0, second=0, microsecond=0)
    return digest if digest >= earliest else digest + timedelta(days=1)
