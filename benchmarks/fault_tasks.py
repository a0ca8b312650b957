"""What workers, customers, operators and agents do to a cell: each task is drawn by the run's seed, and is a call of the real services."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from benchmarks import fault_specs
from benchmarks.fault_cell import World
from benchmarks.fault_site import Yard
from benchmarks.faults import Call, Ended
from marketplace import outbox
from marketplace.models import Agent, Cell, Contract, Host, Job, Maintenance, PowerNode, Site
from marketplace.services import agents, contracts, curtailments, drains, jobs, leases, maintenance, quotes, sites, spot
from marketplace.services.contracts import END_JOBS
from marketplace.services.jobs import CYCLE
from marketplace.tenancy import SYSTEM
from scheduler import commit, cycle, defrag, site_loop, snapshot, tasks
from scheduler.core.plan import plan
from tests import factories

LOOP = "scheduler.site_loop"


@dataclass(frozen=True)
class Task:
    """`call` is the work; `then` is what its answer does outside the database. `statements`: about how many it makes."""

    kind: str
    call: Call
    statements: int = 30
    then: Callable[[Any], None] | None = None


def draw(world: World, dice: random.Random) -> Task:
    makers = [maker for maker, weight in WEIGHTS for _ in range(weight)]
    while (task := dice.choice(makers)(world, dice)) is None:
        pass
    return task


# --- workers
def work(_world: World, _dice: random.Random) -> Task:
    return Task("cycle", lambda: outbox.drain(limit=2, topic=CYCLE), 70)


def bare_cycle(world: World, _dice: random.Random) -> Task:
    """A task that Celery delivered twice: no message stands behind it."""
    return Task("bare cycle", lambda: cycle.run(world.cell.pk, now=world.now), 60)


def other_work(_world: World, dice: random.Random) -> Task:
    topic = dice.choice((END_JOBS, LOOP))
    return Task(topic, lambda: outbox.drain(limit=2, topic=topic), 40)


def loop(world: World, dice: random.Random) -> Task:
    pk = dice.choice(world.yards).pk
    return Task("site loop", lambda: site_loop.run(pk, now=world.now), 45)


def clock(world: World, dice: random.Random) -> Task:
    if dice.random() < 0.3:
        return Task("sweep", tasks.tick_cells, 6)
    if dice.random() < 0.1:
        return Task("pulse", lambda: leases.pulse(now=world.now), 4)
    return Task("market clock", lambda: contracts.clock(world.now), 20)


class Held:
    """A snapshot with its plan, taken as a cycle takes it, and committed whenever its worker goes on."""

    def __init__(self, world: World) -> None:
        cell = Cell.objects.get(pk=world.cell.pk)
        Cell.objects.filter(pk=cell.pk).update(generation=cell.generation + 1)
        self.taken = snapshot.take(Cell.objects.get(pk=cell.pk), now=world.now)
        t = self.taken
        self.plan = plan(t.fleet, t.requests, t.running, policy=t.policy, seed=1, now_s=int(world.now.timestamp()))


def auction(world: World, _dice: random.Random) -> Task:
    return Task("auction", lambda: spot.run(world.cell.pk, now=world.now), 35)


def make_room(world: World, _dice: random.Random) -> Task:
    def call() -> None:
        with suppress(outbox.Busy):  # a cycle runs
            defrag.run(world.cell.pk, now=world.now)

    return Task("defrag", call, 40)


def hold(world: World, _dice: random.Random) -> Task:
    """Think; the commit comes later, once or twice."""

    def keep(held: Any) -> None:
        world.held = [*world.held[-2:], held]

    return Task("hold a plan", lambda: Held(world), 20, keep)


def late_commit(world: World, dice: random.Random) -> Task | None:
    if not world.held:
        return None
    held = dice.choice(world.held)
    return Task("late commit", lambda: commit.commit(held.taken, held.plan, now=world.now), 25)


# --- customers
def submit(world: World, dice: random.Random) -> Task | None:
    contract = _one(Contract.objects.filter(state="active").select_related("organization", "listing"), dice)
    if contract is None:
        return None
    spec = fault_specs.draw(contract, dice)
    actor = factories.actor(contract.organization)
    return Task("submit", lambda: jobs.submit(actor, contract, spec, now=world.now), 8)


def cancel(world: World, dice: random.Random) -> Task | None:
    job = _one(Job.objects.exclude(state__in=("succeeded", "failed", "cancelled")), dice)
    if job is None:
        return None
    actor = factories.actor(job.organization)
    return Task("cancel", lambda: jobs.cancel(actor, job, now=world.now), 25)


def book(world: World, dice: random.Random) -> Task:
    """A reserved contract, at once or later: a quote that holds, and its acceptance."""
    listing, customer = dice.choice(world.listings), dice.choice(world.customers)
    starts = None if dice.random() < 0.4 else world.now.replace(second=0) + timedelta(
        minutes=dice.choice((1, 10, 120, 60 * 30)))  # fmt: skip
    ends = (starts or world.now.replace(second=0)) + timedelta(minutes=dice.choice((61, 120)))
    actor = factories.actor(customer)
    least = min(listing.hosts.values_list("gpu_count", flat=True))
    wanted = quotes.Request("reserved", dice.choice((1, 2, least)), starts_at=starts, ends_at=ends)

    def buy() -> None:
        made = quotes.quote(actor, listing.pk, wanted, now=world.now)
        contracts.accept(actor, made.pk, now=world.now)

    return Task("book", buy, 45)


def bid(world: World, dice: random.Random) -> Task | None:
    """A spot customer changes his limit: around what the auction asks."""
    row = _one(Contract.objects.filter(state="active", kind="spot").select_related("organization"), dice)
    if row is None:
        return None
    actor, limit = factories.actor(row.organization), dice.choice((850_000, 905_000, 1_500_000))
    return Task("bid", lambda: spot.set_limit(actor, row, limit, now=world.now), 12)


def terminate(world: World, dice: random.Random) -> Task | None:
    row = _one(Contract.objects.filter(state="active"), dice)
    if row is None or Contract.objects.filter(state="active").count() < 3:
        return None
    return Task("terminate", lambda: contracts.terminate(SYSTEM, row, now=world.now), 25)


# --- operators
def drain(world: World, dice: random.Random) -> Task | None:
    host = _one(Host.objects.filter(state="active"), dice)
    if host is None:
        return None
    evict = dice.random() < 0.6
    return Task("drain", lambda: sites.drain_host(host, reason="test", actor=SYSTEM, now=world.now, evict=evict), 30)


def undrain(world: World, dice: random.Random) -> Task | None:
    host = _one(Host.objects.filter(state__in=("draining", "maintenance"), back_at=None), dice)
    return host and Task("undrain", lambda: sites.undrain_host(host, actor=SYSTEM, now=world.now), 12)


def taint(world: World, dice: random.Random) -> Task | None:
    host = _one(Host.objects.exclude(state="retired"), dice)
    if host is None:
        return None
    to = dice.choice(([], [], [fault_specs.TAINT]))
    return Task("taint", lambda: drains.set_taints(host, to, actor=SYSTEM, now=world.now), 6)


def maintain(world: World, dice: random.Random) -> Task | None:
    """Work on a host that cannot wait: announced, and done by the clock; or called off, or over early."""
    live = _one(Maintenance.objects.filter(state__in=("announced", "in_progress")), dice)
    if live is not None and dice.random() < 0.5:
        ends = maintenance.finish if live.state == "in_progress" else maintenance.cancel
        return Task("maintenance over", lambda: ends(SYSTEM, live, now=world.now), 25)
    host = _one(Host.objects.filter(state="active").select_related("site"), dice)
    if host is None:
        return None
    starts = world.now.replace(second=0, microsecond=0) + timedelta(minutes=dice.choice((1, 3, 10)))
    ends_at = starts + timedelta(minutes=dice.choice((10, 30)))

    def call() -> None:
        row = maintenance.draft(
            SYSTEM, host.site, scope="hosts", hosts=[host], starts_at=starts, ends_at=ends_at, text="a fan", now=world.now,
            emergency=True, emergency_reason="it is loud",
        )  # fmt: skip
        maintenance.announce(SYSTEM, row, now=world.now)

    return Task("maintenance", call, 30)


def maintenance_clock(world: World, _dice: random.Random) -> Task:
    return Task("maintenance clock", lambda: maintenance.clock(world.now), 15)


def curtail(world: World, dice: random.Random) -> Task:
    node = _one(PowerNode.objects.filter(kind="site"), dice)
    assert node is not None
    cap, reference = node.cap_w * dice.choice((30, 60, 80)) // 100, str(dice.random())
    ends = world.now + timedelta(seconds=dice.choice((60, 600)))

    def call() -> None:
        curtailments.announce(
            SYSTEM, node, cap_w=cap, starts_at=world.now, ends_at=ends, reference=reference, now=world.now
        )

    return Task("curtail", call, 6)


def mode(world: World, dice: random.Random) -> Task:
    site, to = Site.objects.get(pk=dice.choice(world.yards).pk), dice.choice(("auto", "auto", "hold", "shed"))
    return Task("mode", lambda: sites.set_site_mode(site, to, actor=SYSTEM, now=world.now), 8)


# --- sites
def sync(world: World, dice: random.Random) -> Task | None:
    """An agent's call: up what it sees, down what shall be. The answer may be lost, or taken after the next one."""
    yard = dice.choice(world.yards)
    if yard.silent:
        return None
    report = yard.report(world.now)

    def answer(_: Any) -> None:
        agent = Agent.objects.get(pk=yard.agent_pk)
        told = agents.desired(agent, report, now=world.now)
        if dice.random() < 0.85:
            yard.take(told, world.now)
        else:
            world.late.append((yard, told))

    return Task("sync", _observed(yard, report, world), 20, answer)


def _observed(yard: Yard, report: dict[str, Any], world: World) -> Call:
    now = world.now
    return lambda: agents.observe(Agent.objects.select_related("site").get(pk=yard.agent_pk), report, now=now)


def old_report(world: World, dice: random.Random) -> Task | None:
    """A report that was told before, or overtaken on its way; its clock is within the skew that is let pass."""
    yard = dice.choice(world.yards)
    fresh = [r for r in yard.said if (world.now - r["agent_time"]).total_seconds() < 30]
    return Task("old report", _observed(yard, dice.choice(fresh), world), 20) if fresh else None


def late_answer(world: World, _dice: random.Random) -> Task | None:
    if not world.late:
        return None
    yard, told = world.late.pop(0)
    return Task("late answer", lambda: None, 0, lambda _: yard.take(told, world.now))


def trouble(world: World, dice: random.Random) -> Task:
    """A host dies or comes back; a site falls silent or speaks again."""
    yard = dice.choice(world.yards)

    def happen(_: Any) -> None:
        if dice.random() < 0.5:
            yard.silent = not yard.silent
        else:
            machine = dice.choice(list(yard.machines.values()))
            machine.dead = not machine.dead
        yard.pass_time(world.now)

    return Task("trouble", lambda: None, 0, happen)


# What is most in the way of a commit that goes on at the same time.
RIVALS: dict[str, tuple[Callable[[World, random.Random], Task | None], ...]] = {
    "cycle": (book, bare_cycle, late_commit, cancel), "bare cycle": (book, late_commit, cancel),
    "late commit": (book, bare_cycle, cancel), "defrag": (work, late_commit, cancel, auction), "book": (bare_cycle, late_commit),
}  # fmt: skip


def rival(world: World, dice: random.Random, task: Task) -> Task:
    """Who goes between its statements: of a commit, half the time one who wants the same cell's lock."""
    makers = RIVALS.get(task.kind, ())
    made = dice.choice(makers)(world, dice) if makers and dice.random() < 0.5 else None
    return made or draw(world, dice)


def _one(rows: Any, dice: random.Random) -> Any:
    found = list(rows.order_by("pk"))
    return dice.choice(found) if found else None


def harmless(ended: Ended, *, cut: bool) -> bool:
    """Whether a call may end so: a named refusal, a fence, or a connection that we cut."""
    if not ended.error:
        return True
    allowed = ("MarketError", "FencedError", *(("OperationalError", "InterfaceError", "AdminShutdown") if cut else ()))
    return ended.error.startswith(allowed)


WEIGHTS: tuple[tuple[Callable[[World, random.Random], Task | None], int], ...] = (
    (work, 6), (bare_cycle, 2), (other_work, 2), (loop, 5), (clock, 2), (hold, 3), (late_commit, 4), (submit, 8), (cancel, 2),
    (book, 2), (terminate, 1), (drain, 1), (undrain, 1), (curtail, 1), (mode, 1), (sync, 7), (old_report, 1), (late_answer, 1),
    (trouble, 2), (auction, 2), (bid, 1), (make_room, 2), (taint, 1), (maintain, 1), (maintenance_clock, 2),
)  # fmt: skip
