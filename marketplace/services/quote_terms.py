"""What may be asked for in a quote, and what it comes to: the request, the listing's terms, the amounts."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from fractions import Fraction
from typing import Any

from django.conf import settings

from billing.core import money, share, tax
from marketplace.compiled import Compiled, slot
from marketplace.errors import MarketError
from marketplace.models import Host, Kind, Listing, Organization, Quote
from marketplace.services import price_tiers
from marketplace.services.availability import HOLDING, seconds
from marketplace.services.price_tiers import Asked, Option
from scheduler.core.capacity import LEVELS

BOOK_AHEAD = timedelta(days=365)


@dataclass(frozen=True)
class Request:
    """What is asked for. `starts_at` None: at once. Windows are half-open, UTC, to the minute. `limit_price`: spot only.
    `upfront_max_permille`, `flexible_hours_max`: as services.price_tiers says.
    """

    kind: str
    gpu_count: int
    level: str = "site"
    starts_at: datetime | None = None
    ends_at: datetime | None = None
    limit_price: int | None = None
    upfront_max_permille: int | None = None
    flexible_hours_max: int | None = None


def check(
    listing: Listing,
    organization: Organization,
    wanted: Request,
    price: int,
    now: datetime,
    *,
    chunk: int | None = None,
) -> datetime:
    """Shape and terms; answers the start. `chunk`: as `chunk_of` says, where that is known."""
    wrong: dict[str, str] = {}
    if wanted.level not in LEVELS:
        wrong["/level"] = f"one of {', '.join(LEVELS)}"
    if wanted.gpu_count < 1 or wanted.gpu_count < listing.min_gpus:
        wrong["/gpu_count"] = f"at least {listing.min_gpus}"
    elif wanted.kind in HOLDING and wanted.gpu_count % (chunk := chunk or chunk_of(listing)):
        wrong["/gpu_count"] = f"a multiple of {chunk}"
    if wanted.kind == Kind.SPOT and wanted.limit_price is None:
        wrong["/limit_price"] = "spot needs the most that you would pay per GPU-hour"
    elif wanted.kind == Kind.SPOT and wanted.limit_price is not None and wanted.limit_price < price:
        wrong["/limit_price"] = f"the floor is {price} now"
    elif wanted.kind != Kind.SPOT and wanted.limit_price is not None:
        wrong["/limit_price"] = "only spot has a limit"
    if wanted.upfront_max_permille is not None and wanted.kind not in HOLDING:
        wrong["/upfront_max_permille"] = f"only {' and '.join(HOLDING)} have anything due at signing"
    if wanted.flexible_hours_max is not None and wanted.kind != Kind.FLEXIBLE:
        wrong["/flexible_hours_max"] = "only flexible bears curtailment"
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
    if wanted.kind not in HOLDING:
        _check_open(listing, wanted, starts_at)
        return
    if wanted.ends_at is None:
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


def _check_open(listing: Listing, wanted: Request, starts_at: datetime) -> None:
    """What holds nothing claims nothing, so the hours in which the listing is on offer bind its contract's window instead."""
    opens, until = listing.available_from, closes(listing, wanted)
    extra = {"available_from": opens, "available_until": listing.available_until}
    if opens is not None and starts_at < opens:
        pointer, said = "/starts_at", f"{opens:%F %R} UTC or later"
    elif listing.available_until is not None and starts_at >= listing.available_until:
        pointer, said = "/starts_at", f"before {listing.available_until:%F %R} UTC"
    elif until is not None and listing.available_until is not None and until > listing.available_until:
        pointer, said = "/ends_at", f"{listing.available_until:%F %R} UTC or earlier; left out: then"
    else:
        return
    raise MarketError(
        "term_not_offered", f"{pointer.strip('/')}: {said}: it is not on offer at other times.", {pointer: said}, extra
    )


def closes(listing: Listing, wanted: Request) -> datetime | None:
    """The end of an on-demand or spot contract: as asked, else when the listing is not on offer any more."""
    return wanted.ends_at or listing.available_until


def option_of(listing: Listing, wanted: Request, now: datetime) -> Option:
    """The price of a request for `reserved` or `flexible`, and what is agreed with it. MarketError("term_not_offered") with all that
    is offered for less asking too much.
    """
    starts_at = max(wanted.starts_at or now, now)
    term_s = None if wanted.ends_at is None else seconds(wanted.ends_at) - seconds(starts_at)
    asked = Asked(term_s, wanted.upfront_max_permille, wanted.flexible_hours_max)
    found = price_tiers.chosen(listing, wanted.kind, asked)
    if found is not None:
        return found
    longest = [o for o in price_tiers.options(listing, wanted.kind) if o.min_term_hours <= asked.term_hours]
    least = min(option.upfront_permille for option in longest)
    wrong: dict[str, str] = {}
    if wanted.upfront_max_permille is not None and wanted.upfront_max_permille < least:
        wrong["/upfront_max_permille"] = f"at least {least} for such a term"
    else:
        upfront = listing.upfront_permille if wanted.upfront_max_permille is None else wanted.upfront_max_permille
        hours = min(o.flexible_hours_per_month for o in longest if o.upfront_permille <= upfront)
        wrong["/flexible_hours_max"] = f"at least {hours} for such a term"
    raise MarketError(
        "term_not_offered", "; ".join(f"{name.strip('/')}: {said}" for name, said in wrong.items()), wrong,
        {"offered": [vars(option) for option in sorted(longest)]},
    )  # fmt: skip


_SMALLEST = Compiled(
    lambda: (
        Host.objects.filter(listing=slot("listing"))
        .exclude(state=Host.State.RETIRED)
        .order_by("gpu_count")
        .values_list("gpu_count", flat=True)[:1]
    )
)


def chunk_of(listing: Listing) -> int:
    """GPUs come in multiples of this on one host: the minimum, or whole hosts where the minimum is larger than one."""
    if listing.is_resale:
        return listing.min_gpus
    smallest: int
    (smallest,) = _SMALLEST(listing=listing.pk) or [1]
    return max(1, min(listing.min_gpus, smallest))


def total_minor(gpus: int, starts_at: datetime, ends_at: datetime, price: int, currency: str) -> int:
    """A commitment in minor units: GPUs x seconds x price / 3600, rounded once, half away from zero."""
    term = seconds(ends_at) - seconds(starts_at)
    return money.round_half_away(money.exact_amount(gpus * 1000 * term, price, currency))


def upfront_minor(total: int | None, permille: int, currency: str) -> int:
    """What of a commitment is due at signing, minor units; nothing where it is too little to be charged."""
    due = money.round_half_away(Fraction((total or 0) * permille, 1000))
    return due if due >= money.MINIMUM_CHARGE.get(currency, 1) else 0


def itemise(row: Quote) -> dict[str, Any]:
    """GPU-seconds and the amounts of the commitment in minor units; the platform's fee and the energy lie inside the total. By use:
    amounts per hour of the whole ceiling. `energy`: at most so much, for all GPUs at full power; None where it was not known.
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
        "energy": _energy(row, span),
        "tax": vars(tax.estimate(settings.LEGAL_COUNTRY, row.organization.country)),
        "upfront_minor": upfront_minor(row.total_minor, row.terms.get("upfront_permille", 0), row.currency),
        "currency": row.currency,
    }


def _energy(row: Quote, span_s: int) -> dict[str, Any] | None:
    """`wh` and the average `watts` of the quoted GPUs at full power, the site's overhead included; `minor`: what that would cost at the
    grid's price of then, of the operator's part; None where none is published, or in another currency than USD.
    """
    of = row.terms.get("energy")
    if not of:
        return None
    watts = row.gpu_count * of["gpu_w"]
    minor = None
    if of["grid_uusd_mwh"] is not None and row.currency == "USD":
        usd = Fraction(watts * span_s, 3600) * of["grid_uusd_mwh"] / (1_000_000 * money.MILLIONTHS)
        minor = max(0, money.round_half_away(usd * 10 ** money.exponent(row.currency)))
    return {"wh": watts * span_s // 3600, "watts": watts, "minor": minor, "source": of["grid_source"]}
