"""The two sites' doors: who may enter, and as whom they act."""

from collections.abc import Callable
from typing import Any

from django.contrib.auth import logout
from django.core.exceptions import PermissionDenied
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.shortcuts import redirect
from django.urls import path, reverse
from django.utils.http import urlencode
from unfold.sites import UnfoldAdminSite

from marketplace.actors import SESSION_KEY, member
from marketplace.models import Membership
from marketplace.tenancy import ANONYMOUS, Actor


def operator_actor(request: HttpRequest) -> Actor:
    """The person in an operator's organization: the one chosen in the session where that is an operator, else the oldest.

    ANONYMOUS for everybody else, our own people included.
    """
    known: Actor | None = getattr(request, "_operator_actor", None)
    if known is None:
        known = _operator_actor(request)
        request._operator_actor = known  # type: ignore[attr-defined] # noqa: SLF001 - one query a request
    return known


def _operator_actor(request: HttpRequest) -> Actor:
    user = request.user
    if not user.is_authenticated or not user.is_active or user.is_staff:
        return ANONYMOUS
    mine = list(
        Membership.objects.filter(user=user, organization__is_operator=True)
        .select_related("organization")
        .order_by("created_at", "id")
    )
    chosen = request.session.get(SESSION_KEY)
    membership = next((m for m in mine if m.organization_id == chosen), mine[0] if mine else None)
    if membership is None:
        return ANONYMOUS
    request.operator_organization = membership.organization  # type: ignore[attr-defined]
    return member(user, membership)


def staff_actor(request: HttpRequest) -> Actor:
    """One of our own people; ANONYMOUS for everybody else."""
    user = request.user
    if not user.is_authenticated or not user.is_active or not user.is_staff:
        return ANONYMOUS
    return Actor(kind="staff", user_id=user.pk, label=user.email)


class Door(UnfoldAdminSite):
    """Log-in, log-out and passwords are the market's own pages; inside, `actor_of` says who acts."""

    actor_of: Callable[[HttpRequest], Actor]
    index_title = "Overview"

    def has_permission(self, request: HttpRequest) -> bool:
        return self.actor_of(request) is not ANONYMOUS

    def refusal(self) -> Exception:
        """What a person meets who is signed in and may not enter; here, as if there were nothing."""
        return Http404("There is no such page.")

    def admin_view(self, view: Any, cacheable: bool = False) -> Any:
        """Who is signed in and has no business here is refused, rather than sent to log in again."""
        inner = super().admin_view(view, cacheable)

        def checked(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
            if request.user.is_authenticated and not self.has_permission(request):
                raise self.refusal()
            answer: HttpResponse = inner(request, *args, **kwargs)
            return answer

        return checked

    def login(self, request: HttpRequest, extra_context: dict[str, Any] | None = None) -> HttpResponse:  # noqa: ARG002
        if request.user.is_authenticated:
            if not self.has_permission(request):
                raise self.refusal()
            return redirect(f"{self.name}:index")
        onward = request.GET.get("next") or reverse(f"{self.name}:index")
        return HttpResponseRedirect(f"{reverse('account_login')}?{urlencode({'next': onward})}")

    def logout(self, request: HttpRequest, extra_context: dict[str, Any] | None = None) -> HttpResponse:  # noqa: ARG002
        if request.method == "POST":
            logout(request)
        return redirect("account_login")

    def password_change(self, request: HttpRequest, extra_context: dict[str, Any] | None = None) -> HttpResponse:  # noqa: ARG002
        return redirect("account_change_password")


class OperatorDoor(Door):
    """For members of an operator's organization."""

    settings_name = "UNFOLD_OPERATOR"
    index_template = "desk/operator.html"
    actor_of = staticmethod(operator_actor)

    def refusal(self) -> Exception:
        return PermissionDenied("These pages are for members of an operator's organization.")

    def index(self, request: HttpRequest, extra_context: dict[str, Any] | None = None) -> Any:
        from marketplace.admin import dashboard, freeze

        shown = dashboard.operator(self.actor_of(request), request.GET) | freeze.shown(request)
        return super().index(request, {**(extra_context or {}), **shown})


class StaffDoor(Door):
    """For our own people; to everybody else it does not exist."""

    settings_name = "UNFOLD_STAFF"
    index_template = "desk/staff.html"
    actor_of = staticmethod(staff_actor)

    def index(self, request: HttpRequest, extra_context: dict[str, Any] | None = None) -> Any:
        from marketplace.admin import dashboard, freeze

        return super().index(request, {**(extra_context or {}), **dashboard.staff(), **freeze.shown(request)})

    def get_urls(self) -> list[Any]:
        from marketplace.admin import freeze

        return [path("power-freeze/", self.admin_view(freeze.press), name="power-freeze"), *super().get_urls()]


operator_site = OperatorDoor(name="operator")
staff_site = StaffDoor(name="staff")
for door in (operator_site, staff_site):
    door.disable_action("delete_selected")
