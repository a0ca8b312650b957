"""Slices of organizations' GPU limits, one for each cell: what a commit charges, and how a cell gets more of it.

A commit whose organizations keep to their slices locks its cell's rows alone. An organization that would go beyond takes its lock
too, and the slices of all its cells: what they do not hold may move. Its slices never come to more than its limit, so cells that
commit at the same moment cannot give the same remainder away twice. What a placement held is free again once it has ended: what is
held is counted from live placements, never kept beside them.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping

from marketplace import prepared
from scheduler.core.slices import shared

# A slice that does not hold what is wanted; or slices that come to more than a limit that was lowered.
_BEYOND = """
SELECT w.organization FROM unnest(%s::bigint[], %s::bigint[]) w(organization, milli)
JOIN marketplace_organization o ON o.id = w.organization
CROSS JOIN LATERAL (SELECT coalesce(sum(s.milli), 0) AS shared, coalesce(sum(s.milli) FILTER (WHERE s.cell_id = %s), 0) AS here
  FROM marketplace_organizationslice s WHERE s.organization_id = w.organization) s
WHERE w.milli > s.here OR s.shared > o.gpu_limit * 1000::bigint
"""
_LOCKED = """
SELECT organization_id, cell_id, milli FROM marketplace_organizationslice
WHERE organization_id = ANY(%s) AND (cell_id = %s OR organization_id = ANY(%s)) ORDER BY 1, 2 FOR NO KEY UPDATE
"""
_HELD = """
SELECT organization_id, cell_id, sum(cardinality(gpu_indices) * gpu_milli)::bigint FROM marketplace_placement
WHERE state NOT IN ('released', 'failed', 'lost') AND organization_id = ANY(%s) GROUP BY 1, 2
"""
_WRITE = """
INSERT INTO marketplace_organizationslice AS s (organization_id, cell_id, milli)
SELECT * FROM unnest(%s::bigint[], %s::bigint[], %s::bigint[]) u(organization, cell, milli) ORDER BY 1, 2
ON CONFLICT (organization_id, cell_id) DO UPDATE SET milli = excluded.milli WHERE s.milli <> excluded.milli
"""


def beyond(cell_id: int, wanted: Mapping[int, int]) -> list[int]:
    """Organizations whose slice in the cell may not hold `wanted` (milli-GPU, all told): a commit takes their locks first."""
    found = prepared.rows(_BEYOND, [list(wanted), list(wanted.values()), cell_id])
    return sorted(organization for (organization,) in found)


def hold(cell_id: int, wanted: Mapping[int, int], growing: Collection[int]) -> dict[int, int]:
    """What each organization may hold in the cell at once, milli-GPU; nobody changes it before the transaction ends.

    The caller holds the cell's lock, and those of the organizations that are `growing`: their slice here is made to hold
    `wanted` as far as their limit lets it.
    """
    slices: dict[int, dict[int, int]] = defaultdict(dict)
    for organization, cell, milli in prepared.rows(_LOCKED, [list(wanted), cell_id, list(growing)]):
        slices[organization][cell] = milli
    if growing:
        # Seen after the rows were locked: whoever held them has written its placements.
        held: dict[int, dict[int, int]] = defaultdict(dict)
        for organization, cell, milli in prepared.rows(_HELD, [list(growing)]):
            held[organization][cell] = milli
        limits = prepared.rows("SELECT id, gpu_limit FROM marketplace_organization WHERE id = ANY(%s)", [list(growing)])
        for organization, limit in limits:
            mine = slices[organization], held[organization]
            slices[organization] = shared(limit * 1000, cell_id, wanted[organization], *mine)
        _write({organization: slices[organization] for organization, _ in limits})
    return {organization: slices[organization].get(cell_id, 0) for organization in wanted}


def _write(slices: Mapping[int, Mapping[int, int]]) -> None:
    rows = [(organization, cell, milli) for organization, mine in slices.items() for cell, milli in mine.items()]
    prepared.rows(_WRITE, [list(column) for column in zip(*rows, strict=True)])
