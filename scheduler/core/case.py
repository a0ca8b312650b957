"""Everything that a plan is made of, as one value: what a cycle planned, what a record replays, what an explanation varies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np

from scheduler.core.fit import bounds, deadlines, vram_of
from scheduler.core.plan import plan
from scheduler.core.types import I64, WHOLE, Fleet, HostFlag, Plan, Policy, Request, Running, Tie


class Window(NamedTuple):
    """A reserved row of the fleet (a contract's GPUs on a host), and when its window is over, seconds: with it, those after it."""

    row: int
    ends_at: int


@dataclass(frozen=True, slots=True)
class Case:
    """The arguments of `plan`. Same case, same plan."""

    fleet: Fleet
    requests: Sequence[Request]
    running: Sequence[Running]
    policy: Policy
    seed: int = 0
    now_s: int = 0

    def plan(self) -> Plan:
        return plan(self.fleet, self.requests, self.running, policy=self.policy, seed=self.seed, now_s=self.now_s)

    def after(self, made: Plan, refused: Collection[int] = ()) -> Case:
        """The cell once a plan is in force: its jobs stand on their hosts, those whom it sends away still hold theirs.

        `refused`: jobs that the commit did not place. Nobody is preempted again before the victims are gone, as in the
        snapshots that follow such a cycle.
        """
        fleet = copied(self.fleet)
        asked = {r.job: r for r in self.requests}
        leaving = {p.placement for p in made.preemptions}
        running = [r for r in self.running if r.placement not in leaving]
        placed: set[int] = set()
        begun: list[Running] = []
        for p in made.placements:
            if p.job in refused:
                continue
            placed.add(p.job)
            r = asked[p.job]
            vram = vram_of(r.vram, r.gpu_milli, int(fleet.vram_total[p.host])) if p.gpus else 0
            began = Running(
                placement=0, job=r.job, org=r.org, kind=r.kind, host=p.host, gpus=p.gpus, gpu_milli=p.gpu_milli, cpu=r.cpu,
                ram=r.ram, nvme=r.nvme, vram=vram, priority=r.priority, gang_size=r.replicas,
                ends_at=self.now_s + self.policy.lag_s + r.duration_s if r.duration_s else 0, quota_id=r.quota_id,
                price=r.price,
            )  # fmt: skip
            begun.append(began)
        shift(fleet, begun, -1)
        running += begun
        stands: dict[int, set[int]] = {}
        for p in made.placements:
            for group in asked[p.job].joins if p.job in placed else ():
                stands.setdefault(group, set()).add(p.host)
        promised = {d.job: (d.earliest_start, d.held) for d in made.decisions if d.held}
        waiting = [_tied(r, stands) for r in self.requests if r.job not in placed]
        waiting = _charged(waiting, begun, -1)
        # Who was refused at the commit keeps the promise of before.
        waiting = [r if r.job in refused else _promised(r, *promised.get(r.job, (0, ()))) for r in waiting]
        if leaving:
            waiting = [replace(r, may_preempt=False) for r in waiting]
        return replace(self, fleet=fleet, requests=waiting, running=running)

    def without(self, gone: Callable[[Running], bool], windows: Iterable[Window] = ()) -> Case:
        """The cell without the running placements that `gone` names, and with these windows over."""
        fleet = copied(self.fleet)
        left = [r for r in self.running if not gone(r)]
        ended = [r for r in self.running if gone(r)]
        shift(fleet, ended, 1)
        for window in windows:
            _open(fleet, window.row)
        return replace(self, fleet=fleet, running=left, requests=_charged(self.requests, ended, 1))

    def at(self, time: int, windows: Sequence[Window] = ()) -> Case:
        """The cell at a later time by what is known: what has a limit has ended by it, windows are over, nothing else
        moved.
        """
        later = self.without(lambda r: 0 < r.ends_at <= time, [w for w in windows if w.ends_at <= time])
        return replace(later, now_s=time, requests=[self.lasting(r, r.duration_s, time) for r in later.requests])

    def lasting(self, r: Request, duration_s: int, now_s: int | None = None) -> Request:
        """The request with another time limit, or begun at another time: hosts that leave, and GPUs that are reserved, are
        refused accordingly.
        """
        asked = replace(r, duration_s=duration_s)
        until, stays = bounds(asked, self.now_s if now_s is None else now_s, *deadlines(self.fleet), self.policy)
        return replace(asked, until=until, stays=stays)


def _charged(requests: Sequence[Request], rows: Sequence[Running], sign: int) -> list[Request]:
    """The requests with what placements came to hold (-1) or gave back (1) off, or on, what is free under shared limits."""
    held: Counter[tuple[str, int]] = Counter()
    for row in rows:
        milli = len(row.gpus) * row.gpu_milli
        held["quota", row.quota_id] += milli
        held["org", row.org] += milli
        held["rate", row.org] += milli * row.price
    if not any(held.values()):
        return list(requests)

    def left(r: Request) -> Request:
        keys = ("quota", r.quota_id), ("org", r.org), ("rate", r.org)
        was = r.quota_milli, r.limit_milli, r.rate_left
        free = [n if n < 0 else max(0, n + sign * held[key]) for key, n in zip(keys, was, strict=True)]
        if not r.quota_id:
            free[0] = r.quota_milli
        if tuple(free) == was:
            return r
        return replace(r, quota_milli=free[0], limit_milli=free[1], rate_left=free[2])

    return [left(r) for r in requests]


def _promised(r: Request, start: int, hosts: tuple[int, ...]) -> Request:
    """The request with the start that the plan promised it, or without one."""
    if (r.promised_start, r.promised_hosts) == (start, hosts):
        return r
    return replace(r, promised_start=start, promised_hosts=hosts)


def _tied(r: Request, stands: dict[int, set[int]]) -> Request:
    """The request with its ties led to where their groups now stand as well."""
    if not stands or not (r.near or r.apart):
        return r

    def led(ties: tuple[Tie, ...]) -> tuple[Tie, ...]:
        return tuple(t._replace(rows=tuple(sorted({*t.rows, *stands.get(t.group, ())}))) for t in ties)

    return replace(r, near=led(r.near), apart=led(r.apart))


def copied(fleet: Fleet) -> Fleet:
    """A fleet whose columns may be written."""
    return Fleet(**{f.name: getattr(fleet, f.name).copy() for f in fields(Fleet)})


def shift(fleet: Fleet, rows: Sequence[Running], sign: int) -> None:
    """Takes placements onto their hosts (-1) or gives back what they held (1), in place, watts at every node included."""
    if not rows:
        return
    host = np.array([r.host for r in rows])
    touched = np.unique(host)
    before = _watts(fleet, touched)
    for name, held in (("cpu_free", "cpu"), ("ram_free", "ram"), ("nvme_free", "nvme")):
        np.add.at(getattr(fleet, name), host, [sign * getattr(r, held) for r in rows])
    there = [bool(sum(1 << g for g in r.gpus) & int(fleet.claimed_gpus[r.host])) for r in rows]
    for name, held in (("owed_cpu", "cpu"), ("owed_ram", "ram"), ("owed_nvme", "nvme")):
        np.add.at(
            getattr(fleet, name), host[there], [sign * getattr(r, held) for r, t in zip(rows, there, strict=True) if t]
        )
    np.subtract.at(fleet.cpu_only, host[[not r.gpus for r in rows]], sign)
    devices = [(r.host, gpu, sign * r.gpu_milli, sign * r.vram) for r in rows for gpu in r.gpus]
    at, gpu, milli, vram = np.array(devices, np.int64).reshape(-1, 4).T
    np.add.at(fleet.gpu_free, (at, gpu), milli)
    np.add.at(fleet.vram_free, (at, gpu), vram)
    bit, active = (1 << gpu).astype(np.int32), fleet.gpu_free[at, gpu] < WHOLE
    np.bitwise_or.at(fleet.gpu_active, at[active], bit[active])
    np.bitwise_and.at(fleet.gpu_active, at[~active], ~bit[~active])
    delta, node = _watts(fleet, touched) - before, fleet.power_node[touched].astype(np.int64)
    while (node >= 0).any():
        delta, node = delta[node >= 0], node[node >= 0]
        np.subtract.at(fleet.node_free_mw, node, delta * fleet.node_k_gpu[node])
        node = fleet.node_parent[node].astype(np.int64)


def _watts(fleet: Fleet, hosts: I64) -> I64:
    """`fit.host_watts` of these hosts, W."""
    columns = (
        "base_w",
        "gpu_count",
        "gpu_min_w",
        "gpu_max_w",
        "cap_control",
        "cpu_only",
        "flags",
        "standby_w",
        "parked_w",
    )
    base, count, low, top, capped, alone, flags, standby, parked = (
        getattr(fleet, name)[hosts].astype(np.int64) for name in columns
    )
    active = np.bitwise_count(fleet.gpu_active[hosts]).astype(np.int64)
    idle = np.where(flags & int(HostFlag.OFF), standby, parked)
    drawn = np.where((active == 0) & (alone == 0), idle, base + active * top + (count - active) * low)
    out: I64 = np.where(capped != 0, drawn, base + count * top)
    return out


def _open(fleet: Fleet, row: int) -> None:
    """What is free in a reserved row becomes part of the host's open row.

    CPU and memory of the two rows are shares of the same free amount, so the larger of them is what is surely there. No later
    reservation claims these GPUs: a window ends with the last of them.
    """
    twins = np.flatnonzero((fleet.host_id == fleet.host_id[row]) & (fleet.pool >= 0))
    if not len(twins):
        return
    to = int(twins[0])
    for name in ("cpu_free", "ram_free", "nvme_free"):
        column = getattr(fleet, name)
        column[to] = max(column[to], column[row])
    fleet.claimed_gpus[to] &= ~sum(1 << gpu for gpu in np.flatnonzero(fleet.gpu_free[row]).tolist())
    if not fleet.claimed_gpus[to]:
        for name in ("claimed_at", "owed_cpu", "owed_ram", "owed_nvme"):
            getattr(fleet, name)[to] = 0
    for name in ("gpu_free", "vram_free"):
        column = getattr(fleet, name)
        column[to] = np.maximum(column[to], column[row])
        column[row] = 0
