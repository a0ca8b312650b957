"""The limit of calls per key: so many in any period, refused calls not counted, no limit without Redis."""

import secrets
import socket
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marketplace.api.auth import KeyThrottle
from marketplace.tenancy import Actor


class Throttle(KeyThrottle):
    rate = "10/min"


def caller() -> SimpleNamespace:
    """A key that nobody has used."""
    return SimpleNamespace(auth=Actor(kind="key", key_id=secrets.randbits(60)))


def ask(request, at: float) -> tuple[bool, float | None]:
    throttle = Throttle()
    throttle.timer = lambda: at
    return throttle.allow_request(request, None), throttle.wait()


def test_so_many_and_no_more_and_each_key_for_itself():
    request = caller()
    assert [ask(request, 6000.0 + i)[0] for i in range(12)] == [True] * 10 + [False] * 2
    assert ask(caller(), 6011.0)[0]


def test_the_wait_is_long_enough_and_not_too_long():
    request = caller()
    for _ in range(10):
        ask(request, 6030.0)
    allowed, wait = ask(request, 6031.0)
    assert not allowed
    assert wait is not None
    assert not ask(request, 6031.0 + wait - 1)[0]
    assert ask(request, 6031.0 + wait + 6.01)[0]  # one of ten fades in six seconds


def test_the_period_before_counts_by_the_part_of_it_that_is_less_than_a_period_ago():
    request = caller()
    for _ in range(10):
        assert ask(request, 6059.0)[0]
    assert [ask(request, 6090.0)[0] for _ in range(6)] == [True] * 5 + [False]
    assert ask(request, 6180.0)[0]


@given(gaps=st.lists(st.floats(0, 20), min_size=1, max_size=60))
def test_never_more_than_the_limit_within_one_period_of_the_clock(gaps):
    request, at, allowed = caller(), 6000.0, []
    for gap in gaps:
        at += gap
        if ask(request, at)[0]:
            allowed.append(int(at // 60))
    assert max((allowed.count(period) for period in set(allowed)), default=0) <= 10


@pytest.mark.parametrize("silent", [False, True], ids=["refused", "silent"])
def test_without_redis_there_is_no_limit(settings, silent):
    """Nobody listens where Redis should be; or somebody accepts and says nothing, until the time that a request gives it."""
    request = caller()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1] if silent else 1
        settings.CACHES = {"default": {**settings.CACHES["default"], "LOCATION": f"redis://127.0.0.1:{port}/0"}}
        assert all(ask(request, 6000.0)[0] for _ in range(2 if silent else 30))
