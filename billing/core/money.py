"""Money as integers: minor units and an ISO 4217 code, exact rationals in between, one rounding rule.

No float ever appears here. A price is an integer number of millionths of the major unit per GPU-hour, because an
hourly price has no finite value per second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

# ISO 4217 minor-unit exponents of the currencies we bill in. A currency that is not listed is refused, never guessed.
EXPONENTS: dict[str, int] = {
    "USD": 2, "EUR": 2, "GBP": 2, "CAD": 2, "AUD": 2, "NZD": 2, "CHF": 2, "SEK": 2, "NOK": 2, "DKK": 2, "PLN": 2,
    "CZK": 2, "SGD": 2, "HKD": 2, "AED": 2, "BRL": 2, "MXN": 2, "ZAR": 2, "INR": 2,
    "JPY": 0, "KRW": 0, "CLP": 0, "PYG": 0, "VND": 0,
    "KWD": 3, "BHD": 3, "OMR": 3, "JOD": 3, "TND": 3,
}  # fmt: skip

# The least that Stripe charges, in minor units (docs.stripe.com/currencies, minimum and maximum charge amounts). Less is
# carried to the next invoice.
MINIMUM_CHARGE: dict[str, int] = {
    "USD": 50, "EUR": 50, "GBP": 30, "CAD": 50, "AUD": 50, "NZD": 50, "CHF": 50, "SEK": 300, "NOK": 300, "DKK": 250,
    "PLN": 200, "CZK": 1500, "SGD": 50, "HKD": 400, "AED": 200, "BRL": 50, "MXN": 1000, "INR": 50, "JPY": 50,
}  # fmt: skip

MILLIONTHS = 1_000_000
SECONDS_PER_HOUR = 3600
MILLI = 1000


class UnknownCurrencyError(ValueError):
    """The currency is not in the table; naming it is what the operator needs to add it."""

    def __init__(self, currency: str) -> None:
        super().__init__(f"currency {currency!r} is not in the table of minor-unit exponents")


class CurrencyMismatchError(ValueError):
    """Two amounts in different currencies met; conversion is never implicit."""

    def __init__(self, left: str, right: str) -> None:
        super().__init__(f"amounts in {left} and {right} do not add up; convert explicitly")


def exponent(currency: str) -> int:
    """Digits after the point of `currency`'s minor unit (USD 2, JPY 0, KWD 3)."""
    try:
        return EXPONENTS[currency]
    except KeyError:
        raise UnknownCurrencyError(currency) from None


def round_half_away(value: Fraction) -> int:
    """The nearest integer; a half goes away from zero, so that a credit mirrors its charge."""
    magnitude = (2 * abs(value.numerator) + value.denominator) // (2 * value.denominator)
    return magnitude if value >= 0 else -magnitude


def split_largest_remainder(total: int, weights: Sequence[int]) -> tuple[int, ...]:
    """Split `total` by non-negative `weights` so that the parts sum to it exactly (Hamilton's method).

    Each part is the floor of its exact share or one more; ties go to the earlier weight. A negative total is split as
    its magnitude and negated, so that reversing a charge reverses each share.
    """
    whole = sum(weights)
    if whole <= 0 or min(weights) < 0:
        raise ValueError(f"weights must be non-negative with a positive sum, not {list(weights)}")
    sign, magnitude = (1, total) if total >= 0 else (-1, -total)
    shares = [divmod(magnitude * weight, whole) for weight in weights]
    parts = [quotient for quotient, _ in shares]
    missing = magnitude - sum(parts)
    by_remainder = sorted(range(len(parts)), key=lambda index: (-shares[index][1], index))
    for index in by_remainder[:missing]:
        parts[index] += 1
    return tuple(sign * part for part in parts)


def format_minor(minor: int, currency: str) -> str:
    """`1234, 'USD'` as `12.34 USD`; the sign is kept, no grouping (a page may localise it)."""
    digits = exponent(currency)
    sign = "-" if minor < 0 else ""
    if digits == 0:
        return f"{sign}{abs(minor)} {currency}"
    whole, rest = divmod(abs(minor), 10**digits)
    return f"{sign}{whole}.{rest:0{digits}d} {currency}"


def exact_amount(milli_gpu_seconds: int, price_millionths: int, currency: str) -> Fraction:
    """Exact minor units of `milli_gpu_seconds` at `price_millionths` of the major unit per GPU-hour."""
    return Fraction(
        milli_gpu_seconds * price_millionths * 10 ** exponent(currency), MILLI * SECONDS_PER_HOUR * MILLIONTHS
    )


@dataclass(frozen=True, slots=True)
class Money:
    """An amount in minor units of one currency; adding another currency raises `CurrencyMismatchError`."""

    minor: int
    currency: str

    def __post_init__(self) -> None:
        exponent(self.currency)

    def __add__(self, other: Money) -> Money:
        if self.currency != other.currency:
            raise CurrencyMismatchError(self.currency, other.currency)
        return Money(self.minor + other.minor, self.currency)

    def __neg__(self) -> Money:
        return Money(-self.minor, self.currency)

    def __sub__(self, other: Money) -> Money:
        return self + -other

    def __str__(self) -> str:
        return format_minor(self.minor, self.currency)
