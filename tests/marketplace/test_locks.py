"""Locks: in one order whatever was asked, busy after a wait, gone with the transaction."""

import threading

import pytest
from django.db import OperationalError, connection, transaction

from marketplace.locks import Lock, _number, acquire
from tests.marketplace.refusals import refused

pytestmark = pytest.mark.django_db(transaction=True)


class Holder:
    """Another connection that holds `wanted` until told to let go."""

    def __init__(self, *wanted, timeout_ms=3000):
        self.wanted, self.timeout_ms = wanted, timeout_ms
        self.has, self.let_go = threading.Event(), threading.Event()
        self.pid, self.error = 0, None
        self.thread = threading.Thread(target=self.run)

    def run(self):
        try:
            with transaction.atomic():
                with connection.cursor() as cursor:
                    cursor.execute("SELECT pg_backend_pid()")
                    self.pid = cursor.fetchone()[0]
                acquire(*self.wanted, timeout_ms=self.timeout_ms)
                self.has.set()
                self.let_go.wait(30)
        except Exception as error:
            self.error = error
        finally:
            connection.close()

    def __enter__(self):
        self.thread.start()
        assert self.has.wait(30)
        return self

    def __exit__(self, *_):
        self.let_go.set()
        self.thread.join(30)
        assert not self.thread.is_alive()


def held():
    """Of this session: the server shows everybody's, those of tests that run beside this one, too."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT classid::bigint << 32 | objid::bigint FROM pg_locks"
            " WHERE locktype = 'advisory' AND granted AND pid = pg_backend_pid()"
        )
        return {row[0] for row in cursor.fetchall()}


def test_the_order_is_that_of_the_architecture():
    assert [lock.name for lock in sorted(Lock)] == [
        "CELL",
        "ORG",
        "SITE",
        "NODE",
        "HOST",
        "WALLET",
        "COUNTER",
        "PROFIT",
    ]
    assert _number(Lock.CELL, 999_999) < _number(Lock.ORG, 1) < _number(Lock.SITE, 1) < _number(Lock.COUNTER, 0)


def test_locks_are_taken_in_order_and_go_with_the_transaction():
    wanted = [(Lock.SITE, 3), (Lock.CELL, 9), (Lock.SITE, 1), (Lock.SITE, 3)]
    with transaction.atomic():
        acquire(*wanted)
        assert held() == {_number(*pair) for pair in wanted}
    assert held() == set()


def test_outside_a_transaction_there_is_no_lock():
    with pytest.raises(AssertionError):
        acquire((Lock.SITE, 1))


def test_a_lock_that_is_held_is_busy_and_names_what_it_waited_for():
    with Holder((Lock.SITE, 1)):
        with refused("busy") as caught, transaction.atomic():
            acquire((Lock.SITE, 1), (Lock.CELL, 2), timeout_ms=50)
        assert "site 1" in caught.value.detail
        with transaction.atomic():
            acquire((Lock.SITE, 2), (Lock.HOST, 1), timeout_ms=50)  # others are free
    with transaction.atomic():
        acquire((Lock.SITE, 1), timeout_ms=50)


def test_two_that_want_the_same_in_opposite_order_never_wait_in_a_ring():
    barrier, got, errors = threading.Barrier(2), [], []

    def work(wanted):
        try:
            barrier.wait(30)
            for _ in range(40):
                with transaction.atomic():
                    acquire(*wanted, timeout_ms=20_000)
                got.append(1)
        except Exception as error:
            errors.append(error)
        finally:
            connection.close()

    pair = [(Lock.SITE, 1), (Lock.SITE, 2), (Lock.CELL, 1)]
    threads = [threading.Thread(target=work, args=(order,)) for order in (pair, pair[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (len(got), errors) == (80, [])


def test_a_lost_connection_is_not_called_busy():
    """Who waits when the server goes away is told that, not that somebody else is at work."""
    with Holder((Lock.SITE, 1)):
        waiting = Holder((Lock.SITE, 1), timeout_ms=20_000)
        waiting.thread.start()
        with connection.cursor() as cursor:
            for _ in range(3000):
                cursor.execute("SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
                if rows := cursor.fetchall():
                    cursor.execute("SELECT pg_terminate_backend(%s)", rows[0])
                    break
        waiting.thread.join(30)
    assert isinstance(waiting.error, OperationalError)
