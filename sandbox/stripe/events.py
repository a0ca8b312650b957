"""Events and webhook endpoints: what happened, and who is told."""

from __future__ import annotations

from typing import Any

from sandbox.stripe import API_VERSION, answers
from sandbox.stripe.app import Call, merge, route
from sandbox.stripe.errors import bad_param
from sandbox.stripe.store import Obj, Store, new_id

COMMAND_LINE_ENDPOINT = "we_commandline"


def record(call: Call, type_: str, obj: Obj, *, account: str | None = None, previous: Obj | None = None) -> Obj:
    """A snapshot event, written in the request's transaction; deliveries are queued with it, never without it."""
    about = account if account is not None else call.account
    event: Obj = {
        "id": new_id("evt"),
        "object": "event",
        "api_version": API_VERSION,
        "created": call.now,
        "data": {"object": answers.complete(obj)},
        "livemode": False,
        "pending_webhooks": 0,
        "request": {"id": call.request_id or None, "idempotency_key": call.idempotency_key},
        "type": type_,
    }
    if about:
        event["account"] = about
    if previous is not None:
        event["data"]["previous_attributes"] = previous
    endpoints = [e for e in listeners(call.store) if type_ in e["enabled_events"] or "*" in e["enabled_events"]]
    event["pending_webhooks"] = len(endpoints)
    call.store.put(event, account=about)
    for endpoint in endpoints:
        enqueue(call.store, event["id"], endpoint["id"])
    call.events.append(event)
    return event


def listeners(store: Store) -> list[Obj]:
    return store.find("webhook_endpoint", account=None, status="enabled")


def enqueue(store: Store, event: str, endpoint: str, *, delay_s: float = 0.0) -> None:
    import time

    sql = "INSERT INTO deliveries (event, endpoint, next_at) VALUES (?, ?, ?)"
    store.execute(sql, (event, endpoint, time.time() + delay_s))


@route("GET", "/v1/events", "EventListParams")
def list_events(call: Call) -> Obj:
    wanted = call.params.get("types") or ([call.params["type"]] if "type" in call.params else [])
    if not wanted:
        return call.page("event", "/v1/events")
    if len(wanted) == 1 and not wanted[0].endswith("*"):
        return call.page("event", "/v1/events", type=wanted[0])
    prefixes = tuple(w.rstrip("*") for w in wanted)
    # Several types at once: page over everything and keep what matches, as has_more must stay true to the filter.
    limit = call.params.get("limit", 10)
    rows = call.store.find(
        "event",
        account=call.account,
        newest_first=True,
        after=call.params.get("starting_after"),
        before=call.params.get("ending_before"),
        created=call.params.get("created") if isinstance(call.params.get("created"), dict) else None,
    )
    rows = [
        r for r in rows if r["type"] in wanted or (any("*" in w for w in wanted) and r["type"].startswith(prefixes))
    ]
    return {"object": "list", "url": "/v1/events", "has_more": len(rows) > limit, "data": rows[:limit]}


@route("GET", "/v1/events/{event}", "EventRetrieveParams")
def retrieve_event(call: Call) -> Obj:
    return call.load("event", call.ids["event"])


def create_endpoint(store: Store, url: str, secret: str, enabled: list[str], **extra: Any) -> Obj:
    """Also used by the command line, whose endpoint keeps its id over restarts."""
    endpoint = {
        "id": extra.pop("id", None) or new_id("we"),
        "object": "webhook_endpoint",
        "api_version": API_VERSION,
        "application": None,
        "created": store.now(),
        "description": None,
        "enabled_events": enabled,
        "livemode": False,
        "metadata": {},
        "status": "enabled",
        "url": url,
        "_secrets": [secret],
        **extra,
    }
    return store.put(endpoint)


@route("POST", "/v1/webhook_endpoints", "WebhookEndpointCreateParams")
def create_webhook_endpoint(call: Call) -> Obj:
    p = call.params
    if not p["url"].startswith(("http://", "https://")):
        raise bad_param(
            "Invalid URL: An explicit scheme (such as https) must be provided.", param="url", code="url_invalid"
        )
    secret = new_id("whsec", 32)
    endpoint = create_endpoint(
        call.store,
        p["url"],
        secret,
        p["enabled_events"],
        metadata=p.get("metadata", {}),
        description=p.get("description"),
    )
    return {**endpoint, "secret": secret}  # shown once, as Stripe does


@route("POST", "/v1/webhook_endpoints/{endpoint}", "WebhookEndpointUpdateParams")
def update_webhook_endpoint(call: Call) -> Obj:
    endpoint = call.load("webhook_endpoint", call.ids["endpoint"])
    merge(endpoint, call.params, ("url", "enabled_events", "description", "metadata"))
    if "disabled" in call.params:
        endpoint["status"] = "disabled" if call.params["disabled"] else "enabled"
    return call.save(endpoint)


@route("GET", "/v1/webhook_endpoints/{endpoint}", "WebhookEndpointRetrieveParams")
def retrieve_webhook_endpoint(call: Call) -> Obj:
    return call.load("webhook_endpoint", call.ids["endpoint"])


@route("DELETE", "/v1/webhook_endpoints/{endpoint}", "WebhookEndpointDeleteParams")
def delete_webhook_endpoint(call: Call) -> Obj:
    endpoint = call.load("webhook_endpoint", call.ids["endpoint"])
    call.store.delete(endpoint["id"])
    return {"id": endpoint["id"], "object": "webhook_endpoint", "deleted": True}


@route("GET", "/v1/webhook_endpoints", "WebhookEndpointListParams")
def list_webhook_endpoints(call: Call) -> Obj:
    return call.page("webhook_endpoint", "/v1/webhook_endpoints")
