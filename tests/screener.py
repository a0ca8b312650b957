"""The sandbox's screening service on a real socket, in a thread of its own, with a clock that a test sets."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sandbox.screening import Service


class Screener:
    """`at` is the service's clock, in seconds; `service.control({...})` breaks it."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.at = 0.0

    @property
    def url(self) -> str:
        return self.service.httpd.url

    def control(self, **said: Any) -> None:
        self.service.control(said)


@contextmanager
def running(*, key: str = "") -> Iterator[Screener]:
    service = Service(key=key, clock=lambda: screener.at)
    screener = Screener(service)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    asyncio.run_coroutine_threadsafe(service.httpd.start(), loop).result(10)
    try:
        yield screener
    finally:
        asyncio.run_coroutine_threadsafe(service.httpd.stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
