"""Contracts: the organization's own, one with its terms and jobs, and its early end."""

from datetime import datetime

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.urls import path, reverse
from django.utils import timezone

from marketplace.errors import MarketError
from marketplace.models import Contract, Fill, Job, Kind, Maintenance, MaintenanceNotice, Quote, Resale
from marketplace.services import contracts as service
from marketplace.services import maintenance, spot
from marketplace.services.availability import HOLDING
from marketplace.web import spot as spot_pages
from marketplace.web.base import actor_of, done, failed, listed, page, row_of
from marketplace.web.forms import millionths
from marketplace.web.tags import LEVEL_WORDS

SHOWN_JOBS = 10


@page(GET="contracts:read")
def contracts(request: HttpRequest) -> HttpResponse:
    organization = actor_of(request).organization_id
    rows = Contract.objects.owned_by(organization).select_related("listing", "gpu_model", "site")
    live = request.GET.get("show") != "all"
    if live:
        rows = rows.exclude(state__in=("ended", "terminated", "cancelled", "defaulted"))
    open_quotes = Quote.objects.owned_by(organization).filter(state="open", firm_until__gt=timezone.now())
    return render(
        request,
        "contracts.html",
        {
            "page": listed(request, rows, Contract.PREFIX),
            "live": live,
            "quotes": open_quotes.select_related("listing").order_by("-pk")[:5],
        },
    )


def contract_of(request: HttpRequest, public_id: str) -> Contract:
    """One that either side may see, or 404."""
    rows = Contract.objects.visible_to(actor_of(request)).select_related(
        "organization", "operator", "listing", "quote", "site", "gpu_model"
    )
    found: Contract = row_of(rows, Contract.PREFIX, public_id)
    return found


@page(GET="contracts:read")
def contract(request: HttpRequest, contract: str) -> HttpResponse:
    row = contract_of(request, contract)
    actor = actor_of(request)
    now = timezone.now()
    actions = [*service.actions(row, actor), *spot.actions(row, actor)]
    mine = row.organization_id == actor.organization_id
    jobs = Job.objects.owned_by(actor.organization_id).filter(contract=row).order_by("-pk")[:SHOWN_JOBS]
    missing, missing_since = service.missing(row, now)
    return render(
        request,
        "contract.html",
        {
            "row": row,
            "mine": mine,
            "actions": actions,
            "holds": row.kind in HOLDING,
            "leaving": _leaving(row, now) if "terminate" in actions else None,
            "summary": service.sentence(row, now),
            "level_words": LEVEL_WORDS.get(row.terms.get("level", "site"), ""),
            "total_minor": row.terms.get("total_minor"),
            "usable": row.state == Contract.State.ACTIVE and (row.ends_at is None or row.ends_at > now),
            "jobs": jobs if mine else [],
            "sold": row.operator_id == actor.organization_id,
            "asked": row.amendments.filter(kind="price", state="open") if mine else [],
            "missing": missing,
            "missing_since": missing_since,
            "work": _maintenance(row, now) if mine else [],
            "papers": row.documents.only("pk", "title", "created_at").order_by("pk"),
            "spot": spot_pages.shown(row.listing, now) if row.kind == Kind.SPOT else None,
            "limit_form": spot_pages.LimitForm.of(row.limit_price) if "set_limit" in actions else None,
            "offered": Resale.objects.visible_to(actor).filter(contract=row).order_by("-pk")[:20],
            "fill": Fill.objects.visible_to(actor).filter(contract=row).first(),
            "sellable": "submit_job" in actions and row.kind in HOLDING and not row.terminated_at,
            "events": row.events.order_by("-id")[:20],
        },
    )


def _maintenance(row: Contract, now: datetime) -> list[tuple[Maintenance, str]]:
    """Announced work that touches it, and what it means."""
    told = (
        maintenance.concerned_of(row.organization_id)
        .filter(contract=row, maintenance__state__in=Maintenance.LIVE, maintenance__ends_at__gt=now)
        .exclude(what=MaintenanceNotice.What.CANCELLED)
    )
    rows = told.select_related("maintenance", "contract").order_by("maintenance__starts_at")
    return [(notice.maintenance, maintenance.sentence(notice)) for notice in rows]


def _leaving(row: Contract, now: datetime) -> service.Leaving | str:
    """What an early end would mean now, or why there is none."""
    try:
        return service.leaving(row, now)
    except MarketError as error:
        return error.detail


@page(POST="contracts:write")
def terminate(request: HttpRequest, contract: str) -> HttpResponse:
    row = contract_of(request, contract)
    here = reverse("web:contract", args=[row.public_id])
    try:
        fresh = service.terminate(actor_of(request), row, now=timezone.now())
    except MarketError as error:
        return failed(request, error, here)
    until = (
        f" It ends {fresh.ends_at:%-d %b %Y %H:%M} UTC."
        if fresh.state == Contract.State.ACTIVE and fresh.ends_at
        else ""
    )
    return done(request, f"Terminated by its rule.{until}", here)


@page(POST="contracts:write")
def set_limit(request: HttpRequest, contract: str) -> HttpResponse:
    row = contract_of(request, contract)
    here = reverse("web:contract", args=[row.public_id])
    form = spot_pages.LimitForm(request.POST)
    if not form.is_valid():
        words = " ".join(str(e) for each in form.errors.values() for e in each)
        return failed(request, MarketError("invalid_request", words), here)
    try:
        limit = millionths(form.cleaned_data["limit_price"]) or 0
        spot.set_limit(actor_of(request), row, limit, now=timezone.now(), expected=form.cleaned_data["seen"])
    except MarketError as error:
        return failed(request, error, here)
    return done(request, "The limit counts from the next auction on.", here)


urlpatterns = [
    path("contracts", contracts, name="contracts"),
    path("contracts/<str:contract>", contract, name="contract"),
    path("contracts/<str:contract>/limit", set_limit, name="contract-limit"),
    path("contracts/<str:contract>/terminate", terminate, name="contract-terminate"),
]
