"""What goes wrong that nobody wished: hosts die, sites fall silent, machines do not obey, Stripe answers badly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta
from random import Random

from marketplace.services import leases
from sandbox.market.clock import Clock, Diary
from sandbox.market.house import House
from sandbox.market.site import Facility

HOUR, MINUTE = timedelta(hours=1), timedelta(minutes=1)
BEAT = timedelta(seconds=29)  # while a site is silent the control plane is there, and counts its lease
STRIPE = ("429", "500", "500_after_commit", "timeout_after_commit")


class Faults:
    def __init__(self, house: House, clock: Clock, diary: Diary, dice: Random, counts: Counter[str]) -> None:
        self.house, self.clock, self.diary, self.dice, self.counts = house, clock, diary, dice, counts
        self.spans: list[
            tuple[int, str, datetime, datetime]
        ] = []  # (site, host or "", from, until): what excuses a promise

    def begin(self, start: datetime) -> None:
        for act, hours in (
            (self.host_dies, 55),
            (self.short_silence, 70),
            (self.long_silence, 700),
            (self.deaf, 110),
            (self.stripe, 30),
        ):
            self._again(act, start + HOUR * self.dice.uniform(3 if hours < 200 else 30, min(50, hours)), hours)

    def _again(self, act: Callable[[], None], at: datetime, hours: float) -> None:
        def turn() -> None:
            act()
            self._again(act, self.clock.now + HOUR * self.dice.uniform(0.5, 1.5) * hours, hours)

        self.diary.put(at, turn)

    def _site(self) -> Facility:
        return self.dice.choice(self.house.sites)

    def host_dies(self) -> None:
        site = self._site()
        machine = self.dice.choice(sorted(site.machines.values(), key=lambda m: m.name))
        back = self.clock.now + HOUR * self.dice.choice((1, 3, 9, 30))
        machine.dead = True
        self.counts["fault: host died"] += 1
        self.spans.append((site.pk, machine.name, self.clock.now, back + HOUR))
        # The control plane notices within three minutes.
        for _ in range(8):
            self.clock.to(self.clock.now + BEAT)
            leases.pulse(now=self.clock.now)
            site.sync(self.clock.now)
            self.house.loop(site)
        self.diary.put(back, lambda: setattr(machine, "dead", False))

    def short_silence(self) -> None:
        self._silence(self._site(), MINUTE * self.dice.choice((2, 5, 12)))
        self.counts["fault: site silent, within its lease"] += 1

    def long_silence(self) -> None:
        """Past the lease: the site ends its work by itself, and the control plane gives it up as lost."""
        self._silence(self._site(), timedelta(seconds=self.lease_s) + 4 * MINUTE)
        self.counts["fault: site silent, past its lease"] += 1

    @property
    def lease_s(self) -> int:
        from django.conf import settings

        return int(settings.SITE_LEASE_SECONDS)

    def _silence(self, site: Facility, length: timedelta) -> None:
        """The beat goes on in steps of seconds, so that the lease runs; power loops run each minute and a half, later each six."""
        began = self.clock.now
        site.silent = True
        beats = 0
        while self.clock.now < began + length:
            self.clock.to(self.clock.now + BEAT)
            leases.pulse(now=self.clock.now)
            beats += 1
            for each in self.house.sites if beats % (3 if beats < 60 else 12) == 0 else ():
                each.sync(self.clock.now)
                self.house.loop(each)
            if beats % 6 == 0:
                self.house.market()
        site.silent = False
        site.sync(self.clock.now)
        self.spans.append((site.pk, "", began, self.clock.now + HOUR))

    def deaf(self) -> None:
        """A miner acknowledges, and hashes on."""
        site = self._site()
        if not site.asics:
            return
        asic = self.dice.choice(sorted(site.asics.values(), key=lambda a: a.name))
        asic.deaf = True
        self.counts["fault: miner does not obey"] += 1
        self.diary.put(self.clock.now + HOUR * 8, lambda: setattr(asic, "deaf", False))

    def stripe(self) -> None:
        fault = {"kind": self.dice.choice(STRIPE), "method": "POST", "path": "/v*", "times": 1}
        self.house.stripe.control("faults", {"api": [fault]})
        self.counts["fault: Stripe answers badly"] += 1

    def excused(self, site: int, hosts: set[str], at: datetime) -> bool:
        """Was the site silent, or one of the hosts dead, around `at`?"""
        return any(s == site and (not h or h in hosts) and a - HOUR <= at <= b for s, h, a, b in self.spans)
