"""What a saved search has found is told: once, by mail and in the organization's record, to who may see it at that moment."""

from dataclasses import replace
from datetime import datetime
from typing import Final

import numpy as np
from django.conf import settings
from django.db import transaction

from marketplace import outbox
from marketplace.models import Listing, Membership, SavedMatch, SavedSearch
from marketplace.services import audit, catalogue, filters, mails, saved, saved_matches, search
from marketplace.services.mails import Letter
from marketplace.services.saved_matches import Fitting, who
from marketplace.tenancy import SYSTEM

MAIL: Final = "marketplace.saved_mail"
SHOWN = 10  # offers that one mail names; it says how many more there are


def tell(search_id: int, *, now: datetime) -> int:
    """Offers that wait to be told and still fit are told; the others are forgotten. Returns how many.

    What is due later waits in the outbox. Two at once: the second finds nothing left.
    """
    with transaction.atomic():
        row = _locked(search_id)
        if row is None or row.state != SavedSearch.State.ACTIVE:
            return 0
        rows = SavedMatch.objects.filter(search=row, told_at=None).values_list("listing_id", "pk", "found_at")
        waiting = {listing: pk for listing, pk, _ in rows}
        if not waiting:
            return 0
        found_at = min(found for *_, found in rows)
        if saved_matches.due(row, found_at) > now:
            saved_matches.ask([(row, found_at)], now)
            return 0
        fits = _fits(row, list(waiting), now)
        SavedMatch.objects.filter(pk__in=[pk for listing, pk in waiting.items() if listing not in fits]).delete()
        fresh = [waiting[listing] for listing in sorted(fits)]
        told = SavedMatch.objects.filter(pk__in=fresh, told_at=None).update(told_at=now)
        if not told:
            return 0
        SavedSearch.objects.filter(pk=row.pk).update(told_at=now)
        names = [Listing(pk=pk).public_id for pk in sorted(fits)]
        audit.record(
            SYSTEM, "saved_search.matched", row.public_id, now=now, organization_id=row.organization_id,
            after={"name": row.name, "listings": names[:100], "count": len(names)},
        )  # fmt: skip
        outbox.emit(MAIL, payload={"search": row.pk, "listings": sorted(fits)})
    return told


def _locked(search_id: int) -> SavedSearch | None:
    rows = SavedSearch.objects.select_related("organization").select_for_update(of=("self",), no_key=True)
    row: SavedSearch | None = rows.filter(pk=search_id).first()
    return row


def _fits(row: SavedSearch, listings: list[int], now: datetime) -> set[int]:
    """Which of the listings a search would show the organization now."""
    offers = catalogue.read().only(np.array(sorted(listings), np.int64))
    wanted = filters.restored(row.filters)
    return Fitting(offers, now).of(row.organization_id, wanted, livemode=row.organization.livemode)


def mail(search_id: int, listings: list[int], *, now: datetime) -> bool:
    """The mail itself, of what may be seen and fits still; False: nobody to send it to, or nothing to say. Twice is no harm."""
    row = SavedSearch.objects.select_related("organization", "created_by").filter(pk=search_id).first()
    if row is None or row.state != SavedSearch.State.ACTIVE:
        return False
    actor = who(row.organization_id, livemode=row.organization.livemode)
    fits = _fits(row, listings, now)
    seen = search.on_offer(actor).select_related("site", "gpu_model").filter(pk__in=fits).order_by("pk")
    shown = list(seen)
    if not shown:
        return False
    many = f"{len(shown)} offers fit" if len(shown) > 1 else "An offer fits"
    more = (f"And {len(shown) - SHOWN} more.",) if len(shown) > SHOWN else ()
    facts = tuple((each.title, _where(each)) for each in shown[:SHOWN])
    paragraphs = (f"{many} your search {row.name}.", *more)
    return _send(row, Letter(f"{many} {row.name}", paragraphs, facts, label="See what fits"))


def warn(search_id: int) -> bool:
    """The mail that a search will expire, unless somebody looks at it."""
    row = SavedSearch.objects.select_related("organization", "created_by").filter(pk=search_id).first()
    if row is None or row.state != SavedSearch.State.ACTIVE or row.warned_at is None:
        return False
    last = row.warned_at + saved.WARNED_AHEAD
    text = f"Nobody has looked at your search {row.name} for long. It stops on {last:%-d %b %Y}. To keep it, open it."
    return _send(row, Letter(f"{row.name} stops soon", (text,), label="Keep the search"))


def _where(row: Listing) -> str:
    model = row.gpu_model.name if row.gpu_model else "mixed GPUs"
    return f"{model}, {row.site.region}: {settings.PUBLIC_URL}/listings/{row.public_id}"


def _send(row: SavedSearch, letter: Letter) -> bool:
    leave = f"{settings.PUBLIC_URL}/searches/unsubscribe/{saved.unsubscribe_token(row)}"
    why = f"You get this because the search {row.name} is kept for your organization. No more of these: {leave}"
    headers = {"List-Unsubscribe": f"<{leave}>", "List-Unsubscribe-Post": "List-Unsubscribe=One-Click"}
    return mails.send(_addresses(row), replace(letter, path=f"/searches/{row.public_id}", why=why), headers=headers) > 0


def _addresses(row: SavedSearch) -> list[str]:
    """Who saved it, while they belong to the organization; else its owners."""
    mine = Membership.objects.filter(organization_id=row.organization_id, user=row.created_by_id, user__is_active=True)
    found = list(mine.values_list("user__email", flat=True)) if row.created_by_id else []
    return found or mails.addresses(row.organization_id, ("owner",))
