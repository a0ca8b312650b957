"""Why a job stands where it does outlives the record of its cycle, in few bytes."""

from datetime import timedelta

import pytest
from django.core.cache import cache

from marketplace.models import Job
from scheduler import reasons, record, why
from scheduler.core.case import Case
from scheduler.core.types import Kind, Policy, Reason, Request
from scheduler.models import Cycle, CycleRecord
from tests.factories import NOW
from tests.races.market import Market

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def _no_cache():
    cache.clear()


def forgotten():
    """The records of all cycles are gone, as after their days."""
    CycleRecord.objects.exclude(base=None).delete()
    CycleRecord.objects.all().delete()


def told(job):
    return why.explain(Job.objects.get(pk=job.pk), fresh=True)


def test_the_hosts_left_are_said_when_the_record_is_gone():
    market = Market(hosts=3)
    big, gang = market.submit(gpus=8), market.submit(gpus=4, replicas=2)
    market.cycle()
    with_record = told(big)
    later = market.submit(gpus=8)
    market.cycle()
    forgotten()
    answer = told(big)
    assert answer["text"] == (
        "The job has been placed: when its cycle began, 3 of 3 hosts could take it, and it got the one with the best score."
    )
    assert answer["note"] == "The scores of that cycle are no longer on record."
    assert (answer["placed"]["hosts"], answer["placed"]["candidates"]) == (3, 3)
    assert answer["placed"]["replicas"] == with_record["placed"]["replicas"]
    assert "3 of 3 hosts could take a replica, and all replicas were placed together" in told(gang)["text"]
    last = told(later)
    assert "1 of 3 hosts could take it" in last["text"]
    assert [(s["stage"], s["hosts_left"]) for s in last["stages"]] == [("NO_GPU", 1), ("NO_WATTS", 1)]


def test_who_keeps_no_records_has_the_reasons_all_the_same(settings):
    settings.CYCLE_RECORDS = "none"
    market = Market(hosts=2)
    job = market.submit(gpus=8)
    market.cycle()
    assert not CycleRecord.objects.exists()
    assert "2 of 2 hosts could take it" in told(job)["text"]


def test_hosts_that_its_affinity_bars_are_counted_for_each_job_alone():
    market = Market(hosts=2)
    apart = {"labels": ["app=db"], "affinity": [{"rule": "apart", "level": "host", "labels": ["app=db"]}]}
    market.submit(gpus=1, **apart)
    market.cycle()
    plain, second = market.submit(gpus=1), market.submit(gpus=1, **apart)
    market.cycle()
    forgotten()
    assert "2 of 2 hosts could take it" in told(plain)["text"]
    assert "1 of 2 hosts could take it" in told(second)["text"]


def test_what_the_commit_refused_has_no_reasons():
    market = Market(hosts=2)
    job, other = market.submit(gpus=1), market.submit(gpus=1)
    taken, made = market.planned()
    body = reasons.packed(record.case_of(taken), made, {job.pk: Reason.NO_GPU})
    row = Cycle.objects.create(cell=market.cell, generation=9, started_at=NOW, reasons=body)
    assert reasons.of(row.pk, job.pk) is None
    assert reasons.of(row.pk, other.pk).candidates == 2
    assert reasons.of(row.pk, other.pk + 1) is None
    assert reasons.packed(record.case_of(taken), made, {job.pk, other.pk}) == b""


def test_reasons_that_cannot_be_kept_cost_the_cycle_nothing(monkeypatch, caplog):
    monkeypatch.setattr(reasons, "packed", lambda *_: 1 / 0)
    market = Market()
    job = market.submit(gpus=1)
    assert market.cycle().jobs_placed == 1
    assert "are not kept" in caplog.text
    forgotten()
    assert told(job)["note"] == "That cycle is no longer on record."


def test_a_thousand_jobs_take_a_few_bytes_each():
    market = Market(hosts=1)
    taken, _ = market.submit(gpus=1) and market.planned()
    shapes = [{"gpus": 0, "cpu": 1 + n % 5, "ram": 1} for n in range(1000)]
    pool = taken.requests[0].pool
    asked = [Request(job=7_000_000 + 3 * n, kind=Kind.FIRM, pool=pool, **shape) for n, shape in enumerate(shapes)]
    case = Case(taken.fleet, asked, [], Policy(), 1, int(NOW.timestamp()))
    made = case.plan()
    assert len(made.placements) == 1000
    body = reasons.packed(case, made)
    assert len(body) < 2500
    row = Cycle.objects.create(cell=market.cell, generation=9, started_at=NOW + timedelta(1), reasons=body)
    assert {reasons.of(row.pk, r.job) for r in asked} == {reasons.Kept(1, ((Reason.NO_WATTS, 1),))}
