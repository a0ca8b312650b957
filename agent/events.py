"""Events: spooled on disk until control acknowledges them by id, so each is delivered although calls are lost."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from agent.store import Store
from agent.times import to_wire

log = logging.getLogger("agent.events")
BATCH = 200
SPOOL = 20_000


class Events:
    def __init__(self, store: Store, on_news: Callable[[], None] = lambda: None) -> None:
        self.store, self.on_news = store, on_news
        self.waiting: dict[str, dict[str, Any]] = dict(
            sorted(store.all("event").items(), key=lambda item: (item[1]["at"], item[0]))
        )

    def add(self, kind: str, subject: str, /, **data: Any) -> None:
        """Beyond SPOOL events the oldest is dropped: a site that nobody hears for days must not fill its disk."""
        key = str(uuid.uuid4())
        event = {"id": key, "at": to_wire(time.time()), "kind": kind, "subject": subject, "data": data}
        log.info("%s %s %s", kind, subject, data or "")
        self.waiting[key] = event
        self.store.put("event", key, event)
        if len(self.waiting) > SPOOL:
            self.acknowledge([next(iter(self.waiting))])
        self.on_news()

    def batch(self) -> list[dict[str, Any]]:
        return [event for _, event in zip(range(BATCH), self.waiting.values(), strict=False)]

    def acknowledge(self, ids: Iterable[str]) -> None:
        with self.store.batch():
            for key in ids:
                if self.waiting.pop(key, None):
                    self.store.delete("event", key)
