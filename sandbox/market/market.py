"""The run: to the next instant, let who is due act, settle what began, audit; until the last day, then the books are closed."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from random import Random
from time import monotonic
from typing import Any

from django.conf import settings
from django.core import mail

from sandbox.market import customers, plant
from sandbox.market.auditor import Auditor
from sandbox.market.clock import WHOLE, Clock, Diary, start_of
from sandbox.market.customers import HABITS, Customer
from sandbox.market.doors import Stripe, Web, sign_up
from sandbox.market.faults import Faults
from sandbox.market.house import House
from sandbox.market.operators import Desk
from sandbox.market.screener import DENIED, NAMESAKE, SLOW, Reviewers, Screener
from scheduler import cycle

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
BEAT = timedelta(hours=3)  # between two looks at a market in which nothing happens
LEASE_S = 11_400  # longer than that
WHOLE_AUDIT = (
    12 * HOUR
)  # all rows; promises and what sites draw are looked at each half hour at which something happens
KILLS = 6  # workers that die on their way, of a thousand tasks
NEWCOMERS = (HABITS[0], HABITS[1], HABITS[3], HABITS[2])
NAMES = ("Fresh Minds", DENIED, NAMESAKE, SLOW)


@dataclass
class Outcome:
    """What a run came to. `violations`: (day, instant, words)."""

    seed: int
    days: float
    scale: int
    violations: list[tuple[int, datetime, str]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    promises: dict[str, Counter[str]] = field(default_factory=dict)
    money: dict[str, int] = field(default_factory=dict)
    occupancy: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


class Market:
    """A market of `scale`, drawn from `seed`; the database is its alone."""

    def __init__(self, seed: int, *, days: float, scale: int = 1, on: bool = False, say: Any = None) -> None:
        self.on, self.known = on, set[str]()
        self.outcome = Outcome(seed, days, scale)
        self.dice = Random(seed)
        self.start = start_of(days)
        self.clock = Clock(self.start)
        self.diary = Diary()
        self.say = say or (lambda _: None)
        self.wrong: list[str] = []

    def run(self) -> Outcome:
        began = monotonic()
        kept = (settings.SITE_LEASE_SECONDS, settings.EMAIL_BACKEND, cycle.REST_S)
        settings.SITE_LEASE_SECONDS, cycle.REST_S = LEASE_S, 0
        settings.EMAIL_BACKEND = "django.core.mail.backends.locmem.EmailBackend"
        mail.outbox = []
        try:
            with self.clock, Web() as web, Stripe() as stripe, Screener(self.clock) as screener:
                self.web, self.stripe, self.screener = web, stripe, screener
                self.open()
                try:
                    self.go()
                finally:
                    self.house.end()
        finally:
            settings.SITE_LEASE_SECONDS, settings.EMAIL_BACKEND, cycle.REST_S = kept
        self.outcome.seconds = monotonic() - began
        return self.outcome

    # --- the first day
    def open(self) -> None:
        counts, scale = self.outcome.counts, self.outcome.scale
        self.stripe.at(self.clock.now)
        self.house = House(self.clock, self.web, self.stripe, self._dice(), counts)
        self.faults = Faults(self.house, self.clock, self.diary, self._dice(), counts)
        self.house.feed()
        plans = [
            ("Caprock", "H100-SXM", 3 * scale, 6 * scale, "us-tx"),
            ("Basin", "L40S", 3 * scale, 4 * scale, "us-tx"),
        ]
        for name, model, hosts, miners, region in plans:
            owner = plant.operator(self.web, self.stripe, f"{name} Power")
            site = plant.plant(
                owner, self.clock, self._dice(), plant.spec(name.lower(), model, hosts, miners), region=region
            )
            self.house.sites.append(site)
            desk = Desk(
                owner, self.clock, self.diary, self._dice(), counts, self.wrong, self._prices(name), self._prices(f"{name}'s grid")
            )  # fmt: skip
            desk.begin(self.start)
        self.customers = [
            self._customer(habits, f"{habits.name} {n + 1}" if n else habits.name)
            for n in range(scale)
            for habits in HABITS
        ]
        self.house.day()
        self.auditor = Auditor(self.clock, self.house, self.faults, self.customers)
        self.faults.begin(self.start)
        for customer in self.customers:
            customer.begin()
        Reviewers(self.screener, self.clock, self.diary, self._dice(), counts).begin()
        self.diary.put(self.start + HOUR * 2, self._newcomer)
        # Within spot's lead before an interval, so that it is auctioned; those between two beats are carried.
        self.diary.every(self.start + HOUR - timedelta(seconds=90), BEAT, self.house.hour)
        self.diary.every(self.start + 3 * HOUR, 6 * HOUR, self.house.quarter_day)
        self.diary.every(self.start + DAY - timedelta(minutes=5), DAY, self.house.day)
        self.house.kills = KILLS

    def _newcomer(self) -> None:
        """Somebody signs up in the midst of it. His card is heard of at once; what he tells of himself comes at once, late or never."""
        number = self.outcome.counts["organizations that signed up later"]
        habits, name = NEWCOMERS[number % len(NEWCOMERS)], NAMES[number % len(NAMES)]
        self.stripe.at(self.clock.now)
        made = self._customer(habits, f"{name} {number + 1}", tells=False)
        self.customers.append(made)
        self.outcome.counts["organizations that signed up later"] += 1
        self.stripe.hear(self.web, self.dice)
        self.house.settle()
        made.begin()
        if number % 7 < 6:
            at = self.clock.now + HOUR * self.dice.choice((0, 1, 30))
            self.diary.put(at, lambda: made.tell(f"{name} {number + 1}"))
        self.diary.put(self.clock.now + DAY * self.dice.uniform(2, 8), self._newcomer)

    def _customer(self, habits: customers.Habits, name: str, *, tells: bool = True) -> Customer:
        organization, desk = sign_up(self.web, name)
        made = Customer(
            habits, organization, desk, self.clock, self.diary, self._dice(), self.outcome.counts, self.wrong, self._prices(name)
        )  # fmt: skip
        if tells:
            made.tell(name)
        if not self.stripe.card(desk, habits.card):
            self.outcome.counts["cards declined at once"] += 1
        if habits.fails_from is not None:
            at = self.start + DAY * min(habits.fails_from, 1.5 if self.outcome.days < WHOLE else habits.fails_from)
            self.diary.put(at, lambda: self._recard(made, customers.FAILS))
            if habits.mends_after is not None:
                self.diary.put(at + DAY * habits.mends_after, lambda: self._recard(made, customers.GOOD))
        return made

    def _recard(self, customer: Customer, number: str) -> None:
        self.stripe.at(self.clock.now)
        self.stripe.card(customer.desk, number)
        self.outcome.counts["cards changed"] += 1
        self.stripe.hear(self.web, self.dice)
        self.house.settle()
        if number == customers.GOOD:
            customer.pay()

    def _dice(self) -> Random:
        """Dice of its own for each actor: what one does does not change what another draws."""
        return Random(self.dice.getrandbits(64))

    def _prices(self, name: str) -> Random:
        """Dice for prices by term, share and curtailment, and for deep calls: beside the others, which fall as they did without."""
        return Random(f"{self.outcome.seed} {name}")

    # --- the days
    def go(self) -> None:
        end = self.start + DAY * self.outcome.days
        audited = looked = self.clock.now
        while self.clock.now < end and (self.on or not self.outcome.violations):
            at = min(t for t in (self.diary.next(), self.house.next_mark(), end) if t is not None)
            month = (at.year, at.month) != (self.clock.now.year, self.clock.now.month)
            self.clock.to(at)
            self.house.arrive()
            for act in self.diary.due(self.clock.now):
                act()
            self.house.turn()
            if month:
                self.house.close()
            whole = month or self.clock.now - audited >= WHOLE_AUDIT
            if whole or self.clock.now - looked >= HOUR / 2:
                self.look(whole=whole)
                looked = self.clock.now
            if whole:
                audited = self.clock.now
        if self.on or not self.outcome.violations:
            self.rest()
        self.auditor.fill(self.outcome)

    def look(self, *, whole: bool) -> None:
        """Audit; what is wrong ends the run, with its day (`on`: it is said, once, and the run goes on)."""
        self.outcome.counts["audits"] += 1
        found = [*self.wrong, *self.auditor.look(whole=whole)]
        self.wrong.clear()
        day = (self.clock.now - self.start).days + 1
        for words in found:
            if words not in self.known:
                self.outcome.violations.append((day, self.clock.now, words))
                self.say(f"  day {day}, {self.clock.now:%F %T}: {words}")
                self.known.add(words)
        if whole and self.clock.now.hour < 6:
            self.say(f"day {day}: {self.auditor.said()}")

    def rest(self) -> None:
        """Faults stop, everybody's contracts are closed through the last second, and what is owed is collected and paid out."""
        self.house.kills = 0
        self.stripe.control("faults", {"api": []})
        for site in self.house.sites:
            for machine in site.machines.values():
                machine.dead = False
        self.clock.to(self.clock.now + HOUR)
        self.house.beat()
        self.house.hour()
        self.house.last_close()
        self.house.quarter_day()
        self.house.day()
        self.look(whole=True)
        if self.on or not self.outcome.violations:
            day = math.ceil(self.outcome.days)
            self.outcome.violations += [(day, self.clock.now, words) for words in self.auditor.close()]
