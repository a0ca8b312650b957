"""Net present value, rate of return and payback of monthly cash. Estimates: floats of integer cents.

Month 0 is not discounted; month t by (1 + wacc) ^ (t / 12).
"""

from collections.abc import Sequence
from itertools import accumulate


def npv(cash: Sequence[int], wacc_permille: int) -> float:
    """Present value at a yearly rate."""
    return _value(cash, (1 + wacc_permille / 1000) ** (1 / 12))


def annual_rate(cash: Sequence[int]) -> float | None:
    """The yearly rate at which the cash is worth nothing; None where there is none: it never turns, or no rate up to 1,000 % does.

    By bisection between -90 % and 1,000 % a year: of cash that turns more than once, one of its rates.
    """
    if not (any(c < 0 for c in cash) and any(c > 0 for c in cash)):
        return None
    low, high = 0.1 ** (1 / 12), 11.0 ** (1 / 12)
    at_low, at_high = _value(cash, low), _value(cash, high)
    if (at_low > 0) == (at_high > 0):
        return None
    for _ in range(200):
        middle = (low + high) / 2
        if (_value(cash, middle) > 0) == (at_low > 0):
            low = middle
        else:
            high = middle
    return float(low**12 - 1)


def payback(cash: Sequence[int]) -> int | None:
    """Months until the sum of the cash is not negative and stays so; None: not within it. 0: it never was negative."""
    sums = list(accumulate(cash))
    if not sums or sums[-1] < 0:
        return None
    below = [t for t, total in enumerate(sums) if total < 0]
    return below[-1] + 2 if below else 0


def _value(cash: Sequence[int], growth: float) -> float:
    return float(sum(c / growth**t for t, c in enumerate(cash)))
