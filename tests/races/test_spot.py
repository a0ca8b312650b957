"""Intervals close once whatever happens beside it, on real connections: rivals that clear, limits that change, a host that dies."""

import time
from datetime import timedelta

import pytest
from django.db import transaction

from marketplace.locks import Lock, acquire
from marketplace.models import Host, OutboxMessage, ReservationBlock, SpotInterval, SpotNotice, SpotResult
from marketplace.services import contracts, leases, quotes, spot
from tests import factories as f
from tests.factories import NOW
from tests.races.market import blocked
from tests.threads import at_once, in_thread

pytestmark = pytest.mark.django_db(transaction=True)
FLOOR = 1_000_000
FIRST = NOW + timedelta(minutes=5)
LEAD = FIRST - timedelta(minutes=1)


def world(bids: int):
    site = f.site()
    hosts = [f.host(site), f.host(site)]
    listing = f.listing(site, hosts=hosts, spot_floor=FLOOR)
    contracts = [
        f.contract(listing, kind="spot", limit_price=(2 + n) * FLOOR, gpu_count=4, price=FLOOR) for n in range(bids)
    ]
    placed = []
    for n, contract in enumerate(contracts):
        job = f.job(contract, gpus=4, state="running")
        if n < 4:
            where = hosts[n // 2]
            placed.append(
                f.placement(job, where, [4 * (n % 2) + i for i in range(4)], state="running", running_at=NOW, attempt=0)
            )
    return site, hosts, listing, contracts, placed


def sound(listing):
    """One row an interval; its results add up to it, and none of them breaks its limit."""
    (row,) = SpotInterval.objects.filter(listing=listing)
    results = list(SpotResult.objects.filter(interval=row))
    assert sum(r.won_milli for r in results) == row.sold_milli <= row.supply_milli
    assert sum(r.wanted_milli for r in results) == row.demand_milli
    winners = [r for r in results if r.won_milli]
    assert all(row.floor <= row.price <= r.limit_price for r in winners)
    assert all(r.limit_price <= row.price for r in results if not r.won_milli and r.reason == "outbid")
    return row, results


def test_two_workers_clear_one_interval_once():
    site, _, listing, _, _ = world(6)
    answers = at_once([lambda: spot.close(site.cell_id, now=LEAD) for _ in range(6)])
    assert sorted(len(a) for a in answers) == [0, 0, 0, 0, 0, 1]
    row, _ = sound(listing)
    assert (row.supply_milli, row.sold_milli, row.price) == (16_000, 16_000, 3 * FLOOR)


def test_a_loser_is_told_once_and_leaves_once():
    site, _, _, _, placed = world(6)
    at_once([lambda: spot.run(site.cell_id, now=LEAD) for _ in range(4)])
    assert sorted(n.job_id for n in SpotNotice.objects.all()) == sorted(p.job_id for p in placed[:2])
    left = at_once([lambda: spot.leave(site.cell_id, now=FIRST + timedelta(minutes=2)) for _ in range(4)])
    assert sorted(pk for answer in left for pk in answer) == sorted(p.job_id for p in placed[:2])


def test_an_auction_while_limits_change_and_a_host_dies():
    site, hosts, listing, contracts, _ = world(6)

    def dies():
        Host.objects.filter(pk=hosts[0].pk).update(state="lost")
        return "lost"

    changes = [
        lambda c=c, n=n: spot.set_limit(f.actor(c.organization), c, (9 - n) * FLOOR, now=LEAD)
        for n, c in enumerate(contracts)
    ]
    answers = at_once(
        [*changes, dies, lambda: spot.close(site.cell_id, now=LEAD), lambda: spot.close(site.cell_id, now=LEAD)]
    )
    assert not [a for a in answers if isinstance(a, Exception)]
    row, results = sound(listing)
    assert row.supply_milli in {8_000, 16_000}
    for result in results:
        n = next(n for n, c in enumerate(contracts) if c.pk == result.contract_id)
        assert result.limit_price in {(2 + n) * FLOOR, (9 - n) * FLOOR}


class Changing:
    """Five hosts, spot on two of them, 20 GPUs reserved by two contracts; who buys, changes, ends and dies there."""

    def __init__(self):
        self.site, self.hosts, self.listing, self.bids, self.placed = world(6)
        self.agent, _ = f.agent(self.site, last_sync_at=LEAD, lease_until=LEAD + timedelta(hours=1))
        Host.objects.update(beat_at=LEAD)
        more = [f.host(self.site, beat_at=LEAD) for _ in range(3)]
        Host.objects.filter(pk__in=[host.pk for host in more]).update(listing=self.listing)
        self.hosts += more
        self.until = NOW + timedelta(days=4)
        self.holder, self.buyer, self.grower = (f.actor(f.organization()) for _ in range(3))
        self.held = self.reserves(self.holder, 16)
        self.wanted = self.quoted(self.buyer, 8)
        self.grows = self.reserves(self.grower, 4)
        self.resize = contracts.amendments.resize(self.grower, self.grows, 6, now=NOW)

    def quoted(self, actor, gpus):
        asked = quotes.Request("reserved", gpus, starts_at=FIRST + timedelta(minutes=4), ends_at=self.until)
        return quotes.quote(actor, self.listing.pk, asked, now=NOW)

    def reserves(self, actor, gpus):
        return contracts.accept(actor, self.quoted(actor, gpus).pk, now=NOW)

    def dies(self):
        """The first host has had no beat for longer than it may; its site speaks."""
        Host.objects.filter(pk=self.hosts[0].pk).update(beat_at=LEAD - 2 * leases.HOST_SILENT)
        with transaction.atomic():
            acquire((Lock.SITE, self.site.pk))
            leases.watch(self.site, now=LEAD)
        return "died"

    def rivals(self):
        loser, winner = self.bids[0], self.bids[5]
        return [
            lambda: contracts.accept(self.buyer, self.wanted.pk, now=LEAD),
            lambda: contracts.accept_amendment(self.grower, self.resize, now=LEAD),
            lambda: contracts.terminate(self.holder, self.held, now=LEAD),
            lambda: contracts.terminate(f.actor(winner.organization), winner, now=LEAD),
            lambda: spot.set_limit(f.actor(loser.organization), loser, 9 * FLOOR, now=LEAD),
            self.dies,
        ]

    def sound(self):
        """What is promised stands on distinct GPUs, nothing was sold beyond the supply or a limit, and each that signed is charged once."""
        firm = ReservationBlock.objects.filter(reservation__state="firm")
        taken = [(block.host_id, index) for block in firm for index in block.gpu_indices]
        assert len(taken) == len(set(taken)) == 16 + 6 + 8
        row = SpotInterval.objects.get(listing=self.listing, start=FIRST)
        results = list(SpotResult.objects.filter(interval=row))
        assert sum(r.won_milli for r in results) == row.sold_milli <= row.supply_milli
        assert all(row.price <= r.limit_price for r in results if r.won_milli)
        charged = OutboxMessage.objects.filter(topic=contracts.ACCEPTED).values_list("payload__contract", flat=True)
        assert len(charged) == len(set(charged)) == 3


def settle(world):
    """The interval is cleared, its losers told, and those who must leave do; the next one has another supply."""
    spot.run(world.site.cell_id, now=LEAD)
    spot.run(world.site.cell_id, now=FIRST + timedelta(minutes=4))
    return SpotInterval.objects.get(listing=world.listing, start=FIRST + timedelta(minutes=5))


def clears_while_they_come(monkeypatch):
    """All of them come between the look at the supply and the row: whoever holds or frees capacity waits for the cell, and what
    dies meanwhile is missing from the next auction on.
    """
    here = Changing()
    begun, ended = [], []
    look = spot.spare_milli

    def to_its_end(act):
        try:
            return act()
        finally:
            ended.append(act)

    def meanwhile(*args, **kwargs):
        found = look(*args, **kwargs)
        if not begun:
            begun.extend(in_thread(lambda act=act: to_its_end(act)) for act in here.rivals())
            while len(ended) + blocked() < len(begun):  # in this order nobody counts twice
                time.sleep(0.02)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(spot, "spare_milli", meanwhile)
        (row,) = spot.close(here.site.cell_id, now=LEAD)
    answers = [join() for join in begun]
    assert not [a for a in answers if isinstance(a, Exception)], answers
    assert (row.supply_milli, row.sold_milli, row.price) == (20_000, 20_000, 2 * FLOOR)  # as of before all of them
    return here


def test_an_auction_that_clears_while_contracts_change_and_a_host_dies_in_its_midst(monkeypatch):
    here = clears_while_they_come(monkeypatch)
    here.sound()
    after = settle(here)
    # What is reserved by now, the buyer's and the two more GPUs with it, and the dead host are not for sale.
    assert after.supply_milli == 1000 * sum(
        8 - len({i for b in ReservationBlock.objects.filter(host=h, reservation__state="firm") for i in b.gpu_indices})
        for h in here.hosts[1:]
    )
    won = {r.contract_id: r.won_milli for r in SpotResult.objects.filter(interval=after)}
    assert here.bids[5].pk not in won, "it was ended"
    assert won[here.bids[0].pk] == 4000, "its limit is the highest by now"
    assert sum(won.values()) == after.sold_milli <= after.supply_milli


def test_without_its_lock_an_auction_is_seen_to_clear_what_is_not_there_any_more(monkeypatch):
    """What the test above would not be worth without: nobody waits, and the row is of no moment that ever was."""
    monkeypatch.setattr(spot, "acquire", lambda *_: None)
    with pytest.raises(AssertionError, match=str(2 * FLOOR)):
        clears_while_they_come(monkeypatch)


def test_an_auction_and_all_that_may_happen_beside_it_in_any_order():
    here = Changing()
    answers = at_once([*here.rivals(), *[lambda: spot.run(here.site.cell_id, now=LEAD)] * 3])
    assert not [a for a in answers if isinstance(a, str) and a != "died"], answers
    here.sound()
    after = settle(here)
    assert after.supply_milli <= 1000 * 8 * (len(here.hosts) - 1)
