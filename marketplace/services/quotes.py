"""Quotes: a price firm for QUOTE_FIRM_SECONDS, with capacity held for QUOTE_HOLD_SECONDS where the kind holds any.

Two locks, in order: the cell's (whose capacity moves) and the organization's (whose live holds are counted).
"""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from fractions import Fraction
from typing import Any

from django.conf import settings
from django.db import transaction
from django.db.models import Count, Min

from billing.core import money, share
from marketplace.errors import MarketError
from marketplace.locks import Lock, acquire
from marketplace.models import Kind, Listing, Organization, Quote, Reservation, StandingBid
from marketplace.services import availability, documents, holds, listings, quoted, search, spot_prices
from marketplace.services.availability import HOLDING, instant, seconds
from marketplace.services.forward import buying
from marketplace.tenancy import Actor
from scheduler.core.capacity import LEVELS, Admission

BOOK_AHEAD = timedelta(days=365)
OTHER_LISTINGS = 3


@dataclass(frozen=True)
class Request:
    """What is asked for. `starts_at` None: at once. Windows are half-open, UTC, to the minute. `limit_price`: spot only."""

    kind: str
    gpu_count: int
    level: str = "site"
    starts_at: datetime | None = None
    ends_at: datetime | None = None
    limit_price: int | None = None


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
    starts_at = _check(listing, organization, wanted, price, now)
    if wanted.limit_price is not None:
        price = spot_prices.quoted(listing, price, wanted.limit_price, now)
    with transaction.atomic():
        acquire((Lock.CELL, listing.site.cell_id), (Lock.ORG, organization.pk))
        holding = wanted.kind in HOLDING
        made = Quote(
            organization=organization,
            listing=listing,
            created_by_id=actor.user_id,
            bid=bid,
            kind=wanted.kind,
            gpu_count=wanted.gpu_count,
            level=wanted.level,
            starts_at=starts_at,
            ends_at=wanted.ends_at,
            price=price,
            overage_price=(listing.on_demand_price or price) if holding else None,
            limit_price=wanted.limit_price,
            currency=listing.currency,
            listing_version=listing.version,
            terms=quoted.terms_of(listing),
            fee_permille=settings.PLATFORM_FEE_PERMILLE,
            total_minor=total_minor(wanted.gpu_count, starts_at, wanted.ends_at, price, listing.currency)
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
            _check_ceiling(actor, listing, wanted, now)
            made.save()
            return made
        _check_holds(organization, now)
        found = _admission(listing, made, now=now)
        if found.admitted:
            _hold(made, listing, found, now=now)
            return made
    raise _refusal(
        actor, listing, made, found, now=now, code="no_capacity"
    )  # what would fit is sought without the cell's lock


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
    found = _admission(listing, asked, now=now, without=without)
    if not found.admitted:
        raise _refusal(actor, listing, asked, found, now=now, code=code)
    return _by_host(found)


def _by_host(found: Admission) -> tuple[tuple[int, int], ...]:
    return tuple((int(str(host)), count) for host, count in found.hold)


def _admission(listing: Listing, asked: Quote, *, now: datetime, without: Collection[int] = ()) -> Admission:
    assert asked.ends_at is not None
    return availability.admit(
        listing,
        gpus=asked.gpu_count,
        level=asked.level,
        starts_at=max(asked.starts_at, now),
        ends_at=asked.ends_at,
        now=now,
        without=without,
    )


def _refusal(
    actor: Actor, listing: Listing, asked: Quote, found: Admission, *, now: datetime, code: str
) -> MarketError:
    detail = {
        "shape_never_fits": f"The listing has no {asked.level} with {asked.gpu_count} GPUs.",
        "no_capacity_in_window": f"Fewer than {asked.gpu_count} GPUs are free in all of that window.",
        "fragmented_at_level": f"{asked.gpu_count} GPUs are free, but not inside one {asked.level}.",
    }[found.reason]
    extra = {
        "reason": found.reason,
        "alternatives": alternatives(actor, listing, asked, found, now=now),
        "retry_after": settings.QUOTE_HOLD_SECONDS,
    }
    return MarketError(code, detail, extra=extra)


def alternatives(actor: Actor, listing: Listing, asked: Quote, refused: Admission, *, now: datetime) -> dict[str, Any]:
    """What would be admitted as it stands: other counts and a shorter window here, the next window here, other listings."""
    found: dict[str, Any] = {}
    other = refused.alternatives
    if other is not None:
        found["gpu_count"] = other.in_window
        found["later"] = None if other.later is None else _window(*other.later)
        found["ends_at"] = None if other.until is None else instant(other.until)
    elsewhere = search.search(
        actor,
        search.Filters(
            gpu_model=(listing.gpu_model.name,) if listing.gpu_model else (), kind=asked.kind, start=asked.starts_at,
            end=asked.ends_at, count=asked.gpu_count, level=asked.level, resale=False,
        ),
        now=now,
        limit=OTHER_LISTINGS + 1,
    )  # fmt: skip
    found["listings"] = [
        {
            "listing": row.listing.public_id,
            "title": row.listing.title,
            "gpus": row.stock.gpus,
            "price": row.listing.price_of(asked.kind),
            "currency": row.listing.currency,
        }
        for row in elsewhere.rows
        if row.listing.pk != listing.pk and asked.gpu_count % max(1, row.listing.min_gpus) == 0
    ][:OTHER_LISTINGS]
    return found


def _window(start: int, end: int) -> dict[str, datetime]:
    return {"starts_at": instant(start), "ends_at": instant(end)}


def _listing(actor: Actor, listing_id: int) -> Listing:
    rows = Listing.objects.visible_to(actor).select_related("site__cell", "gpu_model", "organization", "resale")
    listing: Listing | None = rows.filter(pk=listing_id).first()
    if listing is None or listing.site.cell.livemode != actor.livemode:
        raise MarketError("not_found", "There is no such listing.")
    if listing.state != Listing.State.PUBLISHED:
        raise MarketError("listing_unavailable", f"{listing.public_id} is {listing.state}.")
    return listing


def _check(listing: Listing, organization: Organization, wanted: Request, price: int, now: datetime) -> datetime:
    """Shape and terms; answers the start."""
    wrong: dict[str, str] = {}
    if wanted.level not in LEVELS:
        wrong["/level"] = f"one of {', '.join(LEVELS)}"
    if wanted.gpu_count < 1 or wanted.gpu_count < listing.min_gpus:
        wrong["/gpu_count"] = f"at least {listing.min_gpus}"
    elif wanted.kind in HOLDING and wanted.gpu_count % chunk_of(listing):
        wrong["/gpu_count"] = f"a multiple of {chunk_of(listing)}"
    if wanted.kind == Kind.SPOT and wanted.limit_price is None:
        wrong["/limit_price"] = "spot needs the most that you would pay per GPU-hour"
    elif wanted.kind == Kind.SPOT and wanted.limit_price is not None and wanted.limit_price < price:
        wrong["/limit_price"] = f"the floor is {price} now"
    elif wanted.kind != Kind.SPOT and wanted.limit_price is not None:
        wrong["/limit_price"] = "only spot has a limit"
    for name, at in (("/starts_at", wanted.starts_at), ("/ends_at", wanted.ends_at)):
        if at is not None and (at.second or at.microsecond):
            wrong[name] = "to the minute"
    if wanted.starts_at is not None and wanted.starts_at < now - timedelta(minutes=1):
        wrong["/starts_at"] = "is in the past; leave it out to start at once"
    starts_at = max(wanted.starts_at or now, now)
    if wanted.kind in HOLDING and wanted.ends_at is None:
        wrong["/ends_at"] = f"{wanted.kind} needs an end"
    elif wanted.ends_at is not None and wanted.ends_at <= starts_at:
        wrong["/ends_at"] = "after the start"
    if wrong:
        raise MarketError("invalid_request", "; ".join(f"{k}: {v}" for k, v in wrong.items()), wrong)
    if listing.currency != organization.currency:
        raise MarketError(
            "listing_unavailable",
            f"It is priced in {listing.currency}; the account is billed in {organization.currency}.",
        )
    if wanted.gpu_count > organization.gpu_limit:
        raise MarketError(
            "limit_exceeded", f"{wanted.gpu_count} GPUs; the organization may have {organization.gpu_limit} at once.",
            extra={"limit": "gpus", "allowed": organization.gpu_limit},
        )  # fmt: skip
    _check_term(listing, wanted, starts_at, now)
    return starts_at


def _check_term(listing: Listing, wanted: Request, starts_at: datetime, now: datetime) -> None:
    if starts_at - now > BOOK_AHEAD:
        raise MarketError(
            "term_not_offered", "Starts lie at most a year ahead.", {"/starts_at": "at most a year ahead"}
        )
    if wanted.kind not in HOLDING or wanted.ends_at is None:
        return
    term = wanted.ends_at - starts_at
    least, most = timedelta(hours=listing.min_term_hours), timedelta(days=listing.max_term_days)
    # A window that began within this minute is as long as it was asked for.
    if term + timedelta(minutes=1) <= least or term > most:
        raise MarketError(
            "term_not_offered",
            f"Terms are {listing.min_term_hours} hours to {listing.max_term_days} days.",
            {"/ends_at": f"{listing.min_term_hours} hours to {listing.max_term_days} days after the start"},
            {"min_term_hours": listing.min_term_hours, "max_term_days": listing.max_term_days},
        )


def chunk_of(listing: Listing) -> int:
    """GPUs come in multiples of this on one host: the minimum, or whole hosts where the minimum is larger than one."""
    if listing.is_resale:
        return listing.min_gpus
    found = listing.hosts.exclude(state="retired").aggregate(least=Min("gpu_count"))["least"]
    return max(1, min(listing.min_gpus, int(found or 1)))


def _check_ceiling(actor: Actor, listing: Listing, wanted: Request, now: datetime) -> None:
    """A ceiling beyond what is listed could never be reached; less is a rate, and jobs wait their turn."""
    total = availability.load([listing], now).totals[listing.pk]
    if wanted.gpu_count > total:
        elsewhere = search.Filters(
            gpu_model=(listing.gpu_model.name,) if listing.gpu_model else (), kind=wanted.kind, count=wanted.gpu_count
        )
        others = search.search(actor, elsewhere, now=now, limit=OTHER_LISTINGS).rows
        raise MarketError(
            "no_capacity",
            f"The listing has {total} GPUs in all.",
            extra={
                "reason": "shape_never_fits",
                "alternatives": {
                    "gpu_count": {wanted.level: total},
                    "listings": [{"listing": o.listing.public_id, "gpus": o.stock.gpus} for o in others],
                },
            },
        )


def _check_holds(organization: Organization, now: datetime) -> None:
    live = Reservation.objects.filter(
        state=Reservation.State.HELD, held_until__gt=now, quote__organization=organization
    ).aggregate(soonest=Min("held_until"), count=Count("id"))
    count = live["count"]
    if count >= settings.QUOTE_LIVE_HOLDS:
        wait = max(1, seconds(live["soonest"]) - seconds(now))
        raise MarketError(
            "too_many_holds", f"Accept one of the {count} held quotes, or wait {wait} s.",
            extra={"limit": settings.QUOTE_LIVE_HOLDS, "retry_after": wait},
        )  # fmt: skip


def total_minor(gpus: int, starts_at: datetime, ends_at: datetime, price: int, currency: str) -> int:
    """A commitment in minor units: GPUs x seconds x price / 3600, rounded once, half away from zero."""
    term = seconds(ends_at) - seconds(starts_at)
    return money.round_half_away(money.exact_amount(gpus * 1000 * term, price, currency))


def upfront_minor(total: int | None, permille: int, currency: str) -> int:
    """What of a commitment is due at signing, minor units; nothing where it is too little to be charged."""
    due = money.round_half_away(Fraction((total or 0) * permille, 1000))
    return due if due >= money.MINIMUM_CHARGE.get(currency, 1) else 0


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


def itemise(row: Quote) -> dict[str, Any]:
    """GPU-seconds and the amounts of the commitment in minor units; the platform's fee lies inside the total. By use: amounts per
    hour of the whole ceiling.
    """
    by_use = row.total_minor is None or row.ends_at is None
    span = 3600 if by_use else seconds(row.ends_at or row.starts_at) - seconds(row.starts_at)
    total = row.total_minor
    if total is None:
        total = money.round_half_away(money.exact_amount(row.gpu_count * 1000 * span, row.price, row.currency))
    resale = row.listing.resale if row.listing.is_resale else None
    parts = share.split(total, row.fee_permille if resale is None else resale.fee_permille)
    return {
        "basis": "per_hour_at_ceiling" if by_use else "commitment",
        "gpu_seconds": row.gpu_count * span,
        "operator_minor": parts.operator if resale is None else 0,
        "seller_minor": 0 if resale is None else parts.operator,
        "platform_fee_minor": parts.platform,
        "total_minor": total,
        "upfront_minor": upfront_minor(row.total_minor, row.terms.get("upfront_permille", 0), row.currency),
        "currency": row.currency,
    }


def state_of(row: Quote, now: datetime) -> str:
    """`open` beyond its firm time is `expired`, whether or not the clock has come by."""
    return Quote.State.EXPIRED if row.state == Quote.State.OPEN and row.firm_until <= now else row.state
