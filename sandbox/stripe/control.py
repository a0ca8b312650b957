"""`/_sandbox/*`: what a test or a demo may do to the fake itself. Real Stripe has nothing like it."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from sandbox.stripe import events, webhooks
from sandbox.stripe.faults import KINDS

if TYPE_CHECKING:
    from sandbox.stripe.server import Server

_SETTINGS = ("rate_limit_per_s", "settle_s", "api_keys")


def handle(server: Server, method: str, path: str, body: str) -> tuple[int, dict[str, Any]]:
    try:
        data = json.loads(body) if body else {}
        return 200, _dispatch(server, method, path.removeprefix("/_sandbox").strip("/"), data)
    except LookupError as exc:
        return 404, {"error": str(exc)}
    except (ValueError, TypeError) as exc:
        return 400, {"error": str(exc)}


def _dispatch(server: Server, method: str, name: str, data: dict[str, Any]) -> dict[str, Any]:
    store = server.store
    if name in ("", "health"):
        return {"ok": True, "api": "stripe sandbox of tailrace"}
    if name == "faults":
        if method == "DELETE":
            server.faults.arm([])
            store.set_setting("webhooks", {})
            store.set_setting("rate_limit_per_s", 0)
        elif method == "POST":
            _set_faults(server, data)
        switches = {**webhooks.DEFAULTS, **store.setting("webhooks", {})}
        return {"api": server.faults.armed(), "webhooks": switches, "kinds": list(KINDS)} | {
            k: store.setting(k, 0) for k in _SETTINGS[:2]
        }
    if name == "state":
        return _state(server)
    if name == "clock":
        if method == "POST":
            store.clock_offset = 0.0 if data.get("now") is None else float(data["now"]) - time.time()
            store.set_setting("clock_offset", store.clock_offset)
        return {"now": store.now()}
    if name == "reset" and method == "POST":
        store.reset(keep=events.COMMAND_LINE_ENDPOINT)
        return {"ok": True}
    if name == "objects" or name.startswith("objects/"):
        kind = name.partition("/")[2]
        with store.lock:
            return {"data": store.find(kind, account=None) if kind else [], "counts": store.counts()}
    if name.startswith("events/") and name.endswith("/resend") and method == "POST":
        event = name.split("/")[1]
        for endpoint in events.listeners(store):
            events.enqueue(store, event, endpoint["id"])
        return {"ok": True}
    if name == "disputes" and method == "POST":
        from sandbox.stripe import disputes

        return disputes.open_by_hand(server, data)
    raise LookupError(f"no such control endpoint: /_sandbox/{name}")


def _set_faults(server: Server, data: dict[str, Any]) -> None:
    unknown = set(data) - {"api", "webhooks", "seed", *_SETTINGS}
    unknown |= set(data.get("webhooks", {})) - set(webhooks.DEFAULTS)
    if unknown:
        raise ValueError(f"unknown switch: {', '.join(sorted(unknown))}")
    if "seed" in data:
        server.store.set_setting("seed", int(data["seed"]))
        server.faults.seed(int(data["seed"]))
        server.deliverer.seed(int(data["seed"]))
    if "api" in data:
        server.faults.arm(data["api"])
    if "webhooks" in data:
        server.store.set_setting("webhooks", {**server.store.setting("webhooks", {}), **data["webhooks"]})
    for name in _SETTINGS:
        if name in data:
            server.store.set_setting(name, data[name])


def _state(server: Server) -> dict[str, Any]:
    """Counts by kind, deliveries by state, balances in minor units by account and currency."""
    store = server.store
    with store.lock:
        deliveries = dict(store.execute("SELECT state, COUNT(*) FROM deliveries GROUP BY state"))
        balances: dict[str, dict[str, int]] = {}
        sql = (
            "SELECT account, json_extract(body, '$.currency'), SUM(json_extract(body, '$.net')) FROM objects"
            " WHERE kind = 'balance_transaction' GROUP BY 1, 2"
        )
        for account, currency, net in store.execute(sql):
            balances.setdefault(account or "platform", {})[currency] = net
        waiting = store.execute(
            "SELECT event, endpoint, attempts, last_status, last_error FROM deliveries WHERE state IN ('due', 'pending') LIMIT 20"
        )
        return {
            "objects": store.counts(),
            "deliveries": deliveries,
            "balances": balances,
            "now": store.now(),
            "undelivered": [
                dict(zip(("event", "endpoint", "attempts", "status", "error"), r, strict=True)) for r in waiting
            ],
        }
