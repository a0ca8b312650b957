"""Faults at a statement: a worker is killed, a connection is cut, a rival goes between two statements of another.

Real ones: the killed worker is a forked process that gets SIGKILL, the cut is the server ending the backend, the rivals
are threads on connections of their own. `At(k, after)` says where: at the call's k-th SQL statement, before or after it
(after the last statement of a transaction is before its COMMIT).
"""

from __future__ import annotations

import json
import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psycopg
from django.db import connection

Call = Callable[[], Any]
PATIENCE_S = 60.0
_inherited: list[Any] = []  # a parent's connections stay open in the child: closing them would end the parent's session


@dataclass(frozen=True)
class At:
    """The place of a fault: `statement` counts from 1."""

    statement: int
    after: bool


@dataclass
class Ended:
    """How a call ended: its answer or its error ("Type: message", with `trace`), and whether it got as far as its fault."""

    answer: Any = None
    error: str = ""
    trace: str = ""
    struck: bool = False

    def failed(self, error: BaseException) -> None:
        self.error = f"{type(error).__name__}: {error}"
        self.trace = "".join(traceback.format_exception(error))


def plain(call: Call) -> Ended:
    """`call` as it comes, undisturbed."""
    ended = Ended()
    try:
        ended.answer = call()
    except Exception as error:
        ended.failed(error)
    return ended


class _Trap:
    """An execute wrapper that acts once, at its statement."""

    def __init__(self, at: At | None, act: Callable[[], None]) -> None:
        self.at, self.act, self.count = at, act, 0

    def __call__(self, execute: Any, sql: Any, params: Any, many: Any, context: Any) -> Any:
        self.count += 1
        here = self.at is not None and self.count == self.at.statement
        if here and self.at is not None and not self.at.after:
            self.act()
        result = execute(sql, params, many, context)
        if here and self.at is not None and self.at.after:
            self.act()
        return result


class Hand(threading.Thread):
    """A thread with a connection that it keeps, for calls beside the main thread's."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.calls: queue.Queue[tuple[Call, _Trap, Ended, threading.Event] | None] = queue.Queue()
        self.pid = 0
        self.start()

    def run(self) -> None:
        while (given := self.calls.get()) is not None:
            call, trap, ended, done = given
            try:
                connection.ensure_connection()
                self.pid = connection.connection.info.backend_pid
                with connection.execute_wrapper(trap):
                    ended.answer = call()
            except BaseException as error:
                ended.failed(error)
            if ended.error or ended.struck:
                connection.close()  # whatever state it was left in
            self.pid = 0
            done.set()
        connection.close()

    def give(self, call: Call, trap: _Trap, ended: Ended) -> threading.Event:
        done = threading.Event()
        self.calls.put((call, trap, ended, done))
        return done


class Surgeon:
    """Two hands, and a connection that watches their sessions and ends them."""

    def __init__(self) -> None:
        self.eye = psycopg.connect(**connection.get_connection_params(), autocommit=True)
        self.hands = (Hand(), Hand())

    def close(self) -> None:
        for hand in self.hands:
            hand.calls.put(None)
        for hand in self.hands:
            hand.join(PATIENCE_S)
        self.eye.close()

    def killed(self, call: Call, at: At) -> Ended:
        """`call` in a forked process that is killed at `at`. What it answered is lost; an error before that comes back."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            _as_child(call, at, writer)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            said = pipe.read()
        _, status = os.waitpid(child, 0)
        backend, _, rest = said.partition(b"\n")
        if backend:
            self._gone(int(backend))
        if os.WIFSIGNALED(status):
            return Ended(struck=True)
        return Ended(*json.loads(rest)) if rest else Ended()

    def _gone(self, pid: int) -> None:
        """Wait until the server has noticed that the client is dead: what it held is free then."""
        deadline = time.monotonic() + PATIENCE_S
        while self.eye.execute("SELECT 1 FROM pg_stat_activity WHERE pid = %s", [pid]).fetchone():
            if time.monotonic() > deadline:
                raise TimeoutError(f"backend {pid} outlives its client")
            time.sleep(0.001)

    def cut(self, call: Call, at: At) -> Ended:
        """`call` on a connection that the server ends at `at`; the process lives on and sees the error."""
        ended, hand = Ended(), self.hands[0]

        def end() -> None:
            ended.struck = True
            self.eye.execute("SELECT pg_terminate_backend(%s, 5000)", [hand.pid])

        _wait(hand.give(call, _Trap(at, end), ended))
        return ended

    def beside(self, first: Call, second: Call, at: At) -> tuple[Ended, Ended]:
        """`second` goes between two statements of `first`, as far as locks let it; then both go on together."""
        one, two = Ended(), Ended()
        paused, resume = threading.Event(), threading.Event()

        def pause() -> None:
            one.struck = True
            paused.set()
            resume.wait(PATIENCE_S)

        first_done = self.hands[0].give(first, _Trap(at, pause), one)
        while not paused.wait(0.002) and not first_done.is_set():
            pass
        second_done = self.hands[1].give(second, _Trap(None, pause), two)
        while not second_done.wait(0.003):
            if resume.is_set() or self._blocked(self.hands[1].pid):
                resume.set()
        resume.set()
        _wait(first_done)
        return one, two

    def _blocked(self, pid: int) -> bool:
        row = self.eye.execute(
            "SELECT 1 FROM pg_stat_activity WHERE pid = %s AND wait_event_type = 'Lock'", [pid]
        ).fetchone()
        return row is not None

    def together(self, calls: tuple[Call, Call]) -> tuple[Ended, Ended]:
        """Both at once, as the machine has it."""
        ends = (Ended(), Ended())
        done = [hand.give(call, _Trap(None, lambda: None), end)
                for hand, call, end in zip(self.hands, calls, ends, strict=True)]  # fmt: skip
        for event in done:
            _wait(event)
        return ends


def _wait(done: threading.Event) -> None:
    if not done.wait(2 * PATIENCE_S):
        raise TimeoutError("a worker hangs")


def _as_child(call: Call, at: At, writer: int) -> None:
    """Never returns."""
    try:
        _inherited.append(connection.connection)
        connection.connection = None
        connection.ensure_connection()
        os.write(writer, b"%d\n" % connection.connection.info.backend_pid)
        with connection.execute_wrapper(_Trap(at, lambda: os.kill(os.getpid(), signal.SIGKILL))):
            call()
    except BaseException as error:
        ended = Ended()
        ended.failed(error)
        os.write(writer, json.dumps([None, ended.error, ended.trace[-4000:]]).encode())
    finally:
        os._exit(0)
