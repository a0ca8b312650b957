"""Every route x every kind of actor, from the table in tests/matrix.py. A route that is not in the table fails.

Each actor acts in a savepoint that is taken back, so that the order of actors changes nothing.
"""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from django.apps import apps
from django.db import transaction
from django.urls import URLPattern, URLResolver, get_resolver, reverse
from rest_framework.test import APIClient

from marketplace.tenancy import ACTIONS, ROLES, SCOPES, Actor
from tests import factories
from tests.matrix import PREFIXES, ROUTES, R, World

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
    if actions := getattr(view, "actions", None):
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

    def __init__(self, world: World, action: str) -> None:
        own = world.organization
        other, test = World(), World(livemode=False)
        scope = [action] if action in ACTIONS else []
        self.people = {role: self.person(world.members[role].user) for role in ROLES}
        self.stranger = self.person(other.members["owner"].user)
        self.key_with = factories.client(key=factories.key(own, scope)[1])
        self.key_without = factories.client(key=factories.key(own, [s for s in SCOPES if s != action])[1])
        self.stranger_key = factories.client(key=factories.key(other.organization)[1])
        self.test_key = factories.client(key=factories.key(test.organization)[1])
        self.test_owner = self.person(test.members["owner"].user)
        self.agent = factories.client(agent=factories.agent(other.site)[1])
        self.staff = self.person(factories.staff())
        self.anonymous = factories.client()

    @staticmethod
    def person(user: Any) -> APIClient:
        client = APIClient(raise_request_exception=False)
        client.force_login(user)
        return client


def url_of(route: R, world: World) -> str:
    path = "/" + route.path
    for name, value in (route.make(world) if route.make else {}).items():
        path = re.sub(rf"<(\w+:)?{name}>", value, path)
    assert "<" not in path, f"{route.id} needs a maker"
    return path


def knock(client: APIClient, route: R, world: World) -> Any:
    """The answer to an empty request; what it did is taken back."""
    client.raise_request_exception = False
    with transaction.atomic():
        if route.is_api:
            response = client.generic(
                route.method, url_of(route, world), b"{}" if route.method != "GET" else b"", "application/json"
            )
        else:
            response = client.generic(route.method, url_of(route, world))
        transaction.set_rollback(True)
    return response


def allowed(route: R, response: Any) -> bool:
    fine = response.status_code < 500 or (route.outside and response.status_code in {502, 503})
    return fine and response.status_code not in DENIED and not to_login(response)


def to_login(response: Any) -> bool:
    return response.status_code in {301, 302} and "login" in response.headers["Location"]


@pytest.mark.parametrize("route", [r for r in ROUTES if r.is_api], ids=lambda r: r.id)
def test_api(route, settings):
    world = World()
    shown = [row.public_id for row in world.everything()]
    cast = Cast(world, route.action)
    expect = EXPECTED[route.action] if route.action in EXPECTED else by_action(route)
    wrong = []
    for who, client in {**vars(cast), **cast.people}.items():
        if who == "people":
            continue
        response = knock(client, route, world)
        want = expect[who]
        got = "ok" if allowed(route, response) else response.status_code
        if got not in (want if isinstance(want, tuple) else (want,)):
            wrong.append(f"{who}: {got}, not {want}: {response.content[:200]!r}")
        outsider = who in {"anonymous", "agent", "test_key", "test_owner"} or (
            who in {"stranger", "stranger_key"} and route.stranger != "sees"
        )
        if outsider and route.method == "GET" and response.status_code == 200:
            wrong += [f"{who} is shown {public_id}" for public_id in shown if public_id in response.content.decode()]
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
def test_pages(route):
    world = World()
    shown = [row.public_id for row in world.everything()]
    cast = Cast(world, route.action)
    wrong = []
    for who, client in {**vars(cast), **cast.people}.items():
        if who == "people":
            continue
        response = knock(client, route, world)
        status = response.status_code
        if status >= 500 and not (route.outside and status in {502, 503}):
            wrong.append(f"{who}: {status}")
        elif (want := of_page(route, who)) is not None:
            got = "login" if to_login(response) else "ok" if allowed(route, response) else status
            if got not in want:
                wrong.append(f"{who}: {got}, not {want}")
        if who in {"anonymous", "agent", "stranger", "stranger_key", "test_key", "test_owner"} and status == 200:
            if route.stranger != "sees" or who.startswith("test"):
                wrong += [
                    f"{who} is shown {public_id}" for public_id in shown if public_id in response.content.decode()
                ]
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


# --- the admins and packages, by prefix
def by_prefix(whose: str) -> list[tuple[str, URLPattern, str]]:
    return [(path, pattern, space) for path, pattern, space in walk() if prefix_of(path) == whose]


def admin_url(pattern: URLPattern, space: str, world: World) -> str | None:
    """The page of the world's own object, where the route is about one; None where it needs what no admin page needs."""
    name = f"{space}{pattern.name}"
    if "object_id" not in str(pattern.pattern):
        return reverse(name) if "<" not in str(pattern.pattern) and "(?P" not in str(pattern.pattern) else None
    model = next(
        (m for m in apps.get_models() if pattern.name.startswith(f"{m._meta.app_label}_{m._meta.model_name}_")), None
    )
    row = next((row for row in world.everything() if type(row) is model), None)
    return reverse(name, args=[row.pk]) if row is not None else None


@pytest.mark.parametrize("whose", ["operator", "staff"])
def test_admins(whose):
    """Nobody sees the other's rows in any page; the staff's admin opens for staff alone; no page breaks for those inside."""
    world = World()
    own = [row for row in world.everything() if row is not world.organization]
    cast = Cast(world, "sites:read")
    inside = {"operator": ["owner"], "staff": ["staff"]}[whose]
    outside = {
        "operator": ["anonymous", "agent", *KEYS, "stranger", "test_owner"],
        "staff": ["anonymous", "agent", *KEYS, *PEOPLE[:-1]],
    }[whose]
    everybody = {**vars(cast), **cast.people}
    wrong = []
    for path, pattern, space in by_prefix(whose):
        url = admin_url(pattern, space, world)
        if url is None or pattern.name in {"logout", "login", "jsi18n"}:
            continue
        for who in (*inside, *outside):
            client = everybody[who]
            client.raise_request_exception = False
            with transaction.atomic():
                response = client.get(url)
                transaction.set_rollback(True)
            if response.status_code >= 500:
                wrong.append(f"{who} {path}: {response.status_code}")
            elif who in outside and response.status_code == 200:
                if whose == "staff" or "object_id" in path:
                    wrong.append(f"{who} opens {path}")
                text = response.content.decode()
                wrong += [f"{who} is shown {row!r} on {path}" for row in own if row.public_id in text]
    assert not wrong, "\n".join(wrong[:40])


def test_packages_pages_do_not_break():
    for path, pattern, _ in by_prefix("package"):
        if pattern.name and "<" not in path:
            response = APIClient(raise_request_exception=False).get(reverse(pattern.name))
            assert response.status_code < 500, path
