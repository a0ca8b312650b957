import itertools
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billing.core.metering import (
    Interval,
    Reading,
    Transition,
    billable_intervals,
    clip,
    cut,
    floor_second,
    interval,
    quantity_in,
    subtract,
    union,
)

pytestmark = pytest.mark.serverless

T0 = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
S0 = floor_second(T0)
STATES = ["intended", "granted", "starting", "running", "unreachable", "parked", "draining", "released"]


def at(seconds: float) -> datetime:
    return T0 + timedelta(seconds=seconds)


def seconds_of(intervals):
    return {second for piece in intervals for second in range(piece.start, piece.end)}


small_intervals = st.lists(
    st.tuples(st.integers(0, 120), st.integers(0, 40)).map(lambda pair: Interval(pair[0], pair[0] + pair[1])),
    max_size=6,
)
timelines = st.lists(
    st.tuples(st.integers(0, 60_000), st.sampled_from(STATES), st.booleans()), min_size=1, max_size=12
).map(
    lambda rows: [
        Transition(at(ms / 1000), sequence, state, proven)
        for sequence, (ms, state, proven) in enumerate(sorted(rows, key=lambda row: row[0]))
    ]
)


def test_billed_from_running_confirmed_to_release_requested():
    timeline = [
        Transition(at(0), 1, "intended"),
        Transition(at(3), 2, "starting"),
        Transition(at(10.9), 3, "running"),
        Transition(at(70.2), 4, "draining"),
        Transition(at(99), 5, "released"),
    ]
    assert billable_intervals(timeline, until=at(1000)) == (Interval(S0 + 10, S0 + 70),)


def test_a_running_placement_is_billable_up_to_the_horizon():
    assert billable_intervals([Transition(at(0), 1, "running")], until=at(7.9)) == (Interval(S0, S0 + 7),)


def test_silence_is_free_until_it_is_proven():
    silent = [
        Transition(at(0), 1, "running"),
        Transition(at(10), 2, "unreachable"),
        Transition(at(40), 3, "running"),
        Transition(at(50), 4, "draining"),
    ]
    proven = [*silent[:2], Transition(at(40), 3, "running", proven=True), silent[3]]
    assert billable_intervals(silent, until=at(99)) == (Interval(S0, S0 + 10), Interval(S0 + 40, S0 + 50))
    assert billable_intervals(proven, until=at(99)) == (Interval(S0, S0 + 50),)
    assert billable_intervals(silent[:2], until=at(99)) == (Interval(S0, S0 + 10),)


def test_exclusions_are_cut_out():
    timeline = [Transition(at(0), 1, "running"), Transition(at(100), 2, "released")]
    holes = [Interval(S0 + 20, S0 + 30), Interval(S0 + 25, S0 + 40), Interval(S0 + 90, S0 + 500)]
    assert billable_intervals(timeline, holes, until=at(1000)) == (
        Interval(S0, S0 + 20),
        Interval(S0 + 40, S0 + 90),
    )


@settings(max_examples=60)
@given(timelines, small_intervals, st.randoms(use_true_random=False))
def test_order_and_repetition_do_not_matter(timeline, holes, random):
    holes = [Interval(S0 + hole.start, S0 + hole.end) for hole in holes]
    expected = billable_intervals(timeline, holes, until=at(100))
    shuffled = timeline + random.choices(timeline, k=3)
    random.shuffle(shuffled)
    assert billable_intervals(shuffled, holes + holes[:1], until=at(100)) == expected


@settings(max_examples=60)
@given(timelines, st.integers(0, 70_000), st.integers(0, 70_000))
def test_a_later_horizon_only_adds(timeline, one, other):
    sooner, later = sorted((one, other))
    first = seconds_of(billable_intervals([t for t in timeline if t.at <= at(sooner / 1000)], until=at(sooner / 1000)))
    second = seconds_of(billable_intervals(timeline, until=at(later / 1000)))
    assert first <= second or any(t.state in {"unreachable", "parked"} for t in timeline) or first == second


@settings(max_examples=60)
@given(timelines, st.integers(1, 60))
def test_splitting_the_timeline_at_an_instant_loses_no_second(timeline, mark):
    whole = billable_intervals(timeline, until=at(80))
    window = (Interval(S0 - 10, S0 + mark), Interval(S0 + mark, S0 + 200))
    left, right = clip(whole, window[0]), clip(whole, window[1])
    assert sum(p.seconds for p in left) + sum(p.seconds for p in right) == sum(p.seconds for p in whole)
    assert not seconds_of(left) & seconds_of(right)
    assert seconds_of(cut(whole, [S0 + mark])) == seconds_of(whole)


@settings(max_examples=60)
@given(small_intervals, small_intervals)
def test_interval_sets_agree_with_sets_of_seconds(left, right):
    assert seconds_of(union(left)) == seconds_of(left)
    assert seconds_of(subtract(left, right)) == seconds_of(left) - seconds_of(right)
    pieces = subtract(left, right)
    assert all(a.end < b.start for a, b in itertools.pairwise(pieces))


def test_seconds_are_utc_across_daylight_saving_and_leap_days():
    chicago = ZoneInfo("America/Chicago")
    spring = interval(datetime(2026, 3, 8, 0, tzinfo=chicago), datetime(2026, 3, 9, 0, tzinfo=chicago))
    autumn = interval(datetime(2026, 11, 1, 0, tzinfo=chicago), datetime(2026, 11, 2, 0, tzinfo=chicago))
    assert (spring.seconds, autumn.seconds) == (23 * 3600, 25 * 3600)
    twice = [datetime(2026, 11, 1, 1, 30, fold=fold, tzinfo=chicago) for fold in (0, 1)]
    assert floor_second(twice[1]) - floor_second(twice[0]) == 3600
    leap = interval(datetime(2028, 2, 28, tzinfo=UTC), datetime(2028, 3, 1, tzinfo=UTC))
    assert leap.seconds == 2 * 86400
    # 2016-12-31T23:59:60Z existed; POSIX time, and so our count, does not know it.
    assert interval(datetime(2016, 12, 31, 23, tzinfo=UTC), datetime(2017, 1, 1, tzinfo=UTC)).seconds == 3600
    assert floor_second(datetime(1969, 12, 31, 23, 59, 59, 500_000, tzinfo=UTC)) == -1


def test_a_naive_instant_is_refused():
    with pytest.raises(ValueError, match="time zone"):
        floor_second(datetime(2026, 1, 1))


@settings(max_examples=60)
@given(st.integers(0, 50), st.integers(1, 60), st.integers(0, 2000), st.data())
def test_windows_that_tile_a_record_add_up_to_its_quantity(start, length, rate, data):
    quantity = data.draw(st.integers(0, rate * length))
    reading = Reading(1, "gpu", Interval(start, start + length), 0, rate, quantity)
    marks = sorted(data.draw(st.sets(st.integers(-10, 130), min_size=0, max_size=6)) | {-20, 150})
    parts = [quantity_in(reading, Interval(a, b)) for a, b in itertools.pairwise(marks)]
    assert sum(parts) == quantity
    assert min(parts) >= 0
