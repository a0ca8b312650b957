"""The HTTP side: threads on loopback, one transaction per request, keys, idempotency and armed faults."""

from __future__ import annotations

import base64
import json
import logging
import socket
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from sandbox.stripe import API_VERSION, answers, app, control, pages
from sandbox.stripe.app import Call
from sandbox.stripe.errors import ApiError
from sandbox.stripe.faults import Faults, broken, too_many
from sandbox.stripe.forms import decode
from sandbox.stripe.store import Store
from sandbox.stripe.webhooks import Deliverer

log = logging.getLogger("sandbox.stripe")
_MAX_BODY = 4 * 1024 * 1024


class DropConnectionError(Exception):
    """Close without an answer: the client cannot know whether the work was done."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], store: Store) -> None:
        super().__init__(address, RequestHandler)
        self.store = store
        self.faults = Faults(store)
        self.deliverer = Deliverer(store)
        host, port = self.server_address[:2]
        self.base_url = f"http://{host!s}:{port}"


class RequestHandler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    server_version = "tailrace-sandbox-stripe"
    wbufsize = 65_536

    def setup(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().setup()

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_DELETE(self) -> None:
        self._serve("DELETE")

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        log.debug(format, *args)

    def _serve(self, method: str) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if length > _MAX_BODY:
            self.close_connection = True
            self._send(413, "application/json", b"{}")
            return
        body = self.rfile.read(length).decode()
        url = urlsplit(self.path)
        try:
            if url.path.startswith("/_sandbox"):
                status, answer = control.handle(self.server, method, url.path, body)
                self._send(status, "application/json", json.dumps(answer).encode())
            elif url.path.startswith(("/v1/", "/v2/")):
                self._api(method, url.path, url.query, body)
            else:
                page = pages.handle(self.server, method, url.path, url.query, body)
                self._send(page.status, page.content_type, page.body, page.headers)
        except DropConnectionError:
            self.close_connection = True
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            if method != "GET":
                self.server.deliverer.nudge()

    # --- the API
    def _api(self, method: str, path: str, query: str, body: str) -> None:
        request_id = app.request_id()
        headers = {"Request-Id": request_id, "Stripe-Version": API_VERSION}
        try:
            self._authenticate()
            self.server.faults.limit_rate(method, path)
            fault = self.server.faults.draw(method, path) or {}
            if fault.get("delay_s"):
                time.sleep(float(fault["delay_s"]))
            self._fail_before(fault.get("kind", ""))
            status, answer, replayed = self._execute(method, path, query, body, request_id, fault.get("kind", ""))
            if replayed:
                headers |= {"Idempotent-Replayed": "true", "Original-Request": replayed}
        except ApiError as exc:
            status, answer = exc.status, json.dumps(exc.body)
        if key := self.headers.get("Idempotency-Key"):
            headers["Idempotency-Key"] = key
        if status == 429:
            headers["Stripe-Should-Retry"] = "true"
        self._send(status, "application/json", answer.encode(), headers)

    def _authenticate(self) -> str:
        """The secret key, as Bearer or as Basic's user name; 401 where it is missing or no test key."""
        kind, _, given = (self.headers.get("Authorization") or "").partition(" ")
        if kind.lower() == "basic":
            given = base64.b64decode(given or "Og==").decode(errors="replace").partition(":")[0]
        if not given:
            message = "You did not provide an API key. You need to provide your API key in the Authorization header."
            raise ApiError(401, message, remember=False)
        allowed = self.server.store.setting("api_keys", [])
        if (allowed and given not in allowed) or not given.startswith(("sk_test_", "rk_test_")) or len(given) < 12:
            masked = given[:8] + "*" * max(0, len(given) - 12) + given[-4:]
            raise ApiError(401, f"Invalid API Key provided: {masked}", remember=False)
        return given

    def _fail_before(self, kind: str) -> None:
        if kind == "429":
            raise too_many()
        if kind == "500":
            raise broken()
        if kind == "timeout":
            raise DropConnectionError

    def _execute(
        self, method: str, path: str, query: str, body: str, request_id: str, fault: str
    ) -> tuple[int, str, str | None]:
        found, ids = app.match(method, path)
        try:
            raw = json.loads(body) if path.startswith("/v2/") and body else decode(body if method == "POST" else query)
        except ValueError as exc:
            raise ApiError(400, str(exc), remember=False) from exc
        store, key = self.server.store, self.headers.get("Idempotency-Key") if method == "POST" else None
        scope = f"{self.headers.get('Stripe-Account', '')}/{path[:3]}"
        mark = app.fingerprint(method, path, raw)
        with store.transaction():
            if key and (known := store.remembered(scope, key)):
                if known[0] != mark:
                    raise ApiError(
                        400,
                        "Keys for idempotent requests can only be used with the same parameters they were first used "
                        f"with. Try using a key other than '{key}' if you meant to execute a different request.",
                        type_="idempotency_error",
                        remember=False,
                    )
                return known[1], known[2], known[3]
            call = Call(store, ids, {}, store.now(), self.server.base_url, self._account(store), request_id, key)
            try:
                status, answer = app.answer(call, found, raw)
            except answers.ContractError as exc:
                log.exception("the sandbox broke the SDK's contract")
                raise ApiError(500, f"sandbox contract: {exc}", type_="api_error", remember=False) from exc
            except ApiError:
                raise
            except Exception as exc:
                log.exception("sandbox bug in %s %s", method, path)
                message = f"sandbox bug: {exc!r} {traceback.format_exc(limit=-1)}"
                raise ApiError(500, message, type_="api_error", remember=False) from exc
            remember = answer.pop("_remember", True)
            if fault == "500_after_commit":
                status, answer = 500, broken().body
            text = json.dumps(answer)
            if key and remember:
                store.remember(scope, key, mark, status, text, request_id)
        if fault == "timeout_after_commit":
            raise DropConnectionError
        return status, text, None

    def _account(self, store: Store) -> str:
        account = self.headers.get("Stripe-Account") or ""
        if account and store.get(account, account=None) is None:
            message = f"The provided key does not have access to account '{account}' (or that account does not exist)."
            raise ApiError(403, message, code="account_invalid", remember=False)
        return account

    def _send(self, status: int, content_type: str, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()
