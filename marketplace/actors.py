"""Who is behind a browser's request: the person, in the organization chosen in the session."""

from collections.abc import Callable
from typing import Any

from django.http import HttpRequest, HttpResponse

from marketplace.models import Membership, User
from marketplace.tenancy import ANONYMOUS, Actor

SESSION_KEY = "organization"


def membership_of(request: HttpRequest) -> Membership | None:
    """The membership chosen in the session, else the person's oldest one; None without any."""
    mine = Membership.objects.filter(user=request.user.pk).select_related("organization").order_by("created_at", "id")
    chosen = request.session.get(SESSION_KEY)
    found = mine.filter(organization_id=chosen).first() if chosen else None
    return found or mine.first()


def actor_of(request: HttpRequest) -> Actor:
    user = request.user
    if not user.is_authenticated:
        return ANONYMOUS
    membership = membership_of(request)
    if membership is None:
        return Actor(kind="user", user_id=user.pk, label=user.email)
    return member(user, membership)


def member(user: User, membership: Membership) -> Actor:
    """A person in one organization."""
    return Actor(
        kind="user",
        organization_id=membership.organization_id,
        role=membership.role,
        user_id=user.pk,
        livemode=membership.organization.livemode,
        label=user.email,
    )


class ActorMiddleware:
    """Sets `request.actor`, lazily: pages that do not ask who it is cost no query."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        from django.utils.functional import SimpleLazyObject

        request.actor = SimpleLazyObject(lambda: actor_of(request))  # type: ignore[attr-defined]
        return self.get_response(request)


def context(request: HttpRequest) -> dict[str, Any]:
    """What every page shows: who is here and which organizations they may switch to."""
    if not getattr(request, "user", None) or not request.user.is_authenticated:
        return {"actor": ANONYMOUS, "memberships": []}
    memberships = (
        Membership.objects.filter(user=request.user).select_related("organization").order_by("organization__name")
    )
    return {"actor": request.actor, "memberships": memberships}  # type: ignore[attr-defined]
