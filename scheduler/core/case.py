"""Everything that a plan is made of, as one value: what a cycle planned, what a record replays, what an explanation varies."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np

from scheduler.core.fit import host_row, host_watts, rounded_end
from scheduler.core.plan import plan
from scheduler.core.types import Fleet, Plan, Policy, Request, Running, Tie


class Window(NamedTuple):
    """A reserved row of the fleet (a contract's GPUs on a host), and when its window is over, seconds."""

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
        placed = set()
        for p in made.placements:
            if p.job in refused:
                continue
            placed.add(p.job)
            r = asked[p.job]
            began = Running(
                placement=0, job=r.job, org=r.org, kind=r.kind, host=p.host, gpus=p.gpus, gpu_milli=p.gpu_milli, cpu=r.cpu,
                ram=r.ram, nvme=r.nvme, vram=r.vram if p.gpus else 0, priority=r.priority, gang_size=r.replicas,
                ends_at=self.now_s + r.duration_s if r.duration_s else 0,
            )  # fmt: skip
            shift(fleet, began, -1)
            running.append(began)
        stands: dict[int, set[int]] = {}
        for p in made.placements:
            for group in asked[p.job].joins if p.job in placed else ():
                stands.setdefault(group, set()).add(p.host)
        promised = {d.job: (d.earliest_start, d.held) for d in made.decisions if d.held}
        waiting = [_tied(r, stands) for r in self.requests if r.job not in placed]
        waiting = [_promised(r, *promised.get(r.job, (0, ()))) for r in waiting]
        if leaving:
            waiting = [replace(r, may_preempt=False) for r in waiting]
        return replace(self, fleet=fleet, requests=waiting, running=running)

    def without(self, gone: Callable[[Running], bool], windows: Iterable[Window] = ()) -> Case:
        """The cell without the running placements that `gone` names, and with these windows over."""
        fleet = copied(self.fleet)
        left = []
        for r in self.running:
            if gone(r):
                shift(fleet, r, 1)
            else:
                left.append(r)
        for window in windows:
            _open(fleet, window.row)
        return replace(self, fleet=fleet, running=left)

    def at(self, time: int, windows: Sequence[Window] = ()) -> Case:
        """The cell at a later time by what is known: what has a limit has ended by it, windows are over, nothing else
        moved.
        """
        later = self.without(lambda r: 0 < r.ends_at <= time, [w for w in windows if w.ends_at <= time])
        return replace(later, now_s=time, requests=[self.lasting(r, r.duration_s, time) for r in self.requests])

    def lasting(self, r: Request, duration_s: int, now_s: int | None = None) -> Request:
        """The request with another time limit, or begun at another time: hosts that leave are refused accordingly."""
        deadlines = sorted({int(t) for t in self.fleet.leaves if t > 0})
        until = rounded_end(self.now_s if now_s is None else now_s, duration_s, deadlines)
        return replace(r, duration_s=duration_s, until=until)


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


def shift(fleet: Fleet, r: Running, sign: int) -> None:
    """Takes a placement onto its host (-1) or gives back what it held (1), in place, watts at every node above included."""
    h = r.host
    row = host_row(fleet, h)
    old = host_watts(row, row.gpu_active, row.cpu_only)
    fleet.cpu_free[h] += sign * r.cpu
    fleet.ram_free[h] += sign * r.ram
    fleet.nvme_free[h] += sign * r.nvme
    for gpu in r.gpus:
        fleet.gpu_free[h, gpu] += sign * r.gpu_milli
        fleet.vram_free[h, gpu] += sign * r.vram
        bit = 1 << gpu
        fleet.gpu_active[h] = fleet.gpu_active[h] | bit if fleet.gpu_free[h, gpu] < 1000 else fleet.gpu_active[h] & ~bit
    if not r.gpus:
        fleet.cpu_only[h] -= sign
    delta = host_watts(row, int(fleet.gpu_active[h]), int(fleet.cpu_only[h])) - old
    node = int(fleet.power_node[h])
    while node >= 0:
        fleet.node_free_mw[node] -= delta * int(fleet.node_k_gpu[node])
        node = int(fleet.node_parent[node])


def _open(fleet: Fleet, row: int) -> None:
    """What is free in a reserved row becomes part of the host's open row.

    CPU and memory of the two rows are shares of the same free amount, so the larger of them is what is surely there.
    """
    twins = np.flatnonzero((fleet.host_id == fleet.host_id[row]) & (fleet.pool >= 0))
    if not len(twins):
        return
    to = int(twins[0])
    for name in ("cpu_free", "ram_free", "nvme_free"):
        column = getattr(fleet, name)
        column[to] = max(column[to], column[row])
    for name in ("gpu_free", "vram_free"):
        column = getattr(fleet, name)
        column[to] = np.maximum(column[to], column[row])
        column[row] = 0
