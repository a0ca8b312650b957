"""What runs by itself: the beat's tasks, the outbox's workers, the sites' loops and agents, in the run's own time.

Between two instants nobody is at work: for the control plane that is a stop, after which every lease counts on from where it
stood (services.leases). Where a thing has begun, time goes in steps of seconds until it is settled.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from datetime import datetime, timedelta
from decimal import Decimal
from random import Random
from typing import Any

from django.db import connection
from django.db.models import F, Q

from benchmarks.faults import At, Surgeon
from billing import reconcile, usage
from billing import tasks as billing_tasks
from billing.gateway import wire
from marketplace import outbox
from marketplace import tasks as market_tasks
from marketplace.models import Contract, FeedValue, HeldLower, Host, OutboxMessage, Placement, ShedClaim
from marketplace.services import contracts, feeds, leases, maintenance, screening, spot
from marketplace.services.availability import HOLDING
from marketplace.services.forward import bids
from sandbox.market.clock import Clock
from sandbox.market.doors import Stripe, Web
from sandbox.market.site import Facility
from scheduler import site_loop
from scheduler import tasks as scheduler_tasks
from scheduler import usage as fair_share

log = logging.getLogger(__name__)
MOVING = ("intended", "shedding", "granted", "starting", "draining")
STEP = timedelta(seconds=7)  # two readings so far apart prove a sleep
STEPS = 24  # at most, until what has begun is settled
MONEY = "billing."
KINDS = frozenset({"market", "cells", "sites", "spot", "maintenance"})  # of what the clock brings

# What the clock brings next by itself, and whose work it is: the market's clock, the cells', the sites', spot's, maintenance's.
_MARKS = """
SELECT 'cells', min(claims_at) FROM marketplace_reservation WHERE state = 'firm' AND claims_at > %(turned)s
UNION ALL SELECT 'cells', min(starts_at) FROM marketplace_reservation WHERE state = 'firm' AND starts_at > %(turned)s
UNION ALL SELECT 'market', min(starts_at) FROM marketplace_contract WHERE state = 'active' AND starts_at > %(turned)s
UNION ALL SELECT 'market', min(ends_at) FROM marketplace_contract WHERE state = 'active' AND ends_at > %(turned)s
UNION ALL SELECT 'market', min(pay_by) FROM marketplace_contract WHERE state = 'pending_payment' AND pay_by > %(turned)s
UNION ALL SELECT 'market', min(effective_at) FROM marketplace_amendment WHERE kind = 'price' AND state = 'accepted'
  AND applied_at IS NULL AND effective_at > %(turned)s
UNION ALL SELECT 'market', min(answer_by) FROM marketplace_amendment WHERE kind = 'price' AND state = 'open' AND answer_by > %(turned)s
UNION ALL SELECT 'sites', min(starts_at) FROM marketplace_curtailment WHERE state = 'announced' AND starts_at > %(turned)s
UNION ALL SELECT 'sites', min(ends_at) FROM marketplace_curtailment WHERE state = 'active' AND ends_at > %(turned)s
UNION ALL SELECT 'sites', min(created_at + interval '600 s') FROM marketplace_curtailment
  WHERE state = 'active' AND created_at + interval '600 s' > %(turned)s
UNION ALL SELECT 'sites', min(leaves_at) FROM marketplace_host WHERE state = 'draining' AND leaves_at > %(turned)s
UNION ALL SELECT 'spot', min(leaves_at) FROM marketplace_spotnotice WHERE leaves_at > %(turned)s
UNION ALL SELECT 'market', min(expires_at) FROM marketplace_resale WHERE state = 'open' AND expires_at > %(turned)s
UNION ALL SELECT 'market', min(ends_at) FROM marketplace_resale WHERE state <> 'open' AND ends_at > %(turned)s
UNION ALL SELECT 'maintenance', min(starts_at - interval '900 s') FROM marketplace_maintenance
  WHERE state = 'announced' AND starts_at - interval '900 s' > %(turned)s
UNION ALL SELECT 'maintenance', min(starts_at) FROM marketplace_maintenance WHERE state = 'announced' AND starts_at > %(turned)s
UNION ALL SELECT 'maintenance', min(ends_at) FROM marketplace_maintenance WHERE state = 'in_progress' AND ends_at > %(turned)s
"""


class House:
    """The platform at work. `kills` is how often a worker dies on its way, of a thousand."""

    def __init__(self, clock: Clock, web: Web, stripe: Stripe, dice: Random, counts: Counter[str]) -> None:
        self.clock, self.web, self.stripe, self.dice, self.counts = clock, web, stripe, dice, counts
        self.sites: list[Facility] = []
        self.surgeon = Surgeon()
        self.kills = 0
        self.turned = clock.now  # all that came due by then is done
        self.marks: dict[str, datetime] = {}

    # --- one task, by a worker that may die
    def do(self, what: str, call: Callable[[], Any]) -> None:
        """The task; where its worker is killed at some statement, another does it again."""
        if self.dice.randrange(1000) < self.kills:
            at = At(self.dice.randrange(1, 40), self.dice.random() < 0.5)

            def elsewhere() -> Any:
                wire._client.cache_clear()  # the parent's connection to Stripe is the parent's
                return call()

            ended = self.surgeon.killed(elsewhere, at)
            if ended.error:
                raise AssertionError(f"{what}, in a worker to be killed: {ended.error}\n{ended.trace}")
            self.counts["fault: worker killed"] += ended.struck
            OutboxMessage.objects.filter(claimed_until__gt=self.clock.now).update(claimed_until=self.clock.now)
        call()

    # --- an instant
    def arrive(self) -> None:
        """The control plane is there again, and hears every agent: meters and beats are fresh."""
        leases.pulse(now=self.clock.now)
        for site in self.sites:
            site.sync(self.clock.now)

    def turn(self, *, whole: bool = False) -> None:
        """What came due since the last turn, each kind's task (`whole`: every task); then what that began."""
        now = self.clock.now
        self.mark()
        due = KINDS if whole else {kind for kind, at in self.marks.items() if at <= now}
        self.turned = now
        slack = self.slack()
        for site in self.sites:
            if "sites" in due or site.pk in slack:
                self.loop(site)
        if "maintenance" in due:
            self.do("maintenance", lambda: maintenance.clock(now))
        if "market" in due or _waiting(now):
            self.market()
        if "cells" in due:
            self.do("cells", scheduler_tasks.tick_cells)
        if "spot" in due:
            spot.ask()
        self.settle()

    def beat(self) -> None:
        """Every task of the beat that keeps the market going."""
        self.arrive()
        self.turn(whole=True)

    def market(self) -> None:
        self.do("market clock", lambda: contracts.clock(self.clock.now))

    def loop(self, site: Facility) -> None:
        self.do("site loop", lambda: site_loop.run(site.pk, now=self.clock.now))

    def settle(self) -> None:
        """Work, in steps of seconds, until nothing is on its way any more."""
        for _ in range(STEPS):
            self.work()
            moving = self.moving()
            if not moving:
                return
            self.clock.to(self.clock.now + STEP)
            leases.pulse(now=self.clock.now)
            for site in moving:
                site.sync(self.clock.now)
                self.loop(site)

    def slack(self) -> set[int]:
        """Sites that speak, with hosts that have more watts booked than what stands there may draw: work has ended since their loop's
        last turn, which is seconds ago where somebody is at work, and who comes next may need these watts. And sites that
        hold GPUs lower: each turn looks whether they may have their watts back.
        """
        active: dict[int, set[int]] = defaultdict(set)
        for host, indices in Placement.objects.exclude(state__in=Placement.FINAL).values_list("host_id", "gpu_indices"):
            active[host] |= set(indices)
        silent = [site.pk for site in self.sites if site.silent]
        return {
            h.site_id
            for h in Host.objects.filter(cap_control=True, state=Host.State.ACTIVE).exclude(site__in=silent)
            if h.reserved_w > _needs_w(h, active.get(h.pk)) or h.call_gpu_w is not None
        }

    def moving(self) -> list[Facility]:
        """Sites at which something begins or ends; those that are silent are waited for elsewhere."""
        live = set(Placement.objects.filter(state__in=MOVING).order_by().values_list("site_id", flat=True).distinct())
        live |= set(ShedClaim.objects.filter(state="commanded").order_by().values_list("site_id", flat=True).distinct())
        live |= {row.host.site_id for row in self._unread()}
        return [s for s in self.sites if not s.silent and (s.pk in live or s.told())]

    def _unread(self) -> list[HeldLower]:
        """GPUs held lower whose hosts, as far as they live, have limits still to read back: lower ones, or their full ones."""
        waits = Q(host__desired_generation__gt=F("host__applied_generation")) | Q(lifted_generation__isnull=False)
        dead = {(site.pk, m.name) for site in self.sites for m in site.machines.values() if m.dead}
        rows = HeldLower.objects.filter(waits, ends_at=None).select_related("host").order_by("pk")
        return [row for row in rows if (row.host.site_id, row.host.name) not in dead]

    def work(self) -> None:
        """The outbox's workers: the market's messages, then money's. What failed is tried again an hour later."""
        topics = OutboxMessage.objects.filter(parked_at=None, available_at__lte=self.clock.now, claimed_until=None)
        for _ in range(6):
            waiting = sorted(set(topics.order_by().values_list("topic", flat=True)))
            if not waiting:
                return
            if any(topic.startswith(MONEY) for topic in waiting):
                self.stripe.at(self.clock.now)
            for topic in waiting:
                self.do(f"outbox {topic}", lambda topic=topic: outbox.drain(topic=topic, limit=200))  # type: ignore[misc]

    def mark(self) -> None:
        """The first instant of each kind that the clock brings and no turn has seen to: what an act or a settling stepped over, too."""
        with connection.cursor() as cursor:
            cursor.execute(_MARKS, {"turned": self.turned})
            self.marks = {}
            for kind, at in cursor.fetchall():
                if at is not None:
                    self.marks[kind] = min(_whole(at), self.marks.get(kind, _whole(at)))

    def next_mark(self) -> datetime | None:
        """When the clock itself brings something: a start, an end, a notice that is over, work that is done. Not before now."""
        self.mark()
        ends = [site.next_end(self.clock.now) for site in self.sites if not site.silent]
        # Of what ends by itself the agent says when it was: it is heard at the next half hour, where others act as well.
        return min((*self.marks.values(), *(_half(at) for at in ends if at is not None)), default=None)

    # --- the hour, the day, the month
    def hour(self) -> None:
        """At 1:30 before an hour: the auction of its first interval, and what is metered by the hour."""
        self.feed()
        self.do("screening", lambda: screening.tick(self.clock.now))
        self.do("bids", lambda: bids.tick(self.clock.now))
        self.beat()
        self.do("meter", lambda: usage.meter_all(self.clock.now))
        self.do("fair share", lambda: fair_share.roll(now=self.clock.now))

    def quarter_day(self) -> None:
        """Attempts that are due, dunning, payouts; what failed at Stripe is tried again."""
        OutboxMessage.objects.filter(claimed_until__gt=self.clock.now).update(claimed_until=None)
        self.money(reconcile.sweep)

    def day(self) -> None:
        """Stripe's events reach us; the books are rebuilt and compared; old records go."""
        self.stripe.at(self.clock.now)
        self.counts["Stripe events heard"] += self.stripe.hear(self.web, self.dice)
        self.money(reconcile.reconcile)
        scheduler_tasks.forget_records()

    def money(self, task: Callable[[datetime], Any]) -> None:
        """A task that speaks to Stripe, and may find it gone: the next turn does it again."""
        self.stripe.at(self.clock.now)
        try:
            self.do(task.__name__, lambda: task(self.clock.now))
        except wire.GatewayError:
            self.counts["fault: Stripe did not answer a sweep"] += 1
        self.settle()

    def close(self) -> None:
        """The month's close: every account through the last instant of its UTC month, which is this hour's or the day's."""
        through = self.clock.now.replace(hour=0, minute=0, second=0, microsecond=0)
        self.do("close", lambda: billing_tasks.close_all(through, now=self.clock.now))
        self.counts["closes"] += 1
        self.settle()

    def last_close(self) -> None:
        """Everything through this second: what is still running pays for its time so far."""
        self.settle()
        self.do("meter", lambda: usage.meter_all(self.clock.now))
        for _ in range(2):  # what the first bills to buyers of resales, the second credits their sellers
            through = self.clock.now
            self.do("close", lambda through=through: billing_tasks.close_all(through, now=self.clock.now))  # type: ignore[misc]
            self.settle()
            self.clock.to(self.clock.now + STEP)

    def feed(self) -> None:
        """The feeds as of now: energy swings with the hour, hashing with the week."""
        now = self.clock.now.replace(second=0, microsecond=0)
        hours = now.timestamp() / 3600
        energy = 42_000_000 + int(18_000_000 * math.sin(hours * math.tau / 24)) + self.dice.randrange(6_000_000)
        bitcoin = 10_500_000 + int(900_000 * math.sin(hours * math.tau / 168))
        values = ((FeedValue.Kind.DIFFICULTY, 150_000_000_000_000), (FeedValue.Kind.BLOCK_HEIGHT, 1_100_000),
                  (FeedValue.Kind.FEES_SAT, 2_000_000), (FeedValue.Kind.BTC_USD, bitcoin), (FeedValue.Kind.ENERGY, energy))  # fmt: skip
        for kind, value in values:
            feeds.store(kind, Decimal(value), source="market", observed_at=now, now=self.clock.now)

    def end(self) -> None:
        self.surgeon.close()


def _needs_w(host: Host, active: set[int] | None) -> int:
    """What it may draw with these GPUs in use; None: with nothing on it."""
    if active is None:
        return host.parked_w
    return host.base_w + len(active) * host.gpu_max_w + (host.gpu_count - len(active)) * host.gpu_min_w


def _whole(at: datetime) -> datetime:
    """The first whole second at or after `at`."""
    return at if not at.microsecond else at.replace(microsecond=0) + timedelta(seconds=1)


def _half(at: datetime) -> datetime:
    """The first half hour at or after `at`."""
    past = timedelta(minutes=at.minute % 30, seconds=at.second, microseconds=at.microsecond)
    return at if not past else at - past + timedelta(minutes=30)


def _waiting(now: datetime) -> bool:
    """Does a contract wait for what has no hour of its own: its last job to be gone, or, signed in its window, to begin?"""
    unbegun = Q(state="active", kind__in=HOLDING, began_at=None, starts_at__lte=now, ends_at__gt=now)
    return Contract.objects.filter(unbegun | Q(state="ending")).exists()


def _registered() -> tuple[Any, ...]:
    """The modules whose import registers the outbox's handlers."""
    return (market_tasks, scheduler_tasks, billing_tasks)
