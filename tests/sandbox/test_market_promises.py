"""The market's auditors of what was promised: nothing to say of a sound world, red when a rule is broken on purpose."""

from datetime import timedelta

import pytest

from marketplace.models import (
    Contract,
    Maintenance,
    PlacementEvent,
    ReservationBlock,
    ScreeningEvent,
)
from marketplace.services import commitments, maintenance
from marketplace.services.forward import resales, sales
from marketplace.services.maintenance import planning, taking
from sandbox.market.held import Held
from sandbox.market.maintained import Maintained
from sandbox.market.promises import CLAIMED, Promises
from sandbox.market.screened import Screened
from tests import factories
from tests.billing.conftest import World, _stripe_process, after, stripe_api
from tests.billing.test_kinds import DAY, MONTH, market, sign
from tests.billing.test_maintenance import HOUR, work
from tests.factories import NOW
from tests.marketplace.reselling import Desk
from tests.sandbox.auditing import Quiet, contracts_seen, promises

pytestmark = pytest.mark.django_db(transaction=True)
__all__ = ["_stripe_process", "market", "promises", "stripe_api"]


# --- who is asked to leave
def test_who_is_put_off_gpus_that_he_holds_is_found_and_who_stood_beside_them_is_not(market: World, promises: Promises):
    contract = sign(market, "reserved", 4, start=MONTH, end=MONTH + DAY)
    placement = market.ran(MONTH, 6 * HOUR, gpus=4)
    PlacementEvent.objects.create(
        placement=placement, at=after(MONTH + HOUR), from_state="running", to_state="draining", reason=CLAIMED
    )
    held = contracts_seen()
    blocks = ReservationBlock.objects.filter(reservation__contract=contract)
    blocks.update(gpu_indices=placement.gpu_indices)
    (said,) = promises._drained(held)
    assert f"placement {placement.pk} of a reserved contract was asked to go" in said
    blocks.update(gpu_indices=placement.gpu_indices[1:])  # one of them is sold on
    assert Promises(Quiet())._drained(held) == []  # type: ignore[arg-type]


# --- maintenance
def test_maintenance_is_replaced_or_written_down_and_credited(market: World, promises: Promises):
    sign(market, "reserved", 8, start=MONTH, end=MONTH + 30 * DAY, maintenance_hours_per_month=4)
    auditor = Maintained(promises)
    work(market, MONTH + DAY, 1.75)
    work(market, MONTH + 2 * DAY, 5.75)
    assert auditor.look(after(MONTH + 2 * DAY + 6 * HOUR)) == []
    market.close(MONTH + 31 * DAY)
    assert Held(promises).look() == []
    assert promises.tally["missing: GPU-hours not charged"].total() == 8 * 4


def test_credits_that_are_not_given_are_found(market: World, promises: Promises, monkeypatch):
    monkeypatch.setattr(commitments, "not_charged", lambda *_: ())
    sign(market, "reserved", 8, start=MONTH, end=MONTH + 30 * DAY, maintenance_hours_per_month=4)
    work(market, MONTH + 2 * DAY, 5.75)
    market.close(MONTH + 31 * DAY)
    (said,) = Held(promises).look()
    assert "0 GPU-hours for what could not be had" in said
    assert "by its terms -16" in said


def test_gpus_that_are_away_and_not_written_down_are_found(market: World, promises: Promises, monkeypatch):
    monkeypatch.setattr(planning, "short_now", lambda *_, **__: [])
    sign(market, "reserved", 8, start=MONTH, end=MONTH + 30 * DAY)
    operator = factories.actor(market.operator)
    row = maintenance.draft(
        operator, market.host.site, scope="site", text="Fans.", now=NOW, starts_at=after(MONTH + DAY),
        ends_at=after(MONTH + DAY + 4 * HOUR),
    )  # fmt: skip
    maintenance.announce(operator, row, now=NOW)
    for at in (MONTH + DAY - 15 * 60, MONTH + DAY):
        maintenance.clock(after(at))
    (said,) = Maintained(promises).look(after(MONTH + DAY + 60))
    assert "misses 8 GPUs for maintenance (8 away, 0 stand in); 0 are written down" in said


def test_work_that_comes_late_untold_or_keeps_its_hosts_is_found(market: World, promises: Promises, monkeypatch):
    sign(market, "reserved", 8, start=MONTH, end=MONTH + 30 * DAY)
    row = work(market, MONTH + DAY, 1)
    auditor = Maintained(promises)
    assert auditor.look(after(MONTH + DAY + 2 * HOUR)) == []
    row.notices.all().delete()
    assert any("told []" in said for said in Maintained(promises)._clock({row.pk: vars(row)}, after(MONTH + DAY + 600)))
    Maintenance.objects.filter(pk=row.pk).update(state="in_progress")
    assert any("should have been over" in said for said in auditor.look(after(MONTH + DAY + 2 * HOUR)))
    monkeypatch.setattr(taking, "give_back", lambda *_, **__: None)
    work(market, MONTH + 3 * DAY, 1)
    assert any("for mnt_" in said for said in auditor.look(after(MONTH + 3 * DAY + 2 * HOUR)))


def test_who_has_hours_again_that_his_buyer_was_told_of_is_told_there_and_then(promises: Promises):
    """A sale that is undone three days before the work: late, and yet in time, if it is said at once."""
    desk = Desk()
    begins = NOW + timedelta(days=9)
    resale = desk.offer(gpus=8, start=begins, end=begins + timedelta(days=1))
    bought = desk.buy(desk.buyer(), resale, 8, paid=False)
    operator = factories.actor(desk.site.organization)
    row = maintenance.draft(
        operator, desk.site, scope="site", text="Fans.", now=NOW, starts_at=begins + timedelta(hours=1),
        ends_at=begins + timedelta(hours=2),
    )  # fmt: skip
    row = maintenance.announce(operator, row, now=NOW + timedelta(hours=1))
    Contract.objects.filter(pk=bought.pk).update(state="cancelled")
    undone = begins - timedelta(days=3)
    assert sales.undo(bought.pk, now=undone)
    resales.withdraw(desk.holder, resale, now=undone)
    Contract.objects.filter(pk=desk.contract.pk).update(state="active")
    works = {row.pk: {**vars(row), "state": "in_progress"}}
    assert Maintained(promises)._clock(works, row.starts_at) == []
    row.notices.filter(contract=desk.contract).update(at=undone + timedelta(hours=1))
    (said,) = Maintained(promises)._clock(works, row.starts_at)
    assert f"told ['{undone + timedelta(hours=1):%F %T}']" in said


# --- screening
def test_a_contract_of_who_has_not_passed_is_found(promises: Promises):
    desk = Desk()
    owner = desk.contract.organization
    assert any("not passed: ['business'" in said for said in Screened(promises).look(NOW))
    for row in owner.screenings.all():
        ScreeningEvent.objects.create(
            screening=row,
            at=NOW - timedelta(days=1),
            actor="system",
            what="answered",
            from_state="pending",
            to_state="clear",
            round=1,
        )
    assert Screened(promises).look(NOW) == []
    row = owner.screenings.get(kind="sanctions")
    ScreeningEvent.objects.create(
        screening=row,
        at=NOW - timedelta(hours=1),
        actor="system",
        what="answered",
        from_state="clear",
        to_state="rejected",
        round=1,
    )
    said = Screened(promises).look(NOW)
    assert any("was rejected by system" in each for each in said)
    assert any("not passed: ['sanctions'" in each for each in said)
