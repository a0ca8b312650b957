"""Commits, cancellations, releases and site loops at the same moment, on real connections: never oversold, nothing lost or
placed twice, books balanced. Where a race has one bad moment, the test makes that moment happen.
"""

import random
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta

import pytest
from django.db import connection, transaction

from marketplace.errors import MarketError
from marketplace.locks import Lock, _number
from marketplace.models import (
    Cell,
    Contract,
    Host,
    Job,
    Miner,
    OutboxMessage,
    Placement,
    PowerGrant,
    PowerNode,
    ReservationBlock,
)
from marketplace.services import contracts, jobs, placements, quotes, sites
from scheduler import commit, cycle, site_loop, snapshot
from scheduler.core.plan import plan
from scheduler.core.types import Reason
from tests import factories as f
from tests.factories import NOW
from tests.threads import at_once, in_thread

pytestmark = pytest.mark.django_db(transaction=True)
ACTIVE = {"placed", "running", "preempting"}


class Market:
    def __init__(self, hosts=1, miners=0, power_w=1_000_000, gpu_count=64):
        self.site = f.site(power_w=power_w, pdus=1)
        self.hosts = [f.host(self.site, power_node="pdu-1") for _ in range(hosts)]
        self.miners = [f.miner(self.site, power_node="pdu-1") for _ in range(miners)]
        self.agent, _ = f.agent(self.site, last_sync_at=NOW, lease_until=NOW + timedelta(days=1))
        PowerNode.objects.update(measured_w=1000, measured_at=NOW)
        self.contract = f.contract(f.listing(self.site, hosts=self.hosts), f.organization(), gpu_count=gpu_count)
        self.cell = self.contract.cell
        self.actor = f.actor(self.contract.organization)

    def submit(self, gpus=8, **spec):
        spec = {"command": ["true"], "gpus": gpus, "vcpu_milli": 1000, "ram_mib": 1024, **spec}
        return jobs.submit(self.actor, self.contract, spec, now=NOW)

    def planned(self, *only):
        """(snapshot, plan) of the cell as it stands, for these jobs alone."""
        taken = snapshot.take(Cell.objects.get(pk=self.cell.pk), now=NOW)
        taken = replace(taken, requests=[r for r in taken.requests if not only or r.job in {j.pk for j in only}])
        made = plan(taken.fleet, taken.requests, taken.running, policy=taken.policy, seed=1, now_s=0)
        assert made.placements or made.preemptions
        return taken, made

    def cycle(self):
        return cycle.run(self.cell.pk, now=NOW)

    def report(self, job, state, **fields):
        """The agent's word on every live placement of the job."""
        live = Placement.objects.filter(job=job).exclude(state__in=Placement.FINAL)
        with transaction.atomic():
            placements.lock_sites([self.site.pk])
            rows = [{"pk": p.pk, "generation": p.generation, "state": state, **fields} for p in live]
            placements.observe(self.agent, rows, now=NOW + timedelta(seconds=30))

    def sound(self):
        """Host columns are totals less live placements; node sums are those of their devices and under their caps; each job
        stands where its placements say.
        """
        live = list(Placement.objects.exclude(state__in=Placement.FINAL))
        for host in Host.objects.all():
            here = [p for p in live if p.host_id == host.pk]
            for i in range(host.gpu_count):
                on_gpu = [p for p in here if i in p.gpu_indices]
                assert host.gpu_free[i] == 1000 - sum(p.gpu_milli for p in on_gpu) >= 0
                assert host.vram_free[i] == host.vram_mib - sum(p.vram_mib for p in on_gpu) >= 0
            assert host.vcpu_free == host.vcpu_milli - sum(p.vcpu_milli for p in here)
            assert host.ram_free == host.ram_mib - sum(p.ram_mib for p in here)
            assert host.nvme_free == host.nvme_gib - sum(p.nvme_gib for p in here)
            assert host.cpu_only_active == sum(not p.gpu_indices for p in here)
            granted = [p for p in here if p.state in Placement.AT_SITE]
            active = {i for p in granted for i in p.gpu_indices}
            assert host.reserved_w >= (host.base_w + len(active) * host.gpu_max_w if granted else 0)
        assert sites.recompute_reserved(self.site) == dict(PowerNode.objects.values_list("id", "reserved_mw"))
        for node in PowerNode.objects.all():
            assert node.reserved_mw <= node.allowed_mw
        for job in Job.objects.all():
            mine = [p for p in live if p.job_id == job.pk]
            assert bool(mine) == (job.state in ACTIVE), (job.state, [p.state for p in mine])
            assert {p.attempt for p in mine} <= {job.attempt}
            assert sorted(p.rank for p in mine) == sorted({p.rank for p in mine})
            moves = [e.to_state for e in job.events.all()]
            assert moves[-1] == job.state
            assert moves.count("placed") == job.attempt
        wrong = PowerGrant.objects.filter(state="released").exclude(placement__state__in=Placement.FINAL)
        assert not wrong.exists()
        assert not PowerGrant.objects.filter(placement__state__in=Placement.FINAL).exclude(state="released").exists()

    def finish(self):
        """Run everything to its end; each job must come to one."""
        for _ in range(60):
            self.cycle()
            site_loop.run(self.site.pk, now=NOW)
            left = Job.objects.exclude(state__in=Job.FINAL)
            if not left:
                break
            for job in left:
                self.report(job, "running")
                self.report(job, "exited", exit_code=0)
        assert not Job.objects.exclude(state__in=Job.FINAL).exists()
        self.sound()
        for host in Host.objects.all():
            assert (host.gpu_free, host.vcpu_free) == ([1000] * 8, host.vcpu_milli)


def blocked() -> int:
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_locks WHERE NOT granted")
        return cursor.fetchone()[0]


def holds_site(pk) -> bool:
    """Whether this connection holds the site's lock."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted AND pid = pg_backend_pid()"
            " AND classid::bigint << 32 | objid::bigint = %s",
            [_number(Lock.SITE, pk)],
        )
        return bool(cursor.fetchone()[0])


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


# --- reservations beside the scheduler
def sold(market, gpus, **window):
    """A reserved contract of the market's listing, bought by somebody else."""
    buyer = f.actor(f.organization())
    wanted = quotes.Request("reserved", gpus, **{"ends_at": NOW + timedelta(hours=2), **window})
    made = quotes.quote(buyer, market.contract.listing_id, wanted, now=NOW)
    return contracts.accept(buyer, made.pk, now=NOW)


@pytest.mark.parametrize("starts_at", [None, NOW + timedelta(hours=1)])
def test_gpus_that_were_sold_between_plan_and_commit_are_refused(starts_at):
    market = Market(hosts=2)
    job, beside = market.submit(gpus=8), market.submit(gpus=4)
    the_plan = market.planned()
    reserved = sold(market, 8, starts_at=starts_at, level="host")
    (at,) = ReservationBlock.objects.values_list("host_id", flat=True)
    hit = {p.job for p in the_plan[1].placements if the_plan[0].host_of[p.host] == at}
    outcome = commit.commit(*the_plan, now=NOW)
    assert outcome.conflicts == dict.fromkeys(hit, Reason.HOST_RESERVED_FOR_OWNER)
    assert set(outcome.placed) == {job.pk, beside.pk} - hit
    assert not Placement.objects.filter(host=at).exclude(contract=reserved).exists()
    market.sound()


def test_a_contracts_own_job_is_refused_where_its_gpus_have_moved_meanwhile():
    market = Market(hosts=2)
    reserved = sold(market, 8, level="host")
    job = jobs.submit(f.actor(reserved.organization), reserved, {"command": ["true"], "gpus": 8}, now=NOW)
    the_plan = market.planned(job)
    block = ReservationBlock.objects.get()
    other = next(h for h in market.hosts if h.pk != block.host_id)
    ReservationBlock.objects.update(host=other)
    assert commit.commit(*the_plan, now=NOW).conflicts == {job.pk: Reason.HOST_RESERVED_FOR_OWNER}
    assert market.cycle().jobs_placed == 1
    assert Placement.objects.get(job=job).host_id == other.pk
    market.sound()


def test_who_stands_on_claimed_gpus_is_told_to_go_however_late_anybody_looks():
    market = Market()
    job = market.submit(gpus=8)
    spot = f.contract(market.contract.listing, f.organization(), kind="spot", limit_price=900_000)
    Job.objects.filter(pk=job.pk).update(contract=spot)
    market.cycle()
    market.report(job, "running")
    sold(market, 8, starts_at=NOW + timedelta(hours=1))
    assert cycle.waiting_cells(NOW) == []
    claimed = NOW + timedelta(minutes=75)  # nobody beat for a quarter of an hour, the claim's first minute among them
    assert cycle.waiting_cells(claimed) == [market.cell.pk]
    cycle.run(market.cell.pk, now=claimed)
    assert Placement.objects.get(job=job).state == "draining"
    assert cycle.waiting_cells(claimed) == []  # it has been told


def test_an_eviction_takes_no_job_that_has_left_meanwhile(monkeypatch):
    """Looked at on claimed GPUs, ended there, placed elsewhere before the eviction has its locks: it stays."""
    market = Market(hosts=2)
    job = market.submit(gpus=8)
    spot = f.contract(market.contract.listing, f.organization(), kind="spot", limit_price=900_000)
    Job.objects.filter(pk=job.pk).update(contract=spot)
    market.cycle()
    (at,) = Placement.objects.values_list("host_id", flat=True)
    f.miner(market.site)  # anything that makes no difference
    reserved = sold(market, 8, level="host")
    ReservationBlock.objects.update(host=at)
    look, moved = cycle._strangers, []

    def look_and_move(*args, **how):
        found = look(*args, **how)
        if not moved:
            moved.append(True)
            in_thread(lambda: ReservationBlock.objects.update(host=next(h for h in market.hosts if h.pk != at)))()
        return found

    monkeypatch.setattr(cycle, "_strangers", look_and_move)
    assert cycle.evict_for_reservations(market.cell.pk, now=NOW) == []
    assert Placement.objects.get(job=job).state == "granted"
    assert reserved.state == "active"


# --- a job submitted while its contract ends
@pytest.mark.parametrize("first", ["submit", "end"])
def test_a_job_submitted_while_its_contract_ends_is_refused_or_ended(monkeypatch, first):
    market = Market()
    stale = Contract.objects.get(pk=market.contract.pk)
    if first == "end":
        contracts.end([market.contract.pk], now=NOW)
        with pytest.raises(MarketError, match="contract"):
            jobs.submit(market.actor, stale, {"command": ["true"]}, now=NOW)
        assert not Job.objects.exists()
        return
    checked, go = threading.Event(), threading.Event()
    check = jobs._check_contract

    def check_and_wait(*args):
        check(*args)
        checked.set()
        for _ in range(2000):
            if blocked():
                return

    monkeypatch.setattr(jobs, "_check_contract", check_and_wait)
    submitted = in_thread(market.submit)
    assert checked.wait(30)
    ended = in_thread(lambda: contracts.end([market.contract.pk], now=NOW))
    job = submitted()
    assert ended() == [market.contract.pk]
    go.set()
    assert OutboxMessage.objects.filter(topic=contracts.END_JOBS).count() == 1
    assert Contract.objects.get(pk=market.contract.pk).state == "ending"
    jobs.end_contract(market.contract.pk, now=NOW)
    job.refresh_from_db()
    assert job.state == "cancelled"


# --- power
def shed_market():
    """A site where a host's 8 GPUs start only when miners sleep."""
    market = Market(hosts=2, miners=14, power_w=62_000)
    Host.objects.update(measured_w=1100, beat_at=NOW)
    PowerNode.objects.update(measured_w=51_200, measured_at=NOW)
    return market


def test_two_site_loops_at_once():
    market = shed_market()
    job, other = market.submit(), market.submit()
    market.cycle()
    assert set(Placement.objects.values_list("state", flat=True)) == {"shedding"}
    for turn in range(1, 5):
        now = NOW + timedelta(seconds=5 * turn)
        at_once([lambda now=now: site_loop.run(market.site.pk, now=now)] * 3)
        for miner in Miner.objects.filter(desired_mode=0):
            Miner.objects.filter(pk=miner.pk).update(
                measured_w=25, measured_at=now, low_samples=2, applied_generation=miner.desired_generation
            )
        drawn = sum(Miner.objects.values_list("measured_w", flat=True)) + 2200
        PowerNode.objects.update(measured_w=drawn, measured_at=now + timedelta(seconds=1))
        market.sound()
    states = Counter(Placement.objects.values_list("state", flat=True))
    assert states["granted"] >= 1
    assert PowerGrant.objects.filter(state="granted").count() == states["granted"]
    granted = Placement.objects.filter(state="granted")
    assert all(p.events.filter(to_state="granted").count() == 1 for p in granted)
    assert {job.pk, other.pk} == set(Placement.objects.values_list("job_id", flat=True))


def test_a_commit_and_a_site_loop_at_once():
    market = shed_market()
    for _ in range(2):
        market.submit(gpus=4)
    at_once([market.cycle, *[lambda: site_loop.run(market.site.pk, now=NOW)] * 3])
    market.sound()
    assert Placement.objects.count() == 2


# --- a worker dies
def test_a_worker_that_dies_inside_the_commit_leaves_nothing(monkeypatch):
    market = Market()
    job = market.submit()
    place = commit._place

    def die(*args):
        place(*args)
        connection.connection.close()  # as the server sees a killed process

    monkeypatch.setattr(commit, "_place", die)
    assert isinstance(in_thread(market.cycle)(), Exception)
    monkeypatch.undo()
    assert not Placement.objects.exists()
    job.refresh_from_db()
    assert (job.state, job.attempt) == ("queued", 0)
    market.sound()
    assert market.cycle().jobs_placed == 1  # its locks went with it
    market.sound()
    market.finish()


def test_a_worker_that_dies_between_placing_and_granting_loses_nothing():
    market = shed_market()
    job = market.submit()
    market.cycle()  # and here the worker dies: no site loop follows
    placement = Placement.objects.get(job=job)
    assert placement.state == "shedding"
    market.sound()
    assert market.cycle() is None  # the next cycle has nothing to place again
    for turn in range(1, 4):
        now = NOW + timedelta(seconds=6 * turn)
        site_loop.run(market.site.pk, now=now)
        for miner in Miner.objects.filter(desired_mode=0):
            Miner.objects.filter(pk=miner.pk).update(
                measured_w=25, measured_at=now, low_samples=2, applied_generation=miner.desired_generation
            )
        PowerNode.objects.update(measured_w=sum(Miner.objects.values_list("measured_w", flat=True)), measured_at=now)
    placement.refresh_from_db()
    assert placement.state == "granted"
    assert Placement.objects.count() == 1
    market.sound()


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
