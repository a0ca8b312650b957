"""The calendar says what `largest` says of each of its windows, of one listing and of many, in a bounded number of statements."""

import random
from datetime import timedelta

import pytest

from marketplace.models import Host, Reservation, ReservationBlock
from marketplace.services import availability, calendars, catalogue
from marketplace.services.search import Filters
from marketplace.tenancy import SYSTEM
from scheduler.core.capacity import LEVELS
from tests import factories
from tests.factories import NOW
from tests.marketplace.changing import Market
from tests.marketplace.trade import DAY, HOUR, ask, refused


def grown(dice):
    """A market after some changes, and its published listings."""
    market = Market(dice)
    for _ in range(15):
        try:
            market.change(NOW)
        except Host.DoesNotExist:
            continue
    return list(calendars.search.on_offer(SYSTEM).select_related("site"))


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["reserved", "on_demand"])
def test_every_cell_is_what_largest_says_of_its_window(seed, kind):
    dice = random.Random(seed)
    catalogue.forget()
    rows = grown(dice)
    step = dice.choice([HOUR, 5 * HOUR, DAY])
    cuts = calendars.steps(NOW - HOUR, NOW + 6 * step, step, NOW)
    assert cuts[0][0] == NOW
    assert rows
    for row in rows:
        for cell in calendars.of_listing(row, cuts, now=NOW, kind=kind):
            for level in LEVELS:
                window = {"now": NOW, "kind": kind, "level": level, "starts_at": cell.start, "ends_at": cell.end}
                assert cell.gpus[level] == availability.largest(row, **window)
    for level in LEVELS:
        count = dice.choice([1, 8])
        found = calendars.of_search(SYSTEM, Filters(kind=kind, count=count, level=level), cuts, now=NOW)
        for cell in found:
            window = {"now": NOW, "kind": kind, "level": level, "starts_at": cell.start, "ends_at": cell.end}
            offered = [r for r in rows if r.price_of(kind) is not None and r.min_gpus <= count]
            stock = {r.pk: availability.largest(r, **window) for r in offered}
            fitting = sorted((r.price_of(kind), r.pk) for r in offered if stock[r.pk] >= max(count, r.min_gpus))
            assert cell.gpus == max(stock.values(), default=0)
            assert (cell.offers, cell.cheapest) == (len(fitting), fitting[0][1] if fitting else None)


@pytest.mark.django_db
def test_a_window_that_fits_can_be_quoted_and_no_earlier_one_can(customer):
    site = factories.site()
    listing = factories.listing(
        site, hosts=[factories.host(site, leaf=f"leaf-{i}") for i in range(2)], min_term_hours=12
    )
    busy = ask(customer, listing, gpus=8, start=NOW + HOUR, end=NOW + 3 * DAY)
    window = {
        "gpus": 16,
        "level": "spine",
        "span": DAY,
        "starts_at": NOW,
        "ends_at": NOW + 9 * DAY,
        "now": NOW,
        "kind": "reserved",
    }
    (found,) = calendars.first_windows(listing, **window)
    assert found == (busy.ends_at + timedelta(minutes=4), NOW + 9 * DAY)
    other = factories.organization()
    refused("no_capacity", ask, other, listing, gpus=16, start=found[0] - timedelta(minutes=1), end=found[1])
    ask(other, listing, gpus=16, start=found[0], end=found[1])
    assert calendars.first_windows(listing, **{**window, "gpus": 32}) == []
    assert (
        calendars.first_windows(listing, **{**window, "span": 400 * DAY, "ends_at": NOW + 900 * DAY}) == []
    )  # its terms


@pytest.mark.django_db
def test_statements_do_not_grow_with_steps_or_bookings(django_assert_num_queries):
    site = factories.site()
    listing = factories.listing(site, hosts=[factories.host(site) for _ in range(3)])
    for i, host in enumerate(listing.hosts.all()):
        held = Reservation.objects.create(
            listing=listing, starts_at=NOW + i * DAY, claims_at=NOW + i * DAY, ends_at=NOW + (i + 2) * DAY, state="firm"
        )
        ReservationBlock.objects.create(reservation=held, host=host, gpu_indices=[0, 1])
    for days in (3, 300):
        cuts = calendars.steps(NOW, NOW + days * DAY, DAY, NOW)
        with django_assert_num_queries(4):
            market = availability.load([listing], NOW)
            calendars.of_listing(listing, cuts, now=NOW, kind="reserved", market=market)
            calendars.first_windows(
                listing,
                gpus=24,
                level="site",
                span=DAY,
                starts_at=NOW,
                ends_at=cuts[-1][1],
                now=NOW,
                kind="reserved",
                market=market,
            )


@pytest.mark.django_db
def test_a_private_listing_is_in_the_calendar_of_its_partner_alone(customer):
    site = factories.site()
    listing = factories.listing(site, hosts=[factories.host(site)], visibility="partners")
    listing.partners.add(customer)
    cuts = calendars.steps(NOW, NOW + DAY, DAY, NOW)

    def seen(organization):
        return [c.gpus for c in calendars.of_search(factories.actor(organization), Filters(), cuts, now=NOW)]

    assert (seen(customer), seen(factories.organization()), seen(site.organization)) == ([8], [0], [8])
