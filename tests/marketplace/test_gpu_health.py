"""Sick GPUs: which errors make one, what becomes of its host and what runs there, who learns of it, and how it comes back."""

from datetime import timedelta
from uuid import uuid4

import pytest
from django.core import mail
from hypothesis import given
from hypothesis import strategies as st

from marketplace import outbox
from marketplace.models import AuditEvent, Gpu, Host, HostCondition, OutboxMessage
from marketplace.services import agents, availability, drains, gpu_health, maintenance
from marketplace.services.gpu_rule import AGAIN, AT_ONCE, REPORTS, WITHIN, Reported, verdict
from marketplace.tenancy import SYSTEM, Actor
from scheduler import snapshot
from tests import factories as f
from tests.factories import NOW
from tests.marketplace.test_verifications import Place
from tests.marketplace.trade import refused

HOUR = timedelta(hours=1)
STAFF = Actor(kind="staff", user_id=1, label="dana@tailrace.example")


# --- the rule
def reported(kind, code, hours=0.0):
    return Reported(kind, code, NOW + timedelta(hours=hours))


@pytest.mark.serverless
@pytest.mark.parametrize("error", [("lost", 15), *(("xid", code) for code in sorted(AT_ONCE))])
def test_what_makes_it_sick_at_once(error):
    assert verdict([reported(*error)])


@pytest.mark.serverless
@pytest.mark.parametrize("error", [("ecc", 0), ("retired", 0), *(("xid", code) for code in sorted(AGAIN))])
def test_what_does_when_it_comes_again(error):
    close = [reported(*error, hours) for hours in (0, 11, 23.9)]
    assert not verdict(close[:2])
    assert verdict(close).endswith("3 times in 24 hours")
    assert not verdict([reported(*error, hours) for hours in (0, 11, 24)])
    assert not verdict([reported("ecc", 0), reported("retired", 0), reported("xid", 94)]), "of one kind"
    assert not verdict([reported("xid", code) for code in sorted(AGAIN)]), "of one XID"


@pytest.mark.serverless
@given(
    st.lists(
        st.builds(
            reported, st.sampled_from(["xid", "ecc", "other"]), st.sampled_from([0, 13, 31, 43, 45, 63, 94]), st.integers(0, 90)
        ),
        max_size=12,
    )
)  # fmt: skip
def test_three_of_a_kind_within_a_day_and_nothing_less(errors):
    def same(a, b):
        return a.kind == b.kind and (a.kind != "xid" or a.code == b.code)

    counted = [e for e in errors if e.kind == "ecc" or (e.kind == "xid" and e.code in AGAIN) or e.kind == "other"]
    often = any(sum(same(a, b) and a.at <= b.at < a.at + WITHIN for b in counted) >= REPORTS for a in counted)
    assert bool(verdict(errors)) == often


# --- what follows


@pytest.fixture
def place(db):
    return Place()


def event(place, hours=0.0, **data):
    row = {"id": str(uuid4()), "at": NOW + timedelta(hours=hours), "kind": "gpu_error", "subject": place.host.name}
    return {**row, "data": {"gpu": 3, "kind": "xid", "code": 79, **data}}


def report(place, *events, hours=0.0):
    now = NOW + timedelta(hours=hours)
    said = {"agent_time": now, "boot": "b", "sequence": place.now, "events": list(events)}
    agents.observe(place.agent, said, now=now)
    place.now += 1
    place.host.refresh_from_db()


def gpu(place, index=3):
    return Gpu.objects.get(host=place.host, index=index)


def runs(place, *gpus):
    contract = f.contract(place.listing, gpu_count=8)
    job = f.job(contract, state="running", gpus=len(gpus), attempt=1)
    return f.placement(job, place.host, list(gpus), state="running", attempt=1, running_at=NOW)


def asked(placement):
    placement.refresh_from_db()
    return placement.release_requested_at is not None


def test_its_host_drains_what_runs_on_it_leaves_and_the_rest_runs_on(place):
    on_it, beside = runs(place, 2, 3), runs(place, 5)
    report(place, event(place, text="GPU has fallen off the bus"))
    assert (place.host.state, place.host.leaves_at) == ("draining", None)
    assert place.host.state_reason == "sick: GPU 3 (XID 79: fell off the bus)"
    assert (gpu(place).healthy, gpu(place).sick_at, gpu(place).last_error) == (False, NOW, "XID 79: fell off the bus")
    assert Gpu.objects.filter(healthy=False).count() == 1
    assert asked(on_it)
    assert on_it.reason.startswith("host drained: GPU 3 (XID 79")
    assert not asked(beside)
    condition = HostCondition.objects.get(host=place.host, ends_at=None)
    assert (condition.kind, condition.reason) == ("draining", place.host.state_reason)
    assert AuditEvent.objects.get(verb="host.gpu_sick").after["gpus"] == [3]
    assert availability.stock([place.listing], now=NOW, level="site")[place.listing.pk].gpus == 0


def test_what_is_an_applications_changes_nothing(place):
    report(place, *(event(place, kind="xid", code=code) for code in (13, 31, 43, 45)), event(place, kind="ecc", code=0))
    assert place.host.state == "active"
    assert gpu(place).healthy
    report(place, event(place, gpu=200))  # one that the host does not have
    assert place.host.state == "active"


def test_three_in_a_day_told_in_three_reports(place):
    for n, hours in enumerate((0, 5, 10)):
        assert place.host.state == "active", n
        report(place, event(place, hours, kind="ecc", code=0), hours=hours)
    assert place.host.state == "draining"
    again = event(place, 10, kind="ecc", code=0)
    report(place, again, hours=10)  # told of a GPU that is out already: nothing new
    assert OutboxMessage.objects.filter(topic=gpu_health.TOLD).count() == 1
    assert AuditEvent.objects.filter(verb="host.gpu_sick").count() == 1


def test_the_operator_is_told_what_and_what_to_do(place):
    f.member(place.site.organization, "engineer", f.user("eng@caprock.example"))
    runs(place, 0)
    report(place, event(place))
    outbox.drain(topic=gpu_health.TOLD)
    (letter,) = mail.outbox
    assert letter.to == ["eng@caprock.example"]
    assert "XID 79: fell off the bus" in letter.body
    assert "press Verify" in letter.body
    assert "1 placement on the host run to their end" in letter.body.replace("\n", " ")
    assert f"/operator/marketplace/host/{place.host.pk}/change/" in letter.body
    place.host.gpus.update(healthy=True)
    gpu_health.tell_operator(place.host.pk)
    assert len(mail.outbox) == 1  # well again: nothing to say


def test_no_fit_uses_it_even_on_a_host_at_work(place):
    Gpu.objects.filter(host=place.host, index=3).update(healthy=False)
    taken = snapshot.take(place.site.cell, now=NOW)
    row = taken.host_of.index(place.host.pk)
    assert taken.fleet.gpu_free[row].tolist()[:8] == [1000, 1000, 1000, 0, 1000, 1000, 1000, 1000]
    assert not taken.fleet.gpu_active[row]
    place.host.refresh_from_db()
    assert place.host.gpu_free == [1000] * 8  # what is free is still known


# --- back
def test_by_hand_it_does_not_come_back(place):
    other = f.host(place.site, power_node="pdu-1", beat_at=NOW)
    drains.drain_host(other, actor=place.actor, now=NOW, reason="fans")
    report(place, event(place))
    error = refused("gpu_sick", drains.undrain_host, place.host, actor=place.actor, now=NOW)
    assert "GPU 3 (XID 79" in error.detail
    assert drains.undrain_site(place.site, actor=place.actor, now=NOW) == [other]
    drains.drain_host(place.host, actor=place.actor, now=NOW, reason="fans")
    refused("gpu_sick", drains.undrain_site, place.site, actor=place.actor, now=NOW)
    refused("forbidden", gpu_health.well, place.host, actor=place.actor, now=NOW, why="I say so")


def test_a_benchmark_that_passes_brings_it_back_and_one_that_fails_does_not(place):
    report(place, event(place))
    short = place.run(line='tailrace-verify {"gpus": [], "errors": []}')
    place.host.refresh_from_db()
    assert (short.state, place.host.state, gpu(place).healthy) == ("failed", "draining", False)
    made = place.run()
    place.host.refresh_from_db()
    assert (made.state, place.host.state, place.host.state_reason) == ("passed", "active", "")
    assert gpu(place).healthy
    assert AuditEvent.objects.get(verb="host.gpu_well").after == {"why": f"{made.public_id} has passed"}
    report(place, event(place, hours=-5))  # told late, of before: it counts no more
    assert place.host.state == "active"
    report(place, event(place, hours=1), hours=1)
    assert place.host.state == "draining"


def test_it_is_benchmarked_whoever_waits_for_its_capacity(place):
    report(place, event(place))
    waits = f.job(f.contract(place.listing, gpu_count=8), gpus=8)
    f.contract(place.listing, kind="reserved", gpu_count=8, starts_at=NOW, ends_at=NOW + 24 * HOUR)
    made = place.run()
    place.host.refresh_from_db()
    assert (made.state, place.host.state) == ("passed", "active")
    waits.refresh_from_db()
    assert waits.state == "queued"


def test_our_own_people_may_say_so_and_it_is_on_record(place):
    report(place, event(place), event(place, gpu=5))
    gpu_health.well(place.host, actor=STAFF, now=NOW + HOUR, why="the riser was replaced")
    place.host.refresh_from_db()
    assert place.host.state == "active"
    for index in (3, 5):
        assert (gpu(place, index).healthy, gpu(place, index).well_at, gpu(place, index).sick_at) == (
            True,
            NOW + HOUR,
            None,
        )
    done = AuditEvent.objects.get(verb="host.gpu_well")
    assert (done.actor, done.after) == (STAFF.label, {"why": "the riser was replaced"})
    refused("illegal_transition", gpu_health.well, place.host, actor=STAFF, now=NOW, why="again")


def test_an_operators_own_drain_meanwhile_stays(place):
    report(place, event(place))
    drains.drain_host(place.host, actor=place.actor, now=NOW, reason="new fans")
    gpu_health.well(place.host, actor=SYSTEM, now=NOW + HOUR, why="passed")
    place.host.refresh_from_db()
    assert (place.host.state, place.host.state_reason) == ("draining", "new fans")


@pytest.mark.parametrize("first", ["sick", "maintenance"])
def test_maintenance_does_not_put_a_sick_host_back(place, first):
    row = maintenance.announce(
        place.actor,
        maintenance.draft(
            place.actor, place.site, scope="hosts", hosts=[place.host], starts_at=NOW + 200 * HOUR, ends_at=NOW + 204 * HOUR,
            text="Fans.", now=NOW,
        ),
        now=NOW,
    )  # fmt: skip
    when = 1 if first == "sick" else 201
    place.now = 10
    type(place.agent).objects.update(lease_until=NOW + 400 * HOUR)
    if first == "sick":
        report(place, event(place, when), hours=when)
    for hours in (199.9, 200.5):
        maintenance.clock(NOW + timedelta(hours=hours))
    if first == "maintenance":
        report(place, event(place, when), hours=when)
    assert Host.objects.get(pk=place.host.pk).state in {"draining", "maintenance"}
    maintenance.clock(NOW + 205 * HOUR)
    row.refresh_from_db()
    place.host.refresh_from_db()
    assert row.state == "completed"
    assert place.host.state in {"draining", "maintenance"}
    assert not gpu(place).healthy


# --- who sees it
def test_by_api_and_by_admin(place, client):
    report(place, event(place))
    reader = f.client(place.site.organization)
    told = reader.get(f"/api/v1/hosts/{place.host.public_id}").json()
    assert told["sick_gpus"] == [
        {"index": 3, "since": NOW.isoformat().replace("+00:00", "Z"), "error": "XID 79: fell off the bus"}
    ]
    assert told["actions"] == ["drain"]
    refusal = reader.post(f"/api/v1/hosts/{place.host.public_id}/undrain")
    assert (refusal.status_code, refusal.json()["code"]) == (409, "gpu_sick")
    assert f.client(f.organization()).get(f"/api/v1/hosts/{place.host.public_id}").status_code == 404
    client.force_login(f.member(place.site.organization).user)
    page = client.get(f"/operator/marketplace/host/{place.host.pk}/change/").content.decode()
    assert "Sick GPUs" in page
    assert "Reset the GPU or power-cycle the host" in page
    assert f"{NOW:%Y-%m-%d %H:%M:%S}" in page[page.index("Sick GPUs") : page.index("Reliability")]
    assert "XID 79: fell off the bus" in page
    door = f"/operator/marketplace/host/{place.host.pk}/undrain/"
    assert door not in page
    assert (
        "<strong>Put back to work</strong>: not while GPU 3 (XID 79: fell off the bus) is sick. Repair it, then" in page
    )
    refusal = client.get(door, follow=True).content.decode()
    assert "Put back to work: not while GPU 3 (XID 79: fell off the bus) is sick. Repair it, then" in refusal
    assert "GPU 3 (XID 79" in client.post(door).content.decode()
    place.host.refresh_from_db()
    assert place.host.state == "draining"
    rule = client.get("/reliability").content.decode()
    for words in ("XID 79 (fell off the bus)", "XID 119 (its system processor", "After 3 of one kind within 24 hours"):
        assert words in rule
    f.host(place.site, name="hale-host", beat_at=NOW)
    client.force_login(f.staff())
    there = f"/staff/marketplace/host/{place.host.pk}"
    listed = client.get("/staff/marketplace/host/?gpus=sick").content.decode()
    assert "GPU 3 (XID 79: fell off the bus)" in listed
    assert "hale-host" not in listed
    assert "hale-host" in client.get("/staff/marketplace/host/").content.decode()
    hale = Host.objects.get(name="hale-host")
    assert "GPUs are well" not in client.get(f"/staff/marketplace/host/{hale.pk}/change/").content.decode()
    page = client.get(f"{there}/change/").content.decode()
    assert "GPUs are well" in page
    assert "Reset the GPU or power-cycle the host" in page
    client.post(f"{there}/well/", {"why": "replaced"})
    place.host.refresh_from_db()
    assert place.host.state == "active"
