"""What a holder has in pieces while parts of it are sold on, and what is on record of it afterwards."""

from datetime import timedelta

import pytest

from marketplace.services import contracts
from marketplace.services.forward import pieces
from tests.marketplace.reselling import DAY, END, START, Desk

pytestmark = pytest.mark.django_db
FROM, TO = START + 2 * DAY, START + 4 * DAY


@pytest.fixture
def desk():
    return Desk()


def test_the_pieces_are_one_again_when_the_sold_window_is_over(desk):
    contract = desk.buy(desk.buyer(), desk.offer())
    contracts.clock(TO)
    contract.refresh_from_db()
    assert contract.state == "ended"
    (row,) = desk.contract.reservations.filter(state="firm")  # also of what was before the sold window
    assert (row.starts_at, sum(len(b.gpu_indices) for b in row.blocks.all())) == (START, 8)
    assert contracts.amendments.extend(desk.holder, desk.contract, END + DAY, now=TO)


def test_who_held_what_stays_on_record_when_the_rest_is_one_again(desk):
    """Half is sold to the end, the other half until that begins: what comes back is all there is from then on."""
    desk.buy(desk.buyer(), desk.offer(gpus=4, start=TO, end=END))
    desk.buy(desk.buyer(), desk.offer(gpus=4, start=FROM, end=TO))
    before = desk.strips(desk.contract)
    own = desk.contract.reservation
    now = TO + timedelta(seconds=21)
    contracts.clock(now)
    there = desk.contract.reservations.exclude(state="released", ends_at__gt=now).prefetch_related("blocks")
    assert sorted(pieces.strips_of(there)) == sorted(before)
    assert desk.contract.reservation == own  # it goes on as long as anything does
    assert (own.ends_at, desk.contract.reservation.ends_at) == (FROM - (START - own.claims_at), END)
