"""A site-year through the real core: what hashing beside AI earns, against hashing alone, AI alone, and perfect foresight.

8,760 hours of energy price and hashprice, philly-shaped AI demand and 20 calls of the grid (`benchmarks.year_inputs`) at a mixed
site of 4 MW (`benchmarks.year_site`): 64 hosts of 8 H100 under the same PDUs as miners that could draw the whole contract. Jobs
are placed by the planner, under the site's watts; miners are shed, woken and tuned by the power loop's two tiers; the clock is
injected. Figures are USD of margin after energy, before capital: AI at one price per GPU-hour, hashing after the pool's fee.

`share_of_perfect_foresight`: ours over the bound of `benchmarks.year_bound`. As AI earns most of it, `hashing_share_of_bound`
tells beside it what hashing earned with the watts that our AI left, against knowing each hour's prices. `economic_power_used`:
of the watts that the caps leave (margins apart) and that pay at the hour's price, those that the books gave away.
`over_cap_instants`: turns after which any node's books stood over its cap or call. A demand response payment is not counted.
`--quick`: three weeks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks import year_inputs as inputs
from benchmarks.disciplines import Core
from benchmarks.harness import Options, Report, require, timed
from benchmarks.simulator import Cluster, Outcome, Start, Workload, simulate
from benchmarks.year_bound import solve
from benchmarks.year_inputs import HOUR, TICK, Call, Prices, parameter
from benchmarks.year_site import (
    BASE_W,
    CONFIRM_S,
    FEE_PPM,
    GPU_MAX_W,
    GPU_MIN_W,
    GPUS,
    HOST_W,
    PARKED_W,
    PUE_GPU,
    PUE_MINER,
    STANDBY_W,
    Site,
    live,
    under,
)  # fmt: skip
from scheduler.core import power as core
from scheduler.core.types import F64, I64, Fleet, Policy

HOSTS, CONTRACT_W, LOAD = 64, 4_000_000, 0.75
QUICK_DAYS = 21
POLICY = Policy(queue="age", preemption=False, explain=False, backfill_depth=4)
HALF_LIFE = 3 * 86_400
MUST = {
    "share_of_perfect_foresight": (">=", 0.97),
    "economic_power_used": (">=", 0.99),
    "over_cap_instants": ("<=", 0.0),
}


class Powered(Core):
    """The planner with the site's power tree before it: what all miners asleep would leave to hosts, calls included."""

    def __init__(self, work: Workload, cluster: Cluster, site: Site, calls: list[Call]) -> None:
        super().__init__(work, cluster, POLICY, half_life=HALF_LIFE)
        tree, fleet = site.tree, site.fleet
        self.limits = sorted(
            [(c.start * TICK, c) for c in calls] + [(c.end * TICK, None) for c in calls], key=lambda x: x[0]
        )
        asleep = fleet.watts[fleet.off[fleet.ladder]]
        kinds = np.r_[np.zeros(cluster.hosts, np.int64), np.full(len(asleep), core.MINER)]
        watts = np.r_[np.full(cluster.hosts, PARKED_W), asleep]
        self.site, self.load = site, core.Load.of(tree, np.r_[site.host_node, fleet.node], kinds, watts)
        hosts = [
            {
                "host_id": h, "gpus": cluster.per_host, "leaf": h // 8, "spine": h // 64, "power_node": int(site.host_node[h]),
                "standby_w": STANDBY_W, "parked_w": PARKED_W, "base_w": BASE_W, "gpu_min_w": GPU_MIN_W, "gpu_max_w": GPU_MAX_W,
            }
            for h in range(cluster.hosts)
        ]  # fmt: skip
        nodes = [{"parent": int(up), "k_gpu": int(k[core.HOST])} for up, k in zip(tree.parent, tree.k, strict=True)]
        self.fleet, self.tree, self.active = Fleet.build(hosts, nodes), tree, np.zeros(cluster.hosts, np.int64)
        self._free()

    def _free(self) -> None:
        self.fleet.node_free_mw[:] = core.free_mw(self.tree, self.load, core.margins_w(self.tree))

    def decide(self, now: int, arrived: list[int], ended: list[int]) -> list[Start]:
        while self.limits and self.limits[0][0] <= now:
            self.tree = under(self.site.tree, self.limits.pop(0)[1])
            self._free()
        return super().decide(now, arrived, ended)

    def _start(self, now: int, job: int, where: list[tuple[int, tuple[int, ...]]]) -> Start:
        self._book([(host, len(gpus)) for host, gpus in where])
        return super()._start(now, job, where)

    def _end(self, job: int) -> None:
        self._book([(r.host, -len(r.gpus)) for r in self.running[job]])
        super()._end(job)

    def _book(self, changes: list[tuple[int, int]]) -> None:
        for host, gpus in changes:
            before = HOST_W[self.active[host]]
            self.active[host] += gpus
            node = int(self.site.host_node[host])
            self.load = self.load.plus(self.tree, node, core.HOST, int(HOST_W[self.active[host]] - before))
        self._free()


@dataclass(frozen=True)
class Ai:
    """What the planner made of the jobs: bookings of hosts by tick, and GPU-hours served before the end."""

    at: I64
    host: I64
    watts: I64
    gpu_hours: float
    starts: I64  # ticks
    width: I64
    delay_h: float


def served(work: Workload, found: Outcome, ticks: int) -> Ai:
    rows: list[tuple[int, int, int, int]] = []
    for job, start in enumerate(found.start.tolist()):
        hosts = found.hosts[found.first[job] : found.first[job + 1]].tolist()
        end = start + int(work.duration[job])
        for host in hosts:
            rows += [(start // TICK, 1, host, int(work.gpus[job])), (end // TICK, 0, host, -int(work.gpus[job]))]
    rows.sort()
    active, at, host, watts = np.zeros(HOSTS, np.int64), [], [], []
    for tick, _, h, gpus in rows:
        active[h] += gpus
        require(0 <= active[h] <= GPUS, f"host {h} holds {active[h]} GPUs")
        if tick < ticks:
            at.append(tick)
            host.append(h)
            watts.append(int(HOST_W[active[h]]))
    ran = np.clip(np.minimum(found.start + work.duration, ticks * TICK) - found.start, 0, None)
    return Ai(
        np.array(at, np.int64), np.array(host, np.int64), np.array(watts, np.int64), float((ran * work.width).sum()) / HOUR,
        found.start // TICK, work.width, found.delay(work) / HOUR,
    )  # fmt: skip


def hosts_usd(ai: Ai, energy: I64, ticks: int) -> tuple[float, F64]:
    """USD of the hosts' energy at the meter, and what they book by tick (W)."""
    change = np.zeros(ticks + 1)
    booked = np.full(HOSTS, PARKED_W, np.int64)
    for tick, host, watts in zip(ai.at.tolist(), ai.host.tolist(), ai.watts.tolist(), strict=True):
        change[tick] += watts - booked[host]
        booked[host] = watts
    held = HOSTS * PARKED_W + np.cumsum(change[:ticks])
    price = energy[np.arange(ticks) * TICK // HOUR] / 1e6
    drawn = held * parameter("host_draw_share") * PUE_GPU / 1000
    return float((drawn * price).sum() * TICK / 3.6e9), held


def hash_bound(site: Site, room_mw: F64, prices: Prices, ticks: int) -> float:
    """USD: the best hashing of each tick with this much room for steps at the root, knowing its prices."""
    step_w, step_ghs = site.steps()
    order = np.argsort(-step_ghs / step_w)
    watts, ghs = step_w[order], step_ghs[order]
    top = np.concatenate([[0], np.cumsum(watts)])
    total = 0.0
    for hour in range(ticks * TICK // HOUR):
        net = prices.hashprice[hour] / 1e6 * (1 - FEE_PPM / 1e6) / 24e6
        gain = np.maximum(0.0, ghs / watts * net - prices.energy[hour] / 1e6 * PUE_MINER / 1e9)
        worth = np.concatenate([[0.0], np.cumsum(gain * watts)])
        part = room_mw[hour * HOUR // TICK : (hour + 1) * HOUR // TICK] / PUE_MINER
        total += float(np.interp(part, top, worth).mean())
    return total


def run(options: Options) -> Report:
    seed = options.seeds[0] if options.seeds else 42
    ticks = (QUICK_DAYS if options.quick else 365) * 86_400 // TICK
    hours = ticks * TICK // HOUR
    prices, calls = inputs.prices(hours, seed, options), inputs.calls(ticks, seed)
    site, bare = Site.of(HOSTS, CONTRACT_W, seed), Site.of(0, CONTRACT_W, seed)
    work, source = inputs.jobs(ticks, HOSTS * GPUS, LOAD, seed, options)
    took: list[float] = []
    with timed(took):
        planner = Powered(work, Cluster(HOSTS, GPUS), site, calls)
        ai = served(work, simulate(work, Cluster(HOSTS, GPUS), planner), ticks)
    with timed(took):
        ours = live(site, ai.at, ai.host, ai.watts, prices, calls, ticks)
    with timed(took):
        nobody = np.zeros(0, np.int64)
        mined = live(bare, nobody, nobody, nobody, prices, calls, ticks)
    require(ours.plans > hours and ours.sheds > hours // 50 and planner.plans > len(work) // 50, "nothing was decided")
    usd_h, share = parameter("gpu_usd_h"), parameter("host_draw_share")
    ai_energy, held = hosts_usd(ai, prices.energy, ticks)
    # A job whose watts had to come free first starts that much later, and is paid that much less.
    waited = np.isin(ai.starts, ours.delays)
    late = float(ai.width[waited].sum()) * CONFIRM_S / HOUR
    price = prices.energy[np.arange(ticks) * TICK // HOUR] / 1e6
    fixed = int(site.tree.fixed_w[0])
    idle = float((price * fixed).sum() * TICK / 3.6e9)  # what is always on
    hash_usd, mine_energy = ours.hash_uusd / 1e6, ours.energy_uusd / 1e6
    margins = {
        "all hashing": (0.0, mined.hash_uusd / 1e6, 0.0, mined.energy_uusd / 1e6),
        "AI only": (ai.gpu_hours * usd_h, 0.0, ai_energy, 0.0),
        "ours": ((ai.gpu_hours - late) * usd_h, hash_usd, ai_energy, mine_energy),
    }
    with timed(took):
        root = room(site, calls, ticks)
        asleep_w = site.asleep_w()
        parked = HOSTS * PARKED_W
        free = root - 1.0 * asleep_w * PUE_MINER
        known = solve(
            *site.steps(), prices.energy, prices.hashprice, (free - parked * PUE_GPU).reshape(hours, -1).mean(axis=1),
            asked(work, ticks), HOSTS * GPUS, usd_h, (HOST_W[GPUS] - PARKED_W) / GPUS, share * (HOST_W[GPUS] - PARKED_W) / GPUS,
        )  # fmt: skip
        still = asleep_w * PUE_MINER / 1000 + parked * share * PUE_GPU / 1000
        best = known.total - float((price * still).sum() * TICK / 3.6e9)
        best_hash = hash_bound(site, free - held * PUE_GPU, prices, ticks)
    earned = sum(margins["ours"][:2]) - sum(margins["ours"][2:])
    lain = float((price * asleep_w).sum() * TICK / 3.6e9) * PUE_MINER / 1000
    require(earned <= best * (1 + 1e-9) and hash_usd - mine_energy + lain <= best_hash * (1 + 1e-9), "over the bound")
    figures = {
        "share_of_perfect_foresight": (earned - idle) / (best - idle),
        "economic_power_used": ours.used_mw / ours.ideal_mw,
        "over_cap_instants": float(ours.over + mined.over),
        "hashing_share_of_bound": (hash_usd - mine_energy + lain) / best_hash,
        "over_ai_only": (earned - idle) / (sum(margins["AI only"][:2]) - ai_energy - idle),
        "over_all_hashing": (earned - idle) / (margins["all hashing"][1] - margins["all hashing"][3] - idle),
    }
    table = [["", "AI GPU-h", "AI, USD", "hashing, USD", "energy, USD", "margin, USD"]]
    for name, (paid, hashed, host_cost, mine_cost) in margins.items():
        gpu_h = ai.gpu_hours if paid else 0.0
        spent = host_cost + mine_cost + idle
        table.append(
            [name, f"{gpu_h:,.0f}", f"{paid:,.0f}", f"{hashed:,.0f}", f"{spent:,.0f}", f"{paid + hashed - spent:,.0f}"]
        )
    table.append(["perfect foresight (bound)", f"{known.gpu_hours:,.0f}", "", "", "", f"{best - idle:,.0f}"])
    return Report(
        "year",
        figures,
        {
            "all_hashing_usd": margins["all hashing"][1] - margins["all hashing"][3] - idle,
            "ai_only_usd": sum(margins["AI only"][:2]) - ai_energy - idle,
            "ours_usd": earned - idle,
            "perfect_foresight_usd": best - idle,
            "ours_mwh": (ours.miner_mwh * PUE_MINER + held.sum() * TICK / 3.6e9 * share * PUE_GPU) / 1000 + fixed * ticks * TICK / 3.6e9,
            "all_hashing_mwh": mined.miner_mwh * PUE_MINER / 1000 + fixed * ticks * TICK / 3.6e9,
        },
        {
            "days": ticks * TICK // 86_400,
            "prices": prices.source,
            "jobs": len(work),
            "jobs_from": source,
            "mean_energy_usd_mwh": round(float(prices.energy.mean() / 1e6), 2),
            "mean_hashprice": round(float(prices.hashprice.mean() / 1e6), 2),
            "calls": len(calls),
            "gpus": HOSTS * GPUS,
            "miners": len(site.fleet.node),
            "gpu_use": round(ai.gpu_hours / (HOSTS * GPUS * hours), 3),
            "mean_wait_h": round(ai.delay_h, 2),
            "plans": planner.plans,
            "dispatches": ours.plans,
            "sheds": ours.sheds,
            "slept_woken": f"{ours.slept}, {ours.woken}",
            "seconds": "jobs {:.0f}, ours {:.0f}, all hashing {:.0f}, bound {:.0f}".format(*took),
            "watts": "no public trace carries watts: nameplates; power used is what the books hold",
            "parameters": {name: f"{value:g} ({said})" for name, (value, said) in inputs.PARAMETERS.items()},
        },
        MUST,
        table,
    )  # fmt: skip


def room(site: Site, calls: list[Call], ticks: int) -> F64:
    """MW that the root leaves to hosts and miners together, by tick."""

    def left(call: Call | None) -> int:
        tree = under(site.tree, call)
        return int(1000 * (tree.allowed_w[0] - tree.fixed_w[0] - core.margins_w(tree)[0]))

    found = np.full(ticks, float(left(None)))
    for call in calls:
        found[call.start : call.end] = left(call)
    return found


def asked(work: Workload, ticks: int) -> F64:
    """GPU-hours that became due by the hour, as far as they could run before the end."""
    most = np.minimum(work.duration, ticks * TICK - work.submit) * work.width / HOUR
    out: F64 = np.bincount(work.submit // HOUR, most, minlength=ticks * TICK // HOUR).astype(np.float64)
    return out
