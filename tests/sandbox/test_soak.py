"""A quarter of an hour of the power soak, and each of its rules broken on purpose; `full`: some hours of two more seeds."""

from datetime import timedelta

import pytest

from marketplace.models import Host, Miner
from sandbox.market import environment
from sandbox.soak import report
from sandbox.soak.faults import ROWS, Faults
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
        assert {fault.row for fault in outcome.faults} >= {
            "acks, no drop",
            "meter stale",
            "meter > cap",
            "control plane away",
        }


def test_every_row_of_the_failure_table_strikes():
    assert all(callable(getattr(Faults, name)) for name in ROWS)


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


def test_a_machine_that_is_left_asleep_is_seen():
    class Forgotten(_Broken):
        back = timedelta(minutes=3)

        def break_it(self):
            Miner.objects.filter(name="m0001").update(manual=True, desired_mode=0)

    outcome = Forgotten(1, minutes=600).run()
    assert any("not told to hash" in words for words in outcome.violations)
