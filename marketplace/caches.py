"""Redis as the cache's server, by its own commands: for counters and for telling who waits. It holds no truth."""

from functools import cache
from typing import Any

from django.core.cache import caches
from redis import Redis


def client() -> Any:
    """A client on the cache's own connections. Django makes one for each call, which costs as much as the call."""
    return _of(caches["default"]._cache._get_connection_pool(write=True))  # type: ignore[attr-defined]  # noqa: SLF001


@cache
def _of(pool: Any) -> Any:
    return Redis(connection_pool=pool)
