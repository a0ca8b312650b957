from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billing.core.money import (
    CurrencyMismatchError,
    Money,
    UnknownCurrencyError,
    exact_amount,
    exponent,
    format_minor,
    round_half_away,
    split_largest_remainder,
)
from billing.core.share import split

pytestmark = pytest.mark.serverless


@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        (Fraction(1, 2), 1),
        (Fraction(-1, 2), -1),
        (Fraction(3, 2), 2),
        (Fraction(5, 2), 3),
        (Fraction(-5, 2), -3),
        (Fraction(49, 100), 0),
        (Fraction(-49, 100), 0),
        (Fraction(7), 7),
    ],
)
def test_a_half_goes_away_from_zero(value, rounded):
    assert round_half_away(value) == rounded


@settings(max_examples=60)
@given(st.fractions())
def test_rounding_is_nearest_and_symmetric(value):
    assert abs(round_half_away(value) - value) <= Fraction(1, 2)
    assert round_half_away(-value) == -round_half_away(value)


@settings(max_examples=60)
@given(st.integers(-(10**12), 10**12), st.lists(st.integers(0, 10**6), min_size=1, max_size=8).filter(sum))
def test_largest_remainder_parts_sum_and_stay_within_one(total, weights):
    parts = split_largest_remainder(total, weights)
    assert sum(parts) == total
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part - Fraction(total * weight, sum(weights))) < 1
    assert split_largest_remainder(-total, weights) == tuple(-part for part in parts)


def test_largest_remainder_refuses_what_has_no_split():
    for weights in ([], [0, 0], [1, -1, 3]):
        with pytest.raises(ValueError, match="weights"):
            split_largest_remainder(10, weights)


@settings(max_examples=60)
@given(st.integers(-(10**12), 10**12), st.integers(0, 1_000))
def test_operator_and_platform_are_the_line(line, fee):
    share = split(line, fee)
    assert share.operator + share.platform == line
    assert abs(share.platform - Fraction(line * fee, 1_000)) < 1


def test_a_fee_beyond_the_price_is_refused():
    with pytest.raises(ValueError, match="permille"):
        split(100, 1_001)


def test_exponents_and_formatting():
    assert (exponent("USD"), exponent("JPY"), exponent("KWD")) == (2, 0, 3)
    assert format_minor(-1205, "USD") == "-12.05 USD"
    assert format_minor(1205, "JPY") == "1205 JPY"
    assert format_minor(1205, "KWD") == "1.205 KWD"
    with pytest.raises(UnknownCurrencyError, match="XTS"):
        Money(1, "XTS")


def test_one_gpu_hour_costs_its_price_in_every_exponent():
    hour = 1000 * 3600
    assert exact_amount(hour, 2_490_000, "USD") == 249
    assert exact_amount(hour, 380_000_000, "JPY") == 380
    assert exact_amount(hour, 750_000, "KWD") == 750
    assert exact_amount(1, 1, "USD") == Fraction(100, 3_600_000_000_000)


def test_currencies_never_mix():
    assert Money(5, "USD") - Money(7, "USD") == Money(-2, "USD")
    with pytest.raises(CurrencyMismatchError, match="USD and EUR"):
        Money(1, "USD") + Money(1, "EUR")
