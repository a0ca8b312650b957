"""Windows that have begun on hosts that fall sick, while others mend the same, buy, and bring the host back: nothing is sold twice."""

import threading
from datetime import timedelta

import pytest
from django.db import transaction

from marketplace.errors import MarketError
from marketplace.models import Contract, ContractEvent, Host, Reservation, Shortfall
from marketplace.services import conditions, contracts, gpu_health, quotes
from marketplace.services.contracts import healing
from tests import factories as f
from tests.factories import NOW
from tests.marketplace.out_of_work import STAFF, never_oversold
from tests.races.market import Market, blocked, sold
from tests.races.test_gpu_health import reporter
from tests.threads import at_once, in_thread

pytestmark = pytest.mark.django_db(transaction=True)
TERM = {"ends_at": NOW + timedelta(hours=48), "level": "host"}
LATER = NOW + timedelta(seconds=30)


class Fallen:
    """A window of eight GPUs on a host with a sick one; `spare` hosts beside it."""

    def __init__(self, spare=1):
        self.market = Market(hosts=1 + spare)
        with transaction.atomic():
            conditions.record(sites=[self.market.site.pk], now=NOW)
        self.contract = sold(self.market, 8, **TERM)
        self.host = Host.objects.get(pk=self.at)
        reporter(self.market, self.host)()

    @property
    def at(self):
        (block,) = self.contract.reservation.blocks.all()
        assert block.gpu_indices == list(range(8))
        return block.host_id

    def back(self):
        return gpu_health.well(Host.objects.get(pk=self.host.pk), actor=STAFF, now=LATER, why="replaced")

    def buy(self, gpus=8):
        buyer = f.actor(f.organization())
        wanted = quotes.Request("reserved", gpus, **TERM)
        return contracts.accept(
            buyer, quotes.quote(buyer, self.market.contract.listing_id, wanted, now=LATER).pk, now=LATER
        )

    def sound(self):
        never_oversold(self.market)
        held = [sum(len(b.gpu_indices) for b in r.blocks.all()) for r in Reservation.objects.filter(state="firm")]
        assert held == [8] * len(held)
        assert Shortfall.objects.filter(contract=self.contract).count() <= 1


def test_many_who_mend_at_once_mend_once():
    fallen = Fallen(spare=3)
    answers = at_once([lambda: healing.heal(LATER)] * 6)
    assert sorted(answers) == [0, 0, 0, 0, 0, 1]
    assert fallen.at != fallen.host.pk
    assert [(s.starts_at, s.ends_at) for s in Shortfall.objects.all()] == [(NOW, LATER)]
    assert ContractEvent.objects.filter(actor=healing.ACTOR).count() == 1
    fallen.sound()


def test_many_who_find_no_room_write_it_down_and_say_it_once():
    fallen = Fallen(spare=0)
    assert at_once([lambda: healing.heal(LATER)] * 6) == [0] * 6
    assert [(s.gpus, s.starts_at, s.ends_at) for s in Shortfall.objects.all()] == [(8, NOW, NOW + timedelta(hours=48))]
    assert ContractEvent.objects.filter(actor=healing.ACTOR).count() == 1
    fallen.sound()


def test_the_last_host_goes_to_who_stands_in_or_to_a_buyer_never_to_both():
    fallen = Fallen(spare=1)
    answers = at_once([lambda: healing.heal(LATER), *[fallen.buy] * 4])
    bought = Contract.objects.filter(kind="reserved").exclude(pk=fallen.contract.pk).count()
    moved = fallen.at != fallen.host.pk
    assert moved + bought == 1, answers
    assert answers[0] == moved
    healing.heal(LATER)
    (row,) = Shortfall.objects.all()
    assert row.ends_at == (LATER if moved else NOW + timedelta(hours=48))
    fallen.sound()


@pytest.fixture
def beside(monkeypatch):
    """A rival injected when room was found and is not yet taken: it goes as far as it gets. `join()`: its answer; `waited`: for us."""

    class Rival:
        def enters(self, act):
            grow, over = healing.holds.grow, threading.Event()

            def run():
                try:
                    return act()
                finally:
                    over.set()

            def slow(*args, **kwargs):
                self.join = in_thread(run)
                while not (blocked() or over.wait(0.01)):
                    pass
                self.waited = not over.is_set()
                return grow(*args, **kwargs)

            monkeypatch.setattr(healing.holds, "grow", slow)

    return Rival()


def test_a_buyer_between_the_look_and_the_hold_waits(beside):
    fallen = Fallen(spare=1)
    beside.enters(fallen.buy)
    assert healing.heal(LATER) == 1
    error = beside.join()
    assert beside.waited
    assert isinstance(error, MarketError)
    assert error.code == "no_capacity"
    fallen.sound()


def test_the_host_returns_in_the_midst_and_waits_and_is_for_sale_then(beside):
    fallen = Fallen(spare=1)
    beside.enters(fallen.back)
    assert healing.heal(LATER) == 1
    assert beside.join().state == "active"
    assert beside.waited
    assert fallen.at != fallen.host.pk
    assert fallen.buy().reservation.blocks.get().host_id == fallen.host.pk
    fallen.sound()


def test_a_second_who_mends_waits_and_finds_it_done(beside):
    fallen = Fallen(spare=2)
    heal = healing.heal
    beside.enters(lambda: heal(LATER))
    assert heal(LATER) == 1
    assert beside.join() == 0
    assert beside.waited
    fallen.sound()


def test_mended_and_returned_at_once_it_has_its_eight_gpus_and_pays_for_no_second_without():
    fallen = Fallen(spare=1)
    answers = at_once([lambda: healing.heal(LATER), fallen.back, lambda: healing.heal(LATER), fallen.buy])
    assert not [a for a in answers if isinstance(a, str) and a != "no_capacity"], answers
    healing.heal(LATER)
    (row,) = Shortfall.objects.all() or [None]
    assert row is None or (row.starts_at, row.ends_at) == (NOW, LATER)
    assert contracts.missing(fallen.contract, LATER) == (0, None)
    assert Host.objects.get(pk=fallen.at).state == "active"
    fallen.sound()
