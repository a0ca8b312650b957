"""Tariffs: time of use, coincident peaks, and a kind of one's own."""

from datetime import datetime

import pytest

from scheduler.core import tariffs
from scheduler.core.tariffs import TariffError, added_uusd_mwh, parse

pytestmark = pytest.mark.serverless
EVENING = {
    "kind": "time_of_use",
    "uusd_mwh": 18_000_000,
    "from": "14:00",
    "to": "20:00",
    "weekdays": [0, 1, 2, 3, 4],
    "months": [6, 7],
}
NIGHT = {"kind": "time_of_use", "uusd_mwh": -5_000_000, "from": "22:00", "to": "06:00"}
PEAK = {
    "kind": "coincident_peak",
    "uusd_mw_year": 100_000_000_000,
    "expected_hours": 40,
    "from": "15:00",
    "to": "18:00",
    "months": [6],
}


@pytest.mark.parametrize(
    ("at", "added"),
    [
        ("2026-06-01T13:59:59", 0),  # a Monday
        ("2026-06-01T14:00", 18_000_000),
        ("2026-06-01T15:00", 18_000_000 + 2_500_000_000),
        ("2026-06-01T18:00", 18_000_000),
        ("2026-06-01T20:00", 0),
        ("2026-06-06T16:00", 2_500_000_000),  # a Saturday
        ("2026-07-01T16:00", 18_000_000),
        ("2026-08-03T16:00", 0),
        ("2026-08-03T22:00", -5_000_000),
        ("2026-08-03T05:59", -5_000_000),
        ("2026-08-03T06:00", 0),
    ],
)
def test_what_is_added_when(at, added):
    assert added_uusd_mwh(parse([EVENING, NIGHT, PEAK]), datetime.fromisoformat(at)) == added


@pytest.mark.parametrize(
    ("parts", "field"),
    [
        ({}, "tariff"),
        ([1], "tariff/0/kind"),
        ([EVENING, {"kind": "moon"}], "tariff/1/kind"),
        ([EVENING | {"from": "25:00"}], "tariff/0/from"),
        ([EVENING | {"weekdays": [7]}], "tariff/0/weekdays"),
        ([EVENING | {"months": []}], "tariff/0/months"),
        ([EVENING | {"uusd_mwh": 1.5}], "tariff/0/uusd_mwh"),
        ([EVENING | {"colour": "red"}], "tariff/0/colour"),
        ([PEAK | {"expected_hours": 0}], "tariff/0/expected_hours"),
    ],
)
def test_what_cannot_be_is_named(parts, field):
    with pytest.raises(TariffError) as refused:
        parse(parts)
    assert refused.value.field == field


def test_a_kind_of_ones_own(monkeypatch):
    monkeypatch.setattr(tariffs, "_KINDS", dict(tariffs._KINDS))
    tariffs.register(
        "leap_day", lambda part: lambda local: part["uusd_mwh"] if (local.month, local.day) == (2, 29) else 0
    )
    parts = parse([{"kind": "leap_day", "uusd_mwh": 7}])
    assert [added_uusd_mwh(parts, datetime(2028, 2, day)) for day in (28, 29)] == [0, 7]
