"""Operators and their sites, as they come to be: sign-up, the site and its CSV imports, an agent's enrolment, listings."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

from benchmarks.fault_site import Asic, Machine, Node
from marketplace import ids
from marketplace.models import Agent
from sandbox.market.clock import Clock
from sandbox.market.doors import Desk, Stripe, Web, sign_up
from sandbox.market.screener import profile
from sandbox.market.site import Facility
from sandbox.site.spec import MINER_MODELS, host, miner, node
from sandbox.smoke.world import nodes_csv, rows_csv

H100 = (60, 1_100, 4_600, 200, 700)  # standby, parked, base, least and most of a GPU, W
L40S = (50, 500, 1_500, 100, 350)
PRICES: dict[str, dict[str, int]] = {
    "H100-SXM": {
        "on_demand_price": 2_490_000,
        "reserved_price": 1_990_000,
        "flexible_price": 1_690_000,
        "spot_floor": 990_000,
    },
    "L40S": {"on_demand_price": 890_000, "reserved_price": 690_000, "flexible_price": 590_000, "spot_floor": 390_000},
}
PUE, MINER_PUE = 1_250, 1_050


@dataclass
class Operator:
    name: str
    id: str
    desk: Desk
    sites: list[Facility] = field(default_factory=list)
    listings: dict[str, str] = field(default_factory=dict)  # id -> GPU model


def operator(web: Web, stripe: Stripe, name: str) -> Operator:
    organization, desk = sign_up(web, name, is_operator=True, is_customer=False)
    desk.put("verification", profile(name, "US"))
    stripe.onboard(desk, name)
    return Operator(name, organization, desk)


def spec(name: str, model: str, hosts: int, miners: int) -> dict[str, Any]:
    """Two PDUs under one root; all hosts can run at full power when the machines sleep, and no more than some of them else."""
    watts, gpus = (H100, 8) if model == "H100-SXM" else (L40S, 4)
    vram = 81_920 if model == "H100-SXM" else 49_152
    rows = [
        host(f"{name}-h{i}", f"pdu-{1 + i % 2}", model, gpus, watts, vram_mib=vram, leaf=f"leaf-{i // 2}")
        for i in range(hosts)
    ]
    asics = [miner(i, "S21", f"pdu-{1 + i % 2}", 4028, 9) for i in range(miners)]
    full = [
        sum(r["base_w"] + r["gpus"] * r["gpu_max_w"] for r in rows if r["power_node"] == f"pdu-{n}") for n in (1, 2)
    ]
    # Beside full hosts, two machines of each PDU may stay awake; 4 % for margins and what sleeping machines draw.
    caps = [(w + 2 * 3_500 + 25 * miners) * 104 // 100 + 1_000 for w in full]
    root = (sum(full) * PUE + (4 * 3_500 + 25 * miners) * MINER_PUE) // 1000 * 104 // 100 + 2_000
    nodes = [
        node("site", None, "site", root, gpu=PUE, miner=MINER_PUE),
        *(node(f"pdu-{n}", "site", "pdu", caps[n - 1]) for n in (1, 2)),
    ]
    return {"name": name, "nodes": nodes, "hosts": rows, "miners": asics}


def plant(owner: Operator, clock: Clock, dice: Random, plan: dict[str, Any], *, region: str) -> Facility:
    """The site by the API and its CSV imports, its agent enrolled, its hosts listed and published."""
    api = owner.desk
    root, *below = plan["nodes"]
    body = {
        "name": plan["name"], "region": region, "contract_power_w": root["cap_w"], "pue_permille": PUE,
        "miner_pue_permille": MINER_PUE, "energy_price_microusd_per_kwh": 45_000,
    }  # fmt: skip
    site = api.post("sites", body)["id"]
    for kind, text in (
        ("power_nodes", nodes_csv(below)),
        ("hosts", rows_csv(plan["hosts"])),
        ("miners", rows_csv(plan["miners"])),
    ):
        report = api.post(f"sites/{site}/import", {"kind": kind, "csv": text})
        assert not report["error_count"], report["errors"][:3]
    token = api.post(f"sites/{site}/enrolment-tokens")["token"]
    api.post("agent/enrol", {"token": token, "name": plan["name"], "version": "1", "runtime": "podman"})
    found = _facility(plan, site, dice, clock)
    owner.sites.append(found)
    _list(owner, plan, site)
    return found


def _facility(plan: dict[str, Any], site: str, dice: Random, clock: Clock) -> Facility:
    pk = ids.decode("sit", site)
    assert pk is not None
    nodes = {
        n["name"]: Node(
            n["name"], n["parent"], n["cap_w"], n["fixed_w"], n["overhead_gpu_permille"], n["overhead_miner_permille"]
        )
        for n in plan["nodes"]
    }
    machines = {
        h["name"]: Machine(
            h["name"], h["power_node"], h["gpus"], h["vram_mib"], h["base_w"], h["parked_w"], h["gpu_min_w"], h["gpu_max_w"],
            cap_control=True, limits=[h["gpu_min_w"]] * h["gpus"],
        )
        for h in plan["hosts"]
    }  # fmt: skip
    modes = MINER_MODELS["S21"]
    asics = {
        m["name"]: Asic(m["name"], m["power_node"], [r[0] for r in modes], [r[1] for r in modes], len(modes) - 1)
        for m in plan["miners"]
    }
    return Facility(
        pk, Agent.objects.get(site=pk).pk, Random(dice.random()), machines, asics, nodes, lease_until=clock.now, name=plan["name"],
        public_id=site,
    )  # fmt: skip


def _list(owner: Operator, plan: dict[str, Any], site: str) -> None:
    model = plan["hosts"][0]["gpu_model"]
    hosts = [row["id"] for row in owner.desk.every("hosts", site=site)]
    terms = {"upfront_permille": 200} if model == "L40S" else {}
    body = {
        "site": site, "title": f"{model} at {plan['name']}", "hosts": hosts, "gpu_model": model, "min_term_hours": 2,
        "max_term_days": 40, "flexible_hours_per_month": 6, "flexible_notice_s": 600, **PRICES[model], **terms,
    }  # fmt: skip
    listing = str(owner.desk.post("listings", body)["id"])
    owner.desk.post(f"listings/{listing}/publish")
    owner.listings[listing] = model
