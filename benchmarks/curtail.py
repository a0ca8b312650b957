"""A grid call at a 40 MW site: from its announcement until the site's own meter has fallen by 15 MW.

Three processes, as in production, in real time: control (PostgreSQL, `services.curtailments`, the site loop), the agent's half (`agent.
miners.fleet` over TCP), and the site (`sandbox.site`: ramps, cooling, meters with noise). Hosts with firm work fill some of the caps.
The peer is the ramp alone: the same machines, all put to sleep in one instant of the same physics, seen by the same meter. With --quick
the site is a tenth of it in every respect (4 MW, 1.5 MW to fall), and `seconds_to_15mw` is the time of that.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx

from benchmarks.harness import Options, Report, require

SITE_W, CUT_W = 40_000_000, 15_000_000
PUE, PER_PDU, FIRM_HOSTS = 1.05, 150, 8
WATTS = 3500
LOOK_S = 0.25
PATIENCE_S = 120.0
H100 = (60, 1100, 4600, 200, 700)


def site_spec(share: float) -> dict[str, Any]:
    """Machines that draw `share` of the site's watts under PDUs of 150, and a few hosts under PDUs of their own."""
    from sandbox.site.spec import host, miner, node

    count = int(SITE_W * share / (WATTS * PUE * 0.975))  # of machines, that draw a little less than nameplate
    firm = max(1, round(FIRM_HOSTS * share))
    pdus = -(-count // PER_PDU)
    nodes = [node("site", None, "site", round(count * WATTS * PUE * 1.03 + firm * 10_200 * 1.25), gpu=1250, miner=1050)]
    nodes += [node(f"pdu-{i}", "site", "pdu", round(PER_PDU * WATTS * 1.03)) for i in range(pdus)]
    nodes.append(node("pdu-gpu", "site", "pdu", firm * 10_200 * 2))
    miners = []
    for i in range(count):
        row = miner(i % 60_000, "S21", f"pdu-{i // PER_PDU}", 0, 20)
        row["name"], row["address"] = f"m{i:05d}", f"127.{20 + i // 62_500}.{i // 250 % 250}.{i % 250 + 1}:0"
        miners.append(row)
    hosts = [host(f"h{i}", "pdu-gpu", "H100-SXM", 8, H100) for i in range(firm)]
    return {"name": "curtail", "seed": 7, "miner_port": 0, "nodes": nodes, "hosts": hosts, "miners": miners}


# --- the agent's half
def agent_half(link: Connection, spec: dict[str, Any], url: str, folder: str) -> None:
    """A process: commands in, reports out, until told to stop."""
    asyncio.run(_agent(link, spec, url, folder))


async def _agent(link: Connection, spec: dict[str, Any], url: str, folder: str) -> None:
    from agent.events import Events
    from agent.miners.fleet import Fleet
    from agent.reports import Reports
    from agent.store import Store

    reports = Reports()
    store = Store(Path(folder))
    fleet = Fleet(
        spec["miners"], store, reports, Events(store), poll_s=300, timeout_s=4, retry_s=8, concurrency=200,
        may_wake=lambda _: False,
    )  # fmt: skip
    running = asyncio.create_task(fleet.run())
    async with httpx.AsyncClient(base_url=url, timeout=5) as http:
        while True:
            while link.poll():
                told = link.recv()
                if told is None:
                    running.cancel()
                    await asyncio.gather(running, return_exceptions=True)
                    store.close()
                    return
                fleet.apply(told)
            meters = (await http.get("/meters")).json()["meters"]
            rows, versions = reports.collect(full=False)
            reports.acknowledge(versions)
            link.send((meters, rows["miners"]))
            await asyncio.sleep(LOOK_S)


# --- control
class Control:
    """The site's rows as an agent has reported them, and its loop."""

    def __init__(self, spec: dict[str, Any]) -> None:
        from django.utils import timezone

        from benchmarks.books import clone
        from benchmarks.cell import analyze
        from tests import factories as f

        now = timezone.now()
        self.site = f.site(power_w=spec["nodes"][0]["cap_w"], pdus=0)
        self.site.power_nodes.exclude(name="site").delete()
        root = self.site.power_nodes.get(name="site")
        by_name = {"site": root}
        for row in spec["nodes"][1:]:
            by_name[row["name"]] = f.node(self.site, row["name"], parent=root, cap_w=row["cap_w"])
        self.root = root
        agent, _ = f.agent(self.site, last_sync_at=now, lease_until=now + timedelta(hours=1))
        self.agent, self.sequence = agent, 0
        hosts = [f.host(self.site, row["name"], power_node=by_name["pdu-gpu"], beat_at=now) for row in spec["hosts"]]
        contract = f.contract(f.listing(self.site, hosts=hosts), f.organization(), gpu_count=8 * len(hosts))
        for host in hosts:
            f.placement(f.job(contract, state="running", gpus=8), host, state="running", running_at=now)
        pdus = [by_name[f"pdu-{i}"].pk for i in range(len(spec["nodes"]) - 2)]
        one = f.miner(self.site, "m00000", power_node=by_name["pdu-0"], measured_at=now)
        clone(
            "marketplace_miner", one.pk, len(spec["miners"]) - 1, name="'m' || lpad(g::text, 5, '0')",
            power_node_id=f"('{{{','.join(map(str, pdus))}}}'::bigint[])[1 + g / {PER_PDU}]",
        )  # fmt: skip
        self._book()
        analyze()

    def _book(self) -> None:
        """The nodes' sums, of all that hangs below them."""
        from django.db import connection

        with connection.cursor() as cursor:
            cursor.execute(
                "UPDATE marketplace_powernode n SET reserved_mw = coalesce((SELECT sum(m.reserved_w) FROM marketplace_miner m WHERE"
                " m.site_id = n.site_id AND (m.power_node_id = n.id OR n.parent_id IS NULL)), 0) * n.overhead_miner_permille"
                " + coalesce((SELECT sum(h.reserved_w) FROM marketplace_host h WHERE h.site_id = n.site_id"
                " AND (h.power_node_id = n.id OR n.parent_id IS NULL)), 0) * n.overhead_gpu_permille WHERE n.site_id = %s",
                [self.site.pk],
            )

    def report(self, meters: list[Any], miners: list[Any]) -> None:
        from marketplace.services import agents

        self.sequence += 1
        now = datetime.now(UTC)
        at = [(name, watts, datetime.fromtimestamp(seconds, UTC)) for name, watts, seconds in meters if seconds]
        rows = [[name, mode, gen, w, ghs, datetime.fromisoformat(read)] for name, mode, gen, w, ghs, read in miners]
        body = {
            "boot": "one", "agent_time": now, "sequence": self.sequence, "inventory": None, "events": [], "hosts": [],
            "placements": [], "meters": at, "miners": rows,
        }  # fmt: skip
        agents.observe(self.agent, body, now=now)
        self.agent.refresh_from_db()

    def commands(self) -> list[Any]:
        from marketplace.services import agents

        wanted = agents.desired(self.agent, {"sequence": self.sequence, "known_safety": -1}, now=datetime.now(UTC))
        return list(wanted["miners"])

    def announce(self, cap_w: int) -> Any:
        from marketplace.services import curtailments
        from tests import factories as f

        now = datetime.now(UTC)
        return curtailments.announce(
            f.actor(self.site.organization), self.root, cap_w=cap_w, starts_at=now, ends_at=now + timedelta(hours=1),
            reference="bench", now=now,
        )  # fmt: skip

    def turn(self) -> None:
        from scheduler import site_loop

        site_loop.run(self.site.pk, now=datetime.now(UTC))

    def asleep(self) -> int:
        from marketplace.models import Miner

        return Miner.objects.filter(site=self.site, desired_mode=0).count()

    def touched(self) -> int:
        """Jobs of firm contracts that were asked to leave, or whose GPUs are held lower."""
        from marketplace.models import Host, Placement

        left = Placement.objects.filter(site=self.site).exclude(release_requested_at=None).count()
        return left + Host.objects.filter(site=self.site).exclude(call_gpu_w=None).count()


def ramp_alone(spec: dict[str, Any], cut_w: float, asleep: int) -> float:
    """Seconds until the physics' own meter has fallen so far when as many machines as control chose sleep in one instant."""
    from sandbox.site.physics import Physics

    physics = Physics(spec)
    for _ in range(400):
        physics.step(0.25, 0.0)
    before = physics.meter_w[0]
    for i in range(asleep):
        physics.fleet.asleep[i] = True
        physics.fleet._retarget(i)  # noqa: SLF001 - one instant for all: what no command can do
    elapsed = 0.0
    while physics.meter_w[0] > before - cut_w and elapsed < PATIENCE_S:
        physics.step(0.1, elapsed)
        elapsed += 0.1
    return elapsed


def run(options: Options) -> Report:
    from benchmarks import database

    database.ready()
    share = 0.1 if options.quick else 1.0
    cut_w = CUT_W * share
    spec = site_spec(share)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "site.json"
        path.write_text(json.dumps(spec))
        site = subprocess.Popen(
            [sys.executable, "-m", "sandbox.site", "--spec", str(path)], stdout=subprocess.PIPE, text=True
        )
        try:
            assert site.stdout is not None
            words = site.stdout.readline().split()
            url, port = words[2].rstrip(","), words[-1]
            for row in spec["miners"]:
                row["address"] = row["address"].replace(":0", f":{port}")
            figures, conditions = _measure(spec, url, folder, cut_w)
        finally:
            site.terminate()
            site.wait(20)
    return Report(
        "curtail",
        figures,
        peer={"ramp_alone_s": round(ramp_alone(spec, cut_w, conditions["asleep"]), 2)},
        conditions={
            "megawatts": SITE_W * share / 1e6,
            "cut_megawatts": cut_w / 1e6,
            "miners": len(spec["miners"]),
            **conditions,
        },
        must={"seconds_to_15mw": ("<=", 20), "firm_jobs_touched": ("<=", 0), "over_cap_instants": ("<=", 0)},
    )


def _measure(spec: dict[str, Any], url: str, folder: str, cut_w: float) -> tuple[dict[str, float], dict[str, Any]]:
    truth = lambda: httpx.get(f"{url}/truth", timeout=30).json()  # noqa: E731
    for row in spec["hosts"]:  # firm work, at full power, before anything is measured
        httpx.post(f"{url}/hosts/{row['name']}/limits", json={"limits_w": [700] * 8}).raise_for_status()
        work = {"id": f"firm-{row['name']}", "gpus": list(range(8)), "utilisation": 1.0}
        httpx.post(f"{url}/hosts/{row['name']}/workloads", json=work).raise_for_status()
    control = Control(spec)
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    half = multiprocessing.get_context("spawn").Process(target=agent_half, args=(theirs, spec, url, f"{folder}/agent"))
    half.start()
    try:
        heard: set[str] = set()
        deadline = time.monotonic() + 10 * PATIENCE_S
        meter = 0.0
        while len(heard) < len(spec["miners"]):  # everybody has been read once
            require(time.monotonic() < deadline, f"{len(heard)} of {len(spec['miners'])} machines were read")
            meters, rows = ours.recv()
            heard |= {row[0] for row in rows}
            control.report(meters, rows)
        settle = time.monotonic() + 5
        seen = []
        while time.monotonic() < settle:
            meters, rows = ours.recv()
            control.report(meters, rows)
            seen.append(meters[0][1])
        control.turn()
        before = sum(seen) / len(seen)
        began = time.monotonic()
        control.announce(int(before - cut_w))
        control.turn()
        decided_s = time.monotonic() - began
        ours.send(control.commands())
        commanded_s = time.monotonic() - began
        last_turn = time.monotonic()
        while True:
            meters, rows = ours.recv()
            meter = meters[0][1]
            if meter <= before - cut_w:
                break
            took = time.monotonic() - began
            require(took < PATIENCE_S, f"the meter fell by {(before - meter) / 1e6:.2f} MW in {took:.0f} s")
            control.report(meters, rows)
            if time.monotonic() - last_turn >= 5 and not ours.poll():
                control.turn()
                ours.send(control.commands())
                last_turn = time.monotonic()
        took = time.monotonic() - began
        found = truth()
    finally:
        ours.send(None)
        half.join(20)
        if half.is_alive():
            half.kill()
    require(before > 0.9 * SITE_W * cut_w / CUT_W, f"the site drew {before / 1e6:.1f} MW")
    figures = {
        "seconds_to_15mw": round(took, 2),
        "firm_jobs_touched": control.touched(),
        "over_cap_instants": len(found["over_instants"]),
    }
    conditions = {
        "drew_before_mw": round(before / 1e6, 2), "decided_s": round(decided_s, 2), "commands_out_s": round(commanded_s, 2),
        "asleep": control.asleep(), "firm_hosts": len(spec["hosts"]),
    }  # fmt: skip
    return figures, conditions
