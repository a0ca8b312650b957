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


def split(line_minor: int, fee_permille: int) -> Share:
    """Split a line by largest remainder; `fee_permille` (0..1,000) is the platform's part of the price."""
    if not 0 <= fee_permille <= WHOLE:
        raise ValueError(f"a fee of {fee_permille} permille is not between 0 and {WHOLE}")
    operator, platform = split_largest_remainder(line_minor, (WHOLE - fee_permille, fee_permille))
    return Share(operator=operator, platform=platform)
