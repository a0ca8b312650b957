"""The road of a job through the control plane: queued, placed, shed for, granted, running, released; and back to hashing."""

from datetime import timedelta

import pytest
from django.db import transaction
from django.db.models import F

from marketplace.locks import Lock, acquire
from marketplace.models import BillingStanding, Host, Job, Miner, Placement, PowerNode, Site
from marketplace.services import agents, feeds, jobs, placements
from scheduler import cycle, site_loop
from scheduler.models import Decision
from tests import factories as f
from tests.factories import NOW

pytestmark = pytest.mark.django_db


@pytest.fixture
def market():
    """One site with a host of 8 H100 and 12 miners, its agent alive, a customer with a card and a contract."""
    site = f.site(power_w=54_000, pdus=1)
    host = f.host(site, power_node="pdu-1", applied_generation=0)
    miners = [f.miner(site, power_node="pdu-1") for _ in range(12)]
    agent, _ = f.agent(site, last_sync_at=NOW, lease_until=NOW + timedelta(minutes=15))
    listing = f.listing(site, hosts=[host])
    customer = f.organization()
    BillingStanding.objects.update_or_create(organization=customer, defaults={"state": "good", "updated_at": NOW})
    contract = f.contract(listing, customer, gpu_count=16)
    return site, host, miners, agent, contract


def submit(contract, **spec):
    spec = {"command": ["true"], "gpus": 8, "vcpu_milli": 8000, "ram_mib": 1024, **spec}
    return jobs.submit(f.actor(contract.organization), contract, spec, now=NOW)


def read_all(site, now, *, asleep: bool):
    """Every miner and meter reports what was commanded."""
    for miner in Miner.objects.filter(site=site):
        watts = miner.mode_watts[miner.desired_mode]
        Miner.objects.filter(pk=miner.pk).update(
            measured_w=watts, measured_at=now, applied_generation=miner.desired_generation,
            low_samples=2 if miner.desired_mode == 0 and asleep else 0,
        )  # fmt: skip
    Host.objects.filter(site=site).update(measured_w=F("parked_w"), beat_at=now)
    miner_w = sum(Miner.objects.filter(site=site).values_list("measured_w", flat=True))
    PowerNode.objects.filter(site=site).update(measured_w=miner_w + 1100, measured_at=now)


def report(agent, placement, state, now, **fields):
    with transaction.atomic():
        acquire((Lock.SITE, placement.site_id))
        row = {"pk": placement.pk, "generation": placement.generation, "state": state, **fields}
        placements.observe(agent, [row], now=now)


def books_balance(site):
    """The nodes' sums are those of their devices, and no node is over its cap."""
    for node in PowerNode.objects.filter(site=site):
        below = [n.pk for n in PowerNode.objects.filter(site=site) if is_under(n, node)]
        gpu = sum(Host.objects.filter(power_node_id__in=below).values_list("reserved_w", flat=True))
        miner = sum(Miner.objects.filter(power_node_id__in=below).values_list("reserved_w", flat=True))
        assert node.reserved_mw == gpu * node.overhead_gpu_permille + miner * node.overhead_miner_permille
        assert node.reserved_mw + 1000 * (node.fixed_w + node.margin_w) <= 1000 * node.cap_w


def is_under(node, top):
    while node is not None:
        if node.pk == top.pk:
            return True
        node = node.parent
    return False


def test_a_job_waits_for_its_watts_runs_and_gives_them_back(market):
    site, host, _, agent, contract = market
    read_all(site, NOW, asleep=False)
    job = submit(contract)
    assert cycle.run(job.cell_id, now=NOW).jobs_placed == 1
    placement = Placement.objects.get(job=job)
    assert placement.state == "shedding"  # the miners draw what it needs
    job.refresh_from_db()
    assert (job.state, job.attempt) == ("placed", 1)
    host.refresh_from_db()
    assert host.gpu_free == [0] * 8
    books_balance(site)

    later = NOW + timedelta(seconds=5)
    assert site_loop.run(site.pk, now=later)["commanded"] > 0
    placement.refresh_from_db()
    assert placement.state == "shedding"  # commanded is not confirmed
    read_all(site, later + timedelta(seconds=3), asleep=False)
    site_loop.run(site.pk, now=later + timedelta(seconds=4))
    placement.refresh_from_db()
    assert placement.state == "shedding"  # one sample is not two
    read_all(site, later + timedelta(seconds=6), asleep=True)
    assert site_loop.run(site.pk, now=later + timedelta(seconds=7))["granted"] == 1
    placement.refresh_from_db()
    host.refresh_from_db()
    assert placement.state == "granted"
    assert host.desired_limits_w == [700] * 8
    books_balance(site)

    report(agent, placement, "running", later + timedelta(seconds=9), running_at=later + timedelta(seconds=9))
    job.refresh_from_db()
    assert job.state == "running"
    end = later + timedelta(seconds=60)
    report(agent, placement, "exited", end, exit_code=0, finished_at=end)
    job.refresh_from_db()
    placement.refresh_from_db()
    host.refresh_from_db()
    assert (job.state, job.exit_code, placement.state) == ("succeeded", 0, "released")
    assert placement.release_requested_at == end
    assert host.gpu_free == [1000] * 8
    assert host.desired_limits_w == [200] * 8
    assert host.reserved_w > host.parked_w  # not read back yet
    Host.objects.update(applied_generation=host.desired_generation)
    quoted = {
        "difficulty": 148 * 10**12,
        "btc_usd_cents": 9_000_000,
        "block_height": 930_000,
        "fees_sat_per_block": 2_000_000,
    }
    for kind, value in quoted.items():
        feeds.store(kind, value, source="test", observed_at=end, now=end)
    read_all(site, end, asleep=True)
    woken = 0
    for i in range(1, 30):
        at = end + timedelta(seconds=70 + 5 * i)
        read_all(site, at, asleep=True)
        woken += site_loop.run(site.pk, now=at).get("commanded", 0)
        books_balance(site)
    host.refresh_from_db()
    assert host.reserved_w == host.parked_w
    assert woken > 0
    assert not Miner.objects.filter(site=site, desired_mode=0).exists()


def test_a_failed_replica_ends_its_gang_and_a_lost_host_requeues_it(market):
    site, host, _miners, agent, contract = market
    Miner.objects.filter(site=site).delete()
    PowerNode.objects.filter(site=site).update(reserved_mw=0)
    second = f.host(site, power_node="pdu-1")
    second.listing = contract.listing
    second.save()
    site_loop.run(site.pk, now=NOW)
    job = submit(contract, replicas=2)
    cycle.run(job.cell_id, now=NOW)
    one, two = Placement.objects.filter(job=job).order_by("rank")
    assert {one.host_id, two.host_id} == {host.pk, second.pk}
    for p in (one, two):
        report(agent, p, "running", NOW + timedelta(seconds=5), running_at=NOW + timedelta(seconds=5))
    report(agent, one, "failed", NOW + timedelta(seconds=9), reason="host_lost")
    two.refresh_from_db()
    assert two.state == "draining"
    assert two.release_requested_at is not None
    report(agent, two, "exited", NOW + timedelta(seconds=12), exit_code=143, reason="drained")
    job.refresh_from_db()
    assert (job.state, job.restarts) == ("requeued", 1)
    cycle.run(job.cell_id, now=NOW + timedelta(seconds=20))
    job.refresh_from_db()
    assert (job.state, job.attempt) == ("placed", 2)
    one, two = Placement.objects.filter(job=job, attempt=2).order_by("rank")
    report(agent, one, "running", NOW + timedelta(seconds=25))
    report(agent, two, "running", NOW + timedelta(seconds=25))
    report(agent, one, "exited", NOW + timedelta(seconds=30), exit_code=3)
    report(agent, two, "exited", NOW + timedelta(seconds=31), exit_code=143, reason="drained")
    job.refresh_from_db()
    assert (job.state, job.exit_code, job.state_reason) == ("failed", 143, "exit code 3")


def test_a_preempted_job_that_saved_its_work_and_exits_0_is_not_done(market):
    site, _, _, agent, contract = market
    Miner.objects.filter(site=site).delete()
    PowerNode.objects.filter(site=site).update(reserved_mw=0)
    job = submit(contract)
    cycle.run(job.cell_id, now=NOW)
    placement = Placement.objects.get(job=job)
    report(agent, placement, "running", NOW + timedelta(seconds=5))
    with transaction.atomic():
        placements.lock_sites([site.pk])
        jobs.preempt([job.pk], now=NOW + timedelta(seconds=9), actor="test", reason="preempted")
    report(agent, placement, "exited", NOW + timedelta(seconds=10), exit_code=0, reason="drained")
    job.refresh_from_db()
    assert (job.state, job.restarts) == ("requeued", 0)


def test_a_waiting_job_says_what_binds(market):
    site, _host, _, _, contract = market
    read_all(site, NOW, asleep=False)
    first = submit(contract)
    second = submit(contract)
    cycle.run(first.cell_id, now=NOW)
    decision = Decision.objects.get(job=second)
    assert decision.outcome == "waiting"
    assert decision.reason == "NO_GPU"
    assert decision.stages


def test_cancel_while_waiting_and_while_running(market):
    site, _host, _miners, agent, contract = market
    waiting = submit(contract)
    jobs.cancel(f.actor(contract.organization), waiting, now=NOW)
    assert waiting.state == "cancelled"
    Miner.objects.filter(site=site).delete()
    PowerNode.objects.filter(site=site).update(reserved_mw=0)
    job = submit(contract)
    cycle.run(job.cell_id, now=NOW)
    placement = Placement.objects.get(job=job)
    report(agent, placement, "running", NOW + timedelta(seconds=5))
    jobs.cancel(f.actor(contract.organization), job, now=NOW + timedelta(seconds=10))
    placement.refresh_from_db()
    assert (placement.state, placement.desired) == ("draining", "drain")
    report(agent, placement, "exited", NOW + timedelta(seconds=11), exit_code=143, reason="drained")
    job.refresh_from_db()
    assert job.state == "cancelled"


def test_what_an_agent_is_told(market):
    site, host, _, agent, contract = market
    Miner.objects.filter(site=site).delete()
    PowerNode.objects.filter(site=site).update(reserved_mw=0)
    job = submit(contract, env={"A": "1"}, secrets={"TOKEN": "s3cret"})
    cycle.run(job.cell_id, now=NOW)
    told = agents.desired(agent, {"sequence": 1, "known_safety": -1}, now=NOW)
    (placement,) = told["placements"]
    assert placement["job"] == job.public_id
    assert placement["secrets"] == {"TOKEN": "s3cret"}
    assert told["hosts"] == [{"name": host.name, "generation": 1, "power_state": "capped", "limits_w": [700] * 8}]
    assert told["safety"]["nodes"][0]["cap_w"] == 54_000
    assert Site.objects.get(pk=site.pk).desired_generation == told["generation"] > 0


def test_two_cycles_of_one_cell_do_not_place_a_job_twice(market):
    """A plan made before another cycle began is refused whole."""
    from scheduler import commit, snapshot
    from scheduler.core.plan import plan

    _site, _host, _, _, contract = market
    job = submit(contract)
    stale = snapshot.take(contract.cell, now=NOW)
    made = plan(stale.fleet, stale.requests, stale.running, policy=stale.policy, seed=0, now_s=0)
    cycle.run(job.cell_id, now=NOW)
    with pytest.raises(commit.FencedError), transaction.atomic():
        commit.commit(stale, made, now=NOW)
    assert Placement.objects.filter(job=job).count() == 1
    assert Job.objects.get(pk=job.pk).attempt == 1
