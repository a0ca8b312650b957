"""Recorded cycles: what is read back plans to the same plan, the settings decide what is kept, and old ones go."""

import json
import random
from datetime import timedelta

import numpy as np
import pytest
from django.core.management import CommandError, call_command
from django.db import transaction

from marketplace.models import BillingStanding, Cell, Job, Placement, Reservation
from marketplace.services import jobs, placements
from scheduler import cycle, record
from scheduler.core.case import Case
from scheduler.core.types import Decision, Fleet, Plan, Policy, Reason
from scheduler.models import Cycle, CycleRecord
from scheduler.packed import UnreadableError, pack
from scheduler.tasks import forget_records
from tests import factories as f
from tests.factories import NOW
from tests.scheduler.core import cells

pytestmark = pytest.mark.django_db


@pytest.fixture
def market():
    """Two hosts of 8 on one site, its agent alive, a customer with a contract for 32."""
    site = f.site()
    hosts = [f.host(site) for _ in range(2)]
    f.agent(site, last_sync_at=NOW, lease_until=NOW + timedelta(days=30))
    listing = f.listing(site, hosts=hosts)
    customer = f.organization()
    BillingStanding.objects.update_or_create(organization=customer, defaults={"state": "good", "updated_at": NOW})
    return f.contract(listing, customer, gpu_count=32)


def submit(contract, **spec):
    spec = {"command": ["true"], "gpus": 8, "vcpu_milli": 8000, "ram_mib": 1024, **spec}
    return jobs.submit(f.actor(contract.organization), contract, spec, now=NOW)


def run(contract, seconds=0):
    return cycle.run(contract.cell_id, now=NOW + timedelta(seconds=seconds))


def equal(one: Case, two: Case) -> bool:
    columns = all((getattr(one.fleet, n) == getattr(two.fleet, n)).all() for n in Fleet.__dataclass_fields__)
    rest = [(c.requests, c.running, c.policy, c.seed, c.now_s) for c in (one, two)]
    return columns and rest[0] == rest[1]


def replay(pk, *options):
    """(exit status, output)."""
    from io import StringIO

    out = StringIO()
    try:
        call_command("replay", str(pk), *options, stdout=out)
    except SystemExit as end:
        return end.code, out.getvalue()
    return 0, out.getvalue()


def test_a_cycle_is_recorded_and_replayed_to_the_same_plan(market):
    placed, waiting = submit(market), submit(market, replicas=2)
    row = run(market)
    kept = row.record
    known = record.load(kept)
    assert [p.job for p in known.plan.placements] == [placed.pk]
    assert {r.job for r in known.case.requests} == {placed.pk, waiting.pk}
    assert record.replay(known) == []
    assert kept.size == len(bytes(kept.body)) < 20_000
    assert kept.code == record.code()
    status, said = replay(row.public_id)
    assert status == 0
    assert "the same plan" in said
    assert f"generation {row.generation}" in said


def test_cycles_with_gangs_evictions_promises_ceilings_and_reservations_are_replayed_to_the_same_plan():
    """A day in the life of one cell, cycle by cycle; each record plans the same again, after all that came since."""
    site = f.site()
    hosts = [f.host(site, leaf=f"leaf-{i // 2}") for i in range(5)]
    agent, _ = f.agent(site, last_sync_at=NOW, lease_until=NOW + timedelta(days=30))
    listing = f.listing(site, hosts=hosts)

    def book(kind, **fields):
        made = f.contract(listing, f.organization(), kind=kind, **{"gpu_count": 64, **fields})
        BillingStanding.objects.update_or_create(
            organization=made.organization, defaults={"state": "good", "updated_at": NOW}
        )
        return made

    spot, firm, tight = book("spot", limit_price=9_000_000), book("on_demand"), book("on_demand", gpu_count=4)
    holder = book("reserved", gpu_count=8, starts_at=NOW, ends_at=NOW + timedelta(days=2))
    promise = Reservation.objects.create(
        listing=listing, contract=holder, starts_at=NOW, ends_at=holder.ends_at, claims_at=NOW, state="firm"
    )
    promise.blocks.create(host=hosts[4], gpu_indices=list(range(8)))
    rows = []

    def cycle_at(seconds):
        now = NOW + timedelta(seconds=seconds)
        type(agent).objects.update(last_sync_at=now)
        rows.append(cycle.run(site.cell_id, now=now))
        live = Placement.objects.filter(state__in=("granted", "starting"))
        with transaction.atomic():
            placements.lock_sites([site.pk])
            reports = [{"pk": p.pk, "generation": p.generation, "state": "running", "running_at": now} for p in live]
            placements.observe(agent, reports, now=now)

    gang = submit(spot, replicas=3, on_replica_loss="shrink", min_replicas=1, topology="spread", topology_required=True)
    submit(holder, gpus=4, max_seconds=3600)
    submit(tight, gpus=4)
    cycle_at(0)
    submit(firm, replicas=2, topology="leaf", topology_required=True, max_seconds=7200)  # two of the spot gang leave
    submit(firm, gpus=1, labels=["app=db"])
    submit(firm, gpus=1, affinity=[{"rule": "apart", "level": "leaf", "labels": ["app=db"]}])
    cycle_at(10)
    leaving = Placement.objects.filter(state="draining")
    assert {p.job_id for p in leaving} == {gang.pk}
    with transaction.atomic():
        placements.lock_sites([site.pk])
        placements.finish([p.pk for p in leaving], to="released", now=NOW, actor="agent", reason="drained")
    cycle_at(20)
    submit(firm, gpus=8, replicas=2)  # promised a start when the limits end
    submit(holder, gpus=8)
    submit(tight, gpus=1)
    cycle_at(30)
    cycle_at(40)
    cycle_at(50)
    known = [record.load(row.record) for row in rows]
    assert any(k.plan.preemptions for k in known)
    assert any(len([p for p in k.plan.placements if p.job == gang.pk]) == 3 for k in known)
    assert any(r.gang_min for k in known for r in k.case.running)
    assert any(d.held for k in known for d in k.plan.decisions)
    assert any(r.promised_start for k in known for r in k.case.requests)
    assert any((k.case.fleet.pool < 0).any() for k in known)
    assert any(d.reason is Reason.OVER_QUOTA for k in known for d in k.plan.decisions)
    for row in rows:
        status, said = replay(row.public_id)
        assert status == 0, said


def test_later_records_lean_on_the_first_and_read_back_the_same(market):
    sizes = []
    for at in range(5):
        submit(market, gpus=1 + at % 3)
        kept = run(market, at).record
        known = record.load(kept)
        assert record.replay(known) == []
        sizes.append((kept.base_id, kept.size))
    first = CycleRecord.objects.order_by("pk").first()
    assert [base for base, _ in sizes] == [None] + [first.pk] * 4
    record._bases.clear()  # another process
    submit(market)
    kept = run(market, 9).record
    assert kept.base_id == first.pk
    assert record.replay(record.load(kept)) == []


def test_a_host_that_comes_begins_anew(market):
    submit(market)
    run(market)
    f.host(market.listing.site, listing=market.listing)
    submit(market)
    assert run(market, 1).record.base_id is None


def test_a_random_case_comes_back_as_it_was(market):
    dice = random.Random(3)
    taken = None
    for n in range(4):
        fleet, nodes = cells.cell(dice, hosts=10)
        requests = cells.queue(dice, jobs=20)
        case = Case(fleet, requests, [], Policy(), 0, 50)
        after, running = cells.settle(fleet, nodes, case.plan(), requests)
        case = Case(after, requests[5:], running, Policy(shapes=((1, 2, 1, 500, 0, 3),)), n, 60)
        made = case.plan()
        sections, notes = record._sections(case, made, {3: Reason.NO_GPU}, [9], [4, 5])
        body = record._written(sections, notes, taken)
        found, said = record._read(body, taken)
        assert said == json.loads(json.dumps(notes))
        assert all((found[s][c] == sections[s][c]).all() for s in sections for c in sections[s])
        back = record._plan_of(found["plan"], said["held"])
        assert (back.placements, back.preemptions) == (made.placements, made.preemptions)
        assert record.differences(made, back) == []
        taken = taken or sections


def test_a_plan_that_differs_is_told_placement_by_placement_and_ends_with_1(market):
    placed = submit(market)
    row = run(market)
    known = record.load(row.record)
    known.plan.placements[0] = known.plan.placements[0]._replace(gpus=(0, 1))
    known.plan.decisions.append(Decision(99, False, Reason.NO_GPU))
    sections, notes = record._sections(known.case, known.plan, {}, known.nodes, known.models)
    CycleRecord.objects.filter(pk=row.pk).update(body=record._written(sections, notes, None), code="core of last year")
    with pytest.raises(CommandError, match=r"planned by other code \(core of last year\) than this"):
        replay(row.pk)
    status, said = replay(row.pk, "--anyway")
    assert status == 1
    assert "ANOTHER PLAN" in said
    assert f"placement ({placed.pk}, 0): recorded" in said
    assert "decision 99" in said
    assert "recorded by other code (core of last year)" in said
    status, said = replay(row.pk, "--json", "--anyway")
    assert status == 1
    assert json.loads(said)["same"] is False
    assert len(json.loads(said)["differences"]) == 2


def test_the_order_of_placements_counts_too():
    place = list(cells_plan().placements[:2])
    one, two = Plan(placements=place), Plan(placements=place[::-1])
    assert record.differences(one, two) == ["placements: the same, in another order"]


def cells_plan():
    fleet, _ = cells.cell(random.Random(1), watts=False)
    made = Case(fleet, cells.queue(random.Random(2)), [], Policy()).plan()
    assert len(made.placements) > 1
    return made


@pytest.mark.parametrize("text", ["cyc_000000000000", "12", "nonsense", "job_9f3k2m7q0w1x", "9" * 30])
def test_an_unknown_cycle_is_said_so(text):
    with pytest.raises(CommandError, match="There is no cycle"):
        call_command("replay", text)


def test_a_cycle_without_record_or_with_a_damaged_one_is_said_so(market, settings):
    settings.CYCLE_RECORDS = "none"
    submit(market)
    row = run(market)
    with pytest.raises(CommandError, match="not on record"):
        call_command("replay", row.public_id)
    settings.CYCLE_RECORDS = "all"
    submit(market)
    row = run(market, 1)
    whole = bytes(row.record.body)
    for body in (whole[:-30], b"TRC0", pack({"a": np.zeros(3)}, None)):
        CycleRecord.objects.filter(pk=row.pk).update(body=body)
        with pytest.raises(CommandError, match="cannot be read"):
            call_command("replay", row.public_id)
    with pytest.raises(UnreadableError):
        record.load(CycleRecord.objects.get(pk=row.pk))


def test_the_settings_say_which_cycles_are_recorded(market, settings):
    settings.CYCLE_RECORDS = "waiting"
    submit(market)
    assert not CycleRecord.objects.filter(cycle=run(market)).exists(), "nobody waited"
    submit(market, replicas=2)
    assert CycleRecord.objects.filter(cycle=run(market, 1)).exists()
    settings.CYCLE_RECORDS, settings.CYCLE_RECORD_EVERY = "all", 3
    kept = [CycleRecord.objects.filter(cycle=run(market, 2 + i)).exists() for i in range(6)]
    assert sum(kept) == 2


def test_records_go_by_age_and_number_but_not_those_that_others_lean_on(market, settings):
    submit(market, replicas=3)
    rows = [run(market, i).pk for i in range(6)]
    settings.CYCLE_RECORD_KEEP = 3
    assert record.forget(NOW) == 2
    left = sorted(CycleRecord.objects.values_list("pk", flat=True))
    assert left == [rows[0], *rows[3:]], "the first stands alone, and the others lean on it"
    for kept in CycleRecord.objects.order_by("pk"):
        assert record.replay(record.load(kept)) == []
    CycleRecord.objects.update(at=NOW - timedelta(days=8))
    assert forget_records() == 3
    assert CycleRecord.objects.get().pk == rows[0], "the next one will lean on it"
    submit(market)
    fresh = run(market, 10).record
    assert fresh.base_id == rows[0]


def test_one_that_stands_alone_goes_once_nobody_leans_on_it(market, settings):
    submit(market, replicas=3)
    first = run(market)
    f.host(market.listing.site)
    second = run(market, 1)
    CycleRecord.objects.update(at=NOW - timedelta(days=8))
    assert record.forget(NOW) == 1
    assert CycleRecord.objects.get().pk == second.pk
    assert Cycle.objects.filter(pk=first.pk).exists()
    settings.CYCLE_RECORD_KEEP = 1
    f.host(market.listing.site)
    run(market, 2)
    run(market, 3)
    record.forget(NOW)
    assert CycleRecord.objects.count() == 2, "the newest, and what it leans on"


def test_what_a_full_database_refuses_costs_the_record_alone(market):
    submit(market)
    row = run(market)
    assert record.keep(row, _taken(market), Plan(), {}) is None, "one record a cycle: the database refuses a second"
    assert Cell.objects.get(pk=market.cell_id).generation == row.generation


def _taken(market):
    from scheduler import snapshot

    return snapshot.take(Cell.objects.get(pk=market.cell_id), now=NOW)


def test_a_record_of_other_columns_is_no_base_and_costs_no_cycle(market):
    """As after an update: what an earlier version kept lacks what this one aligns rows by."""
    submit(market)
    row = run(market)
    part = pack({"other": np.zeros(3)}, {})
    CycleRecord.objects.filter(pk=row.pk).update(body=(len(part).to_bytes(4, "little") + part) * 6)
    record._bases.clear()
    with pytest.raises(UnreadableError, match="without"):
        record.load(CycleRecord.objects.get(pk=row.pk))
    submit(market)
    later = run(market, 1)
    assert later.jobs_placed == 1
    assert later.record.base_id is None, "it begins anew"


def test_the_cell_after_a_record_has_the_placed_jobs_on_their_hosts(market):
    placed, waiting = submit(market), submit(market, replicas=2)
    known = record.load(run(market).record)
    after = known.after()
    assert [r.job for r in after.requests] == [waiting.pk]
    assert [r.job for r in after.running] == [placed.pk]
    assert int(after.fleet.gpu_free.sum()) == 8000
    assert Job.objects.get(pk=waiting.pk).state == "queued"
