"""Commits, cancellations, releases and site loops at the same moment, on real connections: never oversold, nothing lost or
placed twice, books balanced. Where a race has one bad moment, the test makes that moment happen.
"""

import random
import threading
from collections import Counter
from contextlib import suppress

import pytest
from django.db import transaction

from marketplace.errors import MarketError
from marketplace.models import (
    Host,
    Job,
    Placement,
)
from marketplace.services import jobs, placements, sites
from scheduler import commit, site_loop
from scheduler.core.types import Reason
from tests import factories as f
from tests.factories import NOW
from tests.races.market import Market, blocked, holds_site
from tests.threads import at_once, in_thread

pytestmark = pytest.mark.django_db(transaction=True)


# --- two commits
def test_two_plans_for_the_last_host_of_one_generation():
    market = Market()
    one, two = market.submit(), market.submit()
    plans = [market.planned(one), market.planned(two)]
    outcomes = at_once([lambda p=p: commit.commit(*p, now=NOW) for p in plans])
    assert sorted((len(o.placed), len(o.conflicts)) for o in outcomes) == [(0, 1), (1, 0)]
    assert {r.name for o in outcomes for r in o.conflicts.values()} == {"NO_GPU"}
    market.sound()
    market.finish()


def test_one_plan_committed_many_times_at_once():
    market = Market(hosts=2)
    made = [market.submit(gpus=2) for _ in range(6)]
    made.append(market.submit(gpus=2, replicas=2))
    the_plan = market.planned()
    outcomes = at_once([lambda: commit.commit(*the_plan, now=NOW)] * 4)
    assert sorted(len(o.placed) for o in outcomes) == [0, 0, 0, 7]
    assert Placement.objects.count() == 8
    assert Counter(Job.objects.values_list("attempt", flat=True)) == {1: len(made)}
    market.sound()


def test_many_cycles_at_once():
    market = Market(hosts=3)
    for gpus in (8, 4, 4, 2, 2, 1, 1):
        market.submit(gpus=gpus)
    at_once([market.cycle] * 5)
    market.sound()
    assert Job.objects.filter(state="placed").count() == 7


@pytest.mark.parametrize("change", ["drain", "retire", "cancel", "shrink"])
def test_what_changed_between_plan_and_commit_is_seen(change):
    market = Market(hosts=2)
    host, other = market.hosts
    job, beside = market.submit(gpus=8), market.submit(gpus=8)
    the_plan = market.planned()
    (at,) = {the_plan[0].host_of[p.host] for p in the_plan[1].placements if p.job == job.pk}
    if change == "cancel":
        jobs.cancel(market.actor, job, now=NOW)
    elif change == "shrink":  # somebody else took GPUs there
        Host.objects.filter(pk=at).update(gpu_free=[1000] * 7 + [500])
    else:
        Host.objects.filter(pk=at).update(state={"drain": "draining", "retire": "retired"}[change])
    outcome = commit.commit(*the_plan, now=NOW)
    assert outcome.placed == [beside.pk]
    assert list(outcome.conflicts) == [job.pk]
    assert not Placement.objects.filter(job=job).exists()
    assert Placement.objects.get(job=beside).host_id in {host.pk, other.pk} - {at}
    job.refresh_from_db()
    assert (job.state, job.attempt) == ("cancelled" if change == "cancel" else "queued", 0)


def test_a_gang_is_placed_whole_or_not_at_all():
    market = Market(hosts=2)
    gang = market.submit(gpus=8, replicas=2)
    the_plan = market.planned(gang)
    rival = market.submit(gpus=1)
    assert commit.commit(*market.planned(rival), now=NOW).placed == [rival.pk]
    outcome = commit.commit(*the_plan, now=NOW)
    assert (outcome.placed, list(outcome.conflicts)) == ([], [gang.pk])
    market.sound()
    market.finish()


# --- cancellation and release beside a commit
def test_a_cancellation_that_began_before_the_commit_drains_under_the_sites_lock(monkeypatch):
    """It looked for the job's sites when there were none, and acts when the job stands at one."""
    market = Market()
    job = market.submit()
    placed, unlocked = threading.Event(), []
    place, release = commit._place, placements.request_release

    def place_and_wait(*args):
        place(*args)
        placed.set()
        for _ in range(2000):
            if blocked():
                return

    def watched(ids, **how):
        if ids and not holds_site(market.site.pk):
            unlocked.append(ids)
        return release(ids, **how)

    monkeypatch.setattr(commit, "_place", place_and_wait)
    monkeypatch.setattr(placements, "request_release", watched)
    committed = in_thread(market.cycle)
    assert placed.wait(30)
    cancelled = in_thread(lambda: jobs.cancel(market.actor, Job.objects.get(pk=job.pk), now=NOW))
    assert committed().jobs_placed == 1
    assert not isinstance(cancelled(), Exception)
    assert unlocked == []
    (placement,) = Placement.objects.filter(job=job)
    assert placement.state == "draining"
    market.sound()
    market.report(job, "exited", exit_code=143, reason="drained")
    job.refresh_from_db()
    assert job.state == "cancelled"
    market.sound()


def test_cancellations_and_commits_at_once():
    market = Market(hosts=2)
    made = [market.submit(gpus=2) for _ in range(8)]
    at_once([market.cycle, *[lambda j=j: jobs.cancel(market.actor, j, now=NOW) for j in made[:6]], market.cycle])
    market.cycle()
    market.sound()
    market.finish()
    assert Counter(Job.objects.filter(pk__in=[j.pk for j in made[6:]]).values_list("state", flat=True)) == {
        "succeeded": 2
    }


def test_releases_and_commits_on_one_host_at_once():
    market = Market()
    first = [market.submit(gpus=1) for _ in range(8)]
    market.cycle()
    market.sound()
    for job in first:
        market.report(job, "running")
    for _ in range(4):
        market.submit(gpus=2)
    ends = [lambda j=j: market.report(j, "exited", exit_code=0) for j in first]
    at_once([*ends[:4], market.cycle, *ends[4:], market.cycle])
    market.sound()
    market.finish()
    assert set(Job.objects.values_list("state", flat=True)) == {"succeeded"}


def test_a_replica_that_ends_twice_gives_back_once():
    market = Market()
    job = market.submit(gpus=3)
    market.cycle()
    market.report(job, "running")
    live = Placement.objects.get(job=job)
    row = {"pk": live.pk, "generation": 1, "state": "exited", "exit_code": 0}

    def end():
        with transaction.atomic():
            placements.lock_sites([market.site.pk])
            placements.observe(market.agent, [row], now=NOW)

    at_once([end] * 6)
    market.sound()
    assert live.events.filter(to_state="released").count() == 1


# --- all of it
@pytest.mark.parametrize("seed", [1, 2])
def test_a_storm(seed):
    """Four workers do whatever comes; at the end every job has come to its end once, and the books are those of the rows."""
    market = Market(hosts=3)
    for gpus in (1, 2, 4):
        market.submit(gpus=gpus)
    unexpected = []

    def work(number):
        rng = random.Random(seed * 100 + number)
        for _ in range(12):
            job = rng.choice(list(Job.objects.exclude(state__in=Job.FINAL)) or [None])
            kind = rng.choice(["submit", "cycle", "cycle", "run", "exit", "fail", "cancel", "preempt", "loop"])
            try:
                if kind == "submit":
                    market.submit(gpus=rng.choice([0, 1, 2, 4, 8]), replicas=rng.choice([1, 1, 2]))
                elif kind == "cycle":
                    market.cycle()
                elif kind == "loop":
                    site_loop.run(market.site.pk, now=NOW)
                elif job is not None and kind in {"run", "exit", "fail"}:
                    state, how = {"run": ("running", {}), "exit": ("exited", {"exit_code": 0})}.get(
                        kind, ("failed", {"reason": "host_lost"})
                    )
                    market.report(job, state, **how)
                elif job is not None and kind == "cancel":
                    with suppress(MarketError):
                        jobs.cancel(market.actor, job, now=NOW)
                elif job is not None and kind == "preempt":
                    with transaction.atomic():
                        placements.lock_sites([market.site.pk])
                        jobs.preempt([job.pk], now=NOW, actor="test", reason="storm")
            except MarketError as error:
                if error.code != "busy":
                    unexpected.append(error)
            except Exception as error:
                unexpected.append(error)

    at_once([lambda n=n: work(n) for n in range(4)])
    assert unexpected == []
    market.sound()
    market.finish()


class Preempting:
    """A spot job on the only host, and the plan by which somebody takes its place."""

    def __init__(self):
        self.market = Market()
        listing = self.market.contract.listing
        spot = f.contract(listing, f.organization(), gpu_count=64, kind="spot", limit_price=900_000)
        spec = {"command": ["true"], "gpus": 8, "vcpu_milli": 1000, "ram_mib": 1024}
        self.spot = jobs.submit(f.actor(spot.organization), spot, spec, now=NOW)
        self.market.cycle()
        self.market.report(self.spot, "running")
        self.mine = self.market.submit()
        self.taken, self.plan = self.market.planned(self.mine)
        assert [p.job for p in self.plan.preemptions] == [self.spot.pk]

    def commit(self):
        outcome = commit.commit(self.taken, self.plan, now=NOW)
        self.spot.refresh_from_db()
        return outcome


def test_nobody_is_evicted_for_a_job_that_is_cancelled_meanwhile():
    here = Preempting()
    jobs.cancel(here.market.actor, here.mine, now=NOW)
    assert here.commit().preempted == []
    assert here.spot.state == "running"
    here.market.sound()


def test_nobody_is_evicted_from_a_host_that_takes_nothing_any_more():
    here = Preempting()
    sites.drain_host(here.market.hosts[0], reason="fan", actor=f.actor(here.market.site.organization), now=NOW)
    outcome = here.commit()
    assert (outcome.preempted, outcome.conflicts) == ([], {here.mine.pk: Reason.HOST_UNSCHEDULABLE})
    assert here.spot.state == "running"


def test_who_still_wants_the_place_gets_it():
    here = Preempting()
    assert here.commit().preempted == [here.spot.pk]
    assert here.spot.state == "preempting"
    here.market.sound()
