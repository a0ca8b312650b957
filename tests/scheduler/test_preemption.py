"""Who leaves when firm work claims capacity: no more of a gang than it can spare, and those whose work was saved last."""

from datetime import timedelta

import pytest
from django.db import transaction

from marketplace.models import BillingStanding, Job, Placement, Reservation
from marketplace.services import jobs, placements
from scheduler import cycle
from tests import factories as f
from tests.factories import NOW

pytestmark = pytest.mark.django_db


def at(seconds):
    return NOW + timedelta(seconds=seconds)


class Site:
    """Four hosts of 8 GPUs, a customer of spot and one on demand."""

    def __init__(self, count=4):
        self.site = f.site()
        self.hosts = [f.host(self.site) for _ in range(count)]
        self.agent, _ = f.agent(self.site, last_sync_at=NOW, lease_until=at(3600))
        self.listing = f.listing(self.site, hosts=self.hosts)
        self.spot, self.firm = (self.contract(kind) for kind in ("spot", "on_demand"))
        self.cell = self.site.cell_id

    def contract(self, kind, **fields):
        made = f.contract(self.listing, f.organization(), kind=kind, gpu_count=64, **fields)
        BillingStanding.objects.update_or_create(
            organization=made.organization, defaults={"state": "good", "updated_at": NOW}
        )
        return made

    def runs(self, hosts, contract=None, since=-3600, gpus=range(8), **spec):
        job = f.job(contract or self.spot, state="running", attempt=1, replicas=len(hosts), gpus=len(gpus), **spec)
        for rank, host in enumerate(hosts):
            f.placement(
                job, self.hosts[host], list(gpus), rank=rank, attempt=1, state="running", running_at=at(since), created_at=at(since)
            )  # fmt: skip
        return job

    def claims(self, seconds=0, **spec):
        spec = {"command": ["true"], "gpus": 8, "vcpu_milli": 8000, "ram_mib": 1024, **spec}
        job = jobs.submit(f.actor(self.firm.organization), self.firm, spec, now=at(seconds))
        self.cycle(seconds)
        return job

    def cycle(self, seconds):
        type(self.agent).objects.update(last_sync_at=at(seconds), lease_until=at(seconds + 900))
        return cycle.run(self.cell, now=at(seconds))

    def leaving(self, job):
        return sorted(Placement.objects.filter(job=job, state="draining").values_list("rank", flat=True))

    def report(self, seconds, job, *ranks, **fields):
        rows = Placement.objects.filter(job=job, rank__in=ranks).exclude(state__in=Placement.FINAL)
        reports = [{"pk": p.pk, "generation": p.generation, **fields} for p in rows]
        with transaction.atomic():
            placements.lock_sites([self.site.pk])
            placements.observe(self.agent, reports, now=at(seconds))


def fresh(job):
    return Job.objects.get(pk=job.pk)


def test_a_gang_that_may_shrink_loses_what_it_can_spare_and_runs_on():
    here = Site(count=5)
    gang = here.runs([0, 1, 2, 3], on_replica_loss="shrink", min_replicas=2)
    dearer = here.runs([4], since=-9000)
    wants = here.claims()
    assert (fresh(gang).state, len(here.leaving(gang))) == ("running", 1)
    here.cycle(5)  # who was asked to leave is still on the way: nobody else is
    (rank,) = here.leaving(gang)
    assert fresh(dearer).state == "running"
    here.report(10, gang, rank, state="exited", exit_code=0, reason="drained", finished_at=at(10))
    left = fresh(gang)
    assert (left.state, left.lost_ranks, left.epoch, left.restarts) == ("running", [rank], 1, 0)
    here.cycle(11)
    assert fresh(wants).state == "placed"
    assert any(f"lost rank {rank}" in e.reason for e in gang.events.all())


def test_a_gang_at_its_least_goes_whole():
    here = Site(count=2)
    gang = here.runs([0, 1], on_replica_loss="shrink", min_replicas=1)
    here.claims()
    (rank,) = here.leaving(gang)
    here.report(10, gang, rank, state="exited", exit_code=0, reason="drained", finished_at=at(10))
    here.cycle(11)
    here.claims(12)
    assert (fresh(gang).state, here.leaving(gang)) == ("preempting", [1 - rank])


@pytest.mark.parametrize("policy", ["restart_gang", "replace_replica"])
def test_any_other_gang_goes_whole(policy):
    here = Site(count=2)
    gang = here.runs([0, 1], on_replica_loss=policy)
    here.claims()
    assert (fresh(gang).state, here.leaving(gang)) == ("preempting", [0, 1])


def test_replicas_that_are_done_count_towards_the_least():
    here = Site(count=3)
    gang = here.runs([0, 1, 2], on_replica_loss="shrink", min_replicas=2)
    here.report(1, gang, 0, state="exited", exit_code=0, finished_at=at(1))
    blocker = here.runs([0], contract=here.firm)
    here.claims(2)
    assert (fresh(gang).state, len(here.leaving(gang)), fresh(blocker).state) == ("running", 1, "running")


def test_what_was_planned_for_a_gang_that_has_gone_since_moves_nobody():
    """Between the plan and its commit a replica was lost: the gang is at its least now, and goes whole."""
    here = Site(count=3)
    gang = here.runs([0, 1, 2], on_replica_loss="shrink", min_replicas=2)
    from scheduler import commit, snapshot
    from scheduler.core.plan import plan

    jobs.submit(
        f.actor(here.firm.organization),
        here.firm,
        {"command": ["true"], "gpus": 8, "vcpu_milli": 1, "ram_mib": 1},
        now=NOW,
    )
    taken = snapshot.take(here.site.cell, now=NOW)
    made = plan(taken.fleet, taken.requests, taken.running, policy=taken.policy, now_s=int(NOW.timestamp()))
    (victim,) = made.preemptions
    other = Placement.objects.filter(job=gang).exclude(pk=victim.placement).first()
    here.report(1, gang, other.rank, state="failed", reason="host_lost", finished_at=at(1))
    assert fresh(gang).lost_ranks == [other.rank]
    commit.commit(taken, made, now=at(2))
    assert fresh(gang).state == "preempting"


def test_only_who_stands_on_the_claimed_gpus_leaves_of_a_gang_that_can_do_without():
    here = Site(count=3)
    free = here.runs([0, 1, 2], on_replica_loss="shrink", min_replicas=2, gpus=range(4))
    whole = here.runs([1, 2], gpus=range(4, 8))
    holder = here.contract("reserved")
    promise = Reservation.objects.create(
        listing=here.listing, contract=holder, starts_at=NOW, ends_at=at(86400), claims_at=NOW, state="firm"
    )
    promise.blocks.create(host=here.hosts[0], gpu_indices=[0, 1, 2, 3])
    cycle.evict_for_reservations(here.cell, now=at(1))
    assert (fresh(free).state, here.leaving(free), fresh(whole).state) == ("running", [0], "running")


def test_who_saved_his_work_last_leaves_first():
    here = Site(count=3)
    old, saved, young = here.runs([0]), here.runs([1]), here.runs([2], since=-600)
    here.report(0, saved, 0, state="running", running_at=at(-3600), checkpoint_at=at(-20))
    assert fresh(saved).checkpointed_at == at(-20)
    here.claims(1)
    assert [fresh(job).state for job in (old, saved, young)] == ["running", "preempting", "running"]


def test_a_checkpoint_is_never_of_the_future_nor_of_before_the_run_and_never_goes_back():
    here = Site(count=2)
    job = here.runs([0], since=-100)
    for said, kept in ((500, 10), (-5000, 10), (5, 10)):
        here.report(10, job, 0, state="running", running_at=at(-100), checkpoint_at=at(said))
        assert fresh(job).checkpointed_at == at(kept)
    other = here.runs([1], since=-100)
    here.report(10, other, 0, state="running", running_at=at(-100), checkpoint_at=at(-5000))
    assert fresh(other).checkpointed_at is None  # it began from one of before: that is no news
