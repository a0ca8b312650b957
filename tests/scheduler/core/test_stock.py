"""The catalogue's columns answer as `capacity` does, listing by listing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.core import capacity, stock
from scheduler.core.capacity import FOREVER, LEVELS, CapacityError, Claim, Hosts, Pool, Shape
from scheduler.core.stock import Shelf, Timeline

pytestmark = pytest.mark.serverless

host = st.tuples(st.integers(0, 8), st.sampled_from([0, 1, 2]), st.sampled_from([0, 1]), st.sampled_from([3, 5, 9]))
claim = st.tuples(st.integers(0, 9), st.integers(0, 30), st.integers(-2, 30) | st.just(FOREVER), st.integers(0, 9))


@given(
    st.lists(host, max_size=10),
    st.lists(claim, max_size=20),
    st.integers(1, 4),
    st.dictionaries(st.sampled_from([3, 5, 9]), st.integers(0, 20)),
    st.integers(1, 20),
    st.sampled_from(LEVELS),
)
def test_the_columns_answer_as_capacity(hosts, claims, chunk, begins, length, level):
    columns = np.array(hosts, np.int64).reshape(-1, 4)
    shelf = Shelf.of(columns[:, 3], columns[:, 2], columns[:, 1])
    place = np.empty(len(hosts), np.int64)
    place[shelf.order] = np.arange(len(hosts))
    rows = [(h, s, s + n, c) for h, s, n, c in claims if h < len(hosts)]
    table = np.array(rows, np.int64).reshape(-1, 4)
    line = Timeline.of(place[table[:, 0]], table[:, 1], table[:, 2], table[:, 3])
    t2 = 20 + length
    t1 = np.array([begins.get(int(listing), 7) for listing in shelf.listings], np.int64)
    found = stock.largest(shelf, line, columns[:, 0][shelf.order], np.full(len(t1), chunk), level, t1, t2)
    kept = [Claim(i, s, e, ((h, c),)) for i, (h, s, e, c) in enumerate(rows) if s < e and c > 0]
    for listing, start, gpus in zip(shelf.listings.tolist(), t1.tolist(), found.tolist(), strict=True):
        mine = Hosts.of(
            [(i, g, leaf or None, spine or None, of) for i, (g, leaf, spine, of) in enumerate(hosts) if of == listing]
        )
        assert gpus == capacity.largest(Pool.build(mine, kept), Shape(chunk), level, start, t2)
    assert sorted({h[3] for h in hosts}) == shelf.listings.tolist()


def test_a_closed_listing_and_an_empty_market_have_nothing():
    two = np.array([1, 2])
    shelf = Shelf.of(two, np.zeros(2, np.int64), np.zeros(2, np.int64))
    none = np.zeros(0, np.int64)
    line = Timeline.of(none, none, none, none)
    args = (line, np.array([8, 8]), np.array([1, 1]), "site", np.array([0, 0]), 5)
    assert stock.largest(shelf, *args).tolist() == [8, 8]
    assert stock.largest(shelf, *args, np.array([0, 1])).tolist() == [8, 0]
    bare = Shelf.of(none, none, none)
    assert stock.largest(bare, line, none, none, "leaf", none, 5).tolist() == []
    assert bare.total(none).tolist() == bare.least(none).tolist() == []


def test_windows_and_levels_without_meaning_are_refused():
    one = np.array([1])
    shelf, line = Shelf.of(one, one, one), Timeline.of(one - 1, one, one + 5, one)
    for level, t1, t2 in (("planet", 0, 5), ("site", 5, 5)):
        with pytest.raises(CapacityError):
            stock.largest(shelf, line, one, one, level, np.array([t1]), t2)
