"""The agent is cut off at any moment of the order shed, confirm, grant and back: between two of the things that it does, in the middle
of a fan-out, with half a report told; it is gone for seconds or for long, and what an answer says it may obey in any order. At no
instant does any node draw more than its cap (`Yard.turn`), and afterwards the job runs, ends, and all machines hash again.

`make test` plays three kinds of moment, `full` all of them, and every moment.
"""

from contextlib import suppress
from datetime import timedelta
from random import Random

import pytest

from marketplace.models import Miner
from tests.faults.yard import Yard

pytestmark = pytest.mark.django_db
LONG, SHORT = 200, 20  # seconds: longer than readings and meters are fresh, and shorter
TIMES = 3  # in a row: what is never heard must never be counted on
QUICK = (("machine", SHORT), ("limits", LONG), ("report, half told", SHORT))
KINDS = ("report", "report, half told", "answer", "machine", "limits", "start")
REST = [(kind, seconds) for kind in KINDS for seconds in (SHORT, LONG) if (kind, seconds) not in QUICK]
PARTS = 12  # of the full sweep


class Cut(Exception):  # noqa: N818 (it is no error)
    """The agent is killed: what it was about to do is not done."""


class CutOff(Yard):
    """A yard whose agent is killed at the `at`-th thing that it does from `arm` on (or the first of `kind`) and, back after so many
    seconds, at the next of that kind again: `TIMES` in all. It obeys an answer in an order drawn by `dice`, or raises before it lowers.
    """

    def __init__(self, at=None, seconds=SHORT, *, kind=None, dice=None):
        self.steps, self.at, self.kind, self.seconds = None, at, kind, seconds
        self.cuts, self.back_at = 0, None
        super().__init__()
        self.parts.sort(key=["_set_limits", "_run_work", "_command_miners"].index)
        if dice is not None:
            dice.shuffle(self.parts)

    def arm(self):
        self.steps = []

    def step(self, what):
        if self.steps is None:
            return
        self.steps.append(what)
        if len(self.steps) - 1 == self.at:
            self.kind = what
        if what == self.kind and self.cuts < TIMES:
            self.cuts += 1
            self.link, self.back_at = False, self.now + timedelta(seconds=self.seconds)
            raise Cut

    def report(self):
        with suppress(Cut):
            super().report()

    def obey(self):
        with suppress(Cut):
            if self.link:
                super().obey()

    def turn(self, count=1):
        for _ in range(count):
            if self.back_at and self.now >= self.back_at:
                self.link, self.back_at = True, None
            super().turn()


def play(yard):
    """Two jobs that need watts of both PDUs come, run, and go."""
    yard.turn(3)
    yard.arm()
    jobs = [yard.submit(), yard.submit()]
    yard.until(lambda: all(yard.state(job) == "running" for job in jobs), seconds=2400)
    for job in jobs:
        yard.end(job)
    yard.until(lambda: not Miner.objects.filter(desired_mode=0).exists() and not yard.fleet.asleep.any(), seconds=2400)
    # In an order of its own a run may do less than the one whose moments were counted.
    never = (yard.at, yard.kind) == (None, None) or (yard.kind is None and len(yard.steps) <= yard.at)
    assert yard.cuts or never, "it did that much, and was never cut off"


def moments():
    """Of a run that nobody disturbs: what the agent does, in order."""
    yard = CutOff()
    play(yard)
    return yard.steps


@pytest.mark.parametrize(("kind", "seconds"), [*QUICK, *(pytest.param(*rest, marks=pytest.mark.full) for rest in REST)])
def test_cut_off_in_the_middle_of(kind, seconds):
    play(CutOff(seconds=seconds, kind=kind))


@pytest.mark.full
@pytest.mark.parametrize("part", range(PARTS))
def test_cut_off_at_every_moment(part, django_db_blocker):
    from django.db import transaction

    class Undo(Exception):  # noqa: N818 (it is no error)
        pass

    with suppress(Undo), transaction.atomic():
        steps = moments()
        raise Undo
    assert {"machine", "limits", "start"} <= set(steps)
    for at in range(part, len(steps), PARTS):
        for seconds in (SHORT, LONG):
            with suppress(Undo), transaction.atomic():
                play(CutOff(at, seconds, dice=Random(at)))
                raise Undo
