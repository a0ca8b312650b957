"""A mixed site through a year: its tree, its machines, and the power loop's own decisions every five minutes.

    site = Site.of(hosts=64, contract_w=4_000_000)
    run = live(site, hosts_w, prices, calls)     hosts_w: (ticks at which a host's booking changes, host, W)

The decisions are the product's: `power.choose_shed` where watts are missing, the fast tier where something changed, the slow tier
every 15 minutes with its change limit. The plan sees prices one tick late. A machine that is woken draws at once and hashes
after `WAKE_S`; a job that needed watts starts `CONFIRM_S` late, until when its miners are booked, and so is it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from benchmarks.dispatch import LEVELS, MODELS
from benchmarks.year_inputs import HOUR, TICK, Call, Prices, parameter
from scheduler.core import dispatch
from scheduler.core import power as core
from scheduler.core.types import I64

GPUS, STANDBY_W, PARKED_W, BASE_W, GPU_MIN_W, GPU_MAX_W = 8, 60, 1_100, 4_600, 200, 700  # 10.2 kW at nameplate
PUE_GPU, PUE_MINER = 1250, 1050
FEE_PPM = int(parameter("pool_fee") * 1e6)
PDUS, HALLS = 8, 2
SLOW_TICKS, CHANGE_LIMIT = 3, 200
CONFIRM_S, WAKE_S = 10, 180  # as `benchmarks fleet` confirms; a normal ramp (research: minutes)


def host_w(active: int) -> int:
    """What the ledger books for a host with so many GPUs in use."""
    return core.host_reserved_w(
        gpus=GPUS, active_gpus=active, standby_w=STANDBY_W, parked_w=PARKED_W, base_w=BASE_W, gpu_min_w=GPU_MIN_W,
        gpu_max_w=GPU_MAX_W, cap_control=True,
    )  # fmt: skip


HOST_W = np.array([host_w(n) for n in range(GPUS + 1)], np.int64)


@dataclass(frozen=True)
class Site:
    tree: core.PowerTree
    fleet: dispatch.Fleet
    host_node: I64

    @staticmethod
    def of(hosts: int, contract_w: int, seed: int) -> Site:
        """Miners whose nameplate fills the contract alone, hosts spread over the same PDUs, PDUs that cannot carry both in full."""
        dice = np.random.default_rng(seed + 3)
        kinds: list[int] = []
        ladders = [
            [(watts // 50, 0), *((int(watts * s), int(1000 * ths * s**0.75)) for s in LEVELS)] for watts, ths in MODELS
        ]
        while sum(ladders[k][-1][0] for k in kinds) * PUE_MINER < 1000 * contract_w:
            kinds.append(int(dice.integers(len(MODELS))))
        home = np.arange(len(kinds)) % PDUS
        top = np.array([ladders[k][-1][0] for k in kinds])
        pdu = np.bincount(home, top, minlength=PDUS) + HOST_W[-1] * -(-hosts // PDUS)
        halls = pdu.reshape(HALLS, -1).sum(axis=1) * 0.93
        site = core.NodeSpec(
            "site", None, contract_w, fixed_w=contract_w // 100, overhead_gpu_permille=PUE_GPU, overhead_miner_permille=PUE_MINER,
        )  # fmt: skip
        nodes = [site, *(core.NodeSpec(("hall", h), "site", int(w)) for h, w in enumerate(halls))]
        nodes += [core.NodeSpec(("pdu", p), ("hall", p * HALLS // PDUS), int(w * 0.95)) for p, w in enumerate(pdu)]
        tree = core.PowerTree.of(nodes)
        at = np.array([tree.index["pdu", p] for p in range(PDUS)], np.int64)
        return Site(tree, dispatch.Fleet.of(at[home], kinds, ladders), at[np.arange(hosts) % PDUS])

    def steps(self) -> tuple[I64, I64]:
        """(W, GH/s) of every hull step of every machine, all machines of a step together, as if nothing but the site's cap bound."""
        watts, ghs = [], []
        counts = np.bincount(self.fleet.ladder, minlength=len(self.fleet.off) - 1)
        for kind, count in enumerate(counts.tolist()):
            part = slice(self.fleet.off[kind], self.fleet.off[kind + 1])
            hull: list[tuple[int, int]] = []
            for point in zip(self.fleet.watts[part].tolist(), self.fleet.ghs[part].tolist(), strict=True):
                while len(hull) > 1 and _slope(hull[-2], point) >= _slope(hull[-2], hull[-1]):
                    hull.pop()
                hull.append(point)
            for low, high in pairwise(hull):
                watts.append(count * (high[0] - low[0]))
                ghs.append(count * (high[1] - low[1]))
        return np.array(watts, np.int64), np.array(ghs, np.int64)

    def asleep_w(self) -> int:
        return int(self.fleet.watts[self.fleet.off[self.fleet.ladder]].sum())


def _slope(a: tuple[int, int], b: tuple[int, int]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


@dataclass
class Lived:
    """Sums over the run, and by tick what the books held at the root."""

    hash_uusd: float = 0.0
    miner_mwh: float = 0.0
    energy_uusd: float = 0.0  # of the miners, at the meter
    used_mw: float = 0.0
    ideal_mw: float = 0.0
    over: int = 0
    plans: int = 0
    sheds: int = 0
    slept: int = 0
    woken: int = 0
    delays: list[int] = field(default_factory=list)  # ticks at which a start waited for watts


def under(tree: core.PowerTree, call: Call | None) -> core.PowerTree:
    """The tree while a call stands: the root's limit."""
    if call is None:
        return tree
    allowed = tree.allowed_w.copy()
    allowed[0] = int(tree.cap_w[0] * call.share)
    return replace(tree, allowed_w=allowed)


def live(site: Site, at: I64, host: I64, watts: I64, prices: Prices, calls: Sequence[Call], ticks: int) -> Lived:
    """`at[i]`: the tick from which `host[i]` books `watts[i]` (ascending). Raises nothing; what goes over a cap is counted."""
    fleet, found = site.fleet, Lived()
    modes = np.zeros(len(fleet.node), np.int16)
    booked = np.full(len(site.host_node), PARKED_W, np.int64)
    limits: dict[int, Call | None] = {call.end: None for call in calls} | {call.start: call for call in calls}
    tree, margins = site.tree, core.margins_w(site.tree)
    step_w, step_ghs = site.steps()
    even = step_ghs * 1.0 / step_w  # GH/s per W of each step
    asleep = site.asleep_w()
    load = core.Load.of(tree, site.host_node, np.zeros_like(site.host_node), booked)
    i, dirty = 0, True
    for tick in range(ticks):
        hour = tick * TICK // HOUR
        seen = max(0, tick - 1) * TICK // HOUR
        quote = dispatch.Prices(int(prices.hashprice[seen]), int(prices.energy[seen]), FEE_PPM, PUE_MINER)
        dirty = dirty or seen != max(0, tick - 2) * TICK // HOUR
        if tick in limits:
            tree = under(site.tree, limits[tick])
            margins, dirty = core.margins_w(tree), True
        rose = False
        while i < len(at) and at[i] <= tick:
            delta = int(watts[i] - booked[host[i]])
            load = load.plus(tree, int(site.host_node[host[i]]), core.HOST, delta)
            booked[host[i]] = watts[i]
            rose, dirty, i = rose or delta > 0, True, i + 1
        budget = dispatch.miner_budget_mw(tree, load, margins)
        if dirty or tick % SLOW_TICKS == 0:
            before = modes
            modes = _shed(site, tree, budget, modes, quote, found, rose, tick)
            plan = dispatch.plan_dispatch if tick % SLOW_TICKS == 0 else dispatch.plan_fast
            more = {"change_limit": CHANGE_LIMIT} if tick % SLOW_TICKS == 0 else {}
            modes = plan(tree, fleet, quote, modes, budget_mw=budget, **more).modes
            found.plans += 1
            found.woken += int(((before == 0) & (modes > 0)).sum())
            found.slept += int(((before > 0) & (modes == 0)).sum())
            entry = fleet.at(modes)
            ghs, now_w = int(fleet.ghs[entry].sum()), int(fleet.watts[entry].sum())
            lost = int(fleet.ghs[entry][(before == 0) & (modes > 0)].sum()) * WAKE_S
            held = core.Load.of(tree, fleet.node, np.full(len(entry), core.MINER), fleet.watts[entry])
            full = core.reserved_mw(tree, core.Load(load.watts + held.watts))
            found.over += int((full > 1000 * (tree.allowed_w - tree.fixed_w - margins)).any())
            dirty = bool((before != modes).any())
        else:
            lost = 0
        net = int(prices.hashprice[hour]) * (1e6 - FEE_PPM) / 1e6 / 24e6 / HOUR  # uUSD per GH/s and s
        price = int(prices.energy[hour])
        found.hash_uusd += net * (ghs * TICK - lost)
        found.miner_mwh += now_w * TICK / 3.6e9
        found.energy_uusd += now_w * PUE_MINER / 1000 * TICK / 3.6e9 * price
        pays = even * net * HOUR > price * PUE_MINER / 1e9
        hosts_mw = int(load.watts[0, core.HOST]) * PUE_GPU
        best = min(int(budget[0]), (asleep + int(step_w[pays].sum())) * PUE_MINER)
        found.ideal_mw += hosts_mw + best
        found.used_mw += hosts_mw + min(best, now_w * PUE_MINER)
    return found


def _shed(
    site: Site, tree: core.PowerTree, budget: core.Ints, modes: dispatch.Modes, quote: dispatch.Prices, found: Lived,
    rose: bool, tick: int,
) -> dispatch.Modes:  # fmt: skip
    """As the site's loop does it: where watts are missing, whoever earns least per watt under that node sleeps."""
    fleet = site.fleet
    entry = fleet.at(modes)
    drawn = fleet.watts[entry]
    free = budget - core.reserved_mw(tree, core.Load.of(tree, fleet.node, np.full(len(drawn), core.MINER), drawn))
    if not (free < 0).any():
        return modes
    awake = np.flatnonzero(modes > 0)
    rest = fleet.watts[fleet.off[fleet.ladder[awake]]]
    table = core.Miners(
        fleet.node[awake].astype(np.int64), drawn[awake] - rest, dispatch.mode_values(fleet, quote)[entry[awake]]
    )
    made = core.choose_shed(tree, table, np.maximum(0, -free))
    modes = modes.copy()
    modes[awake[list(made.picks)]] = 0
    found.sheds += 1
    if rose:
        found.delays.append(tick)
    return modes
