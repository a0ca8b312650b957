"""Reserved windows on hosts that are out of work: others stand in."""

from datetime import timedelta

import pytest

from marketplace.models import Host, ReservationBlock
from marketplace.services import (
    availability,
    conditions,
    contracts,
)
from tests import factories as f
from tests.factories import NOW
from tests.marketplace.out_of_work import (
    END,
    LATER,
    SECOND,
    START,
    heard,
    hosts_of,
    letters,
    lose,
    never_oversold,
    sicken,
    told,
    well,
)
from tests.marketplace.trade import accept, ask
from tests.marketplace.works import HOUR, MINUTE, Yard, missed


@pytest.fixture
def yard(db):
    made = Yard()
    conditions.record(sites=[made.site.pk], now=NOW)
    return made


# --- others stand in
def test_a_window_that_has_begun_moves_off_a_sick_host_and_loses_no_second_unpaid(yard):
    contract = yard.contract(gpus=8)
    (was,) = contract.reservation.blocks.all()
    sicken(yard, was.host, LATER)
    assert contracts.clock(LATER + 7 * SECOND).reservations_moved == 1
    (now,) = contract.reservation.blocks.all()
    assert now.host_id != was.host_id
    assert now.gpu_indices == list(range(8))
    assert missed(contract) == [(8, LATER, LATER + 7 * SECOND)]
    assert told(contract) == ["8 other GPUs stand in for its own (a GPU is sick); what was missing is not charged"]
    (before,) = contract.reservations.filter(state="released")  # who stands there came by right
    assert (before.starts_at, before.ends_at) == (contract.starts_at, LATER + 7 * SECOND)
    assert [(b.host_id, b.gpu_indices) for b in before.blocks.all()] == [(was.host_id, was.gpu_indices)]
    f.member(contract.organization, "engineer", f.user("eng@customer.example"))
    (letter,) = letters()
    assert letter.subject == f"{contract.public_id}: other GPUs stand in"
    assert letter.to == ["eng@customer.example"]
    assert contracts.clock(LATER + 17 * SECOND).reservations_moved == 0
    well(yard, was.host, LATER + HOUR)
    contracts.clock(LATER + HOUR)
    assert contract.reservation.blocks.get().host_id == now.host_id  # it stays where it is
    assert missed(contract) == [(8, LATER, LATER + 7 * SECOND)]
    assert len(told(contract)) == 1
    room = availability.largest(yard.listing, now=LATER + HOUR, starts_at=LATER + HOUR, ends_at=END, level="host")
    assert room == 8  # the host that is back is for sale
    never_oversold(yard)


def test_only_what_is_out_moves_and_it_stays_in_its_leaf(yard):
    contract = yard.contract(gpus=12, level="leaf")
    assert hosts_of(yard, contract) in ([0, 1], [2, 3])
    small = next(pk for pk, gpus in yard.on(contract).items() if gpus == 4)
    stays = yard.on(contract).keys() - {small}
    sicken(yard, Host.objects.get(pk=small), LATER)
    contracts.clock(LATER)
    assert yard.on(contract) == {**dict.fromkeys(stays, 8), small: 4}, "no host of the other leaf may stand in"
    assert missed(contract) == [(4, LATER, END)]
    other = Yard(leaves=("leaf-1", "leaf-1", "leaf-1", "leaf-2"))
    conditions.record(sites=[other.site.pk], now=NOW)
    contract = other.contract(gpus=12, level="leaf")
    small = next(pk for pk, gpus in other.on(contract).items() if gpus == 4)
    sicken(other, Host.objects.get(pk=small), LATER)
    contracts.clock(LATER)
    assert small not in other.on(contract)
    assert sorted(other.on(contract).values()) == [4, 8]
    assert {Host.objects.get(pk=pk).leaf for pk in other.on(contract)} == {"leaf-1"}


def test_as_many_as_there_are_stand_in_but_what_must_stand_in_one_host_is_not_torn_apart(yard):
    rivals = [accept(yard.customer, ask(yard.customer, yard.listing, gpus=4, end=END)) for _ in range(5)]
    loose = yard.contract(gpus=8)
    whole = [pk for pk, gpus in yard.on(loose).items()]
    assert len(rivals) == 5
    at = Host.objects.get(pk=whole[0])
    sicken(yard, at, LATER)
    contracts.clock(LATER)
    held = ReservationBlock.objects.filter(reservation__contract=loose, reservation__state="firm")
    assert sum(len(b.gpu_indices) for b in held) == 8
    gone = held.filter(host=at).first()
    short = len(gone.gpu_indices) if gone else 0
    assert missed(loose) == ([(short, LATER, END)] if short else [])
    assert gone is None or 3 not in gone.gpu_indices  # the sick one went first
    never_oversold(yard)


def test_in_one_host_means_all_or_nothing(yard):
    yard.contract(gpus=8)
    accept(yard.customer, ask(yard.customer, yard.listing, gpus=4, level="host", end=END))
    Host.objects.filter(pk=yard.hosts[3].pk).update(listing=None)
    tight = yard.contract(gpus=8, level="host", term=(START, END))
    free = availability.largest(yard.listing, now=NOW, starts_at=START, ends_at=END, level="site")
    (was,) = tight.reservation.blocks.all()
    sicken(yard, was.host, LATER)
    contracts.clock(LATER)
    assert yard.on(tight) == {was.host_id: 8}
    assert missed(tight) == [(8, LATER, END)]
    assert free == 4  # which are no use to it


def test_it_is_not_moved_onto_hosts_that_nobody_hears_nor_onto_what_others_hold(yard):
    contract = yard.contract(gpus=8, level="host")
    rival = yard.contract(gpus=16)
    (was,) = contract.reservation.blocks.all()
    last = next(h for h in yard.hosts if h.pk not in {*yard.on(contract), *yard.on(rival)})
    lose(yard, last, LATER - 5 * MINUTE, LATER - MINUTE)
    sicken(yard, was.host, LATER)
    contracts.clock(LATER)
    assert yard.on(contract) == {was.host_id: 8}
    Host.objects.filter(pk=last.pk).update(state="active", beat_at=LATER)
    contracts.clock(LATER + MINUTE)  # still no word of it in the history: it counts as lost
    assert yard.on(contract) == {was.host_id: 8}
    heard(yard, LATER + 2 * MINUTE)
    conditions.record(hosts=[last.pk], now=LATER + 2 * MINUTE)
    contracts.clock(LATER + 2 * MINUTE)
    assert yard.on(contract) == {last.pk: 8}
    never_oversold(yard)


def test_where_spot_must_leave_first_its_notice_is_not_charged_either(yard):
    contract = yard.contract(gpus=8)
    (was,) = contract.reservation.blocks.all()
    spot = f.contract(yard.listing, kind="spot", gpu_count=32)
    for host in yard.hosts:
        if host.pk != was.host_id:
            f.placement(
                f.job(spot, state="running", gpus=8, attempt=1), host, state="running", attempt=1, running_at=NOW
            )
    sicken(yard, was.host, LATER)
    contracts.clock(LATER)
    clear = LATER + timedelta(seconds=availability.lead_s(yard.listing))
    assert missed(contract) == [(8, LATER, clear)]
    for seconds in (10, 20, 1000):
        contracts.clock(LATER + timedelta(seconds=seconds))
    assert missed(contract) == [(8, LATER, clear)]
