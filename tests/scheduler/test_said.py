"""One explanation, three doors: the API, the job's page and `manage.py explain` say the same, whatever binds and wherever the job is."""

import html
import re
from datetime import timedelta
from io import StringIO

import pytest
from django.core.cache import cache
from django.core.management import call_command
from django.db import transaction
from django.test import Client
from django.utils import timezone

from billing.models import PriceVersion
from marketplace.models import BillingStanding, Host, Job, Placement, PowerNode, Reservation
from marketplace.services import drains, jobs, placements, spending
from scheduler import cycle, why
from tests import factories as f

pytestmark = pytest.mark.django_db
NOW = timezone.now().replace(microsecond=0)  # what is reserved is looked up by the clock on the wall


def at(seconds):
    return NOW + timedelta(seconds=seconds)


class Market:
    """Two hosts of 8 GPUs at Bosque, each behind its own leaf; a customer with a contract of 64 on demand."""

    def __init__(self):
        cache.clear()
        self.site = f.site(name="Bosque", pdus=1)
        self.hosts = [f.host(self.site, f"h{i}", power_node="pdu-1", leaf=f"leaf-{i}", beat_at=NOW) for i in range(2)]
        self.agent, _ = f.agent(self.site, last_sync_at=NOW, lease_until=at(900))
        PowerNode.objects.update(measured_w=1000, measured_at=NOW)
        self.listing = f.listing(self.site, hosts=self.hosts, title="H100 at Bosque")
        self.customer = f.organization("Lumen Labs")
        self.contract = self.book(self.customer)

    def book(self, organization, **fields):
        BillingStanding.objects.update_or_create(
            organization=organization, defaults={"state": "good", "updated_at": NOW}
        )
        return f.contract(self.listing, organization, **{"gpu_count": 64, **fields})

    def submit(self, contract=None, **spec):
        contract = contract or self.contract
        spec = {"command": ["true"], "gpus": 8, "vcpu_milli": 8000, "ram_mib": 1024, **spec}
        return jobs.submit(f.actor(contract.organization), contract, spec, now=NOW)

    def cycle(self, seconds=0):
        Host.objects.update(beat_at=at(seconds))
        type(self.agent).objects.update(last_sync_at=at(seconds), lease_until=at(seconds + 900))
        return cycle.run(self.site.cell_id, now=at(seconds))

    def report(self, job, seconds, state, **fields):
        live = Placement.objects.filter(job=job).exclude(state__in=Placement.FINAL)
        rows = [{"pk": p.pk, "generation": p.generation, "state": state, "running_at": at(5), **fields} for p in live]
        with transaction.atomic():
            placements.lock_sites([self.site.pk])
            placements.observe(self.agent, rows, now=at(seconds))


def doors(job):
    """What each door says: (text, changes, earliest start) by the API; the page's words; the command's."""
    job = Job.objects.get(pk=job.pk)
    owner = f.member(job.organization).user
    api = f.client(job.organization).get(f"/api/v1/jobs/{job.public_id}/explain").json()
    client = Client()
    client.force_login(owner)
    page = client.get(f"/jobs/{job.public_id}/why").content.decode()
    out = StringIO()
    call_command("explain", job.public_id, stdout=out)
    return api, re.sub(r"\s+", " ", html.unescape(page)), out.getvalue()


def agreed(job):
    """The text that all three give, and the suggestions."""
    api, page, command = doors(job)
    for text in (api["text"], *(change["text"] for change in api["changes"])):
        assert text in page
        # Our own people read whose job it is, its owner its name.
        assert (text.partition("your job")[0] if "your job" in text else text) in command
    if api.get("earliest_start"):
        assert "Earliest start" in page
        assert "earliest start" in command
    told = api["text"] + " ".join(change["text"] for change in api["changes"])
    assert not re.search(r"pdu-1|NO_|milli|\bcell\b", told)
    return api["text"], {change["kind"]: change for change in api["changes"]}


def shape(market):
    market.submit(gpus=5)
    market.submit(gpus=5)
    return market.submit(gpus=6)


def vcpu(market):
    Host.objects.update(vcpu_free=4500)
    return market.submit(gpus=1)


def topology(market):
    return market.submit(replicas=2, topology="leaf", topology_required=True)


def watts(market):
    PowerNode.objects.filter(name="pdu-1").update(cap_w=11_000, margin_w=0)
    return market.submit()


def price(market):
    spot = market.book(market.customer, kind="spot", limit_price=9_000_000)
    PriceVersion.objects.create(contract=spot, kind="rate", millionths=2_500_000, valid_from_s=0, created_at=NOW)
    return market.submit(spot, price_limit=2_000_000)


def quota(market):
    tight = market.book(market.customer, gpu_count=8)
    market.submit(tight, gpus=4)
    return market.submit(tight, gpus=8)


def limit(market):
    type(market.customer).objects.filter(pk=market.customer.pk).update(gpu_limit=10)
    market.submit(gpus=4)
    return market.submit(gpus=8)


def hourly(market):
    contract = market.book(market.customer, kind="on_demand", price=2_500_000)
    spending.set_limits(f.actor(market.customer), market.customer, hourly_minor=2200, now=NOW)
    market.submit(contract, gpus=4)
    return market.submit(contract, gpus=8)


def budget(market):
    spending.set_limits(f.actor(market.customer), market.customer, monthly_minor=50_000, now=NOW)
    month = NOW.date().replace(day=1)
    spending.record_spend(market.customer.pk, month=month, spent_minor=51_230, now=NOW)
    return market.submit(market.book(market.customer, kind="on_demand"))


def reservation(market):
    holder = market.book(f.organization("Secret Rival"), kind="reserved", gpu_count=16, starts_at=NOW, ends_at=at(7200))
    promise = Reservation.objects.create(
        listing=market.listing, contract=holder, starts_at=NOW, ends_at=at(7200), claims_at=NOW, state="firm"
    )
    for host in market.hosts:
        promise.blocks.create(host=host, gpu_indices=list(range(8)))
    return market.submit()


def taint(market):
    Host.objects.update(taints=["crew=night"])
    return market.submit()


def affinity(market):
    market.submit(gpus=1, labels=["app=db"])
    return market.submit(
        gpus=1, replicas=2, affinity=[{"rule": "apart", "level": "site", "labels": ["app=db"]}], labels=["app=web"]
    )


def leaving(market):
    drains.drain_site(market.site, reason="fan of rack 7 is loud", actor=f.actor(market.site.organization), now=NOW)
    return market.submit()


@pytest.mark.parametrize(
    ("make", "said", "changes"),
    [
        (shape, "The job waits for idle GPUs on one host, short by 3 GPUs", {"gpus", "split"}),
        (vcpu, "vCPU, short by 3.5 vCPU", {"cpu"}),
        (
            topology,
            "a place where its replicas may stand as asked (topology), short by 1 replica",
            {"topology", "replicas"},
        ),
        (watts, "power at the site, short by", {"gpus"}),
        (price, "it costs 2.5 USD per GPU-hour now, above its limit of 2", {"price"}),
        (quota, "its contract's ceiling is 8 GPUs; 4 are in use, and it needs 8", {"gpus", "quota", "job"}),
        (limit, "the organization limit is 10 GPUs; 4 are in use, and it needs 8", {"gpus", "limit"}),
        (
            hourly,
            "the organization's hourly limit is 22.00 USD; what runs costs 10.00 USD an hour, and it would cost 20.00 USD more",
            {"gpus", "rate", "job"},
        ),
        (
            budget,
            "the organization's budget of 500.00 USD for this month is used up (512.30 USD are spent)",
            {"budget"},
        ),
        (reservation, "the hosts that would do are reserved", {"window"}),
        (taint, "the hosts that would do have taints that it does not tolerate", {"taints"}),
        (affinity, "its affinity rules keep it off the hosts that would do", {"apart"}),
        (leaving, "take no work now", set()),
    ],
)
def test_what_binds_is_said_alike_at_every_door(make, said, changes):
    market = Market()
    job = make(market)
    market.cycle()
    assert Job.objects.get(pk=job.pk).state == "queued"
    text, found = agreed(job)
    assert text.startswith("The job waits")
    assert said in text
    assert changes <= set(found), found
    assert ("No single change that was tried would make it fit." in doors(job)[1]) == (not found)
    assert "Secret Rival" not in text + str(found)
    assert "rack 7" not in text + str(found)


def test_a_reservation_that_follows_another_on_the_same_gpus_keeps_them_closed():
    """The first window's end is no help while the second claims the same GPUs; the later end is said."""
    market = Market()
    for start, end in ((0, 3600), (3600, 7200)):
        holder = market.book(f.organization(), kind="reserved", gpu_count=16, starts_at=NOW, ends_at=at(end))
        promise = Reservation.objects.create(
            listing=market.listing,
            contract=holder,
            starts_at=at(start),
            ends_at=at(end),
            claims_at=at(start),
            state="firm",
        )
        for host in market.hosts:
            promise.blocks.create(host=host, gpu_indices=list(range(8)))
    job = market.submit()
    market.cycle()
    assert agreed(job)[1]["window"]["starts_at"].startswith(f"{at(7200):%Y-%m-%dT%H:%M:%S}")


def test_the_end_of_the_job_that_it_waits_for_and_the_promised_start_are_said():
    market = Market()
    for name in ("one", "two"):
        market.submit(name=name, max_seconds=3600)
    market.cycle()
    for job in Job.objects.all():
        market.report(job, 5, "running")
    waits = market.submit()
    market.cycle(10)
    found = agreed(waits)[1]
    assert "your job one, two ends by its time limit" in found["ends"]["text"]
    assert Job.objects.get(pk=waits.pk).decision.earliest_start


def test_a_placed_a_running_and_a_finished_job():
    market = Market()
    job = market.submit()
    market.cycle()
    placed = agreed(job)[0]
    assert placed == "The job has been placed: 2 of 2 hosts could take it, and it got the one with the best score."
    market.report(job, 5, "running")
    assert agreed(job)[0] == placed
    market.report(job, 60, "exited", exit_code=0, finished_at=at(60))
    assert agreed(job)[0] == f"The job succeeded: all replicas exited 0. {placed}"


def test_a_job_that_ended_before_it_was_placed():
    market = Market()
    job = market.submit(gpus=8, replicas=3)
    market.cycle()
    jobs.cancel(f.actor(market.customer), job, now=at(1))
    assert agreed(job)[0] == "The job was cancelled: cancelled by the customer. It ended before it was placed."


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        (None, "It told of no checkpoint in the 55 s that it ran there."),
        (at(50), "Its newest checkpoint is of 10 s before that."),
    ],
)
def test_a_job_that_gives_way_and_what_of_its_work_was_saved(saved, said):
    market = Market()
    spot = market.book(f.organization("Night Owls"), kind="spot", limit_price=9_000_000)
    victim = market.submit(spot, replicas=2)
    market.cycle()
    market.report(victim, 5, "running")
    firm = market.submit()
    market.report(victim, 50, "running", checkpoint_at=saved)
    market.cycle(50)
    giving = agreed(victim)[0]
    assert giving == (
        f"The job gives way: capacity claimed by a higher contract. It has until {why.words.moment(at(80))} to save its work, is"
        " not billed, and queues again."
    )
    market.report(victim, 60, "exited", exit_code=0, reason="drained", finished_at=at(60))
    left = f"It left its last place at {why.words.moment(at(60))}: capacity claimed by a higher contract. {said}"
    for seconds, first in ((61, "since it was queued again."), (62, "short by 1 replica")):
        text = agreed(victim)[0]
        assert first in text
        assert text.endswith(left)
        market.cycle(seconds)
    assert Job.objects.get(pk=firm.pk).state == "placed"
