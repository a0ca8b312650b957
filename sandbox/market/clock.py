"""The time of the run, and the diary of what is to happen in it."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Self

from django.utils import timezone

# Far ahead of every machine's clock: what the database stamps with its own `now()` is due at once. A quarter from here is 90 days.
QUARTER = datetime(2030, 1, 1, tzinfo=UTC)
MONTH_END = datetime(2030, 2, 1, tzinfo=UTC)  # in the middle of a short run
WHOLE = 60  # runs of so many days begin with the quarter

_real_now = timezone.now


def start_of(days: float) -> datetime:
    """Where a run of so many days begins: every one closes a month on its way."""
    return QUARTER if days >= WHOLE else MONTH_END - timedelta(hours=round(days * 12))


class Clock:
    """django.utils.timezone.now, for as long as the run lasts."""

    def __init__(self, start: datetime) -> None:
        self.now = start

    def __call__(self) -> datetime:
        return self.now

    def __enter__(self) -> Self:
        timezone.now = self
        return self

    def __exit__(self, *_: object) -> None:
        timezone.now = _real_now

    def to(self, at: datetime) -> None:
        """Time goes on to `at`; it never goes back."""
        self.now = max(self.now, at)


class Diary:
    """What is to be done when, in order; of two at one instant, whichever was written first."""

    def __init__(self) -> None:
        self._rows: list[tuple[datetime, int, Callable[[], None]]] = []
        self._number = itertools.count()

    def put(self, at: datetime, what: Callable[[], None]) -> None:
        heapq.heappush(self._rows, (at.replace(microsecond=0), next(self._number), what))

    def every(self, first: datetime, step: timedelta, what: Callable[[], None]) -> None:
        """`what` at `first`, and then each `step`."""

        def turn() -> None:
            what()
            self.put(at[0] + step, turn)
            at[0] += step

        at = [first]
        self.put(first, turn)

    def next(self) -> datetime | None:
        return self._rows[0][0] if self._rows else None

    def due(self, now: datetime) -> list[Callable[[], None]]:
        """Takes out what is due."""
        found = []
        while self._rows and self._rows[0][0] <= now:
            found.append(heapq.heappop(self._rows)[2])
        return found
