"""The one place where a host's condition is written down. Whoever changes what it depends on (the host's state, its site's mode or
silence, what is on offer) calls `record` in the same transaction; nothing is worked out from logs afterwards.

A condition follows from the rows as they stand, so a second call changes nothing, and the power loop's own call every few
seconds brings in what nobody writes: silence, and a listing whose last contract has ended.
"""

from collections.abc import Collection
from datetime import datetime, timedelta
from typing import Any, Final

from django.db import connection

SILENT: Final = timedelta(seconds=90)  # without a word, a site is silent

# Of each host wanted: what it is now, and since when (null: since now). A silence begins with the last word heard, and not before
# our own return: nobody is silent towards somebody who is away.
_NOW: Final = f"""
WITH back AS (SELECT max(resumed_at) AS at FROM marketplace_controlpulse),
heard AS (
  SELECT site_id, greatest(max(last_sync_at), (SELECT at FROM back)) AS at FROM marketplace_agent
  WHERE last_sync_at IS NOT NULL GROUP BY site_id
), found AS (
  SELECT h.id AS host_id, h.state_reason AS reason, CASE
    WHEN h.state = 'retired' OR l.id IS NULL THEN 'not_offered'
    WHEN l.state NOT IN ('published', 'paused') AND NOT EXISTS (
      SELECT FROM marketplace_contract c WHERE c.listing_id = l.id AND c.state IN ('active', 'ending')) THEN 'not_offered'
    WHEN heard.at < %(now)s - interval '{SILENT.total_seconds()} s' THEN 'silent'
    WHEN h.state = 'lost' THEN 'lost'
    WHEN s.mode = 'off' THEN 'off'
    WHEN h.state = 'maintenance' THEN 'maintenance'
    WHEN h.state = 'draining' AND (h.leaves_at IS NULL OR h.leaves_at <= %(now)s) THEN 'draining'
    ELSE 'able' END AS kind, CASE h.state WHEN 'lost' THEN greatest(h.beat_at, (SELECT at FROM back)) END AS lost_at, heard.at AS heard_at
  FROM marketplace_host h JOIN marketplace_site s ON s.id = h.site_id LEFT JOIN marketplace_listing l ON l.id = h.listing_id
  LEFT JOIN heard ON heard.site_id = h.site_id
  WHERE h.id = ANY (%(hosts)s) OR h.site_id = ANY (%(sites)s) OR h.listing_id = ANY (%(listings)s)
), changed AS (
  SELECT i.host_id, i.kind, i.reason, c.id AS open_id,
    greatest(c.starts_at, CASE i.kind WHEN 'lost' THEN coalesce(i.lost_at, %(now)s) WHEN 'silent' THEN i.heard_at ELSE %(now)s END) AS at
  FROM found i LEFT JOIN marketplace_hostcondition c ON c.host_id = i.host_id AND c.ends_at IS NULL
  WHERE c.kind IS DISTINCT FROM i.kind
)
"""  # noqa: S608
_WHO: Final = _NOW + "SELECT host_id FROM changed ORDER BY host_id"  # noqa: S608
_WRITE: Final = f"""{_NOW}, closed AS (
  UPDATE marketplace_hostcondition c SET ends_at = ch.at FROM changed ch WHERE c.id = ch.open_id RETURNING c.id
)
INSERT INTO marketplace_hostcondition (host_id, kind, starts_at, reason, recorded_at)
SELECT host_id, kind, at, reason, %(now)s FROM changed ORDER BY host_id
"""  # noqa: S608


def record(
    *, now: datetime, hosts: Collection[int] = (), sites: Collection[int] = (), listings: Collection[int] = ()
) -> int:
    """Write down the condition of these hosts, of these sites' and of these listings', where it has changed; returns of how many.

    In the transaction that changed it. The rows of hosts that changed are locked in order of id, beneath what the caller holds.
    """
    assert connection.in_atomic_block, "a condition is written with what changed it"
    wanted: dict[str, Any] = {"now": now, "hosts": list(hosts), "sites": list(sites), "listings": list(listings)}
    changed = _changed(wanted)
    if not changed:
        return 0
    with connection.cursor() as cursor:
        # Two who write at once wait here, and the second reads what the first has left.
        cursor.execute("SELECT FROM marketplace_host WHERE id = ANY (%s) ORDER BY id FOR NO KEY UPDATE", [changed])
        cursor.execute(_WRITE, {**wanted, "hosts": changed, "sites": [], "listings": []})
        return int(cursor.rowcount)


def _changed(wanted: dict[str, Any]) -> list[int]:
    """Hosts whose rows say other than what was written down last."""
    with connection.cursor() as cursor:
        cursor.execute(_WHO, wanted)
        return [pk for (pk,) in cursor.fetchall()]
