"""What a job asks for beyond its shape, from the API's columns to where it stands: on the real database, through whole cycles."""

from datetime import timedelta

import pytest
from django.db import transaction

from marketplace.errors import MarketError
from marketplace.models import Contract, Host, JobEvent, Placement, PowerNode, Reservation
from marketplace.services import availability, drains, holds, jobs, placements, search, sites
from marketplace.services.contracts import healing
from scheduler import commit, cycle, rules, site_loop, snapshot
from scheduler.core.plan import plan
from scheduler.core.types import Level, Reason, Topology
from scheduler.models import Decision
from scheduler.standing import LAG_S
from tests import factories as f
from tests.factories import NOW

STAYS_S = LAG_S + 30  # beyond its limit, at most: with the grace that a job has unless it says so

pytestmark = pytest.mark.django_db


def at(seconds):
    return NOW + timedelta(seconds=seconds)


class Market:
    """One site, `hosts` of two leaves alternately half and half, one spine; a customer with a ceiling of 256 GPUs."""

    def __init__(self, hosts=4, kind="on_demand", **more):
        self.site = f.site(pdus=1)
        self.hosts = [
            f.host(self.site, f"h{i}", power_node="pdu-1", leaf=f"leaf-{2 * i // hosts}", beat_at=NOW, **more)
            for i in range(hosts)
        ]
        self.agent, _ = f.agent(self.site, last_sync_at=NOW, lease_until=at(86_400))
        PowerNode.objects.update(measured_w=1000, measured_at=NOW)
        self.listing = f.listing(self.site, hosts=self.hosts)
        self.contract = f.contract(self.listing, f.organization(), gpu_count=256, kind=kind)
        self.boss = f.actor(self.site.organization)

    def submit(self, contract=None, **spec):
        spec = {"command": ["true"], "gpus": 1, "vcpu_milli": 1000, "ram_mib": 1024, **spec}
        of = contract or self.contract
        return jobs.submit(f.actor(of.organization), of, spec, now=NOW)

    def cycle(self, seconds=0):
        Host.objects.update(beat_at=at(seconds))
        type(self.agent).objects.update(last_sync_at=at(seconds))
        return cycle.run(self.contract.cell_id, now=at(seconds))

    def where(self, job):
        return sorted(p.host.name for p in Placement.objects.filter(job=job).exclude(state__in=Placement.FINAL))

    def leaves(self, job):
        return {p.host.leaf for p in Placement.objects.filter(job=job).exclude(state__in=Placement.FINAL)}

    def report(self, job, state, seconds, **fields):
        rows = [
            {"pk": p.pk, "generation": p.generation, "state": state, **fields}
            for p in Placement.objects.filter(job=job).exclude(state__in=Placement.FINAL)
        ]
        with transaction.atomic():
            placements.lock_sites([self.site.pk])
            placements.observe(self.agent, rows, now=at(seconds))


def label(**labels):
    return sorted(f"{name}={value}" for name, value in labels.items())


def rule(what, level, **labels):
    return {"rule": what, "level": level, "labels": label(**labels)}


# --- topology
@pytest.mark.parametrize(
    ("asked", "core"),
    [
        (("pack", False), Topology()),
        (("pack", True), Topology(required=True)),
        (("leaf", True), Topology(Level.LEAF, required=True)),
        (("spread", False), Topology(spread=Level.HOST)),
        (("spread", True), Topology(required=True, spread=Level.HOST, max_per_domain=1)),
    ],
)
def test_the_core_is_asked_what_the_row_says(asked, core):
    assert rules.topology_of(*asked) == core


def test_failure_domains_and_nvlink_of_a_job():
    market = Market(nvlink_domains=[0, 0, 0, 0, 1, 1, 1, 1])
    spread = market.submit(
        replicas=4, topology="spread", spread_level="leaf", max_per_domain=2, nvlink="required", gpus=4
    )
    market.cycle()
    rows = Placement.objects.filter(job=spread).select_related("host")
    assert sorted(p.host.leaf for p in rows) == ["leaf-0", "leaf-0", "leaf-1", "leaf-1"]
    assert all(len({p.host.nvlink_domains[g] for g in p.gpu_indices}) == 1 for p in rows)
    wider = market.submit(replicas=5, topology="spread", spread_level="leaf", max_per_domain=2)
    market.cycle()
    assert market.where(wider) == []
    assert Decision.objects.get(job=wider).reason == "TOPOLOGY"


def test_a_required_spread_has_one_replica_in_each_host():
    market = Market()
    each = market.submit(replicas=4, topology="spread", topology_required=True)
    more = market.submit(replicas=5, topology="spread", topology_required=True)
    market.cycle()
    assert market.where(each) == ["h0", "h1", "h2", "h3"]
    assert Decision.objects.get(job=more).reason == "TOPOLOGY"


# --- affinity
def test_near_and_apart_by_the_customers_own_labels():
    market = Market()
    db = market.submit(labels=label(app="db"))
    market.cycle()
    web = market.submit(affinity=[rule("near", "leaf", app="db"), rule("apart", "host", app="db")], gpus=2)
    market.cycle()
    assert market.leaves(web) == market.leaves(db)
    assert market.where(web) != market.where(db)
    elsewhere = market.submit(affinity=[rule("apart", "leaf", app="db")])
    market.cycle()
    assert not market.leaves(elsewhere) & market.leaves(db)
    nowhere = market.submit(affinity=[rule("near", "site", app="cache")])
    market.cycle()
    assert Decision.objects.get(job=nowhere).reason == "AFFINITY"
    market.submit(labels=label(app="cache", tier="1"))
    market.cycle()  # the older job is looked at first
    market.cycle()
    assert market.where(nowhere)


def test_apart_binds_both_ways_and_within_one_cycle():
    market = Market()
    first = market.submit(labels=label(app="a"), affinity=[rule("apart", "leaf", app="b")])
    market.cycle()
    second = market.submit(labels=label(app="b"))  # it has no rule of its own
    market.cycle()
    assert not market.leaves(second) & market.leaves(first)
    alone = [rule("apart", "leaf", app="x")]
    three = [market.submit(labels=label(app="x"), affinity=alone) for _ in range(3)]
    market.cycle()
    assert sorted(len(market.where(job)) for job in three) == [0, 1, 1]
    assert len({leaf for job in three for leaf in market.leaves(job)}) == 2


def test_another_customers_labels_are_none_of_ours():
    market = Market(hosts=1)
    stranger = f.contract(market.listing, f.organization())
    market.submit(stranger, labels=label(app="db"))
    market.cycle()
    ours = market.submit(affinity=[rule("apart", "site", app="db")])
    near = market.submit(affinity=[rule("near", "site", app="db")])
    market.cycle()
    assert market.where(ours) == ["h0"]
    assert market.where(near) == []


def test_a_gang_that_must_stand_near_itself_is_one_block():
    market = Market()
    own = {"labels": label(app="train"), "affinity": [rule("near", "leaf", app="train")], "gpus": 8}
    first = market.submit(replicas=2, **own)
    market.cycle()
    assert len(market.leaves(first)) == 1
    assert len(market.where(first)) == 2
    more = market.submit(**own)
    market.cycle()
    assert market.where(more) == []  # its leaf is full, and the other is not near


# --- price and site
def test_a_job_waits_while_the_price_is_above_its_limit():
    market = Market(kind="spot")
    price = market.contract.price
    job = market.submit(price_limit=price - 1)
    market.cycle()
    assert Decision.objects.get(job=job).reason == "PRICE_LIMIT"
    f.price_version(Contract.objects.get(pk=market.contract.pk), price - 1, at(60))
    market.cycle(59)
    assert market.where(job) == []
    market.cycle(60)
    assert market.where(job)


def test_a_job_stays_at_the_site_that_it_names():
    market = Market()
    job = market.submit(site_id=market.site.pk, region=market.site.region)
    market.cycle()
    assert market.where(job)
    with pytest.raises(MarketError, match="is at"):
        market.submit(site_id=f.site().pk)


# --- taints
def test_taints_keep_all_but_tolerant_jobs_away():
    market = Market(hosts=2)
    sites.set_taints(market.hosts[0], ["dedicated=nlp", "slow"], actor=market.boss, now=NOW)
    half = market.submit(gpus=8, tolerations=["slow"])
    plain = market.submit(gpus=8)
    market.cycle()
    assert sorted(market.where(half) + market.where(plain)) == ["h1"]
    waiting = half if market.where(plain) else plain
    assert (
        dict(zip(*Decision.objects.values_list("stages", "candidates").get(job=waiting), strict=True))["TAINTED"] == 1
    )
    both = market.submit(gpus=8, tolerations=["slow", "dedicated=nlp", "unknown"])
    market.cycle()
    assert market.where(both) == ["h0"]


# --- drains
def test_a_host_that_leaves_takes_what_ends_before_and_nothing_else():
    market = Market(hosts=1)
    drains.drain_host(market.hosts[0], reason="fan", actor=market.boss, now=NOW, by=at(3600))
    fits = market.submit(max_seconds=3600 - STAYS_S)  # it may begin so much later, and is gone at the hour all the same
    long = market.submit(max_seconds=3601 - STAYS_S)
    endless = market.submit()
    market.cycle()
    assert [bool(market.where(job)) for job in (fits, long, endless)] == [True, False, False]
    assert Decision.objects.get(job=long).reason == "LEAVES_TOO_SOON"
    sites.undrain_host(Host.objects.get(), actor=market.boss, now=at(1))
    market.cycle(1)
    assert all(market.where(job) for job in (fits, long, endless))
    assert Host.objects.get().leaves_at is None


def test_the_commit_reads_the_hour_that_is_said_now():
    market = Market(hosts=1)
    fits, long = market.submit(max_seconds=600 - STAYS_S), market.submit(max_seconds=601 - STAYS_S)
    cell = market.site.cell
    taken = snapshot.take(cell, now=NOW)
    made = plan(taken.fleet, taken.requests, policy=taken.policy, now_s=int(NOW.timestamp()))
    assert len(made.placements) == 2
    drains.drain_host(market.hosts[0], reason="fan", actor=market.boss, now=NOW, by=at(600))
    outcome = commit.commit(taken, made, now=NOW)
    assert (outcome.placed, outcome.conflicts) == ([fits.pk], {long.pk: Reason.LEAVES_TOO_SOON})


def test_who_runs_is_told_and_asked_to_leave_at_the_hour_and_it_costs_no_restart():
    market = Market(hosts=2)
    job = market.submit(gpus=8, max_restarts=0)
    market.cycle()
    market.report(job, "running", 5)
    host = Host.objects.get(name=market.where(job)[0])
    drains.drain_host(host, reason="new fans", actor=market.boss, now=at(10), by=at(600))
    notice = JobEvent.objects.filter(job=job).latest("id")
    assert (notice.from_state, notice.to_state) == ("running", "running")
    assert (
        notice.reason
        == f"notice: {host.name} leaves at 2026-11-02 12:10 UTC for maintenance; what runs there then is asked to leave"
    )
    site_loop.run(market.site.pk, now=at(599))
    job.refresh_from_db()
    assert job.state == "running"
    site_loop.run(market.site.pk, now=at(600))
    job.refresh_from_db()
    host.refresh_from_db()
    assert (job.state, host.state) == ("preempting", "draining")
    market.report(job, "exited", 620, exit_code=0, reason="drained")
    job.refresh_from_db()
    assert (job.state, job.restarts) == ("requeued", 0)
    market.cycle(621)
    assert market.where(job) != [host.name]
    assert market.where(job)
    site_loop.run(market.site.pk, now=at(625))
    host.refresh_from_db()
    assert host.state == "maintenance"


@pytest.mark.parametrize(("evict", "then"), [(True, "maintenance"), (False, "draining")])
def test_a_host_whose_work_was_asked_to_leave_at_once_is_in_maintenance_when_it_is_empty(evict, then):
    """One that drains without an hour waits for its work to end, and stays as it is: nobody has said that it leaves."""
    market = Market(hosts=2)
    job = market.submit(gpus=8)
    market.cycle()
    market.report(job, "running", 5)
    host = Host.objects.get(name=market.where(job)[0])
    drains.drain_host(host, reason="fan", actor=market.boss, now=at(10), evict=evict)
    site_loop.run(market.site.pk, now=at(12))
    host.refresh_from_db()
    assert host.state == "draining", "its work saves its state"
    market.report(job, "exited", 20, exit_code=0, reason="drained")
    market.cycle(21)
    assert market.where(job) != [host.name]
    site_loop.run(market.site.pk, now=at(25))
    host.refresh_from_db()
    assert (host.state, host.state_reason) == (then, "fan")
    drains.undrain_host(host, actor=market.boss, now=at(30))
    site_loop.run(market.site.pk, now=at(35))
    host.refresh_from_db()
    assert (host.state, host.leaves_at) == ("active", None)


def test_a_gang_that_replaces_loses_only_the_replica_that_stands_there():
    market = Market(hosts=3)
    job = market.submit(gpus=8, replicas=2, on_replica_loss="replace_replica", max_restarts=0)
    market.cycle()
    market.report(job, "running", 5)
    host = Host.objects.get(name=market.where(job)[0])
    drains.drain_host(host, reason="fan", actor=market.boss, now=at(10), evict=True)
    leaving, staying = (Placement.objects.get(job=job, host=host), Placement.objects.exclude(host=host).get(job=job))
    assert (leaving.desired, staying.desired) == ("drain", "run")
    with transaction.atomic():
        placements.lock_sites([market.site.pk])
        row = {"pk": leaving.pk, "generation": 9, "state": "exited", "exit_code": 143, "reason": "drained"}
        placements.observe(market.agent, [row], now=at(20))
    market.cycle(21)
    job.refresh_from_db()
    assert (job.state, job.restarts, job.lost_ranks) == ("running", 0, [])
    assert host.name not in market.where(job)
    assert len(market.where(job)) == 2


def test_a_gang_shrinks_for_maintenance_only_as_far_as_it_may():
    market = Market(hosts=3)
    job = market.submit(gpus=8, replicas=3, on_replica_loss="shrink", min_replicas=2)
    market.cycle()
    market.report(job, "running", 5)
    first, second, _ = Placement.objects.filter(job=job).order_by("rank")
    drains.drain_host(first.host, reason="fan", actor=market.boss, now=at(10), evict=True)
    job.refresh_from_db()
    assert job.state == "running"
    drains.drain_host(second.host, reason="fan", actor=market.boss, now=at(11), evict=True)
    job.refresh_from_db()
    assert job.state == "preempting"


def test_a_whole_site_leaves_and_comes_back():
    market = Market(hosts=3)
    Host.objects.filter(name="h2").update(state="lost")
    hosts = drains.drain_site(market.site, reason="substation", actor=market.boss, now=NOW, by=at(3600))
    assert [host.name for host in hosts] == ["h0", "h1"]
    long = market.submit(max_seconds=4000)
    market.cycle()
    assert market.where(long) == []
    assert len(drains.undrain_site(market.site, actor=market.boss, now=at(5))) == 2
    market.cycle(6)
    assert market.where(long)
    with pytest.raises(MarketError, match="no host"):
        drains.undrain_site(market.site, actor=market.boss, now=at(5))


def test_customers_read_the_kind_of_work_and_the_hours_and_the_reason_only_where_it_is_public():
    market = Market()
    job = market.submit(gpus=8)
    market.cycle()
    host = Placement.objects.get(job=job).host
    wanted = {"reason": "rack 7 stinks", "category": "cooling", "by": at(3600), "until": at(7200)}
    for public, said in ((False, ""), (True, " (rack 7 stinks)")):
        drains.drain_host(host, actor=market.boss, now=at(10), public=public, **wanted)
        assert job.events.last().reason == (
            f"notice: {host.name} leaves at {at(3600):%F %R} UTC for work on its cooling, until about {at(7200):%F %R} UTC{said};"
            " what runs there then is asked to leave"
        )
        host.refresh_from_db()
        assert host.state_reason == "rack 7 stinks"
    drains.drain_host(host, actor=market.boss, now=at(20), reason="rack 7 stinks", category="network", evict=True)
    job.refresh_from_db()
    assert (job.state_reason, Placement.objects.get(job=job).reason) == ("host drained: work on the network",) * 2


@pytest.mark.parametrize(
    "fields", [{"by": at(-1)}, {"by": at(60), "evict": True}, {"by": at(60), "until": at(60)}, {"until": at(-1)}]
)
def test_a_drain_that_makes_no_sense_is_refused(fields):
    host = f.host(f.site())
    with pytest.raises(MarketError):
        drains.drain_host(host, reason="x", actor=f.actor(host.site.organization), now=NOW, **fields)
    host.refresh_from_db()
    assert host.state == "active"


def test_what_is_for_sale_ends_when_the_host_leaves():
    market = Market(hosts=2)
    window = {"starts_at": at(0), "ends_at": at(7200)}
    assert availability.largest(market.listing, now=NOW, **window) == 16
    drains.drain_host(market.hosts[0], reason="fan", actor=market.boss, now=NOW, by=at(86_400))
    assert availability.largest(market.listing, now=NOW, **window) == 16
    assert availability.largest(market.listing, now=NOW, starts_at=at(80_000), ends_at=at(90_000)) == 8

    def found(start, end):
        asked = search.Filters(start=at(start), end=at(end), count=1)
        rows = search.search(f.actor(market.contract.organization), asked, now=NOW).rows
        return [row.stock.gpus for row in rows]

    assert (found(0, 7200), found(80_000, 90_000)) == ([16], [8])  # the market says the same


def test_a_promise_on_a_host_that_leaves_first_is_moved():
    market = Market(hosts=2)
    host, other = market.hosts
    held = []
    for hours, gpus in ((3, [0, 1, 2, 3]), (12, [4, 5, 6, 7])):
        start, end = NOW + timedelta(hours=hours), NOW + timedelta(hours=hours + 12)
        contract = f.contract(
            market.listing, f.organization(), gpu_count=4, kind="reserved", starts_at=start, ends_at=end
        )
        row = Reservation.objects.create(
            listing=market.listing, contract=contract, starts_at=start, ends_at=end, claims_at=start, state="firm"
        )
        row.blocks.create(host=host, gpu_indices=gpus)
        held.append(row)
    drains.drain_host(host, reason="fan", actor=market.boss, now=NOW, by=NOW + timedelta(hours=16))
    assert holds.disturbed(held, NOW) == {held[1].pk}
    assert healing.heal(NOW) == 1
    assert [set(row.blocks.values_list("host_id", flat=True)) for row in held] == [{host.pk}, {other.pk}]
