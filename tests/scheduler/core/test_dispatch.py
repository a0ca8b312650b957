"""Dispatch against brute force, a plain-Python twin and its LP bound; caps, dwell and change limits on small sites."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.core import dispatch, dispatch_kernels
from scheduler.core.dispatch import DispatchError, Fleet, Prices
from scheduler.core.dispatch_kernels import KEYS
from scheduler.core.economics import ZeroFeedError
from scheduler.core.power import HOST, Load, NodeSpec, PowerTree, margins_w

pytestmark = pytest.mark.serverless
BOUNDED = settings(max_examples=60, deadline=None, derandomize=True)
PRICES = Prices(39_530_000, 45_000_000, pool_fee_ppm=10_000, pue_permille=1040)
P0, P1, P2 = 3, 4, 2  # positions in `small_tree`: parents stand first
LADDER = [(60, 0), (1000, 45_000), (1800, 100_000), (2600, 150_000), (3500, 190_000)]


def small_tree(caps=(10**6, 10**6, 10**6, 10**6)):
    site, left, right, third = caps
    return PowerTree.of(
        [
            NodeSpec("site", None, site, overhead_miner_permille=1040),
            NodeSpec("b", "site", 10**6),
            NodeSpec("p0", "b", left),
            NodeSpec("p1", "b", right),
            NodeSpec("p2", "site", third),
        ]
    )


def budget_of(tree):
    return 1000 * tree.cap_w


@st.composite
def problems(draw, miners=5, steps=4):
    caps = draw(st.tuples(st.integers(500, 20_000), *[st.integers(500, 9_000)] * 3))
    tree = small_tree(caps)
    ladders = []
    for _ in range(draw(st.integers(1, 4))):
        watts = sorted(draw(st.sets(st.integers(100, 4_000), min_size=0, max_size=steps)))
        ladders.append([(draw(st.integers(0, 80)), 0), *((w, draw(st.integers(0, 250_000))) for w in watts)])
    n = draw(st.integers(1, miners))
    nodes = [draw(st.sampled_from([P0, P1, P2])) for _ in range(n)]
    of = [draw(st.integers(0, len(ladders) - 1)) for _ in range(n)]
    current = [draw(st.integers(0, len(ladders[ladder]) - 1)) for ladder in of]
    return tree, Fleet.of(nodes, of, ladders), np.array(current, np.int16)


def excess(tree, fleet, modes, budget):
    """mW over budget at each node, machine by machine; nothing of the module's own sums."""
    over = {}
    for n, key in enumerate(tree.keys):
        used = sum(
            int(fleet.watts[fleet.off[fleet.ladder[i]] + modes[i]]) * int(tree.k[n, 1])
            for i in range(len(fleet.node))
            if n in tree.paths[fleet.node[i]]
        )
        over[key] = used - int(budget[n])
    return over


def holds(tree, fleet, plan, budget):
    """Every cap is held, or is named as over with everything below it asleep."""
    for n, key in enumerate(tree.keys):
        if excess(tree, fleet, plan.modes, budget)[key] > 0:
            assert key in plan.over
            assert all(plan.modes[i] == 0 for i in range(len(fleet.node)) if n in tree.paths[fleet.node[i]])


def brute(tree, fleet, values, budget, choices=None):
    best = None
    sizes = [int(fleet.off[x + 1] - fleet.off[x]) for x in fleet.ladder]
    for modes in product(*(choices or [range(size) for size in sizes])):
        if max(excess(tree, fleet, modes, budget).values()) <= 0:
            worth = sum(int(values[fleet.off[x] + m]) for x, m in zip(fleet.ladder, modes, strict=True))
            best = worth if best is None else max(best, worth)
    return best


@BOUNDED
@given(problems(miners=4, steps=3))
def test_plans_hold_every_cap_and_are_near_the_best_there_is(problem):
    tree, fleet, current = problem
    budget, values = budget_of(tree), dispatch.mode_values(fleet, PRICES)
    plan = dispatch.plan_dispatch(tree, fleet, PRICES, current, budget_mw=budget)
    holds(tree, fleet, plan, budget)
    assert plan.changes == sum(plan.modes != current)
    assert plan.value_uusd_h == values[fleet.at(plan.modes)].sum()
    best = brute(tree, fleet, values, budget)
    if best is None:
        assert plan.over
        return
    assert plan.over == ()
    bound = dispatch.lp_bound_uusd_h(tree, fleet, values, budget)
    assert plan.value_uusd_h <= best <= bound * (1 + 1e-12) + 1
    # A whole step is lost at most once per tight node.
    step = max(
        (int(np.diff(values[a:b], prepend=0).max()) for a, b in zip(fleet.off, fleet.off[1:], strict=False)), default=0
    )
    assert bound - plan.value_uusd_h <= len(tree.keys) * max(step, int(np.ptp(values))) + 1


def hull_by_search(entries):
    """Steps (to, watts, slope) from asleep: always the steepest of all that lies above, found by looking at every entry."""
    at, steps = 0, []
    while slopes := [((v - entries[at][1]) / (w - entries[at][0]), m) for m, (w, v) in enumerate(entries) if m > at]:
        slope, to = max(slopes)
        if slope <= 0:
            break
        steps.append((to, entries[to][0] - entries[at][0], slope))
        at = to
    return steps


@BOUNDED
@given(problems(miners=6, steps=8))
def test_steps_are_the_upper_hull_of_each_ladder(problem):
    _, fleet, current = problem
    values = dispatch.mode_values(fleet, PRICES)
    free = np.zeros(fleet.node.shape, np.bool_)
    first, mode, more, per_watt = dispatch_kernels.steps_kernel(
        fleet.off, fleet.ladder, fleet.watts, values, current, current, free, dispatch_kernels.SLOW, 0
    )
    for i, ladder in enumerate(fleet.ladder):
        span, own = slice(fleet.off[ladder], fleet.off[ladder + 1]), slice(first[i], first[i + 1])
        expected = hull_by_search(list(zip(fleet.watts[span].tolist(), values[span].tolist(), strict=True)))
        assert list(zip(mode[own].tolist(), more[own].tolist(), per_watt[own].tolist(), strict=True)) == expected


def test_steps_are_sorted_to_the_last_of_22_bits():
    rng = np.random.default_rng(5)
    first = np.arange(0, 6001, 3, dtype=np.int32)
    per_watt = rng.uniform(1.0, 90.0, 6000).reshape(-1, 3)
    per_watt = -np.sort(-per_watt, axis=1).ravel()
    current = rng.integers(0, 2, 2000).astype(np.int16)
    for tier, levels in ((dispatch_kernels.SLOW, KEYS), (dispatch_kernels.FAST, KEYS // 2)):
        order = dispatch_kernels.sort_kernel(first, per_watt, current, tier)
        scale = (levels - 1) / (per_watt.max() - per_watt.min())
        late = np.repeat(current == 0, 3) if tier else np.zeros(6000, bool)
        ranked = sorted(range(6000), key=lambda s: (late[s], levels - int((per_watt[s] - per_watt.min()) * scale), s))
        assert order.tolist() == [s // 3 for s in ranked]


def twin(tree, fleet, values, budget):
    """The same greedy in plain Python: hulls by search, sorted(), dictionaries; no line shared with the kernels."""
    slack = {n: int(budget[n]) for n in range(len(tree.keys))}
    miners = range(len(fleet.node))

    def entry(i, m):
        at = fleet.off[fleet.ladder[i]] + m
        return int(fleet.watts[at]), int(values[at])

    def draw(i, watts):
        for n in tree.paths[fleet.node[i]]:
            slack[n] -= watts * int(tree.k[n, 1])

    steps = []
    for i in miners:
        draw(i, entry(i, 0)[0])
        at, nth = 0, 0
        while True:
            w0, v0 = entry(i, at)
            later = range(at + 1, int(fleet.off[fleet.ladder[i] + 1] - fleet.off[fleet.ladder[i]]))
            slopes = [((entry(i, m)[1] - v0) / (entry(i, m)[0] - w0), m) for m in later]
            if not slopes or max(slopes)[0] <= 0:
                break
            slope, to = max(slopes)
            steps.append((slope, i, nth, at, to))
            at, nth = to, nth + 1
    low, high = min((s[0] for s in steps), default=0), max((s[0] for s in steps), default=0)
    scale = (KEYS - 1) / (high - low) if high > low else 0.0
    steps.sort(key=lambda s: (KEYS - 1 - int((s[0] - low) * scale), s[1], s[2]))
    modes, closed = [0] * len(miners), set()

    def fits(i, watts):
        return all(slack[n] >= watts * int(tree.k[n, 1]) for n in tree.paths[fleet.node[i]])

    for _, i, _, at, to in steps:
        more = entry(i, to)[0] - entry(i, at)[0]
        if i not in closed and fits(i, more):
            modes[i] = to
            draw(i, more)
        else:
            closed.add(i)
    for i in miners:
        size = int(fleet.off[fleet.ladder[i] + 1] - fleet.off[fleet.ladder[i]])
        w0, v0 = entry(i, modes[i])
        options = [(entry(i, m)[1], -m) for m in range(modes[i] + 1, size) if fits(i, entry(i, m)[0] - w0)]
        if options and max(options)[0] > v0:
            to = -max(options)[1]
            draw(i, entry(i, to)[0] - w0)
            modes[i] = to
    return modes


@BOUNDED
@given(problems(miners=12, steps=5))
def test_the_kernels_do_what_plain_python_does(problem):
    tree, fleet, current = problem
    budget, values = budget_of(tree), dispatch.mode_values(fleet, PRICES)
    plan = dispatch.plan_dispatch(tree, fleet, PRICES, current, budget_mw=budget)
    if not plan.over:
        assert plan.modes.tolist() == twin(tree, fleet, values, budget)


@BOUNDED
@given(problems(miners=12, steps=5), st.integers(0, 2), st.integers(0, 10**6))
def test_compiled_and_interpreted_kernels_agree(problem, tier, wear):
    tree, fleet, current = problem
    values = dispatch.mode_values(fleet, PRICES)
    top = (np.diff(fleet.off)[fleet.ladder] - 1).astype(np.int16)
    free = np.zeros(fleet.node.shape, np.bool_)
    ask = (fleet.off, fleet.ladder, fleet.watts, values, current, top, free, tier, wear)
    compiled = dispatch_kernels.steps_kernel(*ask)
    plain = dispatch_kernels.steps_kernel.py_func(*ask)
    for a, b in zip(compiled, plain, strict=True):
        np.testing.assert_array_equal(a, b)
    first, mode, more, per_watt = compiled
    order = dispatch_kernels.sort_kernel(first, per_watt, current, tier)
    np.testing.assert_array_equal(order, dispatch_kernels.sort_kernel.py_func(first, per_watt, current, tier))
    results = []
    for kernel in (dispatch_kernels.accept_kernel, dispatch_kernels.accept_kernel.py_func):
        slack, modes = tree.cap_w.copy(), np.zeros_like(current)
        kernel(tree.parent, slack, fleet.node, first, mode, more, order, modes)
        results.append((slack.tolist(), modes.tolist()))
    assert results[0] == results[1]


@BOUNDED
@given(problems(miners=8), st.integers(0, 8), st.lists(st.integers(0, 2), min_size=8, max_size=8))
def test_limits_and_dwell_are_kept_unless_a_cap_forbids(problem, limit, dwell):
    tree, fleet, current = problem
    budget = budget_of(tree)
    left = np.array(dwell[: len(current)])
    plan = dispatch.plan_dispatch(tree, fleet, PRICES, current, budget_mw=budget, change_limit=limit, dwell_left=left)
    holds(tree, fleet, plan, budget)
    if max(excess(tree, fleet, current, budget).values()) <= 0:  # nothing is forced
        assert plan.changes <= limit
        assert all(plan.modes[left > 0] == current[left > 0])
        values = dispatch.mode_values(fleet, PRICES)
        assert plan.value_uusd_h >= values[fleet.at(current)].sum()


@BOUNDED
@given(problems(miners=8))
def test_the_fast_tier_moves_whole_machines_and_never_trades_one_for_another(problem):
    tree, fleet, current = problem
    budget = budget_of(tree)
    plan = dispatch.plan_fast(tree, fleet, PRICES, current, budget_mw=budget)
    holds(tree, fleet, plan, budget)
    top = np.diff(fleet.off)[fleet.ladder] - 1
    for i, (then, now) in enumerate(zip(plan.modes, current, strict=True)):
        assert then in ({0, now} if now > 0 else {0, top[i]})
    values = dispatch.mode_values(fleet, PRICES)
    gain = values[fleet.at(current)] - values[fleet.off[fleet.ladder]]
    if max(excess(tree, fleet, current, budget).values()) <= 0:
        assert all(plan.modes[i] == now for i, now in enumerate(current) if now > 0 and gain[i] > 0)


def test_fast_sheds_the_least_money_per_watt_under_the_right_node():
    tree = small_tree((10**6, 7_500, 10**6, 10**6))
    poor, good = [(60, 0), (3500, 120_000)], [(60, 0), (3500, 200_000)]
    fleet = Fleet.of([P0, P0, P0, P1], [1, 0, 1, 0], [poor, good])
    plan = dispatch.plan_fast(tree, fleet, PRICES, [1, 1, 1, 1], budget_mw=budget_of(tree))
    assert plan.modes.tolist() == [1, 0, 1, 1]  # p1's equally poor machine could not help p0
    again = dispatch.plan_fast(small_tree(), fleet, PRICES, plan.modes, budget_mw=budget_of(small_tree()))
    assert again.modes.tolist() == [1, 1, 1, 1]
    held = dispatch.plan_fast(
        small_tree(), fleet, PRICES, plan.modes, budget_mw=budget_of(small_tree()), dwell_left=[0, 60, 0, 0]
    )
    assert held.modes.tolist() == [1, 0, 1, 1]


def test_below_break_even_a_machine_sleeps_and_wear_keeps_it_from_fluttering():
    tree, fleet = small_tree(), Fleet.of([P0, P1], [0, 0], [LADDER])
    dear = Prices(39_530_000, 120_000_000)
    assert dispatch.plan_dispatch(tree, fleet, dear, [4, 4], budget_mw=budget_of(tree)).modes.tolist() == [0, 0]
    best = dispatch.plan_dispatch(tree, fleet, PRICES, [0, 0], budget_mw=budget_of(tree))
    assert best.modes.tolist() == [4, 4]
    values = dispatch.mode_values(fleet, PRICES)
    worn = Prices(39_530_000, 45_000_000, 10_000, 1040, wear_uusd_h=int(values[4] - values[3]) + 1)
    assert dispatch.plan_dispatch(tree, fleet, worn, [3, 0], budget_mw=budget_of(tree)).modes.tolist() == [3, 4]


def test_equal_machines_change_a_few_at_a_time():
    tree, fleet = small_tree(), Fleet.of([P0, P1] * 20, [0] * 40, [LADDER])
    modes = np.zeros(40, np.int16)
    for awake in (7, 14, 21, 28, 35, 40):
        plan = dispatch.plan_dispatch(tree, fleet, PRICES, modes, budget_mw=budget_of(tree), change_limit=7)
        modes = plan.modes
        assert (modes == 4).sum() == awake


def test_a_cap_overrides_dwell_and_limit():
    tree, fleet = small_tree((10**6, 4_000, 10**6, 10**6)), Fleet.of([P0, P0, P1], [0, 0, 0], [LADDER])
    plan = dispatch.plan_dispatch(
        tree, fleet, PRICES, [4, 4, 1], budget_mw=budget_of(tree), dwell_left=[9, 9, 9], change_limit=0
    )
    assert plan.over == ()
    assert max(excess(tree, fleet, plan.modes, budget_of(tree)).values()) <= 0
    assert plan.modes[2] == 1  # p1 has no part in it
    assert plan.modes[:2].sum() > 0  # and p0 is not emptied for it
    free = dispatch.plan_dispatch(tree, fleet, PRICES, [4, 4, 1], budget_mw=budget_of(tree), dwell_left=[9, 9, 9])
    assert free.modes[2] == 1  # nor does it lose its dwell time to p0's trouble


def test_a_part_of_the_changes_takes_raises_and_lowerings_in_turn():
    fleet = Fleet.of([P0] * 6, [0] * 6, [LADDER])
    values = dispatch.mode_values(fleet, PRICES)
    now, then = np.array([0, 0, 0, 4, 4, 4], np.int16), np.array([4, 4, 4, 0, 0, 0], np.int16)
    nobody = np.zeros(6, np.bool_)
    assert dispatch._part(fleet, values, now, then, nobody, 4).tolist() == [True, True, False, True, True, False]
    forced = np.array([False, False, True, False, False, False])
    assert dispatch._part(fleet, values, now, then, forced, 2).sum() == 2
    assert dispatch._part(fleet, values, now, then, forced, 0).tolist() == forced.tolist()


def test_lowerings_are_commanded_before_raises():
    fleet = Fleet.of([P0] * 4, [0, 0, 0, 0], [LADDER])
    values = dispatch.mode_values(fleet, PRICES)
    assert dispatch.ordered_changes(fleet, values, [0, 4, 2, 3], [4, 0, 2, 1]).tolist()[2:] == [0]
    assert set(dispatch.ordered_changes(fleet, values, [0, 4, 2, 3], [4, 0, 2, 1]).tolist()[:2]) == {1, 3}


def test_hosts_fixed_loads_and_margins_come_off_the_budget_first():
    tree = PowerTree.of([NodeSpec("site", None, 100_000, limit_w=90_000, fixed_w=5_000, overhead_gpu_permille=1250)])
    load = Load.of(tree, [0], [HOST], [10_000])
    assert dispatch.miner_budget_mw(tree, load, margins_w(tree)).tolist() == [
        1000 * (90_000 - 5_000 - 1_800) - 12_500_000
    ]


@pytest.mark.parametrize(
    "ask",
    [
        lambda: Fleet.of([0], [0], [[(60, 0), (60, 5)]]),
        lambda: Fleet.of([0], [1], [[(60, 0)]]),
        lambda: Fleet.of([0, 0], [0], [[(60, 0)]]),
        lambda: Fleet.of([0], [0], [[]]),
        lambda: Fleet.of([0], [0], [LADDER]).at(np.array([5])),
        lambda: dispatch.plan_dispatch(
            small_tree(), Fleet.of([0], [0], [LADDER]), PRICES, [9], budget_mw=budget_of(small_tree())
        ),
    ],
)
def test_impossible_fleets_are_refused(ask):
    with pytest.raises(DispatchError):
        ask()


def test_no_plan_is_made_on_a_hashprice_of_zero():
    tree, fleet = small_tree(), Fleet.of([P0], [0], [LADDER])
    with pytest.raises(ZeroFeedError):
        dispatch.plan_dispatch(tree, fleet, Prices(0, 45_000_000), [0], budget_mw=budget_of(tree))
