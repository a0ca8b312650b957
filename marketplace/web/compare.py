"""Two to four offers side by side: what each costs for what was searched for, what of it is free, and its terms."""

from datetime import datetime
from typing import Any

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.urls import path, reverse
from django.utils import timezone

from marketplace import ids
from marketplace.models import Kind, Listing
from marketplace.services import availability, host_shape, price_tiers, search, verifications
from marketplace.services.availability import HOLDING, Stock
from marketplace.services.price_tiers import Asked, Option
from marketplace.web import market
from marketplace.web.base import page, visitor
from marketplace.web.search_forms import SearchForm
from marketplace.web.tags import LEVEL_WORDS, gib, hours, kind_words, permille, price, span

LEAST, MOST = 2, 4
NO = "no"


@page(GET="public")
def compare(request: HttpRequest) -> HttpResponse:
    now = timezone.now()
    form = SearchForm(request.GET)
    wanted = form.filters() if form.is_valid() else search.Filters()
    rows = _chosen(request)
    context: dict[str, Any] = {"rows": rows, "missing": len(_asked(request)) - len(rows), "most": MOST}
    if LEAST <= len(rows) <= MOST:
        kind, level = wanted.stock_kind, wanted.level
        stock = availability.stock(
            rows, now=now, level=level, kind=kind, starts_at=wanted.start, ends_at=wanted.end
        )  # fmt: skip
        told = [_told(row, stock[row.pk], wanted, now) for row in rows]
        names = [name for name in told[0] if any(each[name] for each in told)]
        titles = [row.title for row in rows]
        context["facts"] = [
            (name, list(zip(titles, (each[name] or NO for each in told), strict=True))) for name in names
        ]
        links = [reverse("web:quote-new", args=[row.public_id]) + market.carried(row, wanted, now)[0] for row in rows]
        context["quotes"] = list(zip(titles, links, strict=True))
        context["wanted"] = wanted
    return render(request, "compare.html", context)


def _asked(request: HttpRequest) -> list[str]:
    return list(dict.fromkeys(request.GET.getlist("listing")))


def _chosen(request: HttpRequest) -> list[Listing]:
    """What is on offer of that which is named, in its order."""
    wanted = [pk for text in _asked(request)[: 2 * MOST] if (pk := ids.decode(Listing.PREFIX, text)) is not None]
    found = search.on_offer(visitor(request)).select_related(
        "site__cell", "gpu_model", "organization", "reliability", "resale"
    )
    rows = found.in_bulk(wanted)
    return [rows[pk] for pk in wanted if pk in rows]


def _told(row: Listing, stock: Stock, wanted: search.Filters, now: datetime) -> dict[str, str]:
    """What is told of one offer, by name; nothing where it has none. The names are the same for all."""
    site, model = row.site, row.gpu_model
    verified, hosts, _ = verifications.of_listing(row)
    inside = f" in {LEVEL_WORDS[wanted.level]}" if wanted.level != "site" else ""
    return {
        "Operator": row.organization.name,
        "Site": f"{site.name}, {site.region} ({site.country})",
        "GPU": f"{model.name}, {gib(model.vram_mib)}" if model else "mixed",
        "Free in the window" if wanted.start else "Free now": f"{stock.gpus} of {stock.total}{inside}",
        **_prices(row, wanted.asked(now)),
        "Each host": host_shape.words(host_shape.of_listing(row)) or NO,
        "Interconnect": " ".join(
            filter(None, (row.interconnect, f"{row.fabric_gbps} Gb/s" if row.fabric_gbps else ""))
        ),
        "Isolation": row.runtime,
        "Reliability": permille(score.score_permille) if (score := getattr(row, "reliability", None)) else "new",
        "Verified hosts": f"{verified} of {hosts}",
        "Carbon": f"{site.carbon_g_per_kwh} g CO₂/kWh" if site.carbon_g_per_kwh is not None else "",
        "Renewable": permille(site.renewable_permille) if site.renewable_permille is not None else "",
        "Smallest block": f"{row.min_gpus} GPU{'s' if row.min_gpus > 1 else ''}",
        **_terms(row),
    }


def _prices(row: Listing, asked: Asked) -> dict[str, str]:
    found = price_tiers.all_chosen(row, asked)
    return {
        f"{kind_words(kind)}{' floor' if kind == Kind.SPOT else ''}, per GPU-hour": _price(row, kind, found.get(kind))
        for kind in Kind.values
    }


def _price(row: Listing, kind: str, found: Option | None) -> str:
    if found is None:
        return ""
    asks = [f"{permille(found.upfront_permille)} at signing"] if found.upfront_permille else []
    if kind == Kind.FLEXIBLE:
        asks.append(f"{found.flexible_hours_per_month} h of curtailment a month")
    least = min(price_tiers.options(row, kind))
    below = f"from {price(least.price, row.currency)} on other terms" if least.price < found.price else ""
    return "; ".join([price(found.price, row.currency), *asks, *filter(None, [below])])


def _terms(row: Listing) -> dict[str, str]:
    holds = any(row.price_of(kind) is not None for kind in HOLDING)
    resold = row.resale if row.is_resale else None
    terms = f"{hours(row.min_term_hours)} to {row.max_term_days} days" if holds else ""
    if resold:
        terms = f"{_at(resold.starts_at)} to {_at(resold.ends_at)}, as a whole"
    leaves = "firm jobs stay"
    if row.emergency_notice_s is not None:
        leaves = f"leave last, {span(row.emergency_notice_s)} notice"
    return {
        "Terms": terms,
        "On offer from": "" if resold else _at(row.available_from),
        "On offer until": "" if resold else _at(row.available_until),
        "Spot notice": span(row.eviction_notice_s) if row.spot_floor is not None else "",
        "Grid emergency": leaves,
        "Maintenance borne": f"{row.maintenance_hours_per_month} h a month" if holds else "",
    }


def _at(at: datetime | None) -> str:
    return f"{at:%-d %b %Y %H:%M}" if at else ""


urlpatterns = [path("compare", compare, name="compare")]
