"""Which hall starts when: the exact best by net present value, under the crews and the capital there are."""

from __future__ import annotations

from typing import Final

import numpy as np

from scheduler.core.conversion.inputs import Hall, Site
from scheduler.core.conversion.months import Life, Outcome, outcome
from scheduler.core.conversion.returns import npv
from scheduler.core.types import F64

_NO: Final = -np.inf


def plan(site: Site) -> Outcome:
    """The best schedule and what it comes to. Raises ConversionError."""
    site.check()
    return outcome(site, best(site))


def best(site: Site) -> tuple[int | None, ...]:
    """The month in which each hall starts; None: never.

    Exact, by dynamic programming over sets of halls: what one crew gains at most from each set, built one after another by each
    month (2^halls x months); then what several crews gain that share a set out among them (3^halls a crew); then the best of the
    sets that the capital pays for. At most 12 halls (`Site.check`).
    """
    halls, sets = range(len(site.halls)), 1 << len(site.halls)
    ends = [_by_end(site, hall) for hall in site.halls]
    alone = _one_crew(ends, [built_in(hall) for hall in site.halls])
    value, shares = alone[:, -1].copy(), [np.arange(sets)]  # shares[c][S]: the part of S that crew c takes
    for _ in range(1, min(site.crews, len(site.halls))):
        more, part = value.copy(), np.zeros(sets, np.int64)
        for whole in range(1, sets):
            mine = whole
            while mine:
                gained = alone[mine, -1] + value[whole ^ mine]
                if gained > more[whole]:
                    more[whole], part[whole] = gained, mine
                mine = (mine - 1) & whole
        value = more
        shares.append(part)
    if site.capital_cents is not None:
        each = [Life(site, hall).capital_cents for hall in site.halls]
        dear = [sum(each[h] for h in halls if s >> h & 1) > site.capital_cents for s in range(sets)]
        value[dear] = _NO
    rest = int(value.argmax())
    found: list[int | None] = [None] * len(site.halls)
    for part in reversed(shares):
        mine = int(part[rest])
        for hall, end in _sequence(alone, ends, site, mine):
            found[hall] = end - built_in(site.halls[hall]) - waits(site.halls[hall])
        rest ^= mine
    return tuple(found)


def waits(hall: Hall) -> int:
    """Months from its start until a crew is needed."""
    return max(hall.permit_months, hall.lead_months)


def built_in(hall: Hall) -> int:
    """Months in which it needs a crew."""
    return hall.build_months + hall.commission_months


def _by_end(site: Site, hall: Hall) -> F64:
    """[months + 1]: what is gained over hashing on if its works end with month e, all of it within the horizon; else minus infinity."""
    life = Life(site, hall)
    stays = npv([m.cash_cents for m in life.path(None)], site.wacc_permille)
    first = waits(hall) + built_in(hall)
    gains = np.full(site.horizon_months + 1, _NO)
    for end in range(first, site.horizon_months):
        gains[end] = npv([m.cash_cents for m in life.path(end - first)], site.wacc_permille) - stays
    return gains


def _one_crew(ends: list[F64], takes: list[int]) -> F64:
    """[sets, months + 1]: the most that one crew gains which has built all of the set by then."""
    table = np.full((1 << len(ends), len(ends[0])), _NO)
    table[0] = 0.0
    for s in range(1, len(table)):
        for h, gains in enumerate(ends):
            if s >> h & 1:
                before = np.full(len(gains), _NO)
                before[takes[h] :] = table[s ^ 1 << h][: len(gains) - takes[h]]
                np.maximum(table[s], before + gains, out=table[s])
        np.maximum.accumulate(table[s], out=table[s])
    return table


def _sequence(table: F64, ends: list[F64], site: Site, chosen: int) -> list[tuple[int, int]]:
    """(hall, month its works end) of what one crew builds to gain table[chosen, -1]."""
    out, by = [], table.shape[1] - 1
    while chosen:
        while by and table[chosen, by - 1] == table[chosen, by]:
            by -= 1
        for h, gains in enumerate(ends):
            takes = built_in(site.halls[h])
            if chosen >> h & 1 and by >= takes and table[chosen ^ 1 << h, by - takes] + gains[by] == table[chosen, by]:
                out.append((h, by))
                chosen, by = chosen ^ 1 << h, by - takes
                break
    return out
