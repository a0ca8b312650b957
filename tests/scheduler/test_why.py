"""Explanations of real jobs: what is said to the customer, what only to our own people, and that it comes true."""

import json
from datetime import timedelta
from io import StringIO

import pytest
from django.core.cache import cache
from django.core.management import CommandError, call_command
from django.utils import timezone

from marketplace.models import Agent, BillingStanding, Contract, Host, Job, Placement, Reservation, ReservationBlock
from marketplace.services import jobs
from scheduler import cycle, why, words
from scheduler.core.types import Reason
from scheduler.models import CycleRecord
from tests import factories as f
from tests.factories import NOW

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def _no_cache():
    cache.clear()


def heard_just_now():
    """The sites' agents, by the clock on the wall: what looks at the cell as it is now goes by it."""
    now = timezone.now()
    Agent.objects.update(last_sync_at=now, lease_until=now + timedelta(hours=1))


@pytest.fixture
def market():
    site = f.site(name="Bosque")
    hosts = [f.host(site, f"h{i}") for i in range(2)]
    f.agent(site, last_sync_at=NOW, lease_until=NOW + timedelta(days=30))
    return f.listing(site, hosts=hosts, title="H100 at Bosque")


def contract(listing, name="Lumen Labs", **fields):
    customer = f.organization(name)
    BillingStanding.objects.update_or_create(organization=customer, defaults={"state": "good", "updated_at": NOW})
    return f.contract(listing, customer, gpu_count=64, **fields)


def submit(agreed, **spec):
    spec = {"command": ["true"], "gpus": 8, "vcpu_milli": 8000, "ram_mib": 1024, **spec}
    return jobs.submit(f.actor(agreed.organization), agreed, spec, now=NOW)


def run(listing, seconds=0):
    return cycle.run(listing.site.cell_id, now=NOW + timedelta(seconds=seconds))


def by_kind(answer):
    return {c["kind"]: c for c in answer["changes"]}


def explained(job, **options):
    out = StringIO()
    call_command("explain", job if isinstance(job, str) else job.public_id, stdout=out, **options)
    return out.getvalue()


@pytest.mark.parametrize(
    ("kind", "before", "spec"),
    [("replicas", [5], {"gpus": 8, "replicas": 2}), ("gpus", [5, 5], {"gpus": 6}), ("split", [5, 5], {"gpus": 6})],
)
def test_what_a_waiting_job_is_told_would_make_it_fit_does(market, kind, before, spec):
    agreed = contract(market)
    for gpus in before:
        submit(agreed, gpus=gpus)
    waiting = submit(agreed, **spec)
    run(market)
    answer = why.explain(waiting)
    assert answer["outcome"] == "waiting"
    found = by_kind(answer)[kind]
    assert "it would fit now" in found["text"]
    jobs.cancel(f.actor(agreed.organization), waiting, now=NOW)
    changed = {**spec, **found["fields"]}
    again = submit(agreed, **changed)
    assert run(market, 1).jobs_placed == 1
    assert Placement.objects.filter(job=again).count() == changed.get("replicas", 1)


@pytest.mark.parametrize(
    ("where", "takes", "said"),
    [("its own", {}, False), ("others", {}, True), ("others", {"vcpu_milli": 97_000}, False)],
)
def test_a_later_start_is_said_only_where_nobody_has_reserved_its_gpus_by_then(market, where, takes, said):
    """A reservation that no plan of today knows yet, on the GPUs on which it would stand, on others of the host, or with their CPU."""
    day = 86_400
    Host.objects.filter(name="h1").update(state="draining")
    agreed = contract(market)
    short, endless = submit(agreed, gpus=4, max_seconds=2 * day), submit(agreed, gpus=4)
    run(market)
    waiting = submit(agreed, gpus=4, max_seconds=day, **takes)
    run(market, 5)
    assert "ends" in by_kind(why.explain(waiting))
    begins = NOW + timedelta(days=2, hours=6)
    made = Reservation.objects.create(
        listing=market, state="firm", claims_at=begins, starts_at=begins, ends_at=begins + timedelta(days=1)
    )
    on = Placement.objects.get(job=short if where == "its own" else endless)
    ReservationBlock.objects.create(reservation=made, host=on.host, gpu_indices=on.gpu_indices)
    assert ("ends" in by_kind(why.explain(waiting, fresh=True))) is said


def test_strangers_are_not_named_to_a_customer_but_to_our_own_people(market):
    theirs = contract(market, "Secret Rival")
    for n in range(2):
        submit(theirs, name=f"hush-{n}", max_seconds=3600)
    run(market)
    Placement.objects.update(state="running", running_at=NOW)
    Job.objects.update(state="running")
    mine = submit(contract(market), name="train")
    run(market, 5)
    told = json.dumps(why.explain(mine), default=str)
    assert "hush" not in told
    assert "Secret Rival" not in told
    assert not any(job.public_id in told for job in Job.objects.exclude(pk=mine.pk))
    ends = by_kind(why.explain(mine))["ends"]
    assert timedelta(hours=1) <= ends["starts_at"] - NOW < timedelta(hours=1, minutes=15), (
        "its limit, and what it takes to leave"
    )
    assert "running work ends" in ends["text"]
    assert ends["jobs"] == []
    ours = by_kind(why.explain(mine, staff=True))
    assert "Secret Rival" in ours["ends"]["text"]
    assert len(ours["ends"]["jobs"]) == 2
    assert ours["job"]["jobs"]


def test_the_cache_of_one_reader_is_not_anothers(market):
    theirs = contract(market, "Secret Rival")
    for n in range(2):
        submit(theirs, name=f"hush-{n}")
    run(market)
    mine = submit(contract(market), name="train")
    run(market, 5)
    assert "Secret Rival" in json.dumps(why.explain(mine, staff=True), default=str)
    assert "Secret Rival" not in json.dumps(why.explain(mine), default=str)


def test_a_placed_job_says_where_and_why_there(market):
    job = submit(contract(market), gpus=2)
    run(market)
    job.refresh_from_db()
    answer = why.explain(job)
    placed = answer["placed"]
    assert answer["outcome"] == "placed"
    assert (placed["candidates"], placed["hosts"], placed["replicas"][0]["gpus"]) == (2, 2, [0, 1])
    assert {t["name"] for t in placed["terms"]} == {"fragmentation", "balance", "spec", "slots", "opening"}
    assert "2 of 2 hosts could take it" in answer["text"]
    assert answer["stages"][-1]["hosts_left"] == 2
    gang = submit(job.contract, gpus=2, replicas=2)
    run(market, 1)
    gang.refresh_from_db()
    assert "all 2 stand in one host" in why.explain(gang)["text"]


def test_without_a_record_it_says_so_and_looks_at_the_cell_as_it_is(market, settings):
    settings.CYCLE_RECORDS = "none"
    agreed = contract(market)
    placed, waiting = submit(agreed, gpus=8), submit(agreed, gpus=8, replicas=2)
    run(market)
    placed.refresh_from_db()
    answer = why.explain(placed)
    assert answer["placed"]["replicas"][0]["host"] in {"h0", "h1"}
    assert "no longer on record" in answer["note"]
    heard_just_now()
    answer = why.explain(waiting)
    assert "how things stand now" in answer["note"]
    assert "replicas" in by_kind(answer)


def test_a_damaged_record_of_a_waiting_job_does_not_hurt(market):
    waiting = submit(contract(market), gpus=8, replicas=3)
    row = run(market)
    CycleRecord.objects.filter(cycle=row).update(body=b"TRC1 and nothing")
    heard_just_now()
    assert "replicas" in by_kind(why.explain(waiting))


def test_another_listing_is_offered_only_where_it_may_be_booked(market):
    other = f.site(market.organization, market.site.cell, name="Pecos")
    f.agent(other, last_sync_at=NOW, lease_until=NOW + timedelta(days=30))
    model = f.gpu_model("A100-80", tdp_w=400)
    spare = f.listing(
        other, hosts=[f.host(other, gpu_model=model) for _ in range(2)], title="A100 at Pecos", gpu_model=model
    )
    agreed = contract(market)
    submit(agreed, gpus=8)
    waiting = submit(agreed, gpus=8, replicas=2)
    run(market)
    offer = by_kind(why.explain(waiting))["listing"]
    assert offer["fields"]["listing"] == spare.public_id
    assert "A100 at Pecos (A100-80, Pecos)" in offer["text"]
    type(spare).objects.filter(pk=spare.pk).update(visibility="partners")
    cache.clear()
    assert "listing" not in by_kind(why.explain(waiting))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"state": "pending_payment"}, "its contract is pending payment"),
        ({"ends_at": NOW - timedelta(days=1), "starts_at": NOW - timedelta(days=9)}, "its contract is over"),
    ],
)
def test_what_keeps_a_job_from_every_cycle_is_said(market, change, said):
    job = submit(contract(market))
    Contract.objects.filter(pk=job.contract_id).update(**change)
    job.refresh_from_db()
    assert said in why.explain(job)["text"]


def test_a_suspended_organization_and_a_job_not_yet_looked_at(market):
    job = submit(contract(market))
    assert why.explain(job)["text"] == "No cycle has looked at the job yet."
    BillingStanding.objects.filter(organization=job.organization).update(state="suspended")
    assert "suspended" in why.explain(job)["text"]


def test_every_reason_has_words_and_every_stage_a_label():
    assert set(words.REASONS) == set(Reason)
    assert all(len(binds) > 2 and label for binds, label in words.REASONS.values())
    assert words.reason("GONE") is Reason.INVALID
    assert words.stage("GONE_TOO") == "gone too"


# --- the command
def test_the_command_explains_to_our_own_people(market):
    agreed = contract(market)
    placed, waiting = submit(agreed, gpus=8, name="first"), submit(agreed, gpus=8, replicas=2)
    run(market)
    said = explained(waiting)
    assert "what would change it" in said
    assert "With 1 replica instead of 2 it would fit now." in said
    assert "GANG_INCOMPLETE" not in said.partition("hosts left")[0].replace("reason gang_incomplete", "")
    placed.refresh_from_db()
    said = explained(str(placed.pk))
    assert "replica 0: h" in said
    assert "fragmentation" in said
    answer = json.loads(explained(waiting, json=True))
    assert answer["job"] == waiting.public_id
    assert by_kind(answer)["replicas"]["fields"] == {"replicas": 1}


@pytest.mark.parametrize("text", ["job_000000000000", "12", "nonsense", "cyc_9f3k2m7q0w1x", "9" * 30])
def test_an_unknown_job_is_said_so(text):
    with pytest.raises(CommandError, match="There is no job"):
        explained(text)
