"""Organizations: create one, act in another one of yours, join one by invitation."""

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.urls import path, reverse
from django.utils import timezone

from marketplace import actors, ids
from marketplace.errors import MarketError
from marketplace.services import accounts
from marketplace.tenancy import ANONYMOUS
from marketplace.web.base import back_to, done, has_offers, page, person
from marketplace.web.forms import JoinForm, OrganizationForm, refuse


@page(GET="person", POST="person")
def new(request: HttpRequest) -> HttpResponse:
    go_on = back_to(request, "")
    if request.method == "GET":
        mode = "live" if has_offers(ANONYMOUS) else "test"
        return render(
            request, "organization_new.html", {"form": OrganizationForm(initial={"mode": mode}), "next": go_on}
        )
    form = OrganizationForm(request.POST)
    if not form.is_valid():
        return render(request, "organization_new.html", {"form": form, "next": go_on}, status=400)
    asked = form.cleaned_data
    made = accounts.create_organization(
        person(request), name=asked["name"], country=asked["country"], currency=asked["currency"],
        livemode=asked["mode"] == "live", now=timezone.now(),
    )  # fmt: skip
    request.session[actors.SESSION_KEY] = made.pk
    words = f"{made.name} is ready." if go_on else f"{made.name} is ready. Next, add a card, or look around the market."
    return done(request, words, go_on or reverse("web:card"))


@page(POST="person")
def switch(request: HttpRequest, organization: str) -> HttpResponse:
    pk = ids.decode("org", organization) or 0
    found = accounts.switch_organization(person(request), pk, session=request.session, now=timezone.now())
    return done(request, f"You are acting in {found.organization.name} now.", reverse("web:market"))


@page(GET="person", POST="person")
def join(request: HttpRequest) -> HttpResponse:
    if request.method == "GET":
        form = JoinForm(initial={"token": request.GET.get("token", "")})
        return render(request, "join.html", {"form": form})
    form = JoinForm(request.POST)
    if not form.is_valid():
        return render(request, "join.html", {"form": form}, status=400)
    now = timezone.now()
    try:
        made = accounts.accept_invitation(person(request), form.cleaned_data["token"].strip(), now=now)
    except MarketError as error:
        refuse(form, error)
        return render(request, "join.html", {"form": form, "error": error}, status=error.kind.status)
    request.session[actors.SESSION_KEY] = made.organization_id
    return done(request, f"Welcome to {made.organization.name}.", reverse("web:market"))


urlpatterns = [
    path("organizations/new", new, name="organization-new"),
    path("organizations/<str:organization>/switch", switch, name="organization-switch"),
    path("join", join, name="join"),
]
