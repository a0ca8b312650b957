"""Work that is announced while contracts are signed: whoever is first, either the contract knew or the announcement counted it."""

from contextlib import suppress
from datetime import timedelta

import pytest

from marketplace.errors import MarketError
from marketplace.models import (
    Contract,
    Host,
    Maintenance,
    MaintenanceHost,
    MaintenanceNotice,
    OutboxMessage,
    Reservation,
)
from marketplace.services import contracts, holds, maintenance, quotes
from marketplace.services.maintenance import announcing, planning, taking
from tests import factories
from tests.factories import NOW
from tests.races.test_booking import LATER, outcome
from tests.threads import at_once, in_thread

pytestmark = pytest.mark.django_db(transaction=True)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
START, END = NOW + 10 * DAY, NOW + 10 * DAY + 4 * HOUR


class Killed(Exception):  # noqa: N818 (nobody catches it but the test)
    """In the place of a step's last line."""


class World:
    """Two hosts, the first of them to be worked on; a buyer with a firm quote on it over the window, whose hold is live."""

    def __init__(self, hosts=1):
        self.site = factories.site()
        self.hosts = [factories.host(self.site) for _ in range(hosts)]
        self.listing = factories.listing(self.site, hosts=self.hosts)
        self.operator = factories.actor(self.site.organization)
        self.buyer = factories.actor(factories.organization())
        asked = quotes.Request("reserved", 8, starts_at=NOW + 2 * DAY, ends_at=NOW + 30 * DAY)
        self.quote = quotes.quote(self.buyer, self.listing.pk, asked, now=NOW)
        self.row = maintenance.draft(
            self.operator, self.site, scope="site", starts_at=START, ends_at=END, text="New fans.", now=NOW
        )

    def accept(self, now=NOW):
        return contracts.accept(self.buyer, self.quote.pk, now=now)

    def announce(self):
        return maintenance.announce(self.operator, self.row, now=NOW)

    def sound(self):
        """Whoever holds GPUs there was told, and nobody who was not."""
        holding = set(Contract.objects.values_list("pk", flat=True))
        assert set(MaintenanceNotice.objects.values_list("contract_id", flat=True)) == holding
        assert OutboxMessage.objects.filter(topic=maintenance.NOTICE).count() == len(holding)


@pytest.mark.parametrize("round_", range(3))
def test_signed_and_announced_at_once(round_):
    world = World()
    answers = outcome(at_once([world.accept, world.announce]))
    assert answers in ({"Contract": 1, "Maintenance": 1}, {"capacity_gone": 1, "Maintenance": 1})
    world.sound()


def test_a_buyer_who_comes_while_it_is_announced_waits_and_knows(monkeypatch):
    world, rival = World(), []
    look = planning.impact

    def meanwhile(*args, **kwargs):
        rival.append(in_thread(world.accept))
        return look(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(planning, "impact", meanwhile)
        world.announce()
    refused = rival[0]()
    assert isinstance(refused, MarketError)
    assert refused.code == "capacity_gone"
    assert refused.extra["alternatives"]["later"]["starts_at"] >= END
    world.sound()


def test_an_announcement_that_comes_while_a_contract_is_signed_waits_and_counts_it(monkeypatch):
    world, rival = World(), []
    look = holds.maintained

    def meanwhile(reservation):
        rival.append(in_thread(world.announce))
        return look(reservation)

    with monkeypatch.context() as patch:
        patch.setattr(holds, "maintained", meanwhile)
        contract = world.accept()
    assert isinstance(rival[0](), Maintenance)
    (notice,) = MaintenanceNotice.objects.all()
    assert (notice.contract, notice.short_gpus) == (contract, 8)
    world.sound()


def test_many_clocks_take_and_give_back_once():
    world = World()
    world.accept()
    world.announce()
    for at in (START - 15 * timedelta(minutes=1), START, END):
        at_once([lambda at=at: maintenance.clock(at)] * 4)
    row = Maintenance.objects.get()
    assert row.state == "completed"
    assert [h.state for h in Host.objects.all()] == ["active"]
    (shortfall,) = row.shortfalls.all()
    assert (shortfall.starts_at, shortfall.ends_at, shortfall.gpus) == (START - timedelta(minutes=15), END, 8)
    assert MaintenanceHost.objects.get().given_back_at == END


@pytest.mark.parametrize("where", ["taken", "record", "give_back"])
def test_a_worker_that_is_killed_between_two_steps_is_followed_by_another(monkeypatch, where):
    world = World()
    world.accept()
    world.announce()

    def killed(*_args, **_kwargs):
        raise Killed

    target = {"taken": (taking.drains, "leave"), "record": (taking, "record"), "give_back": (announcing, "move")}[where]
    for at in (START - 15 * timedelta(minutes=1), START, END):
        with monkeypatch.context() as patch:
            patch.setattr(*target, killed)
            with suppress(Killed):
                maintenance.clock(at)
        maintenance.clock(at)
        maintenance.clock(at)
    row = Maintenance.objects.get()
    assert (row.state, Host.objects.get().state) == ("completed", "active")
    assert [(s.starts_at, s.ends_at) for s in row.shortfalls.all()] == [(START - timedelta(minutes=15), END)]


def test_cancelled_and_taken_at_once():
    world = World()
    world.announce()
    at_once(
        [
            lambda: maintenance.cancel(world.operator, world.row, now=START - HOUR / 4),
            lambda: maintenance.clock(START - HOUR / 4),
        ]
    )
    maintenance.clock(START)
    assert Maintenance.objects.get().state == "cancelled"
    assert Host.objects.get().state == "active"
    assert not Reservation.objects.filter(maintenance=world.row, state="firm").exists()


def test_after_its_hold_a_quote_is_taken_around_it_as_well():
    world = World(hosts=2)
    maintenance.cancel(world.operator, world.row, now=NOW)
    held = world.quote.reservation.blocks.get().host
    row = maintenance.draft(
        world.operator, world.site, scope="hosts", hosts=[held], starts_at=START, ends_at=END, text="x", now=NOW
    )
    maintenance.announce(world.operator, row, now=NOW)
    contract = world.accept(now=LATER)
    assert contract.reservation.blocks.get().host != held
    assert not MaintenanceNotice.objects.exists()
