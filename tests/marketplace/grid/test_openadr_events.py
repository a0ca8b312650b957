"""What OpenADR 3 events say: recorded ones, and ones that make no sense."""

import copy
import json
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marketplace.services.grid.openadr_events import ENDLESS, NotUnderstoodError, Terms, duration, spans

pytestmark = pytest.mark.serverless
RECORDED = json.loads((Path(__file__).parent / "exchanges.json").read_text())
TERMS = Terms(node_w=50_000, cap_w=15_000, strike_uusd_mwh=80_000_000, ven_name="tailrace")


def at(hour, minute=0):
    return datetime(2026, 11, 2, hour, minute, tzinfo=UTC)


def read(name, **terms):
    found = spans(RECORDED[name], Terms(**{**vars(TERMS), **terms}))
    return [(s.start, s.end, s.cap_w, s.mandatory, s.emergency) for s in found]


def test_watts_are_in_kilowatts_and_alike_intervals_are_one_span():
    assert read("import_capacity_limit") == [
        (at(12, 5), at(12, 35), 20_500, True, False),
        (at(12, 35), at(12, 50), 30_000, True, False),
    ]


def test_an_alert_begins_at_once_and_is_an_emergency():
    assert read("alert") == [(at(12), at(13), 15_000, True, True)]


def test_prices_count_from_the_strike_on_and_for_money_alone():
    assert read("prices") == [(at(13), at(15), 15_000, False, False)]
    assert read("prices", strike_uusd_mwh=None) == []


def test_simple_levels():
    assert read("simple") == [
        (at(12, 10), at(12, 20), 32_500, True, False),
        (at(12, 20), at(12, 30), 15_000, True, False),
        (at(12, 30), at(12, 40), 15_000, True, True),
    ]


def test_the_strictest_of_an_interval_holds():
    assert read("setpoint") == [(at(14), at(14, 5), 10_000, True, False)]


@pytest.mark.parametrize("name", ["import_capacity_limit", "simple"])
def test_events_for_others_are_not_ours(name):
    assert read(name, ven_name="somebody") == []


def test_a_randomized_start_stays_where_it_was_drawn():
    event = copy.deepcopy(RECORDED["alert"])
    event["intervalPeriod"] |= {"start": "2026-11-02T12:00:00Z", "randomizeStart": "PT10M"}
    one, two = spans(event, TERMS), spans(event, TERMS)
    assert one == two
    assert at(12) <= one[0].start <= at(12, 10)
    assert one[0].start != spans(event, Terms(50_000, 15_000, None, "another"))[0].start


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("PT15M", 900), ("P1DT2H", 93_600), ("PT0.5S", 0.5), ("P2W", 14 * 86_400), ("P9999Y", ENDLESS.total_seconds())],
)
def test_durations(text, seconds):
    assert duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "P", "PT", "P1DT", "15M", "PT-5M", "PT5M\n5"])
def test_what_is_no_duration(text):
    with pytest.raises(NotUnderstoodError):
        duration(text)


def broken(change):
    event = copy.deepcopy(RECORDED["import_capacity_limit"])
    change(event)
    return event


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e.pop("intervals"),
        lambda e: e["intervals"][0].pop("payloads"),
        lambda e: e["intervals"][0]["payloads"][0].update(values=[]),
        lambda e: e["intervals"][0]["payloads"][0].update(values=["many"]),
        lambda e: e["intervals"][0]["payloads"][0].update(values=[float("nan")]),
        lambda e: e["payloadDescriptors"][0].update(units="HORSEPOWER"),
        lambda e: e["intervalPeriod"].update(start="soon"),
        lambda e: e["intervalPeriod"].update(duration="PT0S"),
        lambda e: e.update(intervals=3),
        lambda e: e.update(targets=[7]),
    ],
)
def test_what_cannot_be_understood_is_refused_by_name(change):
    with pytest.raises(NotUnderstoodError):
        spans(broken(change), TERMS)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 120)), min_size=1, max_size=12))
def test_spans_follow_each_other_and_cover_what_was_asked(rows):
    event = copy.deepcopy(RECORDED["import_capacity_limit"])
    event["intervals"] = [
        {
            "id": i,
            "intervalPeriod": {"duration": f"PT{m}M"},
            "payloads": [{"type": "IMPORT_CAPACITY_LIMIT", "values": [kw]}],
        }
        for i, (kw, m) in enumerate(rows)
    ]
    found = spans(event, TERMS)
    assert sum(((s.end - s.start) for s in found), timedelta()) == timedelta(minutes=sum(m for _, m in rows))
    assert all(a.end == b.start and a.cap_w != b.cap_w for a, b in pairwise(found))
    assert all(0 <= s.cap_w <= TERMS.node_w for s in found)
    assert len({s.key for s in found}) == len(found)
