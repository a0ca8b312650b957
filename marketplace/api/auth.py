"""Who calls the API: a key, a person with a session, or an agent; and may they do this?"""

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from django.utils import timezone
from rest_framework.authentication import BaseAuthentication, SessionAuthentication
from rest_framework.permissions import BasePermission
from rest_framework.request import Request
from rest_framework.throttling import SimpleRateThrottle

from marketplace import caches, prepared
from marketplace.actors import actor_of
from marketplace.errors import MarketError
from marketplace.models import Agent, ApiKey
from marketplace.services.tokens import digest
from marketplace.tenancy import Actor

if TYPE_CHECKING:  # rest_framework.views reads the settings that name this module
    from rest_framework.views import APIView


def _bearer(request: Request) -> str | None:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


class Key(NamedTuple):
    """What a call reads of its key. Columns of `_KEY`, in order."""

    pk: int
    prefix: str
    scopes: list[str]
    expires_at: datetime | None
    last_used_at: datetime | None
    organization_id: int
    livemode: bool


_KEY = """
SELECT k.id, k.prefix, k.scopes, k.expires_at, k.last_used_at, k.organization_id, o.livemode
FROM marketplace_apikey k JOIN marketplace_organization o ON o.id = k.organization_id WHERE k.digest = %s AND k.revoked_at IS NULL
"""


class KeyAuthentication(BaseAuthentication):
    """`Authorization: Bearer tr_...`. An unknown, expired or revoked key is refused, never treated as anonymous."""

    def authenticate(self, request: Request) -> tuple[Any, Actor] | None:
        token = _bearer(request)
        if token is None or not token.startswith("tr_"):
            return None
        now = timezone.now()
        found = prepared.row(_KEY, [digest(token)])
        key = None if found is None else Key(*found)
        if key is None or (key.expires_at and key.expires_at <= now):
            raise MarketError("key_invalid", "Create a new key on the page Team and keys.")
        if key.last_used_at is None or now - key.last_used_at > timedelta(minutes=1):
            ApiKey.objects.filter(pk=key.pk).update(last_used_at=now)
        actor = Actor(
            kind="key",
            organization_id=key.organization_id,
            scopes=frozenset(key.scopes),
            key_id=key.pk,
            livemode=key.livemode,
            label=f"key {key.prefix}",
        )
        return key, actor

    def authenticate_header(self, request: Request) -> str:  # noqa: ARG002
        return "Bearer"


class PersonAuthentication(SessionAuthentication):
    """The same session as the pages, with CSRF."""

    def authenticate(self, request: Request) -> tuple[Any, Actor] | None:
        found = super().authenticate(request)
        return None if found is None else (found[0], staff_or(actor_of(request._request), found[0]))  # noqa: SLF001


def staff_or(actor: Actor, user: Any) -> Actor:
    """Our own people without a membership act as staff; with one, as a member of that organization."""
    if user.is_staff and actor.organization_id is None:
        return Actor(kind="staff", user_id=user.pk, label=user.email)
    return actor


class AgentAuthentication(BaseAuthentication):
    """`Authorization: Bearer agk_...`: the agent of one site."""

    def authenticate(self, request: Request) -> tuple[Agent, Actor] | None:
        token = _bearer(request)
        if token is None or not token.startswith("agk_"):
            return None
        agent = Agent.objects.select_related("site").filter(digest=digest(token), revoked_at=None).first()
        if agent is None:
            raise MarketError("key_invalid", "Enrol the agent again.")
        return agent, Actor(kind="agent", site_id=agent.site_id, label=f"agent {agent.name}")

    def authenticate_header(self, request: Request) -> str:  # noqa: ARG002
        return "Bearer"


class ActionPermission(BasePermission):
    """Each view names its action per method: `actions = {"GET": "jobs:read", "POST": "jobs:write"}`; "public" asks for nobody.

    "staff" is for our own people; "person" for any signed-in person, with or without an organization.
    """

    def has_permission(self, request: Request, view: "APIView") -> bool:
        action = getattr(view, "actions", {}).get("GET" if request.method in {"HEAD", "OPTIONS"} else request.method)
        if action is None:
            raise MarketError("method_not_allowed", f"{request.method} {request.path}")
        if action == "public":
            return True
        actor = cast("Actor | None", request.auth)
        if actor is None or actor.kind == "anonymous":
            raise MarketError("not_authenticated", "Send an API key as a bearer token, or sign in.")
        if action == "staff":
            if actor.kind == "staff" or getattr(request.user, "is_staff", False):
                return True
            raise MarketError("not_found", request.path)
        if action == "agent":
            return actor.kind == "agent"
        if action == "person":
            if actor.kind in {"user", "staff"}:
                return True
            raise MarketError("forbidden", "This is for people, not for keys.")
        if actor.kind == "user" and actor.organization_id is None:
            raise MarketError("organization_required", "POST /api/v1/organizations creates one.")
        if actor.may(action):
            return True
        if actor.kind == "key":
            raise MarketError("scope_missing", f"The key needs the scope {action}.")
        raise MarketError("forbidden", f"The role {actor.role} may not do {action}.")


class KeyThrottle(SimpleRateThrottle):
    """Per key or person. Without Redis there is no limit: an outage of the cache must not become one of the API.

    Two counters instead of the time of each call: what this period has had, and the part of the period before that is not a
    whole period ago, as if its calls had come evenly. One round trip, whatever the rate. A refused call does not count.
    """

    scope = "key"
    num_requests: int
    duration: int  # s
    left: float | None = None  # seconds until there is room, of a refused call

    def get_cache_key(self, request: Request, view: "APIView") -> str | None:  # noqa: ARG002
        actor = cast("Actor | None", request.auth)
        if actor is None:
            return f"throttle:ip:{self.get_ident(request)}"
        return f"throttle:{actor.kind}:{actor.key_id or actor.user_id or actor.site_id}"

    def allow_request(self, request: Request, view: "APIView") -> bool:
        key = self.get_cache_key(request, view)
        if self.rate is None or key is None:
            return True
        try:
            return self._allow(key, self.timer())
        except Exception:
            return True

    def _allow(self, key: str, now: float) -> bool:
        period, into = divmod(now, self.duration)
        mine = f"{key}:{int(period)}"
        pipe = caches.client().pipeline(transaction=False)
        pipe.incr(mine)
        pipe.expire(mine, 2 * self.duration)
        pipe.get(f"{key}:{int(period) - 1}")
        count, _, past = pipe.execute()
        before = int(past or 0)
        if before * (1 - into / self.duration) + count <= self.num_requests:
            return True
        caches.client().decr(mine)
        room = self.num_requests - count
        # The past fades by before / duration a second; where this period alone is full, it has to become the past first.
        fades = self.duration * (1 - room / before) if before and room >= 0 else float(self.duration)
        self.left = max(1.0, fades - into)
        return False

    def wait(self) -> float | None:
        return self.left
