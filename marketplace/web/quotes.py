"""Quotes: ask for a firm price, read it, accept it or give it back. A refusal names its reason and what would fit."""

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any
from urllib.parse import urlencode

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.urls import path, reverse
from django.utils import timezone
from django.utils.dateparse import parse_datetime

from billing.core import money
from marketplace.errors import MarketError
from marketplace.models import BillingStanding, Kind, Listing, Quote
from marketplace.services import contracts, documents, maintenance, price_tiers, quotes
from marketplace.services.availability import HOLDING
from marketplace.web.base import actor_of, done, failed, iso_minute, page, row_of
from marketplace.web.forms import QuoteForm, millionths, refuse
from marketplace.web.market import listing_of
from marketplace.web.tags import LEVEL_WORDS

SIGNED = "Signed. The contract is yours; submit a job."
LIMITS = ("upfront_max_permille", "flexible_hours_max")
ASKED = ("kind", "gpu_count", "level", "starts_at", "ends_at", "limit_price", *LIMITS)


@page(GET="quotes:write", POST="quotes:write")
def new(request: HttpRequest, listing: str) -> HttpResponse:
    row = listing_of(request, listing)
    if request.method == "GET":
        return _form(request, row, QuoteForm(listing=row, initial=_initial(request, row)))
    form = QuoteForm(request.POST, listing=row)
    if not form.is_valid():
        return _form(request, row, form, status=400)
    asked: dict[str, Any] = {k: form.cleaned_data.get(k) for k in ASKED}
    if asked["kind"] not in HOLDING:
        asked["upfront_max_permille"] = None
    if asked["kind"] != Kind.FLEXIBLE:
        asked["flexible_hours_max"] = None
    asked["limit_price"] = millionths(asked["limit_price"]) if asked["kind"] == Kind.SPOT else None
    try:
        made = quotes.quote(
            actor_of(request), row.pk, quotes.Request(**asked), reference=form.cleaned_data["reference"], now=timezone.now()
        )  # fmt: skip
    except MarketError as error:
        refuse(form, error)
        return _form(request, row, form, error=error, options=alternatives(error), status=error.kind.status)
    return done(request, "The price is firm.", reverse("web:quote", args=[made.public_id]))


def _initial(request: HttpRequest, row: Listing) -> dict[str, Any]:
    """From the query string, so that calendars and alternatives can link to a filled form."""
    offered = [k for k in Kind.values if row.price_of(k) is not None]
    given: dict[str, Any] = {k: request.GET[k] for k in ASKED if request.GET.get(k)}
    for name in ("starts_at", "ends_at"):
        if name in given:
            try:
                given[name] = parse_datetime(given[name])
            except ValueError:
                given[name] = None
    kind = given.get("kind") if given.get("kind") in offered else None
    if kind is None:
        holding = [k for k in offered if k in HOLDING]
        kind = holding[0] if given.get("ends_at") and holding else (offered[0] if offered else None)
    floor = row.price_of(Kind.SPOT)
    limit = given.get("limit_price") or (None if floor is None else f"{Decimal(floor) / money.MILLIONTHS:.2f}")
    return {"level": "site", "gpu_count": max(1, row.min_gpus), **given, "kind": kind, "limit_price": limit}


def _form(request: HttpRequest, row: Listing, form: QuoteForm, status: int = 200, **more: Any) -> HttpResponse:
    return render(request, "quote_new.html", {"row": row, "form": form, **more}, status=status)


WHAT = {
    "later": "Later",
    "earlier": "Earlier",
    "shorter": "For a shorter time",
    "fewer": "Fewer GPUs",
    "level": "Less close",
}


@dataclass(frozen=True)
class Fit:
    """What would be admitted instead, as a row of a table; `href`: the quote form filled in with it."""

    what: str
    gpus: int
    where: str
    starts_at: datetime | None
    ends_at: datetime | None
    reliability: int | None
    price: int
    currency: str
    total_minor: int
    hourly: bool
    href: str


def alternatives(error: MarketError) -> list[Fit]:
    """What would be admitted instead, the nearest first."""
    found = (error.extra.get("alternatives") or {}).get("nearest", ())
    return [_fit(each, each["quote"]["body"]) for each in found]


def _fit(offer: dict[str, Any], body: dict[str, Any]) -> Fit:
    items = offer["items"]
    return Fit(
        what=WHAT.get(offer["what"], f"{offer['title']}, {offer['region']}"),
        gpus=body["gpu_count"],
        where=LEVEL_WORDS[body["level"]],
        starts_at=body.get("starts_at"),
        ends_at=body.get("ends_at"),
        reliability=offer["reliability_permille"],
        price=offer["price"],
        currency=items["currency"],
        total_minor=items["total_minor"],
        hourly=items["basis"] != "commitment",
        href=_filled(body),
    )


def _filled(body: dict[str, Any]) -> str:
    query = {name: body[name] for name in ("kind", "gpu_count", "level", *LIMITS) if name in body}
    query |= {name: iso_minute(body[name]) for name in ("starts_at", "ends_at") if name in body}
    if "limit_price" in body:
        query["limit_price"] = f"{Decimal(body['limit_price']) / money.MILLIONTHS:f}"
    return f"{reverse('web:quote-new', args=[body['listing']])}?{urlencode(query)}"


def _quote(request: HttpRequest, public_id: str) -> Quote:
    rows = Quote.objects.owned_by(actor_of(request).organization_id)
    found: Quote = row_of(
        rows.select_related(
            "listing__site", "listing__gpu_model", "listing__organization", "listing__resale", "contract"
        ),
        Quote.PREFIX,
        public_id,
    )
    return found


@page(GET="quotes:read")
def quote(request: HttpRequest, quote: str) -> HttpResponse:
    return _show(request, _quote(request, quote))


def _show(request: HttpRequest, row: Quote, status: int = 200, **more: Any) -> HttpResponse:
    now = timezone.now()
    state = quotes.state_of(row, now)
    standing = BillingStanding.objects.owned_by(row.organization_id).first()
    again = {
        **{k: getattr(row, k) for k in ("kind", "gpu_count", "level")},
        **({"ends_at": iso_minute(row.ends_at)} if row.ends_at else {}),
        **({"starts_at": iso_minute(row.starts_at)} if row.starts_at > now else {}),
        **price_tiers.limits(row),
    }
    context = {
        "row": row,
        "state": state,
        "items": quotes.itemise(row),
        "open": state == Quote.State.OPEN,
        "firm_s": max(0, int((row.firm_until - now).total_seconds())),
        "held_s": max(0, int((row.held_until - now).total_seconds())) if row.held_until else 0,
        "contract": getattr(row, "contract", None),
        "standing": standing.state if standing else "no_card",
        "level_words": LEVEL_WORDS[row.level],
        "holds": row.kind in HOLDING,
        "work": maintenance.during(row, now) if state == Quote.State.OPEN else [],
        "terms_version": None if documents.acceptance(row.organization_id) else documents.CURRENT,
        "again": f"{reverse('web:quote-new', args=[row.listing.public_id])}?{urlencode(again)}",
        **more,
    }
    return render(request, "quote.html", context, status=status)


@page(POST="contracts:write")
def accept(request: HttpRequest, quote: str) -> HttpResponse:
    row = _quote(request, quote)
    try:
        version = request.POST.get("terms_version") or None
        made = contracts.accept(actor_of(request), row.pk, now=timezone.now(), terms_version=version)
    except MarketError as error:
        row.refresh_from_db()
        return _show(request, row, error=error, options=alternatives(error), status=error.kind.status)
    now = timezone.now()
    waits = made.upfront_minor or made.starts_at > now
    signed = f"Signed. {contracts.sentence(made, now).removeprefix('Signed. ')}" if waits else SIGNED
    return done(request, signed, reverse("web:contract", args=[made.public_id]))


@page(POST="quotes:write")
def release(request: HttpRequest, quote: str) -> HttpResponse:
    row = _quote(request, quote)
    here = reverse("web:quote", args=[row.public_id])
    try:
        quotes.release(actor_of(request), row.pk, now=timezone.now())
    except MarketError as error:
        return failed(request, error, here)
    return done(request, "Given back; what it held is free.", reverse("web:listing", args=[row.listing.public_id]))


urlpatterns = [
    path("listings/<str:listing>/quote", new, name="quote-new"),
    path("quotes/<str:quote>", quote, name="quote"),
    path("quotes/<str:quote>/accept", accept, name="quote-accept"),
    path("quotes/<str:quote>/release", release, name="quote-release"),
]
