"""The book's rule: price, then time; no one over his limit; nothing twice; whoever types it in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.core import capacity, orders
from scheduler.core.capacity import Claim, Hosts, Pool
from scheduler.core.orders import Ask, Bid, match

pytestmark = pytest.mark.serverless
HOUR = 3600


def bid(number=1, **fields):
    given = {"since": 0, "limit": 10, "gpus": 4, "level": "site", "earliest": 0, "latest": 0, "duration": HOUR,
             "kind": "reserved", "buyer": number, **fields}  # fmt: skip
    return Bid(number, least=given.pop("least", given["gpus"]), **given)


def ask(number=1, hosts=1, claims=(), **fields):
    rows = [((number, n), 8, f"leaf-{n // 2}", "spine") for n in range(hosts)]
    held = [Claim(("held", n), a, b, (((number, host), gpus),)) for n, (host, gpus, a, b) in enumerate(claims)]
    given = {"since": 0, "price": 5, "kind": "reserved", "shelf": number, "chunk": 1, "least": 1, "lead": 0, "site": 1, "shortest": 1,
             "longest": 1000 * HOUR, **fields}  # fmt: skip
    return Ask(number, pool=Pool.build(Hosts.of(rows), held), **given)


def got(matches):
    return [(m.bid, m.ask, m.gpus, m.start // HOUR) for m in matches]


bids = st.lists(
    st.builds(
        lambda since, limit, gpus, part, level, earliest, slack, hours, kind, buyer: {
            "since": since, "limit": limit, "gpus": gpus, "least": max(1, min(gpus, part)), "level": level,
            "earliest": earliest * HOUR, "latest": (earliest + slack) * HOUR, "duration": hours * HOUR, "kind": kind, "buyer": buyer,
        },
        st.integers(0, 3), st.integers(1, 6), st.integers(1, 20), st.integers(1, 20), st.sampled_from(capacity.LEVELS),
        st.integers(0, 6), st.integers(0, 6), st.integers(1, 4), st.sampled_from(["reserved", "reserved", "flexible"]), st.integers(1, 5),
    ),
    max_size=8,
).map(lambda rows: [bid(n, **row) for n, row in enumerate(rows, 1)])  # fmt: skip
asks = st.lists(
    st.builds(
        lambda hosts, claims, since, price, chunk, kind, window, never: {
            "hosts": hosts, "since": since, "price": price, "chunk": chunk, "least": chunk, "kind": kind, "never": never,
            "claims": [(host % hosts, gpus, at * HOUR, (at + hours) * HOUR) for host, gpus, at, hours in claims],
            "window": None if window is None else (window[0] * HOUR, (window[0] + window[1]) * HOUR),
        },
        st.integers(1, 3),
        st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(0, 8), st.integers(1, 5)), max_size=2),
        st.integers(0, 3), st.integers(1, 6), st.sampled_from([1, 2, 4, 8]), st.sampled_from(["reserved", "reserved", "flexible"]),
        st.none() | st.tuples(st.integers(1, 8), st.integers(1, 4)), st.integers(0, 5),
    ),
    max_size=4,
).map(lambda rows: [ask(n, **row) for n, row in enumerate(rows, 1)])  # fmt: skip


@given(bids, asks, st.integers(0, 4 * HOUR))
def test_nothing_is_sold_twice_nor_over_a_limit_nor_otherwise_than_asked(wanted, offered, now):
    found = match(wanted, offered, now)
    by_bid, by_ask = {b.id: b for b in wanted}, {a.id: a for a in offered}
    for m in found:
        b, a = by_bid[m.bid], by_ask[m.ask]
        assert m.price == a.price <= b.limit
        assert max(b.earliest, now) <= m.start <= b.latest
        assert m.end - m.start == b.duration
        assert m.gpus % a.chunk == 0
        assert m.gpus >= a.least
        assert (a.kind, a.never) != (b.kind, b.buyer)
        assert a.kind == b.kind
        assert a.window in {None, (m.start, m.end)}
    for b in wanted:
        mine = [m for m in found if m.bid == b.id]
        assert sum(m.gpus for m in mine) <= b.gpus
        if b.least == b.gpus:
            assert [m.gpus for m in mine] in ([], [b.gpus])
    for a in offered:
        # As counts, whatever hosts were chosen: what was sold beside what was held fits at every instant.
        pool = a.pool
        for m in [m for m in found if m.ask == a.id]:
            b = by_bid[m.bid]
            admitted = capacity.admit(pool, capacity.Shape(a.chunk), b.level, m.gpus, m.start, m.end)
            assert admitted.admitted
            pool = pool.plus(Claim(("m", b.id), m.start, m.end, admitted.hold))
        assert capacity.violations(pool) == capacity.violations(a.pool)


@given(bids, asks, st.randoms(use_true_random=False))
def test_the_order_of_the_input_means_nothing(wanted, offered, random):
    found = match(wanted, offered, 0)
    random.shuffle(wanted)
    random.shuffle(offered)
    assert match(wanted, offered, 0) == found


@given(bids, asks)
def test_price_then_time(wanted, offered):
    """A bid that is doubled, later or lower, gets nothing where the first got nothing."""
    for first in wanted[:3]:
        later = first._replace(id=100, since=first.since + 1)
        lower = first._replace(id=101, limit=max(1, first.limit - 1), since=0)
        found = match([*wanted, later, lower], offered, 0)
        took = {n: sum(m.gpus for m in found if m.bid == n) for n in (first.id, 100, 101)}
        assert took[100] <= took[first.id] or first.least < first.gpus
        assert took[first.id] or not took[100]
        if lower.limit < first.limit:
            assert took[first.id] or not took[101]


@given(bids, asks)
def test_nobody_is_left_who_could_be_served(wanted, offered):
    """When all is matched, one more round finds nothing for a bid that got nothing."""
    found = match(wanted, offered, 0)
    pools = {a.id: a.pool for a in offered}
    by_bid = {b.id: b for b in wanted}
    for m in found:
        b = by_bid[m.bid]
        a = next(a for a in offered if a.id == m.ask)
        hold = capacity.admit(pools[m.ask], capacity.Shape(a.chunk), b.level, m.gpus, m.start, m.end).hold
        pools[m.ask] = pools[m.ask].plus(Claim(("m", b.id), m.start, m.end, hold))
    rest = [b for b in wanted if b.id not in {m.bid for m in found}]
    assert match(rest, [a._replace(pool=pools[a.id]) for a in offered], 0) == []


def test_the_cheapest_then_the_older_ask_and_the_askers_price():
    found = match([bid(gpus=2)], [ask(1, price=6), ask(2, price=5, since=9), ask(3, price=5, since=4)], 0)
    assert [(m.ask, m.price) for m in found] == [(3, 5)]


def test_the_higher_limit_then_the_older_bid():
    found = match(
        [bid(1, limit=9), bid(2, limit=10, since=5), bid(3, limit=10, since=4)], [ask(claims=[(0, 2, 0, HOUR)])], 0
    )
    assert got(found) == [(3, 1, 4, 0)]


def test_all_or_nothing_beside_parts():
    offered = [ask(1, price=3, claims=[(0, 5, 0, 9 * HOUR)]), ask(2, price=4)]
    assert got(match([bid(gpus=8)], offered, 0)) == [(1, 2, 8, 0)]
    assert got(match([bid(gpus=8, least=2)], offered, 0)) == [(1, 1, 3, 0), (1, 2, 5, 0)]
    assert got(match([bid(gpus=8, least=4)], offered, 0)) == [(1, 2, 8, 0)]


def test_the_earliest_start_at_which_all_of_it_fits():
    busy = [ask(claims=[(0, 6, 0, 2 * HOUR), (0, 3, 2 * HOUR, 5 * HOUR)])]
    assert got(match([bid(gpus=4, latest=9 * HOUR)], busy, 0)) == [(1, 1, 4, 2)]
    assert got(match([bid(gpus=8, latest=9 * HOUR)], busy, 0)) == [(1, 1, 8, 5)]
    assert match([bid(gpus=8, latest=4 * HOUR)], busy, 0) == []


def test_a_resale_is_taken_for_its_window_alone_and_never_by_its_seller():
    window = (3 * HOUR, 5 * HOUR)
    fits = {"earliest": HOUR, "latest": 4 * HOUR, "duration": 2 * HOUR}
    assert got(match([bid(**fits)], [ask(window=window)], 0)) == [(1, 1, 4, 3)]
    assert match([bid(**{**fits, "duration": HOUR})], [ask(window=window)], 0) == []
    assert match([bid(**{**fits, "latest": 2 * HOUR})], [ask(window=window)], 0) == []
    assert match([bid(**fits)], [ask(window=window, never=1)], 0) == []
    assert match([bid(**fits)], [ask(window=window, only=frozenset({7}))], 0) == []
    assert match([bid(**fits)], [ask(window=window)], 3 * HOUR) == []


def test_a_level_is_kept():
    offered = [ask(hosts=4)]
    assert match([bid(gpus=16, level="host")], offered, 0) == []
    assert got(match([bid(gpus=16, level="leaf")], offered, 0)) == [(1, 1, 16, 0)]
    assert match([bid(gpus=24, level="leaf")], offered, 0) == []


@pytest.mark.parametrize("wrong", [{"gpus": 0, "least": 0}, {"least": 9}, {"duration": 0}])
def test_a_bid_without_meaning_is_refused(wrong):
    with pytest.raises(ValueError, match="least"):
        match([bid(**wrong)], [], 0)


def test_two_of_one_id_are_refused():
    with pytest.raises(ValueError, match="twice"):
        match([bid(), bid()], [], 0)
    with pytest.raises(ValueError, match="twice"):
        match([], [ask(), ask()], 0)


def test_two_kinds_of_one_listing_sell_the_same_gpus_once():
    kinds = [ask(1, shelf=9), ask(2, shelf=9, kind="flexible", price=4)]
    found = match([bid(1, gpus=6), bid(2, gpus=6, kind="flexible", limit=9), bid(3, gpus=2, kind="flexible")], kinds, 0)
    assert got(found) == [(1, 1, 6, 0), (3, 2, 2, 0)]


def test_lead_is_kept_clear_before_each_start():
    found = match([bid(gpus=8, latest=9 * HOUR)], [ask(claims=[(0, 1, 0, HOUR)], lead=300)], 0)
    assert [m.start for m in found] == [HOUR + 300]


def test_the_line_is_public():
    assert [b.id for b in orders.line([bid(1, limit=1), bid(2, limit=2)])] == [2, 1]
