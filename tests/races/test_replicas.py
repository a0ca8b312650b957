"""Losses, repairs and cancellations of one gang at the same moment, on real connections: no rank twice, none forgotten."""

import random
import threading
from collections import Counter
from datetime import timedelta

import pytest
from django.db import connection, transaction
from django.db.models import F

from marketplace.errors import MarketError
from marketplace.models import Host, Job, Placement, PowerNode
from marketplace.services import jobs, placements, sites
from scheduler import commit, cycle
from tests import factories as f
from tests.factories import NOW
from tests.threads import at_once, in_thread

pytestmark = pytest.mark.django_db(transaction=True)


def together(calls):
    """All at once; a refusal is an answer, a crash is not."""
    wrong = [a for a in at_once(calls) if isinstance(a, str) and a not in {"illegal_transition", "busy"}]
    assert not wrong, wrong


class Market:
    def __init__(self, policy, hosts=6, replicas=4, **spec):
        self.site = f.site(pdus=1)
        self.hosts = [f.host(self.site, power_node="pdu-1") for _ in range(hosts)]
        self.agent, _ = f.agent(self.site, last_sync_at=NOW, lease_until=NOW + timedelta(days=1))
        PowerNode.objects.update(measured_w=1000, measured_at=NOW)
        self.contract = f.contract(f.listing(self.site, hosts=self.hosts), f.organization(), gpu_count=64)
        spec = {"command": ["true"], "gpus": 8, "vcpu_milli": 1000, "ram_mib": 1024, "max_restarts": 50, **spec}
        spec |= {"replicas": replicas, "on_replica_loss": policy}
        self.job = jobs.submit(f.actor(self.contract.organization), self.contract, spec, now=NOW)
        self.cycle()
        for rank in range(replicas):
            self.report(rank, "running")
        assert Job.objects.get(pk=self.job.pk).state == "running"

    def cycle(self):
        try:
            return cycle.run(self.job.cell_id, now=NOW)
        except (commit.FencedError, MarketError):
            return None  # overtaken: the next one does it

    def live(self):
        return Placement.objects.filter(job=self.job).exclude(state__in=Placement.FINAL)

    def report(self, rank, state, **fields):
        with transaction.atomic():
            placements.lock_sites([self.site.pk])
            rows = [
                {"pk": p.pk, "generation": p.generation, "state": state, **fields}
                for p in self.live().filter(rank=rank)
            ]
            placements.observe(self.agent, rows, now=NOW + timedelta(seconds=30))

    def lose(self, rank):
        self.report(rank, "failed", reason="host_lost", finished_at=NOW + timedelta(seconds=20))

    def cancel(self):
        jobs.cancel(f.actor(self.contract.organization), Job.objects.get(pk=self.job.pk), now=NOW)

    def sound(self):
        job, live = Job.objects.get(pk=self.job.pk), list(self.live())
        assert max(Counter(p.rank for p in live).values(), default=0) <= 1, "a rank twice"
        assert (
            not Counter((p.attempt, p.rank, p.epoch) for p in Placement.objects.filter(job=job)).most_common(1)[0][1]
            > 1
        )
        here = {p.rank for p in live if p.attempt == job.attempt}
        if job.state == "running" and not job.cancel_requested_at:
            wanted = set(range(job.replicas)) - set(job.lost_ranks)
            assert here == wanted, (here, job.lost_ranks)
            assert bool(job.lost_ranks) <= (job.repair_since is not None or job.on_replica_loss == "shrink")
        for host in Host.objects.all():
            held = {g for p in live if p.host_id == host.pk for g in p.gpu_indices}
            assert host.gpu_free == [0 if g in held else 1000 for g in range(8)]
        books = dict(PowerNode.objects.filter(site=self.site).values_list("id", "reserved_mw"))
        assert sites.recompute_reserved(self.site) == books
        return job


@pytest.mark.parametrize("seed", range(2))
def test_losses_and_cycles_at_once(seed):
    dice = random.Random(seed)
    market = Market("replace_replica")
    for _ in range(3):
        ranks = dice.sample(range(4), dice.randrange(1, 4))
        calls = [lambda r=r: market.lose(r) for r in ranks] + [market.cycle] * 3
        dice.shuffle(calls)
        together(calls)
        market.sound()
    for _ in range(3):
        market.cycle()
    job = market.sound()
    assert job.state in {"running", "placed"}
    assert job.lost_ranks == []
    assert market.live().count() == 4


def test_a_loss_between_the_plan_and_its_commit(monkeypatch):
    """The one bad moment: another replica dies after the plan for the first was made."""
    market = Market("replace_replica")
    market.lose(0)
    plan, done = cycle.plan, threading.Event()

    def planned(*args, **options):
        made = plan(*args, **options)
        if not done.is_set():
            done.set()
            in_thread(lambda: market.lose(1))()
        return made

    monkeypatch.setattr(cycle, "plan", planned)
    market.cycle()
    job = market.sound()
    assert (job.lost_ranks, job.epoch) == ([0, 1], 2)  # nothing of the first plan was written
    market.cycle()
    assert market.sound().lost_ranks == []
    assert sorted(market.live().values_list("rank", flat=True)) == [0, 1, 2, 3]


def test_a_loss_between_the_commits_look_and_its_write(monkeypatch):
    """Whoever tells of another loss waits for the repair that has begun, and is not overwritten by it."""
    market = Market("replace_replica")
    market.lose(0)
    lock, told = commit.cells.lock, []

    def tell():
        try:
            Job.objects.filter(pk=market.job.pk).update(epoch=F("epoch") + 1, lost_ranks=[1])
        finally:
            connection.close()

    def locked(*args):
        told.append(threading.Thread(target=tell))
        told[0].start()
        told[0].join(1)
        return lock(*args)

    monkeypatch.setattr(commit.cells, "lock", locked)
    market.cycle()
    told[0].join()
    job = Job.objects.get(pk=market.job.pk)
    assert (job.lost_ranks, job.epoch) == ([1], 2)


def test_a_cancellation_beside_losses_and_repairs():
    market = Market("replace_replica")
    market.lose(3)
    together([market.cancel, market.cycle, lambda: market.lose(2), market.cycle])
    market.sound()
    for rank in range(4):
        market.report(rank, "exited", exit_code=143, reason="drained")
    market.cycle()
    job = market.sound()
    assert (job.state, market.live().count(), job.repair_since) == ("cancelled", 0, None)


def test_a_gang_that_shrinks_from_two_sides():
    market = Market("shrink", min_replicas=2)
    together([lambda r=r: market.lose(r) for r in (0, 1)])
    assert market.sound().lost_ranks == [0, 1]
    together([lambda r=r: market.lose(r) for r in (2, 3)])
    assert market.sound().state == "requeued"
