"""Saved searches on the pages: kept from the market, listed, renamed, paused, deleted; and left from a mail, logged out."""

from typing import Any

from django.http import HttpRequest, HttpResponse, HttpResponseRedirect, QueryDict
from django.shortcuts import render
from django.urls import path, reverse
from django.utils import timezone
from django.views.decorators.csrf import csrf_exempt

from marketplace.errors import MarketError
from marketplace.models import SavedSearch
from marketplace.services import filters, saved
from marketplace.services.search import Filters
from marketplace.web.base import actor_of, done, failed, listed, page, row_of
from marketplace.web.search_forms import SavedForm, SearchForm
from marketplace.web.tags import LEVEL_WORDS, kind_words, permille, price


@page(GET="searches:read", POST="searches:write")
def searches(request: HttpRequest) -> HttpResponse:
    """The list; a POST keeps the search whose query string it carries."""
    if request.method == "GET":
        return _show(request)
    query = request.POST.get("query", "")
    back = f"{reverse('web:market')}?{query}"
    asked = QueryDict(query, mutable=True)
    asked.setdefault("level", "site")
    form, market = SavedForm(request.POST), SearchForm(asked)
    if not form.is_valid() or not market.is_valid():
        wrong = [f"{name}: {text}" for each in (form, market) for name, texts in each.errors.items() for text in texts]
        return failed(request, MarketError("invalid_request", "; ".join(wrong)), back)
    try:
        made = saved.save(
            actor_of(request), wanted=market.filters(), sort=market.cleaned_data["sort"] or "price", now=timezone.now(),
            **form.cleaned_data,
        )  # fmt: skip
    except MarketError as error:
        return failed(request, error, back)
    return done(request, f"{made.name} is kept. A mail comes when something new fits.", reverse("web:searches"))


def _show(request: HttpRequest) -> HttpResponse:
    actor = actor_of(request)
    rows = listed(request, SavedSearch.objects.owned_by(actor.organization_id).select_related("created_by"), "sav")
    shown = [{"row": row, "words": words(filters.restored(row.filters)), "form": _form(row)} for row in rows]
    return render(request, "searches.html", {"page": rows, "shown": shown})


def _form(row: SavedSearch) -> SavedForm:
    initial = {"name": row.name, "cadence": row.cadence, "pause_minutes": row.pause_minutes}
    return SavedForm(initial=initial, auto_id=f"id_{row.pk}_%s")


def words(wanted: Filters) -> list[str]:
    """The filters, each in a few words."""
    found = [
        " or ".join(getattr(wanted, name)) for name in ("gpu_model", "region", "country", "interconnect", "runtime")
    ]
    if wanted.count:
        found.append(f"{wanted.count} GPUs, {LEVEL_WORDS[wanted.level]}")
    if wanted.kind:
        found.append(kind_words(wanted.kind))
    if wanted.price_max is not None:
        found.append(f"up to {price(wanted.price_max)}")
    if wanted.start:
        until = f" to {wanted.end:%-d %b %Y %H:%M}" if wanted.end else ""
        found.append(f"{wanted.start:%-d %b %Y %H:%M}{until} UTC")
    if wanted.vram_min_mib:
        found.append(f"{-(-wanted.vram_min_mib // 1024)} GB or more")
    if wanted.fabric_gbps_min:
        found.append(f"{wanted.fabric_gbps_min} Gb/s or more")
    if wanted.carbon_max_g is not None:
        found.append(f"up to {wanted.carbon_max_g} g/kWh")
    if wanted.verified:
        found.append("verified")
    if wanted.resale is not None:
        found.append("resold" if wanted.resale else "not resold")
    if wanted.reliability_min is not None:
        found.append(f"reliability from {permille(wanted.reliability_min)}")
    return [text for text in (*found, *map(str, wanted.where)) if text] or ["any offer"]


def _row(request: HttpRequest, public_id: str) -> SavedSearch:
    found: SavedSearch = row_of(SavedSearch.objects.owned_by(actor_of(request).organization_id), "sav", public_id)
    return found


@page(GET="searches:read")
def search(request: HttpRequest, search: str) -> HttpResponse:
    """The market as the search asks for it."""
    row = _row(request, search)
    saved.touch(row, now=timezone.now())
    query = SearchForm.query_of(filters.restored(row.filters), row.sort)
    return HttpResponseRedirect(f"{reverse('web:market')}?{query.urlencode()}")


def _act(request: HttpRequest, act: Any, words: str) -> HttpResponse:
    here = reverse("web:searches")
    try:
        act()
    except MarketError as error:
        return failed(request, error, here)
    return done(request, words, here)


@page(POST="searches:write")
def change(request: HttpRequest, search: str) -> HttpResponse:
    row, form = _row(request, search), SavedForm(request.POST)
    if not form.is_valid():
        wrong = "; ".join(f"{name}: {text}" for name, texts in form.errors.items() for text in texts)
        return failed(request, MarketError("invalid_request", wrong), reverse("web:searches"))
    now = timezone.now()
    return _act(request, lambda: saved.change(actor_of(request), row.pk, dict(form.cleaned_data), now=now), "Changed.")


@page(POST="searches:write")
def pause(request: HttpRequest, search: str) -> HttpResponse:
    row = _row(request, search)
    return _act(request, lambda: saved.pause(actor_of(request), row.pk, now=timezone.now()), f"{row.name} is paused.")


@page(POST="searches:write")
def resume(request: HttpRequest, search: str) -> HttpResponse:
    row = _row(request, search)
    return _act(
        request, lambda: saved.resume(actor_of(request), row.pk, now=timezone.now()), f"{row.name} looks again."
    )


@page(POST="searches:write")
def delete(request: HttpRequest, search: str) -> HttpResponse:
    row = _row(request, search)
    return _act(request, lambda: saved.delete(actor_of(request), row.pk, now=timezone.now()), f"{row.name} is deleted.")


@csrf_exempt
@page(GET="public", POST="public")
def unsubscribe(request: HttpRequest, token: str) -> HttpResponse:
    """From a mail, by whoever has it: a look shows one button, a POST (the button's, or a mail program's) does it.

    No cookie decides anything here, the token does: that is why the POST needs no other.
    """
    if request.method == "GET":
        row = saved.of_token(token)
        return render(
            request, "unsubscribe.html", {"row": row, "over": row is None or row.state != SavedSearch.State.ACTIVE}
        )
    row = saved.unsubscribe(token, now=timezone.now())
    return render(request, "unsubscribe.html", {"row": row, "over": True})


urlpatterns = [
    path("searches", searches, name="searches"),
    path("searches/unsubscribe/<str:token>", unsubscribe, name="search-unsubscribe"),
    path("searches/<str:search>", search, name="search"),
    path("searches/<str:search>/change", change, name="search-change"),
    path("searches/<str:search>/pause", pause, name="search-pause"),
    path("searches/<str:search>/resume", resume, name="search-resume"),
    path("searches/<str:search>/delete", delete, name="search-delete"),
]
