"""Prices beside the plain ones: what operators ask by term, by share due at signing and by hours of curtailment, and what of it a
buyer says that he would pay then and bear.

They have dice of their own, so that a seed's market is otherwise what it was before there were such prices.
"""

from __future__ import annotations

from itertools import product
from random import Random
from typing import Any

TERMS = (2, 24, 72, 168)  # hours
UPFRONT = (0, 200, 500, 1000)  # permille of the commitment, due at signing
HOURS = (2, 6, 20, 60)  # of curtailment a month
# Permille off the price: for the term, for each permille due at signing, for each hour of curtailment. Who asks for more asks for less
# money, so that each price is somebody's best.
TERM_OFF = dict(zip(TERMS, (0, 40, 90, 150), strict=True))
UPFRONT_OFF, HOUR_OFF = 0.08, 3
MOST = 7  # of a kind

Tier = dict[str, Any]


def ladder(dice: Random, prices: dict[str, int], plain: dict[str, int]) -> list[Tier]:
    """Some prices of both kinds that hold GPUs, on one plane through the plain ones. `prices`: plain, by kind; `plain`: what they ask."""
    found: list[Tier] = []
    for kind in ("reserved", "flexible"):
        hours = HOURS if kind == "flexible" else (0,)
        asks = [
            {"kind": kind, "min_term_hours": term, "upfront_permille": upfront, "flexible_hours_per_month": borne}
            for term, upfront, borne in product(TERMS, UPFRONT, hours)
        ]
        own = {
            "kind": kind, "min_term_hours": TERMS[0], "upfront_permille": plain["upfront_permille"],
            "flexible_hours_per_month": plain["flexible_hours_per_month"] if kind == "flexible" else 0,
        }  # fmt: skip
        some = dice.sample([a for a in asks if a != own], dice.randrange(MOST + 1))
        found += [a | {"price": round(prices[kind] * (1000 - _off(a) + _off(own)) / 1000)} for a in some]
    return found


def _off(asks: Tier) -> float:
    return (
        TERM_OFF[asks["min_term_hours"]]
        + UPFRONT_OFF * asks["upfront_permille"]
        + HOUR_OFF * asks["flexible_hours_per_month"]
    )


def scaled(tiers: list[Tier], kind: str, percent: int) -> list[Tier]:
    """A kind dearer or cheaper in all its prices at once."""
    return [t | ({"price": t["price"] * percent // 100} if t["kind"] == kind else {}) for t in tiers]


def would(dice: Random, kind: str) -> dict[str, int]:
    """What a buyer says of the two; who says nothing is asked for no more than the plain price asks."""
    said: dict[str, int | None] = {"upfront_max_permille": dice.choice((None, None, 200, 500, 1000))}
    if kind == "flexible":
        said["flexible_hours_max"] = dice.choice((None, None, 6, 20, 60))
    return {name: value for name, value in said.items() if value is not None}
