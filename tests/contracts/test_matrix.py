"""Every route x every kind of actor, from the table in tests/matrix.py. A route that is not in the table fails.

One world is made for all routes. Each actor acts in a savepoint that is taken back, so that the order changes nothing.
"""

import ast
import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.apps import apps
from django.db import transaction
from django.urls import URLPattern, URLResolver, get_resolver, reverse
from rest_framework.test import APIClient

from marketplace import stream
from marketplace.tenancy import ACTIONS, ROLES, SCOPES, Actor
from tests import factories
from tests.matrix import PREFIXES, ROUTES, STREAM, R, World

pytestmark = pytest.mark.django_db
DENIED = {401, 403, 404, 405}


def walk(resolver: Any = None, prefix: str = "") -> Iterator[tuple[str, URLPattern, str]]:
    """(path, pattern, namespace) of every route that the resolver knows."""
    for entry in (resolver or get_resolver()).url_patterns:
        path = prefix + str(entry.pattern)
        if isinstance(entry, URLResolver):
            for p, pattern, inner in walk(entry, path):
                yield p, pattern, f"{entry.namespace}:{inner}" if entry.namespace else inner
        else:
            yield path, entry, ""


def prefix_of(path: str) -> str | None:
    return next((whose for prefix, whose in PREFIXES.items() if path.startswith(prefix)), None)


def methods(pattern: URLPattern) -> dict[str, str | None]:
    """Method -> the action that the view names itself (None: it does not say)."""
    view = getattr(pattern.callback, "cls", None) or getattr(pattern.callback, "view_class", None)
    if actions := getattr(view or pattern.callback, "actions", None):
        return dict(actions)
    if view is not None:
        return {m.upper(): None for m in ("get", "post", "put", "patch", "delete") if hasattr(view, m)}
    return {}


LISTED = {(r.path, r.method): r for r in ROUTES}


def test_every_route_is_in_the_table_and_asks_for_what_the_table_says():
    missing, differs = [], []
    for path, pattern, _ in walk():
        if prefix_of(path):
            continue
        said = methods(pattern)
        if not said and not any(p == path for p, _ in LISTED):
            missing.append(path)  # a function view: any method will do, but one must stand there
        for method, action in said.items():
            if (path, method) not in LISTED:
                missing.append(f"{method} {path}")
            elif action and LISTED[path, method].action != action:
                differs.append(f"{method} {path}: the view says {action}, the table {LISTED[path, method].action}")
    assert not missing, f"add a line to tests/matrix.py for: {missing}"
    assert not differs, differs


def test_no_line_without_its_route():
    paths = {path for path, _, _ in walk()}
    assert not [r.id for r in ROUTES if r.path not in paths]
    assert len(LISTED) == len(ROUTES), "a line stands twice"
    assert {r.action for r in ROUTES} <= {*ACTIONS, "public", "person", "agent", "staff"}


class Cast:
    """Everybody who may knock."""

    def __init__(self) -> None:
        self.world, self.other, test = World(), World(), World(livemode=False)
        self.own = self.world.everything()
        self.shown = [row.public_id for row in self.own]
        self.clients = {
            **{role: self.person(row.user) for role, row in self.world.members.items()},
            "stranger": self.person(self.other.members["owner"].user),
            "stranger_key": factories.client(key=factories.key(self.other.organization)[1]),
            "test_key": factories.client(key=factories.key(test.organization)[1]),
            "test_owner": self.person(test.members["owner"].user),
            "agent": factories.client(agent=factories.agent(self.other.site)[1]),
            "staff": self.person(factories.staff()),
            "anonymous": factories.client(),
        }

    @staticmethod
    def person(user: Any) -> APIClient:
        client = APIClient()
        client.force_login(user)
        return client

    def all_for(self, action: str) -> dict[str, APIClient]:
        """Everybody, and two keys of the organization: one with the scope of `action` alone, one with all others."""
        own = self.world.organization
        have = factories.key(own, [action] if action in ACTIONS else [])[1]
        lack = factories.key(own, [s for s in SCOPES if s != action])[1]
        return {**self.clients, "key_with": factories.client(key=have), "key_without": factories.client(key=lack)}

    def leaks(self, who: str, response: Any, *, public: bool) -> list[str]:
        """Ids of the world's things that an outsider was shown; `public`: strangers of the same mode may see them."""
        outsiders = {"anonymous", "agent", "test_key", "test_owner"} | (
            set() if public else {"stranger", "stranger_key"}
        )
        if who not in outsiders or response.status_code != 200:
            return []
        body = b"".join(response.streaming_content) if response.streaming else response.content
        text = body.decode(errors="replace")
        return [f"{who} is shown {public_id}" for public_id in self.shown if public_id in text]


@pytest.fixture(scope="module")
def cast(django_db_setup, django_db_blocker):
    with django_db_blocker.unblock(), transaction.atomic():
        yield Cast()
        transaction.set_rollback(True)


def url_of(route: R, world: World) -> str:
    path = "/" + route.path
    for name, value in (route.make(world) if route.make else {}).items():
        path = re.sub(rf"<(\w+:)?{name}>", value, path)
    assert "<" not in path, f"{route.id} needs a maker"
    return path


def act(client: APIClient, method: str, url: str, **request: Any) -> Any:
    """The answer; what it did is taken back, and a crash is a 500."""
    client.raise_request_exception = False
    with transaction.atomic():
        response = client.generic(method, url, **request)
        transaction.set_rollback(True)
    if (crash := getattr(response, "exc_info", None)) and "no call to Stripe inside a transaction" in str(crash[1]):
        response.status_code = 503  # it got as far as the gateway, which cannot know that this transaction is a test's
    return response


def knock(client: APIClient, route: R, world: World) -> Any:
    """The answer to an empty request."""
    if route.is_api and route.method != "GET":
        return act(client, route.method, url_of(route, world), data=b"{}", content_type="application/json")
    return act(client, route.method, url_of(route, world))


def allowed(route: R, response: Any) -> bool:
    fine = response.status_code < 500 or (route.outside and response.status_code in {502, 503})
    return fine and response.status_code not in DENIED and not to_login(response)


def to_login(response: Any) -> bool:
    return response.status_code in {301, 302} and "login" in response.headers["Location"]


@pytest.mark.parametrize("route", [r for r in ROUTES if r.is_api], ids=lambda r: r.id)
def test_api(route, cast):
    expect = EXPECTED[route.action] if route.action in EXPECTED else by_action(route)
    wrong = []
    for who, client in cast.all_for(route.action).items():
        response = knock(client, route, cast.world)
        want = expect[who]
        got = "ok" if allowed(route, response) else response.status_code
        if got not in (want if isinstance(want, tuple) else (want,)):
            wrong.append(f"{who}: {got}, not {want}: {response.content[:200]!r}")
        if route.method == "GET":
            wrong += cast.leaks(who, response, public=route.stranger == "sees")
    assert not wrong, "\n".join([route.id, *wrong])


def by_action(route: R) -> dict[str, Any]:
    """Who gets what on a route that asks for an action of the table."""
    of = {role: Actor(kind="user", role=role).may(route.action) for role in ROLES}
    seen = "ok" if route.stranger == "sees" or route.make is None else 404
    return {
        **{role: "ok" if may else 403 for role, may in of.items()},
        "anonymous": 401,
        "agent": 401,  # an agent's key opens the agent's routes alone
        "stranger": seen,
        "stranger_key": seen,
        "test_key": "ok" if route.make is None else 404,
        "test_owner": "ok" if route.make is None else 404,
        "key_with": "ok",
        "key_without": 403,
        "staff": "ok" if route.action.endswith(":read") else 403,
    }


KEYS = ("key_with", "key_without", "stranger_key", "test_key")
PEOPLE = (*ROLES, "stranger", "test_owner", "staff")
EVERYBODY = (*KEYS, *PEOPLE, "anonymous", "agent")
EXPECTED: dict[str, dict[str, Any]] = {
    # what the token or signature says may still refuse; the door itself asks for nobody
    "public": dict.fromkeys(EVERYBODY, ("ok", 401)),
    "person": {
        **dict.fromkeys(PEOPLE, "ok"), **dict.fromkeys(KEYS, 403), "anonymous": 401, "agent": 401,
        "stranger": ("ok", 404), "test_owner": ("ok", 404), "staff": ("ok", 404),
    },
    "agent": {**dict.fromkeys(EVERYBODY, 401), "agent": "ok"},
    "staff": {**dict.fromkeys(EVERYBODY, 404), "anonymous": 401, "agent": 401, "staff": "ok"},
}  # fmt: skip


@pytest.mark.parametrize("route", [r for r in ROUTES if not r.is_api], ids=lambda r: r.id)
def test_pages(route, cast):
    wrong = []
    for who, client in cast.all_for(route.action).items():
        response = knock(client, route, cast.world)
        status = response.status_code
        if status >= 500 and not (route.outside and status in {502, 503}):
            wrong.append(f"{who}: {status}")
        elif (want := of_page(route, who)) is not None:
            got = "login" if to_login(response) else "ok" if allowed(route, response) else status
            if got not in want:
                wrong.append(f"{who}: {got}, not {want}")
        if route.action != "public" or who == "test_owner":  # the market's front is everybody's of its mode
            wrong += cast.leaks(who, response, public=route.stranger == "sees")
    assert not wrong, "\n".join([route.id, *wrong])


def of_page(route: R, who: str) -> tuple[Any, ...] | None:
    if route.action == "public":
        return None if route.make else ("ok",)
    if who in {"anonymous", "agent", *KEYS}:
        return ("login",)  # pages know sessions alone
    if who == "staff":
        return None
    if route.action == "staff":
        return (403, 404, "login")
    if route.action == "person":
        return ("ok", 404) if who in {"stranger", "test_owner"} and route.make else ("ok",)
    if who in ROLES:
        return ("ok",) if Actor(kind="user", role=who).may(route.action) else (403, 404)
    return ("ok",) if route.make is None or (route.stranger == "sees" and who == "stranger") else (404,)


# --- the stream process
def test_the_streams_routes_are_in_the_table():
    """It routes by hand: each text that looks like a part of a path must be part of a line's path."""
    tree = ast.parse(inspect.getsource(stream._route))
    parts = {
        n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str) and "/" in n.value
    }
    paths = ["/" + r.path for r in STREAM]
    assert {p for p in parts if p != "/"} - {p for p in parts if any(p in path for path in paths)} == set()
    for path in paths:
        assert any(path.startswith(p) and len(p) > len("/api/v1/") for p in parts), f"{path} is not routed"


def stream_status(route: R, world: World, headers: dict[str, str]) -> int:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    raw = [(k.lower().encode(), v.encode()) for k, v in headers.items()]
    scope = {"type": "http", "method": route.method, "path": url_of(route, world), "headers": raw}
    with transaction.atomic():
        async_to_sync(stream.application)(scope, receive, send)
        transaction.set_rollback(True)
    return int(sent[0]["status"])


@pytest.mark.parametrize("route", STREAM, ids=lambda r: f"stream {r.id}")
def test_stream(route, cast, monkeypatch):
    monkeypatch.setattr(stream, "in_thread", lambda f, *a: sync_to_async(f)(*a))  # this thread holds the transaction
    monkeypatch.setattr(stream, "FOLLOW_S", 0)
    expect = EXPECTED[route.action] if route.action in EXPECTED else by_action(route)
    wrong = []
    for who, client in cast.all_for(route.action).items():
        if who not in {*KEYS, "anonymous", "agent"}:
            continue
        token = client._credentials.get("HTTP_AUTHORIZATION")
        status = stream_status(route, cast.world, {"Authorization": token} if token else {})
        got = status if status in DENIED or status >= 500 else "ok"
        want = expect[who]
        if got not in (want if isinstance(want, tuple) else (want,)):
            wrong.append(f"{who}: {got}, not {want}")
    assert not wrong, "\n".join([route.id, *wrong])


# --- the admins and packages, by prefix
def by_prefix(whose: str) -> list[tuple[str, URLPattern, str]]:
    return [(path, pattern, space) for path, pattern, space in walk() if prefix_of(path) == whose]


def admin_url(pattern: URLPattern, space: str, rows: list[Any]) -> str | None:
    """The page of the world's own object, where the route is about one; None where it needs what no admin page needs."""
    if pattern.name is None:  # Django's redirect of old addresses, and the catch-all
        return None
    name = f"{space}{pattern.name}"
    if "object_id" not in str(pattern.pattern):
        return reverse(name) if "<" not in str(pattern.pattern) and "(?P" not in str(pattern.pattern) else None
    model = next(
        (m for m in apps.get_models() if pattern.name.startswith(f"{m._meta.app_label}_{m._meta.model_name}_")), None
    )
    row = next((row for row in rows if type(row) is model), None)
    return reverse(name, args=[row.pk]) if row is not None else None


@pytest.mark.parametrize("whose", ["operator", "staff"])
def test_admins(whose, cast):
    """Nobody sees the other's rows in any page; the staff's admin opens for staff alone; no page breaks for those inside."""
    inside = {"operator": ["owner"], "staff": ["staff"]}[whose]
    outside = {
        "operator": ["anonymous", "agent", *KEYS, "stranger", "test_owner"],
        "staff": ["anonymous", "agent", *KEYS, *PEOPLE[:-1]],
    }[whose]
    clients = cast.all_for("sites:read")
    wrong = []
    for path, pattern, space in by_prefix(whose):
        url = admin_url(pattern, space, cast.own)
        if url is None or pattern.name in {
            "logout",
            "login",
            "jsi18n",
            "autocomplete",
        }:  # the last asks for the field it completes
            continue
        for who in (*inside, *outside):
            response = act(clients[who], "GET", url)
            if response.status_code >= 500:
                wrong.append(f"{who} {path}: {response.status_code}")
            elif who in outside and response.status_code == 200:
                if whose == "staff" or "object_id" in path:
                    wrong.append(f"{who} opens {path}")
                wrong += [f"{leak} on {path}" for leak in cast.leaks(who, response, public=False)]
    assert not wrong, "\n".join(wrong[:40])


def test_packages_pages_do_not_break(cast):
    for path, pattern, _ in by_prefix("package"):
        if pattern.name and "<" not in path:
            response = act(factories.client(), "GET", reverse(pattern.name))
            assert response.status_code < 500, path
