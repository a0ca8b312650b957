"""Two hundred bids, resales and their withdrawals on one piece, at once: exact, within every limit, nothing sold twice."""

from collections import Counter

import pytest

from marketplace.models import Contract, Fill, Quote, Resale, StandingBid
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


@pytest.mark.parametrize("total", [40, pytest.param(200, marks=pytest.mark.full)])
def test_bids_and_resales_on_one_piece(total):
    """Bids of ten limits come in batches beside offers, withdrawals and several lookers."""
    desk = Desk()
    buyers = [desk.buyer() for _ in range(10)]
    made = []
    for first in range(0, total, 20):
        calls = [
            lambda n=n: bid(desk, buyers[n % 10], ASK - 4 + n % 10, auto_accept=True)
            for n in range(first, min(total, first + 18))
        ]
        calls += [lambda: desk.offer(gpus=1), lambda: look(desk)]
        made += at_once(calls)
        open_ = Resale.objects.filter(state="open").first()
        if open_ is not None and first % 40:
            at_once([lambda r=open_: resales.withdraw(desk.holder, r, now=NOW), lambda: look(desk), lambda: look(desk)])
    while look(desk).bought:
        pass
    desk.sound()
    for row in StandingBid.objects.all():
        fills = list(Fill.objects.filter(bid=row))
        assert sum(f.gpu_count for f in fills) == row.filled_gpus <= row.gpu_count
        assert all(f.price <= row.limit_price for f in fills)
    assert Fill.objects.count() == Contract.objects.count() - 1
    sold = sum(Resale.objects.values_list("sold_gpus", flat=True))
    assert sold == Fill.objects.count() > 0


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
