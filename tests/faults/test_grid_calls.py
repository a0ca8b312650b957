"""Calls of the grid on a site with physics of its own: who gives, what its meters say of it, and how it comes back."""

from datetime import timedelta

import pytest
from django.db import transaction
from django.db.models import F

from marketplace.models import (
    AuditEvent,
    Curtailment,
    CurtailmentNotice,
    CurtailmentReport,
    FeedValue,
    GridSource,
    Host,
    JobEvent,
    MeterReading,
    Miner,
    Placement,
    PowerNode,
    Site,
)
from marketplace.services import curtailment_reports, curtailments, feeds, grid
from marketplace.services.grid import rules
from scheduler import cycle
from tests import factories as f
from tests.faults.yard import Yard

pytestmark = pytest.mark.django_db
WH = 1_000_000


@pytest.fixture
def yard(monkeypatch):
    monkeypatch.setattr(curtailments, "QUIET", timedelta(seconds=20))
    made = Yard()
    made.turn(3)
    return made


def root():
    return PowerNode.objects.get(kind="site")


def call(yard, cap_w, minutes=10, **more):
    window = {"starts_at": yard.now, "ends_at": yard.now + timedelta(minutes=minutes)}
    terms = {"reference": "c1", **window, **more}
    row = curtailments.announce(f.actor(yard.site.organization), root(), cap_w=cap_w, now=yard.now, **terms)
    Curtailment.objects.filter(pk=row.pk).update(created_at=yard.now)
    return row


def take_back(yard, row):
    row.refresh_from_db()
    curtailments.cancel(f.actor(yard.site.organization), row, now=yard.now)


def settled(row):
    row.refresh_from_db()
    return row.state in {"completed", "failed", "cancelled"} and row


def heard(yard):
    """The workers' part of the grid's beat."""
    for pk in GridSource.objects.filter(enabled=True).values_list("pk", flat=True):
        grid.ask(pk, now=yard.now)


def energy(yard, usd):
    """One more interval of the energy feed."""
    assert feeds.store(
        FeedValue.Kind.ENERGY, usd * WH, source="test", observed_at=yard.now, now=yard.now, scope=yard.site.region
    )
    heard(yard)


def strike(yard, **more):
    values = {
        "strike_uusd_mwh": 50 * WH,
        "resume_uusd_mwh": 40 * WH,
        "pays_uusd_mwh": 100 * WH,
        "cap_w": 15_000,
        **more,
    }
    return grid.add(f.actor(yard.site.organization), root(), kind="price", name="strike", now=yard.now, **values)


def test_a_price_puts_machines_to_sleep_and_no_job_waits_for_it(yard):
    strike(yard)
    energy(yard, 55)
    assert not Curtailment.objects.exists()
    yard.turn(2)
    energy(yard, 55)
    heard(yard)
    row = Curtailment.objects.get()
    assert (row.source, row.mandatory, row.cap_w) == ("price", False, 15_000)
    before = yard.physics.meter_w[0]
    yard.until(lambda: yard.physics.true_w[0] <= 15_000, seconds=90)
    job = yard.submit()
    yard.until(lambda: yard.state(job) == "running", seconds=120)
    other = yard.submit()  # more than the limit holds even with every machine asleep
    yard.until(lambda: yard.state(other) == "running", seconds=120)
    assert Miner.objects.filter(desired_mode__gt=0).count() == 0
    assert (root().limit_w, root().hashing_limit_w) == (None, 15_000)
    yard.turn(2)
    energy(yard, 30)
    assert Curtailment.objects.get().state == "active", "one interval is not enough"
    yard.turn(2)
    energy(yard, 30)
    yard.until(lambda: settled(row), seconds=2000)
    assert row.state == "completed"
    report = CurtailmentReport.objects.get()
    assert abs(report.baseline_w - before) < 0.05 * before
    assert (report.baseline_how, report.jobs) == ("meter", [])
    assert report.under_after_s < 90
    rows = curtailment_reports.series(report, row, now=yard.now)
    assert len(rows) == int((row.over_at - row.starts_at).total_seconds())
    assert sum(r["delivered_w"] for r in rows) // 3600 in range(report.delivered_wh - 1, report.delivered_wh + 2)
    assert report.paid_microusd == report.delivered_wh * 100
    assert report.energy_saved_microusd > 0
    assert {yard.state(job), yard.state(other)} == {"running"}


def test_what_hashing_cannot_give_comes_from_gpus_before_firm_work_leaves(yard):
    jobs = [yard.submit(), yard.submit()]
    for job in jobs:
        yard.until(lambda job=job: yard.state(job) == "running", seconds=200)
    yard.turn(6)
    one = Host.objects.get(name="h1")
    row = call(yard, 18_000)
    yard.until(lambda: yard.physics.true_w[0] <= 18_000, seconds=120)
    yard.until(lambda: Host.objects.get(pk=one.pk).reserved_w < one.reserved_w, seconds=60)  # read back, and booked so
    held = Host.objects.get(pk=one.pk)
    assert one.gpu_min_w < held.call_gpu_w < one.gpu_max_w
    assert held.desired_limits_w == [held.call_gpu_w] * 8
    assert held.reserved_w == held.base_w + 8 * held.call_gpu_w
    assert {yard.state(job) for job in jobs} == {"running"}
    told = JobEvent.objects.filter(reason__startswith=f"curtailment {row.public_id}: GPUs of h1 held to")
    assert told.count() == 1, "said once"
    take_back(yard, row)
    yard.until(lambda: not Host.objects.exclude(call_gpu_w=None).exists(), seconds=60)
    assert Host.objects.get(pk=one.pk).desired_limits_w == [one.gpu_max_w] * 8
    assert Host.objects.get(pk=one.pk).reserved_w == one.reserved_w
    yard.until(lambda: settled(row), seconds=2000)
    assert {j["what"] for j in CurtailmentReport.objects.get().jobs} == {"held_lower"}


@pytest.mark.parametrize("cap_w", [14_000, 16_000])
def test_a_margin_that_passes_over_a_firm_job_lowers_no_gpu_while_the_meter_is_under_the_limit(yard, cap_w):
    """The cooling runs on when all machines have lain down: for some seconds the meter sees what nobody admits to."""
    job = yard.submit()
    yard.until(lambda: yard.state(job) == "running", seconds=200)
    yard.turn(8)
    share = root().margin_w
    call(yard, cap_w)
    yard.turn()
    held = Host.objects.get(name="h1").call_gpu_w
    assert held
    margins = []
    for _ in range(12):
        yard.turn()
        margins.append(root().margin_w)
        assert Host.objects.get(name="h1").call_gpu_w == held
    assert max(margins) > share == margins[-1], "it has passed"
    assert yard.physics.true_w[0] <= cap_w


def test_gpus_give_for_what_is_hidden_where_the_meter_says_that_the_call_is_not_met(yard):
    job = yard.submit()
    yard.until(lambda: yard.state(job) == "running", seconds=200)
    yard.turn(8)
    call(yard, 16_000)
    yard.turn(12)
    held = Host.objects.get(name="h1").call_gpu_w
    yard.physics.fixed[0] += 16_300 - yard.physics.true_w[0]  # somebody plugs in a heater
    yard.until(lambda: Host.objects.get(name="h1").call_gpu_w < held, seconds=60)
    yard.until(lambda: yard.physics.true_w[0] <= 16_000, seconds=60)
    assert yard.state(job) == "running"


def test_machines_that_gave_nothing_are_named_with_their_reason(yard):
    names = [m.name for m in Miner.objects.order_by("name")]
    deaf, mute, held = names[0], names[1], names[2]
    yard.fleet.set_fault(deaf, "ack_ignore")
    yard.silent.add(mute)
    Miner.objects.filter(name=held).update(manual=True)
    row = call(yard, 25_000, minutes=4)
    yard.until(lambda: Miner.objects.filter(state="unresponsive").count() == 2, seconds=200)
    yard.now = row.ends_at
    yard.until(lambda: settled(row), seconds=2000)
    found = {m["miner"]: m["reason"] for m in CurtailmentReport.objects.get().misses}
    assert found == {deaf: "acknowledged_no_drop", mute: "unreachable", held: "maintenance"}


def test_who_says_that_it_sleeps_and_is_seen_to_draw_is_a_phantom_load(yard):
    yard.link = False
    row = call(yard, 46_000, minutes=4)
    yard.turn()
    liar = Miner.objects.filter(shed_claims__state="commanded").earliest("pk").name
    yard.fleet.set_fault(liar, "phantom")
    yard.link = True
    yard.until(lambda: yard.miner(liar).state == "unresponsive", seconds=200)
    yard.now = row.ends_at
    yard.until(lambda: settled(row), seconds=2000)
    found = {m["miner"]: m["reason"] for m in CurtailmentReport.objects.get().misses}
    assert liar in found
    assert set(found.values()) == {"phantom_load"}, "his, and what the same meter cannot tell from him"


def test_who_had_nothing_to_give_and_whose_meter_fell_silent_is_named_so(yard):
    idle = yard.under("pdu-1")[0]
    i = yard.fleet.index[idle]
    yard.fleet.asleep[i] = True  # by itself: control believes it awake, and books it so
    yard.fleet._retarget(i)
    yard.turn(4)
    assert yard.miner(idle).reserved_w > 3000
    row = call(yard, 12_000, minutes=5)
    yard.turn()
    yard.physics.meter_stale[2] = True
    yard.until(lambda: yard.miner(idle).confirmed_w < 1000, seconds=200)
    yard.now = row.ends_at
    yard.until(lambda: settled(row), seconds=2000)
    found = {m["miner"]: m["reason"] for m in CurtailmentReport.objects.get().misses}
    assert found == {idle: "below_minimum", **dict.fromkeys(yard.under("pdu-2"), "stale_telemetry")}


def test_a_machine_that_has_just_changed_keeps_its_mode_for_money(yard):
    PowerNode.objects.update(cap_w=F("cap_w") * 12 / 10)  # far from any cap: nothing but money asks for watts
    first = call(yard, 15_000, minutes=2)
    yard.until(lambda: Miner.objects.filter(desired_mode=0, confirmed_w__lt=1000).count() >= 4, seconds=120)
    take_back(yard, first)
    yard.until(lambda: not Miner.objects.filter(desired_mode=0).exists(), seconds=900)
    length = timedelta(seconds=15)
    just = Miner.objects.filter(changed_at__gt=yard.now + length - curtailment_reports.DWELL)
    kept = set(just.values_list("name", flat=True))
    assert kept
    row = call(yard, 15_000, minutes=0.25, reference="c2", mandatory=False)
    yard.turn(2)
    assert not Miner.objects.filter(name__in=kept, desired_mode=0).exists()
    yard.now = row.ends_at
    yard.until(lambda: settled(row), seconds=2000)
    assert row.state == "completed", "for money it need not come under its cap"
    found = {m["miner"]: m["reason"] for m in CurtailmentReport.objects.get(curtailment=row).misses}
    assert {name for name, why in found.items() if why == "dwell"} >= kept


def test_a_call_that_asks_more_than_anybody_may_give_has_failed(yard):
    firm = yard.submit()
    yard.until(lambda: yard.state(firm) == "running", seconds=200)
    row = call(yard, 5_000, minutes=4)
    yard.until(lambda: row.refresh_from_db() or row.state == "restoring", seconds=400)
    report = CurtailmentReport.objects.get()
    assert curtailment_reports.found(report, row, now=yard.now).under_after_s is None
    yard.until(lambda: settled(row), seconds=2000)
    assert (row.state, yard.state(firm)) == ("failed", "running")
    report.refresh_from_db()
    assert report.under_after_s is None
    assert report.delivered_wh > 0, "it delivered what there was"
    assert AuditEvent.objects.filter(subject=row.public_id, verb="curtailment.failed").count() == 1
    assert row.ended_at is not None


def test_without_a_meter_the_books_say_whether_a_call_came_under_its_cap(monkeypatch):
    monkeypatch.setattr(curtailments, "QUIET", timedelta(seconds=20))
    yard = Yard(metered=False)
    yard.turn(3)
    pdu = PowerNode.objects.get(name="pdu-1")
    window = {"starts_at": yard.now, "ends_at": yard.now + timedelta(minutes=3), "now": yard.now}
    row = curtailments.announce(f.actor(yard.site.organization), pdu, cap_w=15_000, reference="c1", **window)
    yard.until(lambda: settled(row), seconds=2400)
    report = CurtailmentReport.objects.get()
    assert report.baseline_how == "books"
    assert report.baseline_w > 15_000
    assert 0 < report.under_after_s < 180
    assert row.state == "completed"


def test_a_meter_that_was_silent_before_a_call_says_when_it_came_under_its_cap(yard):
    """The books need not: a machine that is silent stands there with its nameplate. Here their word is taken away."""
    MeterReading.objects.all().delete()
    row = call(yard, 15_000, minutes=4)
    yard.until(lambda: row.refresh_from_db() or row.state == "restoring", seconds=400)
    report = CurtailmentReport.objects.get()
    assert report.baseline_how == "books"
    CurtailmentReport.objects.update(under_after_s=None)
    report.refresh_from_db()
    found = curtailment_reports.found(report, row, now=yard.now)
    under = MeterReading.objects.filter(node=row.node, at__gte=row.starts_at, watts__lte=15_000).earliest("at")
    assert found.under_after_s == int((under.at - row.starts_at).total_seconds())
    yard.until(lambda: settled(row), seconds=2000)
    assert row.state == "completed"


# --- restart mid-event: what stands in PostgreSQL is asserted again, once
def test_restart_in_the_midst_of_a_call_asks_nobody_twice(yard):
    row = call(yard, 25_000)
    yard.turn()
    generations = dict(Miner.objects.values_list("name", "desired_generation"))
    asked = Miner.objects.filter(desired_mode=0)
    assert asked.exists()
    yard.control = False  # the worker dies; another begins with what is on record
    yard.turn(2)
    site = Site.objects.get(pk=yard.site.pk)
    assert not curtailments.apply(site, now=yard.now).changed, "the limit stands already"
    assert call(yard, row.cap_w, reference=row.reference, starts_at=row.starts_at, ends_at=row.ends_at).pk == row.pk
    yard.control = True
    yard.until(lambda: yard.physics.true_w[0] <= 25_000, seconds=90)
    again = dict(asked.values_list("name", "desired_generation"))
    assert all(again[name] == generations[name] for name in again if generations[name])
    assert Curtailment.objects.count() == 1


# --- price stale: the last plan stays, and nothing increases
def test_a_silent_price_keeps_what_stands(yard):
    source = strike(yard, stale_after_s=60)
    energy(yard, 55)
    yard.turn()
    energy(yard, 55)
    row = Curtailment.objects.get()
    yard.until(lambda: yard.physics.true_w[0] <= 15_000, seconds=90)
    yard.turn(14)
    heard(yard)
    assert rules.silent(GridSource.objects.get(pk=source.pk), yard.now)
    take_back(yard, row)
    asleep = Miner.objects.filter(desired_mode=0).count()
    yard.turn(6)
    assert Miner.objects.filter(desired_mode=0).count() == asleep, "its policy is to hold"
    energy(yard, 20)
    yard.until(lambda: Miner.objects.filter(desired_mode=0).count() < asleep, seconds=60)


def test_flexible_holders_are_told_before_and_after(yard):
    flexible = yard.book("flexible")
    row = call(yard, 25_000, minutes=2)
    call(yard, 26_000, reference="for money", mandatory=False)
    assert [n.what for n in CurtailmentNotice.objects.filter(contract=flexible)] == ["announced"]
    yard.now = row.ends_at
    yard.until(lambda: settled(row), seconds=2000)
    over = CurtailmentNotice.objects.get(contract=flexible, what="over")
    assert over.curtailed_s == 0


# --- a grid call: hashing -> spot -> flexible after its notice -> firm not at all
def test_a_grid_call_takes_hashing_then_spot_then_flexible(yard):
    firm = yard.submit(gpus=3)
    spot = yard.submit(gpus=5, contract=yard.book("spot"))
    flexible = yard.submit(gpus=8, contract=yard.book("flexible"))
    for job in (firm, spot, flexible):
        yard.until(lambda job=job: yard.state(job) == "running", seconds=200)
    root = PowerNode.objects.get(kind="site")
    with transaction.atomic():
        call = curtailments.announce(
            f.actor(yard.site.organization), root, cap_w=11_000, starts_at=yard.now, ends_at=yard.now + timedelta(minutes=20),
            reference="EEA3", now=yard.now,
        )  # fmt: skip
        Curtailment.objects.update(created_at=yard.now)
        call.refresh_from_db()
    yard.until(lambda: yard.state(spot) == "requeued", seconds=200)
    yard.until(lambda: yard.state(flexible) == "requeued", seconds=120)
    moved = {p.job_id: p.events.get(to_state="draining") for p in Placement.objects.exclude(job=firm)}
    assert moved[flexible.pk].at - call.created_at >= timedelta(seconds=60)  # its notice
    assert all(e.reason.startswith("curtailment cur_") for e in moved.values())  # by which billing knows
    yard.until(lambda: yard.physics.true_w[0] <= 11_000, seconds=120)
    yard.turn(6)
    assert yard.state(firm) == "running"
    yard.now = call.ends_at
    yard.turn()
    assert Curtailment.objects.get().state == "restoring"
    yard.now += curtailments.RESTORED
    yard.turn()
    assert Curtailment.objects.get().state == "completed"
    verbs = set(AuditEvent.objects.filter(subject=call.public_id).values_list("verb", flat=True))
    assert verbs == {f"curtailment.{v}" for v in ("announced", "active", "restoring", "completed")}


def test_a_flexible_contract_gives_way_for_its_hours_and_is_firm_after_them(yard):
    flexible = yard.submit(gpus=8, contract=yard.book("flexible"))  # for an hour a month

    def running():
        cycle.run(flexible.cell_id, now=yard.now)
        return yard.state(flexible) == "running"

    def call(reference, minutes, cap_w=7_000):
        row = curtailments.announce(
            f.actor(yard.site.organization), PowerNode.objects.get(kind="site"), cap_w=cap_w, starts_at=yard.now,
            ends_at=yard.now + timedelta(minutes=minutes), reference=reference, now=yard.now,
        )  # fmt: skip
        Curtailment.objects.filter(pk=row.pk).update(created_at=yard.now)
        return row

    yard.until(running, seconds=200)
    first = call("first", 45)
    yard.until(lambda: yard.state(flexible) == "requeued", seconds=200)
    yard.now = first.ends_at
    yard.until(running, seconds=300)
    call("second", 20)  # 15 minutes are left
    yard.turn(30)
    assert yard.state(flexible) == "running"
    call("third", 10, cap_w=6_900)
    yard.until(lambda: yard.state(flexible) == "requeued", seconds=200)


# --- and firm: last of all, in an emergency that its contract names, after its notice
def emergency(yard, **more):
    """Fewer watts than two working hosts at the floor of all their GPUs draw."""
    row = call(yard, 5_000, minutes=30, **{"emergency": True, **more})
    row.refresh_from_db()
    return row


def test_firm_leaves_in_an_emergency_that_its_contract_names_last_of_all(yard):
    named = yard.submit(contract=yard.book("on_demand", emergency_notice_s=120))
    firm = yard.submit()
    for job in (named, firm):
        yard.until(lambda job=job: yard.state(job) == "running", seconds=200)
    yard.turn(6)
    row = emergency(yard)
    told = list(CurtailmentNotice.objects.values_list("contract", "what"))
    assert told == [(named.contract_id, "announced")], "who is not concerned is not told"
    yard.until(lambda: yard.state(named) == "requeued", seconds=400)
    left = Placement.objects.get(job=named).events.get(to_state="draining")
    assert left.reason == f"curtailment {row.public_id}"
    assert left.at - row.created_at >= timedelta(seconds=120)
    assert not Miner.objects.filter(desired_mode__gt=0).exists(), "hashing gave all it had"
    floor = Host.objects.get(pk=Placement.objects.get(job=firm).host_id)
    assert floor.call_gpu_w == floor.gpu_min_w, "and GPUs were held lower"
    yard.turn(12)
    assert yard.state(firm) == "running"
    yard.now = row.ends_at
    yard.until(lambda: settled(row), seconds=2000)
    found = {j["job"]: j["what"] for j in CurtailmentReport.objects.get().jobs if j["what"] != "held_lower"}
    assert found == {named.public_id: "left_in_emergency"}
    over = CurtailmentNotice.objects.get(contract=named.contract_id, what="over")
    assert over.curtailed_s == 30 * 60


@pytest.mark.parametrize("terms", [{"emergency": False}, {"emergency": False, "mandatory": False}])
def test_no_other_call_takes_firm_work_whatever_its_contract_says(yard, terms):
    named = yard.submit(contract=yard.book("on_demand", emergency_notice_s=0))
    yard.until(lambda: yard.state(named) == "running", seconds=200)
    emergency(yard, **terms)
    yard.turn(14)
    assert yard.state(named) == "running"
    assert not Placement.objects.exclude(release_requested_at=None).exists()


def test_an_emergency_takes_no_firm_work_whose_contract_names_none(yard):
    firm = yard.submit()
    yard.until(lambda: yard.state(firm) == "running", seconds=200)
    emergency(yard)
    yard.turn(14)
    assert yard.state(firm) == "running"
