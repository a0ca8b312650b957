"""What a call to stay under a limit takes, in which order; what it delivered; and the signals that make calls by themselves.

Pure: seconds and watts are integers, sums up the tree mW, money millionths of a USD. The order of a call:

    hashing (the site's loop) -> spot -> flexible (its notice over) -> GPUs held lower -> firm, where its contract names such a call

`relief` says what of jobs has to go, when all machines that may sleep are not enough: never more than is missing, nothing of a
later rank while an earlier one could give the watts at the same nodes, of one rank the newest first.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from scheduler.core.power_tree import HOST, Ints, PowerTree

SPOT, FLEXIBLE, SOON, FIRM, STAYS = range(5)
"""Ranks of work: SOON will leave once its notice is over (its watts are counted on); STAYS may only be held lower."""


@dataclass(frozen=True)
class HostShape:
    """A host as far as watts go. `booked_w` now; `gpu_w`: what one of its GPUs may draw now."""

    node: int
    booked_w: int
    parked_w: int
    base_w: int
    gpus: int
    gpu_min_w: int
    gpu_w: int
    cap_control: bool

    def needs_w(self, active: int, *, works: bool, gpu_w: int | None = None) -> int:
        """With `active` GPUs in use, and anything at all running (`works`)."""
        if not self.cap_control:
            return self.booked_w
        if not works:
            return self.parked_w
        return self.base_w + active * (self.gpu_w if gpu_w is None else gpu_w) + (self.gpus - active) * self.gpu_min_w


@dataclass(frozen=True)
class Work:
    """One placement. `job`: those of one job leave together. `since`: of two of a rank the later leaves first."""

    key: Hashable
    job: Hashable
    host: Hashable
    gpus: frozenset[int]
    rank: int
    since: int


@dataclass(frozen=True)
class Relief:
    """`leave`: jobs with the node for whose sake, in order; `caps`: host -> W of each GPU; `missing_mw`: what even that leaves."""

    leave: tuple[tuple[Hashable, int], ...] = ()
    caps: Mapping[Hashable, int] = field(default_factory=dict)
    missing_mw: Mapping[int, int] = field(default_factory=dict)


@dataclass
class _State:
    tree: PowerTree
    need: Ints
    hosts: Mapping[Hashable, HostShape]
    stay: dict[Hashable, list[Work]]
    booked: dict[Hashable, int]

    def node(self, host: Hashable) -> int | None:
        """The nearest node above the host that still lacks watts."""
        return next((n for n in self.tree.paths[self.hosts[host].node] if self.need[n] > 0), None)

    def lower(self, host: Hashable, gpu_w: int | None = None) -> None:
        """Take from `need` what the host gives up as it now stands."""
        shape, works = self.hosts[host], self.stay.get(host, [])
        active = len({i for w in works for i in w.gpus})
        target = min(self.booked[host], shape.needs_w(active, works=bool(works), gpu_w=gpu_w))
        freed = self.booked[host] - target
        for n in self.tree.paths[shape.node]:
            self.need[n] = max(0, int(self.need[n]) - freed * int(self.tree.k[n, HOST]))
        self.booked[host] = target


def relief(
    tree: PowerTree, need_mw: Ints, hosts: Mapping[Hashable, HostShape], work: Iterable[Work], *, may_cap: bool
) -> Relief:
    """What jobs give for `need_mw` (by position, what machines cannot give). `work`: what is not on its way out already; what is, is
    counted on by its host's `booked_w` standing above what the rest needs.
    """
    rows = sorted(work, key=lambda w: (-w.since, str(w.key)))
    state = _State(tree, need_mw.copy(), hosts, {}, {key: h.booked_w for key, h in hosts.items()})
    for w in rows:
        state.stay.setdefault(w.host, []).append(w)
    for host in hosts:
        state.lower(host)
    leave: list[tuple[Hashable, int]] = []
    _leave(state, rows, SPOT, leave)
    _leave(state, rows, FLEXIBLE, leave)
    _leave(state, rows, SOON, [])
    caps = _caps(state) if may_cap else {}
    _leave(state, rows, FIRM, leave)
    return Relief(tuple(leave), caps, {int(n): int(state.need[n]) for n in np.flatnonzero(state.need > 0)})


def _leave(state: _State, rows: Sequence[Work], rank: int, leave: list[tuple[Hashable, int]]) -> None:
    gone: set[Hashable] = set()
    for w in rows:
        if w.rank != rank or w.job in gone:
            continue
        node = state.node(w.host)
        if node is None or state.hosts[w.host].cap_control is False:
            continue
        gone.add(w.job)
        leave.append((w.job, node))
        for host in {x.host for x in rows if x.job == w.job}:
            state.stay[host] = [x for x in state.stay[host] if x.job != w.job]
            state.lower(host)


def _caps(state: _State) -> dict[Hashable, int]:
    """Deepest node first, every host under it by the same share of what lies between its GPUs' watts and their floor."""
    caps: dict[Hashable, int] = {}
    tree = state.tree
    for n in sorted(np.flatnonzero(state.need > 0).tolist(), key=lambda n: (-len(tree.paths[n]), n)):
        if state.need[n] <= 0:  # a node below has given enough
            continue
        room = {}
        for host, shape in state.hosts.items():
            active = len({i for w in state.stay.get(host, []) for i in w.gpus})
            now = caps.get(host, shape.gpu_w)
            if shape.cap_control and active and n in tree.paths[shape.node] and now > shape.gpu_min_w:
                room[host] = (active, now, shape.gpu_min_w)
        k = int(tree.k[n, HOST])
        most = sum(active * (now - low) for active, now, low in room.values()) * k
        if not most:
            continue
        share = min(1000, -(-int(state.need[n]) * 1000 // most))
        for host, (_, now, low) in sorted(room.items(), key=lambda item: str(item[0])):
            caps[host] = now - -(-(now - low) * share // 1000)
            state.lower(host, caps[host])
    return caps


# --- what a call delivered
BASELINE_S = 300


def baseline_w(readings: Sequence[tuple[int, int]], start_s: int) -> int | None:
    """Mean of the meter's readings (second, W) in the five minutes before the call's start; None without any."""
    before = [w for at, w in readings if start_s - BASELINE_S <= at < start_s]
    return round(sum(before) / len(before)) if before else None


def by_second(readings: Sequence[tuple[int, int]], seconds: int, before_w: int) -> list[int]:
    """W in each of `seconds` seconds from the start: each reading holds until the next, `before_w` until the first.
    Readings are (second from the start, W), in order.
    """
    out, at, watts = [], 0, before_w
    rows = list(readings)
    for second in range(seconds):
        while at < len(rows) and rows[at][0] <= second:
            watts = rows[at][1]
            at += 1
        out.append(watts)
    return out


def delivered_wh(watts: Sequence[int], base_w: int) -> int:
    """Wh not drawn against the baseline over seconds of `watts`; what was drawn beyond it counts against it."""
    return round(sum(base_w - w for w in watts) / 3600)


def under_after(readings: Sequence[tuple[int, int]], cap_w: int) -> int | None:
    """Second of the first reading from which on the meter was not over the cap any more; None: it never came under it."""
    return next((max(0, at) for at, watts in readings if at >= 0 and watts <= cap_w), None)


# --- signals
@dataclass(frozen=True)
class PriceRule:
    """Curtail after `windows` intervals at or over `strike` (one, at `urgent`); come back after `resume_windows` under `resume`."""

    strike: int
    resume: int
    windows: int = 2
    resume_windows: int = 2
    urgent: int | None = None


def price_says(rule: PriceRule, prices: Sequence[int], *, holding: bool) -> str:
    """`curtail`, `resume` or `stay`, by the prices of the last intervals (newest last)."""
    if holding:
        last = prices[-rule.resume_windows :]
        return "resume" if len(last) == rule.resume_windows and all(p < rule.resume for p in last) else "stay"
    if prices and rule.urgent is not None and prices[-1] >= rule.urgent:
        return "curtail"
    last = prices[-rule.windows :]
    return "curtail" if len(last) == rule.windows and all(p >= rule.strike for p in last) else "stay"
