"""The site's own loop: it only lowers, under the right node, and one rung at a time."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.safety import HostFacts, Memory, MinerFacts, Tree, decide

pytestmark = pytest.mark.serverless

NODES = [
    {"name": "site", "parent": None, "cap_w": 30_000, "overhead_miner_permille": 1050},
    {"name": "a", "parent": "site", "cap_w": 20_000},
    {"name": "b", "parent": "site", "cap_w": 20_000},
]


def fleet(**watts):
    """name -> (node, W) as miners that hash; `shed` of them sleep already."""
    return {name: MinerFacts(name, node, w, 25, shed=w <= 25) for name, (node, w) in watts.items()}


def look(meters, miners=None, hosts=None, order=(), memory=None, now=100.0, at=100.0):
    stamped = {name: (w, at) for name, w in meters.items()}
    return decide(
        Tree(NODES), order, stamped, miners or {}, hosts or {}, memory or Memory(), now, stale_s=15, settle_s=8
    )


def test_below_the_caps_nothing_happens():
    decision = look({"site": 28_000, "a": 15_000}, fleet(m1=("a", 3000)))
    assert not decision.holds(("a", "site"))
    assert not decision.shed
    assert not decision.no_wakes


def test_above_95_percent_wakes_stop_under_that_node_only():
    decision = look({"site": 20_000, "a": 19_100, "b": 900})
    assert decision.no_wakes == {"a"}
    assert not decision.holds(("a", "site")), "a grant of control is not a wake"


def test_sheds_in_controls_order_under_the_node_that_is_over():
    miners = fleet(m1=("a", 3000), m2=("b", 3000), m3=("a", 3000), m4=("a", 25))
    decision = look({"a": 21_000}, miners, order=["m2", "m4", "m3", "m1"])
    assert decision.shed == (("m3", "a"),), "not b's machine, not the one asleep, no more than needed"
    assert decision.holds(("a", "site"))


def test_a_node_over_its_cap_holds_what_it_carries_and_nothing_else():
    tree, over = Tree(NODES), look({"site": 29_000, "a": 21_000, "b": 900})
    assert [over.holds(tree.above(name)) for name in ("a", "b", "site")] == [True, False, False]
    assert over.holds(tree.above("nobody knows where")), "it may hang under the one that is over"
    over = look({"site": 31_000, "a": 900, "b": 900})
    assert [over.holds(tree.above(name)) for name in ("a", "b", "site")] == [True] * 3
    assert not look({"a": 900}).holds(tree.above("nobody knows where"))


def test_who_does_not_answer_is_told_nothing_and_another_sleeps_in_its_place():
    miners = fleet(m1=("a", 3000), m2=("a", 3000))
    miners["m1"] = replace(miners["m1"], answers=False)
    assert look({"a": 21_000}, miners, order=["m1", "m2"]).shed == (("m2", "a"),)


def test_why_nothing_is_raised_or_started():
    calm, path = look({"a": 900}), ("a", "site")

    def why(decision=calm, now=100.0, mode="auto", until=1_000.0, down=False):
        return decision.blocks(path, now, mode=mode, lease_until=until, hosts_down=down)

    assert why() == ""
    assert [why(mode=mode) for mode in ("hold", "shed", "off")] == ["waiting_mode"] * 3
    assert why(until=None) == "waiting_control", "before the first sync"
    assert (why(now=939.9), why(now=940.0)) == ("", "waiting_control"), "nothing begins in the last minute of the lease"
    assert why(look({"b": 900}, at=80.0)) == "waiting_meter", "also of a meter elsewhere at the site"
    assert why(down=True) == "waiting_hosts"
    assert why(look({"a": 21_000})) == "waiting_power"
    warm = look({"a": 19_100})
    assert (why(warm), warm.stops_wakes(path), warm.stops_wakes(("b", "site"))) == ("", True, False)


def test_what_a_pdu_sheds_also_counts_for_the_site():
    miners = fleet(m1=("a", 3000), m2=("b", 3000))
    decision = look({"site": 31_000, "a": 21_000}, miners, order=["m1", "m2"])
    assert decision.shed == (("m1", "a"),)


def test_the_next_rung_only_after_the_meter_had_time():
    miners, memory = fleet(m1=("a", 3000), m2=("a", 3000)), Memory()
    assert look({"a": 21_000}, miners, memory=memory).shed
    assert not look({"a": 21_000}, miners, memory=memory, now=104.0, at=104.0).shed
    assert not look({"a": 21_000}, miners, memory=memory, now=109.0, at=107.0).shed, "a reading of before its time"
    assert look({"a": 21_000}, miners, memory=memory, now=109.0, at=109.0).shed


def test_ladder_miners_then_limits_then_placements():
    hosts = {"h1": HostFacts("h1", "a", capped=False, placements=("plc_1", "plc_2"))}
    assert look({"a": 21_000}, fleet(m1=("a", 3000)), hosts).cap_hosts == ()
    assert look({"a": 21_000}, fleet(m1=("a", 25)), hosts).cap_hosts == (("h1", "a"),)
    capped = {"h1": HostFacts("h1", "a", capped=True, placements=("plc_1", "plc_2"))}
    decision = look({"a": 21_000}, fleet(m1=("a", 25)), capped)
    assert decision.cap_hosts == ()
    assert decision.evict == (("plc_1", "a"),), "half of them at a time"


def test_over_a_curtailments_limit_machines_sleep_and_jobs_are_left_to_control():
    """Whose job leaves for a grid call is a matter of contracts, which the site does not know; its copper carries them."""
    rows = [NODES[0], NODES[1] | {"limit_w": 8_000}, NODES[2]]
    hosts = {"h1": HostFacts("h1", "a", capped=False, placements=("plc_1",))}

    def decided(watts, miners):
        return decide(Tree(rows), (), {"a": (watts, 100.0)}, miners, hosts, Memory(), 100.0, stale_s=15, settle_s=8)

    found = decided(9_000, fleet(m1=("a", 3000)))
    assert (found.over, found.shed) == (("a",), (("m1", "a"),))
    assert found.holds(("a", "site"))
    assert decided(7_700, {}).no_wakes == {"a"}
    found = decided(9_000, fleet(m1=("a", 25)))
    assert (found.over, found.shed, found.cap_hosts, found.evict) == (("a",), (), (), ())
    assert decided(20_001, fleet(m1=("a", 25))).cap_hosts == (("h1", "a"),)


def test_an_announced_call_begins_at_its_hour_without_control():
    """And ends by itself; what it put to sleep stays so until control says otherwise."""
    rows = [NODES[0], NODES[1] | {"calls": [[200.0, 300.0, 8_000]]}, NODES[2]]

    def decided(now):
        return decide(
            Tree(rows), (), {"a": (9_000, now)}, fleet(m1=("a", 3000)), {}, Memory(), now, stale_s=15, settle_s=8
        )

    assert decided(199.0).shed == ()
    assert decided(200.0).shed == (("m1", "a"),)
    assert decided(300.0).over == ()


def test_a_stale_meter_stops_all_raising():
    decision = look({"a": 1_000}, now=120.0, at=100.0)
    assert decision.stale == ("a",)


@given(
    watts=st.lists(st.integers(25, 4000), min_size=1, max_size=12),
    under_a=st.lists(st.booleans(), min_size=12, max_size=12),
    over=st.integers(1, 9000),
    order=st.permutations(range(12)),
)
def test_sheds_enough_or_all_and_never_too_much(watts, under_a, over, order):
    miners = fleet(**{f"m{i}": ("a" if under_a[i] else "b", w) for i, w in enumerate(watts)})
    decision = look({"a": 20_000 + over}, miners, order=[f"m{i}" for i in order])
    chosen = [name for name, _ in decision.shed]
    assert all(miners[name].power_node == "a" and not miners[name].shed for name in chosen)
    gains = [miners[name].watts - 25 for name in chosen]
    wanted = over + 200
    able = sum(m.watts - 25 for m in miners.values() if m.power_node == "a")
    assert sum(gains) >= min(wanted, able)
    assert not gains or sum(gains[:-1]) < wanted, "no machine more than needed"


# --- whose GPUs and whose job, when machines are not enough: by control's order, not by names
PLACES = {
    "plc_z": (0, 900, -50),
    "plc_y": (0, 1200, -90),
    "plc_x": (1, 0, -10),
    "plc_b": (2, 0, -99),
    "plc_a": (3, 0, -5),
}


def host(name, *placements, capped=False, gain_w=0):
    return HostFacts(name, "a", capped, placements, gain_w)


def with_order(watts, hosts, memory=None):
    return decide(
        Tree(NODES), (), {"a": (watts, 100.0)}, {}, {h.name: h for h in hosts}, memory or Memory(), 100.0,
        stale_s=15, settle_s=8, gives_way=PLACES,
    )  # fmt: skip


def test_gpus_are_held_lower_where_work_gives_way_first_and_no_more_than_needed():
    hosts = [
        host("h1", "plc_a", gain_w=3000),
        host("h2", "plc_z", "plc_y", gain_w=3000),
        host("h3", "plc_x", gain_w=3000),
        host("h4", gain_w=300),
    ]
    assert [h for h, _ in with_order(21_000, hosts).cap_hosts] == ["h4", "h2"]
    assert [h for h, _ in with_order(25_500, hosts).cap_hosts] == ["h4", "h2", "h3"]
    mixed = [host("h1", "plc_z", "plc_a", gain_w=3000), host("h2", "plc_b", gain_w=3000)]
    assert [h for h, _ in with_order(21_000, mixed).cap_hosts] == ["h2"], "a host is worth the best of its work"


def test_where_nobody_knows_what_a_floor_frees_all_go_to_it():
    hosts = [host("h1", "plc_a"), host("h2", "plc_z")]
    assert {h for h, _ in with_order(20_100, hosts).cap_hosts} == {"h1", "h2"}


def test_placements_end_in_controls_order_whatever_they_are_called():
    hosts = [host("h1", "plc_a", "plc_b", capped=True), host("h2", "plc_x", "plc_y", "plc_z", capped=True)]
    assert [p for p, _ in with_order(21_000, hosts).evict] == ["plc_z", "plc_y", "plc_x"]
    unknown = [host("h1", "plc_a", "plc_new", capped=True)]
    assert [p for p, _ in with_order(21_000, unknown).evict] == ["plc_new"], "one without a place goes first"


@given(order=st.permutations(sorted(PLACES)), split=st.integers(0, 5))
def test_names_and_hosts_decide_nothing(order, split):
    hosts = [host("h1", *order[:split], capped=True), host("h2", *order[split:], capped=True)]
    assert [p for p, _ in with_order(21_000, hosts).evict] == ["plc_z", "plc_y", "plc_x"]
