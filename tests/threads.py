"""What happens beside a test: calls in threads, each on a database connection of its own."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from django.db import connection

from marketplace.errors import MarketError


def in_thread(act: Callable[[], Any], patience_s: float = 60) -> Callable[[], Any]:
    """Begin `act`; the returned join() waits for its end and gives its answer, or the error that it ended with."""
    answers: list[Any] = []

    def run() -> None:
        try:
            answers.append(act())
        except Exception as error:
            answers.append(error)
        finally:
            connection.close()

    thread = threading.Thread(target=run)
    thread.start()

    def join() -> Any:
        thread.join(patience_s)
        assert not thread.is_alive()
        return answers[0]

    return join


def at_once(calls: list[Callable[[], Any]], connections: int | None = None) -> list[Any]:
    """Run all calls from one barrier; a refusal's code, or what the call answered. `connections`: so many of them have one at a
    time, as behind a pool; whoever has none waits for the next that is free.
    """
    barrier = threading.Barrier(len(calls))
    pool: AbstractContextManager[Any] = (
        nullcontext() if connections is None else threading.BoundedSemaphore(connections)
    )

    def fairly(call: Callable[[], Any]) -> Any:
        barrier.wait(30)
        answer = None
        for _ in range(20):  # "busy" says try again: a fair client does
            try:
                with pool:
                    try:
                        answer = call()
                    finally:
                        if connections is not None:
                            connection.close()
            except MarketError as error:
                answer = error.code
            if answer != "busy":
                break
        return answer

    joins = [in_thread(lambda call=call: fairly(call), 60 if connections is None else 240) for call in calls]  # type: ignore[misc]
    return [repr(answer) if isinstance(answer, Exception) else answer for answer in (join() for join in joins)]
