"""Speaks to the product as its users do: pages with a session, the API with a key, Stripe's pages with a browser's forms.

Nothing here knows the database: what cannot be seen from outside is not seen.
"""

import re
import time
from collections.abc import Callable
from typing import Any, Self
from urllib.parse import urljoin
from uuid import uuid4

import httpx

CARD = {"number": "4242 4242 4242 4242", "expiry": "12/34", "cvc": "123", "name": "A. Customer"}
DECLINED_CARD = {**CARD, "number": "4000 0000 0000 0002"}


class RefusedError(Exception):
    """An answer of 400 or above: `code` and `body` are the problem document's."""

    def __init__(self, response: httpx.Response) -> None:
        try:
            self.body = response.json()
        except ValueError:
            self.body = {"detail": response.text[:300]}
        self.status = response.status_code
        self.code = self.body.get("code", "")
        super().__init__(
            f"{response.request.method} {response.request.url.path}: {self.status} {self.code} {self.body.get('detail', '')}"
        )


def answered(ask: Callable[[], httpx.Response]) -> Any:
    """The body of an answer; asks again where none came, or where it says that later will do. Raises RefusedError."""
    for attempt in range(6):
        try:
            response = ask()
        except httpx.TransportError:
            if attempt == 5:
                raise
            time.sleep(0.5)
            continue
        busy = response.status_code == 409 and response.json().get("code") in {"busy", "idempotency_in_flight"}
        if (busy or response.status_code in {429, 503}) and attempt < 5:
            time.sleep(float(response.headers.get("Retry-After", "1")))
            continue
        if response.status_code >= 400:
            raise RefusedError(response)
        return response.json() if "json" in response.headers.get("content-type", "") else response.text
    raise AssertionError("not reached")


class Client:
    """The API under one key. Writes carry an idempotency key of their own and are repeated with it when no answer came."""

    def __init__(self, base: str, token: str, *, timeout: float = 60) -> None:
        self.http = httpx.Client(
            base_url=base + "/api/v1/", headers={"Authorization": f"Bearer {token}"}, timeout=timeout
        )

    def get(self, path: str, **query: Any) -> Any:
        return answered(lambda: self.http.get(path, params=query))

    def post(self, path: str, body: Any = None, **options: Any) -> Any:
        key = str(uuid4())
        return answered(
            lambda: self.http.post(
                path, json=body if body is not None else {}, headers={"Idempotency-Key": key}, **options
            )
        )

    def every(self, path: str, **query: Any) -> list[Any]:
        """All pages of a list."""
        rows: list[Any] = []
        cursor = None
        while True:
            page = self.get(path, limit=100, **query, **({"cursor": cursor} if cursor else {}))
            rows += page["data"]
            cursor = page["cursor"]
            if not page["has_more"]:
                return rows


class Person:
    """Somebody at a browser: signs up or in, then uses pages and, with the same session, the API."""

    def __init__(self, base: str) -> None:
        self.base = base
        self.http = httpx.Client(base_url=base, follow_redirects=True, timeout=60)

    def sign_up(self, mail: str, password: str) -> Self:
        return self._form("/accounts/signup/", {"email": mail, "password1": password})

    def sign_in(self, mail: str, password: str) -> Self:
        return self._form("/accounts/login/", {"login": mail, "password": password})

    def _form(self, path: str, fields: dict[str, str]) -> Self:
        self.http.get(path)
        response = self.http.post(
            path, data={**fields, "csrfmiddlewaretoken": self.http.cookies["csrftoken"]},
            headers={"Referer": self.base + path}, follow_redirects=False,
        )  # fmt: skip
        if response.status_code not in {302, 303}:
            errors = re.findall(r'class="errorlist[^>]*>(.*?)</ul>', response.text, re.DOTALL)
            raise RefusedError(response) if not errors else RuntimeError(f"{path}: {errors}")
        return self

    def post(self, path: str, body: Any = None) -> Any:
        headers = {
            "X-CSRFToken": self.http.cookies["csrftoken"],
            "Referer": self.base + "/",
            "Idempotency-Key": str(uuid4()),
        }
        return answered(
            lambda: self.http.post(f"/api/v1/{path}", json=body if body is not None else {}, headers=headers)
        )

    def get(self, path: str, **query: Any) -> Any:
        return answered(lambda: self.http.get(f"/api/v1/{path}", params=query))

    def key(self, name: str, scopes: list[str]) -> str:
        return str(self.post("keys", {"name": name, "scopes": scopes})["token"])


def add_card(client: Client, card: dict[str, str] | None = None) -> httpx.Response:
    """Follow the address of Stripe's page and fill its form in; returns the page that answers (402: declined)."""
    url = client.post("payment-methods")["url"]
    return fill_in(url, card or CARD)


def fill_in(url: str, fields: dict[str, str]) -> httpx.Response:
    """Open a page with one form and submit it, hidden fields included; redirects back to us are not followed."""
    with httpx.Client(timeout=30) as browser:
        page = browser.get(url)
        page.raise_for_status()
        hidden = dict(re.findall(r'<input type="hidden" name="([^"]+)" value="([^"]*)"', page.text))
        action = re.search(r'<form[^>]*action="([^"]+)"', page.text)
        target = urljoin(str(page.url), action.group(1)) if action else str(page.url)
        return browser.post(target, data={**hidden, **fields})


def wait_for(what: str, done: Callable[[], Any], *, seconds: float, every: float = 0.5) -> Any:
    """Ask until the answer is true; TimeoutError names what was waited for."""
    deadline = time.monotonic() + seconds
    while True:
        found = done()
        if found:
            return found
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(every)
