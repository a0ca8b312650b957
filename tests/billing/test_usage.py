from datetime import UTC, datetime, timedelta

import pytest
from django.db import IntegrityError, connection, transaction
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from billing import ingest, reconcile, usage
from billing.core import metering
from billing.models import Meter, PriceVersion, UsageQuarantine, UsageRecord
from marketplace.models import Placement, PlacementEvent
from tests import factories
from tests.billing.conftest import World, after, make_world, metered
from tests.factories import NOW

pytestmark = pytest.mark.django_db
S0 = metering.floor_second(NOW)


def spans(placement: Placement) -> list[tuple[int, int, int, int]]:
    rows = UsageRecord.objects.filter(placement=placement).order_by("start_s", "revision")
    return [(row.start_s - S0, row.end_s - S0, row.revision, row.quantity) for row in rows]


def test_an_ended_placement_is_recorded_at_once_and_only_once(world: World):
    placement = world.ran(10.7, 90.0, gpus=2)
    assert usage.meter_all(after(200)) == 1
    assert usage.meter_all(after(9999)) == 0
    assert spans(placement) == [(10, 100, 0, 2000 * 90)]
    assert reconcile.unmetered(after(9999)) == 0


def test_a_running_placement_is_recorded_by_whole_hours(world: World):
    placement = world.ran(60, None)
    assert usage.meter_all(after(3599)) == 0
    assert usage.meter_all(after(3 * 3600 + 5)) == 1
    assert spans(placement) == [(60, 3 * 3600, 0, 1000 * (3 * 3600 - 60))]
    assert usage.meter_all(after(3 * 3600 + 35)) == 0
    assert usage.meter_all(after(4 * 3600)) == 1
    assert spans(placement)[1] == (3 * 3600, 4 * 3600, 0, 3_600_000)


def test_a_share_of_a_gpu_is_metered_in_milli_gpus(world: World):
    placement = world.ran(0, 60, gpu_milli=250)
    metered(world, 100)
    assert spans(placement) == [(0, 60, 0, 250 * 60)]


def test_silence_is_free_until_the_agent_proves_it(world: World):
    silent = world.ran(0, None, events=[(100, "unreachable", "")])
    metered(world, 600)
    assert spans(silent) == [(0, 100, 0, 100_000)]
    PlacementEvent.objects.create(
        placement=silent, at=after(700), actor="agent", from_state="unreachable", to_state="running"
    )
    metered(world, 800)
    assert spans(silent) == [(0, 100, 0, 100_000), (100, 800, 0, 700_000)]


def test_waiting_for_the_rest_of_the_gang_is_free_whatever_else_happens_meanwhile(world: World):
    placement = world.ran(0, None)
    metered(world, 3600)
    told = [
        (3500, "running", "held"),
        (3620, "running", "unreachable"),
        (3640, "unreachable", "running"),
        (3700, "held", "running"),
    ]
    for at, before, to in told:
        PlacementEvent.objects.create(placement=placement, at=after(at), actor="system", from_state=before, to_state=to)
    metered(world, 4000)
    # What was recorded already gets its correction; the silence that was proven is no work while it was held.
    assert spans(placement) == [(0, 3600, 0, 3_600_000), (0, 3600, 1, 3_500_000), (3700, 4000, 0, 300_000)]
    PlacementEvent.objects.create(
        placement=placement, at=after(5000), actor="system", from_state="running", to_state="held"
    )
    metered(world, 6000)
    assert spans(placement)[-1] == (4000, 5000, 0, 1_000_000)


def test_a_start_that_was_told_late_makes_no_hole(world: World):
    """The agent says "starting" in one sync and "running since before that" in the next."""
    placement = world.ran(10, 90, events=[(12, "starting", ""), (13, "running", "")])
    metered(world, 200)
    assert spans(placement) == [(10, 90 + 10, 0, 90_000)]


def test_a_lost_host_is_not_billed_from_its_last_beat(world: World):
    beat = after(80).isoformat()
    placement = world.ran(0, None, events=[(100, "unreachable", f"silent; last beat {beat}"), (900, "lost", "")])
    Placement.objects.filter(pk=placement.pk).update(state="lost", finished_at=after(900))
    metered(world, 1000)
    assert spans(placement) == [(0, 80, 0, 80_000)]


def test_release_requested_ends_the_bill_whatever_is_reported_later(world: World):
    placement = world.ran(0, None, events=[(50, "draining", "cancelled"), (60, "unreachable", ""), (70, "running", "")])
    Placement.objects.filter(pk=placement.pk).update(release_requested_at=after(50))
    metered(world, 500)
    assert spans(placement) == [(0, 50, 0, 50_000)]


def test_an_end_that_lies_before_what_was_recorded_is_corrected_by_a_revision(world: World):
    placement = world.ran(0, None)
    usage.meter_all(after(3600))
    Placement.objects.filter(pk=placement.pk).update(
        state="failed", release_requested_at=after(3590), finished_at=after(3590)
    )
    usage.meter_all(after(3700))
    assert spans(placement) == [(0, 3600, 0, 3_600_000), (0, 3600, 1, 3_590_000)]
    last = UsageRecord.objects.get(revision=1)
    assert last.previous == 3_600_000
    assert reconcile.unmetered(after(3700)) == 0
    assert usage.meter_all(after(7200)) == 0


def test_records_are_cut_where_the_price_changes_and_at_month_ends(world: World):
    factories.price_version(world.contract, 1_100_000, after(300))
    factories.price_version(world.contract, 1_300_000, after(600))
    placement = world.ran(0, 700)
    metered(world, 1000)
    assert [row[:2] for row in spans(placement)] == [(0, 300), (300, 600), (600, 700)]
    prices = UsageRecord.objects.order_by("start_s").values_list("price_version__millionths", flat=True)
    assert list(prices) == [2_500_000, 1_100_000, 1_300_000]
    month_end = (datetime(2026, 12, 1, tzinfo=UTC) - NOW) / timedelta(seconds=1)
    late = world.ran(month_end - 10, 30)
    usage.meter_all(after(month_end + 100))
    assert [row[:2] for row in spans(late)] == [(month_end - 10, month_end), (month_end, month_end + 20)]


def test_a_past_horizon_takes_nothing_back(world: World):
    placement = world.ran(0, None)
    usage.meter_all(after(7200))
    assert usage.meter(world.customer.pk, through=after(1800), now=after(7300)) == 0
    placement.refresh_from_db()
    assert placement.metered_through == after(7200)


def test_the_database_refuses_overlap_change_and_deletion(world: World):
    placement = world.ran(0, 100)
    metered(world, 200)
    row = UsageRecord.objects.get()
    twin = {
        field.attname: getattr(row, field.attname)
        for field in UsageRecord._meta.concrete_fields
        if field.attname not in {"id", "received_at"}
    }
    with pytest.raises(IntegrityError, match="usage_no_overlap"), transaction.atomic():
        UsageRecord.objects.create(**twin | {"event_id": "other", "start_s": row.start_s + 99, "end_s": row.end_s + 50})
    with pytest.raises(IntegrityError, match="usage_event_once"), transaction.atomic():
        UsageRecord.objects.create(**twin | {"start_s": row.end_s, "end_s": row.end_s + 5})
    for change in ("UPDATE billing_usagerecord SET quantity = 1", "DELETE FROM billing_usagerecord"):
        with pytest.raises(IntegrityError, match="append-only"), transaction.atomic(), connection.cursor() as cursor:
            cursor.execute(change)
    with pytest.raises(IntegrityError, match="append-only"), transaction.atomic():
        PriceVersion.objects.update(millionths=1)
    assert spans(placement) == [(0, 100, 0, 100_000)]


def test_ingest_answers_each_event(world: World):
    placement = world.ran(0, 100)

    def event(name: str, start: float, end: float, quantity: int = 7, **changes) -> ingest.Event:
        values = {"placement_id": placement.pk, "meter": Meter.ENERGY.value} | changes
        return ingest.Event(event_id=name, start=after(start), end=after(end), quantity=quantity, **values)

    batch = [
        event("a", 0, 60),
        event("a", 0, 60),
        event("a", 0, 60, quantity=8),
        event("b", 30, 90),
        event("c", 60, 60),
        event("d", 60, 90, placement_id=10**9),
        event("e", 60, 90, meter=Meter.GPU.value),
        event("f", 60, 90),
    ]
    answers = ["accepted", "duplicate", "conflict", *["quarantined"] * 4, "accepted"]
    assert ingest.ingest("partner", batch) == answers
    again = ["duplicate", "duplicate", "conflict", *["quarantined"] * 4, "duplicate"]
    assert ingest.ingest("partner", batch) == again
    assert UsageQuarantine.objects.count() == 4
    assert UsageRecord.objects.filter(source="partner").count() == 2
    with pytest.raises(ValueError, match="at most 1000"):
        ingest.ingest("partner", batch * 200)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    marks=st.lists(st.integers(1, 20_000), min_size=0, max_size=6),
    steps=st.lists(
        st.tuples(st.integers(1, 20_000), st.sampled_from(["unreachable", "running", "parked"])), max_size=5
    ),
    end=st.integers(100, 20_000),
)
def test_however_often_it_is_metered_each_second_is_recorded_as_the_timeline_says(world, marks, steps, end):
    events = [(at, to, "") for at, to in sorted(steps) if at < end]
    reference = make_world()
    placement, whole = (
        w.ran(0.5, end, events=events, finished_at=None, release_requested_at=None, state="running", exit_code=None)
        for w in (world, reference)
    )
    for at in sorted(marks):
        metered(world, at)
    finished = {"state": "released", "finished_at": after(end), "release_requested_at": after(end), "exit_code": 0}
    for each in (placement, whole):
        Placement.objects.filter(pk=each.pk).update(**finished)
    metered(world, 30_000)
    metered(reference, 30_000)

    def seconds(of: Placement) -> int:
        rows = UsageRecord.objects.filter(placement=of)
        return sum(row.quantity - row.previous for row in rows)

    assert seconds(placement) == seconds(whole)
    assert usage.drift(since=after(0), until=after(30_000)) == 0


def test_what_is_due_is_found_by_its_index_and_drift_looks_back_no_further_than_it_says(world: World):
    placement = world.ran(0, 100)
    with connection.cursor() as cursor:
        cursor.execute("SET LOCAL enable_seqscan = off")
        assert "placement_unmetered" in Placement.objects.filter(usage.due()).values("organization_id").explain()
    assert reconcile.unmetered(after(200)) == 100_000
    assert usage.drift(since=after(100), until=after(200)) == 0  # it ended at 100, which is not after 100
    assert reconcile.unmetered(after(100) + reconcile.LOOKS_BACK) == 0
    assert usage.meter_all(after(200)) == 1
    assert reconcile.unmetered(after(200)) == 0
    assert placement.running_at
