"""The arithmetic of the power ledger: what a device may draw, what a node can still give, whom to put to sleep first.

Pure: integers and arrays in, decisions out. `marketplace/services/power.py` is the thin caller that owns the rows and
the locks; the site's own lowering-only loop lives in the agent, which stands alone and gets its caps, margins and shed
order by sync.

Units: watts and seconds are integers; sums up the tree are integer milliwatts, because a device of W watts counts W x
k(n) mW at a node with overhead k(n) per mille (its cooling): exact and additive. Money lost by sleeping is integer
micro-USD per hour.
The invariant, for every node n: ``reserved_mw(n) + 1000 * (fixed_w(n) + margin_w(n)) <= 1000 * cap_w(n)``.

API::

    host_reserved_w(gpus=, active_gpus=, standby_w=, parked_w=, base_w=, gpu_min_w=, gpu_max_w=, cap_control=, powered=,
    cpu_only=) miner_reserved_w(commanded_w, confirmed_w, measured_w, measured_age_s, top_mode_w, fresh_s=) -> W
    margin_w(cap_w, metering, unconfirmed_w) -> W
    tree = PowerTree.of([NodeSpec(...), ...])         parents before or after children, any order; tree.index[key] ->
    position load = Load.of(tree, nodes, kinds, watts)         subtree sums of devices; load.plus(tree, node, kind,
    delta_w) reserved_mw(tree, load), margins_w(tree, groups), free_mw(tree, load, margins)     -> int64[nodes]
    admissible(tree, free, node, delta_w, kind)       -> None, or Refusal naming the first node that says no
    shortfall_mw(tree, free, node, delta_w, kind)     -> int64[nodes], what must be freed where before delta_w fits
    choose_shed(tree, miners, need_mw, over_pick_permille=) -> Shed(picks, missing_mw)
    shed_order(miners)                                -> positions, least $/W first: the list the site's own loop gets
    confirmed_drop(samples, baseline_w, since=, now=, fresh_s=) -> "" when its readings say asleep, else the reason
    staggered_wake_groups(tree, miners, order, step_w=) -> groups of positions, to be woken one after another
    over_cap(tree, load_by_meter, now_age, fresh_s)   -> [Reaction]
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scheduler.core.power_tree import (
    HOST,
    MARGIN_PERMILLE,
    MINER,
    Ints,
    Load,
    NodeSpec,
    PowerError,
    PowerTree,
    Refusal,
    admissible,
    free_mw,
    host_reserved_w,
    margin_w,
    margins_w,
    miner_reserved_w,
    reserved_mw,
    shortfall_mw,
)

__all__ = [
    "ASLEEP_PERMILLE", "HOST", "MARGIN_PERMILLE", "MINER", "OVER_PICK_PERMILLE", "SOFT_PERMILLE",
    "TARGET_PERMILLE", "Ints", "Load", "Miners", "NodeSpec", "PowerError", "PowerTree", "Reaction", "Refusal",
    "Sample", "Shed", "admissible", "choose_shed", "confirmed_drop", "free_mw", "host_reserved_w", "margin_w", "margins_w",
    "miner_reserved_w", "over_cap", "reserved_mw", "shed_order", "shortfall_mw", "staggered_wake_groups",
]  # fmt: skip

# A reading at or under 15 % of the baseline is a machine asleep: fans and control board draw 1-3 %.
ASLEEP_PERMILLE = 150
# Of a few hundred machines some never answer: 3-5 % more are asked than needed.
OVER_PICK_PERMILLE = 40
# Over 95 % of the cap a node sheds down to 93 %, so that the reaction does not flutter.
SOFT_PERMILLE, TARGET_PERMILLE = 950, 930


@dataclass(frozen=True)
class Miners:
    """Machines that may be slept (or woken), as columns: position of their node, watts between asleep and awake,
    micro-USD per hour at stake.
    """

    node: Ints
    watts: Ints
    loss_uusd_h: Ints

    @staticmethod
    def of(rows: Iterable[tuple[int, int, int]]) -> "Miners":
        table = np.array(list(rows), np.int64).reshape(-1, 3)
        return Miners(table[:, 0], table[:, 1], table[:, 2])


@dataclass(frozen=True)
class Shed:
    """`picks`: positions to sleep, in the order to command them. `missing_mw`: per node key what even all of them would
    not free.
    """

    picks: tuple[int, ...]
    missing_mw: Mapping[Hashable, int]


def shed_order(miners: Miners) -> Ints:
    """Positions, least money lost per watt freed first; of equals the larger machine (fewer commands), then the
    first.
    """
    per_watt = miners.loss_uusd_h * 1000 // np.maximum(miners.watts, 1)
    order: Ints = np.lexsort((-miners.watts, per_watt)).astype(np.int64)
    return order[miners.watts[order] > 0]


def choose_shed(
    tree: PowerTree, miners: Miners, need_mw: Ints, *, over_pick_permille: int = OVER_PICK_PERMILLE
) -> Shed:
    """Whom to put to sleep so that every node of a path gets `need_mw` (see `shortfall_mw`) and a few per cent more.

    From the deepest node in need upward: what sleeps below it counts for its ancestors too, and nothing else could
    serve it. At each node the least $/W first; then those that turned out superfluous are let off, dearest first.
    """
    order = shed_order(miners)
    goal = need_mw + -(-need_mw * over_pick_permille // 1000)
    left = {int(n): int(goal[n]) for n in np.flatnonzero(need_mw > 0)}
    homes, watts = miners.node[order], miners.watts[order]
    reach = {home: [(n, int(tree.k[n, MINER])) for n in tree.paths[home] if n in left] for home in set(homes.tolist())}
    chosen: set[int] = set()
    for n in sorted(left, key=lambda n: (-len(tree.paths[n]), n)):
        for at in np.flatnonzero(tree.under(n)[homes]).tolist():
            if left[n] <= 0:
                break
            if at not in chosen:
                chosen.add(at)
                for up, k in reach[int(homes[at])]:
                    left[up] -= int(watts[at]) * k
    for at in sorted(chosen, reverse=True):
        freed = [(n, int(watts[at]) * k) for n, k in reach[int(homes[at])]]
        if all(left[n] + mw <= 0 for n, mw in freed):
            chosen.remove(at)
            for n, mw in freed:
                left[n] += mw
    spare = {n: int(goal[n] - need_mw[n]) for n in left}
    missing = {tree.keys[n]: mw - spare[n] for n, mw in left.items() if mw > spare[n]}
    return Shed(tuple(int(order[at]) for at in sorted(chosen)), missing)


@dataclass(frozen=True)
class Sample:
    """One reading of a device: when the device was read (seconds) and what it drew."""

    at: int
    watts: int


def confirmed_drop(
    samples: Sequence[Sample],
    baseline_w: int,
    *,
    since: int,
    now: int,
    fresh_s: int = 60,
) -> str:
    """Empty when the device's own readings say that it sleeps, else the reason in the words of the curtailment report.

    The two newest readings, both taken after the command (`since`) and not older than `fresh_s`, are at most 15 % of the
    baseline. Reasons: unreachable (no reading since the command), awaiting_sample (only one), stale_telemetry,
    acknowledged_no_drop. Whether the meters agree: `power_proof`.
    """
    after = sorted({sample.at: sample for sample in samples if since < sample.at <= now}.values(), key=lambda s: s.at)
    if not after:
        return "unreachable"
    if now - after[-1].at > fresh_s:
        return "stale_telemetry"
    newest = [sample for sample in after[-2:] if now - sample.at <= fresh_s]
    if any(1000 * sample.watts > ASLEEP_PERMILLE * baseline_w for sample in newest):
        return "acknowledged_no_drop"
    if len(newest) < 2:
        return "awaiting_sample"
    return ""


def staggered_wake_groups(
    tree: PowerTree, miners: Miners, order: Iterable[int], step_w: Ints | None = None, inrush_permille: int = 1000
) -> tuple[tuple[int, ...], ...]:
    """Positions in groups to be woken one after another, each confirmed before the next.

    No group adds more than `step_w` (per node; the metering's share of the cap when not given, so that the group never
    widens the margin) at any ancestor, inrush included. A machine larger than a step wakes alone.
    """
    step = margins_w(tree) if step_w is None else step_w
    room = [1_000_000 * int(w) for w in step]  # in uW, as watts x per mille x per mille
    ratio = [[(n, int(tree.k[n, MINER]) * inrush_permille) for n in path] for path in tree.paths]
    homes, watts = miners.node.tolist(), miners.watts.tolist()
    groups: list[list[int]] = []
    used: list[dict[int, int]] = []
    first_open = [0] * len(tree.keys)
    for position in order:
        home = homes[position]
        surge = [(n, watts[position] * r) for n, r in ratio[home]]
        alone = any(uw > room[n] for n, uw in surge)
        at = len(groups) if alone else first_open[home]
        while at < len(groups) and any(used[at].get(n, 0) + uw > room[n] for n, uw in surge):
            at += 1
        if at == len(groups):
            groups.append([])
            used.append(dict.fromkeys(range(len(step)), 1 << 62) if alone else {})
        if not alone:
            first_open[home] = at  # a later machine of this node never looks at an earlier group: one pass
        groups[at].append(int(position))
        for n, uw in surge:
            used[at][n] = used[at].get(n, 0) + uw
    return tuple(tuple(group) for group in groups)


@dataclass(frozen=True)
class Reaction:
    """What a node's meter asks for. action: `freeze` (stale: no grants, no wakes), `shed` (soft: stop wakes, free
    `shed_mw`), `trip` (over the cap: every miner below sleeps now, then GPUs are capped by priority, last evicted until
    `shed_mw` are gone).
    """

    node: Hashable
    action: str
    shed_mw: int


def over_cap(tree: PowerTree, meters: Mapping[Hashable, tuple[int, int]], *, fresh_s: int = 60) -> tuple[Reaction, ...]:
    """Reactions to the nodes' meters, deepest node first. `meters`: node key -> (watts, age in seconds), for nodes that
    have a meter.
    """
    found: list[tuple[int, Reaction]] = []
    for key, (watts, age_s) in meters.items():
        n = tree.index[key]
        cap = int(tree.cap_w[n])
        excess = max(0, 1000 * watts - TARGET_PERMILLE * cap)
        if not 0 <= age_s <= fresh_s:
            found.append((n, Reaction(key, "freeze", 0)))
        elif watts > cap:
            found.append((n, Reaction(key, "trip", excess)))
        elif 1000 * watts > SOFT_PERMILLE * cap:
            found.append((n, Reaction(key, "shed", excess)))
    found.sort(key=lambda item: (-len(tree.paths[item[0]]), item[0]))
    return tuple(reaction for _, reaction in found)
