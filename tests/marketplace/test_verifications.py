"""Verification: when a run may begin, what it takes, how it gives way, and what a host is taken for because of it."""

import json
from datetime import timedelta

import pytest
from django.core import mail
from django.db import transaction
from django.test import Client

from billing import usage
from billing.models import Invoice, UsageRecord
from marketplace import outbox, tasks
from marketplace.models import (
    Contract,
    Gpu,
    Host,
    HostVerification,
    Job,
    LogChunk,
    Placement,
    PowerNode,
    Reservation,
    ReservationBlock,
    Verification,
)
from marketplace.services import drains, jobs, placements, search, verifications
from marketplace.services.search import Filters, comparisons
from marketplace.tenancy import ANONYMOUS, SYSTEM
from sandbox.site.physics import Physics
from scheduler import cycle, site_loop
from tests import factories as f
from tests.agent.peer import small_site
from tests.factories import NOW
from tests.marketplace.refusals import refused

pytestmark = pytest.mark.django_db


def at(seconds):
    return NOW + timedelta(seconds=seconds)


class Place:
    """A site with one host of eight H100 on offer, and the simulated device that answers for it."""

    def __init__(self):
        self.site = f.site(pdus=1)
        self.host = f.host(self.site, power_node="pdu-1", beat_at=NOW)
        self.agent, _ = f.agent(self.site, last_sync_at=NOW, lease_until=NOW + timedelta(days=90))
        PowerNode.objects.update(measured_w=1000, measured_at=NOW)
        self.listing = f.listing(self.site, hosts=[self.host])
        self.actor = f.actor(self.site.organization)
        self.physics = Physics(small_site(hosts=1, miners=0)).hosts
        self.physics.set_limits(0, [700] * 8)
        self.now = 0

    def begin(self):
        self.host.refresh_from_db()
        return verifications.begin(self.host, actor=self.actor, now=at(self.now))

    def report(self, job, state, **fields):
        with transaction.atomic():
            placements.lock_sites([self.site.pk])
            rows = [
                {"pk": p.pk, "generation": p.generation, "state": state, **fields}
                for p in Placement.objects.filter(job=job).exclude(state__in=Placement.FINAL)
            ]
            placements.observe(self.agent, rows, now=at(self.now))

    def heard(self):
        """The site was heard right now."""
        type(self.agent).objects.update(last_sync_at=at(self.now))
        Host.objects.update(beat_at=at(self.now))
        PowerNode.objects.update(measured_at=at(self.now))

    def run(self, line=None, code=0):
        """A whole run: granted, run, its figures logged, ended, concluded."""
        self.heard()
        made = self.begin()
        site_loop.run(self.site.pk, now=at(self.now))
        self.now += 10
        self.report(made.job, "running", running_at=at(self.now))
        text = self.physics.benchmark(0, list(range(8))) if line is None else line
        placed = Placement.objects.get(job=made.job)
        if text:
            LogChunk.objects.create(placement=placed, stream="stdout", offset=0, size=len(text), data=f"{text}\n")
        self.now += 10
        self.report(made.job, "exited", exit_code=code, finished_at=at(self.now))
        Host.objects.update(power_state="parked", applied_generation=1 << 40)
        site_loop.run(self.site.pk, now=at(self.now))
        verifications.clock(now=at(self.now))
        made.refresh_from_db()
        self.now += 100
        return made

    @property
    def standing(self):
        return HostVerification.objects.get(host=self.host)

    def found(self, **asked):
        return [r.listing for r in search.search(ANONYMOUS, Filters(**asked), now=at(self.now)).rows]


@pytest.fixture
def place():
    return Place()


def test_a_run_takes_the_whole_host_runs_for_nothing_and_verifies_it(place):
    made = place.begin()
    placed = Placement.objects.get(job=made.job)
    place.host.refresh_from_db()
    assert (placed.gpu_indices, placed.state, place.host.gpu_free) == (list(range(8)), "shedding", [0] * 8)
    site_loop.run(place.site.pk, now=at(1))
    placed.refresh_from_db()
    assert placed.state == "granted"  # its watts were shed, booked and granted as anybody's
    with refused("verification_not_now"):
        place.begin()
    jobs.cancel(SYSTEM, made.job, now=at(2))
    place.report(made.job, "exited", exit_code=143)
    verifications.clock(now=at(3))
    made.refresh_from_db()
    assert (made.state, place.standing.failures) == ("aborted", 0)  # says nothing of the host
    place.now = 50
    made = place.run()
    assert (made.state, made.reason, made.gpus) == ("passed", "", 8)
    assert 600_000 < made.matmul_gflops < 720_000
    assert (place.standing.state, place.standing.score) == ("verified", made.score)
    assert 700 < made.score < 1000
    place.host.refresh_from_db()
    assert place.host.gpu_free == [1000] * 8
    usage.meter_all(at(place.now + 7200))
    assert set(UsageRecord.objects.values_list("price_version__millionths", flat=True)) <= {0}
    assert not Invoice.objects.exists()
    contract = Contract.objects.get(jobs=made.job)
    assert (contract.price, contract.operator, contract.organization.is_house) == (0, place.site.organization, True)


def test_search_finds_verified_hosts_and_sorts_by_score(place):
    assert place.found(verified=True) == []
    made = place.run()
    assert place.found(verified=True) == [place.listing]
    assert place.found(where=comparisons(f"benchmark_score>={made.score}")) == [place.listing]
    assert place.found(where=comparisons(f"benchmark_score>{made.score}")) == []
    row = search.search(ANONYMOUS, Filters(), now=at(place.now), sort="-benchmark").rows[0]
    assert (row.checked.verified, row.checked.hosts, row.checked.score) == (1, 1, made.score)
    other = f.host(place.site)
    Host.objects.filter(pk=other.pk).update(listing=place.listing)
    assert place.found(verified=True) == []  # of a listing, every host must have passed


def test_two_runs_in_a_row_that_fail_take_the_state_away_and_tell_the_operator(place):
    f.member(place.site.organization, "engineer")
    place.run()
    place.physics.really[0] = "A100-80"  # another device than it states
    made = place.run()
    assert made.state == "failed"
    assert "Matrix multiplication, slowest GPU" in made.reason
    assert (place.standing.state, place.standing.failures) == ("verified", 1)
    assert place.found(verified=True) == [place.listing]
    made = place.run()
    assert (place.standing.state, place.standing.failures) == ("failed", 2)
    assert place.found(verified=True) == []
    assert tasks.tell_not_verified
    outbox.drain(topic=verifications.FAILED_TWICE)
    assert len(mail.outbox) == 1
    assert "Matrix multiplication" in mail.outbox[0].body
    assert place.host.name in mail.outbox[0].subject
    place.physics.really[0] = "H100-SXM"
    place.run()
    assert (place.standing.state, place.standing.failures) == ("verified", 0)


def test_a_host_that_degrades_is_found_out(place):
    place.run()
    place.physics.slowness[0] = 2.0
    assert place.run().state == "failed"


@pytest.mark.parametrize(
    ("line", "code", "state"),
    [
        ("nothing of ours", 0, "failed"),
        ("tailrace-verify {not json", 0, "failed"),
        ('tailrace-verify {"gpus": [{"matmul_gflops": "x"}]}', 0, "failed"),
        ('tailrace-verify {"gpus": [{"matmul_gflops": -5, "memory_mb_s": 1}]}', 0, "failed"),
        ('tailrace-verify {"gpus": 7}', 0, "failed"),
        ("", 1, "failed"),
        ("", 143, "aborted"),
    ],
)
def test_what_prints_no_figures_verifies_nothing(place, line, code, state):
    made = place.run(line=line, code=code)
    if code == 0 and made.state == "running":  # a log may be late: it is waited for
        verifications.clock(now=at(place.now + 300))
        made.refresh_from_db()
    assert made.state == state
    assert made.reason


def test_a_log_that_comes_late_is_waited_for(place):
    made = place.run(line="")
    assert made.state == "running"
    text = place.physics.benchmark(0, list(range(8)))
    placed = Placement.objects.get(job=made.job)
    LogChunk.objects.create(placement=placed, stream="stdout", offset=0, size=len(text), data=text)
    verifications.clock(now=at(place.now))
    made.refresh_from_db()
    assert made.state == "passed"


def test_other_devices_and_time_make_it_stale(place):
    place.run()
    verifications.clock(now=at(place.now))
    assert place.standing.state == "verified"
    Gpu.objects.filter(host=place.host, index=3).update(serial="another")
    verifications._expire(at(place.now))
    assert place.standing.state == "stale"
    assert place.found(verified=True) == []
    place.run()
    assert place.standing.state == "verified"
    verifications._expire(at(place.now) + timedelta(days=46))
    assert (place.standing.state, place.standing.next_at) == ("stale", at(place.now) + timedelta(days=46))


# --- never in the way
def job_waits(place):
    contract = f.contract(place.listing, f.organization())
    spec = {"command": ["true"], "gpus": 8, "vcpu_milli": 1000, "ram_mib": 1024}
    return jobs.submit(f.actor(contract.organization), contract, spec, now=at(place.now))


def job_runs(place):
    f.placement(f.job(f.contract(place.listing), state="running"), place.host, state="running")


def reserved_soon(place):
    start = at(300)
    made = Reservation.objects.create(
        listing=place.listing, starts_at=start, claims_at=start, ends_at=at(9000), state="firm"
    )
    ReservationBlock.objects.create(reservation=made, host=place.host, gpu_indices=[0])


@pytest.mark.parametrize(
    "obstacle",
    [
        job_waits,
        job_runs,
        reserved_soon,
        lambda place: drains.drain_host(place.host, actor=place.actor, now=at(0), reason="fan"),
        lambda place: type(place.site).objects.update(mode="hold"),
        lambda place: Host.objects.update(listing=None),
    ],
    ids=["a customer waits", "a job runs", "reserved soon", "drains", "held", "not listed"],
)
def test_it_does_not_begin(place, obstacle):
    obstacle(place)
    with refused("verification_not_now"):
        place.begin()
    assert not Verification.objects.exists()
    assert not Job.objects.filter(organization__is_house=True).exists()


def test_a_customer_who_waits_gets_the_host_at_once(place):
    made = place.begin()
    site_loop.run(place.site.pk, now=at(1))
    place.report(made.job, "running", running_at=at(2))
    place.now = 5
    mine = job_waits(place)
    verifications.clock(now=at(6))
    assert Placement.objects.get(job=made.job).state == "draining"
    place.now = 8
    place.report(made.job, "exited", exit_code=143)
    cycle.run(place.site.cell_id, now=at(9))
    mine.refresh_from_db()
    assert mine.state == "placed"
    verifications.clock(now=at(10))
    made.refresh_from_db()
    assert made.state == "aborted"
    assert place.standing.next_at == at(10) + verifications.AGAIN


def test_the_clock_begins_what_is_due_one_at_a_site_and_says_why_it_waits(place):
    second = f.host(place.site)
    Host.objects.filter(pk=second.pk).update(listing=place.listing)
    verifications.clock(now=NOW)
    assert HostVerification.objects.count() == 2
    assert not Verification.objects.exists()  # the first comes within a day, not at once
    HostVerification.objects.update(next_at=NOW)
    assert verifications.clock(now=NOW)["begun"] == 1
    assert verifications.clock(now=NOW)["begun"] == 0
    waits = HostVerification.objects.exclude(waits_for="").get()
    assert "another verification runs" in waits.waits_for
    assert waits.next_at == NOW + verifications.RETRY


def test_probe_gives_and_takes_bytes_to_who_knows_its_token(place):
    path = verifications._probe_url(place.host).partition("/api/")[2]
    client = Client()
    answer = client.get(f"/api/{path}", {"mib": 2})
    assert len(b"".join(answer.streaming_content)) == 2 << 20
    assert client.post(f"/api/{path}", b"x" * 1000, content_type="application/octet-stream").status_code == 204
    assert client.get("/api/v1/probe/forged:token").status_code == 404


def test_an_operator_runs_and_reads_it_by_api_and_a_stranger_cannot(place):
    _, key = f.key(place.site.organization, scopes=["sites:read", "sites:write", "listings:read"])
    mine = Client(headers={"Authorization": f"Bearer {key}"})
    base = f"/api/v1/hosts/{place.host.public_id}/verification"
    assert mine.get(base).json()["state"] == "unverified"
    made = mine.post(base + "s").json()
    assert (made["state"], made["id"][:4]) == ("running", "vrf_")
    again = mine.post(base + "s")
    assert (again.status_code, again.json()["code"]) == (409, "verification_not_now")
    jobs.cancel(SYSTEM, Job.objects.get(organization__is_house=True), now=NOW)
    verifications.clock(now=NOW)
    place.run()
    told = mine.get(base).json()
    assert (told["state"], told["run"]["figures"]["gpus"]) == ("verified", 8)
    assert {b["figure"] for b in told["wanted"]} >= {"matmul_gflops", "disk_read_mb_s"}
    assert [row["state"] for row in mine.get(base + "s").json()["data"]] == ["passed", "aborted"]
    shown = mine.get(f"/api/v1/listings/{place.listing.public_id}").json()["verification"]
    assert shown == {"verified": 1, "hosts": 1, "score": told["score"]}
    page = Client().get(f"/listings/{place.listing.public_id}").content.decode()
    assert "passed the benchmark" in page
    assert "TFLOP/s" in page
    _, other = f.key(f.organization(is_operator=True), scopes=["sites:read", "sites:write"])
    stranger = Client(headers={"Authorization": f"Bearer {other}"})
    assert {
        stranger.get(base).status_code,
        stranger.get(base + "s").status_code,
        stranger.post(base + "s").status_code,
    } == {404}


def test_figures_are_read_strictly():
    with pytest.raises((ValueError, TypeError, KeyError)):
        verifications.read({"gpus": [{"matmul_gflops": 1 << 50, "memory_mb_s": 1}]})
    assert verifications.read({}) == {}
    assert json.dumps(verifications.read({"errors": ["x"]}))
