from dataclasses import replace
from datetime import UTC, datetime
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billing.core.metering import Interval, clip, floor_second, subtract, union
from billing.core.rating import (
    Added,
    Commitment,
    LineKind,
    Missed,
    Price,
    UsageGroup,
    beyond,
    committed_quantity,
    drawn,
    missed_by_price,
    month_of,
    month_windows,
    rate_commitment,
    rate_usage,
    total,
    withheld,
    withheld_by_price,
)

pytestmark = pytest.mark.serverless

MARCH = Interval(floor_second(datetime(2026, 3, 1, tzinfo=UTC)), floor_second(datetime(2026, 4, 1, tzinfo=UTC)))
HOUR = 3600
H100 = Price(version=1, millionths=2_490_000)
OVERAGE = Price(version=2, millionths=3_100_000)

groups = st.builds(
    UsageGroup,
    contract=st.integers(1, 3),
    meter=st.just("gpu"),
    price=st.sampled_from([H100, OVERAGE]),
    span=st.just(MARCH),
    quantity=st.integers(0, 10**9),
)


def commitment(**changes):
    values = {
        "contract": 1, "meter": "gpu", "milli_gpus": 8000, "term": MARCH, "price": H100, "overage": OVERAGE,
    } | changes  # fmt: skip
    return Commitment(**values)


def test_a_line_is_rounded_once():
    # Three placements of 1 s each: 3 x 0.0692 cents is 0.21 cents, and 1,000 of them 69.17 cents, not 0.
    one = UsageGroup(1, "gpu", H100, MARCH, 1000)
    (line,) = rate_usage([one] * 1000, "USD")
    assert line.amount == 69
    assert line.quantity == 1_000_000


def test_spot_has_one_line_per_clearing_price():
    cleared = [Price(version, 1_000_000 + version * 10_000) for version in range(3)]
    lines = rate_usage([UsageGroup(1, "gpu", price, MARCH, 300 * 1000) for price in cleared], "USD")
    assert [line.price for line in lines] == cleared


@settings(max_examples=60)
@given(st.lists(groups, max_size=12), st.randoms(use_true_random=False))
def test_lines_do_not_depend_on_the_order(rows, random):
    shuffled = list(rows)
    random.shuffle(shuffled)
    assert rate_usage(shuffled, "USD") == rate_usage(rows, "USD")


@settings(max_examples=60)
@given(st.lists(groups, min_size=1, max_size=8), st.integers(1, 7))
def test_lines_do_not_depend_on_how_usage_was_cut(rows, parts):
    cut = []
    for row in rows:
        share, rest = divmod(row.quantity, parts)
        cut += [UsageGroup(row.contract, row.meter, row.price, row.span, share)] * parts
        cut.append(UsageGroup(row.contract, row.meter, row.price, row.span, rest))
    assert rate_usage(cut, "USD") == rate_usage(rows, "USD")


@settings(max_examples=60)
@given(st.lists(groups, max_size=8), groups)
def test_more_usage_never_costs_less(rows, more):
    assert total(rate_usage([*rows, more], "USD")) >= total(rate_usage(rows, "USD"))


@settings(max_examples=60)
@given(groups)
def test_a_line_is_within_half_a_minor_unit_of_the_exact_amount(group):
    exact = Fraction(group.quantity * group.price.millionths * 100, 3_600_000 * 10**6)
    assert abs(total(rate_usage([group], "USD")) - exact) <= Fraction(1, 2)


def test_a_reservation_is_billed_whether_used_or_not():
    (line,) = rate_commitment(commitment(), MARCH, "USD", used=0)
    assert (line.kind, line.quantity) == (LineKind.COMMITMENT, 8000 * 31 * 24 * HOUR)
    assert line.amount == 8 * 31 * 24 * 249


def test_a_reservation_is_prorated_by_seconds():
    term = Interval(MARCH.start + 10 * 86400, MARCH.start + 10 * 86400 + 5401)
    (line,) = rate_commitment(commitment(term=term), MARCH, "USD", used=0)
    assert line.quantity == 8000 * 5401
    assert line.amount == round(Fraction(8 * 5401 * 249, 3600))


def test_what_goes_beyond_the_commitment_is_overage():
    allowance = committed_quantity(commitment(), MARCH)
    lines = rate_commitment(commitment(), MARCH, "USD", used=allowance + 2 * 1000 * HOUR)
    assert [(line.kind, line.price) for line in lines] == [(LineKind.COMMITMENT, H100), (LineKind.OVERAGE, OVERAGE)]
    assert lines[1].amount == 620


def test_gpus_that_joined_later_are_billed_from_then_on_at_their_own_price():
    half = Interval(MARCH.start + 10 * 86400, MARCH.end)
    dearer = Price(3, 2_800_000)
    joined = commitment(added=(Added(4000, half, dearer),))
    first, second = rate_commitment(joined, MARCH, "USD", used=0)
    assert (first.price, first.amount) == (H100, 8 * 31 * 24 * 249)
    assert (second.kind, second.price, second.amount) == (LineKind.COMMITMENT, dearer, 4 * 21 * 24 * 280)
    assert committed_quantity(joined, MARCH) == first.quantity + second.quantity
    away = Interval(MARCH.start, MARCH.start + 11 * 86400)  # curtailed for all that it holds
    first, second = rate_commitment(commitment(curtailed=(away,), added=joined.added), MARCH, "USD", used=0)
    assert (first.quantity, second.quantity) == (8000 * 20 * 86400, 4000 * 20 * 86400)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 10_000), max_size=12), st.integers(0, 50_000))
def test_what_was_paid_at_signing_is_drawn_down_first_and_comes_back_to_the_cent(months, prepaid):
    left, paid = prepaid, 0
    for due in months:
        taken = drawn(left, due, over=False)
        assert 0 <= taken <= due
        assert taken == due or left == taken  # nothing is charged while some of it is left
        left, paid = left - taken, paid + due - taken
    assert paid == max(0, sum(months) - prepaid)
    assert drawn(left, 0, over=True) == left
    assert drawn(0, 10, over=True) == drawn(5, -3, over=False) == 0


def test_curtailed_time_is_free_for_a_flexible_contract():
    away = Interval(MARCH.start + HOUR, MARCH.start + 3 * HOUR)
    (line,) = rate_commitment(commitment(curtailed=(away,)), MARCH, "USD", used=0)
    assert line.quantity == 8000 * (31 * 24 - 2) * HOUR


def test_what_ran_when_a_curtailment_had_begun_is_not_beyond_the_commitment():
    """Jobs run on to the end of their notice: on the GPUs that the contract holds, not on more."""
    away = Interval(MARCH.start + HOUR, MARCH.start + 3 * HOUR)
    ran = 8000 * (31 * 86400 - 2 * HOUR + 600)  # all the month, but for the call less ten minutes of notice
    (line,) = rate_commitment(commitment(curtailed=(away,)), MARCH, "USD", used=ran)
    assert (line.kind, line.quantity) == (LineKind.COMMITMENT, 8000 * (31 * 24 - 2) * HOUR)


@settings(max_examples=60)
@given(st.integers(1, 31 * 86400 - 1), st.integers(0, 3 * 10**10), st.integers(0, 3 * 10**10))
def test_a_month_in_two_windows_comes_to_the_same_quantities_as_in_one(offset, used_first, used_later):
    mark = MARCH.start + offset
    whole = rate_commitment(commitment(), MARCH, "USD", used=used_first + used_later)
    first = rate_commitment(commitment(), Interval(MARCH.start, mark), "USD", used=used_first)
    billed = {line.price: line.quantity for line in first}
    second = rate_commitment(
        commitment(),
        Interval(mark, MARCH.end),
        "USD",
        used=used_first + used_later,
        billed=billed,
    )
    for kind in (LineKind.COMMITMENT, LineKind.OVERAGE):
        together = sum(line.quantity for line in (*first, *second) if line.kind == kind)
        assert together == sum(line.quantity for line in whole if line.kind == kind)
    assert abs(total(first) + total(second) - total(whole)) <= 2


def test_months_know_their_ends():
    def at(*parts):
        return floor_second(datetime(*parts, tzinfo=UTC))

    assert month_of(at(2028, 2, 29, 23, 59, 59)).seconds == 29 * 86400
    assert month_of(at(2026, 2, 1)).seconds == 28 * 86400
    assert month_of(at(2026, 12, 31)).end == at(2027, 1, 1)
    windows = month_windows(Interval(at(2027, 12, 15), at(2028, 3, 1)))
    assert [w.start for w in windows] == [at(2027, 12, 15), at(2028, 1, 1), at(2028, 2, 1)]
    assert windows[-1].end == at(2028, 3, 1)
    assert month_windows(Interval(5, 5)) == ()


def test_a_commitment_window_across_months_is_refused():
    with pytest.raises(ValueError, match="month"):
        rate_commitment(commitment(), Interval(MARCH.start, MARCH.end + 1), "USD", used=0)


# --- what could not be had
def lost(gpus, start_h, end_h):
    return Missed(gpus * 1000, Interval(MARCH.start + start_h * HOUR, MARCH.start + end_h * HOUR))


def test_what_was_missed_comes_back_as_a_line_of_its_own():
    rows = rate_commitment(commitment(missed=(lost(2, 10, 12),)), MARCH, "USD", used=0)
    assert [(row.kind, row.quantity) for row in rows] == [
        (LineKind.COMMITMENT, committed_quantity(commitment(), MARCH)),
        (LineKind.CREDIT, -2 * 1000 * 2 * HOUR),
    ]
    assert rows[1].amount == -(4 * 249)


def test_the_dearest_are_missed_first_and_what_is_curtailed_is_not_missed_besides():
    dear = Price(version=3, millionths=9_000_000)
    joined = Added(1000, Interval(MARCH.start + 11 * HOUR, MARCH.end), dear)
    held = commitment(milli_gpus=2000, added=(joined,), missed=(lost(2, 10, 12), lost(1, 11, 12)))
    assert missed_by_price(held, MARCH) == {H100: (2 + 2) * 1000 * HOUR, dear: 1000 * HOUR}
    hour = Interval(MARCH.start + 10 * HOUR, MARCH.start + 11 * HOUR)
    assert missed_by_price(replace(held, curtailed=(hour,)), MARCH) == {H100: 2 * 1000 * HOUR, dear: 1000 * HOUR}


def test_use_beyond_what_could_be_had_is_overage():
    held = commitment(missed=(lost(1, 0, 24),))
    most = committed_quantity(held, MARCH) - 24 * HOUR * 1000
    kinds = {row.kind: row.quantity for row in rate_commitment(held, MARCH, "USD", used=most)}
    assert LineKind.OVERAGE not in kinds
    over = {row.kind: row.quantity for row in rate_commitment(held, MARCH, "USD", used=most + 5)}
    assert over[LineKind.OVERAGE] == 5


spans = st.tuples(st.integers(0, 700), st.integers(1, 44)).map(
    lambda t: Interval(MARCH.start + t[0] * HOUR, MARCH.start + (t[0] + t[1]) * HOUR)
)


@given(st.lists(spans, max_size=6), st.integers(0, 50))
@settings(max_examples=60)
def test_the_first_hours_are_borne_and_each_second_counts_once(some, hours):
    left = beyond(some, hours * HOUR)
    every = union(some)
    assert sum(p.seconds for p in left) == max(0, sum(p.seconds for p in every) - hours * HOUR)
    assert subtract(left, every) == ()
    if left:
        assert sum(p.seconds for p in clip(every, Interval(MARCH.start, left[0].start))) == hours * HOUR


@given(st.lists(st.tuples(st.integers(1, 8), spans), max_size=5), st.integers(1, 743))
@settings(max_examples=60)
def test_a_credit_in_two_windows_is_the_same_as_in_one(some, offset):
    held = commitment(missed=tuple(Missed(n * 1000, span) for n, span in some))
    whole = {(r.kind, r.price): r.quantity for r in rate_commitment(held, MARCH, "USD", used=0)}
    middle = MARCH.start + offset * HOUR
    first = rate_commitment(held, Interval(MARCH.start, middle), "USD", used=0)
    billed = {r.price: r.quantity for r in first if r.kind == LineKind.COMMITMENT}
    credited = {r.price: r.quantity for r in first if r.kind == LineKind.CREDIT}
    rest = rate_commitment(held, Interval(middle, MARCH.end), "USD", used=0, billed=billed, credited=credited)
    sums: dict = {}
    for row in (*first, *rest):
        sums[row.kind, row.price] = sums.get((row.kind, row.price), 0) + row.quantity
    assert sums == whole
    assert -sums.get((LineKind.CREDIT, H100), 0) <= sums[LineKind.COMMITMENT, H100]


# --- GPUs held lower for a call of the grid
def lower(gpus, start_h, end_h, gpu_w=400, full_w=700):
    return Missed(
        withheld(gpus * 1000, gpu_w, full_w), Interval(MARCH.start + start_h * HOUR, MARCH.start + end_h * HOUR)
    )


def test_the_share_of_power_withheld_is_rounded_to_the_customers_side():
    assert withheld(8000, 700, 700) == 0
    assert withheld(8000, 350, 700) == 4000
    assert withheld(8000, 699, 700) == 8 * 2  # 1.43 per mille
    assert withheld(250, 600, 700) == 36  # 35.75: a slice of a GPU
    assert withheld(1000, 0, 700) == 1000


def test_power_withheld_of_a_commitment_comes_back_and_what_it_runs_beyond_is_no_overage_for_it():
    held = commitment(withheld=(lower(8, 10, 12),))
    whole = committed_quantity(commitment(), MARCH)
    rows = rate_commitment(held, MARCH, "USD", used=whole)
    assert [(row.kind, row.quantity) for row in rows] == [
        (LineKind.COMMITMENT, whole),
        (LineKind.HELD_LOWER, -withheld(8000, 400, 700) * 2 * HOUR),
    ]


def test_power_withheld_is_not_credited_where_the_time_is_free_or_missed_already():
    both = commitment(withheld=(lower(8, 10, 12),), missed=(lost(8, 10, 11),))
    assert withheld_by_price(both, MARCH) == {H100: withheld(8000, 400, 700) * HOUR}
    hour = Interval(MARCH.start + 11 * HOUR, MARCH.start + 12 * HOUR)
    assert withheld_by_price(replace(both, curtailed=(hour,)), MARCH) == {}


@given(
    st.lists(st.tuples(st.integers(1, 8), st.integers(1, 699), spans), max_size=5),
    st.lists(st.tuples(st.integers(1, 8), spans), max_size=3),
    st.lists(spans, max_size=2),
    st.integers(1, 743),
    st.randoms(use_true_random=False),
)
@settings(max_examples=60)
def test_what_is_credited_is_bounded_and_the_same_in_any_order_and_windows(held, gone, free, offset, random):
    """Never more than the commitment comes to; in two windows, or told in another order, what it is in one."""
    takes = [Missed(withheld(n * 1000, w, 700), span) for n, w, span in held]
    made = commitment(
        withheld=tuple(takes), missed=tuple(Missed(n * 1000, span) for n, span in gone), curtailed=tuple(union(free))
    )
    whole = {(r.kind, r.price): r.quantity for r in rate_commitment(made, MARCH, "USD", used=0)}
    shuffled = replace(made, withheld=tuple(random.sample(takes, len(takes))))
    assert {(r.kind, r.price): r.quantity for r in rate_commitment(shuffled, MARCH, "USD", used=0)} == whole
    middle = MARCH.start + offset * HOUR
    first = rate_commitment(made, Interval(MARCH.start, middle), "USD", used=0)
    of = {kind: {r.price: r.quantity for r in first if r.kind == kind} for kind in LineKind}
    rest = rate_commitment(
        made, Interval(middle, MARCH.end), "USD", used=0, billed=of[LineKind.COMMITMENT], credited=of[LineKind.CREDIT],
        held_lower=of[LineKind.HELD_LOWER],
    )  # fmt: skip
    sums: dict = {}
    for row in (*first, *rest):
        sums[row.kind, row.price] = sums.get((row.kind, row.price), 0) + row.quantity
    assert sums == whole
    assert sum(sums.values()) >= 0
    most = sum(take.milli_gpus * take.span.seconds for take in takes)
    assert 0 <= -sums.get((LineKind.HELD_LOWER, H100), 0) <= most
