"""Quotes: a price firm for QUOTE_FIRM_SECONDS, with capacity held for QUOTE_HOLD_SECONDS where the kind holds any.

Two locks, in order: the cell's (whose capacity moves) and the organization's (whose live holds are counted).
"""

from collections.abc import Collection
from datetime import datetime, timedelta
from typing import Any

from django.conf import settings
from django.db import transaction

from marketplace.compiled import ORGANIZATION, Compiled, shape_of, time
from marketplace.errors import MarketError
from marketplace.locks import Lock, acquire
from marketplace.models import Listing, Organization, Quote, Reservation, StandingBid
from marketplace.services import availability, documents, holds, listings, nearest, quoted, spot_prices
from marketplace.services.availability import HOLDING, instant, seconds
from marketplace.services.forward import buying
from marketplace.services.price_tiers import Option
from marketplace.services.quote_terms import (
    Request,
    check,
    chunk_of,
    closes,
    itemise,
    option_of,
    total_minor,
    upfront_minor,
)
from marketplace.tenancy import Actor
from scheduler.core.capacity import Admission

__all__ = [
    "Request", "accept_body", "admitted", "chunk_of", "claims_at", "itemise", "option_of", "quote", "release", "state_of", "total_minor",
    "upfront_minor",
]  # fmt: skip


def quote(
    actor: Actor,
    listing_id: int,
    wanted: Request,
    *,
    reference: str = "",
    metadata: dict[str, Any] | None = None,
    bid: StandingBid | None = None,
    now: datetime,
) -> Quote:
    """A firm price, and held capacity for `reserved` and `flexible`.

    MarketError: not_found, listing_unavailable, kind_not_offered, term_not_offered, invalid_request, limit_exceeded,
    too_many_holds, or no_capacity with `reason` and `alternatives`.
    """
    if actor.organization_id is None:
        raise MarketError("organization_required", "Quotes are made for an organization.")
    now = now.replace(microsecond=0)
    listing = _listing(actor, listing_id)
    organization = Organization.objects.get(pk=actor.organization_id)
    price = listings.price_of(listing, wanted.kind, now=now)
    if listing.is_resale:
        wanted = buying.asked(actor, listing, wanted)
    starts_at = check(listing, organization, wanted, price, now)
    if wanted.limit_price is not None:
        price = spot_prices.quoted(listing, price, wanted.limit_price, now)
    holding = wanted.kind in HOLDING
    option = option_of(listing, wanted, now) if holding else Option(price)
    frozen = quoted.terms_of(listing, option if holding else None, now=now)  # read before anything is locked
    with transaction.atomic():
        acquire((Lock.CELL, listing.site.cell_id), (Lock.ORG, organization.pk))
        made = Quote(
            organization=organization,
            listing=listing,
            created_by_id=actor.user_id,
            bid=bid,
            kind=wanted.kind,
            gpu_count=wanted.gpu_count,
            level=wanted.level,
            starts_at=starts_at,
            ends_at=wanted.ends_at if holding else closes(listing, wanted),
            price=option.price,
            overage_price=(listing.on_demand_price or price) if holding else None,
            limit_price=wanted.limit_price,
            upfront_max_permille=wanted.upfront_max_permille,
            flexible_hours_max=wanted.flexible_hours_max,
            currency=listing.currency,
            listing_version=listing.version,
            terms=frozen,
            fee_permille=settings.PLATFORM_FEE_PERMILLE,
            total_minor=total_minor(wanted.gpu_count, starts_at, wanted.ends_at, option.price, listing.currency)
            if wanted.ends_at and holding
            else None,
            created_at=now,
            held_until=now + timedelta(seconds=settings.QUOTE_HOLD_SECONDS) if holding else None,
            firm_until=now + timedelta(seconds=settings.QUOTE_FIRM_SECONDS),
            reference=reference,
            metadata=metadata or {},
        )
        if listing.is_resale:
            for name, value in buying.terms_of(listing).items():
                setattr(made, name, value)
        if not holding:
            _check_ceiling(actor, listing, wanted, made, now)
            made.save()
            return made
        _check_holds(organization, now)
        market = availability.load([listing], now)
        found = _admission(listing, made, now=now, market=market)
        if found.admitted:
            _hold(made, listing, found, now=now)
            return made
    # What would fit is sought without the cell's lock.
    raise _refusal(actor, listing, made, found, now=now, code="no_capacity", market=market)


def _hold(made: Quote, listing: Listing, found: Admission, *, now: datetime) -> None:
    assert made.ends_at is not None
    made.save()
    if listing.is_resale:
        buying.hold(listing, made, _by_host(found))
        return
    reservation = Reservation.objects.create(
        listing=listing,
        quote=made,
        starts_at=made.starts_at,
        ends_at=made.ends_at,
        claims_at=claims_at(listing, made.starts_at, made.ends_at, now),
        held_until=made.held_until,
        state=Reservation.State.HELD,
    )
    holds.write_blocks(reservation, _by_host(found), now=now, new=True)


def claims_at(listing: Listing, starts_at: datetime, ends_at: datetime | None, now: datetime) -> datetime:
    """When the GPUs of a window beginning at `starts_at` must be clear."""
    assert ends_at is not None
    return instant(availability.claim_window(listing, starts_at, ends_at, now)[0])


def admitted(
    actor: Actor,
    listing: Listing,
    asked: Quote,
    *,
    now: datetime,
    without: Collection[int] = (),
    code: str = "no_capacity",
) -> tuple[tuple[int, int], ...]:
    """((host id, GPUs), ...) for the quote's window, or MarketError(`code`) with the reason and what would fit. Under the cell's lock."""
    found = _admission(listing, asked, now=now, market=availability.load([listing], now, without=without))
    if not found.admitted:
        raise _refusal(actor, listing, asked, found, now=now, code=code, market=None)
    return _by_host(found)


def _by_host(found: Admission) -> tuple[tuple[int, int], ...]:
    return tuple((int(str(host)), count) for host, count in found.hold)


def _admission(listing: Listing, asked: Quote, *, now: datetime, market: availability.Market) -> Admission:
    assert asked.ends_at is not None
    return availability.admit(
        listing,
        gpus=asked.gpu_count,
        level=asked.level,
        starts_at=max(asked.starts_at, now),
        ends_at=asked.ends_at,
        now=now,
        market=market,
    )


PLACES = {"host": "host", "leaf": "leaf switch", "spine": "fabric", "site": "site"}  # levels, as people say


def _refusal(
    actor: Actor,
    listing: Listing,
    asked: Quote,
    found: Admission,
    *,
    now: datetime,
    code: str,
    market: availability.Market | None,
) -> MarketError:
    most = found.alternatives.in_window[asked.level] if found.alternatives is not None else 0
    inside = "" if asked.level == "site" else f" inside one {PLACES[asked.level]}"
    detail = {
        "shape_never_fits": f"This offer does not have {asked.gpu_count} GPUs at work{inside}, whenever it begins.",
        "no_capacity_in_window": f"Fewer than {asked.gpu_count} GPUs are free in all of that window.",
        "fragmented_at_level": f"{asked.gpu_count} GPUs are free, but not{inside}.",
    }[found.reason] + (f" At most {most} can be had then{inside}." if most else "")
    extra = {
        "reason": found.reason,
        "alternatives": nearest.alternatives(actor, listing, asked, found.alternatives, now=now, market=market),
        "retry_after": settings.QUOTE_HOLD_SECONDS,
    }
    return MarketError(code, detail, extra=extra)


def _listing(actor: Actor, listing_id: int) -> Listing:
    found = nearest.SEEN(shape_of(actor), listing=listing_id, organization=actor.organization_id)
    listing: Listing | None = found[0] if found else None
    if listing is None or listing.site.cell.livemode != actor.livemode:
        raise MarketError("not_found", "There is no such listing.")
    if listing.state != Listing.State.PUBLISHED:
        raise MarketError("listing_unavailable", f"{listing.public_id} is {listing.state}.")
    return listing


def _check_ceiling(actor: Actor, listing: Listing, wanted: Request, made: Quote, now: datetime) -> None:
    """A ceiling beyond what is listed could never be reached; less is a rate, and jobs wait their turn."""
    market = availability.load([listing], now)
    total = market.totals[listing.pk]
    if wanted.gpu_count > total:
        raise MarketError(
            "no_capacity",
            f"The listing has {total} GPUs in all.",
            extra={
                "reason": "shape_never_fits",
                "alternatives": {
                    "gpu_count": {wanted.level: total},
                    **nearest.alternatives(actor, listing, made, None, now=now, market=market),
                },
            },
        )


_LIVE_HOLDS = Compiled(
    lambda: Reservation.objects.filter(
        state=Reservation.State.HELD, held_until__gt=time("now"), quote__organization=ORGANIZATION
    ).values_list("held_until", flat=True)
)


def _check_holds(organization: Organization, now: datetime) -> None:
    live = _LIVE_HOLDS(now=now, organization=organization.pk)
    count = len(live)
    if count >= settings.QUOTE_LIVE_HOLDS:
        wait = max(1, seconds(min(live)) - seconds(now))
        raise MarketError(
            "too_many_holds", f"Accept one of the {count} held quotes, or wait {wait} s.",
            extra={"limit": settings.QUOTE_LIVE_HOLDS, "retry_after": wait},
        )  # fmt: skip


def release(actor: Actor, quote_id: int, *, now: datetime) -> Quote:
    """Give a quote back before it lapses: the hold is free at once. MarketError("illegal_transition") unless it is open."""
    with transaction.atomic():
        row: Quote | None = Quote.objects.owned_by(actor.organization_id).filter(pk=quote_id).first()
        if row is None:
            raise MarketError("not_found", "There is no such quote.")
        moved = Quote.objects.filter(pk=row.pk, state=Quote.State.OPEN).update(
            state=Quote.State.RELEASED, held_until=now
        )
        if not moved:
            raise MarketError("illegal_transition", f"The quote is {row.state}.")
        Reservation.objects.filter(quote=row, state=Reservation.State.HELD).update(
            state=Reservation.State.RELEASED, held_until=now
        )
    row.refresh_from_db()
    return row


# --- what a quote says
def accept_body(row: Quote) -> dict[str, Any]:
    """The request that accepts it, ready to post."""
    return {
        "method": "POST",
        "path": "/api/v1/contracts",
        "body": {"quote": row.public_id, "terms_version": documents.CURRENT},
    }


def state_of(row: Quote, now: datetime) -> str:
    """`open` beyond its firm time is `expired`, whether or not the clock has come by."""
    return Quote.State.EXPIRED if row.state == Quote.State.OPEN and row.firm_until <= now else row.state
