"""One site's power loop, every few seconds and on nudge: readings -> confirm, grant -> shed, dispatch -> record.

Apply what readings have proved (under the site's lock), think without it, apply guarded commands. Raising is always the
ledger's decision; this loop only asks. What a turn needs of its site it reads once, under the lock, and thinks and accounts on
that; only commands look again, under the lock that they are given in.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

import numpy as np
from django.db import transaction

from marketplace.locks import Lock, acquire
from marketplace.models import Curtailment, Miner, Placement, PowerGrant, Site
from marketplace.services import (
    curtailment_notices,
    curtailments,
    drains,
    feeds,
    grid,
    leases,
    placements,
    power,
    sheds,
    site_minutes,
)
from marketplace.services.availability import WATTS_S
from marketplace.services.budgets import node_budgets
from scheduler.core import dispatch
from scheduler.core import power as core

SLOW = timedelta(minutes=5)
PATIENCE = timedelta(seconds=WATTS_S)  # for watts that miners were asked for
DWELL_S = 60  # a machine keeps a mode at least so long, unless its watts are needed
CHANGE_LIMIT = 200  # mode changes of the slow tier in one tick
WAKE_PERMILLE = 100  # of a node's cap that may rise in one turn: bounds inrush, and how wrong a turn can be


@dataclass(frozen=True)
class Seen:
    """What a turn has read: the site, its ledger, the calls that stand there, what its watts cost and earn."""

    site: Site
    ledger: power.Ledger
    calls: Sequence[Curtailment]
    rates: feeds.Rates
    now: datetime


@dataclass(frozen=True)
class Thought:
    commands: list[power.Command]
    slow: bool = False
    reason: str = ""


def run(site_id: int, *, now: datetime) -> dict[str, int]:
    """One turn; returns counts of what was done, for logs and tests."""
    done: dict[str, int] = {}
    with transaction.atomic():
        acquire((Lock.SITE, site_id))
        site = Site.objects.get(pk=site_id)
        leases.watch(site, now=now)
        drains.due(site, now=now)
        calls = curtailments.apply(site, now=now)
        ledger = power.Ledger.of(site_id)
        done |= power.settle_miners(ledger, now=now)
        power.settle_held(ledger, now=now)
        done["lowered_w"] = power.lower_hosts(ledger)
        gives = power.may_grant(ledger, now=now)
        if gives:  # before anybody else may have the watts
            power.uncap_gpus(ledger, under=curtailments.limits_of(calls.active))
        # Giving up first: what would be granted later than that would also end later than was promised.
        granted = power.grant_pending(ledger, now=now) if give_up(ledger, now=now) and gives else []
        placements.grant(granted, now=now)
        done["drained"] = len(sheds.relieve(ledger, calls.active, now=now))
        if calls.active:
            curtailment_notices.held(power.tell_held(site_id, now=now), now=now)
        done["granted"] = len(granted)
        if granted or calls.changed or done.get("again"):
            placements.touch_sites([site_id])
    seen = Seen(site, ledger, calls.active, feeds.rates(site, now=now), now)
    thought = think(seen)
    if thought.commands:
        with transaction.atomic():
            acquire((Lock.SITE, site_id))
            done["commanded"] = power.command_miners(site_id, thought.commands, now=now)
            if done["commanded"]:
                placements.touch_sites([site_id])
    if thought.slow:
        Site.objects.filter(pk=site_id).update(dispatched_at=now)
    site_minutes.record(site, ledger, seen.rates, now=now)
    return done


def give_up(ledger: power.Ledger, *, now: datetime) -> bool:
    """Whose watts have not come free for long queues again, and may find them elsewhere: the job, or of a gang that runs only the
    replicas that were to join it. The caller holds the site's lock. Returns whether anybody waits for watts still.
    """
    waiting = list(Placement.objects.filter(site=ledger.site_id, state="shedding").order_by("pk"))
    late = [placement for placement in waiting if placement.created_at <= now - PATIENCE]
    if late:
        drains.take_off(late, now=now, actor="power", reason="not_started: the watts did not come free")
        ledger.forget_hosts()
    return len(waiting) > len(late)


def think(seen: Seen) -> Thought:
    """What to command the miners; decides, writes nothing."""
    site, ledger, now = seen.site, seen.ledger, seen.now
    devices = [m for m in ledger.miners.values() if not m.manual]
    miners = [m for m in devices if m.state == Miner.State.OK and not ledger.waits_for(m)]
    if site.mode in {Site.Mode.SHED, Site.Mode.OFF}:
        doubted = [m for m in devices if m.state == Miner.State.UNRESPONSIVE]
        return Thought([_sleep(m) for m in (*miners, *doubted) if m.desired_mode], reason="mode")
    need = _shortage(ledger, now)
    wakes = power.may_wake(ledger, now=now) and not grid.holds(site.pk, now=now)
    # Whatever is missing, the doubted are tested: theirs may be the very watts that grants wait for.
    tests = power.tests_due(ledger, now=now) if wakes else []
    if need.any():
        able = [m for m in miners if not _dwell_left(m, now)] if _only_for_money(seen) else miners
        return Thought([*_shed(seen, able, need), *tests], reason="shortage")
    if not wakes:
        return Thought([], reason="hold")
    if _only_for_money(seen):  # a limit overrides a dwell, but not one that binds hashing for money alone
        miners = [m for m in miners if m.desired_mode == 0 or not _dwell_left(m, now)]
    thought = _dispatch(seen, miners)
    return replace(thought, commands=[*thought.commands, *tests])


def _only_for_money(seen: Seen) -> bool:
    """Nothing but an economic call asks for watts: machines that have just changed keep their mode."""
    if not seen.calls or any(call.mandatory for call in seen.calls):
        return False
    waits = PowerGrant.objects.filter(site=seen.site, state=PowerGrant.State.SHEDDING).exists()
    return not waits and not seen.ledger.reactions(seen.now)


def _sleep(miner: Miner) -> power.Command:
    return power.Command(miner.pk, 0, miner.desired_generation)


def _shortage(ledger: power.Ledger, now: datetime) -> core.Ints:
    """MW missing at each node: pending grants and meters over their soft cap, less what sleeping machines will soon give."""
    budgets = node_budgets([ledger.site_id])
    need = np.array([max(0, -budgets[k].free_mw) for k in ledger.tree.keys], np.int64)  # type: ignore[index]
    for n, room in _hashing_room(ledger).items():  # an economic call asks for what machines can give, no more
        need[n] = max(int(need[n]), min(-room, budgets[ledger.tree.keys[n]].reclaimable_mw))  # type: ignore[index]
    for reaction in ledger.reactions(now):
        if reaction.action != "freeze":
            at = ledger.tree.index[reaction.node]
            need[at] = max(int(need[at]), reaction.shed_mw)
    # What has not obeyed the first time is not counted on: somebody else is asked while it gets its second chance.
    for miner in filter(ledger.waits_for, ledger.miners.values()):
        claim = ledger.claims[miner.pk]
        if claim.attempts > 1:
            continue
        freed = max(0, miner.reserved_w - claim.target_w)
        for n in ledger.tree.paths[ledger.tree.index[miner.power_node_id]]:
            need[n] = max(0, int(need[n]) - freed * int(ledger.tree.k[n, core.MINER]))
    return need


def _hashing_room(ledger: power.Ledger) -> dict[int, int]:
    """MW to the limits that bind hashing alone, by position; negative: over it."""
    return {
        ledger.tree.index[pk]: 1000 * (n.hashing_limit_w - n.fixed_w - n.margin_w) - n.reserved_mw
        for pk, n in ledger.nodes.items()
        if n.hashing_limit_w is not None
    }


def _shed(seen: Seen, miners: Sequence[Miner], need: core.Ints) -> list[power.Command]:
    """Least money per watt first, under the nodes that need the watts, a few more than needed."""
    awake = [m for m in miners if m.desired_mode > 0]
    tree = seen.ledger.tree
    table = core.Miners.of(
        (
            tree.index[m.power_node_id],
            max(0, m.reserved_w - m.mode_watts[0]),
            feeds.worth_uusd_h(seen.rates.hashing, m.mode_ghs[m.desired_mode], m.mode_watts[m.desired_mode]),
        )
        for m in awake
    )
    shed = core.choose_shed(tree, table, need)
    return [_sleep(awake[i]) for i in shed.picks]


def _dispatch(seen: Seen, miners: Sequence[Miner]) -> Thought:
    """Leftover watts to the machines that earn most with them; below break-even they sleep. Without fresh prices nothing changes."""
    ledger, prices, now = seen.ledger, seen.rates.hashing, seen.now
    if prices is None or not miners:
        return Thought([], reason="no_prices")
    ladders = sorted({tuple(zip(m.mode_watts, m.mode_ghs, strict=True)) for m in miners})
    number = {ladder: i for i, ladder in enumerate(ladders)}
    fleet = dispatch.Fleet.of(
        [ledger.tree.index[m.power_node_id] for m in miners],
        [number[tuple(zip(m.mode_watts, m.mode_ghs, strict=True))] for m in miners],
        ladders,
    )
    current = np.array([m.desired_mode for m in miners], np.int16)
    load = core.Load.of(ledger.tree, fleet.node, [core.MINER] * len(miners), [m.reserved_w for m in miners])
    held = core.reserved_mw(ledger.tree, load)
    budget = ledger.free + held
    for n, room in _hashing_room(ledger).items():
        budget[n] = min(int(budget[n]), max(0, room + int(held[n])))
    hot = list(ledger.hot(now))
    budget[hot] = np.minimum(budget[hot], held[hot])  # over 95 % by its meter: nothing rises under it
    dwell = np.array([_dwell_left(m, now) for m in miners], np.int64)
    last = seen.site.dispatched_at
    slow = last is None or now - last >= SLOW
    if slow:
        made = dispatch.plan_dispatch(
            ledger.tree, fleet, prices, current, budget_mw=budget, change_limit=CHANGE_LIMIT, dwell_left=dwell
        )
    else:
        made = dispatch.plan_fast(ledger.tree, fleet, prices, current, budget_mw=budget, dwell_left=dwell)
    values = dispatch.mode_values(fleet, prices)
    changes = dispatch.ordered_changes(fleet, values, current, made.modes)
    return Thought(_staged(ledger, miners, fleet, made.modes, changes), slow=slow)


def _staged(
    ledger: power.Ledger, miners: Sequence[Miner], fleet: dispatch.Fleet, modes: dispatch.Modes, changes: core.Ints
) -> list[power.Command]:
    """All lowerings now; raises in groups of at most WAKE_PERMILLE of a node's cap, the first group this turn."""
    targets = {int(i): int(modes[i]) for i in changes}
    rise = {i: miners[i].mode_watts[m] - miners[i].reserved_w for i, m in targets.items()}
    ups = [i for i in targets if rise[i] > 0]
    table = core.Miners.of((int(fleet.node[i]), rise[i], 0) for i in ups)
    # At a small node one machine may be more than the step: it still goes, one a turn, and does not hold up other nodes.
    largest = max((rise[i] for i in ups), default=0) * int(ledger.tree.k.max()) // 1000 + 1
    step = np.maximum(ledger.tree.cap_w * WAKE_PERMILLE // 1000, largest)
    groups = core.staggered_wake_groups(ledger.tree, table, range(len(ups)), step_w=step)
    now_up = {ups[i] for i in groups[0]} if groups else set()
    return [
        power.Command(miners[i].pk, mode, miners[i].desired_generation)
        for i, mode in targets.items()
        if rise[i] <= 0 or i in now_up
    ]


def _dwell_left(miner: Miner, now: datetime) -> int:
    if miner.changed_at is None:
        return 0
    return max(0, DWELL_S - int((now - miner.changed_at).total_seconds()))
