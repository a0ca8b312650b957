"""After a cycle its worker rests, and nobody else begins one of the cell meanwhile."""

from datetime import timedelta

import pytest
from django.db import connection

from marketplace.services import jobs
from scheduler import cycle, record, tasks
from tests import factories as f
from tests.factories import NOW

pytestmark = pytest.mark.django_db


def queued():
    """A job that has room on a live site."""
    site = f.site(power_w=54_000, pdus=1)
    host = f.host(site, power_node="pdu-1")
    f.agent(site, last_sync_at=NOW, lease_until=NOW + timedelta(minutes=15))
    contract = f.contract(f.listing(site, hosts=[host]), f.organization(), gpu_count=8)
    return jobs.submit(f.actor(contract.organization), contract, {"command": ["x"]}, now=NOW)


def locks():
    """Cells that our session has to itself."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid() AND classid::bigint = %s",
            [0x43 << 24],
        )
        return cursor.fetchone()[0]


@pytest.fixture
def rests(monkeypatch):
    """How long each rest was, and how many advisory locks stood in it."""
    seen = []
    monkeypatch.setattr(cycle, "sleep", lambda seconds: seen.append((seconds, locks())))
    return seen


def test_a_worker_rests_after_a_cycle_with_the_cell_to_itself(rests):
    job = queued()
    tasks.run_cycle({"cell": job.cell_id})
    [(seconds, held)] = rests
    assert 0 < seconds <= cycle.REST_S
    assert held == 1


def test_no_rest_is_longer_than_the_cycle_took(rests):
    job = queued()
    assert cycle.attempt(job.cell_id, now=NOW, rest_s=1000) is not None
    [(seconds, _)] = rests
    assert seconds < 100
    assert cycle.attempt(job.cell_id, now=NOW, rest_s=1000) is None  # nothing waits: no cycle, no rest
    assert len(rests) == 1


def test_who_runs_a_cycle_by_hand_does_not_wait(rests):
    job = queued()
    assert cycle.run(job.cell_id, now=NOW) is not None
    assert rests == []


def test_the_record_is_written_when_the_cell_is_free_again(monkeypatch):
    kept, seen = cycle.records.keep, []

    def keep(*args):
        seen.append(locks())
        return kept(*args)

    monkeypatch.setattr(cycle.records, "keep", keep)
    made = cycle.run(queued().cell_id, now=NOW)
    assert seen == [0]
    assert record.replay(record.load(made.record)) == []


@pytest.mark.django_db(transaction=True)
def test_a_lock_that_cannot_be_given_up_goes_with_its_session_and_hides_no_error():

    def broken():
        with cycle.alone(7) as mine:
            assert mine
            connection.connection.close()  # as a server that restarts does
            raise ValueError("the first")

    with pytest.raises(ValueError, match="the first"):
        broken()
    with cycle.alone(7) as mine:
        assert mine
    assert locks() == 0
