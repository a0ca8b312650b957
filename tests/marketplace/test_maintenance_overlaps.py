"""Announced work that overlaps on the same hosts, while contracts hold them: whatever is announced, extended, ended early or cancelled,
at every moment each contract has its GPUs, or what it misses is on record once; at the end all is as it was.
"""

import random
from collections import Counter
from contextlib import suppress
from datetime import timedelta

import pytest

from marketplace.errors import MarketError
from marketplace.models import Host, Maintenance, MaintenanceHost, Reservation, ReservationBlock, Shortfall
from marketplace.services import contracts, maintenance
from tests import factories
from tests.factories import NOW
from tests.marketplace.works import TERM, Yard

pytestmark = pytest.mark.django_db
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
FIRST = NOW + 10 * DAY
STEP, STEPS = 30 * MINUTE, 44  # from two hours before the first until all are over


class World(Yard):
    """Four hosts in two racks; contracts of 8 to 24 of their 32 GPUs; work announced on one to three hosts at a time."""

    def __init__(self, seed):
        super().__init__()
        self.dice = random.Random(seed)
        self.now = NOW
        self.held = []
        for _ in range(self.dice.randint(1, 3)):
            with suppress(MarketError):  # full
                self.held.append(
                    self.contract(gpus=8 * self.dice.randint(1, 2), term=TERM, customer=factories.organization())
                )
        self.at_first = {c.pk: self.own(c) for c in self.held}
        self.rows = [self.some() for _ in range(self.dice.randint(2, 4))]

    def some(self):
        start = FIRST + self.dice.randint(0, 16) * STEP
        end = start + self.dice.randint(2, 10) * STEP
        hosts = self.dice.sample(self.hosts, self.dice.randint(1, 3))
        return self.announce(*hosts, start=start, end=end)

    def turn(self):
        """Something that an operator may do, refused or not."""
        row = self.dice.choice(self.rows)
        row.refresh_from_db()
        act = self.dice.choice(["extend", "finish", "cancel", *["nothing"] * 24])
        with suppress(MarketError):
            if act == "extend":
                later = max(row.ends_at, self.now) + self.dice.randint(1, 4) * STEP
                maintenance.extend(self.operator, row, ends_at=later, reason="the part did not fit", now=self.now)
            elif act == "finish":
                maintenance.finish(self.operator, row, now=self.now)
            elif act == "cancel":
                maintenance.cancel(self.operator, row, now=self.now)

    def own(self, contract):
        blocks = ReservationBlock.objects.filter(reservation__contract=contract, reservation__maintenance=None)
        return sorted(blocks.values_list("host_id", "gpu_indices"))

    def live(self, **of):
        return Reservation.objects.filter(
            state="firm", claims_at__lte=self.now, ends_at__gt=self.now, **of
        ).prefetch_related("blocks")

    def check(self):
        away = set(Host.objects.exclude(state="active").values_list("pk", flat=True))
        devices = Counter()
        for contract in self.held:
            mine = [
                (b.host_id, i) for row in self.live(contract=contract) for b in row.blocks.all() for i in b.gpu_indices
            ]
            devices.update(mine)
            here = sum(host not in away for host, _ in mine)
            missed = Shortfall.objects.filter(contract=contract, starts_at__lte=self.now, ends_at__gt=self.now)
            short = sum(missed.values_list("gpus", flat=True))
            assert here + short == contract.gpu_count, (self.now, contract.pk, here, short)
        assert not [d for d, n in devices.items() if n > 1], "a GPU is promised twice"
        taken = Reservation.objects.filter(maintenance__isnull=False, contract=None, state="firm")
        claimed = set(
            taken.filter(claims_at__lte=self.now, ends_at__gt=self.now).values_list("blocks__host_id", flat=True)
        )
        assert away <= claimed, "a host is out of work and none has it"
        had = MaintenanceHost.objects.filter(
            taken_at__isnull=False, given_back_at=None, maintenance__state="in_progress"
        )
        assert set(had.values_list("host_id", flat=True)) <= away, "a host is at work while maintenance has it"


@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(n, marks=pytest.mark.full) for n in range(5, 60))])
def test_whatever_overlaps_contracts_have_their_gpus_or_what_they_miss_is_on_record(seed):
    world = World(seed)
    world.now = FIRST - 2 * HOUR
    for _ in range(STEPS):
        type(world.agent).objects.update(last_sync_at=world.now)
        maintenance.clock(world.now)
        contracts.clock(now=world.now)
        maintenance.clock(world.now)
        world.check()
        world.turn()
        world.now += STEP
    maintenance.clock(FIRST + 4 * DAY)
    assert set(Maintenance.objects.values_list("state", flat=True)) <= {"completed", "cancelled"}
    assert world.states() == ["active"] * 4
    assert not Host.objects.exclude(back_at=None, leaves_at=None).exists()
    assert not Shortfall.objects.filter(ends_at__gt=FIRST + 4 * DAY).exists()
    assert {c.pk: world.own(c) for c in world.held} == world.at_first
    for contract in world.held:  # nothing is missed twice: no two rows of one contract for one maintenance overlap
        rows = list(Shortfall.objects.filter(contract=contract).order_by("starts_at", "ends_at"))
        for n, a in enumerate(rows):
            over = [b for b in rows[n + 1 :] if b.starts_at < a.ends_at]
            assert a.gpus + sum(b.gpus for b in over) <= contract.gpu_count
