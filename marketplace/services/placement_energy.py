"""What placements drew, for those whose jobs they are: Wh and average watts, by the accounting of their sites (`site_minutes`).

It is the host's draw by the placement's part of its GPUs in use; cooling is the site's and not in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from django.db import connection

from billing.core.energy import MJ_PER_MILLIWH
from marketplace.models import Placement

_HOUR_BY_HOUR = """
SELECT w.id, sum(d.mj[x.i]), sum(d.mj[x.i]) FILTER (WHERE d.ms[x.i] > 0), sum(d.ms[x.i])
FROM unnest(%s::bigint[], %s::bigint[], %s::timestamptz[], %s::timestamptz[]) AS w(id, site, start, until)
JOIN marketplace_devicehour d ON d.site_id = w.site AND d.of = 'placement'
  AND d.start >= date_trunc('hour', w.start, 'UTC') AND d.start <= w.until
CROSS JOIN LATERAL (SELECT array_position(d.ids, w.id) AS i) x
WHERE x.i IS NOT NULL GROUP BY w.id
"""


@dataclass(frozen=True)
class Drew:
    """`average_w`: over the time that was accounted for; None where none was, or it is from before that time was kept."""

    wh: int = 0
    average_w: int | None = None


def of_placements(rows: Sequence[Placement], *, now: datetime) -> dict[int, Drew]:
    """By the placement's key, every one of `rows`; one query."""
    if not rows:
        return {}
    spans = [(p.pk, p.site_id, p.created_at, p.finished_at or now) for p in rows]
    with connection.cursor() as cursor:
        cursor.execute(_HOUR_BY_HOUR, [list(column) for column in zip(*spans, strict=True)])
        found = {pk: _drew(*(int(n or 0) for n in sums)) for pk, *sums in cursor.fetchall()}
    return {p.pk: found.get(p.pk, Drew()) for p in rows}


def _drew(mj: int, timed_mj: int, ms: int) -> Drew:
    wh = MJ_PER_MILLIWH * 1000
    return Drew((2 * mj + wh) // (2 * wh), (2 * timed_mj + ms) // (2 * ms) if ms else None)
