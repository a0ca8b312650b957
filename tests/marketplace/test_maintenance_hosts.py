"""Maintenance as it goes on: which hosts go and come back, what stands in meanwhile, and what is missed."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marketplace.models import (
    Host,
    Maintenance,
    MaintenanceHost,
    Reservation,
)
from marketplace.services import availability, drains, maintenance
from marketplace.services.maintenance.planning import Away, Block, Piece, shortfalls
from marketplace.services.maintenance.reads import joined
from scheduler import site_loop
from tests import factories
from tests.factories import NOW
from tests.marketplace.works import DAY, END, HOUR, MINUTE, START, Yard, missed, told

pytestmark = pytest.mark.django_db


@pytest.fixture
def yard():
    return Yard()


# --- hosts go and come back
def test_from_the_announcement_to_work_again(yard):
    contract = yard.contract(gpus=32)
    job, placement = yard.runs(contract, yard.hosts[0])
    row = yard.announce(yard.hosts[0])
    assert told(contract) == [("announced", 8, 8)]
    assert not maintenance.clock(START - 16 * MINUTE)["take"]
    away = START - 15 * MINUTE
    assert maintenance.clock(away)["take"] == 1
    placement.refresh_from_db()
    job.refresh_from_db()
    assert (placement.release_requested_at, job.state) == (away, "preempting")
    assert placement.state == "draining"
    host = Host.objects.get(pk=yard.hosts[0].pk)
    assert (host.state, host.back_at) == ("draining", END)
    yard.gone(placement, away + MINUTE)
    job.refresh_from_db()
    assert (job.state, job.restarts) == ("requeued", 0)
    assert yard.states() == ["maintenance", "active", "active", "active"]
    assert not maintenance.clock(START - MINUTE)
    assert maintenance.clock(START)["begin"] == 1
    assert missed(contract) == [(8, away, END)]
    Host.objects.update(beat_at=END)
    assert maintenance.clock(END + 7 * timedelta(seconds=1))["end"] == 1
    assert not maintenance.clock(END + MINUTE)
    assert yard.states() == ["active"] * 4
    row.refresh_from_db()
    assert (row.state, row.settled_at) == ("completed", END + timedelta(seconds=7))
    assert missed(contract) == [(8, away, END + timedelta(seconds=7))]  # to the moment when it was back
    assert maintenance.covers([host.pk], NOW, END + DAY) == {host.pk: [(away, END)]}
    assert maintenance.covers([host.pk], START, START + HOUR) == {host.pk: [(START, START + HOUR)]}


def test_others_stand_in_while_it_goes_on(yard):
    contract = yard.contract(gpus=8)
    (own,) = yard.on(contract)
    row = yard.announce(Host.objects.get(pk=own))
    meanwhile = Reservation.objects.get(maintenance=row, contract=contract)
    (block,) = meanwhile.blocks.all()
    assert (block.host_id != own, len(block.gpu_indices)) == (True, 8)
    assert (meanwhile.starts_at, meanwhile.ends_at) == (row.away_at, END)
    assert yard.on(contract) == {own: 8}  # afterwards it is where it was
    taken = availability.largest(yard.listing, now=NOW, starts_at=START, ends_at=END)
    assert taken == 32 - 8 - 8
    maintenance.clock(START)
    assert missed(contract) == []


def test_a_contract_that_wants_one_rack_has_its_stand_ins_there():
    yard = Yard(hosts=4, leaves=("leaf-1", "leaf-1", "leaf-1", "leaf-2"))
    contract = yard.contract(gpus=16, level="leaf")
    first = Host.objects.get(pk=min(yard.on(contract)))
    row = yard.announce(first)
    (block,) = Reservation.objects.get(maintenance=row, contract=contract).blocks.all()
    assert block.host.leaf == "leaf-1"
    yard.announce(*(h for h in yard.hosts if h.leaf == "leaf-1"), start=END + DAY, end=END + DAY + HOUR)
    assert told(contract)[-1] == ("announced", 16, 8)  # the whole block may go to another rack, which has one host


def test_a_job_with_a_long_grace_is_asked_early_enough(yard):
    contract = factories.contract(yard.listing)
    _, slow = yard.runs(contract, yard.hosts[0], checkpoint_grace_s=3600)
    yard.announce(yard.hosts[0], yard.hosts[1])
    maintenance.clock(START - HOUR - 3 * MINUTE)
    assert yard.states()[:2] == ["active", "active"]
    maintenance.clock(START - HOUR - 2 * MINUTE)
    slow.refresh_from_db()
    assert slow.release_requested_at == START - HOUR - 2 * MINUTE
    assert yard.states()[:2] == ["draining", "active"]
    maintenance.clock(START - 15 * MINUTE)
    assert yard.states()[:2] == ["draining", "draining"]


def test_a_host_in_two_comes_back_when_neither_has_it(yard):
    host = yard.hosts[0]
    first = yard.announce(host)
    second = yard.announce(host, start=START + HOUR, end=END + 2 * HOUR)
    for at in (START, START + HOUR):
        maintenance.clock(at)
        site_loop.run(yard.site.pk, now=at)
    assert yard.states()[0] == "maintenance"
    maintenance.clock(END)
    first.refresh_from_db()
    assert first.state == "completed"
    host.refresh_from_db()
    assert (host.state, host.back_at) == ("maintenance", second.ends_at)
    maintenance.finish(yard.operator, Maintenance.objects.get(pk=second.pk), now=END + HOUR)
    assert yard.states()[0] == "active"
    assert maintenance.covers([host.pk], NOW, END + DAY) == {host.pk: [(START, END + HOUR)]}


def test_only_what_it_took_comes_back_and_only_what_is_well(yard):
    by_hand, silent, shrank, good = yard.hosts
    drains.drain_host(by_hand, actor=yard.operator, now=NOW, reason="a fan")
    yard.announce(*yard.hosts)
    maintenance.clock(START)
    site_loop.run(yard.site.pk, now=START)
    assert yard.states() == ["maintenance"] * 4
    Host.objects.filter(pk=silent.pk).update(beat_at=START)
    Host.objects.filter(pk=shrank.pk).update(state="draining", state_reason="the inventory shrank under what runs here")
    Host.objects.filter(pk=good.pk).update(beat_at=END)
    maintenance.clock(END)
    assert yard.states() == ["maintenance", "lost", "draining", "active"]


def test_put_back_by_hand_it_stays_at_work_and_is_missed_no_more(yard):
    contract = yard.contract(gpus=32)
    yard.announce(yard.hosts[0])
    maintenance.clock(START)
    drains.undrain_host(yard.hosts[0], actor=yard.operator, now=START + HOUR)
    maintenance.put_back(yard.site.cell_id, now=START + HOUR)
    maintenance.clock(START + 2 * HOUR)
    assert yard.states()[0] == "active"
    assert missed(contract) == [(8, START, START + HOUR)]
    drains.drain_host(yard.hosts[0], actor=yard.operator, now=START + 2 * HOUR, reason="no")
    maintenance.clock(END)
    assert yard.states()[0] == "draining"


# --- pure
def at(hour):
    return datetime(2027, 1, 1, tzinfo=UTC) + timedelta(hours=hour)


def test_a_shortfall_is_what_is_away_less_what_stands_in():
    own = [Block(1, 10, 8, at(0), at(20), stands_in=False), Block(1, 11, 8, at(0), at(20), stands_in=False)]
    away = {10: [Away(5, at(2), at(6))], 11: [Away(6, at(4), at(8))]}
    assert shortfalls(own, away) == [Piece(1, 5, 8, at(2), at(6)), Piece(1, 6, 8, at(4), at(8))]
    assert shortfalls([*own, Block(1, 12, 8, at(2), at(6), stands_in=True)], away) == [
        Piece(1, 5, 8, at(4), at(6)),
        Piece(1, 6, 8, at(6), at(8)),
    ]
    assert shortfalls(own[:1], {10: [Away(5, at(2), at(6)), Away(6, at(4), at(8))]}) == [
        Piece(1, 5, 8, at(2), at(6)),
        Piece(1, 6, 8, at(6), at(8)),
    ]


hours = st.tuples(st.integers(0, 30), st.integers(1, 12)).map(lambda t: (at(t[0]), at(t[0] + t[1])))


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 8), hours, st.booleans()), max_size=8),
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3), hours), max_size=6),
)
@settings(max_examples=60)
def test_shortfalls_hour_by_hour(held, gone):
    blocks = [Block(c, h, n, a, b, stands_in=s) for c, h, n, (a, b), s in held]
    away = {}
    for host, number, (a, b) in gone:
        away.setdefault(host, []).append(Away(number, a, b))
    pieces = shortfalls(blocks, away)
    for hour in range(45):
        for contract in (1, 2, 3):
            here = [b for b in blocks if b.contract == contract and b.start <= at(hour) < b.end]
            lost = sum(b.gpus for b in here if any(a.start <= at(hour) < a.end for a in away.get(b.host, ())))
            want = max(0, lost - sum(b.gpus for b in here if b.stands_in))
            assert sum(p.gpus for p in pieces if p.contract == contract and p.start <= at(hour) < p.end) == want


@given(st.lists(hours, max_size=8))
@settings(max_examples=60)
def test_joined_windows_are_disjoint_and_the_same_instants(windows):
    out = joined(windows)
    assert all(a[1] < b[0] for a, b in pairwise(out))
    for hour in range(45):
        assert any(a <= at(hour) < b for a, b in out) == any(a <= at(hour) < b for a, b in windows)


def test_rows_are_taken_before_they_are_given_back(yard):
    yard.announce(yard.hosts[0])
    assert MaintenanceHost.objects.filter(taken_at=None, given_back_at=None).count() == 1
