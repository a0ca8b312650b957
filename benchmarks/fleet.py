"""Thousands of machines put to sleep and proved asleep: the agent's own fan-out over real sockets, judged as control judges.

The fleet is simulated in a process of its own (LuxOS's wire, one connection a command, a ramp of 3 s, meters with noise at every
PDU). Timed is what a curtailment waits for: from the command until two fresh readings of each machine *and* its PDU's meter say
that it sleeps (`scheduler.core.power.confirmed_drop`, `power_proof`). The transport to control is not part of it (`agent`).

A last run breaks machines in every way that the simulator knows, and one PDU with liars whom only the meter sees: nobody of
them may be confirmed who does not sleep. A single liar among 150 is below what a meter can tell from its error: its watts have to
stand in the PDU's margin, else it counts as a false confirm too.

Beside it, in the same run: as many bare sockets, each opened, written to once and read from once.
"""

from __future__ import annotations

import asyncio
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agent.events import Events
from agent.miners.fleet import Fleet
from agent.reports import Reports
from agent.store import Store
from agent.times import from_wire
from benchmarks.fleet_site import MODEL, PER_PDU, RAMP_S, FleetSite, machines
from benchmarks.harness import Options, Report, require
from sandbox.miners import FAULTS
from sandbox.site.spec import MINER_MODELS
from scheduler.core import power, power_proof

SLEEP_W, TOP_W = MINER_MODELS[MODEL][0][1], MINER_MODELS[MODEL][-1][1]
LOOK_S = 0.5
LINES = 50  # of each fan-out
LIMIT_S = 600.0


class Judge:
    """Control's rules on what an agent reports: one batch of sleeps under metered PDUs."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        n = len(rows)
        self.index = {row["name"]: i for i, row in enumerate(rows)}
        pdus = sorted({row["power_node"] for row in rows})
        below = np.array([pdus.index(row["power_node"]) for row in rows])
        cap_w = np.bincount(below) * TOP_W
        site = power.NodeSpec("site", None, int(cap_w.sum()), metering="firmware")
        self.tree = power.PowerTree.of(
            [site, *(power.NodeSpec(p, "site", int(w)) for p, w in zip(pdus, cap_w, strict=True))]
        )
        self.pdus = [self.tree.index[p] for p in pdus]
        self.node = np.array([self.pdus[p] for p in below])
        self.watts = np.zeros(n, np.int64)
        self.watts_before = np.zeros(n, np.int64)  # the reading before that
        self.read = np.zeros(n, bool)
        self.samples: list[list[power.Sample]] = [[] for _ in rows]
        self.votes: list[tuple[int, int | None]] = [(0, None)] * n
        self.confirmed = np.zeros(n, bool)
        self.confirmed_at = np.full(n, np.inf)
        self.before: dict[int, int] = {}
        self.baseline = self.watts
        self.since = 0

    def take(self, rows: list[Any]) -> None:
        for name, _mode, _applied, watts, _gh_s, at in rows:
            i = self.index[name]
            self.watts_before[i], self.watts[i], self.read[i] = self.watts[i], watts, True
            self.samples[i] = [*self.samples[i][-1:], power.Sample(int(from_wire(at)), watts)]

    def devices(self) -> power_proof.Devices:
        kind = np.full(len(self.node), power.MINER)
        falling = 100 * (self.watts - SLEEP_W) > 15 * TOP_W
        return power_proof.Devices(tuple(range(len(self.node))), self.node, kind, self.watts, self.read, falling)

    def residuals(self, meters: list[int]) -> dict[int, int]:
        return power_proof.residuals_mw(self.tree, dict(zip(self.pdus, meters, strict=True)), self.devices())

    def command(self, meters: list[int]) -> None:
        """The moment before the batch: what the meters see, and what each machine drew."""
        self.before, self.baseline, self.since = self.residuals(meters), self.watts.copy(), int(time.time()) - 1

    def look(self, at: float, meters: list[int]) -> None:
        """Confirms whom its own readings and its PDU's meter believe asleep."""
        now = int(time.time()) + 1
        # Who cannot have two low readings yet is not worth the question: it would cost the agent beside us its processor.
        worth = ~self.confirmed & (2 * np.maximum(self.watts, self.watts_before) < self.baseline)
        low = [
            i
            for i in np.flatnonzero(worth).tolist()
            if not power.confirmed_drop(self.samples[i], int(self.baseline[i]), since=self.since, now=now)
        ]
        claims = [power_proof.Claim(i, int(self.node[i]), int(self.baseline[i]) - SLEEP_W, low=True) for i in low]
        devices = self.devices()
        rise = power_proof.rise_mw(self.tree, self.residuals(meters), self.before, devices, {})
        agrees = power_proof.agrees(self.tree, claims, rise, power_proof.error_mw(self.tree, devices))
        calm = power_proof.calm(self.tree, devices)
        for i, agreed in agrees.items():
            assert isinstance(i, int)
            tally = power_proof.tally(*self.votes[i], agreed, bool(calm[self.node[i]]), int(at))
            self.votes[i] = (tally.votes, tally.voted_at)
            if tally.proved:
                self.confirmed[i], self.confirmed_at[i] = True, time.monotonic()

    def margins_w(self, meters: list[int]) -> np.ndarray:
        """W that each node's margin holds by now: its share, or what its meter sees unexplained since the command."""
        rise = power_proof.rise_mw(self.tree, self.residuals(meters), self.before, self.devices(), {})
        unexplained = power_proof.unexplained_mw(self.tree, [(rise, power.Load.of(self.tree, [], [], []))])
        return np.maximum(power.margins_w(self.tree), -(-unexplained // 1000))


@dataclass(frozen=True)
class Run:
    seconds: float  # until the last honest machine was confirmed
    commanded_s: float  # until the last command was acknowledged
    false_confirms: int
    confirmed: int
    connections: int  # of the simulated machines, for a sleeping one
    cpu_ms: float  # of the agent (and the judge), a machine
    bare_s: float

    def row(self) -> list[str]:
        counts = (self.confirmed, self.false_confirms, self.connections)
        return [f"{self.commanded_s:.1f}", f"{self.seconds:.1f}", *map(str, counts), f"{self.bare_s:.1f}"]


async def sleep_all(count: int, seed: int, faults: dict[str, str]) -> Run:
    rows = machines(count)
    honest = np.array([faults.get(row["name"], "") in ("", "session_stolen", "wattage_off") for row in rows])
    lying = {row["power_node"] for row in rows if faults.get(row["name"]) == "phantom"}
    crowd = [p for p in lying if sum(r["power_node"] == p and faults.get(r["name"]) == "phantom" for r in rows) > 1]
    honest &= np.array([row["power_node"] not in crowd for row in rows])
    with FleetSite(rows, seed) as site, tempfile.TemporaryDirectory() as folder:
        bare_s = await bare_writes(rows)
        store = Store(Path(folder))
        reports = Reports()
        fleet = Fleet(
            rows, store, reports, Events(store), poll_s=20, timeout_s=4, retry_s=10, concurrency=LINES,
            may_wake=lambda _node: False,
        )  # fmt: skip
        running = asyncio.create_task(fleet.run())
        judge = Judge(rows)
        try:
            await _until(reports, judge, lambda: bool(judge.read.all()), "not every machine was read")
            await site.break_down(faults)
            judge.command((await site.meters())[1])
            before = await site.truth()
            require(int(before["asleep"].sum()) <= len(faults), "machines slept before they were told to")
            start, cpu = time.monotonic(), time.process_time()
            fleet.apply([[row["name"], "sleep", 1] for row in rows])
            commanded_s = 0.0
            while not judge.confirmed[honest].all():
                require(time.monotonic() - start < LIMIT_S, f"{int(judge.confirmed.sum())} of {count} were confirmed")
                await asyncio.sleep(LOOK_S)
                _collect(reports, judge)
                judge.look(*await site.meters())
                if not commanded_s and all(m.applied for m, h in zip(fleet.miners.values(), honest, strict=True) if h):
                    commanded_s = time.monotonic() - start
            cpu = time.process_time() - cpu
            after = await site.truth()
            meters = (await site.meters())[1]
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            store.close()
    draws = after["watts"] > 0.15 * before["watts"]
    require(
        bool(after["asleep"][honest].all()) and not draws[honest].any(), "a machine was confirmed and did not sleep"
    )
    connections = after["connections"] - before["connections"]
    return Run(
        float(judge.confirmed_at[honest].max()) - start,
        commanded_s,
        _false(judge, after["watts"], draws, meters),
        int(judge.confirmed.sum()),
        connections,
        1000 * cpu / count,
        bare_s,
    )


def _false(judge: Judge, watts: np.ndarray, draws: np.ndarray, meters: list[int]) -> int:
    """Machines confirmed that draw, under PDUs whose margins do not hold what they draw."""
    wrong = judge.confirmed & draws
    hidden = np.bincount(judge.node, np.where(wrong, watts - SLEEP_W, 0), len(judge.tree.keys))
    return int(wrong[(hidden > judge.margins_w(meters))[judge.node]].sum())


async def _until(reports: Reports, judge: Judge, done: Any, what: str) -> None:
    end = time.monotonic() + LIMIT_S
    while not done():
        require(time.monotonic() < end, what)
        await asyncio.sleep(LOOK_S)
        _collect(reports, judge)


def _collect(reports: Reports, judge: Judge) -> None:
    rows, versions = reports.collect(full=False)
    reports.acknowledge(versions)
    judge.take(rows["miners"])


async def bare_writes(rows: list[dict[str, Any]]) -> float:
    """Seconds for one request and one answer of each machine, with nothing of a driver around the sockets."""
    loop = asyncio.get_running_loop()
    todo = iter(rows)

    async def lane() -> None:
        for row in todo:
            host, _, port = row["address"].rpartition(":")
            with socket.socket() as sock:
                sock.setblocking(False)
                await loop.sock_connect(sock, (host, int(port)))
                await loop.sock_sendall(sock, b'{"command":"version"}')
                require((await loop.sock_recv(sock, 65_536)).endswith(b"\0"), "no answer to a bare write")

    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(4 * LINES):
            group.create_task(lane())
    return time.perf_counter() - start


def broken(count: int, seed: int) -> dict[str, str]:
    """Machine -> fault: each kind on one machine in a hundred and fifty, a PDU with a crowd of liars, and lone ones elsewhere."""
    rng = np.random.default_rng(seed)
    names = [row["name"] for row in machines(count)]
    crowd = names[PER_PDU : 2 * PER_PDU : 3]
    others = [n for i, n in enumerate(names) if not PER_PDU <= i < 2 * PER_PDU]
    each = max(1, len(others) // 150)
    chosen = rng.choice(others, each * (len(FAULTS) + 1), replace=False).tolist()
    kinds = [fault for fault in (*FAULTS, "phantom") for _ in range(each)]
    return dict(zip(chosen, kinds, strict=True)) | dict.fromkeys(crowd, "phantom")


def run(options: Options) -> Report:
    few, many, ill = (600, 1_200, 450) if options.quick else (2_000, 20_000, 2_000)
    seed = options.seeds[0] if options.seeds else 42
    sick = broken(ill, seed)
    some = asyncio.run(sleep_all(few, seed, {}))
    all_ = asyncio.run(sleep_all(many, seed, {}))
    bad = asyncio.run(sleep_all(ill, seed, sick))
    runs = {f"{few:,}": some, f"{many:,}": all_, f"{ill:,}, {len(sick)} broken": bad}
    return Report(
        "fleet",
        {
            "sleep_2000_s": round(some.seconds, 2),
            "sleep_20000_s": round(all_.seconds, 2),
            "false_confirms": some.false_confirms + all_.false_confirms + bad.false_confirms,
        },
        {"bare_2000_s": round(some.bare_s, 2), "bare_20000_s": round(all_.bare_s, 2)},
        {
            "ramp_s": RAMP_S,
            "machines": [few, many, ill],
            "lines": LINES,
            "commanded_2000_s": round(some.commanded_s, 2),
            "commanded_20000_s": round(all_.commanded_s, 2),
            "cpu_ms_a_machine": round(all_.cpu_ms, 2),
            "connections_a_machine": round(all_.connections / many, 1),
            "faults": len(sick),
            "honest_beside_faults_s": round(bad.seconds, 2),
        },
        {"sleep_2000_s": ("<=", 10), "sleep_20000_s": ("<=", 60), "false_confirms": ("<=", 0)},
        [
            ["machines", "acknowledged s", "confirmed s", "confirmed", "false", "connections", "bare writes s"],
            *([name, *r.row()] for name, r in runs.items()),
        ],
    )  # fmt: skip
