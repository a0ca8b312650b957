"""A watt is never granted on an unproved shed: the rule by itself, and a model of a site that plays it against lies and lags."""

import random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scheduler.core import power
from scheduler.core import power_proof as proof
from scheduler.core.power import HOST, MINER, Load, NodeSpec, PowerTree

pytestmark = pytest.mark.serverless
SITE, PDU = 0, 1


def tree(pdu_caps=(50_000, 50_000)):
    rows = [NodeSpec(f"p{i}", "site", cap) for i, cap in enumerate(pdu_caps)]
    total = round(sum(pdu_caps) * 1.3)
    site = NodeSpec("site", None, total, fixed_w=500, overhead_gpu_permille=1250, overhead_miner_permille=1050)
    return PowerTree.of([site, *rows])


def devices(*rows):
    return proof.Devices.of(rows)


def miner(key, watts, node=PDU, *, known=True, stirs=False):
    return (key, node, MINER, watts, known, stirs)


def test_the_residual_is_what_nobody_admits_to():
    t = tree()
    found = devices(miner("m1", 3000), miner("m2", 25), ("h1", 2, HOST, 8000, True, True), miner("m3", 9, known=False))
    residual = proof.residuals_mw(t, {0: 20_000, 1: 4_025}, found)
    assert residual[1] == 1_000_000  # 4025 - 3025: somebody draws a kilowatt more than he says
    assert residual[0] == 1000 * (20_000 - 500) - 1050 * 3025 - 1250 * 8000
    assert 2 not in residual  # its meter is silent


@pytest.mark.parametrize(
    ("rise", "agreed"),
    [
        ({PDU: 0}, True),
        ({PDU: -3_000_000}, True),  # others fell more than they say: no matter
        ({PDU: 1_900_000}, True),  # 20 % of 7 kW and 1 % of the cap
        ({PDU: 1_900_001}, False),
        ({PDU: 0, SITE: 2_770_001}, False),  # one of the meters above says no
        ({}, True),
    ],
)
def test_a_batch_is_judged_by_all_that_it_claims(rise, agreed):
    t = tree()
    claims = [
        proof.Claim("m1", PDU, 3500, True),
        proof.Claim("m2", PDU, 3500, True),
        proof.Claim("m3", PDU, 3500, False),
    ]
    error = proof.error_mw(t, devices())
    found = proof.agrees(t, claims, rise, error)
    assert found == {"m1": agreed, "m2": agreed}  # the third has not even said that it sleeps


def test_lies_of_several_batches_add_up_until_they_are_told_apart():
    """Two batches: the first hides 3.5 kW, and both of them see it."""
    t = tree()
    error = proof.error_mw(t, devices())
    before = {PDU: 0}
    now = proof.residuals_mw(t, {PDU: 3_600}, devices(miner("liar", 25), miner("honest", 75)))
    for key in ("liar", "honest"):
        rise = proof.rise_mw(t, now, before, devices(), {})
        assert proof.agrees(t, [proof.Claim(key, PDU, 3500, True)], rise, error) == {key: False}
    later = {PDU: 3_500_000}  # what is commanded now knows of the lie already, and is not held up by it
    rise = proof.rise_mw(t, now, later, devices(), {})
    assert proof.agrees(t, [proof.Claim("next", PDU, 3500, True)], rise, error) == {"next": True}


def test_a_device_that_comes_back_does_not_hide_its_watts():
    t = tree()
    here = devices(miner("m1", 25), miner("back", 3500))
    before = {PDU: 3_500_000}  # m1 read 3500; `back` drew 3500 and said nothing
    now = proof.residuals_mw(t, {PDU: 7_025}, here)  # m1 lies: the meter has not moved
    assert now[PDU] == 3_500_000  # as if nothing had happened
    assert proof.rise_mw(t, now, before, here, {"back": 3500})[PDU] == 3_500_000


def test_what_a_device_draws_after_it_came_back_was_not_part_of_what_was_seen_before():
    """A host that idled unseen at 500 W, spoke, was granted watts and draws 4,300: the meter and its reading rose alike."""
    t = tree()
    here = devices(miner("m1", 25), miner("host", 4300))
    now = proof.residuals_mw(t, {PDU: 4_325}, here)
    assert proof.rise_mw(t, now, {PDU: 500_000}, here, {"host": 500})[PDU] == 0
    unheard = devices(
        miner("m1", 25), miner("host", 4300, known=False)
    )  # it fell silent once more: nobody says otherwise
    now = proof.residuals_mw(t, {PDU: 4_325}, unheard)
    assert proof.rise_mw(t, now, {PDU: 500_000}, unheard, {"host": 500})[PDU] == 3_800_000


def test_a_device_that_falls_silent_explains_nothing():
    t = tree()
    gone = devices(miner("m1", 25), miner("gone", 3500, known=False))
    now = proof.residuals_mw(t, {PDU: 3_525}, gone)
    assert proof.rise_mw(t, now, {PDU: 0}, gone, {})[PDU] == 3_500_000


def test_calm_is_every_device_answering_and_none_on_its_way():
    t = tree()
    still = [miner("m1", 3000), miner("m2", 25, node=2)]
    assert proof.calm(t, devices(*still)).all()
    assert proof.calm(t, devices(*still, miner("m3", 3000, stirs=True))).tolist() == [False, False, True]
    assert proof.calm(t, devices(*still, miner("m3", 0, known=False))).tolist() == [False, False, True]


def test_two_looks_apart_or_one_in_calm():
    assert proof.tally(0, None, agreed=True, quiet=True, at=10).proved
    first = proof.tally(0, None, agreed=True, quiet=False, at=10)
    assert (first.votes, first.voted_at, first.proved) == (1, 10, False)
    assert not proof.tally(1, 10, agreed=True, quiet=False, at=13).proved  # the same look, nearly
    assert proof.tally(1, 10, agreed=True, quiet=False, at=14).proved
    assert proof.tally(1, 10, agreed=False, quiet=False, at=14).votes == 0
    assert proof.tally(0, 10, agreed=False, quiet=True, at=14) == proof.Tally(0, 14, proved=False)


def test_what_no_one_admits_to_stays_booked_once():
    t = tree()
    none = Load.of(t, [], [], [])
    liar = Load.of(t, [PDU], [MINER], [3475])  # an open claim: its old watts stand in the books still
    rise = {PDU: 3_500_000, SITE: 3_600_000}
    assert proof.unexplained_mw(t, [(rise, none)]).tolist() == [3_600_000, 3_500_000, 0]
    assert proof.unexplained_mw(t, [(rise, liar)]).tolist() == [0, 25_000, 0]
    assert proof.unexplained_mw(t, [({PDU: -5}, none), ({PDU: 7}, none)]).tolist() == [0, 7, 0]


# --- a site that plays it
TOP, SLEEP, PARKED = 3500, 25, 1100
TURN_S = 5
METER_LAG_S, NOISE = 1.0, 0.003  # sandbox/site/physics.py


class Model:
    """Two PDUs and the site, metered; machines that lie, hosts that ramp as they like within what is granted to them.

    Every second the truth is held against the caps. Every TURN_S the books are brought in line as
    marketplace.services.power does it, by the same functions.
    """

    def __init__(self, seed, machines, liars, off, full):
        self.rng = random.Random(seed)
        self.n, self.full = machines, full
        self.doubt: dict[int, int] = {}
        self.home = [1 + i % 2 for i in range(machines)]
        self.lies = [i in liars for i in range(machines)]
        self.gain = [1 + self.rng.uniform(-off, off) for _ in range(machines)]  # of the firmware's own reading
        self.bias = [self.rng.uniform(0.95, 1.0) for _ in range(machines)]
        idle = [sum(TOP for h in self.home if h == p) + 2 * PARKED for p in (1, 2)]
        caps = [round(w / 0.965) for w in idle]
        rows = [NodeSpec(f"p{p}", "site", cap) for p, cap in zip((1, 2), caps, strict=True)]
        top = round((500 + sum(idle) * 1.05 + 4 * PARKED * 0.2) / 0.96)
        site = NodeSpec("site", None, top, fixed_w=500, overhead_gpu_permille=1250, overhead_miner_permille=1050)
        self.tree = PowerTree.of([site, *rows])
        self.share = power.margins_w(self.tree)
        # the truth
        self.asleep = [False] * machines
        self.true = [TOP * b for b in self.bias]
        self.hosts = [(1, 0), (1, 1), (2, 0), (2, 1)]
        self.host_w = [float(PARKED)] * 4
        self.host_goal = [float(PARKED)] * 4
        self.cooling = self._cooling()
        self.meter = self._true()
        # the books
        self.booked = [TOP] * machines
        self.host_booked = [PARKED] * 4
        self.told = [float(PARKED)] * 4
        self.wants: dict[int, int] = {}  # host -> asked at
        self.open: dict[int, dict] = {}  # machine -> claim
        self.slept: dict[int, dict] = {}
        self.failed: set[int] = set()
        self.looks: dict[int, list[int]] = {0: [], 1: [], 2: []}
        self.hidden = np.zeros(3, np.int64)
        self.waits: list[int] = []
        self.now = 0

    def _sums(self):
        gpu = [0.0, 0.0, 0.0]
        asic = [0.0, 0.0, 0.0]
        for (p, _), w in zip(self.hosts, self.host_w, strict=True):
            gpu[p] += w
            gpu[0] += w
        for p, w in zip(self.home, self.true, strict=True):
            asic[p] += w
            asic[0] += w
        return gpu, asic

    def _cooling(self):
        gpu, asic = self._sums()
        return 0.25 * gpu[0] + 0.05 * asic[0]

    def _true(self):
        gpu, asic = self._sums()
        return [500 + gpu[0] + asic[0] + self.cooling, gpu[1] + asic[1], gpu[2] + asic[2]]

    def second(self):
        self.now += 1
        for i in range(self.n):
            goal = SLEEP if self.asleep[i] and not self.lies[i] else TOP * self.bias[i]
            step = TOP / (4 if goal < self.true[i] else 40)
            self.true[i] += min(step, max(-step, goal - self.true[i]))
        for h, booked in enumerate(self.host_booked):
            if self.rng.random() < 0.06:  # its job does something else now
                self.host_goal[h] = self.rng.uniform(PARKED, booked) if booked > PARKED else PARKED
            goal = min(self.host_goal[h], booked)
            tau = 1.5 if goal > self.host_w[h] else 0.5
            self.host_w[h] += (goal - self.host_w[h]) * (1 - np.exp(-1 / tau))
        self.cooling += (self._cooling() - self.cooling) * (1 - np.exp(-1 / 20))
        true = self._true()
        self.meter = [m + (w - m) * (1 - np.exp(-1 / METER_LAG_S)) for m, w in zip(self.meter, true, strict=True)]
        for n, w in enumerate(true):
            assert w <= self.tree.cap_w[n], (
                f"{self.tree.keys[n]} draws {w:.0f} W of {self.tree.cap_w[n]} at {self.now} s"
            )

    def reading(self, i):
        return round(SLEEP if self.asleep[i] and self.lies[i] else self.true[i] * self.rng.gauss(self.gain[i], 0.005))

    def turn(self):
        read = [self.reading(i) for i in range(self.n)]
        for h, w in enumerate(self.host_w):
            if abs(w - self.told[h]) > max(10, 0.04 * self.told[h]):  # what changed by less is not told
                self.told[h] = w
        rows = [("m", i) for i in range(self.n)] + [("h", h) for h in range(4)]
        node = [*self.home, *(p for p, _ in self.hosts)]
        watts = [*read, *(round(w) for w in self.told)]
        stirs = [i in self.open and read[i] > 0.15 * TOP for i in range(self.n)]
        stirs += [w > 1.05 * PARKED for w in self.told]
        kinds = [MINER] * self.n + [HOST] * 4
        seen = proof.Devices.of(
            (k, n, kind, w, True, s) for k, n, kind, w, s in zip(rows, node, kinds, watts, stirs, strict=True)
        )
        meters = {n: round(w * self.rng.gauss(1, NOISE)) for n, w in enumerate(self.meter)}
        residual = proof.residuals_mw(self.tree, meters, seen)
        for n, mw in residual.items():
            self.looks[n] = [*self.looks[n], mw][-3:]
        calm, error = proof.calm(self.tree, seen), proof.error_mw(self.tree, seen)
        self._settle(read, residual, calm, error, seen)
        self._margins(read, residual, calm, seen)
        self._grant()

    def _settle(self, read, residual, calm, error, seen):
        for batch in sorted({c["batch"] for c in self.open.values()}):
            mine = {i: c for i, c in self.open.items() if c["batch"] == batch}
            before = next(iter(mine.values()))["before"]
            for i, c in mine.items():
                c["low"] = c["low"] + 1 if read[i] <= 0.15 * TOP else 0
            table = [proof.Claim(i, self.home[i], c["base"] - SLEEP, c["low"] > 0) for i, c in mine.items()]
            rise = proof.rise_mw(self.tree, residual, before, seen, {})
            agreed = proof.agrees(self.tree, table, rise, error)
            proved = []
            for i, yes in agreed.items():
                c = mine[i]
                tally = proof.tally(c["votes"], c["voted_at"], yes, bool(calm[self.home[i]]), self.now)
                c["votes"], c["voted_at"] = tally.votes, tally.voted_at
                if tally.proved:
                    self.booked[i] = SLEEP
                    self.slept[i] = self.open.pop(i)
                    proved.append(i)
            # Noise moves two looks by less than 2 % of what the meter reads.
            hidden = sum(self.true[i] - SLEEP for i in proved if self.lies[i])
            claimed = sum(c["base"] - SLEEP for i, c in mine.items() if i in agreed)
            assert hidden <= 0.2 * claimed + error[1:].max() / 1000 + 0.02 * max(self.meter[1:]), (
                f"{hidden:.0f} W of {claimed} W were believed that were still drawn"
            )
            for i in list(mine):
                if i in self.open and self.now - self.open[i]["at"] > (60 if self.open[i]["votes"] else 40):
                    self.failed.add(i)
                    self.slept.pop(i, None)
                    del self.open[i]
                    self.doubt[i] = mine[i]["at"]

    def _margins(self, read, residual, calm, seen):
        settled = {
            n: mw if calm[n] else sorted(self.looks[n])[(len(self.looks[n]) - 1) // 2] for n, mw in residual.items()
        }
        rises = []
        for c in self.slept.values():
            doubted = [i for i, o in self.open.items() if o["at"] >= c["at"]]
            doubted += [i for i in self.failed if self.doubt[i] >= c["at"]]
            above = [max(0, self.booked[i] - read[i]) for i in doubted]
            held = Load.of(self.tree, [self.home[i] for i in doubted], [MINER] * len(doubted), above)
            rises.append((proof.rise_mw(self.tree, settled, c["before"], seen, {}), held))
        self.hidden = proof.unexplained_mw(self.tree, rises)

    def free(self):
        load = Load.of(
            self.tree,
            [*self.home, *(p for p, _ in self.hosts)],
            [MINER] * self.n + [HOST] * 4,
            [*self.booked, *self.host_booked],
        )
        margins = np.maximum(self.share, -(-self.hidden // 1000))
        return power.free_mw(self.tree, load, margins)

    def _grant(self):
        for h in sorted(self.wants, key=self.wants.__getitem__):
            p = self.hosts[h][0]
            delta = self.full - self.host_booked[h]
            free = self.free()
            if power.admissible(self.tree, free, p, delta, HOST) is None:
                self.host_booked[h] = self.full
                self.host_goal[h] = self.full
                self.waits.append(self.now - self.wants.pop(h))
                continue
            need = power.shortfall_mw(self.tree, free, p, delta, HOST)
            for i, c in self.open.items():
                if self.now - c["at"] <= 20:
                    for n in self.tree.paths[self.home[i]]:
                        need[n] = max(0, int(need[n]) - (self.booked[i] - SLEEP) * int(self.tree.k[n, MINER]))
            awake = [i for i in range(self.n) if not self.asleep[i] and i not in self.failed]
            table = power.Miners.of((self.home[i], self.booked[i] - SLEEP, i) for i in awake)
            picks = power.choose_shed(self.tree, table, need).picks
            before = {n: sorted(looks)[(len(looks) - 1) // 2] for n, looks in self.looks.items()}
            for pick in picks:
                i = awake[pick]
                self.asleep[i] = True
                self.open[i] = {
                    "at": self.now, "batch": self.now, "before": before, "base": TOP, "low": 0, "votes": 0, "voted_at": None,
                }  # fmt: skip
            break  # first come, first served

    def could(self, h):
        """Whether the host's watts would come free if every machine slept."""
        load = Load.of(
            self.tree,
            [*self.home, *(p for p, _ in self.hosts)],
            [MINER] * self.n + [HOST] * 4,
            [*[SLEEP] * self.n, *self.host_booked],
        )
        free = power.free_mw(self.tree, load, self.share)
        delta = self.full - self.host_booked[h]
        return power.admissible(self.tree, free, self.hosts[h][0], delta, HOST) is None

    def job_ends(self, h):
        if self.host_booked[h] > PARKED:
            self.host_booked[h], self.host_goal[h] = PARKED, PARKED
            self.host_w[h] = min(self.host_w[h], PARKED)

    def wake(self):
        for i in sorted(self.slept):
            if power.admissible(self.tree, self.free(), self.home[i], TOP - SLEEP, MINER) is None and not self.wants:
                self.booked[i], self.asleep[i] = TOP, False
                del self.slept[i]
                break


def play(model, script, turns):
    for t in range(turns):
        for h in script.get(t, []):
            if h < 4 and model.host_booked[h] == PARKED and h not in model.wants:
                model.wants[h] = model.now
            elif h >= 4:
                model.job_ends(h - 4)
        for _ in range(TURN_S):
            model.second()
        model.turn()
        model.wake()


scripts = st.dictionaries(st.integers(0, 50), st.lists(st.integers(0, 7), max_size=3), max_size=16)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(14, 30),
    st.sets(st.integers(0, 29), max_size=4),
    scripts,
    st.sampled_from([0.0, 0.05]),
    st.sampled_from([10_200, 24_000]),  # W of a host at work: three machines' or seven's
)
@example(1, 14, {6, 8, 10, 12, 7}, {3: [0, 1, 2, 3]}, 0.0, 10_200)
@example(2, 30, {0, 1}, {3: [0], 8: [1], 12: [2], 20: [4, 3], 30: [5]}, 0.05, 10_200)
@example(3, 20, {0, 2, 4, 6}, {3: [0, 1, 2, 3]}, 0.0, 24_000)
@example(4, 30, {0, 9, 14, 21}, {3: [0], 4: [1], 5: [2], 6: [3], 20: [4], 21: [0]}, 0.0, 24_000)
def test_no_node_is_over_its_cap_whoever_lies(seed, machines, liars, script, off, full):
    play(Model(seed, machines, liars, off, full), script, 60)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(16, 30), scripts, st.sampled_from([0.0, 0.05]), st.sampled_from([10_200, 24_000])
)
def test_honest_machines_are_always_believed_in_time(seed, machines, script, off, full):
    model = Model(seed, machines, set(), off, full)
    play(model, script, 60)
    for h in list(model.wants):  # who came last has his time, too
        model.wants[h] = max(model.wants[h], model.now - 5)
    play(model, {}, 24)
    assert not model.failed, "an honest machine was called a liar"
    assert not model.wants or not model.could(min(model.wants, key=model.wants.__getitem__))
