"""Silence: nothing moves at first, then what ran is lost and its jobs queue again; our own absence costs nobody anything."""

from datetime import timedelta

import pytest
from django.db import transaction

from marketplace.locks import Lock, acquire
from marketplace.models import Agent, ControlPulse, Host, Job, Placement, PowerNode
from marketplace.services import jobs, leases, placements, sites
from scheduler import cycle
from tests import factories as f
from tests.factories import NOW

pytestmark = pytest.mark.django_db
LEASE = timedelta(minutes=15)


def at(seconds):
    return NOW + timedelta(seconds=seconds)


@pytest.fixture
def market():
    site = f.site(pdus=1)
    host = f.host(site, power_node="pdu-1", beat_at=NOW)
    agent, _ = f.agent(site, last_sync_at=NOW, lease_until=NOW + LEASE)
    PowerNode.objects.update(measured_w=1000, measured_at=NOW)
    contract = f.contract(f.listing(site, hosts=[host]), f.organization())
    return site, agent, contract


def start(market, state="running", **spec):
    """A job that runs at the site since NOW + 5 s."""
    *_, contract = market
    spec = {"command": ["true"], "gpus": 2, "vcpu_milli": 1000, "ram_mib": 1024, **spec}
    job = jobs.submit(f.actor(contract.organization), contract, spec, now=NOW)
    cycle.run(job.cell_id, now=NOW)
    if state:
        report(market, job, state, 5, running_at=at(5))
    return job


def report(market, job, state, seconds, **fields):
    site, agent, _ = market
    with transaction.atomic():
        placements.lock_sites([site.pk])
        rows = [
            {"pk": p.pk, "generation": p.generation, "state": state, **fields}
            for p in Placement.objects.filter(job=job).exclude(state__in=Placement.FINAL)
        ]
        placements.observe(agent, rows, now=at(seconds))


def watch(market, seconds):
    with transaction.atomic():
        acquire((Lock.SITE, market[0].pk))
        leases.watch(market[0], now=at(seconds))


def only(job):
    job.refresh_from_db()
    return Placement.objects.get(job=job, attempt=job.attempt)


def sound(site):
    assert sites.recompute_reserved(site) == dict(PowerNode.objects.filter(site=site).values_list("id", "reserved_mw"))


def test_a_silent_site_is_unreachable_first_and_lost_after_its_lease(market):
    job = start(market)
    watch(market, 90)
    assert only(job).state == "running"
    watch(market, 91)
    assert only(job).state == "unreachable"
    assert job.state == "running"  # the job runs, as far as anybody knows
    assert Host.objects.get().gpu_free == [0, 0] + [1000] * 6
    watch(market, 899)
    assert only(job).state == "unreachable"
    watch(market, 901)
    lost = only(job)
    assert (lost.state, lost.reason) == ("lost", "site_lost")
    assert lost.release_requested_at == NOW  # nobody pays for what nobody saw after the last word
    assert (job.state, job.restarts) == ("requeued", 1)
    assert Host.objects.get().gpu_free == [1000] * 8
    sound(market[0])
    assert [e.to_state for e in lost.events.all()] == ["intended", "granted", "running", "unreachable", "lost"]


def test_no_host_is_lost_because_we_were_not_there_to_hear_its_beat(market):
    for seconds in (0, 3600):  # an hour without us
        leases.pulse(now=at(seconds))
    watch(market, 3600)
    assert Host.objects.get().state == "active"
    for seconds in range(3625, 3776, 25):
        leases.pulse(now=at(seconds))
    Agent.objects.update(last_sync_at=at(3770))  # the site speaks, the host does not
    watch(market, 3775)
    assert Host.objects.get().state == "lost"


def test_a_site_that_comes_back_goes_on_where_it_was(market):
    job = start(market)
    watch(market, 100)
    Agent.objects.update(last_sync_at=at(110), lease_until=at(110) + LEASE)
    report(market, job, "running", 110, running_at=at(5))
    assert only(job).state == "running"
    assert only(job).running_at == at(5)
    watch(market, 120)
    assert only(job).state == "running"


def test_a_return_without_the_time_of_the_start_does_not_move_it(market):
    """What was confirmed as running keeps its second: an agent that has forgotten it shortens no bill."""
    job = start(market)
    watch(market, 100)
    Agent.objects.update(last_sync_at=at(110), lease_until=at(110) + LEASE)
    report(market, job, "running", 110)
    assert only(job).running_at == at(5)


def test_what_drains_when_the_site_falls_silent_ends_as_drained(market):
    job = start(market)
    jobs.cancel(f.actor(market[2].organization), job, now=at(20))
    watch(market, 100)
    assert only(job).state == "unreachable"
    report(market, job, "draining", 110)
    assert only(job).state == "draining"
    report(market, job, "exited", 111, exit_code=143, finished_at=at(25), reason="drained")
    gone = only(job)
    assert (gone.state, gone.release_requested_at) == ("released", at(20))
    assert job.state == "cancelled"


def test_asking_for_the_release_again_does_not_move_the_end_of_the_bill(market):
    job = start(market)
    with transaction.atomic():
        placements.lock_sites([market[0].pk])
        jobs.preempt([job.pk], now=at(20), actor="scheduler", reason="capacity")
    watch(market, 100)
    jobs.cancel(f.actor(market[2].organization), Job.objects.get(pk=job.pk), now=at(150))
    assert only(job).release_requested_at == at(20)


def test_an_exit_reported_after_the_silence_is_believed(market):
    job = start(market)
    watch(market, 100)
    report(market, job, "exited", 200, exit_code=0, finished_at=at(50))
    done = only(job)
    assert (done.state, done.finished_at, done.release_requested_at) == ("released", at(50), at(50))
    assert job.state == "succeeded"


def test_what_is_lost_stays_lost(market):
    job = start(market)
    watch(market, 1000)
    lost = only(job)
    report(market, job, "running", 1001)
    placements.observe(market[1], [{"pk": lost.pk, "generation": 1, "state": "running"}], now=at(1002))
    assert only(job).state == "lost"


def test_restarts_are_counted_and_come_to_an_end(market):
    job = start(market, max_restarts=1)
    watch(market, 1000)
    assert only(job)
    assert (job.state, job.restarts) == ("requeued", 1)
    Agent.objects.update(last_sync_at=at(1000), lease_until=at(1000) + LEASE)
    Host.objects.update(beat_at=at(1000))
    watch(market, 1001)
    cycle.run(job.cell_id, now=at(1001))
    watch(market, 3000)
    job.refresh_from_db()
    assert (job.state, job.attempt, job.restarts) == ("failed", 2, 1)
    assert job.state_reason == "site_lost, 1 restarts used"


def test_the_watch_leaves_sites_that_never_spoke(market):
    job = start(market, state="")
    Agent.objects.update(last_sync_at=None, lease_until=None)
    watch(market, 5000)
    assert only(job).state == "granted"


# --- hosts
def test_a_host_without_a_beat_takes_no_new_work_and_comes_back(market):
    Agent.objects.update(last_sync_at=at(200), lease_until=at(200) + LEASE)
    watch(market, 200)
    assert Host.objects.get().state == "lost"
    job = start(market, state="")
    assert job.state == "queued"
    Host.objects.update(beat_at=at(210))
    watch(market, 211)
    assert Host.objects.get().state == "active"
    cycle.run(job.cell_id, now=at(212))
    job.refresh_from_db()
    assert job.state == "placed"


def test_the_hosts_of_a_site_that_is_silent_past_its_lease_are_lost_until_they_are_heard(market):
    job = start(market)
    away = f.host(market[0], power_node="pdu-1", beat_at=NOW, state="draining")
    watch(market, 899)
    assert Host.objects.exclude(pk=away.pk).get().state == "active"
    watch(market, 901)
    host = Host.objects.exclude(pk=away.pk).get()
    assert (host.state, host.state_reason) == ("lost", "site silent")
    Agent.objects.update(last_sync_at=at(1000), lease_until=at(1900))
    watch(market, 1000)
    assert only(job).host.state == "lost"  # the site has spoken, its host has not
    Host.objects.update(beat_at=at(1010))
    Agent.objects.update(last_sync_at=at(1010))
    watch(market, 1011)
    host.refresh_from_db()
    assert (host.state, host.state_reason) == ("active", "")
    assert Host.objects.get(pk=away.pk).state == "draining"  # whoever drained it brings it back


def test_a_drained_host_sends_its_jobs_back_to_the_queue(market):
    """Also a job that had no watts yet: whose host is drained waits again, it has not failed."""
    host = Host.objects.get()
    running, waiting = start(market), start(market, state="")
    Placement.objects.filter(job=waiting).update(state="shedding")
    with transaction.atomic():
        placements.lock_sites([market[0].pk])
        sites.drain_host(host, reason="fan", actor=f.actor(market[0].organization), now=at(20), evict=True)
    waiting.refresh_from_db()
    assert waiting.state == "requeued"
    report(market, running, "exited", 30, exit_code=143)
    running.refresh_from_db()
    assert running.state == "requeued"


# --- our own absence
def test_the_first_beat_and_a_steady_one_extend_nothing(market):
    assert leases.pulse(now=NOW) == timedelta(0)
    assert leases.pulse(now=at(5)) == timedelta(0)
    assert leases.pulse(now=at(35)) == timedelta(0)
    assert Agent.objects.get().lease_until == NOW + LEASE
    assert ControlPulse.objects.get().at == at(35)


def test_while_we_were_away_no_lease_has_run_out(market):
    job = start(market)
    leases.pulse(now=NOW)
    away = 2 * 3600
    assert leases.pulse(now=at(away)) == timedelta(seconds=away)
    watch(market, away)  # the agent had nobody to speak to
    assert only(job).state == "running"
    assert Agent.objects.get().lease_until == NOW + LEASE + timedelta(seconds=away)
    watch(market, away + 91)  # from here on it is silence again
    assert only(job).state == "unreachable"


def test_an_agent_without_a_lease_gets_none_from_the_gap(market):
    Agent.objects.update(lease_until=None)
    leases.pulse(now=NOW)
    leases.pulse(now=at(600))
    assert Agent.objects.get().lease_until is None


def test_what_was_asked_to_leave_before_it_was_lost_is_billed_until_then(market):
    job = start(market)
    jobs.cancel(f.actor(market[2].organization), job, now=at(20))
    Agent.objects.update(last_sync_at=at(60))
    watch(market, 901)
    assert only(job).release_requested_at == at(20)
    assert job.state == "cancelled"


def test_a_placement_that_had_not_started_when_the_site_fell_silent_starts_when_it_is_back(market):
    job = start(market, state="")
    watch(market, 100)
    assert only(job).state == "unreachable"
    report(market, job, "starting", 110)
    assert only(job).state == "starting"
    report(market, job, "running", 115, running_at=at(112))
    assert (only(job).state, only(job).running_at, job.state) == ("running", at(112), "running")
