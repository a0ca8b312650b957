"""A VEN's side of OpenADR 3 over HTTP: a token by client credentials, programs and events in pages, reports.

Errors of any kind are `Unavailable`, in words that hold no secret: a poll that fails changes nothing.
"""

from dataclasses import dataclass, field
from time import monotonic
from typing import Any
from urllib.parse import quote

import httpx

from marketplace.services import outbound

TIMEOUT_S = 10
PAGE, MOST_PAGES = 50, 20


class Unavailable(Exception):  # noqa: N818 - names the state, as in HTTP 503
    """No answer, or none that can be understood."""


@dataclass
class Client:
    """`secret` empty: the VTN asks for no token. Keeps its token as long as the VTN says that it holds."""

    url: str
    token_url: str = ""
    client_id: str = ""
    secret: str = ""
    token: str = field(default="", repr=False)
    until: float = 0.0

    def programs(self) -> list[dict[str, Any]]:
        return self._pages("/programs", {})

    def events(self, program_id: str) -> list[dict[str, Any]]:
        return self._pages("/events", {"programID": program_id} if program_id else {})

    def event(self, event_id: str) -> dict[str, Any] | None:
        """None: it is gone."""
        answer = self._ask("GET", f"/events/{event_id}")
        if answer.status_code == httpx.codes.NOT_FOUND:
            return None
        try:
            found = outbound.read_json(answer)
        except ValueError as error:
            raise Unavailable("event: no JSON") from error
        if answer.status_code != httpx.codes.OK or not isinstance(found, dict):
            raise Unavailable(f"event: HTTP {answer.status_code}")
        return found

    def report(self, body: dict[str, Any]) -> None:
        """One report; one that the VTN has already (409) is as good."""
        answer = self._ask("POST", "/reports", json=body)
        if answer.status_code not in {200, 201, 409}:
            raise Unavailable(f"reports: HTTP {answer.status_code}")

    def _pages(self, path: str, query: dict[str, str]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for number in range(MOST_PAGES):
            params = {**query, "skip": str(number * PAGE), "limit": str(PAGE)}
            answer = self._ask("GET", path, params=params)
            if answer.status_code != httpx.codes.OK:
                raise Unavailable(f"{path[1:]}: HTTP {answer.status_code}")
            try:
                rows = outbound.read_json(answer)
            except ValueError as error:
                raise Unavailable(f"{path[1:]}: no JSON") from error
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise Unavailable(f"{path[1:]}: not a list of objects")
            found += rows
            if len(rows) < PAGE:
                return found
        raise Unavailable(f"{path[1:]}: more than {PAGE * MOST_PAGES}")

    def _ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        try:
            with outbound.client(TIMEOUT_S) as http:
                answer = self._once(http, method, path, more)
                if answer.status_code == httpx.codes.UNAUTHORIZED and self.secret:
                    self.until = 0.0  # taken back before its time
                    answer = self._once(http, method, path, more)
                return answer
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise Unavailable(f"{path[1:]}: {type(error).__name__}") from error

    def _once(self, http: httpx.Client, method: str, path: str, more: dict[str, Any]) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self._bearer(http)}"} if self.secret else {}
        return http.request(method, self.url.rstrip("/") + quote(path), headers=headers, **more)

    def _bearer(self, http: httpx.Client) -> str:
        if monotonic() >= self.until:
            given = {"grant_type": "client_credentials", "client_id": self.client_id, "client_secret": self.secret}
            answer = http.post(self.token_url or f"{self.url.rstrip('/')}/auth/token", data=given)
            if answer.status_code not in {200, 201}:
                raise Unavailable(f"token: HTTP {answer.status_code}")
            try:
                said = outbound.read_json(answer)
                self.token, lasts = str(said["access_token"]), float(said.get("expires_in") or 3600)
            except (ValueError, KeyError, TypeError) as error:
                raise Unavailable("token: an answer that makes no sense") from error
            self.until = monotonic() + max(0.0, lasts - 30)
        return self.token
