"""One seeded run of the fault harness: a small cell, disturbed for some steps, then left in peace until all that can be done is done."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from typing import Any

from django.apps import apps
from django.db import connection, transaction
from django.db.models import Q

from benchmarks import fault_tasks as tasks
from benchmarks.auditor import DONE, Auditor, kept_for_nobody, rows
from benchmarks.fault_cell import Clock, World, build
from benchmarks.fault_openings import OPENINGS
from benchmarks.faults import At, Ended, Surgeon, plain
from marketplace import outbox
from marketplace import tasks as market_tasks
from marketplace.models import Agent, Contract, Curtailment, Host, Job, Maintenance, Placement, Reservation, Site
from marketplace.services import agents, contracts, drains, jobs, maintenance, sites, spot
from marketplace.tenancy import SYSTEM
from sandbox.market.environment import MIGRATED
from scheduler import defrag, site_loop, snapshot
from scheduler.tasks import tick_cells, tick_defrag
from tests import factories

STEPS = 14
ROUNDS = 200  # machines that were not believed come back one at a time, each after a minute or more: only then are their watts free
assert market_tasks  # its handlers are registered by its import
NEARLY = timedelta(minutes=3)
PATIENCE = 8  # turns in which nobody stood and somebody waited
TOPICS = (tasks.CYCLE, tasks.END_JOBS, tasks.LOOP, defrag.TOPIC)


@dataclass
class Outcome:
    """What one run came to. `violations`: (step, words)."""

    seed: int
    violations: list[tuple[int, str]] = field(default_factory=list)
    story: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


@cache
def _tables() -> dict[str, str]:
    """Table -> the sequence of its numbers ('' without one); a table stands before those that it refers to. What `migrate` itself
    made, content types and permissions, is none of them.
    """
    found: dict[str, None] = {}

    def visit(model: Any) -> None:
        if model._meta.db_table in found:
            return
        found[model._meta.db_table] = None
        for f in model._meta.concrete_fields:
            if f.is_relation:
                visit(f.related_model)
        found[model._meta.db_table] = found.pop(model._meta.db_table)  # behind what it refers to

    for label in ("marketplace", "scheduler", "billing"):
        for model in apps.get_app_config(label).get_models(include_auto_created=True):
            visit(model)
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT t, coalesce((SELECT pg_get_serial_sequence(t, 'id') FROM pg_attribute WHERE attrelid = t::regclass"
            " AND attname = 'id'), '') FROM unnest(%s::text[]) t",
            [list(found)],
        )
        numbers = dict(cursor.fetchall())
    return {table: numbers[table] for table in reversed(found) if table not in MIGRATED}


def clean() -> None:
    """Empty every table that has rows, and start its numbers anew: a run is the same whatever ran before it."""
    tables = _tables()
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute(" UNION ALL ".join(f"(SELECT '{name}' FROM {name} LIMIT 1)" for name in tables))
        used = {name for (name,) in cursor.fetchall()}
        # What is written once and for ever has a trigger that refuses to delete; it goes first, with whatever refers to it.
        cursor.execute("SELECT tgrelid::regclass::text FROM pg_trigger WHERE tgname LIKE '%append_only'")
        kept = used & {name for (name,) in cursor.fetchall()}
        if kept:
            cursor.execute(f"TRUNCATE {', '.join(sorted(kept))} CASCADE")
        for name in tables:
            if name in used - kept:
                cursor.execute(f"DELETE FROM {name}")
        again = ", ".join(f"setval('{number}', 1, false)" for number in tables.values() if number)
        cursor.execute(f"SELECT {again}")
    snapshot.forget()  # what is kept of another run's cell 1 is not this one's


def once(seed: int, surgeon: Surgeon, *, steps: int = STEPS, rest: bool = True) -> Outcome:
    """The run of `seed`, or without `rest` its disturbed part alone. The database is the run's alone."""
    clean()
    outcome = Outcome(seed)
    with Clock() as clock:
        run = _Run(build(seed, clock), surgeon, outcome)
        run.disturb(steps)
        if rest and not outcome.violations:
            run.rest(steps + 1)
        outcome.counts["jobs"] = Job.objects.count()
        outcome.counts["placements"] = sum(r["n"] for r in rows("SELECT count(*) AS n FROM marketplace_placement"))
    return outcome


class _Run:
    def __init__(self, world: World, surgeon: Surgeon, outcome: Outcome) -> None:
        self.world, self.surgeon, self.outcome = world, surgeon, outcome
        self.auditor = Auditor()
        self.auditor.audit(world.now)

    # --- disturbed
    def disturb(self, steps: int) -> None:
        dice = random.Random(self.world.seed * 7919)
        if dice.random() < 0.6 and self.opens(dice):
            return
        for _ in range(dice.choice((2, 4, 6))):
            task = tasks.submit(self.world, dice)
            assert task is not None
            plain(task.call)
        for step in range(1, steps + 1):
            self.world.pass_time(
                timedelta(seconds=dice.choice((0, 1, 1, 3, 5, 5, 20, 60, 200, dice.choice((200, 1000)))))
            )
            self.act(step, dice)
            if self.look(step):
                return

    def opens(self, dice: random.Random) -> bool:
        """One of the openings; whether something was found."""
        opening = dice.choice(OPENINGS)
        for kind, ended in opening(self.world, dice, self.surgeon):
            self.outcome.story.append(f"0 {self.world.now:%T} {opening.__name__}: {kind} {ended.error[:80]}")
            if not tasks.harmless(ended, cut=False):
                self.outcome.violations.append((0, f"{kind} ended with {ended.error}\n{ended.trace}"))
            if self.look(0):
                return True
            self.outcome.counts[opening.__name__] += ended.struck or kind in {"commit", "site loop"}
        return False

    def act(self, step: int, dice: random.Random) -> None:
        task = tasks.draw(self.world, dice)
        how = (
            dice.choices(("plain", "killed", "cut", "beside", "twice"), (9, 6, 2, 7, 1))[0]
            if task.statements
            else "plain"
        )
        at = At(dice.randrange(1, task.statements + 2), dice.random() < 0.5)
        call, surgeon = task.call, self.surgeon
        ends: list[Ended]
        if how == "killed":
            ends = [surgeon.killed(call, at)]
        elif how == "cut":
            ends = [surgeon.cut(call, at)]
        elif how == "beside":
            other = tasks.rival(self.world, dice, task)
            self.outcome.counts["beside"] += 1
            ends = list(surgeon.beside(call, other.call, at))
            self.finish(step, other, ends[1], how)
        elif how == "twice":
            ends = list(surgeon.together((call, call)))
        else:
            ends = [plain(call)]
        if how in {"killed", "cut"} and ends[0].struck:
            self.outcome.counts[how] += 1
        self.outcome.counts[how] += how == "twice"
        self.outcome.story.append(f"{step} {self.world.now:%T} {task.kind} {how} {at.statement}{'+' if at.after else '-'}"
                                  f"{' ' + other.kind if how == 'beside' else ''} {[e.error[:80] for e in ends if e.error]}")  # fmt: skip
        self.finish(step, task, ends[0], how)
        if how == "twice":
            self.finish(step, task, ends[1], how, again=True)

    def finish(self, step: int, task: tasks.Task, ended: Ended, how: str, *, again: bool = False) -> None:
        if not tasks.harmless(ended, cut=how == "cut"):
            self.outcome.violations.append((step, f"{task.kind} ({how}) ended with {ended.error}\n{ended.trace}"))
        if task.then is not None and not ended.error and how != "killed" and not again:
            task.then(ended.answer)

    def look(self, step: int) -> bool:
        """Audit; whether something was found."""
        self.outcome.counts["audits"] += 1
        found = self.auditor.audit(self.world.now)
        found += [words for yard in self.world.yards for words in yard.over_cap(self.world.now)]
        self.outcome.violations += [(step, words) for words in found]
        return bool(self.outcome.violations)

    # --- in peace
    def rest(self, step: int) -> None:
        """Faults stop; the outbox, the beat and the agents go on. All that can be done is done, promises included."""
        self.heal()
        probes: set[int] = set()
        idle = 0
        for turn in range(ROUNDS):
            self.turn(turn)
            if self.look(step + turn):
                return
            more = self.promised(probes)
            waiting = Job.objects.exclude(state__in=DONE)
            if not more and not waiting.exists():
                break
            busy = waiting.exclude(state__in=("queued", "requeued")).exists() or waiting.filter(name="claim").exists()
            if not busy and turn > 3:
                idle += 1
                if idle > PATIENCE:
                    self.withdraw()
                self.leap()
        left = [f"job {j.pk} is {j.state} for ever: {j.state_reason}" for j in Job.objects.exclude(state__in=DONE)]
        self.turn(0)  # what the last ones leave is read back
        self.turn(0)
        left += kept_for_nobody()
        self.outcome.violations += [(step + ROUNDS, words) for words in left]
        self.kept(probes, step + ROUNDS)

    def withdraw(self) -> None:
        """Who asked for a place that an empty cell does not have (a link, a domain, a price) gives it up."""
        waiting = Job.objects.filter(state__in=("queued", "requeued"), cancel_requested_at=None)
        for job in (
            waiting.filter(Q(ruled=True) | Q(topology_required=True)).select_related("organization").order_by("pk")
        ):
            jobs.cancel(factories.actor(job.organization), job, now=self.world.now)
            self.outcome.counts["withdrawn"] += 1

    def heal(self) -> None:
        world = self.world
        world.held, world.late = [], []
        for yard in world.yards:
            yard.silent = False
            for machine in yard.machines.values():
                machine.dead = False
            for asic in yard.asics.values():
                asic.deaf = asic.mute = False
            sites.set_site_mode(Site.objects.get(pk=yard.pk), "auto", actor=SYSTEM, now=world.now)
        Contract.objects.filter(kind="spot").update(limit_price=9_000_000)  # whoever bid too little bids enough
        for work in Maintenance.objects.filter(state__in=("announced", "in_progress")):
            over = maintenance.finish if work.state == "in_progress" else maintenance.cancel
            over(SYSTEM, work, now=world.now)
        for host in Host.objects.exclude(taints=[]):
            drains.set_taints(host, [], actor=SYSTEM, now=world.now)
        for host in Host.objects.filter(state__in=("draining", "maintenance"), back_at=None):
            sites.undrain_host(host, actor=SYSTEM, now=world.now)

    def turn(self, number: int) -> None:
        """Half a minute of a working house; less while watts are awaited, for a sleep is proved by two readings soon after it."""
        world = self.world
        shedding = Placement.objects.filter(state="shedding").exists()
        world.pass_time(timedelta(seconds=7 if shedding else 30))
        beat = number % 3 == 0
        if beat:
            contracts.clock(world.now)
            maintenance.clock(world.now)
            spot.run(world.cell.pk, now=world.now)
            tick_cells()
            tick_defrag()
        for yard in world.yards if beat or shedding else ():
            site_loop.run(yard.pk, now=world.now)
        for topic in TOPICS if beat else (tasks.CYCLE,):
            outbox.drain(topic=topic)
        for yard in world.yards:
            self.sync(yard)

    def sync(self, yard: Any) -> None:
        agent = Agent.objects.select_related("site").get(pk=yard.agent_pk)
        yard.pass_time(self.world.now)
        report = yard.report(self.world.now) | {"known_safety": agent.site.safety_generation}
        agents.observe(agent, report, now=self.world.now)
        yard.take(agents.desired(agent, report, now=self.world.now), self.world.now)

    def promised(self, probes: set[int]) -> bool:
        """Whether a firm reservation has still to be claimed. Its claim is a job over all its GPUs, as soon as its time has come and
        whoever else waits; one that is nearly over is left alone, for watts are proved free by two readings first.
        """
        now = self.world.now
        firm = Reservation.objects.filter(state="firm", ends_at__gt=now + NEARLY, contract__isnull=False)
        for r in firm.select_related("contract").order_by("starts_at", "pk"):
            if r.contract is None or r.contract.pk in probes or r.contract.state != "active":
                continue
            if r.starts_at > now:
                return True
            probes.add(r.contract.pk)
            spec = {
                "command": ["true"],
                "gpus": 1,
                "replicas": r.contract.gpu_count,
                "vcpu_milli": 500,
                "ram_mib": 512,
                "name": "claim",
            }
            jobs.submit(factories.actor(r.contract.organization), r.contract, spec, now=now)
            return True
        return False

    def kept(self, probes: set[int], step: int) -> None:
        for job in Job.objects.filter(contract_id__in=probes, name="claim").exclude(attempt__gt=0):
            why = rows(f"SELECT at, reason, binding FROM scheduler_decision WHERE job_id = {job.pk}")
            words = f"contract {job.contract_id} claimed its {job.replicas} GPUs in vain: {job.state} {job.state_reason}, {why}"
            self.outcome.violations.append((step, words))
        self.outcome.counts["claims"] += len(probes)

    def leap(self) -> None:
        """To the next thing that time brings."""
        now = self.world.now
        marks = [
            *Reservation.objects.filter(state="firm").values_list("claims_at", flat=True),
            *Reservation.objects.filter(state="firm").values_list("starts_at", flat=True),
            *Reservation.objects.filter(state="firm").values_list("ends_at", flat=True),
            *Contract.objects.filter(state="active").values_list("starts_at", flat=True),
            *Curtailment.objects.filter(state="active").values_list("ends_at", flat=True),
        ]
        ahead = [mark for mark in marks if mark > now]
        self.world.pass_time(min(ahead) - now if ahead else timedelta(seconds=160))
        for yard in self.world.yards:
            self.sync(yard)  # nothing runs, so no lease was missed
