"""The physics of a simulated site: what is truly drawn, node by node, whatever anybody believes.

True watts of node n = fixed(n) + S_gpu(n) + S_miner(n) + lag[(k_gpu - 1) S_gpu + (k_miner - 1) S_miner], where S are the
sums of device watts below n and the lag is that of the cooling plant. A breaker is a thermal integrator: with r = P/cap
it gathers (r^2 - 1) dt while r > 1 and trips at TRIP_S (1.2x: 45 s, 1.5x: 16 s), at once beyond INSTANT. P is with the inrush of
machines whose boards have just come on (sandbox.miners.fleet), which no meter sees: it is over before they have read once.
A tripped node and all below it are dark until the breaker is reset.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from sandbox.miners import Fleet
from sandbox.miners.fleet import INRUSH_S
from sandbox.site import benchmarks
from sandbox.site.spec import Spec

TRIP_S = 20.0
INSTANT = 3.0
COOLING_S = 20.0
METER_LAG_S = 1.0
METER_NOISE = 0.003
GPU_UP_S, GPU_DOWN_S = 1.5, 0.5
BOOT_S = 60.0
IDLE_SHARE = 0.09  # of a GPU's maximum: 64 W of 700 W


class Hosts:
    """All hosts of a site as columns; GPUs are flattened, `first[h]` is the index of host h's GPU 0."""

    def __init__(self, rows: list[dict[str, Any]], *, seed: int, speed: float) -> None:
        self.rows, self.speed = rows, speed
        self.rng = np.random.default_rng(seed + 1)
        self.names = [row["name"] for row in rows]
        self.index = {name: h for h, name in enumerate(self.names)}
        count = np.array([row["gpus"] for row in rows], dtype=int)
        self.first = np.concatenate([[0], np.cumsum(count)]).astype(int)
        self.host_of = np.repeat(np.arange(len(rows)), count)

        def column(key: str) -> np.ndarray:
            return np.array([row[key] for row in rows], dtype=float)

        self.standby, self.parked, self.base = column("standby_w"), column("parked_w"), column("base_w")
        self.gpu_min, self.gpu_max = column("gpu_min_w")[self.host_of], column("gpu_max_w")[self.host_of]
        self.limit = self.gpu_min.copy()
        self.cap_control = np.array([bool(row["cap_control"]) for row in rows], dtype=bool)
        self.limit = np.where(self.cap_control[self.host_of], self.limit, self.gpu_max)
        self.idle_gpu = np.minimum(self.gpu_max * IDLE_SHARE, self.gpu_min)
        self.idle_base = np.maximum(0.9 * self.parked - np.bincount(self.host_of, self.idle_gpu, len(rows)), 0.0)
        self.gpu_w = self.idle_gpu.copy()
        self.base_w = self.idle_base.copy()
        self.powered = np.ones(len(rows), dtype=bool)
        self.alive = np.ones(len(rows), dtype=bool)
        self.boot_left = np.zeros(len(rows))
        self.load = np.zeros(len(self.host_of))  # utilisation asked of each GPU, 0..1
        self.cpu_load = np.zeros(len(rows))
        self.on_s = np.zeros(len(rows))
        self.active_s = np.zeros(len(self.host_of))
        self.workloads: dict[str, tuple[int, list[int], float]] = {}
        self.gpu_errors: dict[tuple[int, int, str], int] = {}  # (host, GPU, `xid 79`) -> times since it came up
        self.error_count = np.zeros(len(rows))
        self.really = [
            str(row.get("really") or row["gpu_model"]) for row in rows
        ]  # what the devices are, whatever is stated
        self.slowness = np.ones(len(rows))

    def attach(self, key: str, host: int, gpus: list[int], utilisation: float) -> None:
        """Puts a load on GPUs (indices on the host). Raises ValueError for an index that the host does not have."""
        if any(g < 0 or g >= self.rows[host]["gpus"] for g in gpus):
            raise ValueError(f"host {self.names[host]} has GPUs 0..{self.rows[host]['gpus'] - 1}, asked {gpus}")
        self.workloads[key] = (host, list(gpus), min(max(utilisation, 0.0), 1.0))
        self._sum_loads(host)

    def detach(self, key: str) -> None:
        found = self.workloads.pop(key, None)
        if found:
            self._sum_loads(found[0])

    def _sum_loads(self, host: int) -> None:
        start, stop = self.first[host], self.first[host + 1]
        load, cpu = np.zeros(stop - start), 0.0
        for h, gpus, utilisation in self.workloads.values():
            if h == host:
                cpu = max(cpu, utilisation)
                for g in gpus:
                    load[g] = min(1.0, load[g] + utilisation)
        self.load[start:stop] = load
        self.cpu_load[host] = cpu

    def set_error(self, name: str, gpu: int, error: str) -> None:
        """One more `xid N` or `ecc 0` of a device; "" clears the host's, as a restart does. Raises KeyError, ValueError."""
        host = self.index[name]
        kind, _, code = error.partition(" ")
        if error and (kind not in ("xid", "ecc") or not 0 <= gpu < self.rows[host]["gpus"]):
            raise ValueError(f"error {error!r} of GPU {gpu} of {name}: `xid N` or `ecc 0`, of a GPU that it has")
        if error:
            key = (host, gpu, f"{kind} {int(code or 0)}")
            self.gpu_errors[key] = self.gpu_errors.get(key, 0) + 1
        else:
            self.gpu_errors = {key: times for key, times in self.gpu_errors.items() if key[0] != host}
        self.error_count[host] += 1

    def benchmark(self, host: int, gpus: list[int]) -> str:
        """The line that agent.verify prints, of what the devices really are and of the watts that they may draw."""
        matmul, memory, link = benchmarks.SUSTAINED.get(self.really[host], benchmarks.UNKNOWN)
        first, slow = self.first[host], float(self.slowness[host])
        found = []
        for g in gpus:
            watts = float(self.limit[first + g] / self.gpu_max[first + g])
            swing = self.rng.uniform(0.985, 1.015)
            # The clock follows the watts about as their cube root once a device is limited; memory hardly does.
            found.append(
                {
                    "matmul_gflops": int(matmul * swing * watts ** (1 / 3) / slow),
                    "memory_mb_s": int(memory * swing / slow),
                }
            )
        domains = self.rows[host]["nvlink_domains"]
        pairs = [(a, gpus[(i + 1) % len(gpus)]) for i, a in enumerate(gpus)] if len(gpus) > 1 else []
        links = [{"a": a, "b": b, "mb_s": int((link if domains[a] == domains[b] else 20_000) / slow)} for a, b in pairs]
        told = {
            "gpus": found, "links": links, "disk": {"write_mb_s": int(2400 / slow), "read_mb_s": int(5200 / slow)},
            "network": {"down_kb_s": 118_000, "up_kb_s": 112_000}, "errors": [],
        }  # fmt: skip
        return f"tailrace-verify {json.dumps(told, separators=(',', ':'))}"

    def errors(self, host: int | np.integer[Any]) -> list[str]:
        return [f"gpu {gpu}: {what} x{times}" for (h, gpu, what), times in sorted(self.gpu_errors.items()) if h == host]

    def dark(self, hosts: np.ndarray) -> list[str]:
        """Hosts that lost power: their workloads are gone. Returns the keys of those workloads."""
        lost = {int(h) for h in np.flatnonzero(hosts)}
        keys = [key for key, (h, _, _) in self.workloads.items() if h in lost]
        for key in keys:
            self.detach(key)
        return keys

    def up(self, energised: np.ndarray) -> np.ndarray:
        return self.powered & self.alive & energised & (self.boot_left <= 0)

    def step(self, dt: float, energised: np.ndarray) -> None:
        power = self.powered & self.alive & energised
        self.boot_left = np.where(power & (self.boot_left > 0), self.boot_left - dt * self.speed, self.boot_left)
        up = power & (self.boot_left <= 0)
        up_gpu = up[self.host_of]
        # A load swings a little around its utilisation; the limiter keeps the mean under the limit, short peaks reach 3 % over.
        swing = self.rng.uniform(0.94, 1.03, len(self.load))
        wanted = np.where(self.load > 0, np.minimum(self.load * self.gpu_max, self.limit) * swing, self.idle_gpu)
        wanted = np.where(up_gpu, wanted, 0.0)
        tau = np.where(wanted > self.gpu_w, GPU_UP_S, GPU_DOWN_S) / self.speed
        self.gpu_w += (wanted - self.gpu_w) * -np.expm1(-dt / tau)
        busy = self.idle_base + (0.8 * self.base - self.idle_base).clip(min=0.0) * self.cpu_load
        base = np.where(up, busy, np.where(power, self.idle_base, np.where(energised, self.standby, 0.0)))
        self.base_w += (base - self.base_w) * -math.expm1(-dt * self.speed / 2.0)
        self.base_w = np.where(energised, self.base_w, 0.0)
        self.gpu_w = np.where(up_gpu, self.gpu_w, 0.0)
        self.on_s += np.where(up, dt, 0.0)
        self.active_s += np.where(up_gpu & (self.load > 0), dt, 0.0)

    def watts(self) -> np.ndarray:
        return self.base_w + np.bincount(self.host_of, self.gpu_w, len(self.rows))

    def limits(self, host: int | np.integer[Any]) -> list[int]:
        return [round(w) for w in self.limit[self.first[host] : self.first[host + 1]]]

    def set_limits(self, host: int, limits: list[int]) -> list[int]:
        """Sets the limits of all GPUs of a host, clamped to what the board allows; answers what now holds.

        Raises ValueError for a wrong count or a host without cap control.
        """
        span = slice(self.first[host], self.first[host + 1])
        if len(limits) != self.rows[host]["gpus"]:
            raise ValueError(f"host {self.names[host]} has {self.rows[host]['gpus']} GPUs, got {len(limits)} limits")
        if not self.cap_control[host]:
            raise ValueError(f"host {self.names[host]} has no cap control")
        self.limit[span] = np.clip(np.array(limits, dtype=float), self.gpu_min[span], self.gpu_max[span])
        return self.limits(host)

    def power_state(self, host: int | np.integer[Any]) -> str:
        if not self.powered[host] or self.boot_left[host] > 0:
            return "off"
        span = slice(self.first[host], self.first[host + 1])
        if (self.limit[span] >= self.gpu_max[span]).all():
            return "full"
        return "parked" if (self.limit[span] <= self.gpu_min[span]).all() else "capped"


class Physics:
    """The site: `step(dt)` moves it, and the record below tells the truth about every instant so far."""

    def __init__(self, spec: Spec, *, speed: float = 1.0) -> None:
        self.spec, self.speed = spec, speed
        seed = int(spec.get("seed", 1))
        self.rng = np.random.default_rng(seed)
        self.nodes = spec["nodes"]
        self.node_names = [n["name"] for n in self.nodes]
        self.node_index = {name: i for i, name in enumerate(self.node_names)}
        self.parent = np.array([self.node_index[n["parent"]] if n["parent"] else -1 for n in self.nodes], dtype=int)
        if any(p >= i for i, p in enumerate(self.parent)):
            raise ValueError("power nodes must stand after their parents")
        self.fleet = Fleet(spec["miners"], seed=seed, speed=speed)
        self.hosts = Hosts(spec["hosts"], seed=seed, speed=speed)
        self.host_node = np.array([self.node_index[h["power_node"]] for h in spec["hosts"]], dtype=int)
        self.miner_node = np.array([self.node_index[m["power_node"]] for m in spec["miners"]], dtype=int)
        self.cap = np.array([n["cap_w"] for n in self.nodes], dtype=float)
        self.fixed = np.array([n["fixed_w"] for n in self.nodes], dtype=float)
        self.k_gpu = np.array([n["overhead_gpu_permille"] for n in self.nodes], dtype=float) / 1000
        self.k_miner = np.array([n["overhead_miner_permille"] for n in self.nodes], dtype=float) / 1000
        self.closed = np.ones(len(self.nodes), dtype=bool)
        self.heat = np.zeros(len(self.nodes))
        self.s_gpu, self.s_miner = self._sums()
        self.cooling = self._cooling_goal()
        self.true_w = self._true()
        self.meter_w = self.true_w.copy()
        self.meter_at = np.zeros(len(self.nodes))
        self.meter_stale = np.zeros(len(self.nodes), dtype=bool)
        # --- the record
        self.elapsed_s = 0.0
        self.max_w = self.true_w.copy()
        self.over_s = np.zeros(len(self.nodes))
        self.over_instants: list[dict[str, Any]] = []
        self.trips: list[dict[str, Any]] = []
        self.node_j = np.zeros(len(self.nodes))
        self.hash_j = self.miner_j = self.gpu_j = self.host_j = 0.0
        self.hash_gh_s = 0.0
        self.hash_s = np.zeros(len(self.fleet.names))

    # --- one step

    def energised(self) -> np.ndarray:
        live = self.closed.copy()
        for i, parent in enumerate(self.parent):
            if parent >= 0:
                live[i] &= live[parent]
        return live

    def _sums(self) -> tuple[np.ndarray, np.ndarray]:
        n = len(self.nodes)
        gpu = np.bincount(self.host_node, self.hosts.watts(), n) if len(self.host_node) else np.zeros(n)
        miner = np.bincount(self.miner_node, self.fleet.true_w, n) if len(self.miner_node) else np.zeros(n)
        return self._up(gpu), self._up(miner)

    def _up(self, watts: np.ndarray) -> np.ndarray:
        """What hangs at each node, summed up the tree, in place."""
        for i in range(len(self.nodes) - 1, 0, -1):
            if self.parent[i] >= 0:
                watts[self.parent[i]] += watts[i]
        return watts

    def _cooling_goal(self) -> np.ndarray:
        return (self.k_gpu - 1) * self.s_gpu + (self.k_miner - 1) * self.s_miner

    def _true(self) -> np.ndarray:
        return (self.fixed + self.s_gpu + self.s_miner + self.cooling) * self.energised()

    def step(self, dt: float, at: float) -> list[str]:
        """Moves the site by `dt` seconds up to wall-clock time `at`. Returns the keys of workloads that lost power."""
        live = self.energised()
        self.hosts.step(dt, live[self.host_node])
        self.fleet.step(dt, live[self.miner_node])
        self.s_gpu, self.s_miner = self._sums()
        self.cooling += (self._cooling_goal() - self.cooling) * -math.expm1(-dt * self.speed / COOLING_S)
        self.true_w = self._true()
        lost = self._breakers(dt, at)
        self._meters(dt, at)
        self._account(dt, at)
        return lost

    def _breakers(self, dt: float, at: float) -> list[str]:
        surge, lasts = self._surge(), INRUSH_S / (dt * self.speed)
        mean = surge * lasts * -math.expm1(-1 / lasts)
        ratio = (self.true_w + mean) / self.cap
        self.heat = np.where(
            ratio > 1, self.heat + (ratio**2 - 1) * dt * self.speed, self.heat * math.exp(-dt * self.speed / 30)
        )
        tripping = self.closed & ((self.heat > TRIP_S) | (self.true_w + surge > INSTANT * self.cap))
        if not tripping.any():
            return []
        for i in np.flatnonzero(tripping):
            self.trips.append(
                {"node": self.node_names[i], "at": at, "watts": round(float(self.true_w[i])),
                 "inrush_w": round(float(surge[i])), "cap_w": int(self.cap[i])}
            )  # fmt: skip
        before = self.energised()
        self.closed &= ~tripping
        gone = before & ~self.energised()
        self.fleet.power_cut(gone[self.miner_node] if len(self.miner_node) else np.zeros(0, dtype=bool))
        dark = gone[self.host_node] if len(self.host_node) else np.zeros(0, dtype=bool)
        self.hosts.boot_left = np.where(dark, BOOT_S, self.hosts.boot_left)
        return self.hosts.dark(dark)

    def _surge(self) -> np.ndarray:
        """W of inrush at each node at the beginning of the step."""
        found = self._up(np.bincount(self.miner_node, self.fleet.surge_w, len(self.nodes)).astype(float))
        return found * self.energised()

    def reset_breaker(self, name: str) -> None:
        """Closes a node's breaker by hand: hosts boot, miners come back hashing. Raises KeyError for an unknown node."""
        i = self.node_index[name]
        self.closed[i], self.heat[i] = True, 0.0

    def _meters(self, dt: float, at: float) -> None:
        fresh = ~self.meter_stale
        moved = self.meter_w + (self.true_w - self.meter_w) * -math.expm1(-dt / METER_LAG_S)
        self.meter_w = np.where(fresh, moved, self.meter_w)
        self.meter_at = np.where(fresh, at, self.meter_at)

    def meters(self) -> list[tuple[str, int, float]]:
        """(node, W, measured at) of every metered node, with noise."""
        noise = 1 + self.rng.normal(0, METER_NOISE, len(self.nodes)) * ~self.meter_stale
        return [
            (name, round(float(self.meter_w[i] * noise[i])), float(self.meter_at[i]))
            for i, name in enumerate(self.node_names)
            if self.nodes[i].get("metered", True)
        ]

    def _account(self, dt: float, at: float) -> None:
        self.elapsed_s += dt
        self.max_w = np.maximum(self.max_w, self.true_w)
        over = self.true_w > self.cap
        self.over_s += over * dt
        for i in np.flatnonzero(over):
            if len(self.over_instants) < 1000:
                self.over_instants.append(
                    {
                        "node": self.node_names[i],
                        "at": at,
                        "watts": round(float(self.true_w[i])),
                        "cap_w": int(self.cap[i]),
                    }
                )
        self.node_j += self.true_w * dt
        hashing = self.fleet.true_gh > 0
        self.hash_j += float(self.fleet.true_w[hashing].sum()) * dt
        self.miner_j += float(self.fleet.true_w.sum()) * dt
        self.hash_gh_s += float(self.fleet.true_gh.sum()) * dt
        self.hash_s += hashing * dt
        self.gpu_j += float(self.hosts.gpu_w.sum()) * dt
        self.host_j += float(self.hosts.watts().sum()) * dt

    # --- faults

    def kill_host(self, name: str) -> list[str]:
        """The host is gone: no answer, no draw. Returns the keys of its workloads. Raises KeyError for an unknown host."""
        h = self.hosts.index[name]
        self.hosts.alive[h] = False
        mask = np.zeros(len(self.hosts.rows), dtype=bool)
        mask[h] = True
        return self.hosts.dark(mask)

    def revive_host(self, name: str) -> None:
        h = self.hosts.index[name]
        self.hosts.alive[h] = True
        self.hosts.boot_left[h] = BOOT_S
        if self.hosts.cap_control[h]:
            span = slice(self.hosts.first[h], self.hosts.first[h + 1])
            self.hosts.limit[span] = self.hosts.gpu_min[span]

    # --- the truth

    def truth(self) -> dict[str, Any]:
        """What really happened since the start: watts, Wh (integers), seconds, trips."""
        nodes = {
            name: {
                "cap_w": int(self.cap[i]),
                "max_w": round(float(self.max_w[i])),
                "now_w": round(float(self.true_w[i])),
                "over_s": round(float(self.over_s[i]), 2),
                "energy_wh": round(float(self.node_j[i]) / 3600),
                "closed": bool(self.closed[i]),
            }
            for i, name in enumerate(self.node_names)
        }
        return {
            "site": self.spec["name"],
            "elapsed_s": round(self.elapsed_s, 2),
            "nodes": nodes,
            "trips": self.trips,
            "over_instants": self.over_instants,
            "hashing_wh": round(self.hash_j / 3600),
            "miner_wh": round(self.miner_j / 3600),
            "gpu_wh": round(self.gpu_j / 3600),
            "host_wh": round(self.host_j / 3600),
            "hashes_gh": round(self.hash_gh_s),
            "hosts": {name: {"on_s": round(float(self.hosts.on_s[h]), 1)} for h, name in enumerate(self.hosts.names)},
            "gpu_active_s": [round(float(s), 1) for s in self.hosts.active_s],
            "miners": {name: {"hashing_s": round(float(self.hash_s[i]), 1)} for i, name in enumerate(self.fleet.names)},
        }
