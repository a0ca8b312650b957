"""Kernels that search, beside plain twins: sets of victims tried one by one on copies, replicas booked one by one in plain integers."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.core import defrag, gang
from scheduler.core import fit_kernels as fit
from scheduler.core.fit import fits_one, vram_of
from scheduler.core.pack import bits, copy_state, make_state
from scheduler.core.preempt import cheapest_host
from scheduler.core.state import give
from scheduler.core.types import Reason
from tests.scheduler.core.cells import cell, queue
from tests.scheduler.core.test_defrag import fits, full_cell
from tests.scheduler.core.test_recheck import Plain, same_rows

pytestmark = pytest.mark.serverless


def without(state, work, gone):
    """The state when these have left."""
    after = copy_state(state)
    for v in gone:
        give(int(work.row[v]), work.vector[v], int(work.mask[v]), after)
    return after


def by_host(work, hosts):
    members = np.argsort(work.row, kind="stable").astype(np.int64)
    return members, np.searchsorted(work.row[members], np.arange(hosts + 1)).astype(np.int64)


# --- preempt.cheapest_host
def cheapest(groups, tier, lost, work, q, state):
    """(group, who leaves): of each host the shortest line of victims, less those whom it turns out not to need; the best of these."""
    best = None
    for b, line in enumerate(groups):
        h = int(work.row[line[0]])
        ends = (line[: n + 1] for n in range(len(line)) if fits(without(state, work, line[: n + 1]), h, q))
        gone = next(ends, None)
        if gone is None:
            continue
        for v in reversed(list(gone)):
            fewer = [o for o in gone if o != v]
            gone = fewer if fits(without(state, work, fewer), h, q) else gone
        freed = [sum(int(work.vector[v, c]) for v in gone) for c in (fit.Q_CPU, fit.Q_RAM, fit.Q_NVME)]
        freed.append(sum(int(work.vector[v, fit.Q_GPUS] * work.vector[v, fit.Q_MILLI]) for v in gone))
        needed = [int(q[c]) for c in (fit.Q_CPU, fit.Q_RAM, fit.Q_NVME)] + [int(q[fit.Q_GPUS] * q[fit.Q_MILLI])]
        far = [((need - got) / need) ** 2 if need else 0.0 for need, got in zip(needed, freed, strict=True)]
        worst = max((int(tier[v]) for v in gone), default=-1)
        key = worst, sum(int(lost[v]) for v in gone), far[0] + far[1] + far[2] + far[3], len(gone)
        if best is None or key < best[0]:
            best = key, b, sorted(gone)
    return (-1, []) if best is None else best[1:]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_the_cheapest_victims_are_those_of_the_plain_twin(seed):
    packer, work, wanted = full_cell(seed, hosts=6)
    dice, state = random.Random(seed), packer.state
    tier = np.array([dice.randrange(3) for _ in work.row], np.int64)
    lost = np.array([dice.randrange(4) for _ in work.row], np.int64)
    line = sorted(range(len(work.row)), key=lambda v: (tier[v], lost[v], v))
    groups = [found for h in range(len(state.rows)) if (found := [v for v in line if work.row[v] == h])]
    if not groups:
        return
    cuts = np.cumsum([0, *map(len, groups)]).astype(np.int64)
    members = np.array([v for group in groups for v in group], np.int64)
    before = copy_state(state)
    for one in wanted[:3]:
        out = np.zeros(len(work.row), np.int32)
        found = cheapest_host(cuts, members, tier, lost, work.row, work.vector, work.mask, one.vector, state, out)
        assert (found, np.flatnonzero(out).tolist()) == cheapest(groups, tier, lost, work, one.vector, state)
        assert all((a == b).all() for a, b in zip(before, state, strict=True)), "the state was changed"


# --- defrag.clear, clear_all
def clears(h, q, state, work, mine, limit):
    """(key, who leaves) of one host: GPU by GPU the cheapest, then whoever closes most of what else lacks; less those not needed."""
    most, milli, wanted = 1 << 62, int(q[fit.Q_MILLI]), int(q[fit.Q_GPUS] * q[fit.Q_MILLI])
    mine = [int(v) for v in mine][: defrag.MOST]

    def able(v):
        size = int(work.vector[v, fit.Q_GPUS] * work.vector[v, fit.Q_MILLI])
        return work.movable[v] == 1 and size < max(wanted, 1) and size <= max(1000, wanted // 4)

    def price(gone):
        return sum((1 << 40) + int(work.lost[v]) for v in gone)

    def next_gpu(now):
        """Whom one more GPU costs."""
        if fit.choose_kernel(now.rows[h], now.gfree[h], now.vfree[h], now.nvl[h], q)[0] == 0:
            return []
        ways = []
        for g in range(int(now.rows[h, fit.NGPU])):
            free, there = int(now.gfree[h, g]), []
            if free >= milli:
                continue
            for v in (v for v in mine if v not in gone and able(v) and int(work.mask[v]) >> g & 1):
                if free < milli:
                    free, there = free + int(work.vector[v, fit.Q_MILLI]), [*there, v]
            if free >= milli:
                ways.append((price(there), g, there))
        return min(ways)[2] if ways else []

    def next_other(now):
        gaps = [(c, int(q[c_q]) - int(now.rows[h, c]), c_q) for c, c_q in
                ((fit.CPU, fit.Q_CPU), (fit.RAM, fit.Q_RAM), (fit.NVME, fit.Q_NVME))]  # fmt: skip
        ways = [
            (-sum(min(1.0, int(work.vector[v, c_q]) / gap) for _, gap, c_q in gaps if gap > 0), at, v)
            for at, v in enumerate(mine) if v not in gone and able(v)
        ]  # fmt: skip
        return [min(ways)[2]] if ways and min(ways)[0] < 0 else []

    gone = []
    if fit.static_kernel(state.rows[h], q) or state.rows[h, fit.NGPU] < q[fit.Q_GPUS]:
        return most, []
    while not fits(now := without(state, work, gone), h, q):
        more = next_gpu(now) or next_other(now)
        if not more:
            return most, None
        gone += more
    for v in reversed(mine):
        if v in gone and fits(without(state, work, [o for o in gone if o != v]), h, q):
            gone.remove(v)
    return (price(gone), sorted(gone)) if len(gone) <= limit else (most, None)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_who_clears_a_host_is_whom_the_plain_twin_names(seed, limit):
    packer, work, wanted = full_cell(seed, hosts=6)
    state = packer.state
    members, start = by_host(work, len(state.rows))
    leave, keys = np.zeros(defrag.MOST, np.uint8), np.zeros(len(state.rows), np.int64)
    for one in wanted[:3]:
        defrag.clear_all(one.vector, state, work, members, start, limit, leave.copy(), keys)
        for h in range(len(state.rows)):
            key = defrag.clear(h, one.vector, state, work, members, start[h], start[h + 1], limit, leave)
            plain, gone = clears(h, one.vector, state, work, members[start[h] : start[h + 1]], limit)
            assert (key, keys[h]) == (plain, plain)
            if gone is not None:
                assert sorted(int(members[start[h] + i]) for i in np.flatnonzero(leave)) == gone


# --- gang.book_kernel
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_replicas_of_a_gang_are_booked_as_the_plain_twin_books_them(seed):
    dice = random.Random(seed)
    fleet, _ = cell(dice, 8, tight=dice.choice((0.1, 0.4, 1.0)))
    request = dice.choice(queue(dice, 12))
    state, q = make_state(fleet), fit.request_vector(request)
    room = gang.room(state, q)
    hosts = [h for h in range(len(fleet)) if room[h] > 0]
    dice.shuffle(hosts)
    counts = [dice.randrange(1, min(int(room[h]), 8) + 1) for h in hosts]
    size = dice.randrange(1, 12)
    host, mask, delta = (np.full(size, -1, np.int32) for _ in range(3))
    done = gang.book_kernel(np.array(hosts, np.int64), np.array(counts, np.int64), q, state, host, mask, delta, 0)

    plain, told = Plain(fleet), []
    for h, many in zip(hosts, counts, strict=True):
        for _ in range(many):
            found = fits_one(plain.rows[h], request, plain.path(h)) if len(told) < size else None
            if found is None or found.reason is not Reason.OK:
                break
            one = SimpleNamespace(host=h, gpus=found.gpus, gpu_milli=request.gpu_milli)
            share = vram_of(request.vram, request.gpu_milli, int(fleet.vram_total[h]))
            _, (watts,) = plain.admit(request, [one], lambda _, share=share: share)
            told.append((h, tuple(found.gpus), watts))
    booked = zip(host[:done].tolist(), map(bits, mask[:done].tolist()), delta[:done].tolist(), strict=True)
    assert [(h, tuple(gpus), watts) for h, gpus, watts in booked] == told
    same_rows(state, plain)
