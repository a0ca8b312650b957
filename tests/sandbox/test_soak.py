"""A quarter of an hour of the power soak, and each of its rules broken on purpose; `full`: some hours of two more seeds."""

import logging
import sys
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest
from django.db.models import F

from marketplace.models import Host, Miner, PowerNode
from sandbox.market import environment
from sandbox.soak import __main__ as soak_main
from sandbox.soak import report
from sandbox.soak.faults import LONGER, MINUTE, ROWS, Fault, missing
from sandbox.soak.soak import Soak

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def fresh():
    environment.empty()


@pytest.mark.parametrize(("seed", "hours"), [(1, 0.25), *(pytest.param(s, 4, marks=pytest.mark.full) for s in (2, 3))])
def test_no_breaker_trips_and_all_comes_back(seed, hours):
    outcome = Soak(seed, minutes=600, hours=hours).run()
    assert not outcome.violations, "\n".join(report.lines(outcome))
    assert outcome.counts["turns"] > 30
    assert outcome.faults
    assert outcome.back_in is not None
    if hours > 3:
        assert outcome.missing == [], "\n".join(report.lines(outcome))


def fault(name, **more):
    began = datetime(2027, 1, 1, tzinfo=UTC)
    return Fault("row", "what", began + MINUTE, lambda: None, began, Counter(), name=name, **more)


def test_a_row_that_never_struck_was_never_seen_or_was_not_answered_is_missing():
    whole = [fault(name, struck=True) for name in ROWS]
    assert missing(whole) == []
    assert missing(whole[1:]) == ["acknowledges and ignores: it never struck"]
    whole[0].struck = False
    assert missing(whole) == ["acknowledges and ignores: it struck 1 times, and was never to be seen at the site"]
    for unanswered in ({"answers": ("sleeps",)}, {"never": ("wakes",)}):
        whole[0] = fault(ROWS[0], struck=True, **unanswered)
        (words,) = missing(whole)
        assert "nothing was done about it" in words
        assert next(iter(unanswered.values()))[0] in words
    whole[0].held = Counter()
    assert missing(whole) == [], "what must not rise was watched"
    whole[0] = fault(ROWS[0], struck=True, answers=("sleeps",), done={"sleeps": 1})
    assert missing([*whole, fault(ROWS[0])]) == [], "once is enough"


def test_a_fault_that_nothing_has_answered_goes_on_for_a_while():
    made = fault("lies", answers=("sleeps",), shows=lambda: False)
    assert not made.over(made.until - MINUTE)
    assert not made.over(made.until)
    assert made.over(made.until + LONGER), "not for ever"
    made.struck = True
    made.watch(made.until, Counter(sleeps=1))
    assert made.over(made.until), "it was answered"
    assert fault("control_away", never=("wakes",)).over(made.until), "nothing is to answer it"


def test_a_run_of_which_a_row_proves_nothing_ends_with_an_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["soak-power", "--hours", "0.02"])
    monkeypatch.setattr(logging, "disable", lambda _level: None)
    assert soak_main.main() == 1
    said = capsys.readouterr().out
    assert "lies: it never struck" in said
    assert "0 violations" in said


class _Broken(Soak):
    """A soak in which something is done that must never be."""

    def _weather(self, began):
        self.hours = 0.02
        super()._weather(began)
        self.break_it()
        self.outcome.violations += self.watch.look()


def test_watts_that_are_not_there_are_seen():
    """Every host is granted its full power while the machines hash on."""

    class Granted(_Broken):
        def break_it(self):
            Host.objects.update(reserved_w=10_200)

    outcome = Granted(1, minutes=600).run()
    assert any("granted and drawn together" in words for words in outcome.violations)
    assert any("its devices with" in words for words in outcome.violations)


def test_a_breaker_that_trips_is_seen():
    class Tripped(_Broken):
        def break_it(self):
            self.site.physics.fixed += 1e6
            for _ in range(30):
                self.clock.to(self.clock.now + timedelta(seconds=1))
                self.site.physics.step(1.0, self.clock.now.timestamp())

    outcome = Tripped(1, minutes=600).run()
    assert any("a breaker tripped" in words for words in outcome.violations)


def test_a_node_over_its_cap_is_seen_where_no_fault_has_lifted_it():
    class Over(_Broken):
        def break_it(self):
            self.site.physics.fixed[0] += 1.05 * self.site.physics.cap[0] - self.site.physics.true_w[0]
            for _ in range(2):
                self.clock.to(self.clock.now + timedelta(seconds=1))
                self.site.physics.step(1.0, self.clock.now.timestamp())

    outcome = Over(1, minutes=600).run()
    assert any("over its cap" in words and "no fault had lifted it" in words for words in outcome.violations)


def test_a_silent_machine_that_is_not_booked_at_its_nameplate_is_seen():
    class Unread(_Broken):
        def break_it(self):
            Miner.objects.filter(name="m0001").update(measured_at=self.clock.now - timedelta(minutes=9), reserved_w=25)

    assert any("is silent and booked with 25 W" in words for words in Unread(1, minutes=600).run().violations)


def test_a_machine_that_wakes_under_a_node_over_95_percent_is_seen():
    class Woken(_Broken):
        def break_it(self):
            self.watch.modes["m0001"] = 0  # as if it had slept until now
            PowerNode.objects.filter(parent=None).update(measured_w=F("cap_w") * 96 / 100, measured_at=self.clock.now)

    found = Woken(1, minutes=600).run().violations
    assert any("m0001 was told to hash more under a node over 95% of its cap" in words for words in found)


def test_a_machine_that_is_left_asleep_is_seen():
    class Forgotten(_Broken):
        back = timedelta(minutes=3)

        def break_it(self):
            Miner.objects.filter(name="m0001").update(manual=True, desired_mode=0)

    outcome = Forgotten(1, minutes=600).run()
    assert any("not told to hash" in words for words in outcome.violations)
