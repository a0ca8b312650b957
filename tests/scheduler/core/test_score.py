import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.core import kernels
from scheduler.core.fit_kernels import NODE, choose_kernel, delta_kernel, request_vector, static_kernel, watts_bind
from scheduler.core.pack import Packer, bits, classes_of, make_state
from scheduler.core.score import (
    MixEstimate,
    Shape,
    cut,
    hole_prices,
    hole_values,
    make_tables,
    mix_of,
    shapes_of,
    tables_for,
)
from scheduler.core.state import NO, fragmentation, score_host
from scheduler.core.types import Fleet, Request
from tests.scheduler.core.cells import cell, queue

pytestmark = pytest.mark.serverless


def plain_fragmentation(fleet, h, shapes):
    """F x total weight, from the definition: free milli-GPU that a shape of the mix could not use, summed over the mix."""
    free = [int(g) for g in fleet.gpu_free[h][: fleet.gpu_count[h]]]
    lost = 0
    for s in shapes:
        model = max(int(fleet.gpu_model[h]), 0)
        if (
            not s.gpus
            or fleet.cpu_free[h] < s.cpu
            or (s.models and not s.models >> model & 1)
            or sum(g >= s.gpu_milli for g in free) < s.gpus
        ):
            lost += s.weight * sum(free)
        else:
            lost += s.weight * sum(g for g in free if g < s.gpu_milli)
    return lost


def random_shapes(dice):
    rows = [(r.cpu, r.ram, r.gpus, r.gpu_milli if r.gpus else 0, r.models, r.replicas) for r in queue(dice, 30)]
    return mix_of(rows)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_fragmentation_by_tables_is_the_definition(seed):
    dice = random.Random(seed)
    fleet, _ = cell(dice, 6, watts=False)
    for h in range(len(fleet)):
        for g in range(int(fleet.gpu_count[h])):
            fleet.gpu_free[h, g] = dice.choice((0, 90, 250, 400, 600, 1000))
    shapes = random_shapes(dice)
    tables, state = tables_for(fleet, shapes, "fgd"), make_state(fleet)
    for h in range(len(fleet)):
        assert fragmentation(state.rows[h], state.gfree[h], tables) == plain_fragmentation(fleet, h, cut(shapes))


def plain_best(packer, k):
    """(host, score) by looking at every host: what the table and its arg-max must agree with."""
    best = (-1, NO)
    for h in range(len(packer.state.rows)):
        q = packer.classes[k]
        if static_kernel(packer.state.rows[h], q):
            continue
        value, mask = score_host(h, q, packer.state, packer.tables)
        if value <= best[1]:
            continue
        reason, fallback = choose_kernel(
            packer.state.rows[h], packer.state.gfree[h], packer.state.vfree[h], packer.state.nvl[h], q
        )
        s = packer.state
        for m in (mask, fallback) if mask else (fallback,):
            delta = delta_kernel(s.rows[h], m)
            if not reason and watts_bind(s.rows[h, NODE], delta, s.parent, s.k, s.budget) < 0:
                best = (h, value)
                break
    return best


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["tailrace", "fgd", "best_fit"]))
def test_the_lazy_table_finds_what_a_full_scan_finds(seed, policy):
    dice = random.Random(seed)
    fleet, _ = cell(dice, dice.choice((3, 70, 150)), tight=dice.choice((0.2, 1.0)))
    requests = [r for r in queue(dice, 40) if r.replicas == 1]
    vectors, of = classes_of(requests)
    packer = Packer(fleet, vectors, tables_for(fleet, shapes_of(requests), policy), steps=dice.choice((8, 500)))
    for _ in range(60):
        k = int(dice.choice(of.tolist()))
        host, _ = plain_best(packer, k)
        run = packer.place(np.array([k], np.int32))
        assert run.host[0] == host
        if host >= 0 and dice.random() < 0.2:
            packer.undo(run, 0, 1)


def test_undo_restores_the_state_exactly():
    dice = random.Random(3)
    fleet, _ = cell(dice, 20)
    requests = queue(dice, 40)
    vectors, of = classes_of(requests)
    packer = Packer(fleet, vectors, tables_for(fleet, shapes_of(requests), "tailrace"), steps=100)
    before = [column.copy() for column in packer.state]
    run = packer.place(of)
    assert (run.host >= 0).sum() > 5
    packer.undo(run, 0, len(of))
    assert all((a == b).all() for a, b in zip(before, packer.state, strict=True))


def test_classes_share_slots_when_the_table_is_small():
    fleet = Fleet.build([{"host_id": i, "cpu_free": 90_000, "gpus": 8} for i in range(40)])
    requests = [Request(job=i, gpus=1, cpu=100 * (i % 7)) for i in range(200)]
    vectors, of = classes_of(requests)
    tables = tables_for(fleet, shapes_of(requests), "tailrace")
    wide = Packer(fleet, vectors, tables, steps=300)
    narrow = Packer(fleet, vectors, tables, steps=300)
    narrow.cache = narrow.cache._replace(
        tab=narrow.cache.tab[:2].copy(),
        b1=narrow.cache.b1[:2].copy(),
        b2=narrow.cache.b2[:2].copy(),
        class_of=narrow.cache.class_of[:2].copy(),
    )
    one, two = wide.place(of), narrow.place(of)
    assert (one.host == two.host).all()
    assert len({bits(int(m)) for m in one.mask}) > 1


def test_hole_prices_of_the_published_mix():
    # Shares of openb's default list in its typical mix; duals as the packing note gives them.
    assert hole_prices({500: 1.0}) == {500: 500.0}
    prices = hole_prices({600: 2.0, 400: 1.0, 300: 1.0})
    assert prices[600] + prices[400] == pytest.approx(1000)
    assert hole_prices({}) == {}


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.integers(1, 99).map(lambda v: 10 * v), st.integers(1, 500), min_size=1, max_size=12))
def test_hole_prices_are_dual_feasible_and_worth_what_the_lp_needs(demand):
    prices = hole_prices({v: float(n) for v, n in demand.items()})
    values = hole_values(prices)
    assert values[1000] <= 1000 + 1e-6
    assert all(values[v] >= p - 1e-6 for v, p in prices.items())
    assert (np.diff(values) >= -1e-9).all()
    # Weak duality: the GPUs needed are at least the milli asked for, and at most one GPU for each share.
    bound = sum(demand[v] * p for v, p in prices.items())
    assert sum(v * n for v, n in demand.items()) - 1e-6 <= bound <= 1000 * sum(demand.values()) + 1e-6


def test_typical_shapes_cover_and_merge_memory():
    rows = [(1000, 100, 1, 500, 0, 6), (1000, 300, 1, 500, 0, 2), (2000, 50, 2, 1000, 0, 3), (9000, 1, 1, 10, 0, 1)]
    mix = mix_of(rows)
    assert mix[0] == Shape(1000, 150.0, 1, 500, 0, 8)
    assert cut(mix, 0.9) == [Shape(1000, 150.0, 1, 500, 0, 8), Shape(2000, 50.0, 2, 1000, 0, 3)]


def test_the_estimated_mix_follows_what_arrives():
    mix = MixEstimate(half_life=50)
    for _ in range(500):
        mix.observe(1000, 10, 1, 500, 0)
    for _ in range(400):
        mix.observe(1000, 10, 1, 1000, 0)
    shapes = mix.shapes()
    assert shapes[0].gpu_milli == 1000
    assert sum(s.weight for s in shapes if s.gpu_milli == 500) < 0.01 * shapes[0].weight
    plain = MixEstimate()
    plain.observe(1, 2, 1, 500, 0, replicas=3)
    assert plain.shapes() == [Shape(1, 2.0, 1, 500, 0, 3)]


def test_spec_prices_protect_what_others_insist_on():
    capacity = np.zeros((64, 17))
    capacity[:2, 8] = 100
    shapes = [Shape(1000, 1.0, 1, 1000, 0b10, 1), Shape(1000, 1.0, 1, 1000, 0, 1)]
    spec = make_tables(shapes, capacity, 1e9, 1.0, 1.0).spec
    assert spec[1] == 1.0
    assert spec[0] == 0.0
    assert request_vector(Request(job=1, gpus=1))[6] == 1


def test_a_table_kept_up_lazily_places_as_one_filled_anew_for_each_decision():
    """Long enough for the sweep to work ahead of classes that are seldom asked for."""
    dice = random.Random(5)
    fleet = Fleet.build(
        [{"host_id": i, "cpu_free": dice.choice((64_000, 96_000)), "gpus": dice.choice((2, 4, 8))} for i in range(150)]
    )
    shapes = [(1, 1000), (1, 500), (1, 300), (2, 1000), (1, 810), (0, 1000), (4, 1000)]
    requests = [
        Request(job=i, cpu=dice.choice((500, 1000, 4000)), gpus=n, gpu_milli=milli)
        for i, (n, milli) in enumerate(dice.choices(shapes, [9, 9, 5, 1, 5, 4, 1], k=900))
    ]
    vectors, of = classes_of(requests)
    tables = tables_for(fleet, shapes_of(requests), "tailrace")
    lazy, eager = (Packer(fleet, vectors, tables, steps=1000) for _ in range(2))
    run = lazy.place(of)
    assert lazy.cache.meta[kernels.META_LOG] > 2 * kernels.LAG
    for i in range(len(of)):
        eager.watts_returned()
        one = eager.place(of[i : i + 1])
        assert (one.host[0], one.mask[0]) == (run.host[i], run.mask[i])
