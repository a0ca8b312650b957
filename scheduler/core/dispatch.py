"""Which miners run, in which mode: a multiple-choice knapsack under laminar caps, in two speeds.

Pure. Watts left over by the jobs go to the machines that earn most per watt; below break-even a machine sleeps.

API::

    fleet  = Fleet.of(nodes, ladder_of, ladders)       ladders: [[(watts, GH/s), ...], ...], entry 0 = asleep, watts ascending
    prices = Prices(hashprice_uusd=, energy_uusd_mwh=, pool_fee_ppm=, pue_permille=, wear_uusd_h=)
    values = mode_values(fleet, prices)                 uUSD per hour of every ladder entry, net of energy
    budget = miner_budget_mw(tree, load, margins)       what hosts, fixed loads and margins leave for miners, mW per node
    plan_dispatch(tree, fleet, prices, current, budget_mw=, change_limit=None, dwell_left=None) -> Plan     slow tier
    plan_fast(tree, fleet, prices, current, budget_mw=, wake_mode=None, dwell_left=None) -> Plan            fast tier
    ordered_changes(fleet, values, current, modes) -> positions: lowerings first, then raises, most money per watt first
    lp_bound_uusd_h(tree, fleet, values, budget_mw) -> float      no plan can earn more

**Method.** Take the upper concave hull of every ladder; its steps, by marginal value per watt, are accepted while every
ancestor has slack. For nested caps that greedy solves the divisible problem exactly (a laminar family is a polymatroid), which
is also where `lp_bound_uusd_h` comes from; whole steps lose less than one step per tight node, most of which a filling pass wins
back. Steps are sorted by a 22-bit key in two radix passes: comparing would take longer than all the rest.

**Slow tier** (every 5-15 minutes): the optimum with a cost of changing (`wear_uusd_h`), machines inside their dwell time left
alone (unless a cap cannot be held otherwise), and at most `change_limit` changes a tick, those that gain most: the cost of
changing is raised until they are few enough. **Fast tier** (seconds): machines awake keep their mode or sleep, least money per
watt first and under the node that needs the watts; machines asleep wake into `wake_mode` where there is room. Nobody is slept to
wake a better one.

A plan is a wish about *modes*. Watts are granted by `core/power.py`: lowerings are commanded at once, a raise only when the
ledger, which still counts the old watts of whatever is not confirmed asleep, admits it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from scheduler.core import economics
from scheduler.core.dispatch_kernels import (
    FAST,
    SHED,
    SLOW,
    accept_kernel,
    divisible_kernel,
    fill_kernel,
    sort_kernel,
    steps_kernel,
)
from scheduler.core.power import HOST, MINER, Load, PowerTree

Ints = npt.NDArray[np.int64]
Modes = npt.NDArray[np.int16]
Mask = npt.NDArray[np.bool_]


class DispatchError(ValueError):
    """A ladder or a column that cannot be: watts not ascending, an unknown node, a mode beyond its ladder."""


@dataclass(frozen=True)
class Fleet:
    """Miners as columns: position of the node each hangs off, number of its ladder. Ladder l is `off[l]`..`off[l + 1]` of the table."""

    node: npt.NDArray[np.int32]
    ladder: npt.NDArray[np.int32]
    off: npt.NDArray[np.int32]
    watts: Ints
    ghs: Ints

    @staticmethod
    def of(nodes: npt.ArrayLike, ladder_of: npt.ArrayLike, ladders: Sequence[Sequence[tuple[int, int]]]) -> "Fleet":
        off = np.cumsum([0, *map(len, ladders)], dtype=np.int32)
        table = np.array([entry for ladder in ladders for entry in ladder], np.int64).reshape(-1, 2)
        return Fleet(
            np.asarray(nodes, np.int32),
            np.asarray(ladder_of, np.int32),
            off,
            np.ascontiguousarray(table[:, 0]),
            np.ascontiguousarray(table[:, 1]),
        ).checked()

    def checked(self) -> "Fleet":
        if self.node.shape != self.ladder.shape:
            raise DispatchError(f"{self.node.size} nodes for {self.ladder.size} miners")
        if self.ladder.size and not (self.ladder.min() >= 0 and self.ladder.max() < len(self.off) - 1):
            raise DispatchError("a miner's ladder is not in the table")
        if (np.diff(self.off) < 1).any():
            raise DispatchError("a ladder has no entry, not even asleep")
        rising = np.diff(self.watts) > 0
        rising[self.off[1:-1] - 1] = True  # from one ladder to the next
        if not rising.all() or (self.watts[self.off[:-1]] < 0).any():
            raise DispatchError("a ladder's watts must rise from asleep upward")
        return self

    def at(self, modes: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """Position in the ladder table of each miner's mode. Raises DispatchError on a mode beyond its ladder."""
        if modes.shape != self.node.shape or (modes < 0).any() or (modes >= np.diff(self.off)[self.ladder]).any():
            raise DispatchError("modes do not match the ladders")
        position: Ints = self.off[self.ladder].astype(np.int64) + modes
        return position


@dataclass(frozen=True)
class Prices:
    """Units as in `economics`. `wear_uusd_h`: what a change of a machine's mode costs, spread over the hours it is expected to last."""

    hashprice_uusd: int
    energy_uusd_mwh: int
    pool_fee_ppm: int = 0
    pue_permille: int = 1000
    wear_uusd_h: int = 0


@dataclass(frozen=True)
class Plan:
    """`modes`: one per miner. `value_uusd_h`: net, of the whole fleet. `changes`: how many differ from `current`.

    `over`: keys of nodes that stay over budget even so (with every machine below asleep): watts that miners cannot give.
    """

    modes: Modes
    value_uusd_h: int
    changes: int
    over: tuple[object, ...] = ()


def mode_values(fleet: Fleet, prices: Prices) -> Ints:
    """UUSD per hour of every entry of the ladder table. Raises ZeroFeedError on a hashprice of zero."""
    return economics.mode_values_uusd_h(
        prices.hashprice_uusd,
        fleet.ghs,
        fleet.watts,
        prices.energy_uusd_mwh,
        pool_fee_ppm=prices.pool_fee_ppm,
        pue_permille=prices.pue_permille,
    )


def miner_budget_mw(tree: PowerTree, load: Load, margins: Ints) -> Ints:
    """MW that each node leaves to miners, overhead included: what is planned minus fixed load, margin and hosts."""
    budget: Ints = 1000 * (tree.allowed_w - tree.fixed_w - margins) - load.watts[:, HOST] * tree.k[:, HOST]
    return budget


def _slack_w(tree: PowerTree, fleet: Fleet, budget_mw: Ints, positions: Ints) -> Ints:
    """Whole watts of miners each node can still take when every machine draws its entry `positions` of the ladder table.

    sum(W) * k <= budget, in integers, is sum(W) <= budget // k: the kernels need no overheads.
    """
    used = Load.of(tree, fleet.node, MINER, fleet.watts[positions]).watts[:, MINER]
    slack: Ints = budget_mw // tree.k[:, MINER] - used
    return slack


def _solve(
    tree: PowerTree,
    fleet: Fleet,
    value: Ints,
    current: Modes,
    wake: Modes,
    locked: Mask,
    base_slack: Ints,
    tier: int,
    wear: int,
) -> Modes:
    slack, modes = base_slack.copy(), np.where(locked, current, np.int16(0)).astype(np.int16)
    first, mode, more, per_watt = steps_kernel(
        fleet.off, fleet.ladder, fleet.watts, value, current, wake, locked, tier, wear
    )
    order = sort_kernel(first, per_watt, current, tier)
    accept_kernel(tree.parent, slack, fleet.node, first, mode, more, order, modes)
    if tier == SLOW:
        fill_kernel(
            tree.parent,
            slack,
            fleet.node,
            fleet.ladder,
            fleet.off,
            fleet.watts,
            value,
            current,
            locked,
            wear,
            modes,
        )
    return modes


def _locks(
    tree: PowerTree, fleet: Fleet, current: Modes, dwell_left: npt.ArrayLike | None, budget_mw: Ints
) -> tuple[Mask, Ints, tuple[object, ...]]:
    """Who keeps its mode this time, the slack above that and sleep for the rest, the nodes that stay over. A cap overrides a dwell."""
    locked = np.zeros(fleet.node.shape, np.bool_) if dwell_left is None else np.asarray(dwell_left) > 0
    held, asleep = fleet.at(current), fleet.off[fleet.ladder].astype(np.int64)
    while True:
        slack = _slack_w(tree, fleet, budget_mw, np.where(locked, held, asleep))
        if not (slack < 0).any() or not locked.any():
            break
        freed = np.zeros(len(tree.keys), np.bool_)
        for n in np.flatnonzero(slack < 0):
            freed |= tree.under(int(n))
        if not (locked & freed[fleet.node]).any():
            break
        locked &= ~freed[fleet.node]
    return locked, slack, tuple(tree.keys[n] for n in np.flatnonzero(slack < 0))


def _plan(fleet: Fleet, value: Ints, current: Modes, modes: Modes, over: tuple[object, ...]) -> Plan:
    return Plan(modes, int(value[fleet.at(modes)].sum()), int((modes != current).sum()), over)


def plan_fast(
    tree: PowerTree,
    fleet: Fleet,
    prices: Prices,
    current: npt.ArrayLike,
    *,
    budget_mw: Ints,
    wake_mode: npt.ArrayLike | None = None,
    dwell_left: npt.ArrayLike | None = None,
) -> Plan:
    """Whole machines only: who is awake keeps its mode or sleeps, who sleeps wakes into `wake_mode` (its top mode when not given).

    `dwell_left` (seconds per miner) keeps machines that sleep asleep; nothing keeps one awake when the watts are needed.
    """
    now = np.asarray(current, np.int16)
    top = (np.diff(fleet.off)[fleet.ladder] - 1).astype(np.int16)
    wake = top if wake_mode is None else np.asarray(wake_mode, np.int16)
    value = mode_values(fleet, prices)
    asleep = None if dwell_left is None else np.where(now == 0, np.asarray(dwell_left), 0)
    locked, slack, over = _locks(tree, fleet, now, asleep, budget_mw)
    return _plan(
        fleet, value, now, _solve(tree, fleet, value, now, wake, locked, slack, FAST, prices.wear_uusd_h), over
    )


def plan_dispatch(
    tree: PowerTree,
    fleet: Fleet,
    prices: Prices,
    current: npt.ArrayLike,
    *,
    budget_mw: Ints,
    change_limit: int | None = None,
    dwell_left: npt.ArrayLike | None = None,
) -> Plan:
    """The modes that earn most within every node's budget, seen from `current` (modes now, int[n]).

    `dwell_left`: seconds each machine must still keep its mode. `change_limit`: at most so many changes, but never fewer than holding
    the caps takes. Raises DispatchError for modes beyond their ladder, ZeroFeedError for a hashprice of zero.
    """
    now = np.asarray(current, np.int16)
    value = mode_values(fleet, prices)
    locked, slack, over = _locks(tree, fleet, now, dwell_left, budget_mw)

    def at(wear: int, tier: int = SLOW) -> Plan:
        wake = now if tier == SLOW else np.zeros_like(now)
        return _plan(fleet, value, now, _solve(tree, fleet, value, now, wake, locked, slack, tier, wear), over)

    rich = at(prices.wear_uusd_h)
    if change_limit is None or rich.changes <= change_limit:
        return rich
    best = at(0, SHED)  # what the caps force, by whole machines
    limit = max(change_limit, best.changes)
    # No exchange of modes gains more than twice the span of all values: at such a cost only what the caps force still changes.
    low, high = prices.wear_uusd_h, prices.wear_uusd_h + 2 * int(np.ptp(value)) + 1
    for _ in range(10):
        middle = (low + high) // 2
        tried = at(middle)
        if tried.changes <= limit:
            high = middle
            best = max(best, tried, key=lambda plan: plan.value_uusd_h)
        else:
            low, rich = middle, tried
    # Machines of one model all pass that cost together; of the last plan that changes too many, let only the best part change.
    few = _part(fleet, value, now, rich.modes, best.modes != now, limit)
    narrow, slack, _ = _locks(tree, fleet, now, ~few, budget_mw)
    tried = _plan(
        fleet, value, now, _solve(tree, fleet, value, now, now, narrow, slack, SLOW, prices.wear_uusd_h), over
    )
    return tried if tried.changes <= limit and tried.value_uusd_h > best.value_uusd_h else best


def _part(fleet: Fleet, value: Ints, now: Modes, then: Modes, keep: Mask, limit: int) -> Mask:
    """At most `limit` miners that may change: those in `keep`, then of the changes now -> then the best raises and lowerings in turn."""
    chosen = keep.copy()
    order = ordered_changes(fleet, value, now, then)
    order = order[~keep[order]]
    raised = fleet.watts[fleet.at(then)][order] > fleet.watts[fleet.at(now)][order]
    rank = np.empty(len(order), np.float64)
    for side in (raised, ~raised):
        rank[side] = (np.arange(side.sum()) + 0.5) / max(1, side.sum())
    chosen[order[np.argsort(rank, kind="stable")][: max(0, limit - int(keep.sum()))]] = True
    return chosen


def ordered_changes(fleet: Fleet, values: Ints, current: npt.ArrayLike, modes: npt.ArrayLike) -> Ints:
    """Positions of the miners that change: first who will draw less (least money lost per watt first), then raises (most gained first)."""
    now, then = fleet.at(np.asarray(current, np.int16)), fleet.at(np.asarray(modes, np.int16))
    changed = np.flatnonzero(now != then)
    more, gain = fleet.watts[then] - fleet.watts[now], values[then] - values[now]
    per_watt = gain[changed] * 1000 // np.maximum(np.abs(more[changed]), 1)
    order: Ints = changed[np.lexsort((changed, -per_watt, more[changed] > 0))]
    return order


def lp_bound_uusd_h(tree: PowerTree, fleet: Fleet, values: Ints, budget_mw: Ints) -> float:
    """The optimum when modes may be mixed and watts divided: no plan within the budgets earns more (laminar caps: the greedy is exact)."""
    asleep = np.zeros(fleet.node.shape, np.int16)
    base = fleet.at(asleep)
    nobody = np.zeros(fleet.node.shape, np.bool_)
    first, _, more, per_watt = steps_kernel(
        fleet.off, fleet.ladder, fleet.watts, values, asleep, asleep, nobody, SLOW, 0
    )
    who = np.repeat(np.arange(len(asleep), dtype=np.int32), np.diff(first))
    order = np.argsort(-per_watt, kind="stable")
    slack = _slack_w(tree, fleet, budget_mw, base)
    gain = divisible_kernel(tree.parent, slack, fleet.node, more, per_watt, who, order)
    return float(values[base].sum() + gain)
