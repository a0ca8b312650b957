"""What happens beside a test: calls in threads, each on a database connection of its own."""

import threading
from collections.abc import Callable
from typing import Any

from django.db import connection

from marketplace.errors import MarketError


def in_thread(act: Callable[[], Any]) -> Callable[[], Any]:
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
        thread.join(60)
        assert not thread.is_alive()
        return answers[0]

    return join


def at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    """Run all calls from one barrier; a refusal's code, or what the call answered."""
    barrier = threading.Barrier(len(calls))

    def fairly(call: Callable[[], Any]) -> Any:
        barrier.wait(30)
        answer = None
        for _ in range(20):  # "busy" says try again: a fair client does
            try:
                answer = call()
            except MarketError as error:
                answer = error.code
            if answer != "busy":
                break
        return answer

    joins = [in_thread(lambda call=call: fairly(call)) for call in calls]  # type: ignore[misc]
    return [repr(answer) if isinstance(answer, Exception) else answer for answer in (join() for join in joins)]
