"""Moves: never an unfit, never the unmovable, never more than allowed, and everything moved has its new place before it leaves the old."""

import random

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
    """(packer, work, wanted): a cell packed until much is refused; what runs there, and who waits."""
    dice = random.Random(seed)
    fleet, _ = cell(dice, hosts, watts=dice.random() < 0.5, tight=1.0)
    singles = [r for r in queue(dice, 90) if r.replicas == 1 and r.topology.nvlink < 2]
    vectors, of = classes_of(singles)
    packer = Packer(fleet, vectors, tables_for(fleet, shapes_of(singles), "tailrace"), steps=300)
    run = packer.place(of)
    placed = np.flatnonzero(run.host >= 0)
    lost = [1 + dice.randrange(5) for _ in placed]
    movable = [dice.random() < 0.7 for _ in placed]
    work = defrag.workload(run.host[placed].tolist(), vectors[of[placed]], run.mask[placed].tolist(), movable, lost)
    waiting = np.flatnonzero(run.host < 0)[:6]
    return packer, work, [defrag.Wanted(vectors[of[i]], dice.choice((2, 10, 1000))) for i in waiting]


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
def test_a_repair_breaks_no_rule_and_pays(seed, limit):
    packer, work, wanted = full_cell(seed)
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
    assert found.lost == sum(int(work.lost[m.index]) for m in found.moves)
    assert found.gain > found.lost or not found.moves


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_a_held_host_is_cleared_by_moves_that_land(seed, limit):
    packer, work, wanted = full_cell(seed)
    for one in wanted:
        for h in defrag.cheapest(packer.state, work, one, 8)[:2]:
            moves, left = defrag.drain(packer.state, packer.tables, work, one, h, limit)
            after = check(packer.state, work, moves, limit)
            assert all(m.row == h for m in moves)
            assert left >= 0
            if left == 0:
                assert defrag.room(after, one.vector, h) >= 0


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
