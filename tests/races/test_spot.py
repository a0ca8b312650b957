"""Intervals close once whatever happens beside it, on real connections: rivals that clear, limits that change, a host that dies."""

from datetime import timedelta

import pytest

from marketplace.models import Host, SpotInterval, SpotNotice, SpotResult
from marketplace.services import spot
from tests import factories as f
from tests.factories import NOW
from tests.threads import at_once

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
