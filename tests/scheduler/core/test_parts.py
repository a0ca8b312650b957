"""What is cut out of a holding and what is left are the whole; what comes back makes it whole again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.core import parts
from scheduler.core.parts import PartsError, Strip, counts, cut, join, size, throughout

pytestmark = pytest.mark.serverless
WHOLE = Strip(0, 100, 1, frozenset(range(8)))


@st.composite
def windows(draw):
    start = draw(st.integers(0, 98))
    return start, draw(st.integers(start + 1, 100))


holdings = st.lists(
    st.tuples(st.integers(1, 3), st.integers(1, 8)), min_size=1, max_size=3, unique_by=lambda pair: pair[0]
).map(lambda hosts: [Strip(0, 100, host, frozenset(range(gpus))) for host, gpus in hosts])


def sold(strips, data):
    """Up to five sales one after another, each of what is held throughout its window."""
    out = []
    for _ in range(data.draw(st.integers(1, 5))):
        start, end = data.draw(windows())
        free = throughout(strips, start, end)
        taken = {host: data.draw(st.sets(st.sampled_from(sorted(gpus)))) for host, gpus in free.items()}
        strips, some = cut(strips, taken, start, end)
        out.append(some)
    return strips, out


@given(holdings, st.data())
def test_cutting_neither_makes_nor_loses_a_gpu_second(strips, data):
    left, out = sold(strips, data)
    assert size(left) + sum(size(some) for some in out) == size(strips)
    for host in (1, 2, 3):
        for at in range(0, 100, 7):
            here = counts(left, host, at) + sum(counts(some, host, at) for some in out)
            assert here == counts(strips, host, at)


@given(holdings, st.data())
def test_what_comes_back_makes_the_whole_again(strips, data):
    left, out = sold(strips, data)
    for some in data.draw(st.permutations(out)):
        left = join([*left, *some])
    assert {(s.start, s.end, s.host, len(s.gpus)) for s in left} == {(0, 100, s.host, len(s.gpus)) for s in strips}


@given(holdings, st.data())
def test_joining_keeps_every_count_whatever_the_devices_are_called_meanwhile(strips, data):
    left, out = sold(strips, data)
    renamed = [s._replace(gpus=frozenset(i + 20 for i in s.gpus)) for some in out for s in some]
    joined = join([*left, *renamed])
    assert size(joined) == size(strips)
    for host in (1, 2, 3):
        for at in range(0, 100, 7):
            assert counts(joined, host, at) == counts(strips, host, at)


def test_a_device_that_worked_before_the_window_goes_on_by_its_own_number():
    left, out = cut([WHOLE], {1: [6, 7]}, 40, 60)
    moved = [out[0]._replace(gpus=frozenset({4, 5}))]  # renumbered while it was on offer
    (whole,) = join([*left, *moved])
    assert whole == WHOLE


def test_part_of_it_comes_back_and_the_rest_stays_away():
    left, _ = cut([WHOLE], {1: [4, 5, 6, 7]}, 40, 60)
    joined = join([*left, Strip(40, 60, 1, frozenset({4, 5}))])
    assert joined == [
        Strip(0, 40, 1, frozenset({6, 7})), Strip(0, 100, 1, frozenset({0, 1, 2, 3, 4, 5})), Strip(60, 100, 1, frozenset({6, 7}))
    ]  # fmt: skip


def test_only_what_is_held_throughout_can_be_cut():
    left, _ = cut([WHOLE], {1: [7]}, 40, 60)
    assert throughout(left, 30, 50) == {1: frozenset(range(7))}
    with pytest.raises(PartsError, match="not held throughout"):
        cut(left, {1: [7]}, 30, 50)
    with pytest.raises(PartsError, match="window"):
        cut([WHOLE], {1: [7]}, 50, 50)


def test_empty_strips_are_nothing():
    assert join([Strip(0, 0, 1, frozenset({1})), Strip(0, 5, 1, frozenset())]) == []
    assert parts.size([]) == 0
