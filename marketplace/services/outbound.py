"""Calls to hosts that an operator named: never to a host of our own network, and never past what was checked.

The name is resolved when the connection is made, every address of it is judged, and the connection goes to the very address that was
judged: a name that answers otherwise the second time gains nothing. TLS still checks the certificate against the name. No redirects.
"""

import ipaddress
import socket
import ssl
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

import httpcore
import httpx
from django.conf import settings

MOST_BYTES = 4 << 20


class Refused(httpx.TransportError):
    """The host is not one that may be called."""


def refused(url: str) -> str:
    """Why this URL may not be configured; "" where it may. Names are judged when they are called."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return "is not a URL"
    if parts.scheme not in ({"https", "http"} if settings.GRID_PRIVATE_HOSTS else {"https"}):
        return "must begin with https://"
    if not parts.hostname or parts.username or parts.password or parts.fragment or port == 0:
        return "needs a host, and no user, password or fragment"
    try:
        address = ipaddress.ip_address(parts.hostname)
    except ValueError:
        return ""
    return "" if _public(str(address)) else "is an address of a private network"


def _public(address: str) -> bool:
    if settings.GRID_PRIVATE_HOSTS:
        return True
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    return found.is_global and not found.is_multicast


class _Judged(httpcore.NetworkBackend):
    """Connects to public addresses alone."""

    def __init__(self) -> None:
        self._inner = httpcore.SyncBackend()

    def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:  # fmt: skip
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise httpcore.ConnectError(str(error)) from error
        addresses = [str(entry[4][0]) for entry in found]
        if not addresses or not all(_public(a) for a in addresses):
            raise Refused(f"{host} is a host of a private network")
        return self._inner.connect_tcp(addresses[0], port, timeout, local_address, socket_options)


def client(timeout_s: float) -> httpx.Client:
    """An httpx client that goes where `refused` allows, without proxies or redirects."""
    transport = httpx.HTTPTransport(verify=ssl.create_default_context(), trust_env=False)
    transport._pool._network_backend = _Judged()  # noqa: SLF001 - httpx offers no way of its own to choose the connection
    return httpx.Client(timeout=timeout_s, transport=transport, follow_redirects=False, trust_env=False)


def read_json(response: httpx.Response) -> Any:
    """The answer's JSON. Raises ValueError for one that is too long or no JSON."""
    if len(response.content) > MOST_BYTES:
        raise ValueError(f"an answer of {len(response.content)} bytes")
    return response.json()
