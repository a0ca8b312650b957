"""What the work behind lines of an invoice drew, by the accounting of its sites (`services.site_minutes`); the site's cooling is not in it.

Energy is kept by placement and hour; an hour that several lines share (a price that changed, an edge of the period) is theirs by the
seconds of use, so that nothing is told twice. An amount never depends on it.
"""

from __future__ import annotations

from collections.abc import Iterable

from django.db import connection

from billing.core.energy import MJ_PER_MILLIWH
from billing.models import InvoiceLine, Meter

_OF = (InvoiceLine.Kind.USAGE, InvoiceLine.Kind.COMMITMENT)

_DREW = f"""
WITH lines AS (
  SELECT * FROM unnest(%s::bigint[], %s::bigint[], %s::bigint[], %s::bigint[], %s::bigint[]) l(id, contract, version, start_s, end_s)
), used AS (
  SELECT DISTINCT ON (u.placement_id, u.start_s) u.placement_id, u.contract_id, u.price_version_id, u.start_s,
    LEAST(u.end_s, u.start_s + u.quantity / u.rate) AS end_s
  FROM billing_usagerecord u WHERE u.meter = {Meter.GPU.value} AND u.contract_id = ANY(SELECT contract FROM lines)
    AND u.start_s < (SELECT max(end_s) FROM lines) AND u.end_s > (SELECT min(start_s) / 3600 * 3600 FROM lines)
  ORDER BY u.placement_id, u.start_s, u.revision DESC
), pieces AS (
  SELECT used.*, h AS hour, LEAST(used.end_s, h + 3600) - GREATEST(used.start_s, h) AS seconds
  FROM used, generate_series(used.start_s / 3600 * 3600, used.end_s - 1, 3600) h
), drew AS (
  SELECT p.*, d.mj[x.i]::numeric / sum(p.seconds) OVER (PARTITION BY p.placement_id, p.hour) AS mj_a_second
  FROM pieces p JOIN marketplace_placement a ON a.id = p.placement_id
  JOIN marketplace_devicehour d ON d.site_id = a.site_id AND d.of = 'placement' AND d.start = to_timestamp(p.hour)
  CROSS JOIN LATERAL (SELECT array_position(d.ids, p.placement_id) AS i) x WHERE x.i IS NOT NULL AND p.seconds > 0
)
SELECT l.id, round(sum(w.mj_a_second * s.seconds) / {MJ_PER_MILLIWH * 1000}) FROM lines l
  JOIN drew w ON w.contract_id = l.contract AND (l.version = 0 OR w.price_version_id = l.version)
  CROSS JOIN LATERAL (SELECT LEAST(w.end_s, w.hour + 3600, l.end_s) - GREATEST(w.start_s, w.hour, l.start_s) AS seconds) s
  WHERE s.seconds > 0 GROUP BY l.id
"""  # noqa: S608 - constants only


def of_lines(rows: Iterable[InvoiceLine]) -> dict[int, int]:
    """Wh by the line's key, of one invoice's lines in their order; what nobody accounted for is missing. One statement.

    Use is behind lines of use, by their price, and behind the first line of a commitment, whole. Late adjustments and all other lines
    have none: their work is behind another line.
    """
    wanted: dict[tuple[int, int, int], tuple[int, int, int, int, int]] = {}
    for row in rows:
        if row.kind in _OF and not row.adjustment:
            version = row.price_version_id if row.kind == InvoiceLine.Kind.USAGE else 0
            key = (row.contract_id, version, row.start_s)
            wanted.setdefault(key, (row.pk, row.contract_id, version, row.start_s, row.end_s))
    if not wanted:
        return {}
    with connection.cursor() as cursor:
        cursor.execute(_DREW, [list(column) for column in zip(*wanted.values(), strict=True)])
        return {pk: int(wh) for pk, wh in cursor.fetchall()}
