"""The team: members and their roles, invitations. Links of invitations are shown once."""

from django.conf import settings
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.urls import path, reverse
from django.utils import timezone

from marketplace.errors import MarketError
from marketplace.models import Invitation, Membership, Organization
from marketplace.services import accounts
from marketplace.tenancy import ROLES
from marketplace.web.base import actor_of, done, failed, listed, page, row_of
from marketplace.web.forms import InviteForm, refuse


@page(GET="members:read")
def team(request: HttpRequest) -> HttpResponse:
    return _show(request, InviteForm())


def _show(request: HttpRequest, form: InviteForm, status: int = 200, **more: object) -> HttpResponse:
    actor = actor_of(request)
    members = Membership.objects.owned_by(actor.organization_id).select_related("user")
    waiting = Invitation.objects.owned_by(actor.organization_id).filter(accepted_at=None, expires_at__gt=timezone.now())
    context = {
        "organization": _organization(request),
        "page": listed(request, members, Membership.PREFIX, size=50),
        "invitations": waiting.order_by("-pk")[:50],
        "form": form,
        "roles": ROLES if actor.role == "owner" else [r for r in ROLES if r != "owner"],
        **more,
    }
    return render(request, "team.html", context, status=status)


def _organization(request: HttpRequest) -> Organization:
    found: Organization = Organization.objects.owned_by(actor_of(request).organization_id).get()
    return found


@page(POST="members:write")
def invite(request: HttpRequest) -> HttpResponse:
    form = InviteForm(request.POST)
    if not form.is_valid():
        return _show(request, form, status=400)
    try:
        row, token = accounts.invite(
            _organization(request), email=form.cleaned_data["email"], role=form.cleaned_data["role"],
            actor=actor_of(request), now=timezone.now(),
        )  # fmt: skip
    except MarketError as error:
        refuse(form, error)
        return _show(request, form, status=error.kind.status, error=error)
    link = f"{settings.PUBLIC_URL}{reverse('web:join')}?token={token}"
    response = _show(request, InviteForm(), link=link, invited=row)
    response["Cache-Control"] = "no-store"
    return response


def _member(request: HttpRequest, public_id: str) -> Membership:
    rows = Membership.objects.owned_by(actor_of(request).organization_id).select_related("user")
    found: Membership = row_of(rows, Membership.PREFIX, public_id)
    return found


@page(POST="members:write")
def role(request: HttpRequest, member: str) -> HttpResponse:
    row = _member(request, member)
    try:
        accounts.change_role(row, request.POST.get("role", ""), actor=actor_of(request), now=timezone.now())
    except MarketError as error:
        return failed(request, error, reverse("web:team"))
    return done(request, f"{row.user.email} is {request.POST['role']} now.", reverse("web:team"))


@page(POST="members:write")
def remove(request: HttpRequest, member: str) -> HttpResponse:
    row = _member(request, member)
    try:
        accounts.remove_member(row, actor=actor_of(request), now=timezone.now())
    except MarketError as error:
        return failed(request, error, reverse("web:team"))
    return done(request, f"{row.user.email} is no longer a member.", reverse("web:team"))


@page(POST="members:write")
def withdraw(request: HttpRequest, invitation: str) -> HttpResponse:
    rows = Invitation.objects.owned_by(actor_of(request).organization_id)
    row: Invitation = row_of(rows, Invitation.PREFIX, invitation)
    try:
        accounts.withdraw_invitation(row, actor=actor_of(request), now=timezone.now())
    except MarketError as error:
        return failed(request, error, reverse("web:team"))
    return done(request, f"The invitation of {row.email} is withdrawn.", reverse("web:team"))


urlpatterns = [
    path("team", team, name="team"),
    path("team/invite", invite, name="team-invite"),
    path("team/<str:member>/role", role, name="team-role"),
    path("team/<str:member>/remove", remove, name="team-remove"),
    path("team/invitations/<str:invitation>/withdraw", withdraw, name="team-withdraw"),
]
