"""Our planner among reserved windows: `disciplines.Core` with what the service lays around it.

A window is admitted by `scheduler.core.capacity` (buddy cells: whole ones first, the tightest for the rest) beside every other
window, the starts promised to waiting jobs, and running work until its bound. Until it begins, its GPUs are lent to what is sure to
be gone by then (`Fleet.claimed_at`, `core.fit.bounds`). From its first second they stand in rows of their own, where only its
holder's job goes (as `scheduler.snapshot` lays rows out). What cannot be admitted is refused when it would be signed.

GPUs keep their device numbers here: a device that runs something past a window's begin is not given to it, and a host that a promise
will need is closed to it. So a little less is admitted than counts would allow.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from benchmarks.disciplines import Core
from benchmarks.simulator import Cluster, Start, Window, Workload
from scheduler.core import capacity
from scheduler.core.fit import bounds, deadlines
from scheduler.core.types import WHOLE, Decision, Fleet, Kind, Policy, Request, Running

OPEN: Final = 1  # the pool of what anybody may use; a window's own is minus its holder's number


class Reserving(Core):
    """Window w's holder is job number len(work) + w, of an organization of its own."""

    def __init__(self, work: Workload, cluster: Cluster, policy: Policy, *, half_life: int, first: int = 4) -> None:
        super().__init__(work, cluster, policy, half_life=half_life, first=first)
        self.cluster = cluster
        self.fleet.pool[:] = OPEN
        places = zip(range(cluster.hosts), self.fleet.leaf.tolist(), self.fleet.spine.tolist(), strict=True)
        self.hosts = capacity.Hosts.of([(host, cluster.per_host, leaf, spine) for host, leaf, spine in places])
        self.ahead: dict[int, tuple[Window, dict[int, int]]] = {}  # holder -> its window to come, host -> GPU mask
        self.begun: dict[int, tuple[Window, dict[int, int]]] = {}
        self.due: list[int] = []  # holders whose window has begun, and who do not run yet
        self.claims: list[int] = []  # when windows begin on lent GPUs, ascending
        self.row_of: dict[tuple[int, int], int] = {}  # (holder, host) -> row of its part of the host

    def reserve(self, now: int, job: int, window: Window) -> dict[int, int] | None:
        """`simulator.Reserver.reserve`."""
        blocked = self._blocked(now, window)
        claims = [
            capacity.Claim(host, window.start, window.end, ((host, mask.bit_count()),))
            for host, mask in blocked.items()
        ]
        pool = capacity.Pool.build(self.hosts, claims)
        found = capacity.admit(pool, capacity.Shape(window.chunk), window.level, window.gpus, window.start, window.end)
        if not found.admitted:
            return None
        held = {}
        for host in range(self.cluster.hosts):
            idle = [g for g in range(self.cluster.per_host) if not blocked.get(host, 0) >> g & 1]
            if count := dict(found.hold).get(host, 0):
                held[host] = sum(1 << g for g in idle[:count])
        self.ahead[job] = window, held
        self._lend()
        return held

    def _blocked(self, now: int, window: Window) -> dict[int, int]:
        """Host -> GPUs that somebody holds, or may still hold, at some second of the window."""
        blocked: dict[int, int] = dict.fromkeys(range(self.cluster.hosts), 0)
        for other, held in (*self.ahead.values(), *self.begun.values()):
            if other.start < window.end and other.end > window.start:
                for host, mask in held.items():
                    blocked[host] |= mask
        for job, rows in self.running.items():
            for r in rows if job < len(self.work) else ():
                if r.ends_at > window.start:
                    blocked[r.host] |= _mask(r.gpus)
        for job, (start, hosts) in self.promised.items():
            if max(start, now) + self.work.estimate[job] > window.start:
                blocked |= dict.fromkeys(hosts, (1 << self.cluster.per_host) - 1)
        return {host: mask for host, mask in blocked.items() if mask}

    # --- what the planner sees of it
    def _lend(self) -> None:
        """The windows to come as columns of the fleet: of each host the earliest begin, and the GPUs of all."""
        at, gpus = self.fleet.claimed_at, self.fleet.claimed_gpus
        at[:], gpus[:] = 0, 0
        for window, held in self.ahead.values():
            for host, mask in held.items():
                at[host] = min(int(at[host]) or window.start, window.start)
                gpus[host] |= mask
        self.claims = deadlines(self.fleet)[1]

    def _lay_out(self) -> None:
        """The rows of the hosts, and behind them one for each part of a host whose window is in force."""
        hosts, before = self.cluster.hosts, {row: part for part, row in self.row_of.items()}
        parts = [(job, host, mask) for job, (_, held) in self.begun.items() for host, mask in held.items()]
        busy = dict.fromkeys(range(hosts), 0)
        for job, rows in self.running.items():
            for r in rows if job < len(self.work) else ():
                busy[r.host] |= _mask(r.gpus)
        of = np.array([host for _, host, _ in parts], np.int64)
        columns = {}
        for name in Fleet.__dataclass_fields__:
            column = getattr(self.fleet, name)
            columns[name] = column if name.startswith("node_") else np.concatenate([column[:hosts], column[:hosts][of]])
        self.row_of = {(job, host): hosts + i for i, (job, host, _) in enumerate(parts)}
        for (job, host, mask), row in zip(parts, self.row_of.values(), strict=True):
            columns["gpu_free"][host, _gpus(mask)] = 0
            columns["gpu_free"][row] = 0
            columns["gpu_free"][row, _gpus(0 if job in self.running else mask & ~busy[host])] = WHOLE
            columns["gpu_active"][row] = mask if job in self.running else 0
            columns["pool"][row] = -job
            columns["claimed_at"][row] = columns["claimed_gpus"][row] = 0
        self.fleet = Fleet(**columns)
        for job in self.begun.keys() & self.running.keys():
            for r in self.running[job]:
                r.host = self.row_of[before[r.host]]

    def _request(self, job: int) -> Request:
        if job < len(self.work):
            made = super()._request(job)
            made.pool = OPEN
            made.stays = bounds(made, self.at, (), self.claims, self.policy)[1]
            return made
        window = self.begun[job][0]
        return Request(
            job=job,
            org=job + 1,
            kind=Kind.FIRM,
            pool=-job,
            replicas=window.gpus // window.chunk,
            gpus=window.chunk,
            queued_at=window.start,
            duration_s=window.end - self.at,
        )

    def _promise(self, d: Decision) -> None:
        if d.job < len(self.work):  # a holder has its window, and needs no other promise
            super()._promise(d)

    # --- what happens
    def _first(self, now: int, arrived: list[int]) -> list[Start]:
        """Holders whose window has begun."""
        began = [job for job in arrived if job >= len(self.work)]
        self.begun |= {job: self.ahead.pop(job) for job in began}
        self.due += began
        if began:
            self._lend()
            self._lay_out()
        return self._plan(now, [self._request(job) for job in (*self.due, *self.promised)]) if self.due else []

    def _start(self, now: int, job: int, where: list[tuple[int, tuple[int, ...]]]) -> Start:
        if job < len(self.work):
            return super()._start(now, job, where)
        self.due.remove(job)
        end, host_of = self.begun[job][0].end, {row: host for (_, host), row in self.row_of.items()}
        self.running[job] = [
            Running(job * 128 + n, job, job + 1, Kind.FIRM, row, gpus, gang_size=len(where), ends_at=end)
            for n, (row, gpus) in enumerate(where)
        ]
        for row, gpus in where:
            self.fleet.gpu_free[row, list(gpus)] = 0
            self.fleet.gpu_active[row] |= _mask(gpus)
        return Start(job, [host_of[row] for row, _ in where], [_mask(gpus) for _, gpus in where])

    def _end(self, job: int) -> None:
        if job < len(self.work):
            hosts = {r.host for r in self.running[job]}
            super()._end(job)
            if any(hosts & held.keys() for _, held in self.begun.values()):
                self._lay_out()  # was it in the way of a window
            return
        del self.running[job]
        for host, mask in self.begun.pop(job)[1].items():
            self.fleet.gpu_free[host, _gpus(mask)] = WHOLE
        self._lay_out()


def _mask(gpus: tuple[int, ...]) -> int:
    return sum(1 << g for g in gpus)


def _gpus(mask: int) -> list[int]:
    return [g for g in range(mask.bit_length()) if mask >> g & 1]
