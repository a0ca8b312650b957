"""The sandbox's screening service on a real socket, in a thread of its own, with a clock that a test sets."""

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
    with service.httpd.beside():
        yield screener
