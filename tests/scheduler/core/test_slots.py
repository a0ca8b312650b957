"""Idle GPUs together: counted as hosts change, priced by the chance that requests for several GPUs will want them."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import packing, protocol, traces
from scheduler.core.fit_kernels import CPU, FLAGS, HELD, OWNER, TOTAL, request_vector
from scheduler.core.pack import Packer, classes_of, copy_state
from scheduler.core.score import DEFAULT_WEIGHTS, TABLE_SCALE, Shape, make_tables, mix_of, shapes_of, tables_for
from scheduler.core.state import refresh_all, score_host
from scheduler.core.types import BLOCKING, Fleet, HostFlag, Request
from tests.scheduler.core.cells import cell, queue

pytestmark = pytest.mark.serverless
STANDARD_NORMAL = (1.150, 0.319, -0.319, -1.150)


def plain_slots(state, mix):
    """(slots by size, price by size) from the definitions."""
    several = [s for s in mix if s.gpus > 1]
    slots, price = dict.fromkeys(range(17), 0), dict.fromkeys(range(17), 0.0)
    if not several:
        return slots, price
    cpu_of_one = max(1, sum(s.weight * s.cpu for s in several) // sum(s.weight * s.gpus for s in several))
    free = cpu = 0
    for row, gpus in zip(state.rows, state.gfree, strict=True):
        if not row[FLAGS] & HostFlag.SCHEDULABLE or row[FLAGS] & BLOCKING or row[OWNER] > 0 or row[HELD]:
            continue
        free, cpu = free + int(row[TOTAL]), cpu + int(row[CPU])
        idle = min(sum(int(g) == 1000 for g in gpus), int(row[CPU]) // cpu_of_one)
        for z in {s.gpus for s in several}:
            slots[z] += idle // z
    asked = sum(s.weight * s.gpus * s.gpu_milli for s in mix)
    cpu_asked = max(1, sum(s.weight * s.cpu for s in mix))
    room = int(min(free, asked / cpu_asked * cpu))
    grain = 2 ** max(0, room.bit_length() - 5)
    room = max(1, room // grain * grain)
    for z in {s.gpus for s in several}:
        wanted = room * sum(s.gpus // z * s.weight for s in several) / asked
        x = (slots[z] - 0.5 - wanted) / wanted**0.5
        price[z] = DEFAULT_WEIGHTS.slot * sum(x < step for step in STANDARD_NORMAL) / 4
    return slots, price


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6))
def test_slots_and_their_prices_stay_what_their_definition_says(seed):
    dice = random.Random(seed)
    fleet, _ = cell(dice, dice.choice((4, 30)), watts=False)
    requests = queue(dice, 40)
    vectors, of = classes_of(requests)
    mix = shapes_of(requests)
    packer = Packer(fleet, vectors, tables_for(fleet, mix, "tailrace"), steps=dice.choice((8, 200)))
    for _ in range(6):
        run = packer.place(np.array(dice.choices(of.tolist(), k=8), np.int32))
        if dice.random() < 0.3:
            packer.undo(run, dice.randrange(8), 8)
        if dice.random() < 0.3:
            row = dice.randrange(len(fleet))
            packer.state.rows[row, HELD] ^= 1
            packer.touched(row)
        slots, price = plain_slots(packer.state, mix)
        assert packer.state.slots.tolist() == list(slots.values())
        assert packer.state.price.tolist() == pytest.approx(list(price.values()))
        anew = copy_state(packer.state)
        refresh_all(anew, packer.tables)
        for kept, counted in zip(packer.state, anew, strict=True):
            assert np.allclose(kept, counted)


def hosts(*idle):
    """Hosts of 8 GPUs with so many idle."""
    return Fleet.build(
        [
            {"host_id": i, "cpu_free": 96_000, "ram_free": 500_000, "gpus": 8, "gpu_free": [0] * (8 - n) + [1000] * n}
            | {"gpu_active": (1 << 8 - n) - 1}
            for i, n in enumerate(idle)
        ]
    )


FOURS = [Shape(8000, 8192.0, 1, 1000, 0, 92), Shape(32_000, 32_768.0, 4, 1000, 0, 8)]


def test_the_last_slots_are_left_to_those_who_need_them():
    one, four = Request(job=1, gpus=1, cpu=8000), Request(job=2, gpus=4, cpu=32_000)
    only_cpu, much = Request(job=3, gpus=0, cpu=60_000), Request(job=4, gpus=0, cpu=70_000)
    fleet = hosts(4, 5, *[3] * 30)
    scores = {}
    for slot in (0.0, 600.0):
        tables = tables_for(fleet, FOURS, "tailrace", DEFAULT_WEIGHTS._replace(slot=slot))
        state = Packer(fleet, classes_of([one])[0], tables).state
        assert (state.slots[4], state.price[4]) == (2, slot)
        requests = [request_vector(r) for r in (one, four, only_cpu, much)]
        scores[slot] = np.array([[score_host(h, q, state, tables)[0] for h in (0, 1)] for q in requests]) / TABLE_SCALE
    lost = scores[0.0] - scores[600.0]
    assert lost[0].tolist() == [600, 0]  # one GPU of four breaks a slot, one of five does not
    assert lost[1].tolist() == [600, 600]  # who needs it pays as much everywhere
    assert lost[2].tolist() == [0, 0]
    assert lost[3].tolist() == [600, 600]  # four GPUs without the CPU to serve them are no slot
    plenty = hosts(*[8] * 40)
    assert Packer(plenty, classes_of([one])[0], tables_for(plenty, FOURS, "tailrace")).state.price[4] == 0
    assert not len(tables_for(plenty, FOURS[:1], "tailrace").slot_size)


def test_a_request_too_rare_for_the_typical_shapes_still_counts():
    rows = [(4000, 100, 1, 1000, 0, 970), (64_000, 900, 8, 1000, 0, 20), (32_000, 400, 4, 1000, 0, 10)]
    tables = make_tables(mix_of(rows), np.ones((64, 17)), 1e9, 1.0, 1.0)
    assert len(tables.weight) == 1
    assert tables.slot_size.tolist() == [4, 8]
    assert tables.slot_rate * 1_170_000 == pytest.approx([2 * 20 + 10, 20])
    assert tables.slot_cpu == (20 * 64_000 + 10 * 32_000) // 200


def test_a_price_that_changes_reaches_classes_that_are_seldom_asked_for():
    """Every decision must be the one that a table filled anew would make, while prices go up and down."""
    dice = random.Random(11)
    fleet = hosts(*[8] * 40)
    requests = [
        Request(job=i, cpu=dice.choice((500, 4000)) * n, gpus=n, gpu_milli=milli)
        for i, (n, milli) in enumerate(dice.choices([(1, 1000), (1, 500), (4, 1000), (8, 1000)], [20, 10, 3, 1], k=400))
    ]
    vectors, of = classes_of(requests)
    tables = tables_for(fleet, shapes_of(requests), "tailrace")
    lazy, eager = (Packer(fleet, vectors, tables, steps=500) for _ in range(2))
    prices = set()
    for i in range(len(of)):
        one = lazy.place(of[i : i + 1])
        eager.watts_returned()
        assert eager.place(of[i : i + 1]).host[0] == one.host[0]
        prices.add(tuple(lazy.state.price))
    assert len(prices) > 4


@pytest.mark.parametrize("seed", [7001, 7002])
def test_no_more_requests_for_several_gpus_are_lost_than_fgd_loses(seed):
    """On a list and with seeds that chose nothing: fewer hosts for them, so that slots run short early."""
    nodes, trace = traces.generate(150, (seed,))
    pods = trace.pods.copy()
    several = np.random.default_rng(seed).random(len(pods)) < 0.04
    pods[several & (pods[:, 2] == 1), 2:4] = (4, 1000)
    arrivals, _, _ = protocol.order(pods, nodes.gpu_total, seed, len(nodes))
    trace = traces.Trace("several", pods, (), {seed: (arrivals, list(range(len(nodes))))})
    fgd, ours = (packing.play(nodes, trace, seed, packer, audit=True) for packer in ("fgd", "tailrace"))
    assert ours.refused_fitting == 0
    assert ours.multi_drops <= fgd.multi_drops
    assert sum(ours.at) >= sum(fgd.at)
