"""Site specifications: what hangs where, with which nameplate. `python -m sandbox.site.spec demo|openb > site.json`.

A spec is plain JSON:

    {"name", "seed", "miner_port", "provenance",
     "nodes":  [{"name", "parent", "kind", "cap_w", "fixed_w", "overhead_gpu_permille", "overhead_miner_permille", "metered"}],
     "hosts":  [the host rows of docs/agent-protocol.md],
     "miners": [the miner rows of docs/agent-protocol.md]}

Watts are integers. Parents stand before their children.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from typing import Any

Spec = dict[str, Any]

# Ladders [mode, W, GH/s]; index 0 is sleep. Top modes: vendor figures; lower steps follow th ~ w^0.75 (research/power.md, section 2 and 6).
MINER_MODELS: dict[str, list[list[Any]]] = {
    "S21": [["sleep", 25, 0], ["eco", 2400, 155_000], ["normal", 3500, 200_000]],
    "S19XP": [["sleep", 25, 0], ["eco", 2150, 109_000], ["normal", 3010, 140_000]],
    "S19jPro": [["sleep", 25, 0], ["eco", 2150, 80_000], ["normal", 3068, 104_000]],
    "S19kPro": [["sleep", 25, 0], ["eco", 1970, 95_000], ["normal", 2760, 120_000]],
}

# gpu_max_w, gpu_min_w, VRAM MiB by GPU model. G2 and G3 are anonymised in the trace: their watts are declared assumptions.
OPENB_GPUS: dict[str, tuple[int, int, int]] = {
    "P100": (250, 125, 16_384),
    "T4": (70, 60, 15_360),
    "V100M16": (300, 100, 16_384),
    "V100M32": (300, 100, 32_768),
    "A10": (150, 100, 24_576),
    "G2": (300, 100, 32_768),
    "G3": (400, 100, 81_920),
}
HOSTS_A_PDU = 16
FIXED_W = 5_000


def node(
    name: str,
    parent: str | None,
    kind: str,
    cap_w: int,
    *,
    fixed_w: int = 0,
    gpu: int = 1000,
    miner: int = 1000,
) -> dict[str, Any]:
    return {
        "name": name,
        "parent": parent,
        "kind": kind,
        "cap_w": cap_w,
        "fixed_w": fixed_w,
        "overhead_gpu_permille": gpu,
        "overhead_miner_permille": miner,
        "metered": True,
    }


def host(name: str, power_node: str, model: str, gpus: int, watts: tuple[int, int, int, int, int], **more: Any) -> Spec:
    """A host row. `watts` = (standby, parked, base, gpu_min, gpu_max)."""
    standby, parked, base, gpu_min, gpu_max = watts
    row = {
        "name": name,
        "gpu_model": model,
        "gpus": gpus,
        "vram_mib": 81_920,
        "vcpu_milli": 192_000,
        "ram_mib": 2_097_152,
        "nvme_gib": 28_000,
        "power_node": power_node,
        "leaf": "leaf-1",
        "spine": "spine-1",
        "nvlink_domains": [0] * gpus,
        "standby_w": standby,
        "parked_w": parked,
        "base_w": base,
        "gpu_min_w": gpu_min,
        "gpu_max_w": gpu_max,
        "cap_control": True,
    }
    row.update(more)
    return row


def miner(number: int, model: str, power_node: str, port: int, block: int) -> Spec:
    return {
        "name": f"m{number:04d}",
        "model": model,
        "power_node": power_node,
        "driver": "luxos",
        "address": f"127.{block}.{number // 250}.{number % 250 + 1}:{port}",
        "modes": [list(mode) for mode in MINER_MODELS[model]],
    }


def nameplate_w(host_row: Spec) -> int:
    return int(host_row["base_w"] + host_row["gpus"] * host_row["gpu_max_w"])


def top_w(miner_row: Spec) -> int:
    return int(miner_row["modes"][-1][1])


def _sum(rows: Iterable[Spec], nodes: set[str], key: Any) -> int:
    return sum(key(row) for row in rows if row["power_node"] in nodes)


def demo_site(seed: int = 1, *, miner_port: int = 4028, name: str = "demo") -> Spec:
    """A small mixed site: 6 hosts of 8 H100, 2 hosts of 4 L40S, 60 miners.

    All miners at full power and all hosts parked fill every PDU and the site to 96-97 %: a GPU can only start
    when miners under the same PDU sleep. All hosts at nameplate fit when most miners sleep.
    """
    rng = Random(seed)
    block = 10 + seed % 200
    h100 = (60, 1100, 4600, 200, 700)
    l40s = (40, 420, 1100, 100, 350)
    hosts = [
        host(f"h{i + 1:03d}", pdu, "H100-SXM", 8, h100, leaf=f"leaf-{1 + i // 4}")
        for i, pdu in enumerate(["pdu-a1", "pdu-a1", "pdu-a2", "pdu-a2", "pdu-b1", "pdu-b1"])
    ]
    hosts += [
        host(
            f"l{i + 1:03d}",
            "pdu-b2",
            "L40S",
            4,
            l40s,
            vram_mib=46_068,
            vcpu_milli=96_000,
            ram_mib=524_288,
            nvme_gib=7_000,
            leaf="leaf-2",
            nvlink_domains=[0, 1, 2, 3],
        )
        for i in range(2)
    ]
    miners: list[Spec] = []
    for pdu, count in (("pdu-a1", 12), ("pdu-a2", 12), ("pdu-b1", 12), ("pdu-b2", 8), ("pdu-c1", 16)):
        for _ in range(count):
            model = rng.choice(["S21", "S21", "S19XP", "S19jPro"])
            miners.append(miner(len(miners), model, pdu, miner_port, block))

    def idle_w(nodes: set[str], gpu: int, asic: int) -> int:
        parked = _sum(hosts, nodes, lambda h: h["parked_w"])
        hashing = _sum(miners, nodes, top_w)
        return (parked * gpu + hashing * asic) // 1000

    def cap(nodes: set[str], *, fixed: int = 0, gpu: int = 1000, asic: int = 1000, fill: float = 0.965) -> int:
        return round((idle_w(nodes, gpu, asic) + fixed) / fill / 100) * 100

    pdus = {"hall-1": ["pdu-a1", "pdu-a2"], "hall-2": ["pdu-b1", "pdu-b2", "pdu-c1"]}
    everything = {p for group in pdus.values() for p in group}
    nodes = [
        node(
            "site",
            None,
            "site",
            cap(everything, fixed=FIXED_W, gpu=1250, asic=1050),
            fixed_w=FIXED_W,
            gpu=1250,
            miner=1050,
        )
    ]
    for hall, names in pdus.items():
        nodes.append(node(hall, "site", "building", cap(set(names), fixed=500, fill=0.955), fixed_w=500))
        nodes.extend(node(p, hall, "pdu", cap({p})) for p in names)
    return {
        "name": name,
        "seed": seed,
        "miner_port": miner_port,
        "provenance": "generated; nameplate watts of public data sheets",
        "nodes": nodes,
        "hosts": hosts,
        "miners": miners,
    }


def openb_host(row: dict[str, str], pdu: str) -> Spec:
    """One GPU node of the openb trace with synthesised watts: base = 200 W + 2 W a vCPU + 25 W a GPU."""
    gpus, model = int(row["gpu"]), row["model"]
    gpu_max, gpu_min, vram = OPENB_GPUS[model]
    vcpu = int(row["cpu_milli"])
    base = 200 + 2 * vcpu // 1000 + 25 * gpus
    parked = base * 45 // 100 + gpus * gpu_max * 12 // 100
    return host(
        row["sn"],
        pdu,
        model,
        gpus,
        (15, parked, base, gpu_min, gpu_max),
        vram_mib=vram,
        vcpu_milli=vcpu,
        ram_mib=int(row["memory_mib"]),
        nvme_gib=1_000,
        leaf=f"leaf-{pdu}",
        nvlink_domains=list(range(gpus)),
    )


def openb_site(
    trace_dir: str | Path,
    limit: int | None = None,
    *,
    seed: int = 42,
    miners: int = 1000,
    miner_port: int = 4028,
    name: str = "openb",
) -> Spec:
    """The real openb GPU nodes (sizes and models from the trace), watts synthesised from nameplates, 16 hosts a PDU.

    `trace_dir` is the folder that holds `openb/` (or that folder itself). Raises FileNotFoundError without the trace.
    The site's cap is what all miners at full power and all hosts parked take, at 97 %.
    """
    folder = Path(trace_dir)
    path = next((p for p in (folder / "openb", folder) if (p / "openb_node_list_gpu_node.csv").exists()), None)
    if path is None:
        raise FileNotFoundError(f"no openb_node_list_gpu_node.csv in {folder} or {folder / 'openb'}")
    with (path / "openb_node_list_gpu_node.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[:limit]
    spec = _assemble(rows, Random(seed), miners=miners, miner_port=miner_port)
    spec.update(
        name=name, seed=seed, provenance="openb GPU nodes (Alibaba, Apache-2.0); watts synthesised from nameplates"
    )
    return spec


def synthetic_site(
    hosts: int = 200, *, seed: int = 42, miners: int = 200, miner_port: int = 4028, name: str = "synthetic"
) -> Spec:
    """As `openb_site`, from our own generator: for machines without the trace."""
    rng = Random(seed)
    shapes = [(96_000, 8, "G2"), (64_000, 2, "P100"), (96_000, 2, "T4"), (128_000, 8, "G3"), (96_000, 8, "V100M32")]
    rows = []
    for i in range(hosts):
        vcpu, gpus, model = rng.choices(shapes, weights=[45, 11, 33, 4, 7])[0]
        rows.append(
            {"sn": f"node-{i:04d}", "cpu_milli": str(vcpu), "memory_mib": "393216", "gpu": str(gpus), "model": model}
        )
    spec = _assemble(rows, rng, miners=miners, miner_port=miner_port)
    spec.update(
        name=name, seed=seed, provenance="generated in the shape of the openb nodes; watts synthesised from nameplates"
    )
    return spec


def _assemble(rows: Sequence[dict[str, str]], rng: Random, *, miners: int, miner_port: int) -> Spec:
    host_pdus = -(-len(rows) // HOSTS_A_PDU)
    halls = [f"hall-{i + 1}" for i in range(max(1, host_pdus // 20))]
    hosts = [openb_host(row, f"pdu-g{i // HOSTS_A_PDU:03d}") for i, row in enumerate(rows)]
    miner_pdus = max(len(halls), -(-miners // 40))
    fleet = [
        miner(i, rng.choice(["S21", "S19XP", "S19jPro", "S19kPro"]), f"pdu-m{i % miner_pdus:03d}", miner_port, 20)
        for i in range(miners)
    ]
    hall_of = {f"pdu-g{i:03d}": halls[i % len(halls)] for i in range(host_pdus)}
    hall_of |= {f"pdu-m{i:03d}": halls[i % len(halls)] for i in range(miner_pdus)}
    pdu_caps = {
        pdu: round((_sum(hosts, {pdu}, nameplate_w) + _sum(fleet, {pdu}, top_w)) * 1.06 / 100) * 100 for pdu in hall_of
    }
    parked = sum(h["parked_w"] for h in hosts)
    hashing = sum(top_w(m) for m in fleet)
    site_cap = round((parked * 1.25 + hashing * 1.05 + FIXED_W) / 0.97 / 100) * 100
    nodes = [node("site", None, "site", site_cap, fixed_w=FIXED_W, gpu=1250, miner=1050)]
    for hall in halls:
        below = [p for p, h in hall_of.items() if h == hall]
        nodes.append(node(hall, "site", "building", sum(pdu_caps[p] for p in below) + 1000, fixed_w=500))
        nodes.extend(node(p, hall, "pdu", pdu_caps[p]) for p in below)
    return {"miner_port": miner_port, "nodes": nodes, "hosts": hosts, "miners": fleet}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sandbox.site.spec", description=__doc__)
    parser.add_argument("kind", choices=["demo", "openb", "synthetic"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--traces", default="../shared/traces")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--miners", type=int, default=1000)
    parser.add_argument("--miner-port", type=int, default=4028)
    args = parser.parse_args()
    if args.kind == "demo":
        spec = demo_site(args.seed, miner_port=args.miner_port)
    elif args.kind == "openb":
        spec = openb_site(args.traces, args.limit, seed=args.seed, miners=args.miners, miner_port=args.miner_port)
    else:
        spec = synthetic_site(args.limit or 200, seed=args.seed, miners=args.miners, miner_port=args.miner_port)
    print(json.dumps(spec))


if __name__ == "__main__":
    main()
