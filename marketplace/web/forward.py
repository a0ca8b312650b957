"""The forward market: sell part of a contract on, leave a bid, and the book, which everybody may read."""

from typing import Any

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.urls import path, reverse
from django.utils import timezone

from marketplace.errors import MarketError
from marketplace.models import Contract, Fill, Quote, Resale, StandingBid
from marketplace.services.forward import bids, book, resales
from marketplace.web.base import actor_of, done, failed, iso_minute, listed, page, row_of, visitor
from marketplace.web.contracts import contract_of
from marketplace.web.forms import refuse
from marketplace.web.forward_forms import BidForm, BookForm, ResaleForm
from marketplace.web.tags import LEVEL_WORDS

SHOWN_MONTHS = 3
SHOWN_FILLS = 10


# --- selling
@page(GET="contracts:write", POST="contracts:write")
def resell(request: HttpRequest, contract: str) -> HttpResponse:
    """First what an offer would bring (GET with the form's fields), then the offer itself."""
    row = contract_of(request, contract)
    asked = request.POST if request.method == "POST" else request.GET
    form = ResaleForm(asked if "gpu_count" in asked else None, initial=_whole(row))
    terms, error, now = None, None, timezone.now()
    if form.is_bound and form.is_valid():
        try:
            if request.method == "POST":
                made = resales.offer(actor_of(request), row, form.asked(), now=now)
                return done(request, "It is on the market.", reverse("web:resale", args=[made.public_id]))
            terms = resales.preview(actor_of(request), row, form.asked(), now=now)
        except MarketError as refused:
            error = refused
            refuse(form, refused)
    status = error.kind.status if error else (400 if form.errors else 200)
    return render(request, "resell.html", {"row": row, "form": form, "terms": terms, "error": error}, status=status)


def _whole(row: Contract) -> dict[str, Any]:
    start = max(row.starts_at, timezone.now())
    return {"gpu_count": row.gpu_count, "ends_at": iso_minute(row.ends_at)} | (
        {"starts_at": iso_minute(row.starts_at)} if start == row.starts_at else {}
    )


@page(GET="contracts:read")
def offers(request: HttpRequest) -> HttpResponse:
    rows = Resale.objects.owned_by(actor_of(request).organization_id).select_related("contract__gpu_model", "listing")
    return render(request, "resales.html", {"page": listed(request, rows, Resale.PREFIX)})


def _resale(request: HttpRequest, public_id: str) -> Resale:
    rows = Resale.objects.visible_to(actor_of(request)).select_related("contract__gpu_model", "listing", "organization")
    found: Resale = row_of(rows, Resale.PREFIX, public_id)
    return found


@page(GET="contracts:read")
def resale(request: HttpRequest, resale: str) -> HttpResponse:
    row, actor = _resale(request, resale), actor_of(request)
    sales = Fill.objects.visible_to(actor).filter(resale=row).order_by("-pk")
    mine = row.organization_id == actor.organization_id
    return render(
        request, "resale.html", {"row": row, "sales": sales[:50], "mine": mine, "actions": resales.actions(row, actor)}
    )


@page(POST="contracts:write")
def withdraw(request: HttpRequest, resale: str) -> HttpResponse:
    row = _resale(request, resale)
    here = reverse("web:resale", args=[row.public_id])
    try:
        resales.withdraw(actor_of(request), row, now=timezone.now())
    except MarketError as error:
        return failed(request, error, here)
    return done(request, "Withdrawn. What was unsold is yours again.", here)


# --- bidding
@page(GET="quotes:read")
def my_bids(request: HttpRequest) -> HttpResponse:
    rows = StandingBid.objects.owned_by(actor_of(request).organization_id).select_related("gpu_model")
    return render(request, "bids.html", {"page": listed(request, rows, StandingBid.PREFIX)})


@page(GET="quotes:write", POST="quotes:write")
def bid_new(request: HttpRequest) -> HttpResponse:
    actor = actor_of(request)
    models, regions = book.choices(livemode=actor.livemode)
    form = BidForm(
        request.POST if request.method == "POST" else None, initial=request.GET.dict(),
        models=models, regions=regions, may_sign=actor.may("contracts:write"),
    )  # fmt: skip
    error = None
    if form.is_bound and form.is_valid():
        try:
            made = bids.place(actor, form.wanted(), now=timezone.now())
            return done(request, "Your bid stands in line.", reverse("web:bid", args=[made.public_id]))
        except MarketError as refused:
            error = refused
            refuse(form, refused, {"duration_s": "hours"})
    status = error.kind.status if error else (400 if form.errors else 200)
    return render(request, "bid_new.html", {"form": form, "error": error}, status=status)


def _bid(request: HttpRequest, public_id: str) -> StandingBid:
    rows = StandingBid.objects.owned_by(actor_of(request).organization_id).select_related("gpu_model", "site")
    found: StandingBid = row_of(rows, StandingBid.PREFIX, public_id)
    return found


@page(GET="quotes:read")
def bid(request: HttpRequest, bid: str) -> HttpResponse:
    row, actor = _bid(request, bid), actor_of(request)
    quotes = Quote.objects.owned_by(actor.organization_id).filter(bid=row).select_related("listing", "contract")
    context = {
        "row": row, "quotes": quotes.order_by("-pk")[:20], "actions": bids.actions(row, actor), "now": timezone.now(),
        "level_words": LEVEL_WORDS[row.level], "fixed": row.earliest == row.latest,
    }  # fmt: skip
    return render(request, "bid.html", context)


@page(POST="quotes:write")
def cancel(request: HttpRequest, bid: str) -> HttpResponse:
    row = _bid(request, bid)
    here = reverse("web:bid", args=[row.public_id])
    try:
        bids.cancel(actor_of(request), row, now=timezone.now())
    except MarketError as error:
        return failed(request, error, here)
    return done(request, "Cancelled. A quote it has made stays firm for its minutes.", here)


# --- for everybody
@page(GET="public")
def the_book(request: HttpRequest) -> HttpResponse:
    actor, now = visitor(request), timezone.now()
    known = book.books(livemode=actor.livemode)
    form = BookForm(request.GET, books=known)
    chosen = form.chosen()
    months: list[dict[str, Any]] = []
    if chosen is not None:
        model = book.model_of(chosen[0])
        for month in book.months(now, SHOWN_MONTHS):
            found = book.depth(model, chosen[1], month, livemode=actor.livemode, currency="USD", now=now)
            most = max((level.gpus for level in (*found.bids, *found.offers)), default=1)
            months.append({"depth": found, "bids": _bars(found.bids, most), "offers": _bars(found.offers, most)})
    fills = book.fills(actor, gpu_model=chosen[0] if chosen else "", region=chosen[1] if chosen else "")
    context = {
        "form": form, "chosen": chosen, "months": months, "page": listed(request, fills, Fill.PREFIX, size=SHOWN_FILLS),
        "as_of": now,
    }  # fmt: skip
    return render(request, "book.html", context)


def _bars(levels: tuple[book.Level, ...], most: int) -> list[tuple[book.Level, int]]:
    """Each level with its share of the largest, in parts of a hundred."""
    return [(level, max(1, level.gpus * 100 // most)) for level in levels]


urlpatterns = [
    path("book", the_book, name="book"),
    path("contracts/<str:contract>/resell", resell, name="resell"),
    path("resales", offers, name="resales"),
    path("resales/<str:resale>", resale, name="resale"),
    path("resales/<str:resale>/withdraw", withdraw, name="resale-withdraw"),
    path("bids", my_bids, name="bids"),
    path("bids/new", bid_new, name="bid-new"),
    path("bids/<str:bid>", bid, name="bid"),
    path("bids/<str:bid>/cancel", cancel, name="bid-cancel"),
]
