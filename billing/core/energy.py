"""A site's energy and what became of it, exact: who drew it, what it cost, what it earned, hour by hour and kind by kind.

Pure; integers and fractions. Energy is counted in millijoules (watts x milliseconds), so that no sample is ever rounded: a
milliwatt-hour is 3,600 of them, a megawatt-hour 3.6e12. Money is micro-USD, prices micro-USD per MWh, hash work GH/s x ms.

What the site's meter saw is always the sum of its named parts:

    site = placements + idle hosts + miners + cooling of hosts + cooling of miners + fixed load + remainder

The remainder is what no device admits to (signed: readings run ahead of the meter, too); without a meter it is nothing. Rounding
happens once, where an hour is told: the whole is rounded, and its parts share it so that they sum to it.

API::

    spans(start_ms, end_ms, length_ms) -> [(bucket's start, ms inside)]
    shares(watts, weights) -> watts by key; their sum is `watts`
    drawn(placements_w, idle_w, miners_w, ms, ...) -> Use         the parts of one sample
    merged(ids, values, more) -> (ids, values)                    columns by device, added up
    told(parts) -> integers that sum to the rounded sum of the fractions
    lines(hour, ai_uusd, paid) -> {kind: Line}                    the P&L of an hour
    spread(amount, weights, otherwise) -> integers that sum to the amount
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from fractions import Fraction

from billing.core.money import split_largest_remainder

MJ_PER_MILLIWH = 3_600
MJ_PER_MWH = 3_600_000_000_000
WORK_PER_PH_DAY = 1_000_000 * 86_400_000
MILLION = 1_000_000
AI, HASHING, DEMAND_RESPONSE, ENERGY = KINDS = ("ai", "hashing", "demand_response", "energy")


def spans(start_ms: int, end_ms: int, length_ms: int) -> list[tuple[int, int]]:
    """`[start, end)` cut where buckets of that length begin: each bucket's start and how much of it is inside."""
    found = []
    while start_ms < end_ms:
        bucket = start_ms // length_ms * length_ms
        until = min(end_ms, bucket + length_ms)
        found.append((bucket, until - start_ms))
        start_ms = until
    return found


def shares(watts: int, weights: Mapping[int, int]) -> dict[int, int]:
    """What each of a host's placements draws of it, by its part of the GPUs in use; empty without any."""
    if not weights:
        return {}
    keys = sorted(weights)
    return dict(zip(keys, split_largest_remainder(watts, [weights[k] for k in keys]), strict=True))


@dataclass(frozen=True, slots=True)
class Use:
    """Millijoules by what they were used for. `site`: as metered, or the sum of the others without a meter."""

    placements: int = 0
    idle: int = 0
    miners: int = 0
    cooling_hosts: int = 0
    cooling_miners: int = 0
    fixed: int = 0
    site: int = 0

    @property
    def ai(self) -> int:
        return self.placements + self.idle + self.cooling_hosts

    @property
    def hashing(self) -> int:
        return self.miners + self.cooling_miners

    @property
    def remainder(self) -> int:
        return self.site - self.ai - self.hashing - self.fixed

    def __add__(self, other: Use) -> Use:
        return Use(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def drawn(
    placements_w: int, idle_w: int, miners_w: int, ms: int, *, pue_permille: int = 1000, miner_pue_permille: int = 1000,
    fixed_w: int = 0, metered_w: int | None = None,
) -> Use:  # fmt: skip
    """One sample that stands for `ms`. Cooling is what the PUEs say of the devices' watts, whole watts down."""
    cooling_hosts = (placements_w + idle_w) * (pue_permille - 1000) // 1000
    cooling_miners = miners_w * (miner_pue_permille - 1000) // 1000
    parts = (placements_w, idle_w, miners_w, cooling_hosts, cooling_miners, fixed_w)
    site = sum(parts) if metered_w is None else metered_w
    return Use(*(watts * ms for watts in (*parts, site)))


def merged(ids: Sequence[int], values: Sequence[int], more: Mapping[int, int]) -> tuple[list[int], list[int]]:
    """Columns by device, ascending, with `more` added; who has nothing is left out."""
    total = dict(zip(ids, values, strict=True))
    for key, value in more.items():
        total[key] = total.get(key, 0) + value
    kept = sorted((key, value) for key, value in total.items() if value)
    return [key for key, _ in kept], [value for _, value in kept]


def told(parts: Sequence[Fraction]) -> list[int]:
    """Each part's floor or one more, so that they sum to the sum of all, rounded half up; ties go to the earlier part."""
    floors = [part.numerator // part.denominator for part in parts]
    whole = sum(parts, Fraction()) + Fraction(1, 2)
    missing = whole.numerator // whole.denominator - sum(floors)
    by_rest = sorted(range(len(parts)), key=lambda i: (floors[i] - parts[i], i))
    for i in by_rest[:missing]:
        floors[i] += 1
    return floors


@dataclass(frozen=True, slots=True)
class Hour:
    """Sums over an hour's minutes. Costs and carbon are products not yet divided: millijoules x micro-USD (or grams) per MWh,
    of AI, of hashing, and of all else; `hashing`: work x hashprice x millionths that the pool keeps not. `carbon` is None where
    some minute's intensity is unknown.
    """

    use: Use
    seen_ms: int = 0
    cost: tuple[int, int, int] = (0, 0, 0)
    carbon: tuple[int, int, int] | None = None
    hashing: int = 0


@dataclass(frozen=True, slots=True)
class Line:
    """One kind in one hour. `paid_uusd`: what was received for it, None while nobody has said."""

    revenue_uusd: int
    paid_uusd: int | None
    energy_mj: int
    energy_uusd: int
    carbon_mg: int | None


def lines(hour: Hour, ai_uusd: int, paid: Mapping[str, int]) -> dict[str, Line]:
    """The P&L of an hour. Energy: AI and hashing bear their devices and their cooling; `energy` is what neither drew (the fixed
    load, and what the meter saw besides). Energy, its cost and carbon sum over the kinds to those of the site.
    """
    mj = (hour.use.ai, hour.use.hashing, 0, hour.use.site - hour.use.ai - hour.use.hashing)
    cost = told([Fraction(part, MJ_PER_MWH) for part in (*hour.cost[:2], 0, hour.cost[2])])
    carbon: Sequence[int | None] = (None,) * len(KINDS)
    if hour.carbon is not None:
        carbon = told([Fraction(1000 * part, MJ_PER_MWH) for part in (*hour.carbon[:2], 0, hour.carbon[2])])
    hashed = hour.hashing // (WORK_PER_PH_DAY * MILLION)
    revenue = (ai_uusd, hashed, paid.get(DEMAND_RESPONSE, 0), 0)
    return {
        kind: Line(revenue[i], paid.get(kind), mj[i], cost[i], carbon[i]) for i, kind in enumerate(KINDS)
    }  # fmt: skip


def spread(amount: int, weights: Sequence[int], otherwise: Sequence[int]) -> tuple[int, ...]:
    """What was paid for a time, over its hours: by what each was expected to earn; by `otherwise` where none was to earn anything."""
    return split_largest_remainder(amount, weights if sum(weights) > 0 else otherwise)


def hours_of(start_s: int, end_s: int) -> list[tuple[int, int]]:
    """(an hour's start, seconds of it inside), whole seconds since 1970."""
    return [(at // 1000, ms // 1000) for at, ms in spans(start_s * 1000, end_s * 1000, 3_600_000)]
