"""A small JSON-over-HTTP/1.1 server on asyncio streams, for loopback test peers: keep-alive, gzip requests, no TLS."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self
from urllib.parse import parse_qsl, unquote, urlsplit

from sandbox.site.connections import Connections

REASONS = {
    200: "OK",
    201: "Created",
    202: "Accepted",
    204: "No Content",
    400: "Bad Request",
    401: "Unauthorized",
    404: "Not Found",
}
MAX_BODY = 64 * 1024 * 1024


class Request:
    def __init__(self, method: str, target: str, headers: dict[str, str], body: bytes) -> None:
        parts = urlsplit(target)
        self.method, self.path = method, unquote(parts.path)
        self.query = dict(parse_qsl(parts.query))
        self.headers, self.body = headers, body

    def json(self) -> Any:
        """The body as JSON ({} when empty). Raises ValueError."""
        raw = gzip.decompress(self.body) if self.headers.get("content-encoding") == "gzip" else self.body
        return json.loads(raw) if raw else {}


Handler = Callable[[Request], Awaitable[tuple[int, Any]]]


class Drop(Exception):  # noqa: N818 - it is an instruction, not an error
    """Raised by a handler: close the connection without an answer."""


class Httpd:
    """`handler(request)` answers (status, JSON value). `port` 0 takes a free one."""

    def __init__(self, handler: Handler, port: int = 0, host: str = "127.0.0.1") -> None:
        self.handler, self.port, self.host = handler, port, host
        self.server: asyncio.Server | None = None
        self.connections = Connections()

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    async def start(self) -> None:
        """Raises OSError when the port is taken."""
        self.server = await asyncio.start_server(self._serve, self.host, self.port)
        self.port = self.server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        await self.connections.end([self.server] if self.server else [])

    @contextmanager
    def beside(self) -> Iterator[Self]:
        """Serve in a thread of its own, for as long as the block lasts."""
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()
        asyncio.run_coroutine_threadsafe(self.start(), loop).result(10)
        try:
            yield self
        finally:
            asyncio.run_coroutine_threadsafe(self.stop(), loop).result(10)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(10)
            loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with self.connections.held(writer):
            while await self._one(reader, writer):
                pass

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ", 2)
        headers = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in lines if line)}
        length = int(headers.get("content-length", "0"))
        if length > MAX_BODY:
            return False
        body = await reader.readexactly(length) if length else b""
        try:
            status, value = await self.handler(Request(method, target, headers, body))
        except Drop:
            return False
        except (ValueError, TypeError) as error:
            status, value = 400, {"error": {"code": "bad_request", "message": str(error)}}
        except KeyError as error:
            status, value = 404, {"error": {"code": "not_found", "message": f"unknown {error.args[0]!r}"}}
        payload = value if isinstance(value, bytes) else json.dumps(value).encode()
        kind = "application/octet-stream" if isinstance(value, bytes) else "application/json"
        keep = headers.get("connection", "").lower() != "close"
        writer.write(
            f"HTTP/1.1 {status} {REASONS.get(status, 'Status')}\r\nContent-Type: {kind}\r\nContent-Length: {len(payload)}\r\n"
            f"Connection: {'keep-alive' if keep else 'close'}\r\n\r\n".encode()
            + payload
        )
        await writer.drain()
        return keep
