"""The routes, and what happens around every one of them: key, schema, idempotency, transaction, expansion, check."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sandbox.stripe import answers, schema
from sandbox.stripe.errors import ApiError, missing
from sandbox.stripe.store import Obj, Store, new_id

Handler = Callable[["Call"], Obj]


@dataclass(frozen=True, slots=True)
class Route:
    method: str
    path: str
    params: str | None
    handler: Handler
    pattern: re.Pattern[str]


ROUTES: list[Route] = []


def route(method: str, path: str, params: str | None) -> Callable[[Handler], Handler]:
    """Register a handler; `params` names the SDK's TypedDict, e.g. `InvoicePayParams`."""

    def register(handler: Handler) -> Handler:
        pattern = re.compile("^" + re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", path) + "$")
        ROUTES.append(Route(method, path, params, handler, pattern))
        return handler

    return register


def match(method: str, path: str) -> tuple[Route, dict[str, str]]:
    """The route and its path ids; 404 as Stripe words it. The first registered wins (`/search` before `/{id}`)."""
    for candidate in ROUTES:
        found = candidate.pattern.match(path) if candidate.method == method else None
        if found:
            return candidate, found.groupdict()
    raise ApiError(404, f"Unrecognized request URL ({method}: {path}).", remember=False)


@dataclass(slots=True)
class Call:
    """One request on its way through a handler."""

    store: Store
    ids: dict[str, str]
    params: dict[str, Any]
    now: int
    base_url: str
    account: str = ""
    request_id: str = ""
    idempotency_key: str | None = None
    events: list[Obj] = field(default_factory=list)

    def load(self, kind: str, id_: str | None, *, noun: str | None = None, param: str = "id") -> Obj:
        """The object or Stripe's `resource_missing`: 404 for an id in the path, 400 for one among the parameters."""
        obj = self.store.get(id_, kind=kind, account=self.account) if id_ else None
        if obj is None:
            error = missing(noun or kind.replace("_", " ").replace(".", " "), id_ or "", param=param)
            error.status = 404 if id_ in self.ids.values() else 400
            raise error
        return obj

    def save(self, obj: Obj, *, kind: str | None = None) -> Obj:
        return self.store.put(obj, account=self.account, kind=kind)

    def emit(self, type_: str, obj: Obj, *, account: str | None = None, previous: Obj | None = None) -> Obj:
        """Record an event about a snapshot of `obj`, and queue it for every endpoint that asked for it."""
        from sandbox.stripe import events

        return events.record(self, type_, obj, account=account, previous=previous)

    def page(self, kind: str, url: str, **equals: Any) -> Obj:
        """A list answer, newest first, by Stripe's limit / starting_after / ending_before / created."""
        created = self.params.get("created")
        if created is not None and not isinstance(created, dict):
            created = {"gte": created, "lte": created}
        limit = self.params.get("limit", 10)
        if not 1 <= limit <= 100:
            raise ApiError(400, "Invalid integer: limit must be between 1 and 100", param="limit", remember=False)
        for cursor in ("starting_after", "ending_before"):
            if cursor in self.params:
                self.load(kind, self.params[cursor], param=cursor)
        rows = self.store.find(
            kind,
            account=self.account,
            newest_first=True,
            limit=limit + 1,
            after=self.params.get("starting_after"),
            before=self.params.get("ending_before"),
            created=created,
            **equals,
        )
        more = len(rows) > limit
        rows = rows[-limit:] if "ending_before" in self.params else rows[:limit]
        return listing(rows, url, more=more)


def listing(rows: list[Obj], url: str, *, more: bool = False) -> Obj:
    return {"object": "list", "data": rows, "has_more": more, "url": url}


def merge(obj: Obj, params: dict[str, Any], names: tuple[str, ...]) -> Obj:
    """Write the named parameters onto the object; metadata merges, and an empty string clears."""
    for name in names:
        if name not in params:
            continue
        value = params[name]
        if name == "metadata":
            old = dict(obj.get("metadata") or {})
            for key, item in (value or {}).items():
                old.pop(key, None) if item in ("", None) else old.update({key: item})
            obj["metadata"] = {} if value == "" else old
        else:
            obj[name] = None if value == "" else value
    return obj


def fingerprint(method: str, path: str, params: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([method, path, params], sort_keys=True, default=str).encode()).hexdigest()


def answer(call: Call, found: Route, raw: dict[str, Any]) -> tuple[int, Obj]:
    """Run one checked request inside the caller's transaction; errors come back as (status, body).

    Raises `answers.ContractError` when the fake itself would break the SDK's types.
    """
    try:
        call.params = schema.check_request(found.params, raw)
    except ApiError as exc:
        return exc.status, {**exc.body, "_remember": False}
    expand = call.params.pop("expand", [])
    call.store.savepoint()
    try:
        result = found.handler(call)
        return 200, render(call, result, expand)
    except ApiError as exc:
        if not exc.commit:
            call.store.rollback_to_savepoint()
        return exc.status, {**exc.body, "_remember": exc.remember}


def render(call: Call, obj: Obj, expand: list[str]) -> Obj:
    """The answer on the wire: ids expanded as asked, nullable fields filled in, checked."""
    obj = json.loads(json.dumps(obj))
    for path in expand:
        _expand(call, obj, path.split("."), path)
    if obj.get("object") in ("list", "search_result"):
        return {**obj, "data": [answers.complete(item) for item in obj["data"]]}
    if "object" not in obj:  # a v2 list
        return {**obj, "data": [answers.complete(item) for item in obj["data"]]}
    if obj.get("deleted") is True:
        return {"id": obj["id"], "object": obj["object"], "deleted": True}
    return answers.complete(obj)


def _expand(call: Call, node: Any, parts: list[str], path: str) -> None:
    name = parts[0]
    if name == "data" and isinstance(node.get("data"), list):
        for item in node["data"]:
            _expand(call, item, parts[1:], path)
        return
    from sandbox.stripe import includes

    value = includes.included(call, node, name) or node.get(name)
    if value is None and name not in answers.resource_fields(answers.resource_class(node["object"])):
        raise ApiError(400, f"This property cannot be expanded ({path}).", param="expand", remember=False)
    if isinstance(value, str):
        loaded = call.store.get(value, account=call.account)
        if loaded is None:
            raise ApiError(400, f"This property cannot be expanded ({path}).", param="expand", remember=False)
        value = loaded
    node[name] = value
    if len(parts) > 1 and isinstance(value, dict):
        _expand(call, value, parts[1:], path)


def request_id() -> str:
    return new_id("req", 14)
