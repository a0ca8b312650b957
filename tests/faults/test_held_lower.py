"""GPUs held lower for a call of the grid: who runs on them is told, and pays for the watts that they have, once."""

from datetime import timedelta
from itertools import pairwise

import pytest
from django.db import IntegrityError, transaction

from billing import invoices
from billing.core import rating
from billing.models import InvoiceLine
from marketplace.locks import Lock, acquire
from marketplace.models import (
    Contract,
    ContractEvent,
    CurtailmentNotice,
    CurtailmentReport,
    HeldLower,
    Host,
    JobEvent,
    Placement,
    Reservation,
    ReservationBlock,
)
from marketplace.services import ai_revenue, curtailment_notices, curtailments, power
from scheduler import cycle, site_loop
from tests.faults.test_grid_calls import call, settled, take_back
from tests.faults.yard import Yard

pytestmark = pytest.mark.django_db


@pytest.fixture
def yard(monkeypatch):
    monkeypatch.setattr(curtailments, "QUIET", timedelta(seconds=20))
    made = Yard()
    made.turn(3)
    return made


def running(yard, *jobs):
    def all_run():
        cycle.run(yard.contract.cell_id, now=yard.now)
        return {yard.state(job) for job in jobs} == {"running"}

    yard.until(all_run, seconds=400)
    yard.turn(6)


def held_for(yard, cap_w=18_000, minutes=10):
    """A call that holds the GPUs of both hosts lower, and is taken back; over when they have their watts again."""
    row = call(yard, cap_w, minutes)
    yard.until(lambda: HeldLower.objects.filter(curtailment=row).count() >= 2, seconds=200)
    yard.turn(12)
    take_back(yard, row)
    yard.until(lambda: not HeldLower.objects.filter(ends_at=None).exists(), seconds=200)
    yard.until(lambda: settled(row), seconds=2000)
    return row


def bill(yard):
    return invoices.close_period(yard.contract.organization, yard.now, now=yard.now)


def test_who_runs_on_gpus_held_lower_is_told_and_credited_to_the_second(yard):
    reserved = yard.book("reserved")
    jobs = [yard.submit(), yard.submit(contract=reserved)]
    running(yard, *jobs)
    row = held_for(yard)

    # told: in the job's story, in the contract's, by mail; when it begins and when it is over
    for job in jobs:
        host = Placement.objects.get(job=job).host
        said = [e.reason for e in JobEvent.objects.filter(job=job, reason__contains=row.public_id).order_by("id")]
        holds = HeldLower.objects.filter(host=host).order_by("pk")
        assert said == [
            *(f"curtailment {row.public_id}: GPUs of {host.name} held to {h.gpu_w} W each" for h in holds),
            f"curtailment {row.public_id}: GPUs of {host.name} may draw 700 W each again",
        ]
        told = CurtailmentNotice.objects.filter(contract=job.contract).order_by("pk")
        assert [n.what for n in told] == ["held", "over"]
        assert (
            ContractEvent.objects.filter(contract=job.contract, reason__startswith=f"notice: {row.public_id}").count()
            == 2
        )
    notice = CurtailmentNotice.objects.get(contract=reserved, what="over")
    assert "GPUs were held lower while its jobs ran on; 0." in curtailment_notices.sentence(notice)

    # the invoice: a line of its own, the seconds by the share of power withheld
    invoice = bill(yard)
    lines = {line.contract_id: line for line in InvoiceLine.objects.filter(invoice=invoice, kind="held_lower")}
    assert set(lines) == {job.contract_id for job in jobs}
    for job in jobs:
        placement = Placement.objects.get(job=job)
        line, due = lines[job.contract_id], 0
        for h in HeldLower.objects.filter(host=placement.host):
            seconds = int(h.ends_at.timestamp()) - int(h.starts_at.timestamp())
            due += seconds * 8 * -(-1000 * (700 - h.gpu_w) // 700)
        assert -line.quantity == due > 0
        assert line.description.endswith(
            f"GPU-hours credited for GPUs held lower, {job.contract.public_id}: {row.public_id}"
        )
        paid = sum(InvoiceLine.objects.filter(contract=job.contract).values_list("amount_minor", flat=True))
        assert 0 < paid < -line.amount_minor + paid
        assert line.operator_minor + line.platform_minor == line.amount_minor < 0

    # the call's report: the jobs, for how long, and the money
    report = CurtailmentReport.objects.get(curtailment=row)
    assert {(j["job"], j["what"]) for j in report.jobs} == {(job.public_id, "held_lower") for job in jobs}
    assert all(j["held_s"] >= 60 for j in report.jobs)
    assert {c["contract"]: (c["why"], -c["amount_minor"]) for c in report.credits} == {
        job.contract.public_id: ("held_lower", lines[job.contract_id].amount_minor) for job in jobs
    }
    assert notice.credit_minor == -lines[reserved.pk].amount_minor


def test_asserting_a_call_again_credits_once(yard):
    running(yard, yard.submit(), yard.submit())
    row = call(yard, 18_000)
    yard.until(lambda: HeldLower.objects.count() >= 2, seconds=200)
    yard.turn(4)
    before = list(HeldLower.objects.values_list("pk", "starts_at", "gpu_w"))
    for _ in range(3):  # a worker that died after its commit: the same turn once more
        site_loop.run(yard.site.pk, now=yard.now)
    with transaction.atomic():
        acquire((Lock.SITE, yard.site.pk))
        wanted = {h.pk: h.call_gpu_w for h in Host.objects.exclude(call_gpu_w=None)}
        assert power.cap_gpus(yard.site.pk, wanted, calls=dict.fromkeys(wanted, row.pk), now=yard.now) == []
    assert list(HeldLower.objects.values_list("pk", "starts_at", "gpu_w")) == before
    assert CurtailmentNotice.objects.filter(what="held").count() == 1
    first = bill(yard)
    yard.turn(6)
    second = bill(yard)
    again = bill(yard)
    assert again.pk == second.pk, "closed again, it is the same invoice"
    credited = sum(
        InvoiceLine.objects.filter(kind="held_lower", invoice__in=[first, second]).values_list("quantity", flat=True)
    )
    lasted = [(h, int((h.ends_at or yard.now).timestamp() - h.starts_at.timestamp())) for h in HeldLower.objects.all()]
    assert -credited == sum(s * rating.withheld(8000, h.gpu_w, h.full_w) for h, s in lasted)


def test_a_rival_that_holds_the_same_host_lower_waits_and_changes_nothing(yard):
    """Were the site's lock ever not enough, the database would take no second row."""
    running(yard, yard.submit(), yard.submit())
    row = call(yard, 18_000)
    yard.until(lambda: HeldLower.objects.count() >= 2, seconds=200)
    one = HeldLower.objects.order_by("pk").first()
    with pytest.raises(IntegrityError, match="held_lower_once"), transaction.atomic():
        HeldLower.objects.create(
            curtailment=row, host=one.host, gpu_w=300, full_w=700, starts_at=yard.now + timedelta(seconds=1)
        )


def test_a_lower_call_begins_anew_without_a_gap_and_full_limits_end_it(yard):
    large = yard.submit()
    running(yard, large)
    first, second = yard.submit(gpus=4), yard.submit(gpus=4)
    running(yard, first, second)
    call(yard, 24_000)
    yard.until(lambda: HeldLower.objects.count() >= 2, seconds=200)
    yard.turn(4)
    lower = call(yard, 20_000, reference="c2")
    yard.until(lambda: HeldLower.objects.filter(curtailment=lower).count() >= 2, seconds=200)
    for host in Host.objects.all():
        rows = list(HeldLower.objects.filter(host=host).order_by("starts_at"))
        assert len(rows) >= 2
        assert all(a.ends_at == b.starts_at and a.gpu_w > b.gpu_w for a, b in pairwise(rows))
        assert rows[-1].ends_at is None
        assert rows[-1].gpu_w == host.call_gpu_w
    # who comes while the call stands is told as well
    yard.end(first)
    yard.end(large)
    yard.turn(6)
    late = yard.submit(gpus=4)
    running(yard, late)
    host = Placement.objects.get(job=second).host
    assert Placement.objects.get(job=late).host == host
    assert JobEvent.objects.filter(
        job=late, reason__endswith=f"GPUs of {host.name} held to {host.call_gpu_w} W each"
    ).exists()
    # and where new work is given its full limits, the host stands no lower for anybody on it
    Host.objects.filter(pk=host.pk).update(desired_limits_w=[700] * 8, desired_generation=host.desired_generation + 1)
    yard.turn(2)
    host.refresh_from_db()
    assert host.call_gpu_w is None
    assert not HeldLower.objects.filter(host=host, ends_at=None).exists()
    said = JobEvent.objects.filter(job=second, reason__contains=lower.public_id).order_by("-id").first()
    assert said.reason == f"curtailment {lower.public_id}: GPUs of {host.name} may draw 700 W each again"


def test_a_claim_to_gpus_held_lower_is_counted_at_what_they_may_draw(yard):
    """Four GPUs leave, four come: the watts of those who left are enough for whoever has reserved them. At full power they would not
    be, and who gives way to calls waits for that.
    """
    running(yard, yard.submit())
    first, second = yard.submit(gpus=4), yard.submit(gpus=4)
    running(yard, first, second)
    call(yard, 20_000)
    yard.until(lambda: HeldLower.objects.count() >= 2, seconds=200)
    yard.turn(4)
    host = Placement.objects.get(job=second).host
    level = host.call_gpu_w
    assert 200 < level < 500
    yard.end(first)
    yard.turn(4)
    loose = yard.submit(gpus=4)
    yard.turn(4)
    assert yard.state(loose) == "queued"
    free = sorted(set(range(8)) - set(Placement.objects.get(job=second).gpu_indices))
    owner = yard.book("reserved", starts_at=yard.now, ends_at=yard.now + timedelta(hours=2))
    held = Reservation.objects.create(
        listing=owner.listing,
        contract=owner,
        starts_at=yard.now,
        ends_at=owner.ends_at,
        claims_at=yard.now,
        state="firm",
    )
    ReservationBlock.objects.create(reservation=held, host=host, gpu_indices=free)
    late = yard.submit(gpus=4, contract=owner)
    running(yard, late)
    assert Placement.objects.get(job=late).host == host
    host.refresh_from_db()
    assert (host.call_gpu_w, host.desired_limits_w) == (level, [level] * 8)
    assert host.reserved_w == host.base_w + 8 * level
    assert HeldLower.objects.filter(host=host, ends_at=None).count() == 1


def test_a_contract_that_a_call_made_free_is_not_credited_besides(yard):
    flexible = yard.book("flexible", flexible_notice_s=60)
    jobs = [yard.submit(contract=flexible), yard.submit()]
    running(yard, *jobs)
    row = call(yard, 12_000, minutes=10)
    yard.until(lambda: yard.state(jobs[0]) == "requeued", seconds=400)
    yard.turn(4)
    take_back(yard, row)
    yard.until(lambda: settled(row), seconds=2000)
    found = {c["contract"]: c["why"] for c in CurtailmentReport.objects.get(curtailment=row).credits}
    assert found[flexible.public_id] == "off_the_bill"
    invoice = bill(yard)
    mine = invoice.lines.filter(contract=flexible)
    assert not mine.filter(kind="held_lower").exists()
    assert "for the grid" in mine.get(kind="commitment").description


def test_what_is_credited_is_in_the_operators_hours_too(yard):
    running(yard, yard.submit(), yard.submit())
    began = yard.now.replace(minute=0, second=0, microsecond=0)
    held_for(yard)
    flows = ai_revenue.flows(
        Placement.objects.filter(site=yard.site), Contract.objects.filter(site=yard.site), began, yard.now
    )
    less = [flow for flow in flows if flow.rate < 0]
    assert len(less) == HeldLower.objects.count()
    assert ai_revenue.earned(less, began, yard.now)["USD"] < 0
