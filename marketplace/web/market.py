"""The market: search with facets, and one listing with its terms, prices and calendar."""

from datetime import datetime, timedelta
from typing import Any
from urllib.parse import urlencode

from django.db.models import Min, Q, Sum
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.urls import path, reverse
from django.utils import timezone
from django.utils.cache import patch_vary_headers
from django.utils.safestring import SafeString

from marketplace.errors import MarketError
from marketplace.models import Host, Listing
from marketplace.services import availability, host_shape, maintenance, price_tiers, search
from marketplace.services.availability import HOLDING
from marketplace.services.price_tiers import Option
from marketplace.tenancy import Actor
from marketplace.web import calendars, charts, spot, trust
from marketplace.web.base import iso_minute, page, row_of, visitor
from marketplace.web.search_forms import SavedForm, SearchForm
from marketplace.web.tags import kind_words
from scheduler.core.capacity import LEVELS

PAGE_SIZE = 12
FILTER_WORDS = {
    "gpu_model": "GPU model", "vram_min_mib": "GPU memory", "price_max": "price", "count": "number of GPUs", "end": "term",
    "upfront_max_permille": "due at signing", "flexible_hours_max": "curtailment",
    "fabric_gbps_min": "fabric speed", "carbon_max_g": "carbon", "reliability_min": "reliability", "kind": "contract",
    "verified": "verified", "resale": "who sells", "availability": "window and number of GPUs",
}  # fmt: skip
ASKED = (
    "kind",
    "count",
    "level",
    "start",
    "end",
    "upfront_max",
    "flexible_hours_max",
)  # what goes along to the comparison
PARAMETER = {"vram_min_mib": "vram_min", "upfront_max_permille": "upfront_max"}
FACET_WORDS = {
    "gpu_model": "GPU", "region": "Region", "country": "Country", "interconnect": "Interconnect", "runtime": "Isolation",
}  # fmt: skip


@page(GET="public")
def market(request: HttpRequest) -> HttpResponse:
    now = timezone.now()
    actor = visitor(request)
    asked = request.GET.copy()
    asked.setdefault("level", "site")
    form = SearchForm(asked)
    found: search.Result | None = None
    wanted: search.Filters | None = None
    error: MarketError | None = None
    try:
        if form.is_valid():
            wanted = form.filters()
            found = search.search(
                actor, wanted, now=now, sort=form.cleaned_data["sort"] or "price", limit=PAGE_SIZE,
                cursor=request.GET.get("cursor") or None, with_facets=True,
            )  # fmt: skip
    except MarketError as refusal:
        error = refusal
    context = {
        "form": form,
        "save": SavedForm(initial={"cadence": "at_once", "pause_minutes": 60}, auto_id="save_%s"),
        "found": found,
        "error": error,
        "offers": [_offer(f, actor, wanted, now) for f in found.rows] if found and wanted else [],
        "comparable": bool(found and len(found.rows) > 1),
        "facets": _facets(request, found.facets) if found else [],
        "nothing": _nothing(request, found.nothing) if found and found.nothing else None,
        "older": _older(request, found),
        "filtered": any(v for k, v in request.GET.lists() if k not in {"sort", "cursor", "level", "view"} and any(v)),
        "asked": [(name, value) for name in ASKED for value in request.GET.getlist(name) if value],
        "view": request.GET.get("view") if request.GET.get("view") in {"table", "calendar"} else "",
    }
    if found and wanted and context["view"] == "calendar":
        context["free"] = calendars.market_shown(actor, wanted, request.GET, now)
    if getattr(request, "htmx", False) and request.htmx.target == "results":  # type: ignore[attr-defined]
        response = render(request, "part/results.html", context)
    else:
        response = render(request, "market.html", {**context, "hero": _hero(actor)})
    return varied(response)


def varied(response: HttpResponse) -> HttpResponse:
    """One address, two answers: the page, and a fragment of it for htmx."""
    patch_vary_headers(response, ["HX-Request", "HX-Target"])
    return response


def _hero(actor: Actor) -> dict[str, Any] | None:
    """What the market has, for who is new here."""
    if actor.organization_id is not None:
        return None
    in_use = ~Q(hosts__state=Host.State.RETIRED)
    found: dict[str, Any] = search.on_offer(actor).aggregate(
        on_demand=Min("on_demand_price"), spot=Min("spot_floor"), gpus=Sum("hosts__gpu_count", filter=in_use)
    )
    return found


def _offer(found: search.Found, actor: Actor, wanted: search.Filters, now: datetime) -> dict[str, Any]:
    row, stock = found.listing, found.stock
    quote, calendar = carried(row, wanted, now)
    return {
        "quote": f"{reverse('web:quote-new', args=[row.public_id])}{quote}",
        "terms": f"{reverse('web:listing', args=[row.public_id])}{calendar}",
        "row": row,
        "stock": stock,
        "checked": found.checked,
        "meter": _meter(stock),
        "prices": _prices(found.prices),
        "of": {kind: option.price for kind, option in found.prices.items()},
        "cheaper": _tiered(found),
        "mine": actor.organization_id == row.organization_id,
    }


def carried(row: Listing, wanted: search.Filters, now: datetime) -> tuple[str, str]:
    """What was searched for, as the query strings that fill in the quote form and the calendar of an offer."""
    kind = wanted.kind if wanted.kind and row.price_of(wanted.kind) is not None else None
    block = {"level": wanted.level} if wanted.count is not None else {}
    start, end = wanted.start, wanted.end
    if row.is_resale or not end or not start or start <= now or (kind and kind not in HOLDING):
        start = end = None
    quote = {
        "kind": kind,
        "gpu_count": wanted.count,
        **block,
        "starts_at": iso_minute(start),
        "ends_at": iso_minute(end),
        **price_tiers.limits(wanted),
    }
    days = (round((end - start) / timedelta(days=1)) or None) if start and end else None
    shown = {"count": wanted.count, **block, "days": days, "start": f"{start:%F}" if start else ""}
    return _query(quote), _query(shown)


def _query(given: dict[str, Any]) -> str:
    """`?a=1&b=2` of what has a value, or nothing."""
    text = urlencode({name: value for name, value in given.items() if value not in {None, ""}})
    return f"?{text}" if text else ""


def _prices(found: dict[str, Option]) -> list[tuple[str, str, int]]:
    return [(kind, kind_words(kind), option.price) for kind, option in found.items()]


def _tiers(row: Listing) -> list[tuple[str, Option]]:
    """(kind, price) of every offer that holds capacity, where there is more than the plain one."""
    return (
        [(kind_words(kind), o) for kind in HOLDING for o in sorted(price_tiers.options(row, kind))]
        if row.price_tiers
        else []
    )


def _tiered(found: search.Found) -> bool:
    """Another term, or more due at signing or borne, would cost less than what is shown."""
    return any(
        min(price_tiers.options(found.listing, kind)).price < option.price for kind, option in found.prices.items()
    )


def _facets(request: HttpRequest, facets: dict[str, dict[str, int]]) -> list[dict[str, Any]]:
    """Checkboxes: each value with its offers; chosen ones stay, also with none left."""
    shown = []
    for name, words in FACET_WORDS.items():
        chosen = [v for v in request.GET.getlist(name) if v]
        values = {**dict.fromkeys(chosen, 0), **facets.get(name, {})}
        if values and (len(values) > 1 or chosen):
            shown.append(
                {
                    "name": name,
                    "words": words,
                    "values": [(value, count, value in chosen) for value, count in list(values.items())[:12]],
                }
            )
    return shown


def _nothing(request: HttpRequest, why: dict[str, Any]) -> dict[str, Any]:
    """Which filter removed the last offers, and links that take one filter off."""
    removed = why["removed_by"]
    windowed = request.GET.get("start") or request.GET.get("end")
    without = []
    for name, offers in why["without"].items():
        query = request.GET.copy()
        query.pop(PARAMETER.get(name, name), None)
        query.pop("cursor", None)
        without.append((FILTER_WORDS.get(name, name), offers, query.urlencode()))
    largest = why.get("largest")
    fewer = None
    if largest:
        query = request.GET.copy()
        query["count"] = str(largest)
        fewer = (largest, query.urlencode())
    return {
        "empty": removed is None,
        "removed": FILTER_WORDS.get(removed or "", removed)
        if windowed or removed != "availability"
        else "number of GPUs",
        "left_before": why["left_before"],
        "without": without,
        "fewer": fewer,
    }


def _older(request: HttpRequest, found: search.Result | None) -> str | None:
    if found is None or found.cursor is None:
        return None
    query = request.GET.copy()
    query["cursor"] = found.cursor
    return query.urlencode()


# --- one listing
def listing_of(request: HttpRequest, public_id: str) -> Listing:
    """One that the visitor may see, or 404."""
    rows = Listing.objects.visible_to(visitor(request)).select_related(
        "site__cell", "gpu_model", "organization__reliability", "reliability"
    )
    found: Listing = row_of(rows, Listing.PREFIX, public_id)
    return found


@page(GET="public")
def listing(request: HttpRequest, listing: str) -> HttpResponse:
    row = listing_of(request, listing)
    now = timezone.now()
    loaded = availability.load([row], now)
    stock = {level: availability.stock([row], now=now, level=level, market=loaded)[row.pk] for level in LEVELS}
    free = calendars.shown(row, request.GET, now, stock["site"].total, loaded)
    if getattr(request, "htmx", False) and request.htmx.target == "free-days":  # type: ignore[attr-defined]
        return varied(render(request, "part/calendar.html", {"row": row, "free": free}))
    host = host_shape.of_listing(row)
    response = render(
        request,
        "listing.html",
        {
            "row": row,
            "stock": stock,
            "now": stock["site"],
            "free": free,
            "host": host,
            "meter": _meter(stock["site"]),
            "prices": _prices(price_tiers.all_chosen(row)),
            "tiers": _tiers(row),
            "spot": spot.shown(row, now) if row.spot_floor is not None else None,
            "open": row.state == Listing.State.PUBLISHED,
            **trust.of(row),
            "work": maintenance.of_listing(row, now),
        },
    )
    return varied(response)


def _meter(stock: availability.Stock) -> SafeString:
    return charts.meter(stock.gpus, stock.total, label=f"{stock.gpus} of {stock.total} GPUs free")


urlpatterns = [
    path("", market, name="market"),
    path("listings/<str:listing>", listing, name="listing"),
]
