"""The power ledger's arithmetic: exact sums, refusals that name their node, sheds that suffice, and no watt granted on a promise."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.core import power
from scheduler.core.power import HOST, MINER, Load, Miners, NodeSpec, PowerError, PowerTree, Sample

pytestmark = pytest.mark.serverless
BOUNDED = settings(max_examples=60, deadline=None, derandomize=True)


def site(site_cap=10_000_000, pdu_cap=200_000, pdus=4, metering="meter"):
    return PowerTree.of(
        [
            NodeSpec("site", None, site_cap, fixed_w=50_000, overhead_gpu_permille=1250, overhead_miner_permille=1040),
            *(NodeSpec(f"b{b}", "site", site_cap // 2, metering=metering) for b in range(2)),
            *(NodeSpec(f"p{p}", f"b{p % 2}", pdu_cap, metering=metering) for p in range(pdus)),
        ]
    )


HOST_W = {"gpus": 8, "standby_w": 60, "parked_w": 1800, "base_w": 4600, "gpu_min_w": 200, "gpu_max_w": 700}


@pytest.mark.parametrize(
    ("state", "watts"),
    [
        ({"active_gpus": 0, "cap_control": True, "powered": False}, 60),
        ({"active_gpus": 0, "cap_control": True}, 1800),
        ({"active_gpus": 0, "cap_control": True, "cpu_only": True}, 4600 + 8 * 200),
        ({"active_gpus": 3, "cap_control": True}, 4600 + 3 * 700 + 5 * 200),
        ({"active_gpus": 8, "cap_control": True}, 10_200),
        ({"active_gpus": 0, "cap_control": False}, 10_200),
        ({"active_gpus": 0, "cap_control": False, "powered": False}, 10_200),
    ],
)
def test_host_watts_by_power_state(state, watts):
    assert power.host_reserved_w(**HOST_W, **state) == watts


def test_host_cannot_have_more_active_gpus_than_gpus():
    with pytest.raises(PowerError):
        power.host_reserved_w(**HOST_W, active_gpus=9, cap_control=True)


@pytest.mark.parametrize(
    ("commanded", "confirmed", "measured", "age", "watts"),
    [
        (80, 3500, 3450, 5, 3500),  # a sleep command, not confirmed
        (80, 80, 75, 5, 80),
        (3500, 80, 75, 5, 3500),  # a wake counts at once
        (3500, 3500, 4100, 5, 4100),  # draws more than it says
        (80, 80, 3400, 5, 3400),  # booted by itself
        (80, 80, 75, 61, 3600),  # stale: the top mode's nameplate
        (80, 80, None, None, 3600),
        (None, None, None, None, 3600),
        (None, 80, 75, 5, 3600),
        (80, None, 75, 5, 3600),
        (80, 80, 4100, 900, 4100),  # stale, but it did draw that once
        (80, 80, 75, -5, 3600),  # a clock that runs ahead is no proof of freshness
    ],
)
def test_miner_watts_are_the_most_of_what_it_may_draw(commanded, confirmed, measured, age, watts):
    assert power.miner_reserved_w(commanded, confirmed, measured, age, 3600) == watts


def test_margin_follows_metering_and_the_largest_unconfirmed_group():
    assert [power.margin_w(1_000_001, how) for how in ("meter", "firmware", "nameplate")] == [20_001, 80_001, 150_001]
    assert power.margin_w(1_000_000, "meter", 35_000) == 35_000
    with pytest.raises(PowerError):
        power.margin_w(1, "guess")
    tree = site()
    groups = [[(3, MINER, 10_000), (4, MINER, 5_000)], [(3, MINER, 12_000)]]
    margins = dict(zip(tree.keys, power.margins_w(tree, groups).tolist(), strict=True))
    assert margins["p0"] == 12_000  # the larger of the two groups under it
    assert margins["p2"] == 4_000  # the share of its metering
    assert margins["b1"] == 100_000
    assert margins["site"] == 200_000


@st.composite
def loaded_sites(draw):
    tree = site(site_cap=draw(st.integers(200_000, 900_000)), pdu_cap=draw(st.integers(50_000, 200_000)))
    devices = draw(
        st.lists(st.tuples(st.integers(3, 6), st.sampled_from([HOST, MINER]), st.integers(0, 12_000)), max_size=30)
    )
    return tree, devices


def by_hand(tree, devices, n):
    """The invariant's left side at one node, summed device by device."""
    return sum(w * int(tree.k[n, kind]) for node, kind, w in devices if n in tree.paths[node])


@BOUNDED
@given(loaded_sites(), st.integers(3, 6), st.sampled_from([HOST, MINER]), st.integers(1, 60_000))
def test_admissible_is_the_invariant_and_names_the_first_node(drawn, node, kind, delta):
    tree, devices = drawn
    load = Load.of(tree, *(zip(*devices, strict=True) if devices else ([], [], [])))
    margins = power.margins_w(tree)
    free = power.free_mw(tree, load, margins)
    for n in range(len(tree.keys)):
        assert free[n] == 1000 * int(tree.cap_w[n] - tree.fixed_w[n] - margins[n]) - by_hand(tree, devices, n)
    refused = power.admissible(tree, free, node, delta, kind)
    after = [*devices, (node, kind, delta)]
    broken = [
        tree.keys[n]
        for n in tree.paths[node]
        if by_hand(tree, after, n) + 1000 * int(tree.fixed_w[n] + margins[n]) > 1000 * int(tree.cap_w[n])
    ]
    assert (refused.node if refused else None) == (broken[0] if broken else None)
    need = power.shortfall_mw(tree, free, node, delta, kind)
    assert (need > 0).any() == bool(refused)
    assert power.admissible(tree, free + need, node, delta, kind) is None
    assert power.admissible(tree, free, node, -delta, kind) is None
    again = load.plus(tree, node, kind, delta)
    assert (again.watts == Load.of(tree, *zip(*after, strict=True)).watts).all()


def test_a_curtailment_lowers_what_may_be_planned_not_the_cap():
    tree = PowerTree.of([NodeSpec("site", None, 1_000_000, limit_w=400_000), NodeSpec("p", "site", 300_000)])
    load = Load.of(tree, [1], [MINER], [250_000])
    margins = power.margins_w(tree)
    assert power.free_mw(tree, load, margins)[0] == (400_000 - 8_000 - 250_000) * 1000
    assert power.free_mw(tree, load, margins, physical=True)[0] == (1_000_000 - 8_000 - 250_000) * 1000


@pytest.mark.parametrize(
    "nodes",
    [
        [NodeSpec("a", "b", 1), NodeSpec("b", "a", 1)],
        [NodeSpec("a", "gone", 1)],
        [NodeSpec("a", None, -1)],
        [NodeSpec("a", None, 1, overhead_gpu_permille=900)],
        [NodeSpec("a", None, 1), NodeSpec("a", None, 2)],
        [NodeSpec("a", None, 1, metering="eye")],
    ],
)
def test_impossible_trees_are_refused(nodes):
    with pytest.raises(PowerError):
        PowerTree.of(nodes)


def test_children_may_stand_before_parents():
    tree = PowerTree.of([NodeSpec("p", "b", 1), NodeSpec("b", "s", 2), NodeSpec("s", None, 3)])
    assert [tree.keys[n] for n in tree.paths[tree.index["p"]]] == ["p", "b", "s"]
    assert tree.under(tree.index["b"]).sum() == 2


miner_rows = st.lists(st.tuples(st.integers(3, 6), st.integers(500, 4_000), st.integers(0, 400_000)), max_size=9)


@BOUNDED
@given(miner_rows, st.integers(0, 12_000), st.integers(0, 12_000), st.integers(0, 15_000))
def test_a_shed_suffices_under_every_node_or_says_what_is_missing(rows, at_pdu, at_building, at_site):
    tree, miners = site(), Miners.of(rows)
    need = np.zeros(len(tree.keys), np.int64)
    path = tree.paths[tree.index["p0"]]
    need[list(path)] = 1000 * np.array([at_pdu, at_building, at_site])
    shed = power.choose_shed(tree, miners, need)

    def freed(picks, n):
        return sum(rows[i][1] * int(tree.k[n, MINER]) for i in picks if n in tree.paths[rows[i][0]])

    for n in path:
        everything, missing = freed(range(len(rows)), n), max(0, int(need[n]) - freed(shed.picks, n))
        assert shed.missing_mw.get(tree.keys[n], 0) == missing
        assert missing == 0 or freed(shed.picks, n) == everything
    assert len(set(shed.picks)) == len(shed.picks)
    if not shed.missing_mw and need.any():
        goal = need + -(-need * power.OVER_PICK_PERMILLE // 1000)
        reachable = all(freed(range(len(rows)), n) >= goal[n] for n in path)
        for leave in shed.picks:  # nobody sleeps for nothing
            rest = [i for i in shed.picks if i != leave]
            assert not reachable or any(freed(rest, n) < goal[n] for n in path)


def test_a_shed_is_cheap_and_local():
    tree = site(pdus=2)
    # Cheap machines under the other PDU cannot help p0; under p0 the least $/W goes first.
    rows = [(4, 3000, 1)] * 5 + [(3, 3000, 90_000), (3, 3000, 30_000), (3, 3000, 60_000), (3, 3000, 45_000)]
    need = np.zeros(len(tree.keys), np.int64)
    need[tree.index["p0"]] = 5_500_000
    shed = power.choose_shed(tree, Miners.of(rows), need)
    assert shed.picks == (6, 8)
    need[tree.index["site"]] = 12_000_000  # what the site still lacks comes from the cheapest anywhere
    assert [rows[i][2] for i in power.choose_shed(tree, Miners.of(rows), need).picks] == [1, 1, 30_000, 45_000]


@BOUNDED
@given(miner_rows, st.integers(1, 12_000))
def test_a_shed_under_one_node_costs_at_most_one_machine_more_than_the_cheapest(rows, watts):
    tree, miners = site(), Miners.of(rows)
    need = np.zeros(len(tree.keys), np.int64)
    need[3] = 1000 * watts
    shed = power.choose_shed(tree, miners, need, over_pick_permille=0)
    local = [i for i, row in enumerate(rows) if row[0] == 3]
    subsets = [some for r in range(len(local) + 1) for some in combinations(local, r)]
    best = min(
        (sum(rows[i][2] for i in some) for some in subsets if sum(rows[i][1] for i in some) >= watts), default=None
    )
    assert (best is None) == bool(shed.missing_mw)
    if best is not None:
        assert sum(rows[i][2] for i in shed.picks) <= best + max(rows[i][2] for i in local)


def test_shed_order_is_least_money_per_watt_then_fewest_commands():
    miners = Miners.of([(3, 3000, 30_000), (3, 1000, 10_000), (3, 3000, 3_000), (3, 0, 5)])
    assert power.shed_order(miners).tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        ([(104, 70), (108, 60)], ""),
        ([(104, 525), (108, 525)], ""),  # exactly 15 % of 3500
        ([(104, 526), (108, 60)], "acknowledged_no_drop"),
        ([(104, 60), (108, 3400)], "acknowledged_no_drop"),  # and came back
        ([(90, 60), (108, 60)], "awaiting_sample"),  # one of them is older than the command
        ([(100, 60), (108, 60)], "awaiting_sample"),  # read in the second of the command: not after it
        ([(108, 60), (108, 60)], "awaiting_sample"),  # one reading told twice
        ([(90, 60)], "unreachable"),
        ([], "unreachable"),
        ([(104, 60), (200, 60)], "awaiting_sample"),  # a reading from the future does not count
    ],
)
def test_an_acknowledgement_is_not_a_watt(samples, said):
    given_samples = [Sample(at, watts) for at, watts in samples]
    assert power.confirmed_drop(given_samples, 3500, since=100, now=110) == said


def test_old_readings_confirm_nothing():
    samples = [Sample(104, 60), Sample(108, 60)]
    assert power.confirmed_drop(samples, 3500, since=100, now=168, fresh_s=60) == "awaiting_sample"
    assert power.confirmed_drop(samples, 3500, since=100, now=169, fresh_s=60) == "stale_telemetry"


@BOUNDED
@given(
    st.lists(st.tuples(st.integers(3, 6), st.integers(500, 6_000), st.just(0)), max_size=60), st.integers(1000, 1500)
)
def test_no_wake_group_exceeds_a_step_at_any_node(rows, inrush):
    tree, miners = site(pdu_cap=250_000), Miners.of(rows)
    step = power.margins_w(tree)
    groups = power.staggered_wake_groups(tree, miners, range(len(rows)), inrush_permille=inrush)
    assert sorted(i for group in groups for i in group) == list(range(len(rows)))
    for group in groups:
        for n in range(len(tree.keys)):
            surge = sum(rows[i][1] * int(tree.k[n, MINER]) * inrush for i in group if n in tree.paths[rows[i][0]])
            assert surge <= int(step[n]) * 1_000_000 or len(group) == 1


def test_groups_fill_in_the_order_given():
    tree = site(pdu_cap=250_000)  # a step of 5 kW at a PDU
    groups = power.staggered_wake_groups(
        tree, Miners.of([(3, 3000, 0), (3, 3000, 0), (4, 3000, 0), (3, 2000, 0)]), [0, 1, 2, 3]
    )
    assert groups == ((0, 2), (1, 3))


def test_over_cap_reacts_by_degree_deepest_first():
    tree = site()
    meters = {"site": (9_600_000, 3), "p0": (200_001, 3), "p1": (190_000, 3), "p2": (190_001, 3), "b0": (1, 99)}
    assert [(r.node, r.action, r.shed_mw) for r in power.over_cap(tree, meters)] == [
        ("p0", "trip", 200_001_000 - 186_000_000),
        ("p2", "shed", 190_001_000 - 186_000_000),
        ("b0", "freeze", 0),
        ("site", "shed", 300_000_000),
    ]
