"""How a run of the fault harness may begin: what stands and waits is so arranged that one guard alone keeps two rivals apart.

Faults that strike anywhere seldom meet the one moment in which a guard is all there is. Each opening makes such a moment on
purpose, with the services themselves, and yields after each call (what it was, how it ended) for an audit.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from django.db import transaction

from benchmarks.fault_cell import World
from benchmarks.fault_site import Yard
from benchmarks.fault_tasks import Held
from benchmarks.faults import At, Call, Ended, Surgeon, plain
from marketplace.models import Agent, Contract, Job, Placement, PowerNode
from marketplace.services import agents, contracts, jobs, placements, quotes
from marketplace.services.budgets import node_budgets
from scheduler import commit, cycle, site_loop
from tests import factories

Said = Iterator[tuple[str, Ended]]
STATEMENTS = 24  # of a commit, about


def two_planners(world: World, dice: random.Random, surgeon: Surgeon) -> Said:
    """Each plans a job up to one contract's ceiling, onto GPUs of its own: only the fence stands between their commits.

    The GPUs are others because the first plans while somebody stands where the second will, who has left by then. They commit
    one after the other in either order, or the second thinks and commits between two statements of the first's commit.
    """
    pairs = [
        (c, o) for c in _by_the_hour() for o in _by_the_hour()
        if o != c and o.listing_id == c.listing_id and o.gpu_count >= 2 * c.gpu_count
    ]  # fmt: skip
    if not pairs:
        return
    contract, other = dice.choice(pairs)
    order = dice.choice(("first", "second", "within", "within"))
    spec = {"gpus": 1, "replicas": contract.gpu_count, "ram_mib": 512}

    def second() -> Held:
        _submit(world, contract, priority=101, **spec)
        return Held(world)

    def at_once() -> None:
        _commit(world, second())()

    def arranged() -> Held:
        standing = _submit(world, other, priority=0, **spec)
        cycle.run(world.cell.pk, now=world.now)
        _submit(world, contract, priority=100, **spec)
        held = Held(world)
        gone = list(Placement.objects.filter(job=standing).values_list("pk", "site_id"))
        with transaction.atomic():
            placements.lock_sites({site for _, site in gone})
            placements.finish([pk for pk, _ in gone], to="failed", now=world.now, actor="site", reason="exit code 1")
        return held

    made = plain(arranged)
    yield "plan", made
    if (first := made.answer) is None:
        return
    if order == "within":
        at = At(dice.randrange(1, STATEMENTS), dice.random() < 0.5)
        ends = surgeon.beside(_commit(world, first), at_once, at)
        yield "commit", ends[0]
        yield "a planner within", ends[1]
        return
    late = plain(second)
    yield "plan", late
    for held in (first, late.answer) if order == "first" else (late.answer, first):
        if held is not None:
            yield "commit", plain(_commit(world, held))


def booked_meanwhile(world: World, dice: random.Random, surgeon: Surgeon) -> Said:
    """Somebody books all GPUs of a listing between two statements of a commit onto them: only the cell's lock is between them."""
    contract = dice.choice(list(_by_the_hour()))
    hosts = list(contract.listing.hosts.order_by("pk"))
    _submit(world, contract, gpus=1, replicas=dice.randrange(1, contract.gpu_count + 1), ram_mib=512)
    planned = plain(lambda: Held(world))
    yield "plan", planned
    if planned.answer is None:
        return
    buyer = factories.actor(dice.choice(world.customers))
    wanted = quotes.Request("reserved", sum(h.gpu_count for h in hosts), ends_at=world.now + timedelta(minutes=61))

    def buy() -> None:
        contracts.accept(buyer, quotes.quote(buyer, contract.listing_id, wanted, now=world.now).pk, now=world.now)

    at = At(dice.randrange(2, 9), dice.random() < 0.5)  # from its lock to that of the hosts
    ends = surgeon.beside(_commit(world, planned.answer), buy, at)
    yield "commit", ends[0]
    yield "book", ends[1]


def who_gives_way(world: World, dice: random.Random, surgeon: Surgeon) -> Said:
    """Spot work stands wherever a job could go: its plan puts it there, and only the fit rule run again at the commit says that
    the GPUs are not free yet. The commit is made in peace, or a site loop goes between its statements.
    """
    contract = dice.choice(list(_by_the_hour()))
    spot = Contract.objects.filter(state="active", kind="spot", listing=contract.listing_id).order_by("pk").first()
    if spot is None:
        return
    _submit(world, spot, gpus=1, replicas=spot.gpu_count, ram_mib=512)
    yield "cycle", plain(lambda: cycle.run(world.cell.pk, now=world.now))
    _submit(world, contract, gpus=1, replicas=dice.randrange(1, contract.gpu_count + 1), ram_mib=512)
    planned = plain(lambda: Held(world))
    yield "plan", planned
    if planned.answer is None:
        return
    commits = _commit(world, planned.answer)
    if dice.random() < 0.5:
        yield "commit", plain(commits)
        return
    site = contract.listing.site_id
    at = At(dice.randrange(1, STATEMENTS), dice.random() < 0.5)
    ends = surgeon.beside(commits, lambda: site_loop.run(site, now=world.now), at)
    yield "commit", ends[0]
    yield "site loop", ends[1]


def watts_for_some(world: World, dice: random.Random, surgeon: Surgeon) -> Said:
    """A job for each host of a site, all of them waiting for watts that miners hold; then there are watts for some, and not for all."""
    yards = [y for y in world.yards if len(y.machines) > 1 and len(y.asics) > 2]
    if not yards:
        return
    yard = dice.choice(yards)
    listing = world.listings[world.yards.index(yard)]
    contract = _by_the_hour().filter(listing=listing).order_by("-gpu_count")[0]
    before = {n.pk: n for n in PowerNode.objects.filter(site_id=yard.pk)}
    _carries(yard, dict.fromkeys(before, 0))
    for host in listing.hosts.order_by("pk"):
        _submit(world, contract, gpus=host.gpu_count)
    yield "cycle", plain(lambda: cycle.run(world.cell.pk, now=world.now))
    share = dice.randrange(50, 96)  # of what is lacking at each node
    _carries(yard, {pk: mw * share // 100_000 for pk, mw in _lacking(yard).items()})

    def turn() -> None:
        site_loop.run(yard.pk, now=world.now)

    for _ in range(3):
        if dice.random() < 0.5:
            yield "site loop", plain(turn)
        else:
            at = At(dice.randrange(1, 60), dice.random() < 0.5)
            for ended in surgeon.beside(turn, turn, at):
                yield "two site loops", ended
        world.pass_time(timedelta(seconds=6))
        yield "sync", plain(lambda: _synced(world, yard))
    for node in PowerNode.objects.filter(site_id=yard.pk):
        _cap(yard, node, max(node.cap_w, before[node.pk].cap_w))


def _lacking(yard: Yard) -> dict[int, int]:
    """MW at each node that its hosts are short of."""
    free = node_budgets([yard.pk])
    return {n.pk: n.allowed_mw - n.reserved_mw - free[n.pk].free_mw for n in PowerNode.objects.filter(site_id=yard.pk)}


def _carries(yard: Yard, free_w: dict[int, int]) -> None:
    """Each node carries what is booked there, and so much more."""
    for node in PowerNode.objects.filter(site_id=yard.pk):
        _cap(yard, node, (-(-node.reserved_mw // 1000) + node.fixed_w + free_w[node.pk]) * 100 // 98 + 1)


def _cap(yard: Yard, node: PowerNode, watts: int) -> None:
    """With the margin that goes with it: 2 % where the node is metered."""
    PowerNode.objects.filter(pk=node.pk).update(cap_w=watts, margin_w=-(-watts * 20 // 1000))
    yard.nodes[node.name].cap_w = watts


OPENINGS = (two_planners, booked_meanwhile, who_gives_way, watts_for_some)


def _by_the_hour() -> Any:
    return (
        Contract.objects.filter(state="active", kind="on_demand")
        .select_related("organization", "listing")
        .order_by("pk")
    )


def _submit(world: World, contract: Contract, **spec: Any) -> Job:
    spec = {"command": ["true"], "vcpu_milli": 500, "ram_mib": 1024, **spec}
    return jobs.submit(factories.actor(contract.organization), contract, spec, now=world.now)


def _commit(world: World, held: Held) -> Call:
    return lambda: commit.commit(held.taken, held.plan, now=world.now)


def _synced(world: World, yard: Yard) -> None:
    agent = Agent.objects.select_related("site").get(pk=yard.agent_pk)
    report = yard.report(world.now)
    agents.observe(agent, report, now=world.now)
    yard.take(agents.desired(agent, report, now=world.now), world.now)
