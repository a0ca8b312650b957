"""Faults of the API itself, armed through `POST /_sandbox/faults` and used up request by request.

A fault is {"kind": ..., "method": "POST", "path": "/v1/invoices*", "times": 1, "probability": 1.0, "delay_s": 0}:
`429` and `500` refuse before anything happens; `500_after_commit` does the work and then answers 500 (and, as Stripe
documents, the idempotency key remembers the 500); `timeout` does nothing and drops the connection;
`timeout_after_commit` does the work and drops the connection; `slow` only waits `delay_s`.
"""

from __future__ import annotations

import collections
import fnmatch
import random
import threading
import time
from typing import Any

from sandbox.stripe.errors import ApiError
from sandbox.stripe.store import Store

KINDS = ("429", "500", "500_after_commit", "timeout", "timeout_after_commit", "slow")


class Faults:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._random = random.Random(store.setting("seed", 0))
        self._recent: dict[str, collections.deque[float]] = collections.defaultdict(collections.deque)

    def seed(self, value: int) -> None:
        self._random.seed(value)

    def armed(self) -> list[dict[str, Any]]:
        return list(self._store.setting("api_faults", []))

    def arm(self, faults: list[dict[str, Any]]) -> None:
        """Replace the armed faults; ValueError on a kind that does not exist."""
        for fault in faults:
            if fault.get("kind") not in KINDS:
                raise ValueError(f"unknown fault kind {fault.get('kind')!r}: one of {', '.join(KINDS)}")
        self._store.set_setting("api_faults", faults)

    def draw(self, method: str, path: str) -> dict[str, Any] | None:
        """The first armed fault that fits this request; one use is spent."""
        with self._lock:
            armed = self.armed()
            for fault in armed:
                if fault.get("method", method) != method or not fnmatch.fnmatch(path, fault.get("path", "*")):
                    continue
                if self._random.random() >= fault.get("probability", 1.0):
                    continue
                if "times" in fault or "probability" not in fault:
                    fault["times"] = fault.get("times", 1) - 1
                self.arm([f for f in armed if f.get("times", 1) > 0])
                return dict(fault)
        return None

    def limit_rate(self, method: str, path: str) -> None:
        """Raise 429 beyond `rate_limit_per_s` requests in a second to one endpoint; 0 is no limit (the default)."""
        limit = int(self._store.setting("rate_limit_per_s", 0))
        if limit <= 0:
            return
        endpoint = f"{method} {'/'.join(path.split('/')[:4])}"
        now = time.monotonic()
        with self._lock:
            recent = self._recent[endpoint]
            while recent and recent[0] <= now - 1.0:
                recent.popleft()
            if len(recent) >= limit:
                raise too_many()
            recent.append(now)


def too_many() -> ApiError:
    message = "Request rate limit exceeded. Learn more about rate limits here https://stripe.com/docs/rate-limits."
    return ApiError(429, message, code="rate_limit", remember=False)


def broken() -> ApiError:
    message = "An unknown error occurred. This is a fault of the sandbox, armed on purpose."
    return ApiError(500, message, type_="api_error", remember=False)
