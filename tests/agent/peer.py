"""A small control plane that speaks docs/agent-protocol.md over a real socket: a peer of the agent, not a mock of it."""

import asyncio
import json
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

from agent.times import from_wire, to_wire
from sandbox.site.httpd import Drop, Httpd
from sandbox.site.server import SiteServer
from sandbox.site.spec import demo_site, host, miner, node

ROOT = Path(__file__).resolve().parents[2]


class ControlPeer:
    """Holds what shall be, remembers what it was told; `drop`, `twice`, `skew` are faults of the line."""

    def __init__(self):
        self.httpd = Httpd(self.handle)
        self.tokens = {"enr_good"}
        self.keys = {}
        self.generation = 1
        self.mode = "auto"
        self.lease_s = 900.0
        self.placements = {}
        self.hosts = {}
        self.miners = {}
        self.safety = None
        self.inventory = None
        self.seen = {"hosts": {}, "miners": {}, "meters": {}, "placements": {}}
        self.events = {}
        self.event_deliveries = 0
        self.logs = {}
        self.syncs = []
        self.best = {}
        self.changed = asyncio.Event()
        self.drop_answers = 0
        self.repeat_old = None  # an old answer given once more: a reordered line
        self.skew_s = 0.0
        self.refuse = False
        self.history = []

    async def start(self):
        await self.httpd.start()
        return self

    async def stop(self):
        await self.httpd.stop()

    def bump(self):
        self.generation += 1
        self.changed.set()

    # --- what shall be

    def place(self, key, command, *, host="h001", gpus=(0,), desired="run", **more):
        old = self.placements.get(key)
        row = {
            "id": key, "generation": (old["generation"] + 1 if old else 1), "desired": desired, "host": host, "gpus": list(gpus),
            "gpu_milli": 1000, "vcpu_milli": 1000, "ram_mib": 0, "vram_mib": 0, "job": f"job_{key}", "rank": 0, "world_size": 1,
            "gang": [key], "master_host": host, "command": command, "env": {}, "secrets": {}, "image": "", "grace_s": 5,
            "max_seconds": None, "organization": "org_1",
        }  # fmt: skip
        self.placements[key] = row | more
        self.bump()

    def desire(self, key, desired):
        row = self.placements[key]
        row["desired"] = desired
        row["generation"] += 1
        self.bump()

    def forget(self, key):
        del self.placements[key]
        self.bump()

    def limits(self, name, watts, state="capped"):
        generation = self.hosts.get(name, {}).get("generation", 0) + 1
        self.hosts[name] = {"name": name, "generation": generation, "power_state": state, "limits_w": watts}
        self.bump()

    def command(self, name, mode):
        self.miners[name] = [name, mode, self.generation + 1]
        self.bump()

    # --- the protocol

    async def handle(self, request):
        if self.refuse:
            raise Drop
        body = request.json()
        if request.path.endswith("/enrol"):
            if body["token"] not in self.tokens:
                return 401, {"error": {"code": "enrolment_token_invalid", "message": "unknown token"}}
            self.tokens.discard(body["token"])
            key = f"agk_{secrets.token_hex(8)}"
            self.keys[key] = body["name"]
            return 201, {
                "agent": "agt_1",
                "key": key,
                "site": "sit_1",
                "site_name": "demo",
                "stream_url": self.httpd.url,
            }
        if request.headers.get("authorization", "").removeprefix("Bearer ") not in self.keys:
            return 401, {"error": {"code": "agent_key_invalid", "message": "unknown key"}}
        if request.path.endswith("/sync"):
            return await self.sync(body)
        if request.path.endswith("/logs"):
            return 200, {"next": [self.log(chunk) for chunk in body["chunks"]]}
        return 404, {}

    async def sync(self, body):
        self.syncs.append(body)
        skew = abs(from_wire(body["agent_time"]) - time.time() - self.skew_s)
        if skew > 30:
            return 409, {"error": {"code": "clock_skew", "message": f"{skew:.0f} s"}}
        if body["sequence"] > self.best.get(body["boot"], 0):
            self.best[body["boot"]] = body["sequence"]
            self.remember(body)
        if body["inventory"]:
            self.inventory = body["inventory"]
        for event in body["events"]:
            self.event_deliveries += 1
            self.events[event["id"]] = event
        if body["known_generation"] == self.generation:
            self.changed.clear()
            try:
                async with asyncio.timeout(body["wait_s"]):
                    await self.changed.wait()
            except TimeoutError:
                pass
        if self.drop_answers > 0:
            self.drop_answers -= 1
            raise Drop
        answer = self.answer(body)
        if self.repeat_old is not None:
            answer, self.repeat_old = self.repeat_old, None
        self.history.append(answer)
        return 200, answer

    def remember(self, body):
        for kind in ("hosts", "placements"):
            for row in body[kind]:
                self.seen[kind][row["name" if kind == "hosts" else "id"]] = row
        for kind in ("miners", "meters"):
            for row in body[kind]:
                self.seen[kind][row[0]] = row

    def answer(self, body):
        known = {name: row["generation"] for name, row in self.seen["hosts"].items()}
        applied = {name: row[2] for name, row in self.seen["miners"].items()}
        now = time.time() + self.skew_s
        safety = self.safety if self.safety and body["known_safety"] != self.safety["generation"] else None
        return json.loads(json.dumps({
            "server_time": to_wire(now), "generation": self.generation, "lease_until": to_wire(now + self.lease_s),
            "acknowledged_sequence": body["sequence"], "acknowledged_events": [e["id"] for e in body["events"]], "mode": self.mode,
            "inventory_wanted": self.inventory is None,
            "placements": list(self.placements.values()),
            "hosts": [row for name, row in self.hosts.items() if known.get(name, 0) != row["generation"]],
            "miners": [row for name, row in self.miners.items() if applied.get(name, 0) < row[2]],
            "safety": safety,
        }))  # fmt: skip

    def log(self, chunk):
        stored = self.logs.setdefault((chunk["placement"], chunk["stream"]), b"")
        data, offset = chunk["data"].encode(), chunk["offset"]
        if offset <= len(stored) < offset + len(data):
            stored += data[len(stored) - offset :]
            self.logs[(chunk["placement"], chunk["stream"])] = stored
        return {"placement": chunk["placement"], "stream": chunk["stream"], "offset": len(stored)}

    # --- reading

    def state(self, key):
        return self.seen["placements"].get(key, {}).get("state")

    def row(self, key):
        return self.seen["placements"].get(key, {})

    def text(self, key, stream="stdout"):
        return self.logs.get((key, stream), b"").decode()

    def kinds(self):
        return {event["kind"] for event in self.events.values()}


async def until(predicate, what="", limit_s=30.0):
    """Polls until the predicate holds. The limit is a guard against a hang, not a measurement."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        value = predicate()
        if value:
            return value
        await asyncio.sleep(0.05)
    raise AssertionError(f"never came true: {what or predicate}")


async def until_awaited(call, holds, what="", limit_s=30.0):
    """As `until`, for a value that must be awaited: polls `call()` until `holds(value)`."""
    end = time.monotonic() + limit_s
    value = None
    while time.monotonic() < end:
        value = await call()
        if holds(value):
            return value
        await asyncio.sleep(0.05)
    raise AssertionError(f"never came true: {what}; last {value}")


def small_site(*, hosts=2, miners=3, cap_w=100_000):
    """One PDU under one site; 10x speed makes ramps short."""
    h100 = (60, 1100, 4600, 200, 700)
    return {
        "name": "small", "seed": 3, "miner_port": 0,
        "nodes": [node("site", None, "site", cap_w, fixed_w=500, gpu=1250, miner=1050), node("pdu-1", "site", "pdu", cap_w)],
        "hosts": [host(f"h{i + 1:03d}", "pdu-1", "H100-SXM", 8, h100) for i in range(hosts)],
        "miners": [miner(i, "S21", "pdu-1", 0, 30) for i in range(miners)],
    }  # fmt: skip


class AgentProcess:
    """`python -m agent run` as a process of its own."""

    def __init__(self, state):
        self.state = Path(state)
        self.log = self.state.parent / "agent.log"
        self.process = None

    def start(self):
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "agent", "run", "--state", str(self.state)], cwd=ROOT, stdout=out, stderr=out,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            )  # fmt: skip
        return self

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()


class World:
    """A simulated site, a control peer and an enrolled agent."""

    def __init__(self, folder, *, runtime="process", spec=None, speed=30.0, **settings):
        self.folder = Path(folder)
        self.runtime, self.settings = runtime, settings
        self.site = SiteServer(spec or small_site(), speed=speed, record=self.folder / "truth.json")
        self.control = ControlPeer()
        self.agent = AgentProcess(self.folder / "state")

    async def __aenter__(self):
        await self.site.start()
        await self.control.start()
        config = {
            "name": "hall-1", "hosts": {"driver": "sandbox", "url": self.site.httpd.url}, "miners": {"driver": "luxos"},
            "meters": {"driver": "sandbox"}, "runtime": self.runtime, "wait_s": 5, "report_s": 0.5, "poll_s": 0.25, "beat_s": 0.5,
            "miner_poll_s": 0.7, "miner_timeout_s": 1.5, "settle_s": 3, "meter_stale_s": 2, "backoff_s": 1,
            "miner_retry_s": 0.5,
        }  # fmt: skip
        path = self.folder / "agent.json"
        path.write_text(json.dumps(config | self.settings))
        command = [sys.executable, "-m", "agent", "enrol", "--url", self.control.httpd.url, "--token", "enr_good"]
        process = await asyncio.create_subprocess_exec(
            *command, "--state", str(self.agent.state), "--config", str(path), cwd=ROOT, stdout=subprocess.DEVNULL
        )
        assert await process.wait() == 0
        self.agent.start()
        return self

    async def __aexit__(self, *_):
        self.agent.stop()
        await self.control.stop()
        await self.site.stop()

    async def granted(self, name="h001", gpus=8):
        """Raises a host's limits and waits until they are read back."""
        self.control.limits(name, [700] * gpus, "full")
        wanted = self.control.hosts[name]["generation"]
        await until(
            lambda: self.control.seen["hosts"].get(name, {}).get("generation") == wanted, f"{name} applied {wanted}"
        )


def drive(folder, check, **options):
    async def go():
        async with World(folder, **options) as world:
            try:
                await check(world, world.control)
            except AssertionError as error:
                raise AssertionError(f"{error}\n{world.agent.log.read_text()[-4000:]}") from error

    asyncio.run(go())


def job_pids(world, key):
    names = json.loads((world.agent.state / "work" / key / "pid.json").read_text())
    return names["pid"], names["job"]


__all__ = [
    "AgentProcess",
    "ControlPeer",
    "World",
    "demo_site",
    "drive",
    "job_pids",
    "small_site",
    "until",
    "until_awaited",
]
