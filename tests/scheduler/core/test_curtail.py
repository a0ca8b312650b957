"""The order of a call, what it delivered, and when a price makes one."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.core import curtail
from scheduler.core.curtail import FIRM, FLEXIBLE, SOON, SPOT, STAYS, HostShape, PriceRule, Work
from scheduler.core.power_tree import NodeSpec, PowerTree

pytestmark = pytest.mark.serverless
TREE = PowerTree.of(
    [
        NodeSpec("site", None, 10**6, overhead_gpu_permille=1250),
        NodeSpec("a", "site", 10**6),
        NodeSpec("b", "site", 10**6),
    ]
)


def host(pdu, active, cap_control=True):
    booked = 1000 + active * 700 + (8 - active) * 200 if active else 900
    return HostShape(TREE.index[pdu], booked, 900, 1000, 8, 200, 700, cap_control)


def need(**watts):
    found = np.zeros(len(TREE.keys), np.int64)
    for key, w in watts.items():
        found[TREE.index[key]] = 1000 * w
    return found


def ask(hosts, work, may_cap=True, **watts):
    return curtail.relief(TREE, need(**watts), hosts, work, may_cap=may_cap)


def work(key, on, gpus, rank, since=0, job=None):
    return Work(key, key if job is None else job, on, frozenset(gpus), rank, since)


def test_spot_leaves_before_flexible_and_the_newest_of_a_rank_first():
    rows = [
        work("old", "h", [0], SPOT, 1),
        work("new", "h", [1], SPOT, 2),
        work("flex", "h", [2], FLEXIBLE, 3),
        work("firm", "h", [3], STAYS, 4),
    ]
    assert [j for j, _ in ask({"h": host("a", 4)}, rows, a=400).leave] == ["new"]
    assert [j for j, _ in ask({"h": host("a", 4)}, rows, a=600).leave] == ["new", "old"]
    found = ask({"h": host("a", 4)}, rows, a=1100)
    assert [j for j, _ in found.leave] == ["new", "old", "flex"]
    assert not found.caps


def test_what_is_on_its_way_out_is_counted_on():
    """Eight GPUs are booked, the rest of them is leaving."""
    rows = [work("stays", "h", [0], SPOT, 1)]
    assert not ask({"h": host("a", 8)}, rows, a=3000).leave


def test_flexible_within_its_notice_is_waited_for():
    found = ask({"h": host("a", 2)}, [work("soon", "h", [0], SOON), work("firm", "h", [1], STAYS)], a=400)
    assert found == curtail.Relief()


def test_gpus_are_held_lower_before_firm_leaves():
    rows = [work("emergency", "h", [0, 1], FIRM), work("firm", "h", [2, 3], STAYS)]
    found = ask({"h": host("a", 4)}, rows, a=1000)
    assert found.caps == {"h": 450}
    assert not found.leave
    found = ask({"h": host("a", 4)}, rows, a=2100)
    assert found.caps == {"h": 200}
    assert not found.leave, "in vain: the other's job keeps the host up"
    assert [j for j, _ in ask({"h": host("a", 2)}, rows[:1], a=1100).leave] == ["emergency"]
    assert ask({"h": host("a", 4)}, rows, may_cap=False, a=1000).leave == (("emergency", TREE.index["a"]),)


def test_firm_leaves_only_where_its_host_gives_watts_for_it():
    """At their floor its GPUs draw what idle ones do: two jobs of one host go together or neither."""
    beside = [work("one", "h", [0, 1], FIRM, 2), work("two", "h", [2, 3], FIRM, 1)]
    found = ask({"h": host("a", 4)}, beside, a=2100)
    assert [j for j, _ in found.leave] == ["one", "two"]
    for stays in (STAYS, SOON):  # what is to leave soon is gone when firm work is asked
        mixed = [work("one", "h", [0, 1], FIRM, 2), work("two", "h", [2, 3], stays, 1)]
        assert [j for j, _ in ask({"h": host("a", 4)}, mixed, a=3800).leave] == ([] if stays == STAYS else ["one"])


def test_work_leaves_for_the_call_that_its_contract_names_alone():
    """The PDU's call is an emergency, the site's is none: what the PDU lacks takes it, what the site lacks does not."""
    a, site = TREE.index["a"], TREE.index["site"]
    named = Work("w", "w", "h", frozenset(range(8)), STAYS, 0, {a: FIRM, site: STAYS})
    assert ask({"h": host("a", 8)}, [named], a=6000).leave == (("w", a),)
    assert not ask({"h": host("a", 8)}, [named], site=6000).leave


def test_a_gang_leaves_together_and_other_pdus_are_left_alone():
    hosts = {"h1": host("a", 8), "h2": host("b", 8), "h3": host("b", 8)}
    rows = [
        work("r0", "h1", range(8), SPOT, 5, job="gang"),
        work("r1", "h2", range(8), SPOT, 5, job="gang"),
        work("other", "h3", range(8), SPOT, 9),
    ]
    found = ask(hosts, rows, a=1000)
    assert found.leave == (("gang", TREE.index["a"]),)


def test_a_host_without_cap_control_gives_nothing():
    found = ask({"h": host("a", 8, cap_control=False)}, [work("w", "h", range(8), SPOT)], a=500)
    assert not found.leave
    assert found.missing_mw == {TREE.index["a"]: 500_000}


@st.composite
def sites(draw):
    hosts, rows = {}, []
    for h in range(draw(st.integers(1, 5))):
        free = list(range(8))
        for n in range(draw(st.integers(0, 4))):
            count = draw(st.integers(1, min(4, len(free)))) if free else 0
            if count:
                gpus, free = free[:count], free[count:]
                rank = draw(st.sampled_from([SPOT, FLEXIBLE, SOON, FIRM, STAYS]))
                rows.append(work((h, n), h, gpus, rank, draw(st.integers(0, 9)), job=draw(st.integers(0, 6))))
        hosts[h] = host(draw(st.sampled_from("ab")), 8 - len(free))
    rank_of = {}
    rows = [Work(w.key, w.job, w.host, w.gpus, rank_of.setdefault(w.job, w.rank), w.since) for w in rows]
    watts = {n: draw(st.integers(0, 20_000)) for n in ("site", "a", "b")}
    return hosts, rows, watts


@settings(max_examples=60, deadline=None)
@given(sites())
def test_the_order_holds_and_nothing_goes_in_vain(site):
    hosts, rows, watts = site
    found = ask(hosts, rows, **watts)
    rank = {w.job: w.rank for w in rows}
    gone = {job for job, _ in found.leave}
    ranks = [rank[job] for job, _ in found.leave]
    assert ranks == sorted(ranks)
    assert not set(ranks) & {SOON, STAYS}
    assert found == ask(hosts, list(reversed(rows)), **watts), "the order of the rows says nothing"
    asked = need(**watts)

    def lacks(work_left, caps):
        left = asked.copy()
        for key, shape in hosts.items():
            there = [w for w in work_left if w.host == key]
            active = len({i for w in there for i in w.gpus})
            now = shape.needs_w(active, works=bool(there), gpu_w=caps.get(key))
            for n in TREE.paths[shape.node]:
                left[n] -= (shape.booked_w - now) * int(TREE.k[n, curtail.HOST])
        return left

    leaves = [w for w in rows if w.job not in gone]
    soon = {w.job for w in rows if w.rank == SOON}
    after = lacks([w for w in leaves if w.job not in soon], found.caps)
    if not soon:
        assert {n: int(after[n]) for n in np.flatnonzero(after > 0)} == found.missing_mw
    for n in np.flatnonzero(after > 0):  # what is still missing, nobody under that node could give
        under = [w for w in leaves if n in TREE.paths[hosts[w.host].node]]
        assert not [w for w in under if w.rank in {SPOT, FLEXIBLE}]
        stays = {w.host for w in leaves if w.rank == STAYS}
        assert not [w for w in under if w.rank == FIRM and w.host not in stays], "their hosts could be emptied"
        assert all(found.caps.get(w.host) == 200 for w in under if w.rank == STAYS)
    if gone:  # without the last that was asked something is missing
        last = found.leave[-1][0]
        without = lacks(
            [w for w in rows if w.job == last or w.job not in gone], found.caps if rank[last] == FIRM else {}
        )
        assert (without > 0).any()
    if any(r == FIRM for r in ranks):  # and GPUs at its nodes are at their floor already
        assert found.caps


calls = st.builds(curtail.Call, mandatory=st.booleans(), emergency=st.booleans())
agreed = st.builds(
    curtail.Agreed, st.sampled_from(["spot", "flexible", "reserved", "on_demand"]), st.booleans(), st.integers(0, 900),
    st.none() | st.integers(0, 900),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(calls, agreed, st.integers(0, 1000))
def test_a_rank_is_what_the_contract_agreed_to(call, terms, told):
    rank = curtail.rank(call, terms, told)
    named = call.emergency and terms.emergency_notice_s is not None and told >= terms.emergency_notice_s
    assert rank != FIRM or (call.mandatory and named and terms.kind != "spot")
    assert rank == STAYS or call.mandatory
    assert rank not in {FLEXIBLE, SOON} or (terms.kind == "flexible" and terms.hours_left)
    if call.mandatory and named and terms.kind in {"reserved", "on_demand"}:
        assert rank == FIRM
    if rank == SOON:
        assert told < terms.flexible_notice_s
        assert not call.emergency


@settings(max_examples=60, deadline=None)
@given(sites(), calls, st.lists(agreed, min_size=7, max_size=7), st.lists(st.integers(0, 1000), min_size=7, max_size=7))
def test_firm_work_leaves_in_an_emergency_that_its_contract_names_and_else_never(site, call, contracts, told):
    """Whatever is missing, of whatever call: by the terms of the job's contract (jobs are 0 to 6), not before its notice."""
    hosts, rows, watts = site
    rows = [replace(w, rank=curtail.rank(call, contracts[w.job], told[w.job])) for w in rows]
    found = ask(hosts, rows, **watts)
    gone = {job for job, _ in found.leave}
    assert call.mandatory or not gone, "an economic call takes nobody"
    for job in gone:
        terms, since = contracts[job], told[job]
        if terms.kind == "flexible" and terms.hours_left and since >= terms.flexible_notice_s:
            continue
        if terms.kind != "spot":
            assert call.emergency
            assert terms.emergency_notice_s is not None
            assert since >= terms.emergency_notice_s


# --- what it delivered
def test_delivered_is_what_was_not_drawn():
    readings = [(-310, 99), (-200, 1000), (-100, 1200), (2, 800), (4, 300)]
    assert curtail.baseline_w(readings, 0) == 1100
    assert curtail.baseline_w(readings, 1000) is None
    watts = curtail.by_second([(2, 800), (4, 300)], 6, 1100)
    assert watts == [1100, 1100, 800, 800, 300, 300]
    assert curtail.delivered_wh([0] * 3600, 1100) == 1100
    assert curtail.delivered_wh([1200] * 3600, 1100) == -100
    assert curtail.under_after([(-1, 10), (2, 800), (4, 300)], 300) == 4
    assert curtail.under_after([(2, 800)], 300) is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9999)), max_size=20), st.integers(0, 60))
def test_every_second_is_the_last_reading_before_it(rows, seconds):
    readings = sorted(dict(rows).items())
    watts = curtail.by_second(readings, seconds, 7)
    for second in range(seconds):
        assert watts[second] == next((w for at, w in reversed(readings) if at <= second), 7)


# --- price
RULE = PriceRule(strike=80, resume=60, windows=2, resume_windows=3, urgent=150)


@pytest.mark.parametrize(
    ("prices", "holding", "said"),
    [
        ([], False, "stay"),
        ([80], False, "stay"),
        ([80, 79], False, "stay"),
        ([79, 80, 80], False, "curtail"),
        ([10, 150], False, "curtail"),
        ([59, 59], True, "stay"),
        ([59, 59, 60], True, "stay"),
        ([90, 59, 59, 59], True, "resume"),
        ([200, 200], True, "stay"),
    ],
)
def test_a_price_must_stand_before_it_counts(prices, holding, said):
    assert curtail.price_says(RULE, prices, holding=holding) == said


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 200), max_size=40))
def test_between_strike_and_resume_nothing_flutters(prices):
    holding, changes = False, []
    for i in range(len(prices)):
        said = curtail.price_says(RULE, prices[: i + 1], holding=holding)
        if said != "stay":
            holding = said == "curtail"
            changes.append((i, said))
    assert all(a[1] != b[1] for a, b in pairwise(changes))
    for i, said in changes:
        assert prices[i] >= RULE.strike if said == "curtail" else prices[i] < RULE.resume
