"""The step-by-step report: what was done, how long it took, what was seen."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


class BrokenError(Exception):
    """A promise of the product that did not hold."""


class Report:
    def __init__(self) -> None:
        self.began = time.monotonic()
        self.kept = 0

    @contextmanager
    def step(self, what: str) -> Iterator[list[str]]:
        """A step; the block appends what it saw to the list it gets."""
        start = time.monotonic()
        seen: list[str] = []
        try:
            yield seen
        except BaseException:
            self._line("BROKEN", what, start, seen)
            raise
        self.kept += 1
        self._line("ok", what, start, seen)

    def _line(self, mark: str, what: str, start: float, seen: list[str]) -> None:
        now = time.monotonic()
        detail = "; ".join(seen)
        print(
            f"{now - self.began:6.1f} s  {mark:6} {what} ({now - start:.1f} s){': ' + detail if detail else ''}",
            flush=True,
        )


def expect(condition: object, sentence: str) -> None:
    """Raise BrokenError with the sentence unless the condition holds."""
    if not condition:
        raise BrokenError(sentence)


def say(sentence: str) -> None:
    print(f"          {sentence}", file=sys.stderr, flush=True)
