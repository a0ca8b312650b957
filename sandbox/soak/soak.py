"""The run: a second of physics after another, a report and a turn of the loop every few of them; when the time is up the faults end,
and everything must come back.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal
from random import Random
from time import monotonic
from typing import Any

from django.conf import settings

from benchmarks.faults import At, Surgeon
from billing import tasks as billing_tasks
from marketplace import outbox
from marketplace import tasks as market_tasks
from marketplace.models import FeedValue, OutboxMessage
from marketplace.services import contracts, feeds, leases
from sandbox.market import plant
from sandbox.market.clock import QUARTER, Clock
from sandbox.market.doors import Stripe, Web, sign_up
from sandbox.market.screener import Screener, profile
from sandbox.site.physics import Physics
from sandbox.soak.calls import Calls
from sandbox.soak.faults import Fault, Faults, missing
from sandbox.soak.grounds import Grounds
from sandbox.soak.watch import Watch
from scheduler import cycle, site_loop
from scheduler import tasks as scheduler_tasks

TURN_S, LIVE_S, CALM_S = 5, 10, 30  # between two reports while something moves, while a fault lasts, and else
HOSTS, MINERS = 6, 16
GOOD = "4242424242424242"


@dataclass
class Outcome:
    seed: int
    seconds: float = 0.0
    hours: float = 0.0  # that passed at the site
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    back_in: timedelta | None = None
    missing: list[str] = field(default_factory=list)  # rows of the table of which this run proves nothing


class Soak:
    """A site and its market, drawn from `seed`; the database is its alone."""

    back = timedelta(minutes=90)  # after the last fault everything has come back by then

    def __init__(
        self, seed: int, *, minutes: float, hours: float | None = None, whole: bool = False, say: Any = None
    ) -> None:
        self.outcome = Outcome(seed)
        self.dice = Random(seed)
        self.minutes, self.hours, self.whole = minutes, hours, whole
        self.say = say or (lambda _: None)
        self.clock = Clock(QUARTER)
        self.control = self.priced = True
        self.doubled, self.kills = False, 0

    def run(self) -> Outcome:
        began = monotonic()
        kept, cycle.REST_S = cycle.REST_S, 0
        mails, settings.EMAIL_BACKEND = settings.EMAIL_BACKEND, "django.core.mail.backends.locmem.EmailBackend"
        self.surgeon = Surgeon()
        try:
            calls = Calls(self, self._dice())
            with self.clock, Web() as self.web, Stripe() as self.stripe, Screener(self.clock), calls as self.calls:
                self._open()
                self._weather(began)
                self._clear_up()
        finally:
            self.surgeon.close()
            cycle.REST_S, settings.EMAIL_BACKEND = kept, mails
        self.outcome.seconds = monotonic() - began
        self.outcome.hours = (self.clock.now - QUARTER).total_seconds() / 3600
        self.outcome.counts = self.counts()
        self.outcome.faults = self.faults.over
        self.outcome.missing = missing(self.faults.over)
        return self.outcome

    # --- the site and who uses it
    def _open(self) -> None:
        self.stripe.at(self.clock.now)
        self._feed()
        spec = plant.spec("yard", "H100-SXM", HOSTS, MINERS) | {"seed": self.outcome.seed}
        owner = plant.operator(self.web, self.stripe, "Soak Power")
        made = plant.plant(owner, self.clock, self._dice(), spec, region="us-tx")
        self.operator = owner.desk
        self.site = Grounds(
            made.pk, made.agent_pk, made.dice, made.machines, made.asics, made.nodes, self.clock.now, name=made.name,
            public_id=made.public_id, physics=Physics(spec),
        )  # fmt: skip
        _, self.customer = sign_up(self.web, "Soak Models")
        self.customer.put("verification", profile("Soak Models", "US"))
        self.stripe.card(self.customer, GOOD)
        self.stripe.hear(self.web, self._dice())
        self.watch = Watch(self)
        for _ in range(6):
            self._turn(TURN_S)
        (listing,) = owner.listings
        self.contract = self._book(listing, {"kind": "on_demand", "gpu_count": 8 * HOSTS})
        self.jobs: list[str] = []
        self.job_at = self.clock.now
        self.calls.begin()
        self.faults = Faults(self, self._dice())

    def _book(self, listing: str, terms: dict[str, Any]) -> str:
        quote = self.customer.post("quotes", {"listing": listing, **terms})
        return str(self.customer.post("contracts", quote["accept"]["body"])["id"])

    def _dice(self) -> Random:
        return Random(self.dice.getrandbits(64))

    def counts(self) -> Counter[str]:
        return self.watch.counts + self.site.own

    # --- time
    def _weather(self, began: float) -> None:
        """Jobs, calls and faults, until the machine's or the site's time is up; of a `whole` run as long again at most, while some row
        has proved nothing.
        """
        opened = self.clock.now
        told = self.clock.now
        while not self.outcome.violations:
            spent = (monotonic() - began) / 60 / self.minutes
            if self.hours is not None:
                spent = max(spent, (self.clock.now - opened) / timedelta(hours=self.hours))
            if spent >= 2 or (spent >= 1 and not (self.whole and missing(self.faults.over))):
                return
            self.faults.turn()
            if self.control:
                self._customers()
                self.calls.turn()
            self._turn(TURN_S if not self.watch.calm() else LIVE_S if self.faults.live else CALM_S)
            for fault in self.faults.live:
                self.outcome.violations += fault.watch(self.clock.now, self.counts())
            if self.clock.now - told >= timedelta(hours=6):
                told = self.clock.now
                self.say(f"hour {(told - QUARTER).total_seconds() / 3600:.0f}: {self.watch.said()}")

    def _clear_up(self) -> None:
        """No more faults, calls and jobs: in BACK everything has settled."""
        for fault in [*self.faults.live]:
            self.faults.end(fault)
        self.calls.end()
        began = self.clock.now
        while self.jobs:
            self._cancel(self.jobs.pop())
        while not self.outcome.violations:
            left = self.watch.unsettled()
            if not left:
                self.outcome.back_in = self.clock.now - began
                return
            if self.clock.now - began > self.back:
                self.outcome.violations.append(f"{self.back} after the last fault: " + "; ".join(left))
                return
            self._turn(TURN_S)

    def _turn(self, seconds: int) -> None:
        """So many seconds at the site; then its agent calls, and control takes a turn."""
        for _ in range(seconds):
            self.clock.to(self.clock.now + timedelta(seconds=1))
            self.site.second(self.clock.now)
        now = self.clock.now
        if now.second < seconds:
            self._feed()
        if self.control:
            leases.pulse(now=now)
            self.site.sync(now)
            if self.doubled and self.site.link:
                fresh = [r for r in self.site.said if (now - r["agent_time"]).total_seconds() < 30]  # the skew let pass
                self.site.tell(self.dice.choice(fresh), now)
            if now.second < seconds:  # each minute
                self._do(lambda: contracts.clock(now))
            self.calls.listen()
            self._work()
            self._do(lambda: site_loop.run(self.site.pk, now=now))
            if self.doubled:
                self._beside(lambda: site_loop.run(self.site.pk, now=now))
                self.watch.counts["loops beside each other"] += 1
            self.site.sync(now)
        self.outcome.violations += self.watch.look()

    def _work(self) -> None:
        """The cells' tick and the outbox's messages, as the workers do them."""
        now = self.clock.now
        self._do(scheduler_tasks.tick_cells)
        topics = OutboxMessage.objects.filter(parked_at=None, available_at__lte=now, claimed_until=None)
        self.stripe.at(now)
        for topic in sorted(set(topics.order_by().values_list("topic", flat=True))):
            self._do(lambda topic=topic: outbox.drain(topic=topic, limit=200))

    def _do(self, call: Any) -> None:
        """A task; where its worker is killed at some statement, another does it again."""
        if self.dice.randrange(1000) < self.kills:
            ended = self.surgeon.killed(call, At(self.dice.randrange(1, 60), self.dice.random() < 0.5))
            if ended.error:
                raise AssertionError(f"in a worker to be killed: {ended.error}\n{ended.trace}")
            self.watch.counts["workers killed"] += ended.struck
            OutboxMessage.objects.filter(claimed_until__gt=self.clock.now).update(claimed_until=None)
        call()

    def _beside(self, call: Any) -> None:
        """Two at once: one goes between two statements of the other."""
        for ended in self.surgeon.beside(call, call, At(self.dice.randrange(1, 40), self.dice.random() < 0.5)):
            if ended.error:
                raise AssertionError(f"two loops at once: {ended.error}\n{ended.trace}")

    def _feed(self) -> None:
        if not self.priced:
            return
        at = self.clock.now.replace(second=0)
        for kind, value in (
            (FeedValue.Kind.DIFFICULTY, 148 * 10**12), (FeedValue.Kind.BTC_USD, 9_000_000), (FeedValue.Kind.BLOCK_HEIGHT, 930_000),
            (FeedValue.Kind.FEES_SAT, 2_000_000), (FeedValue.Kind.ENERGY, self.calls.uusd_mwh),
        ):  # fmt: skip
            feeds.store(kind, Decimal(value), source="soak", observed_at=at, now=self.clock.now)

    # --- what people do
    def _customers(self) -> None:
        if self.clock.now < self.job_at:
            return
        self.job_at = self.clock.now + timedelta(minutes=self.dice.expovariate(1 / 9))
        if self.jobs and self.dice.random() < 0.25:
            self._cancel(self.jobs.pop(self.dice.randrange(len(self.jobs))))
            return
        replicas = self.dice.choice((1, 1, 1, 2, 3))
        body = {
            "contract": self.contract, "command": ["sleep", str(self.dice.choice((300, 900, 1800, 3600)))], "replicas": replicas,
            "gpus": self.dice.choice((1, 2, 4, 8, 8)), "vcpu_milli": 8_000, "ram_mib": 65_536, "checkpoint_grace_s": 20,
            "on_replica_loss": self.dice.choice(("restart_gang", "replace_replica")),
        }  # fmt: skip
        self.jobs.append(self.customer.post("jobs", body)["id"])
        self.watch.counts["jobs"] += 1

    def _cancel(self, job: str) -> None:
        if "cancel" in self.customer.get(f"jobs/{job}")["actions"]:
            self.customer.post(f"jobs/{job}/cancel")


def _registered() -> tuple[Any, ...]:
    """The modules whose import registers the outbox's handlers."""
    return (market_tasks, scheduler_tasks, billing_tasks)
