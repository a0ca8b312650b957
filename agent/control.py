"""The HTTP side of docs/agent-protocol.md: enrol, sync, logs. No state but the connection."""

from __future__ import annotations

import gzip
import json
from typing import Any

import httpx

PREFIX = "/api/v1/agent"
CALL_S = 20.0
COMPRESS_FROM = 1024


class ControlError(Exception):
    """A call did not succeed. `kind`: unreachable | unauthorized | clock_skew | busy | refused; `retry_after` in seconds."""

    def __init__(self, kind: str, text: str, retry_after: float | None = None) -> None:
        super().__init__(text)
        self.kind, self.retry_after = kind, retry_after


class Control:
    """Calls to the control plane at `url`; `stream_url` is the origin that may wait (sync). One client, kept alive."""

    def __init__(self, url: str, *, stream_url: str = "", key: str = "", version: str = "") -> None:
        self.url = url.rstrip("/")
        self.stream_url = (stream_url or url).rstrip("/")
        headers = {"User-Agent": f"tailrace-agent/{version}"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        self.client = httpx.AsyncClient(headers=headers, timeout=CALL_S)

    async def close(self) -> None:
        await self.client.aclose()

    async def enrol(self, token: str, name: str, version: str, runtime: str) -> dict[str, Any]:
        body = {"token": token, "name": name, "version": version, "runtime": runtime}
        return await self._post(f"{self.url}{PREFIX}/enrol", body, CALL_S)

    async def sync(self, body: dict[str, Any]) -> dict[str, Any]:
        return await self._post(f"{self.stream_url}{PREFIX}/sync", body, CALL_S + float(body["wait_s"]))

    async def logs(self, chunks: list[dict[str, Any]]) -> dict[str, Any]:
        return await self._post(f"{self.url}{PREFIX}/logs", {"chunks": chunks}, CALL_S)

    async def _post(self, url: str, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        raw = json.dumps(body, separators=(",", ":")).encode()
        headers = {"Content-Type": "application/json"}
        if len(raw) >= COMPRESS_FROM:
            raw = gzip.compress(raw, 5)
            headers["Content-Encoding"] = "gzip"
        try:
            response = await self.client.post(url, content=raw, headers=headers, timeout=timeout_s)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ControlError("unreachable", f"{url}: {type(error).__name__}: {error}".rstrip(": ")) from error
        try:
            value = response.json()
        except ValueError:
            value = None
        if response.status_code < 300 and isinstance(value, dict):
            return value
        raise self._error(url, response, value)

    @staticmethod
    def _error(url: str, response: httpx.Response, value: Any) -> ControlError:
        code, text = "", ""
        if isinstance(value, dict):
            problem = value.get("error")
            problem = problem if isinstance(problem, dict) else value
            code = str(problem.get("code") or problem.get("type") or "")
            text = str(problem.get("message") or problem.get("detail") or "")
            wrong = [e for e in problem.get("errors") or () if isinstance(e, dict)]
            text = " ".join([text, *(f"{e.get('pointer')}: {e.get('message')};" for e in wrong[:3])]).rstrip(";")
        message = f"{url} answered {response.status_code} {code} {text}".rstrip()
        try:
            retry = float(response.headers.get("Retry-After", ""))
        except ValueError:
            retry = None
        if response.status_code in (401, 403):
            return ControlError("unauthorized", message, retry)
        if response.status_code == 409 and "clock_skew" in f"{code} {text} {value}":
            return ControlError("clock_skew", message, retry)
        if response.status_code in (429, 503):
            return ControlError("busy", message, retry)
        if response.status_code >= 500 or response.status_code < 300:
            return ControlError("unreachable", message, retry)
        return ControlError("refused", message, retry)
