"""Budgets: what a month's lines come to, which steps of a budget they have reached, and an hour's running cost against its limit.

A rate of cost is an integer number of billionths of the major unit an hour: milli-GPUs times a price in millionths per GPU-hour.
"""

from __future__ import annotations

from collections.abc import Iterable

from billing.core.money import exponent

STEPS = (50, 80, 100)  # percent of a monthly budget at which its people are told
HELD = frozenset({"upfront", "drawdown"})  # when a commitment is paid, not what it comes to


def spent(lines: Iterable[tuple[str, int, int]], month_s: int) -> int:
    """Minor units that a month's lines (kind, month, amount) come to: usage, commitments and overage, less credits and what was
    resold. What was paid at signing counts when it is drawn down: as the commitment that it pays.
    """
    return sum(amount for kind, month, amount in lines if month == month_s and kind not in HELD)


def reached(spent_minor: int, budget_minor: int) -> int:
    """The highest of STEPS that the spend has come to, 0 before the first. A budget of nothing is used up from the start."""
    return max((step for step in STEPS if spent_minor * 100 >= step * budget_minor), default=0)


def billionths(minor: int, currency: str) -> int:
    """Minor units as billionths of the major unit."""
    return minor * _scale(currency)


def minor(billionths_: int, currency: str) -> int:
    """Billionths of the major unit in minor units, rounded up: a cost is never shown as less than a limit that refuses it."""
    return -(-billionths_ // _scale(currency))


def _scale(currency: str) -> int:
    return int(10 ** (9 - exponent(currency)))
