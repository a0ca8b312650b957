"""Who gets what of a line: the operator's share and the platform's fee, which lies inside the price."""

from __future__ import annotations

from dataclasses import dataclass

from billing.core.money import split_largest_remainder

WHOLE = 1_000


@dataclass(frozen=True, slots=True)
class Share:
    """Parts of one line in minor units; `operator + platform` is the line, always."""

    operator: int
    platform: int


@dataclass(frozen=True, slots=True)
class Resold:
    """Parts of a line of capacity that a customer sold on; `seller + operator + platform` is the line, always."""

    seller: int
    operator: int
    platform: int


def split_resold(
    line_minor: int, seller_s: int, operator_s: int, fee_permille: int, resale_fee_permille: int
) -> Resold:
    """Split by largest remainder: of `seller_s` of the line's seconds the seller has the price less `resale_fee_permille`; of
    `operator_s`, when he no longer pays the operator for them, the operator has it less `fee_permille`.
    """
    if min(seller_s, operator_s) < 0 or not 0 <= fee_permille <= WHOLE or not 0 <= resale_fee_permille <= WHOLE:
        raise ValueError(f"{seller_s} s and {operator_s} s at {resale_fee_permille} and {fee_permille} permille")
    mine = seller_s if seller_s + operator_s else 1
    fees = mine * resale_fee_permille + operator_s * fee_permille
    weights = (mine * (WHOLE - resale_fee_permille), operator_s * (WHOLE - fee_permille), fees)
    return Resold(*split_largest_remainder(line_minor, weights))


def split(line_minor: int, fee_permille: int) -> Share:
    """Split a line by largest remainder; `fee_permille` (0..1,000) is the platform's part of the price."""
    if not 0 <= fee_permille <= WHOLE:
        raise ValueError(f"a fee of {fee_permille} permille is not between 0 and {WHOLE}")
    operator, platform = split_largest_remainder(line_minor, (WHOLE - fee_permille, fee_permille))
    return Share(operator=operator, platform=platform)
