"""Two hundred bids, resales and their withdrawals on one piece, at once: exact, within every limit, nothing sold twice."""

from collections import Counter
from random import Random

import pytest

from marketplace.models import Contract, Fill, OutboxMessage, Quote, Resale, StandingBid
from marketplace.services import contracts
from marketplace.services.forward import bids, resales
from tests import factories
from tests.factories import NOW
from tests.marketplace.reselling import ASK, DAY, START, Desk
from tests.races.test_booking import outcome
from tests.threads import at_once

pytestmark = pytest.mark.django_db(transaction=True)
FROM, TO = START + 2 * DAY, START + 4 * DAY


def bid(desk, actor, limit, **fields):
    asked = bids.Wanted(
        desk.listing.gpu_model.name, desk.site.region, 1, FROM, int((TO - FROM).total_seconds()), limit, FROM, **fields
    )
    return bids.place(actor, asked, now=NOW)


def look(desk):
    return bids.run(True, desk.listing.gpu_model_id, desk.site.region, now=NOW)


@pytest.mark.parametrize("connections", [64, pytest.param(150, marks=pytest.mark.full)])
def test_bids_and_resales_on_one_piece(connections):
    """All of it begins at one barrier: seven in ten bid, the others offer, withdraw, buy by hand and look at the book."""
    total = 200
    desk = Desk()
    buyers = [desk.buyer() for _ in range(10)]
    standing = [desk.offer(gpus=1) for _ in range(3)]
    quote = desk.quote(desk.buyer(), standing[0], 1)
    by_hand = factories.actor(quote.organization)
    calls = [lambda: contracts.accept(by_hand, quote.pk, now=NOW)]
    calls += [lambda r=row: resales.withdraw(desk.holder, r, now=NOW) for row in standing[1:]]
    calls += [lambda: desk.offer(gpus=1) for _ in range(total // 20)]
    calls += [lambda: look(desk) for _ in range(total // 10)]
    calls += [
        lambda n=n: bid(desk, buyers[n % 10], ASK - 4 + n % 10, auto_accept=True) for n in range(total - len(calls))
    ]
    dice = Random(total)
    dice.shuffle(calls)
    answers = at_once(calls, connections)
    assert set(outcome(answers)) <= {"StandingBid", "Resale", "Looked", "Contract", "no_capacity", "illegal_transition"}
    assert len(answers) == total
    while look(desk).bought:
        pass
    desk.sound()
    for row in StandingBid.objects.all():
        fills = list(Fill.objects.filter(bid=row))
        assert sum(f.gpu_count for f in fills) == row.filled_gpus <= row.gpu_count
        assert all(f.price <= row.limit_price for f in fills)
    made = Contract.objects.exclude(pk=desk.contract.pk)
    assert Fill.objects.count() == made.count() >= len(standing) - 1
    sold = sum(Resale.objects.values_list("sold_gpus", flat=True))
    assert sold == Fill.objects.count()
    charged = OutboxMessage.objects.filter(topic=contracts.ACCEPTED).values_list("payload__contract", flat=True)
    assert sorted(charged) == sorted(Contract.objects.values_list("pk", flat=True)), "each is charged, and charged once"
    if StandingBid.objects.filter(state="open", limit_price__gte=ASK).exists():
        assert not any(row.left for row in Resale.objects.filter(state="open")), "who waits would have bought it"


def test_several_who_look_at_one_book_quote_each_bid_once():
    desk = Desk()
    rows = [bid(desk, desk.buyer(), ASK + n) for n in range(6)]
    desk.offer(gpus=4)
    answers = at_once([lambda: look(desk)] * 5)
    assert outcome(answers) == {"Looked": 5}
    quoted = Counter(Quote.objects.exclude(bid=None).values_list("bid", flat=True))
    assert quoted == {row.pk: 1 for row in rows[2:]}  # the four highest
    desk.sound()


def test_cancelled_and_met_at_once():
    """The bid has its contract or is cancelled without one; never both."""
    desk = Desk()
    row = bid(desk, desk.buyer(), ASK, auto_accept=True)
    desk.offer(gpus=1)
    actor = factories.actor(row.organization)
    at_once([lambda: look(desk), lambda: bids.cancel(actor, row, now=NOW)])
    row.refresh_from_db()
    assert (row.state, Fill.objects.count()) in {("filled", 1), ("cancelled", 0)}
    desk.sound()


def test_a_bid_and_a_buyer_want_the_last_gpu():
    desk = Desk()
    resale = desk.offer(gpus=1)
    bid(desk, desk.buyer(), ASK, auto_accept=True)
    quote = desk.quote(desk.buyer(), resale, 1)
    answers = at_once(
        [lambda: look(desk), lambda: contracts.accept(factories.actor(quote.organization), quote.pk, now=NOW)]
    )
    assert outcome(answers) == {"Looked": 1, "Contract": 1}  # the hold was there first
    assert Fill.objects.get().bid is None
    desk.sound()
