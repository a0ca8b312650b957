"""Delivery of events: signed as Stripe signs them, at least once, in no particular order, retried.

Switches (`/_sandbox/faults`, key `webhooks`): `loss`, `duplicate`, `reorder` are probabilities in [0, 1], `delay_s` and
`reorder_window_s` are seconds, `retry_base_s` is the first retry's wait (it doubles up to an hour, for three days).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from sandbox.stripe import answers
from sandbox.stripe.store import Obj, Store

DEFAULTS: dict[str, Any] = {
    "loss": 0.0,
    "duplicate": 0.0,
    "reorder": 0.0,
    "reorder_window_s": 1.0,
    "delay_s": 0.0,
    "retry_base_s": 1.0,
    "paused": False,
}
_GIVE_UP_S = 3 * 86_400
_MAX_WAIT_S = 3600.0
_TIMEOUT_S = 20.0


def signature(payload: str, secrets: list[str], timestamp: int) -> str:
    """`t=...,v1=...[,v1=...]`: HMAC-SHA256 of "{t}.{payload}" per live secret (docs.stripe.com/webhooks/signature)."""
    signed = f"{timestamp}.{payload}".encode()
    parts = [f"v1={hmac.new(s.encode(), signed, hashlib.sha256).hexdigest()}" for s in secrets]
    return ",".join([f"t={timestamp}", *parts])


class Deliverer:
    """One thread picks what is due, a few threads post it. All state is in SQLite: a restart goes on where it was."""

    def __init__(self, store: Store, *, workers: int = 4) -> None:
        self._store = store
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="stripe-webhook")
        self._client = httpx.Client(timeout=_TIMEOUT_S, trust_env=False, limits=httpx.Limits(max_connections=workers))
        self._random = random.Random(store.setting("seed", 0))
        self._thread = threading.Thread(target=self._loop, name="stripe-webhooks", daemon=True)
        self._busy: set[int] = set()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._wake.set()
        self._thread.join(timeout=5)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def nudge(self) -> None:
        self._wake.set()

    def seed(self, value: int) -> None:
        self._random.seed(value)

    def _switches(self) -> dict[str, Any]:
        return {**DEFAULTS, **self._store.setting("webhooks", {})}

    def _loop(self) -> None:
        while not self._stop.is_set():
            wait = self._round()
            self._wake.wait(wait)
            self._wake.clear()

    def _round(self) -> float:
        """Hand out what is due; the seconds until there may be more."""
        switches = self._switches()
        if switches["paused"]:
            return 0.5
        self._admit(switches)
        now = time.time()
        with self._store.lock:
            rows = self._store.execute(
                "SELECT id, event, endpoint, attempts FROM deliveries WHERE state = 'due' AND next_at <= ? ORDER BY next_at LIMIT 64",
                (now,),
            )
            rows = [r for r in rows if r[0] not in self._busy]
            self._busy.update(r[0] for r in rows)
            later = self._store.execute(
                "SELECT MIN(next_at) FROM deliveries WHERE state = 'due' AND next_at > ?", (now,)
            )[0][0]
        for row in rows:
            self._pool.submit(self._post, *row)
        return 0.5 if later is None else min(0.5, max(0.005, later - time.time()))

    def _admit(self, switches: dict[str, Any]) -> None:
        """Apply loss, duplication, delay and reordering once to each new delivery."""
        if not self._store.execute("SELECT 1 FROM deliveries WHERE state = 'pending' LIMIT 1"):
            return
        with self._store.transaction():
            rows = self._store.execute(
                "SELECT id, event, endpoint, next_at FROM deliveries WHERE state = 'pending' ORDER BY id"
            )
            for id_, event, endpoint, next_at in rows:
                due = next_at + float(switches["delay_s"])
                if self._random.random() < switches["reorder"]:
                    due += self._random.random() * float(switches["reorder_window_s"])
                lost = self._random.random() < switches["loss"]
                self._store.execute(
                    "UPDATE deliveries SET state = ?, next_at = ? WHERE id = ?", ("lost" if lost else "due", due, id_)
                )
                if not lost and self._random.random() < switches["duplicate"]:
                    sql = "INSERT INTO deliveries (event, endpoint, next_at, state) VALUES (?, ?, ?, 'due')"
                    self._store.execute(sql, (event, endpoint, due + 0.01))

    def _post(self, id_: int, event_id: str, endpoint_id: str, attempts: int) -> None:
        status: int | None = None
        error = ""
        try:
            with self._store.lock:
                event = self._store.get(event_id, account=None)
                endpoint = self._store.get(endpoint_id, account=None)
            if event is None or endpoint is None or endpoint["status"] != "enabled":
                self._finish(id_, "dropped", None, "endpoint or event is gone")
                return
            status, error = self._send(event, endpoint)
            if status is not None and 200 <= status < 300:
                self._finish(id_, "delivered", status, "", event_id)
                return
            self._retry(id_, attempts + 1, status, error, event)
        finally:
            with self._store.lock:
                self._busy.discard(id_)
            self._wake.set()

    def _send(self, event: Obj, endpoint: Obj) -> tuple[int | None, str]:
        payload = json.dumps(answers.complete(event))
        headers = {
            "Content-Type": "application/json; charset=utf-8",
            "User-Agent": "Stripe/1.0 (+https://stripe.com/docs/webhooks) tailrace-sandbox",
            # The real clock: a receiver's tolerance is about the wire, not about simulated time.
            "Stripe-Signature": signature(payload, endpoint["_secrets"], int(time.time())),
        }
        try:
            response = self._client.post(endpoint["url"], content=payload, headers=headers)
        except httpx.HTTPError as exc:
            return None, f"{type(exc).__name__}: {exc}"
        return response.status_code, response.text[:200] if response.status_code >= 300 else ""

    def _retry(self, id_: int, attempts: int, status: int | None, error: str, event: Obj) -> None:
        base = float(self._switches()["retry_base_s"])
        wait = min(_MAX_WAIT_S, base * 2 ** (attempts - 1))
        state = "failed" if self._store.now() - event["created"] > _GIVE_UP_S else "due"
        self._store.execute(
            "UPDATE deliveries SET attempts = ?, next_at = ?, state = ?, last_status = ?, last_error = ? WHERE id = ?",
            (attempts, time.time() + wait, state, status, error, id_),
        )

    def _finish(self, id_: int, state: str, status: int | None, error: str, event_id: str | None = None) -> None:
        with self._store.transaction():
            self._store.execute(
                "UPDATE deliveries SET state = ?, attempts = attempts + 1, last_status = ?, last_error = ? WHERE id = ?",
                (state, status, error, id_),
            )
            event = self._store.get(event_id, account=None) if event_id else None
            if event is not None and event["pending_webhooks"] > 0:
                event["pending_webhooks"] -= 1
                self._store.execute("UPDATE objects SET body = ? WHERE id = ?", (json.dumps(event), event_id))
