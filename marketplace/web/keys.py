"""API keys. A new key is shown once, in the answer that made it."""

from datetime import timedelta

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.urls import path, reverse
from django.utils import timezone

from marketplace.errors import MarketError
from marketplace.models import ApiKey, Organization
from marketplace.services import accounts
from marketplace.web.base import actor_of, done, listed, page, row_of
from marketplace.web.forms import KeyForm, refuse


@page(GET="keys:read", POST="keys:write")
def keys(request: HttpRequest) -> HttpResponse:
    actor = actor_of(request)
    if request.method == "GET":
        return _show(request, KeyForm(actor=actor))
    form = KeyForm(request.POST, actor=actor)
    if not form.is_valid():
        return _show(request, form, status=400)
    organization = Organization.objects.owned_by(actor.organization_id).get()
    now = timezone.now()
    days = form.cleaned_data["days"]
    try:
        row, token = accounts.issue_key(
            organization, name=form.cleaned_data["name"], scopes=form.cleaned_data["scopes"], actor=actor, now=now,
            expires_at=now + timedelta(days=days) if days else None,
        )  # fmt: skip
    except MarketError as error:
        refuse(form, error)
        return _show(request, form, status=error.kind.status, error=error)
    response = _show(request, KeyForm(actor=actor), token=token, made=row)
    response["Cache-Control"] = "no-store"
    return response


def _show(request: HttpRequest, form: KeyForm, status: int = 200, **more: object) -> HttpResponse:
    rows = ApiKey.objects.owned_by(actor_of(request).organization_id).select_related("created_by")
    context = {"page": listed(request, rows, ApiKey.PREFIX), "form": form, "now": timezone.now(), **more}
    return render(request, "keys.html", context, status=status)


@page(POST="keys:write")
def revoke(request: HttpRequest, key: str) -> HttpResponse:
    row: ApiKey = row_of(ApiKey.objects.owned_by(actor_of(request).organization_id), ApiKey.PREFIX, key)
    accounts.revoke_key(row, actor=actor_of(request), now=timezone.now())
    return done(request, f"{row.name} is revoked; it is refused from now on.", reverse("web:keys"))


urlpatterns = [
    path("keys", keys, name="keys"),
    path("keys/<str:key>/revoke", revoke, name="key-revoke"),
]
