"""What a call to stay under a limit takes, in which order; what it delivered; and the signals that make calls by themselves.

Pure: seconds and watts are integers, sums up the tree mW, money millionths of a USD. The order of a call:

    hashing (the site's loop) -> spot -> flexible (its notice over) -> GPUs held lower -> firm, where its contract names such a call

`rank` says what of this a job's contract agreed to. `relief` says what of jobs has to go, when all machines that may sleep are not
enough: never more than is missing, nothing of a later rank while an earlier one could give the watts at the same nodes, of one rank
the newest first.
"""

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from scheduler.core.power_tree import HOST, Ints, PowerTree

SPOT, FLEXIBLE, SOON, FIRM, STAYS = range(5)
"""Ranks of work: SOON will leave once its notice is over (its watts are counted on); STAYS may only be held lower."""


@dataclass(frozen=True)
class Call:
    """What of a call decides who leaves for it: for an economic one nobody, for an emergency also whoever agreed to that."""

    mandatory: bool = True
    emergency: bool = False


@dataclass(frozen=True)
class Agreed:
    """What of its contract decides. `hours_left`: a flexible one has hours left this month for the call. `emergency_notice_s`: what it
    wants to be told ahead of leaving in an emergency; None: its contract names none, so it never leaves.
    """

    kind: str
    hours_left: bool = False
    flexible_notice_s: int = 0
    emergency_notice_s: int | None = None


def rank(call: Call, agreed: Agreed, told_s: int) -> int:
    """Of a job, `told_s` seconds after its contract was told of the call. An emergency does not wait for a flexible contract's notice:
    what is missing meanwhile comes from other work's GPUs.
    """
    if not call.mandatory:
        return STAYS
    if agreed.kind == "spot":
        return SPOT
    if agreed.kind == "flexible" and agreed.hours_left:
        if told_s >= agreed.flexible_notice_s:
            return FLEXIBLE
        if not call.emergency:
            return SOON
    named = call.emergency and agreed.emergency_notice_s is not None and told_s >= agreed.emergency_notice_s
    return FIRM if named else STAYS


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
    """One placement. `job`: those of one job leave together. `since`: of two of a rank the later leaves first. `ranks`: by position of
    the node where it is another one than `rank`: calls differ.
    """

    key: Hashable
    job: Hashable
    host: Hashable
    gpus: frozenset[int]
    rank: int
    since: int
    ranks: Mapping[int, int] = field(default_factory=dict)

    def rank_at(self, node: int) -> int:
        return self.ranks.get(node, self.rank)


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
    caps: dict[Hashable, int] = field(default_factory=dict)
    gone: set[Hashable] = field(default_factory=set)

    def node(self, work: Work, rank: int) -> int | None:
        """The nearest node above it that still lacks watts and for which it is of this rank."""
        path = self.tree.paths[self.hosts[work.host].node]
        return next((n for n in path if self.need[n] > 0 and work.rank_at(n) == rank), None)

    def target(self, host: Hashable, without: Collection[Hashable] = ()) -> int:
        """W that the host needs, after these jobs too."""
        works = [w for w in self.stay.get(host, []) if w.job not in without]
        active = len({i for w in works for i in w.gpus})
        needs = self.hosts[host].needs_w(active, works=bool(works), gpu_w=self.caps.get(host))
        return min(self.booked[host], needs)

    def lower(self, host: Hashable) -> None:
        """Take from `need` what the host gives up as it now stands."""
        target = self.target(host)
        freed = self.booked[host] - target
        for n in self.tree.paths[self.hosts[host].node]:
            self.need[n] = max(0, int(self.need[n]) - freed * int(self.tree.k[n, HOST]))
        self.booked[host] = target

    def leaves(self, job: Hashable, rows: Sequence[Work]) -> None:
        self.gone.add(job)
        for host in {w.host for w in rows if w.job == job}:
            self.stay[host] = [w for w in self.stay[host] if w.job != job]
            self.lower(host)


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
    if may_cap:
        _caps(state)
    _leave_last(state, rows, leave)
    return Relief(tuple(leave), state.caps, {int(n): int(state.need[n]) for n in np.flatnonzero(state.need > 0)})


def _leave(state: _State, rows: Sequence[Work], rank: int, leave: list[tuple[Hashable, int]]) -> None:
    for w in rows:
        node = None if w.job in state.gone else state.node(w, rank)
        if node is None or not state.hosts[w.host].cap_control:
            continue
        leave.append((w.job, node))
        state.leaves(w.job, rows)


def _leave_last(state: _State, rows: Sequence[Work], leave: list[tuple[Hashable, int]]) -> None:
    """FIRM, and none in vain: a GPU at its floor draws what an idle one does, so a host held there gives watts only when all of its
    jobs go. Where one of them stays, so do the others.
    """
    for w in rows:
        node = None if w.job in state.gone else state.node(w, FIRM)
        if node is None or not state.hosts[w.host].cap_control:
            continue
        beside = list(dict.fromkeys(x.job for x in state.stay[w.host] if x.rank_at(node) == FIRM))
        going = next((g for g in ([w.job], beside) if state.target(w.host, g) < state.booked[w.host]), [])
        for job in going:
            leave.append((job, node))
            state.leaves(job, rows)


def _caps(state: _State) -> None:
    """Deepest node first, every host under it by the same share of what lies between its GPUs' watts and their floor."""
    tree, caps = state.tree, state.caps
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
            state.lower(host)


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
