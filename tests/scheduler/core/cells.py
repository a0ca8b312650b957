"""Random cells and queues for the tests of the placement core, and the truth that plans are checked against."""

from __future__ import annotations

import random
from collections import defaultdict

from scheduler.core.fit import Budget, host_row, host_watts, vram_of
from scheduler.core.types import FOREVER, Fleet, HostFlag, Kind, Level, Plan, Request, Running, Topology


def cell(dice: random.Random, hosts: int = 12, *, watts: bool = True, tight: float = 0.6) -> tuple[Fleet, list[dict]]:
    """A cell of a few leaves and sites under a tree of nodes; returns the node dicts too. `tight`: share of full draw."""
    rows = []
    pdus = max(1, hosts // 4)
    nodes = [{"parent": -1, "k_gpu": 1250}] + [{"parent": 0, "k_gpu": 1000} for _ in range(pdus)] if watts else []
    need = [0] * len(nodes)
    for i in range(hosts):
        gpus = dice.choice((0, 1, 2, 4, 8, 8))
        row = {
            "host_id": 100 + i,
            "cpu_free": dice.choice((16_000, 64_000, 96_000)),
            "ram_free": dice.choice((65_536, 262_144, 524_288)),
            "nvme_free": dice.choice((0, 500, 2000)),
            "gpu_model": dice.choice((0, 1, 2)) if gpus else -1,
            "gpus": gpus,
            "vram": dice.choice((24_576, 81_920)),
            "nvlink": [j // 4 if gpus == 8 else -1 for j in range(gpus)],
            "leaf": i // 3,
            "spine": i // 6,
            "site": i // 12,
            "pool": dice.choice((7, 7, 8)),
            "owner": dice.choice((0, 0, 0, 3)),
            "flags": int(HostFlag.SCHEDULABLE) | dice.choice((0, 0, 0, 0, int(HostFlag.DRAINING), int(HostFlag.OFF))),
            "standby_w": 20,
            "parked_w": 350,
            "base_w": 900,
            "gpu_min_w": 100,
            "gpu_max_w": 700,
            "cap_control": dice.choice((1, 1, 1, 0)),
            "taints": dice.choice((0, 0, 0, 0b1, 0b10, 0b11)),
            "leaves": dice.choice((0, 0, 0, 700, 2000)),
        }
        if gpus and dice.random() < 0.3:
            share = dice.choice((4, 2, 1))
            row["claimed_at"] = dice.choice((500, 900, 2500))
            row["claimed_gpus"] = (1 << max(1, gpus // share)) - 1
            row["owed_cpu"], row["owed_ram"] = row["cpu_free"] // share, row["ram_free"] // share
        if nodes:
            row["power_node"] = 1 + i % pdus
            full = 900 + gpus * 700 - 350
            need[row["power_node"]] += full * 1000
            need[0] += full * 1250
        rows.append(row)
    for node, most in zip(nodes, need, strict=True):
        free = int(most * tight * dice.random())
        node["free_mw"], node["reclaimable_mw"] = free, int(most * tight) - free
    return Fleet.build(rows, nodes), nodes


def queue(dice: random.Random, jobs: int = 25) -> list[Request]:
    """Jobs of all kinds: shares, whole devices, CPU only, gangs with topology."""
    out = []
    for job in range(1, jobs + 1):
        gpus = dice.choice((0, 1, 1, 1, 1, 2, 4, 8))
        gang = dice.random() < 0.2
        out.append(
            Request(
                job=job,
                org=dice.choice((1, 2, 3)),
                kind=dice.choice(list(Kind)),
                priority=dice.choice((0, 0, 5)),
                replicas=dice.choice((2, 3, 4)) if gang else 1,
                pool=dice.choice((0, 7, 8)),
                cpu=dice.choice((500, 4000, 12_000)),
                ram=dice.choice((1024, 32_768)),
                nvme=dice.choice((0, 0, 300)),
                gpus=gpus,
                gpu_milli=dice.choice((250, 400, 1000, 1000)) if gpus == 1 else 1000,
                vram=dice.choice((0, 8000, 40_000)),
                models=dice.choice((0, 0, 0, 0b001, 0b110)),
                site=dice.choice((-1, -1, -1, 0)),
                topology=Topology(
                    pack=dice.choice((Level.NONE, Level.HOST, Level.LEAF, Level.SPINE)) if gang else Level.NONE,
                    required=dice.random() < 0.5,
                    nvlink=dice.choice((0, 1, 2)),
                    spread=dice.choice((Level.NONE, Level.NONE, Level.HOST)) if gang else Level.NONE,
                    max_per_domain=dice.choice((0, 1, 2)),
                ),
                queued_at=dice.randrange(1000),
                duration_s=dice.choice((0, 0, 600)),
                tolerates=dice.choice((0, 0b1, 0b11, 0b11)),
                until=dice.choice((0, 700, 2000, FOREVER)),
                stays=dice.choice((0, 101, 500, 900, FOREVER)),
                quota_id=dice.choice((0, 0, 5)),
                quota_milli=4000,
            )
        )
        if out[-1].quota_id == 0:
            out[-1].quota_milli = -1
    return out


def owe(fleet: Fleet, host: int, gpus: tuple[int, ...], what: Request | Running, sign: int) -> None:
    """What stands on claimed GPUs brings its CPU and memory back with them."""
    if any(fleet.claimed_gpus[host] >> g & 1 for g in gpus):
        for column, amount in ((fleet.owed_cpu, what.cpu), (fleet.owed_ram, what.ram), (fleet.owed_nvme, what.nvme)):
            column[host] += sign * amount


def settle(fleet: Fleet, nodes: list[dict], plan: Plan, requests: list[Request]) -> tuple[Fleet, list[Running]]:
    """The cell after a plan: placements taken off the columns, and as running placements."""
    by_job = {r.job: r for r in requests}
    after = Fleet(**{name: getattr(fleet, name).copy() for name in Fleet.__dataclass_fields__})
    running = []
    for n, p in enumerate(plan.placements):
        r = by_job[p.job]
        before = host_row(after, p.host)
        old = host_watts(before, before.gpu_active, before.cpu_only)
        after.cpu_free[p.host] -= r.cpu
        after.ram_free[p.host] -= r.ram
        after.nvme_free[p.host] -= r.nvme
        owe(after, p.host, p.gpus, r, -1)
        for g in p.gpus:
            after.gpu_free[p.host, g] -= p.gpu_milli
            after.vram_free[p.host, g] -= vram_of(r.vram, r.gpu_milli, int(fleet.vram_total[p.host]))
            after.gpu_active[p.host] |= 1 << g
        if not p.gpus:
            after.cpu_only[p.host] += 1
        now = host_row(after, p.host)
        delta = host_watts(now, now.gpu_active, now.cpu_only) - old
        assert delta == p.watts_delta or plan.preemptions  # evictions between placements change what each adds
        node = int(after.power_node[p.host])
        while node >= 0:
            after.node_free_mw[node] -= delta * int(after.node_k_gpu[node])
            node = int(after.node_parent[node])
        running.append(
            Running(
                placement=1000 + n,
                job=r.job,
                org=r.org,
                kind=r.kind,
                host=p.host,
                gpus=p.gpus,
                gpu_milli=p.gpu_milli,
                cpu=r.cpu,
                ram=r.ram,
                nvme=r.nvme,
                vram=vram_of(r.vram, r.gpu_milli, int(fleet.vram_total[p.host])) if p.gpus else 0,
                bid=r.job % 5,
                priority=r.priority,
                work_lost_s=(r.job * 37) % 100,
                gang_size=r.replicas,
                ends_at=0,
            )
        )
    return after, running


def leave(fleet: Fleet, running: list[Running]) -> Fleet:
    """The cell after these placements left."""
    after = Fleet(**{name: getattr(fleet, name).copy() for name in Fleet.__dataclass_fields__})
    for r in running:
        before = host_row(after, r.host)
        old = host_watts(before, before.gpu_active, before.cpu_only)
        after.cpu_free[r.host] += r.cpu
        after.ram_free[r.host] += r.ram
        after.nvme_free[r.host] += r.nvme
        owe(after, r.host, r.gpus, r, 1)
        for g in r.gpus:
            after.gpu_free[r.host, g] += r.gpu_milli
            after.vram_free[r.host, g] += r.vram
            if after.gpu_free[r.host, g] == 1000:
                after.gpu_active[r.host] &= ~(1 << g)
        if not r.gpus:
            after.cpu_only[r.host] -= 1
        now = host_row(after, r.host)
        delta = host_watts(now, now.gpu_active, now.cpu_only) - old
        node = int(after.power_node[r.host])
        while node >= 0:
            after.node_free_mw[node] -= delta * int(after.node_k_gpu[node])
            node = int(after.node_parent[node])
    return after


def check(fleet: Fleet, plan: Plan, requests: list[Request], running: list[Running] = ()) -> None:
    """Never oversold, gangs whole, shapes and rules respected. Preempted placements have left first."""
    by_job = {r.job: r for r in requests}
    gone = {p.placement for p in plan.preemptions}
    start = leave(fleet, [r for r in running if r.placement in gone])
    end, _ = settle(start, [], plan, requests)
    for name in ("cpu_free", "ram_free", "nvme_free", "gpu_free", "vram_free"):
        assert getattr(end, name).min() >= 0, name
    if len(end.node_parent):
        admitted = end.node_free_mw + end.node_reclaimable_mw
        assert admitted.min() >= 0, f"watts oversold at node {admitted.argmin()}"
    replicas = defaultdict(list)
    for p in plan.placements:
        replicas[p.job].append(p)
        r = by_job[p.job]
        assert len(p.gpus) == r.gpus == len(set(p.gpus))
        assert all(g < fleet.gpu_count[p.host] for g in p.gpus)
        assert not r.pool or fleet.pool[p.host] == r.pool
        assert r.site < 0 or fleet.site[p.host] == r.site
        assert not r.models or r.models >> int(fleet.gpu_model[p.host]) & 1
        assert fleet.flags[p.host] & HostFlag.SCHEDULABLE
        assert not fleet.flags[p.host] & HostFlag.DRAINING
        assert fleet.owner[p.host] in {0, r.org}
        assert not fleet.taints[p.host] & ~r.tolerates
        assert not fleet.leaves[p.host] or r.until <= fleet.leaves[p.host]
        if 0 < fleet.claimed_at[p.host] < r.stays:
            assert not any(fleet.claimed_gpus[p.host] >> g & 1 for g in p.gpus)
        if r.topology.nvlink == 2 and r.gpus > 1:
            assert len({int(fleet.nvlink[p.host, g]) for g in p.gpus}) == 1
    quotas = defaultdict(int)
    for job, places in replicas.items():
        r = by_job[job]
        assert sorted(p.replica for p in places) == list(range(r.replicas)), f"job {job} is not whole"
        t = r.topology
        of = {Level.HOST: lambda h: h, Level.LEAF: lambda h: fleet.leaf[h], Level.SPINE: lambda h: fleet.spine[h]}
        of[Level.SITE] = lambda h: fleet.site[h]
        assert len({int(fleet.site[p.host]) for p in places}) == 1, "a gang stays at one site"
        if t.required and t.pack != Level.NONE and r.replicas > 1:
            assert len({int(of[t.pack](p.host)) for p in places}) == 1
        if t.spread == Level.HOST and t.max_per_domain and r.replicas > 1:
            hosts = [p.host for p in places]
            assert max(hosts.count(h) for h in hosts) <= t.max_per_domain
        quotas[r.quota_id] += r.replicas * r.gpus * r.gpu_milli
    assert quotas[5] <= 4000
    decided = [d.job for d in plan.decisions]
    assert sorted(decided) == sorted(by_job), "every job has one decision"
    assert {d.job for d in plan.decisions if d.placed} == set(replicas)


def budgets_of(fleet: Fleet, host: int) -> list[Budget]:
    """Ancestor nodes of `host`, lowest first."""
    chain, node = [], int(fleet.power_node[host])
    while node >= 0:
        free = int(fleet.node_free_mw[node]) + int(fleet.node_reclaimable_mw[node])
        chain.append(Budget(node, int(fleet.node_k_gpu[node]), free))
        node = int(fleet.node_parent[node])
    return chain
