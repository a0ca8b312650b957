"""The two sockets of the run: our API as customers and operators reach it, and Stripe's sandbox as a process of its own."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from datetime import datetime
from pathlib import Path
from random import Random
from typing import Any, Self

import httpx
from django.conf import settings
from django.core.servers.basehttp import ThreadedWSGIServer, WSGIRequestHandler
from django.core.wsgi import get_wsgi_application

from billing.gateway import wire
from sandbox.client import Client, Person, answered, fill_in
from sandbox.smoke.world import ALL_SCOPES

SCOPES = [*ALL_SCOPES, "maintenance:read", "maintenance:write", "screening:read", "screening:write"]
SECRET = "whsec_market"


class _Quiet(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Nobody reads a line a request, of a hundred thousand."""


class Web:
    """The product's web process, in a thread of ours: it shares the clock."""

    def __enter__(self) -> Self:
        self.server = ThreadedWSGIServer(("127.0.0.1", 0), _Quiet)
        self.server.daemon_threads = True
        self.server.set_app(get_wsgi_application())
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()
        self.base = f"http://127.0.0.1:{self.server.server_port}"
        # One connection for all: the server has a thread, and a session with the database, for each.
        self.wire = httpx.HTTPTransport(limits=httpx.Limits(max_connections=1, max_keepalive_connections=1))
        return self

    def __exit__(self, *_: object) -> None:
        self.wire.close()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(10)

    def desk(self, token: str) -> Desk:
        return Desk(self, token)


class Desk(Client):
    """The API under one key, over the connection that all share."""

    def __init__(self, web: Web, token: str) -> None:
        self.http = httpx.Client(
            base_url=web.base + "/api/v1/", headers={"Authorization": f"Bearer {token}"}, timeout=60, transport=web.wire
        )

    def patch(self, path: str, body: dict[str, Any]) -> Any:
        return answered(lambda: self.http.patch(path, json=body))

    def put(self, path: str, body: dict[str, Any]) -> Any:
        return answered(lambda: self.http.put(path, json=body))


def sign_up(web: Web, name: str, **kind: Any) -> tuple[str, Desk]:
    """(organization, its key's desk), made as a person makes them: sign-up, organization, key."""
    person = Person(web.base)
    person.sign_up(f"{name.replace(' ', '.').lower()}@market.example", hashlib.sha256(name.encode()).hexdigest()[:16])
    organization = person.post("organizations", {"name": name, "livemode": True, **kind})
    token = person.key("market", SCOPES)
    person.http.close()
    return str(organization["id"]), web.desk(token)


class Stripe:
    """The sandbox's process, its clock led by ours; its events are posted to our webhook by `hear`, signed."""

    def __enter__(self) -> Self:
        self.folder = tempfile.TemporaryDirectory(prefix="market-stripe-")
        command = [
            sys.executable,
            "-m",
            "sandbox.stripe",
            "--port",
            "0",
            "--state",
            str(Path(self.folder.name, "state.sqlite")),
        ]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
        )
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        assert "http://" in said, said
        self.url = "http://" + said.split("http://")[1].strip()
        self.before = (settings.STRIPE_BASE_URL, settings.STRIPE_WEBHOOK_SECRETS, wire.RETRIES)
        settings.STRIPE_BASE_URL, settings.STRIPE_WEBHOOK_SECRETS = self.url, [SECRET]
        wire.RETRIES = 0  # our own repetition is what must be right
        wire._client.cache_clear()
        self.control("faults", {"settle_s": 0})
        self.heard: set[str] = set()
        return self

    def __exit__(self, *_: object) -> None:
        settings.STRIPE_BASE_URL, settings.STRIPE_WEBHOOK_SECRETS, wire.RETRIES = self.before
        wire._client.cache_clear()
        self.process.terminate()
        self.process.wait(10)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.folder.cleanup()

    def control(self, path: str, body: dict[str, Any] | None = None, method: str = "POST") -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/_sandbox/{path}", data=data, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return dict(json.loads(answer.read()))

    def objects(self, kind: str) -> list[dict[str, Any]]:
        return list(self.control(f"objects/{kind}", method="GET")["data"])

    def at(self, now: datetime) -> None:
        self.control("clock", {"now": now.timestamp()})

    def card(self, desk: Client, number: str) -> bool:
        """A card is added on Stripe's page; False where it is declined there."""
        url = desk.post("payment-methods")["url"]
        fields = {"number": number, "expiry": "12/44", "cvc": "123", "name": "A. Customer"}
        return fill_in(url, fields).status_code in {302, 303}

    def onboard(self, desk: Client, name: str) -> None:
        fill_in(
            desk.post("payouts/account")["url"], {"registered_name": name, "bank_account": "1", "result": "complete"}
        )

    def hear(self, web: Web, dice: Random) -> int:
        """Post what is new to our webhook: some twice, not always in order. Returns how many were new."""
        fresh = [event for event in self.objects("event") if event["id"] not in self.heard]
        self.heard |= {event["id"] for event in fresh}
        told = [event for event in fresh for _ in range(1 + (dice.random() < 0.15))]
        if dice.random() < 0.3:
            dice.shuffle(told)
        with httpx.Client(transport=httpx.HTTPTransport()) as client:
            for event in told:
                body = json.dumps(event).encode()
                stamp = int(time.time())
                digest = hmac.new(SECRET.encode(), f"{stamp}.".encode() + body, hashlib.sha256).hexdigest()
                headers = {"Stripe-Signature": f"t={stamp},v1={digest}", "Content-Type": "application/json"}
                answer = client.post(f"{web.base}/api/v1/webhooks/stripe", content=body, headers=headers)
                assert answer.status_code == 200, answer.text
        return len(fresh)
