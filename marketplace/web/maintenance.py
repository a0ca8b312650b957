"""Maintenance that touches the organization's contracts: the list, one with what it means, and calendars for other programs."""

from collections.abc import Iterable

from django import forms
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import render
from django.urls import path, reverse
from django.utils import timezone

from marketplace.errors import MarketError
from marketplace.models import CalendarFeed, Maintenance, MaintenanceNotice
from marketplace.services import maintenance as service
from marketplace.services.drains import CATEGORIES
from marketplace.services.maintenance import feeds
from marketplace.web.base import actor_of, done, listed, page, row_of
from marketplace.web.forms import refuse


class FeedForm(forms.Form):
    name = forms.CharField(max_length=60, label="Who reads it", help_text="Such as: the team's calendar.")


@page(GET="maintenance:read", POST="maintenance:write")
def maintenances(request: HttpRequest) -> HttpResponse:
    if request.method == "GET":
        return _show(request, FeedForm())
    form = FeedForm(request.POST)
    if not form.is_valid():
        return _show(request, form, status=400)
    try:
        made, token = feeds.issue(actor_of(request), form.cleaned_data["name"], now=timezone.now())
    except MarketError as error:
        refuse(form, error)
        return _show(request, form, status=error.kind.status, error=error)
    response = _show(request, FeedForm(), made=made, address=feeds.address(token))
    response["Cache-Control"] = "no-store"
    return response


def _show(request: HttpRequest, form: FeedForm, status: int = 200, **more: object) -> HttpResponse:
    organization = actor_of(request).organization_id
    assert organization is not None
    told = service.concerned_of(organization)
    rows = (
        Maintenance.objects.visible_to(actor_of(request))
        .filter(pk__in=told.values("maintenance"))
        .select_related("site")
    )
    coming = request.GET.get("show") != "all"
    if coming:
        rows = rows.filter(state__in=Maintenance.LIVE)
    found = listed(request, rows, Maintenance.PREFIX)
    live = CalendarFeed.objects.owned_by(organization).filter(revoked_at=None).order_by("-pk")
    context = {
        "page": found,
        "rows": [(row, CATEGORIES[row.category], notices) for row, notices in _with_notices(found, organization)],
        "coming": coming,
        "feeds": live,
        "form": form,
        **more,
    }
    return render(request, "maintenances.html", context, status=status)


def _with_notices(rows: Iterable[Maintenance], organization: int) -> list[tuple[Maintenance, list[MaintenanceNotice]]]:
    wanted = list(rows)
    told = service.concerned_of(organization).filter(maintenance__in=wanted).select_related("contract", "maintenance")
    by_row: dict[int, list[MaintenanceNotice]] = {row.pk: [] for row in wanted}
    for notice in told.order_by("contract_id"):
        by_row[notice.maintenance_id].append(notice)
    return [(row, by_row[row.pk]) for row in wanted]


@page(GET="maintenance:read")
def maintenance(request: HttpRequest, work: str) -> HttpResponse:
    actor = actor_of(request)
    rows = Maintenance.objects.visible_to(actor).select_related("site")
    row: Maintenance = row_of(rows, Maintenance.PREFIX, work)
    organization = actor.organization_id
    assert organization is not None
    ((_, notices),) = _with_notices([row], organization)
    context = {
        "row": row,
        "category": CATEGORIES[row.category],
        "touched": [(notice.contract, service.sentence(notice)) for notice in notices],
    }
    return render(request, "maintenance.html", context)


@page(POST="maintenance:write")
def revoke(request: HttpRequest, feed: str) -> HttpResponse:
    row: CalendarFeed = row_of(
        CalendarFeed.objects.owned_by(actor_of(request).organization_id), CalendarFeed.PREFIX, feed
    )
    feeds.revoke(actor_of(request), row, now=timezone.now())
    return done(request, f"The address of {row.name} answers nothing from now on.", reverse("web:maintenances"))


@page(GET="public")
def calendar(request: HttpRequest, token: str) -> HttpResponse:  # noqa: ARG001
    text = feeds.read(token, now=timezone.now())
    if text is None:
        raise Http404
    return HttpResponse(
        text, content_type="text/calendar; charset=utf-8",
        headers={"Cache-Control": "private, no-store", "Content-Disposition": 'inline; filename="tailrace-maintenance.ics"'},
    )  # fmt: skip


urlpatterns = [
    path("maintenance", maintenances, name="maintenances"),
    path("maintenance/<str:work>", maintenance, name="maintenance"),
    path("calendar-feeds/<str:feed>/revoke", revoke, name="calendar-feed-revoke"),
    path("calendar/<str:token>.ics", calendar, name="calendar"),
]
