"""What every page stands on: who may open it, whose rows it may show, how a refusal looks, how a list goes on.

A view names its action per method: `@page(GET="jobs:read", POST="jobs:write")`. Besides the actions of tenancy.ACTIONS there are
"public" (anybody) and "person" (any signed-in person, with or without an organization).
"""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from datetime import datetime
from functools import wraps
from typing import Any
from urllib.parse import urlencode

from django.contrib import messages
from django.contrib.auth.views import redirect_to_login
from django.db import InterfaceError, OperationalError
from django.db.models import QuerySet
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseNotAllowed, HttpResponseRedirect
from django.shortcuts import redirect, render
from django.template.loader import render_to_string
from django.urls import reverse
from django.utils.http import url_has_allowed_host_and_scheme

from marketplace import ids
from marketplace.errors import MarketError
from marketplace.models import Listing, User
from marketplace.tenancy import Actor

View = Callable[..., HttpResponse]
PAGE_SIZE = 25


def page(**actions: str) -> Callable[[View], View]:
    """Opens a view to those who may; anybody else is sent where they can help themselves, or gets a refusal in words."""

    def decorate(view: View) -> View:
        @wraps(view)
        def guarded(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
            action = actions.get("GET" if request.method == "HEAD" else request.method or "")
            if action is None:
                return HttpResponseNotAllowed(sorted(actions))
            try:
                return _turned_away(request, action) or view(request, *args, **kwargs)
            except MarketError as error:
                return refused(request, error)
            except (OperationalError, InterfaceError):
                return HttpResponse(render_to_string("503.html"), status=503, headers={"Retry-After": "5"})

        guarded.actions = actions  # type: ignore[attr-defined]
        return guarded

    return decorate


def _turned_away(request: HttpRequest, action: str) -> HttpResponse | None:
    """Where somebody goes who cannot open the page yet; MarketError("forbidden") where the role never may."""
    if action == "public":
        return None
    actor = actor_of(request)
    if not request.user.is_authenticated:
        return _htmx_aware(request, redirect_to_login(_page_of(request)))
    if action == "person":
        return None
    if actor.organization_id is None:
        messages.info(request, "First, create the organization that books and pays.")
        back = _page_of(request) if request.method == "GET" else "/"
        return _htmx_aware(request, redirect(f"{reverse('web:organization-new')}?{urlencode({'next': back})}"))
    if not actor.may(action):
        raise MarketError("forbidden", f"The role {actor.role} may not do {action}. Ask an owner of the organization.")
    return None


def person(request: HttpRequest) -> User:
    """Whoever is signed in, on a page of action "person"."""
    assert isinstance(request.user, User)
    return request.user


def _page_of(request: HttpRequest) -> str:
    """The path of the page that asks: a fragment's is that of the page around it."""
    around = request.htmx.current_url_abs_path if request.htmx else None  # type: ignore[attr-defined]
    return around or request.get_full_path()


def _htmx_aware(request: HttpRequest, response: Any) -> HttpResponse:
    """A fragment that is refused takes the whole page along."""
    if getattr(request, "htmx", False):
        return HttpResponse(status=204, headers={"HX-Redirect": response.url})
    found: HttpResponse = response
    return found


def refused(request: HttpRequest, error: MarketError) -> HttpResponse:
    return render(request, "refused.html", {"error": error}, status=error.kind.status)


def actor_of(request: HttpRequest) -> Actor:
    lazy = request.actor  # type: ignore[attr-defined]
    assert lazy.kind  # evaluates it, so that the copy is the Actor itself
    found: Actor = copy(lazy)
    return found


def visitor(request: HttpRequest) -> Actor:
    """The actor whose market is shown. Who has no organization yet sees the live market, or, in a house that has only a test market
    (a demo, a partner's sandbox), that one.
    """
    actor = actor_of(request)
    if actor.organization_id is not None:
        return actor
    live = replace(actor, livemode=True)
    return live if has_offers(live) else replace(live, livemode=False)


def has_offers(actor: Actor) -> bool:
    return Listing.objects.visible_to(actor).filter(state=Listing.State.PUBLISHED).exists()


def row_of(rows: QuerySet[Any], prefix: str, public_id: str) -> Any:
    """The row of that id among `rows` (already narrowed to the actor); anything else is 404."""
    pk = ids.decode(prefix, public_id)
    found = rows.filter(pk=pk).first() if pk else None
    if found is None:
        raise Http404
    return found


@dataclass(frozen=True)
class Page:
    """Rows of one page, newest first; `older`: the query string of the next page, or None."""

    rows: list[Any]
    older: str | None

    def __iter__(self) -> Any:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def listed(request: HttpRequest, rows: QuerySet[Any], prefix: str, *, size: int = PAGE_SIZE) -> Page:
    """A page by keyset on the id. The cursor is the last row's public id, in `?before=`."""
    before = request.GET.get("before")
    if before:
        at = ids.decode(prefix, before)
        if at is None:
            raise MarketError("invalid_request", "The cursor is not one of this list; start again without it.")
        rows = rows.filter(pk__lt=at)
    found = list(rows.order_by("-pk")[: size + 1])
    older = None
    if len(found) > size:
        query = request.GET.copy()
        query["before"] = ids.encode(prefix, found[size - 1].pk)
        older = query.urlencode()
    return Page(found[:size], older)


def back_to(request: HttpRequest, default: str) -> str:
    """`?next=` where it leads to a page of ours, else `default`."""
    wanted = request.POST.get("next") or request.GET.get("next") or ""
    ours = wanted.startswith("/") and url_has_allowed_host_and_scheme(wanted, allowed_hosts=None)
    return wanted if ours else default


def done(request: HttpRequest, words: str, to: str) -> HttpResponseRedirect:
    """After a write: say what happened on the page that follows."""
    messages.success(request, words)
    return HttpResponseRedirect(to)


def failed(request: HttpRequest, error: MarketError, to: str) -> HttpResponseRedirect:
    """After a refused write: say why on the page that follows."""
    messages.error(request, str(error))
    return HttpResponseRedirect(to)


def iso_minute(at: datetime | None) -> str:
    """For an input of type datetime-local, UTC."""
    return at.strftime("%Y-%m-%dT%H:%M") if at else ""
