"""A limit that spans cells, shared out in slices: what lies within its slice a cell gives away without asking the others.

Amounts are milli-GPU. While every cell keeps to its slice and the slices together to the limit, the limit holds, whoever commits at
the same moment.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def shared(limit: int, cell: int, need: int, slices: Mapping[int, int], held: Mapping[int, int]) -> dict[int, int]:
    """The slices once `cell` shall hold `need`, all told: what no cell has goes there first, then what others have and do not
    hold, from the one with most to spare. Of what nobody has after that it gets half, so that it seldom asks again.

    `held` is what lives in each cell. No slice is made smaller than that, even where it is beyond a limit that was lowered.
    """
    new = {c: max(slices.get(c, 0), held.get(c, 0)) for c in sorted({cell, *slices, *held})}
    elsewhere = sum(held.get(c, 0) for c in new if c != cell)
    new[cell] = max(held.get(cell, 0), min(need, limit - elsewhere))
    over = sum(new.values()) - limit
    for c in sorted((c for c in new if c != cell), key=lambda c: held.get(c, 0) - new[c]):
        taken = max(0, min(over, new[c] - held.get(c, 0)))
        new[c] -= taken
        over -= taken
    new[cell] += max(0, -over) // 2
    return new


def refused(jobs: Iterable[tuple[int, int, int]], free: Mapping[int, int]) -> set[int]:
    """Jobs that what is `free` for their organization does not hold, taken in order: (job, organization, milli-GPU). What is
    missing from `free` has no limit.
    """
    left, out = dict(free), set()
    for job, organization, milli in jobs:
        if organization not in left:
            continue
        if milli > left[organization]:
            out.add(job)
        else:
            left[organization] -= milli
    return out
