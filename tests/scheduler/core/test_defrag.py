"""Moves: never an unfit, never the unmovable, never more than allowed, and everything moved has its new place before it leaves the old."""

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.core import defrag
from scheduler.core.fit_kernels import fit_kernel
from scheduler.core.pack import Packer, classes_of, copy_state
from scheduler.core.score import shapes_of, tables_for
from scheduler.core.state import give, take
from scheduler.core.types import Fleet, Request
from tests.scheduler.core.cells import cell, queue

pytestmark = pytest.mark.serverless


def fits(s, h, q):
    return fit_kernel(s.rows[h], s.gfree[h], s.vfree[h], s.nvl[h], q, s.parent, s.k, s.budget)[0] == 0


def full_cell(seed, hosts=10):
    """(packer, work, wanted): a cell packed until much is refused, which some have left since; what runs there, and who waits."""
    dice = random.Random(seed)
    fleet, _ = cell(dice, hosts, watts=dice.random() < 0.5, tight=1.0)
    singles = [r for r in queue(dice, 90) if r.replicas == 1 and r.topology.nvlink < 2]
    vectors, of = classes_of(singles)
    packer = Packer(fleet, vectors, tables_for(fleet, shapes_of(singles), "tailrace"), steps=300)
    run = packer.place(of)
    placed = np.flatnonzero(run.host >= 0)
    gone = np.array([dice.random() < 0.3 for _ in placed], bool)
    for i in placed[gone]:
        defrag.unbook(run.host[i], vectors[of[i]], run.mask[i], packer.state, packer.tables)
    placed = placed[~gone]
    lost = [1 + dice.randrange(5) for _ in placed]
    movable = [dice.random() < 0.7 for _ in placed]
    work = defrag.workload(run.host[placed].tolist(), vectors[of[placed]], run.mask[placed].tolist(), movable, lost)
    waiting = np.flatnonzero(run.host < 0)[:6]
    return (
        packer,
        work,
        [defrag.Wanted(vectors[of[i]], dice.choice((2, 10, 1000))) for i in waiting],
    )


def scattered_cell(seed):
    """As `full_cell`: hosts of four GPUs on most of which one or two small jobs stand, where gangs and others wait for whole ones."""
    dice = random.Random(seed)
    hosts = dice.randint(4, 9)
    fleet = Fleet.build([{"host_id": i, "cpu_free": 64_000, "ram_free": 10**6, "gpus": 4} for i in range(hosts)])
    requests = [
        Request(job=1, cpu=1000, gpus=1),
        Request(job=2, cpu=1000, gpus=1, gpu_milli=400),
        Request(job=3, gpus=4),
    ]
    vectors, _ = classes_of(requests)
    packer = Packer(fleet, vectors, tables_for(fleet, shapes_of(requests), "tailrace"), steps=10)
    stands = [(h, dice.choice((0, 1)), 1 << g) for h in range(hosts) for g in range(dice.choice((0, 1, 1, 2)))]
    for row, k, mask in stands:
        packer.take(row, k, mask)
    rows, of, masks = zip(*stands, strict=True) if stands else ((), (), ())
    movable = [dice.random() < 0.8 for _ in stands]
    work = defrag.workload(rows, vectors[list(of)], masks, movable, [dice.randint(1, 5) for _ in stands])
    return packer, work, [defrag.Wanted(vectors[2], dice.choice((5, 20)), dice.choice((1, 2, 3))) for _ in range(3)]


def check(state, work, moves, limit):
    assert len(moves) <= limit
    assert len({m.index for m in moves}) == len(moves)
    after = copy_state(state)
    for m in moves:  # all land while everybody still holds the old place
        assert work.movable[m.index]
        assert work.row[m.index] == m.row != m.to
        assert fits(after, m.to, work.vector[m.index])
        take(m.to, work.vector[m.index], m.mask, after)
    for m in moves:
        give(m.row, work.vector[m.index], work.mask[m.index], after)
    return after


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6))
@pytest.mark.parametrize("made", [full_cell, scattered_cell])
def test_a_repair_breaks_no_rule_and_pays(made, seed, limit):
    packer, work, wanted = made(seed)
    before = copy_state(packer.state)
    found = defrag.search(packer.state, packer.tables, work, wanted, limit)
    assert all((a == b).all() for a, b in zip(before, packer.state, strict=True)), "the state was changed"
    assert found == defrag.search(packer.state, packer.tables, work, wanted, limit)
    after = check(packer.state, work, found.moves, limit)
    for room in found.rooms:
        assert fits(after, room.row, wanted[room.wanted].vector)
        take(room.row, wanted[room.wanted].vector, room.mask, after)
    assert after.gfree.min() >= 0
    assert {m.wanted for m in found.moves} == {r.wanted for r in found.rooms}
    assert all(count == wanted[i].replicas for i, count in Counter(r.wanted for r in found.rooms).items()), (
        "a gang in parts"
    )
    assert found.lost == sum(int(work.lost[m.index]) for m in found.moves)
    assert found.gain > found.lost or not found.moves


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_who_must_leave_is_needed_every_one(seed):
    packer, work, wanted = full_cell(seed)
    s = packer.state
    members = np.argsort(work.row, kind="stable").astype(np.int64)
    start = np.searchsorted(work.row[members], np.arange(len(s.rows) + 1)).astype(np.int64)
    leave = np.zeros(defrag.MOST, np.uint8)
    for one in wanted:
        for h in range(len(s.rows)):
            key = defrag.clear(h, one.vector, s, work, members, start[h], start[h + 1], 8, leave)
            if not 0 < key < 1 << 62:
                continue
            victims = [int(members[start[h] + i]) for i in np.flatnonzero(leave)]
            assert key >> 40 == len(victims) <= 8
            for kept in [None, *victims]:
                trial = copy_state(s)
                for v in victims:
                    if v != kept:
                        give(h, work.vector[v], work.mask[v], trial)
                assert fits(trial, h, one.vector) == (kept is None)


def test_one_share_makes_room_for_a_whole_gpu():
    fleet = Fleet.build([{"host_id": i, "cpu_free": 64_000, "ram_free": 10**6, "gpus": 1} for i in range(2)])
    requests = [Request(job=1, cpu=1000, gpus=1, gpu_milli=400), Request(job=2, cpu=1000, gpus=1)]
    vectors, _ = classes_of(requests)
    packer = Packer(fleet, vectors, tables_for(fleet, shapes_of(requests), "tailrace"), steps=10)
    for row in (0, 1):
        packer.take(row, 0, 1)
    work = defrag.workload([0, 1], vectors[[0, 0]], [1, 1], [True, False], [10, 10])
    found = defrag.search(packer.state, packer.tables, work, [defrag.Wanted(vectors[1], 11)], 1)
    assert found.moves == [defrag.Move(0, 0, 1, 1, 0)]
    assert found.rooms == [defrag.Room(0, 0, 1)]
    assert (
        defrag.search(packer.state, packer.tables, work, [defrag.Wanted(vectors[1], 10)], 1).moves == []
    )  # does not pay
    assert defrag.search(packer.state, packer.tables, work, [defrag.Wanted(vectors[1], 11)], 0).moves == []


def gang_cell(shares, worth):
    """Four hosts of two GPUs; a job of one GPU on as many of them as `shares`; a gang of three that wants a whole host each."""
    fleet = Fleet.build([{"host_id": i, "cpu_free": 64_000, "ram_free": 10**6, "gpus": 2} for i in range(4)])
    requests = [Request(job=1, cpu=1000, gpus=1, gpu_milli=500), Request(job=2, cpu=1000, gpus=2)]
    vectors, _ = classes_of(requests)
    packer = Packer(fleet, vectors, tables_for(fleet, shapes_of(requests), "tailrace"), steps=10)
    for row in range(shares):
        packer.take(row, 0, 1)
    work = defrag.workload(list(range(shares)), vectors[[0] * shares], [1] * shares, [True] * shares, [10] * shares)
    return packer, work, defrag.Wanted(vectors[1], worth, 3)


def test_a_gang_gets_room_for_all_of_its_replicas():
    """Two hosts are idle, two half used: one of those is emptied into the other."""
    packer, work, gang = gang_cell(2, 11)
    found = defrag.search(packer.state, packer.tables, work, [gang], 4)
    assert sorted(room.row for room in found.rooms) == sorted({2, 3, found.moves[0].row})
    assert [(m.row, m.to) for m in found.moves] in ([(0, 1)], [(1, 0)])
    assert (found.gain, found.lost) == (11, 10)


@pytest.mark.parametrize(
    ("shares", "worth", "moves"),
    [
        (2, 10, 4),  # it does not pay
        (4, 1000, 1),  # two would have to move
        (1, 1000, 4),  # it fits already: three hosts are idle
    ],
)
def test_a_gang_gets_room_for_all_or_for_none(shares, worth, moves):
    packer, work, gang = gang_cell(shares, worth)
    before = copy_state(packer.state)
    small = defrag.Wanted(gang.vector, 11)
    assert defrag.search(packer.state, packer.tables, work, [gang], moves) == defrag.Repair([], [], 0, 0)
    both = defrag.search(
        packer.state, packer.tables, work, [gang, small], moves
    )  # what it tried is undone for those behind
    assert both.rooms == [
        room._replace(wanted=1) for room in defrag.search(packer.state, packer.tables, work, [small], moves).rooms
    ]
    assert all((a == b).all() for a, b in zip(before, packer.state, strict=True))


def test_two_hosts_are_emptied_for_a_gang_where_two_moves_are_allowed():
    packer, work, gang = gang_cell(4, 21)
    found = defrag.search(packer.state, packer.tables, work, [gang._replace(replicas=2)], 2)
    assert (len(found.moves), len(found.rooms), found.lost) == (2, 2, 20)
    assert not {m.to for m in found.moves} & {room.row for room in found.rooms}
