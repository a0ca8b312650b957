"""Availability against brute force: what is promised can be placed, one more cannot, nothing is ever oversold."""

from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.core import capacity
from scheduler.core.capacity import (
    FRAGMENTED,
    LEVELS,
    NEVER_FITS,
    NO_CAPACITY,
    CapacityError,
    Claim,
    Hosts,
    Pool,
    Shape,
)

pytestmark = pytest.mark.serverless

HORIZON = 12


def site(hosts_per_leaf=2, leaves_per_spine=2, spines=2, gpus=8):
    rows = []
    for s, leaf, h in product(range(spines), range(leaves_per_spine), range(hosts_per_leaf)):
        rows.append((f"h{s}{leaf}{h}", gpus, f"l{leaf}", f"s{s}"))
    return Hosts.of(rows)


@st.composite
def small_sites(draw):
    """Up to 6 hosts in a few leaves and spines, sizes 0..4, and claims put where they truly fit."""
    rows = [
        (i, draw(st.integers(0, 4)), draw(st.sampled_from(["a", "b", None])), draw(st.sampled_from(["x", "y", ""])))
        for i in range(draw(st.integers(1, 6)))
    ]
    free = {(row[0], t): row[1] for row in rows for t in range(HORIZON)}
    claims = []
    for key in range(draw(st.integers(0, 6))):
        start = draw(st.integers(0, HORIZON - 1))
        end = draw(st.integers(start + 1, HORIZON))
        hold = []
        for row in rows:
            room = min(free[row[0], t] for t in range(start, end))
            count = draw(st.integers(0, room))
            if count:
                hold.append((row[0], count))
                for t in range(start, end):
                    free[row[0], t] -= count
        if hold:
            claims.append(Claim(key, start, end, tuple(hold)))
    return rows, claims


def cell_of(row, level):
    host, _, leaf, spine = row
    spine = spine or ("own", host)
    leaf = (spine, leaf or ("own", host))
    return {"host": host, "leaf": leaf, "spine": spine, "site": 0}[level]


def brute_largest(rows, claims, chunk, level, t1, t2):
    """Second by second, host by host: no shared code with the module."""
    best = {}
    for row in rows:
        room = min(
            row[1] - sum(n for c in claims if c.start <= t < c.end for h, n in c.hold if h == row[0])
            for t in range(t1, t2)
        )
        cell = cell_of(row, level)
        best[cell] = best.get(cell, 0) + max(room, 0) // chunk * chunk
    return max(best.values(), default=0)


windows = st.tuples(st.integers(0, HORIZON - 1), st.integers(1, HORIZON)).map(
    lambda w: (w[0], min(HORIZON, w[0] + w[1]))
)


@given(small_sites(), windows, st.integers(1, 3), st.sampled_from(LEVELS))
def test_largest_is_what_brute_force_finds_and_is_placeable_and_one_more_is_not(drawn, window, chunk, level):
    rows, claims = drawn
    pool, shape = Pool.build(Hosts.of(rows), claims), Shape(chunk)
    most = capacity.largest(pool, shape, level, *window)
    assert most == brute_largest(rows, claims, chunk, level, *window)
    by_id = {row[0]: row for row in rows}
    for gpus in range(chunk, most + 1, chunk):
        got = capacity.admit(pool, shape, level, gpus, *window)
        assert got.admitted
        assert sum(n for _, n in got.hold) == gpus
        assert all(n % chunk == 0 and n > 0 for _, n in got.hold)
        assert len({cell_of(by_id[h], level) for h, _ in got.hold}) == 1
        assert len({h for h, _ in got.hold}) == len(got.hold)
        assert capacity.violations(pool.plus(Claim("new", *window, got.hold, level, chunk))) == ()
    assert not capacity.admit(pool, shape, level, most + chunk, *window).admitted


@given(small_sites(), windows, st.integers(1, 2), st.sampled_from(LEVELS), st.integers(1, 8))
def test_a_refusal_names_its_reason_and_every_alternative_fits(drawn, window, chunk, level, chunks):
    rows, claims = drawn
    pool, shape, gpus = Pool.build(Hosts.of(rows), claims), Shape(chunk), chunks * chunk
    t1, t2 = window
    got = capacity.admit(pool, shape, level, gpus, t1, t2, not_before=0, horizon_s=HORIZON)
    if got.admitted:
        return
    empty = brute_largest(rows, [], chunk, level, t1, t2)
    wide = brute_largest(rows, claims, chunk, "site", t1, t2)
    assert got.reason == (NEVER_FITS if empty < gpus else FRAGMENTED if wide >= gpus else NO_CAPACITY)
    other = got.alternatives
    assert other.in_window == {name: brute_largest(rows, claims, chunk, name, t1, t2) for name in LEVELS}
    span = t2 - t1

    def fits(start, end):
        return brute_largest(rows, claims, chunk, level, start, end) >= gpus

    assert other.later == next(((t, t + span) for t in range(t1 + 1, t1 + HORIZON + 1) if fits(t, t + span)), None)
    assert other.earlier == next(((t, t + span) for t in range(t1 - 1, -1, -1) if fits(t, t + span)), None)
    assert other.until == next((t for t in range(t2 - 1, t1, -1) if fits(t1, t)), None)


@given(small_sites(), st.integers(1, 2), st.sampled_from(LEVELS), st.integers(1, 5))
def test_calendar_steps_and_segments_agree_with_largest(drawn, chunk, level, step):
    rows, claims = drawn
    pool, shape = Pool.build(Hosts.of(rows), claims), Shape(chunk)
    for cell in capacity.free_calendar(pool, shape, level, 0, HORIZON, step):
        assert cell.gpus == brute_largest(rows, claims, chunk, level, cell.start, cell.end)
    exact = capacity.free_calendar(pool, shape, level, 0, HORIZON)
    assert (exact[0].start, exact[-1].end) == (0, HORIZON)
    assert all(a.end == b.start and a.gpus != b.gpus for a, b in pairwise(exact))
    for cell in exact:
        for t in range(cell.start, cell.end):
            assert cell.gpus == brute_largest(rows, claims, chunk, level, t, t + 1)


@given(st.lists(st.tuples(windows, st.integers(1, 12), st.sampled_from(LEVELS), st.booleans()), max_size=25))
def test_a_year_of_admissions_never_oversells_an_instant(requests):
    pool = Pool.build(site(gpus=4))
    for key, (window, gpus, level, may_move) in enumerate(requests):
        movable = {c.key for c in pool.claims} if may_move else ()
        got = capacity.admit(pool, Shape(1), level, gpus, *window, movable=movable)
        if got.admitted:
            pool = pool.without({c.key for c in got.moves}).plus(*got.moves, Claim(key, *window, got.hold, level))
    assert capacity.violations(pool) == ()
    for t in range(HORIZON):
        for host, size in zip(pool.hosts.ids, pool.hosts.gpus, strict=True):
            assert sum(n for c in pool.claims if c.start <= t < c.end for h, n in c.hold if h == host) <= size


def test_small_blocks_go_where_they_spoil_least():
    hosts = site()
    pool = Pool.build(hosts, [Claim("old", 0, 100, (("h010", 6),))])
    got = capacity.admit(pool, Shape(1), "site", 2, 10, 20)
    assert got.hold == (("h010", 2),)  # the broken host, exactly filled
    assert got.cell_level == "host"
    got = capacity.admit(pool, Shape(8), "site", 8, 10, 20)
    assert got.hold[0][0] == "h011"  # the leaf already broken, not a whole one
    got = capacity.admit(pool, Shape(1), "site", 20, 10, 20)
    assert sorted(n for _, n in got.hold) == [2, 2, 8, 8] or got.cell_level == "spine"


def test_among_equals_the_host_that_is_busy_around_the_window():
    pool = Pool.build(site(), [Claim("before", 0, 10, (("h101", 8),))])
    assert capacity.admit(pool, Shape(8), "host", 8, 10, 20).hold == (("h101", 8),)


def test_back_to_back_windows_share_a_host_and_touching_is_not_overlapping():
    pool = Pool.build(Hosts.of([("a", 8, "l", "s")]), [Claim(1, 0, 10, (("a", 8),)), Claim(2, 20, 30, (("a", 8),))])
    assert capacity.admit(pool, Shape(8), "host", 8, 10, 20).admitted
    refused = capacity.admit(pool, Shape(8), "host", 8, 10, 21)
    assert (refused.reason, refused.alternatives.until, refused.alternatives.later) == (NO_CAPACITY, 20, (30, 41))
    assert refused.alternatives.earlier is None


def test_until_is_the_latest_end_that_fits():
    claims = [
        Claim(start, start, start + 1, (("a", held),)) for start, held in ((5, 1), (10, 2), (15, 5), (20, 8), (25, 1))
    ]
    pool = Pool.build(Hosts.of([("a", 8, "l", "s")]), claims)
    ends = [capacity.admit(pool, Shape(1), "host", gpus, 0, 30).alternatives.until for gpus in (1, 3, 4, 6, 7, 8)]
    assert ends == [20, 20, 15, 15, 10, 5]


def test_sixty_four_buyers_of_the_last_host():
    pool = Pool.build(Hosts.of([("a", 8, "l", "s")]))
    won = 0
    for buyer in range(64):
        got = capacity.admit(pool, Shape(8), "host", 8, 0, 3600)
        if got.admitted:
            won += 1
            pool = pool.plus(Claim(buyer, 0, 3600, got.hold, "host", 8))
        else:
            assert got.reason == NO_CAPACITY
            assert got.alternatives.later == (3600, 7200)
    assert won == 1


def test_movable_claims_make_room_without_losing_theirs():
    hosts = site(hosts_per_leaf=2, leaves_per_spine=2, spines=1)
    claims = [Claim("p", 0, 10, (("h000", 8),), "host", 8), Claim("q", 0, 10, (("h010", 8),), "host", 8)]
    pool = Pool.build(hosts, claims)
    stuck = capacity.admit(pool, Shape(8), "leaf", 16, 0, 10)
    assert stuck.reason == FRAGMENTED
    got = capacity.admit(pool, Shape(8), "leaf", 16, 0, 10, movable={"p", "q"})
    assert got.admitted
    assert len(got.moves) >= 1
    after = pool.without({m.key for m in got.moves}).plus(*got.moves, Claim("r", 0, 10, got.hold, "leaf", 8))
    assert capacity.violations(after) == ()
    assert {c.key: c.gpus for c in after.claims} == {"p": 8, "q": 8, "r": 16}


def test_sites_are_answered_in_one_pass_and_never_joined():
    hosts = Hosts.of([("a", 8, "l", "s", 1), ("b", 8, "l", "s", 2), ("c", 4, "l", "s", 2), ("d", 8, None, None, 2)])
    pool = Pool.build(hosts, [Claim(1, 0, 10, (("b", 3),))])
    assert capacity.largest_each(pool, Shape(1), "leaf", 0, 10) == {1: 8, 2: 9}
    assert capacity.largest_each(pool, Shape(4), "leaf", 0, 10) == {1: 8, 2: 8}
    assert capacity.largest_each(pool, Shape(1), "site", 0, 10) == {1: 8, 2: 17}
    assert capacity.largest(pool, Shape(1), "site", 10, 11) == 20


def test_a_dead_host_shows_its_broken_promises():
    hosts = Hosts.of([("a", 0, "l", "s"), ("b", 8, "l", "s"), ("c", 8, "m", "s")])
    found = capacity.violations(
        Pool.build(
            hosts,
            [Claim(1, 0, 9, (("a", 8),)), Claim(2, 0, 9, (("z", 8),)), Claim(3, 0, 9, (("b", 3), ("c", 4)), "leaf", 4)],
        )
    )
    assert [text.split(":")[0] for text in found] == ["host 'a'", "claim 2", "claim 3", "claim 3"]


def test_claims_begin_early_by_their_lead_but_not_in_the_past():
    assert capacity.claim_window(1000, 2000, 300, 0) == (700, 2000)
    assert capacity.claim_window(1000, 2000, 300, 900) == (900, 2000)
    assert capacity.claim_window(1000, 2000, 300, 1500) == (1000, 2000)


@pytest.mark.parametrize(
    "ask",
    [
        lambda p: capacity.admit(p, Shape(8), "host", 12, 0, 1),
        lambda p: capacity.admit(p, Shape(8), "host", 0, 0, 1),
        lambda p: capacity.largest(p, Shape(1), "row", 0, 1),
        lambda p: capacity.largest(p, Shape(1), "host", 1, 1),
        lambda p: capacity.free_calendar(p, Shape(1), "host", 0, 1, 0),
        lambda p: Shape(0),
        lambda p: p.plus(Claim(1, 5, 5, ())),
        lambda p: Hosts.of([("a", 8, "", ""), ("a", 8, "", "")]),
        lambda p: Hosts.of([("a", -1, "", "")]),
    ],
)
def test_questions_without_meaning_are_refused(ask):
    with pytest.raises(CapacityError):
        ask(Pool.build(site()))


def test_an_empty_pool_offers_nothing():
    pool = Pool.build(Hosts.of([]))
    assert capacity.largest(pool, Shape(1), "site", 0, 1) == 0
    assert capacity.largest_each(pool, Shape(1), "site", 0, 1) == {}
    assert capacity.admit(pool, Shape(1), "site", 1, 0, 1).reason == NEVER_FITS


@given(small_sites(), st.lists(windows, max_size=6), st.integers(1, 2))
def test_one_sweep_answers_as_largest_does_window_by_window(drawn, asked, chunk):
    rows, claims = drawn
    pool, shape = Pool.build(Hosts.of(rows), claims), Shape(chunk)
    found = capacity.largest_over(pool, shape, asked)
    for level in LEVELS:
        assert found[level].tolist() == [capacity.largest(pool, shape, level, *window) for window in asked]
        assert found[level].tolist() == [brute_largest(rows, claims, chunk, level, *window) for window in asked]


@given(
    small_sites(), st.sampled_from(LEVELS), st.integers(1, 6), st.integers(1, 4), st.integers(0, 2), st.integers(1, 3)
)
def test_the_first_windows_begin_as_early_and_last_as_long_as_they_can(drawn, level, gpus, span, lead, grain):
    rows, claims = drawn
    now = 1
    pool = Pool.build(Hosts.of(rows), claims)
    found = capacity.first_windows(
        pool, Shape(1), level, gpus, span, 1, HORIZON, lead_s=lead, now=now, grain_s=grain, limit=20
    )

    def fits(start, end):
        return brute_largest(rows, claims, 1, level, min(start, max(now, start - lead)), end) >= gpus

    expected, at = [], -(-1 // grain) * grain
    while True:
        starts = [t for t in range(at, HORIZON - span + 1) if t % grain == 0 and fits(t, t + span)]
        aligned = [at] if at % grain and at + span <= HORIZON and fits(at, at + span) else []
        start = min([*starts, *aligned], default=None)
        if start is None:
            break
        at = max(
            t
            for t in range(start + span, HORIZON + 1)
            if fits(start, t) and (t % grain == 0 or t in {start + span, HORIZON})
        )
        expected.append((start, at))
    assert list(found) == expected


@given(
    small_sites(),
    st.sampled_from(LEVELS),
    st.integers(1, 6),
    windows,
    st.integers(0, 2),
    st.integers(1, 3),
    st.integers(0, 3),
)
def test_the_nearest_starts_are_the_nearest(drawn, level, gpus, window, lead, grain, now):
    rows, claims = drawn
    pool, (start, end) = Pool.build(Hosts.of(rows), claims), window
    start, span = max(start, now), end - window[0]
    found = capacity.nearest_starts(
        pool, Shape(1), level, gpus, start, span, since=now, until=HORIZON, lead_s=lead, now=now, grain_s=grain
    )

    def fits(at):
        return (
            at % grain == 0 and brute_largest(rows, claims, 1, level, min(at, max(now, at - lead)), at + span) >= gpus
        )

    if brute_largest(rows, claims, 1, level, min(start, max(now, start - lead)), start + span) >= gpus:
        return  # it is only asked where the start itself does not fit
    assert found[0] == next((at for at in range(start - 1, now - 1, -1) if fits(at)), None)
    assert found[1] == next((at for at in range(start + 1, HORIZON) if fits(at)), None)
