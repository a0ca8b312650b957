"""Energy is accounted for once and a receipt is taken once, whoever else does it at the same instant; real connections."""

from datetime import timedelta

import pytest

from marketplace.models import PoolFeed, ProfitHour, Receipt, Site, SiteMinute
from marketplace.services import pool_payouts, profit, receipts
from tests import factories as f
from tests.factories import NOW
from tests.threads import at_once

pytestmark = pytest.mark.django_db(transaction=True)
HOUR = timedelta(hours=1)


def test_two_turns_of_the_loop_account_for_a_time_once():
    site = f.site()
    f.miner(site, measured_at=NOW)
    Site.objects.update(sampled_at=NOW)
    for n in range(1, 5):
        same = [Site.objects.get(pk=site.pk) for _ in range(4)]
        at_once([lambda row=row, n=n: f.accounted(row, now=NOW + timedelta(seconds=10 * n)) for row in same])
    profit.rebuild(site, NOW, NOW + HOUR)
    assert SiteMinute.objects.get().miners_mj == 3_500 * 40_000
    assert profit.uneven(site, NOW, NOW + HOUR) == []


def test_a_receipt_is_taken_once_and_hours_are_told_once():
    site = f.site()
    actor = f.actor(site.organization)
    paid = {
        "kind": "hashing",
        "source": "a pool",
        "reference": "7",
        "start": NOW,
        "end": NOW + 3 * HOUR,
        "amount_microusd": 1_000_000,
    }
    calls = [lambda: receipts.receive(site, actor=actor, now=NOW + 9 * HOUR, **paid).pk for _ in range(4)]
    calls += [lambda n=n: profit.rebuild(site, NOW + n * HOUR, NOW + (n + 1) * HOUR) for n in range(3)]
    answers = at_once(calls)
    assert Receipt.objects.count() == 1
    assert set(answers[:4]) == {Receipt.objects.get().pk}
    profit.rebuild(site, NOW, NOW + HOUR)
    rows = ProfitHour.objects.filter(kind="hashing")
    assert (len(rows), sum(row.paid_microusd for row in rows)) == (3, 1_000_000)


def test_a_pool_is_asked_once_and_its_payouts_taken_once_whoever_else_asks(monkeypatch):
    """One worker asks; a second one that had asked before (its feed was changed meanwhile) takes nothing twice."""
    site = f.site()
    row = pool_payouts.add(f.actor(site.organization), site, name="a pool", url="https://pool.example/", now=NOW)
    day = {"start": (NOW - 24 * HOUR).isoformat(), "end": NOW.isoformat(), "sat": 5, "usd": "1"}
    asked = []

    def answer(*_):
        asked.append(1)
        return [{"id": str(n), **day} for n in range(5)]

    monkeypatch.setattr(pool_payouts, "_ask", answer)
    same = [PoolFeed.objects.get(pk=row.pk) for _ in range(4)]
    taken = at_once([lambda each=each: pool_payouts.pull(each, now=NOW + HOUR) for each in same])
    assert (sorted(taken), len(asked)) == ([(0, []), (0, []), (0, []), (5, [])], 1)
    said = [pool_payouts.read({"id": str(n), **day}) for n in (5, 6)]
    pairs = [(each, payout) for payout in said for each in same]
    taken = at_once([lambda e=e, p=p: pool_payouts._take(e, p, NOW + HOUR) for e, p in pairs])
    assert sum(taken) in range(2, 9), "who comes second finds the receipt that it would have written"
    assert Receipt.objects.count() == 7
