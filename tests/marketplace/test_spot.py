"""The spot market: each interval has one price, made before it begins; who loses is told and leaves; nobody pays over his limit."""

from datetime import timedelta

import pytest
from django.db import IntegrityError, transaction

from billing import usage
from billing.models import PriceVersion, UsageRecord
from marketplace.errors import MarketError
from marketplace.models import (
    AuditEvent,
    Contract,
    JobEvent,
    Listing,
    Placement,
    PlacementEvent,
    Reservation,
    ReservationBlock,
    SpotInterval,
    SpotNotice,
    SpotResult,
)
from marketplace.services import feeds, listings, placements, quotes, spot, spot_prices
from scheduler import snapshot
from tests import factories as f
from tests.factories import NOW

pytestmark = pytest.mark.django_db
FLOOR = 1_000_000
FIVE, MINUTE = timedelta(minutes=5), timedelta(minutes=1)
FIRST = NOW + FIVE  # the first interval whose price is made
LEAD = FIRST - 2 * MINUTE


class Market:
    def __init__(self, gpus=8, **listing):
        self.operator = f.organization(is_operator=True)
        self.site = f.site(self.operator)
        self.host = f.host(self.site, gpus=gpus)
        self.listing = f.listing(self.site, hosts=[self.host], **{"spot_floor": FLOOR, **listing})
        self.cell = self.site.cell_id
        self.used = 0

    def bid(self, limit, *, gpus=8, **fields):
        return f.contract(
            self.listing, kind="spot", limit_price=limit, gpu_count=gpus, price=min(limit, FLOOR), **fields
        )

    def runs(self, contract, gpus=1, *, since=NOW, **fields):
        job = f.job(contract, gpus=gpus, state="running", **fields)
        self.host.refresh_from_db()
        indices = range(self.used, self.used + gpus)
        self.used += gpus
        return f.placement(
            job, self.host, list(indices), state="running", running_at=since, created_at=since, attempt=0
        )

    def close(self, at=LEAD):
        return spot.close(self.cell, now=at)

    def price(self, start=FIRST):
        return SpotInterval.objects.get(listing=self.listing, start=start).price


@pytest.fixture
def market():
    return Market()


def result(contract, start=FIRST):
    row = SpotResult.objects.get(contract=contract, start=start)
    return row.outcome, row.won_milli // 1000, row.price, row.reason


def test_an_interval_has_its_price_two_minutes_before_it_begins(market):
    assert market.close(LEAD - timedelta(seconds=1)) == []
    (made,) = market.close()
    assert (made.start, made.price, made.floor, made.supply_milli, made.sold_milli, made.carried) == (
        FIRST, FLOOR, FLOOR, 8000, 0, False
    )  # fmt: skip
    assert market.close(LEAD + MINUTE) == []
    assert spot_prices.in_force([market.listing.pk], LEAD) == {}
    assert spot_prices.upcoming(market.listing, LEAD) == made
    assert spot_prices.in_force([market.listing.pk], FIRST) == {market.listing.pk: made}


def test_the_highest_bids_that_fit_win_at_the_price_of_the_first_that_does_not(market):
    high, large, small, low = (market.bid(n * FLOOR) for n in (5, 4, 3, 2))
    for contract, gpus in ((high, 6), (large, 4), (small, 2), (low, 1)):
        f.job(contract, gpus=gpus)
    market.close()
    assert market.price() == 2 * FLOOR
    assert [result(c) for c in (high, large, small, low)] == [
        ("won", 6, 2 * FLOOR, ""),
        ("lost", 0, 2 * FLOOR, "does_not_fit"),
        ("won", 2, 2 * FLOOR, ""),
        ("lost", 0, 2 * FLOOR, "outbid"),
    ]


def test_a_contract_asks_for_no_more_than_its_ceiling_and_first_for_what_runs(market):
    contract = market.bid(3 * FLOOR, gpus=4)
    waiting = f.job(contract, gpus=4, priority=9)
    running = market.runs(contract, 3).job
    market.close()
    row = SpotResult.objects.get(contract=contract)
    assert (row.wanted_milli, row.won_milli, row.lost_jobs) == (3000, 3000, [])
    assert waiting.pk != running.pk


def test_a_job_with_a_limit_of_its_own_bids_that(market):
    contract = market.bid(5 * FLOOR)
    job = f.job(contract, gpus=2, price_limit=FLOOR - 1, ruled=True)
    f.job(contract, gpus=2)
    market.close()
    row = SpotResult.objects.get(contract=contract)
    assert (row.outcome, row.won_milli, row.lost_jobs, row.reason) == ("part", 2000, [job.pk], "under_floor")


def test_firm_work_claims_and_broken_gpus_are_not_for_sale(market):
    firm = f.contract(market.listing)
    market.runs(firm, 2)
    market.host.gpus.filter(index=2).update(healthy=False)
    held = Reservation.objects.create(
        listing=market.listing, starts_at=FIRST + 5 * MINUTE, ends_at=FIRST + 60 * MINUTE, claims_at=FIRST + 4 * MINUTE, state="firm"
    )  # fmt: skip
    ReservationBlock.objects.create(reservation=held, host=market.host, gpu_indices=[2, 3])
    (made,) = market.close()
    assert made.supply_milli == 4000
    assert spot.spare_milli([market.listing], start=FIRST - FIVE, now=NOW) == {market.listing.pk: 5000}


@pytest.mark.parametrize("state", ["lost", "draining", "maintenance"])
def test_a_host_that_does_not_work_is_not_for_sale(market, state):
    type(market.host).objects.filter(pk=market.host.pk).update(state=state)
    (made,) = market.close()
    assert (made.supply_milli, made.price) == (0, FLOOR)


def test_an_interval_that_nobody_auctioned_carries_the_price_before_it(market):
    winner = market.bid(9 * FLOOR)
    rival = market.bid(4 * FLOOR)
    market.runs(winner, 8)
    f.job(rival, gpus=1)
    market.close()
    assert market.price() == 4 * FLOOR
    late = FIRST + 3 * FIVE + MINUTE
    made = market.close(late)
    assert [(row.start, row.price, row.carried) for row in made] == [
        (FIRST + n * FIVE, 4 * FLOOR, True) for n in (1, 2, 3)
    ]
    assert not SpotResult.objects.filter(start__gt=FIRST).exists()
    (made,) = market.close(FIRST + 4 * FIVE - MINUTE)
    assert (made.start, made.price, made.carried) == (FIRST + 4 * FIVE, 4 * FLOOR, False)


def test_a_price_never_changes_and_an_interval_is_sold_once(market):
    (made,) = market.close()
    with pytest.raises(IntegrityError), transaction.atomic():
        SpotInterval.objects.create(**{**_columns(made), "price": made.price + 1})
    with pytest.raises(IntegrityError), transaction.atomic():
        SpotInterval.objects.create(**{**_columns(made), "start": FIRST + FIVE, "price": made.floor - 1})


def _columns(row):
    return {f.attname: getattr(row, f.attname) for f in SpotInterval._meta.concrete_fields if f.name != "id"}


# --- effects
def test_who_loses_is_told_and_leaves_when_the_interval_begins(market):
    low, high = market.bid(2 * FLOOR), market.bid(5 * FLOOR)
    stays, goes = market.runs(high, 4), market.runs(low, 4)
    f.job(high, gpus=4)
    spot.run(market.cell, now=LEAD)
    notice = SpotNotice.objects.get()
    assert (notice.job, notice.told_at, notice.leaves_at) == (goes.job, LEAD, FIRST)
    said = JobEvent.objects.filter(job=goes.job).latest("id").reason
    assert (
        said
        == "notice: others came before it at a spot price of 2 USD per GPU-hour, the limit is 2; it leaves at 2026-11-02 12:05:00 UTC"
    )
    spot.run(market.cell, now=FIRST - timedelta(seconds=1))
    goes.refresh_from_db()
    assert (goes.state, SpotNotice.objects.count()) == ("running", 1)
    spot.run(market.cell, now=FIRST)
    goes.refresh_from_db(), stays.refresh_from_db()
    assert (goes.state, goes.desired, goes.job.__class__.objects.get(pk=goes.job_id).state) == (
        "draining",
        "drain",
        "preempting",
    )
    assert goes.reason.startswith(spot.OUTBID)
    assert stays.state == "running"
    spot.run(market.cell, now=FIRST + MINUTE)
    assert SpotNotice.objects.count() == 1


def test_a_longer_notice_is_kept_and_withdrawn_when_the_limit_is_good_again(market):
    low, high = market.bid(2 * FLOOR, eviction_notice_s=600), market.bid(5 * FLOOR)
    goes = market.runs(low, 4)
    rival = f.job(high, gpus=8)
    spot.run(market.cell, now=LEAD)
    assert SpotNotice.objects.get().leaves_at == LEAD + timedelta(seconds=600)
    type(rival).objects.filter(pk=rival.pk).update(state="cancelled")
    for at in (FIRST + 3 * MINUTE, FIRST + 8 * MINUTE):
        spot.run(market.cell, now=at)
    goes.refresh_from_db()
    assert goes.state == "running"
    assert not SpotNotice.objects.exists()
    assert "withdrawn" in JobEvent.objects.filter(job=goes.job).latest("id").reason


def test_who_lost_is_not_placed_until_an_auction_is_won(market):
    low, high = market.bid(2 * FLOOR), market.bid(5 * FLOOR)
    poor, rich = f.job(low, gpus=1), f.job(high, gpus=8)
    market.close()

    def may(at):
        return {r.job: r.price_ok for r in snapshot.take(market.site.cell, now=at).requests}

    assert may(LEAD) == may(FIRST) == {poor.pk: False, rich.pk: True}
    found = spot_prices.barred([poor.pk, rich.pk], FIRST)
    assert found.keys() == {poor.pk}
    assert spot_prices.why(found[poor.pk], "USD").endswith("the limit is 2")
    assert may(FIRST + FIVE) == {poor.pk: True, rich.pk: True}


def test_a_newcomer_may_take_what_is_left_at_the_price_of_all(market):
    f.job(market.bid(5 * FLOOR), gpus=8)
    f.job(market.bid(3 * FLOOR), gpus=1)
    market.close()
    assert market.price() == 3 * FLOOR
    cheap, dear = f.job(market.bid(3 * FLOOR - 1)), f.job(market.bid(3 * FLOOR))
    assert spot_prices.barred([cheap.pk, dear.pk], FIRST).keys() == {cheap.pk}


# --- the limit
def test_a_new_limit_counts_from_the_next_auction_on(market):
    contract = market.bid(2 * FLOOR)
    actor = f.actor(contract.organization)
    f.job(contract, gpus=1)
    market.close()
    assert spot.set_limit(actor, contract, FLOOR, now=LEAD, expected=2 * FLOOR).limit_price == FLOOR
    assert SpotResult.objects.get().limit_price == 2 * FLOOR
    assert contract.events.latest("id").reason == "limit 2 -> 1 USD per GPU-hour, from the next auction on"
    assert AuditEvent.objects.get(verb="contract.limit_changed").after == {"limit_price": FLOOR}
    market.close(LEAD + FIVE)
    assert SpotResult.objects.latest("start").limit_price == FLOOR


@pytest.mark.parametrize(
    ("code", "limit", "expected", "fields"),
    [
        ("conflict", 3 * FLOOR, FLOOR, {}),
        ("invalid_request", FLOOR - 1, None, {}),
        ("illegal_transition", 3 * FLOOR, None, {"state": "ended"}),
        ("illegal_transition", 3 * FLOOR, None, {"kind": "on_demand"}),
    ],
)
def test_a_limit_that_may_not_be_set(market, code, limit, expected, fields):
    contract = market.bid(2 * FLOOR)
    type(contract).objects.filter(pk=contract.pk).update(**fields)
    with pytest.raises(MarketError) as error:
        spot.set_limit(f.actor(contract.organization), contract, limit, now=NOW, expected=expected)
    assert error.value.code == code
    with pytest.raises(MarketError) as error:
        spot.set_limit(f.actor(market.operator), contract, 3 * FLOOR, now=NOW)
    assert error.value.code == "forbidden"
    contract.refresh_from_db()
    assert contract.limit_price == 2 * FLOOR


def test_a_quote_says_the_price_of_now_and_a_limit_over_the_floor_is_a_bid(market):
    f.job(market.bid(5 * FLOOR), gpus=8)
    f.job(market.bid(3 * FLOOR), gpus=1)
    market.close()
    buyer = f.actor(f.organization())

    def ask(limit):
        return quotes.quote(buyer, market.listing.pk, quotes.Request("spot", 1, limit_price=limit), now=FIRST)

    assert ask(9 * FLOOR).price == 3 * FLOOR
    assert ask(2 * FLOOR).price == 2 * FLOOR
    with pytest.raises(MarketError, match="floor"):
        ask(FLOOR - 1)


# --- money
def sold_at(market, prices):
    """Intervals of these prices from NOW on, without an auction."""
    for n, price in enumerate(prices):
        SpotInterval.objects.create(
            listing=market.listing, cell_id=market.cell, gpu_model=market.listing.gpu_model, start=NOW + n * FIVE, price=price,
            floor=FLOOR, currency="USD", supply_milli=8000, demand_milli=0, sold_milli=0, closed_at=NOW,
        )  # fmt: skip


def test_running_seconds_cost_what_their_interval_does(market):
    contract = market.bid(5 * FLOOR)
    sold_at(market, [2 * FLOOR, 2 * FLOOR, 3 * FLOOR, 9 * FLOOR])
    market.runs(contract, 2, since=NOW + 100 * timedelta(seconds=1))
    later = NOW + timedelta(minutes=30)
    rows = usage.pending(contract.organization_id, until=later)
    price = dict(PriceVersion.objects.values_list("pk", "millionths"))
    seconds = [
        (row.start_s - int(NOW.timestamp()), row.end_s - row.start_s, price[row.price_version_id] // FLOOR)
        for row in rows
    ]
    # The fourth interval is dearer than the limit: it costs the limit. What has no price yet is not metered.
    assert seconds == [(100, 500, 2), (600, 300, 3), (900, 300, 5)]
    assert usage.meter(contract.organization_id, through=later, now=later) == 3
    assert usage.pending(contract.organization_id, until=later) == []
    assert PriceVersion.objects.filter(contract=contract).count() == 4
    assert Placement.objects.get().metered_through == NOW + 4 * FIVE
    sold_at_next = SpotInterval.objects.create(
        **{**_columns(SpotInterval.objects.latest("start")), "start": NOW + 4 * FIVE, "price": FLOOR}
    )
    assert usage.meter(contract.organization_id, through=later, now=later) == 1
    assert UsageRecord.objects.latest("start_s").start_s == int(sold_at_next.start.timestamp())


def test_a_contract_from_before_the_first_interval_pays_its_quoted_price_until_then(market):
    contract = market.bid(5 * FLOOR)
    market.runs(contract, 1)
    rows = usage.pending(contract.organization_id, until=NOW + MINUTE)
    assert [(row.quantity, PriceVersion.objects.get(pk=row.price_version_id).millionths) for row in rows] == [
        (60_000, FLOOR)
    ]


@pytest.mark.parametrize(
    ("reason", "grace", "told", "billed"),
    [
        ("preempted for another job", 30, None, 600 - 90),
        ("preempted for another job", 200, None, 600),
        ("outbid: too low", 30, 120, 600),
        ("outbid: too low", 0, 50, 600 - 70),
        ("cancelled by the customer", 30, None, 600),
        ("the contract ended", 30, None, 600),
    ],
)  # fmt: skip
def test_notice_that_was_cut_short_is_free(market, reason, grace, told, billed):
    contract = market.bid(5 * FLOOR)
    sold_at(market, [FLOOR] * 12)
    placement = market.runs(contract, 1, checkpoint_grace_s=grace)
    PlacementEvent.objects.create(placement=placement, at=NOW, actor="agent", from_state="granted", to_state="running")
    asked = NOW + timedelta(seconds=600)
    if told is not None:
        SpotNotice.objects.create(
            interval=SpotInterval.objects.first(), job=placement.job, told_at=asked - timedelta(seconds=told), leaves_at=asked
        )  # fmt: skip
    with transaction.atomic():
        placements.lock_sites([market.site.pk])
        placements.request_release([placement.pk], now=asked, actor="x", reason=reason)
    rows = usage.pending(contract.organization_id, until=NOW + timedelta(hours=1))
    assert sum(row.quantity for row in rows) == billed * 1000


def test_under_what_the_watts_earn_hashing_nothing_is_sold_and_the_auction_says_so(market):
    """The listing's own floor is 0.05; its 1275 W a GPU would earn more than 0.18 by the feeds, so that is the step."""
    Listing.objects.filter(pk=market.listing.pk).update(spot_floor=50_000)
    f.miner(market.site, modes=(("sleep", 25, 0), ("normal", 3500, 200_000)))
    poor, rich = market.bid(150_000), market.bid(400_000, gpus=4)
    market.runs(poor, 4), market.runs(rich, 4)
    Contract.objects.filter(pk__in=(poor.pk, rich.pk)).update(price=50_000)
    (before,) = market.close()
    own = listings.floor_of(market.listing, now=LEAD)  # no feeds: what the watts cost
    assert (before.floor, before.price, before.sold_milli) == (own, own, 8000)
    assert 50_000 < own < 150_000
    later = LEAD + FIVE
    for kind, value in (
        ("difficulty", 155_970_000_000_000), ("btc_usd_cents", 10_693_500), ("block_height", 921_700), ("fees_sat_per_block", 1_937_500),
    ):  # fmt: skip
        feeds.store(kind, value, source="test", observed_at=later, now=later)
    hashing = listings.floor_of(market.listing, now=later)
    assert 181_000 < hashing < 184_000
    (made,) = market.close(later)
    assert (made.floor, made.price, made.supply_milli, made.sold_milli) == (hashing, hashing, 8000, 4000)
    assert result(rich, made.start) == ("won", 4, hashing, "")
    assert result(poor, made.start)[:2] == ("lost", 0)
    assert "floor" in result(poor, made.start)[3]
    spot.tell(market.cell, now=later)
    assert [notice.job.contract_id for notice in SpotNotice.objects.all()] == [poor.pk]
