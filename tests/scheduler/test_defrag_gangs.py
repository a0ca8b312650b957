"""Room is made for a gang: for all of its replicas at once, or for none."""

import pytest

from marketplace.models import Job, Placement
from scheduler import cycle, defrag
from scheduler.models import Decision
from tests.scheduler.test_defrag import Cell, gone, later

pytestmark = pytest.mark.django_db


def test_a_gang_gets_room_for_all_of_its_replicas_at_once_and_runs():
    cell = Cell()
    mover, other = cell.runs(0, [0]), cell.runs(1, [0])  # host 2 is idle
    gang = cell.waits(gpus=8, replicas=2)
    (left,) = defrag.run(cell.pk, now=later(5))
    assert left in (mover.pk, other.pk)
    emptied = cell.hosts[0 if left == mover.pk else 1]
    promise = Decision.objects.get(job=gang)
    assert sorted(promise.held_hosts) == sorted([cell.hosts[2].pk, emptied.pk])
    row = Job.objects.get(pk=left)
    assert row.events.get(to_state="preempting").reason == (
        "moved to make room: a job that needs 8 GPUs at once in each of 2 places waits, and there is a place for this one elsewhere"
    )
    assert gang.events.last().reason.startswith(
        "room is being made: a smaller job leaves its host with a checkpoint, by "
    )

    cycle.run(cell.pk, now=later(6))
    assert Decision.objects.get(job=gang).held_hosts == promise.held_hosts
    gone(later(10), row)
    cycle.run(cell.pk, now=later(11))  # the other host takes who has left; the gang has both of its own
    stay = cell.hosts[1 if left == mover.pk else 0]
    assert Placement.objects.get(job=row, attempt=2).host_id == stay.pk
    assert sorted(Placement.objects.filter(job=gang).values_list("host_id", flat=True)) == sorted(promise.held_hosts)


def test_a_gang_that_must_stand_close_is_left_to_the_planner():
    cell = Cell()
    cell.runs(0, [0]), cell.runs(1, [0])
    cell.waits(gpus=8, replicas=2, topology="pack", topology_required=True)
    assert defrag.run(cell.pk, now=later(5)) == []
