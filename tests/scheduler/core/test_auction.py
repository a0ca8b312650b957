"""The spot auction: nobody over his limit, nothing under its floor, nobody worse off for bidding more, and nothing left on the table."""

import random
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.core.auction import Loss, Lot, Step, bound, clear, interval_of, surplus

pytestmark = pytest.mark.serverless
SIZES = (125, 250, 500, 1000, 2000, 4000, 8000, 16_000, 64_000)
steps = st.lists(st.builds(Step, st.integers(0, 9), st.integers(0, 12)), max_size=4)


sizes = st.integers(1, 6)


@st.composite
def lots(draw, size=sizes, most=7):
    """Lots of a few bids: one limit and age for each bid."""
    found = []
    for bid in range(draw(st.integers(0, 5))):
        limit, since = draw(st.integers(0, 10)), draw(st.integers(0, 2))
        found += [Lot(bid, since, limit, n, draw(size)) for n in range(draw(st.integers(1, 3)))]
    return found[:most]


def best(supply, wanted):
    """The largest surplus of all sets that the supply can serve without a loss on any unit."""
    top = 0
    for count in range(len(wanted) + 1):
        for chosen in combinations(range(len(wanted)), count):
            if _feasible(supply, [wanted[i] for i in chosen]):
                top = max(top, surplus(supply, wanted, chosen))
    return top


def _feasible(supply, chosen):
    """Each limit at or over the floor of some unit of its own."""
    return all(
        sum(lot.milli for lot in chosen if lot.limit <= limit) <= sum(s.milli for s in supply if s.floor <= limit)
        - max(0, sum(lot.milli for lot in chosen if lot.limit > limit) - sum(s.milli for s in supply if s.floor > limit))
        for limit in {lot.limit for lot in chosen}
    )  # fmt: skip


def twin(supply, wanted):
    """The rule read aloud, without a ladder: units of supply one by one."""
    line = sorted(wanted, key=lambda lot: (-lot.limit, lot.since, lot.bid, lot.place))
    units = sorted(s.floor for s in supply for _ in range(s.milli))
    used, served = 0, []
    for lot in line:
        if sum(floor <= lot.limit for floor in units) - used >= lot.milli:
            used += lot.milli
            served.append(lot)
    if not units:
        return None, served
    after = line[line.index(served[-1]) + 1 :] if served else line
    wanting = [lot.limit for lot in after if lot.limit >= units[0]]
    return max([units[max(0, used - 1)], *wanting]), served


@given(steps, lots())
def test_the_rule_is_what_it_says(supply, wanted):
    found = clear(supply, wanted)
    price, served = twin(supply, wanted)
    assert [wanted[i] for i in found.served] == served
    assert found.price == price
    assert found.supply == sum(s.milli for s in supply)
    assert found.sold == sum(lot.milli for lot in served) <= found.supply
    assert sorted([*found.served, *found.lost]) == list(range(len(wanted)))


@given(steps, lots())
def test_no_limit_is_exceeded_and_nothing_is_sold_under_its_floor(supply, wanted):
    found = clear(supply, wanted)
    if not found.served:
        return
    assert found.price <= min(wanted[i].limit for i in found.served)
    sold = found.sold
    for step in sorted(supply):
        if sold > 0 and step.milli:
            assert found.price >= step.floor
        sold -= step.milli


@given(steps, lots())
def test_who_loses_would_not_be_served_at_the_price(supply, wanted):
    """The price clears: whoever bids more than it and got nothing is larger than what those before him left."""
    found = clear(supply, wanted)
    for i, why in found.lost.items():
        if found.price is not None and wanted[i].limit > found.price:
            assert why is Loss.DOES_NOT_FIT
            before = sum(
                wanted[j].milli for j in found.served
                if (-wanted[j].limit, wanted[j].since, wanted[j].bid, wanted[j].place)
                < (-wanted[i].limit, wanted[i].since, wanted[i].bid, wanted[i].place)
            )  # fmt: skip
            assert before + wanted[i].milli > sum(s.milli for s in supply if s.floor <= wanted[i].limit)
        if why is Loss.UNDER_FLOOR:
            assert all(s.floor > wanted[i].limit for s in supply if s.milli)


@given(steps, lots(), st.integers(0, 4), st.integers(1, 10))
def test_who_bids_more_never_gets_less(supply, wanted, bid, more):
    mine = [i for i, lot in enumerate(wanted) if lot.bid == bid]
    raised = [lot._replace(limit=lot.limit + more) if lot.bid == bid else lot for lot in wanted]

    def won(found):
        return sum(wanted[i].milli for i in mine if i in found.served)

    assert won(clear(supply, raised)) >= won(clear(supply, wanted))


@given(steps, lots(), st.randoms(use_true_random=False))
def test_the_order_of_the_input_means_nothing(supply, wanted, dice):
    found = clear(supply, wanted)
    mixed, rungs = dice.sample(wanted, len(wanted)), dice.sample(supply, len(supply))
    other = clear(rungs, mixed)
    assert [wanted[i] for i in found.served] == [mixed[i] for i in other.served]
    assert {wanted[i]: why for i, why in found.lost.items()} == {mixed[i]: why for i, why in other.lost.items()}
    assert found.price == other.price


@given(steps, lots(size=st.just(1)))
def test_lots_of_one_size_are_sold_as_well_as_can_be(supply, wanted):
    found = clear(supply, wanted)
    assert surplus(supply, wanted, found.served) == bound(supply, wanted) == best(supply, wanted)


@given(steps, lots(most=6))
def test_no_sale_exceeds_the_bound(supply, wanted):
    found = surplus(supply, wanted, clear(supply, wanted).served)
    assert found <= best(supply, wanted) <= bound(supply, wanted)


def test_a_large_gang_does_not_idle_what_others_would_pay_for():
    wanted = [Lot(1, 0, 9, 0, 6), Lot(2, 0, 8, 0, 4), Lot(3, 0, 5, 0, 2), Lot(4, 0, 3, 0, 3), Lot(5, 0, 1, 0, 1)]
    found = clear([Step(2, 8)], wanted)
    assert (found.served, found.price, found.sold) == ((0, 2), 3, 8)
    assert found.lost == {1: Loss.DOES_NOT_FIT, 3: Loss.OUTBID, 4: Loss.UNDER_FLOOR}


@pytest.mark.parametrize(("supply", "price"), [([], None), ([Step(3, 0)], None), ([Step(5, 1), Step(3, 2)], 3)])
def test_without_demand_the_price_is_the_lowest_floor(supply, price):
    assert clear(supply, []).price == price


@pytest.mark.parametrize("wrong", [Lot(1, 0, 5, 0, 0), Lot(1, 0, -1, 0, 1)])
def test_what_is_no_lot_is_refused(wrong):
    with pytest.raises(ValueError, match="at least 1 milli-GPU"):
        clear([], [wrong])


def test_intervals_begin_every_five_minutes():
    assert [interval_of(s) for s in (0, 299, 300, 3601)] == [0, 0, 300, 3600]


# --- a month of demand
def market(dice, hour, gpus):
    """Supply and demand of one market in one interval: firm work takes more by day, gangs and shares of a GPU among the lots."""
    busy = 0.35 + 0.3 * (8 <= hour % 24 < 20) + dice.uniform(-0.1, 0.1)
    floor = 400_000 + 200_000 * dice.random()
    supply = [Step(int(floor * dice.uniform(1, 1.6)), 1000 * int(part * gpus * (1 - busy))) for part in (0.5, 0.3, 0.2)]
    wanted, total, bid = [], 0, 0
    while total < dice.uniform(0.4, 1.8) * gpus * 1000:
        bid += 1
        limit = int(dice.lognormvariate(13.6, 0.5))
        for n in range(dice.randint(1, 3)):
            size = dice.choices(SIZES, (2, 2, 3, 30, 20, 15, 20, 6, 2))[0]
            wanted.append(Lot(bid, dice.randint(0, 99), limit, n, size))
            total += size
    return supply, wanted


def optimum(supply, wanted, unit=125):
    """The largest surplus of any set of whole lots: a knapsack over every total that could be sold, in units of milli-GPU."""
    costs = np.concatenate([np.full(s.milli // unit, s.floor * unit) for s in sorted(supply)])
    most = np.full(len(costs) + 1, -1, np.int64)
    most[0] = 0
    for lot in wanted:
        size = lot.milli // unit
        if size < len(most):
            ahead = most[:-size]
            most[size:] = np.maximum(most[size:], np.where(ahead >= 0, ahead + lot.limit * lot.milli, -1))
    worth = most - np.concatenate([[0], np.cumsum(costs)])
    return int(worth[most >= 0].max())


def month(seed, intervals, gpus):
    """(surplus, best possible) in all, and the prices, of so many intervals."""
    dice, got, most, prices = random.Random(seed), 0, 0, []
    for at in range(intervals):
        supply, wanted = market(dice, at // 12, gpus)
        found = clear(supply, wanted)
        got += surplus(supply, wanted, found.served)
        most += optimum(supply, wanted)
        if found.served:
            prices.append(found.price)
            assert min(s.floor for s in supply if s.milli) <= found.price <= min(wanted[i].limit for i in found.served)
    return got, most, prices


@pytest.mark.parametrize(
    ("intervals", "seeds"), [(288, (1,)), pytest.param(8928, (1, 2), marks=pytest.mark.full)], ids=["day", "month"]
)
def test_a_month_of_demand_is_sold_within_two_percent_of_the_optimum(intervals, seeds):
    for seed in seeds:
        for gpus in (256, 1024):
            got, most, prices = month(seed, intervals, gpus)
            assert got >= 0.98 * most, f"seed {seed}, {gpus} GPUs: {got / most:.4f}"
            assert len(set(prices)) > intervals // 3


def at_one_price(markets):
    """The most surplus that one price for all of these markets could sell; who bids under it, or is not sold under it, stays out."""
    prices = sorted(
        {step.floor for supply, _ in markets for step in supply}
        | {lot.limit for _, wanted in markets for lot in wanted}
    )
    found = []
    for price in prices[:: max(1, len(prices) // 150)]:
        worth = 0
        for supply, wanted in markets:
            able = [step for step in supply if step.floor <= price]
            willing = [lot for lot in wanted if lot.limit >= price]
            worth += surplus(able, willing, clear(able, willing).served)
        found.append(worth)
    return max(found)


@pytest.mark.full
def test_one_price_for_listings_whose_bids_are_bound_to_them_sells_less():
    """ADR 16: why each listing has a price of its own."""
    dice, together, apart = random.Random(5), 0, 0
    for hour in range(0, 7 * 24, 3):
        markets = []
        for _ in range(4):
            supply, wanted = market(dice, hour, 256)
            markets.append(([Step(supply[0].floor, sum(step.milli for step in supply))], wanted))
        together += at_one_price(markets)
        apart += sum(surplus(supply, wanted, clear(supply, wanted).served) for supply, wanted in markets)
    assert together < 0.98 * apart
