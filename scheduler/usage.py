"""Decayed usage: what each organization holds and has held lately, over all cells, out of the timeline of placements.

The usage that weighs in the fair order (`core.order.weighed`) is what an organization holds now, plus a multiple of the exponentially
weighted mean of what it held: each placement's amount * (2^-(age of its end) - 2^-(age of its start)), ages in half-lives
(`FAIR_SHARE_HALF_LIFE_SECONDS`; the same formula as `core.order.decayed`). An amount is in milli-GPU, by the dominant resource of
its host: half of a host's CPU counts as half of its GPUs.

`FairUsage` holds the sums as they stood at its `as_of`; `of` brings them forward with the placements that lived since then, so its
answer is exact at every moment and does not depend on when `roll` last ran. `roll` (each minute) only keeps that remainder
short. A placement whose end is reported late, as of a moment before the last roll, has counted up to that roll.
"""

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any

from django.conf import settings
from django.db import connection, transaction

from marketplace import prepared
from scheduler.core.order import weighed
from scheduler.core.types import Request

# `since` is the mark of the last roll; before the first one, usage older than 20 half-lives (one millionth) is left out. An
# exponent below -60 is none at all, and would underflow.
_DECAYED = """
WITH mark AS (SELECT coalesce(max(as_of), %(now)s - %(half)s * interval '20 s') AS since FROM scheduler_fairusage),
lived AS (
  SELECT p.organization_id,
    greatest(
      cardinality(p.gpu_indices) * p.gpu_milli,
      1000.0 * greatest(h.gpu_count, 1) * greatest(
        p.vcpu_milli::float8 / greatest(h.vcpu_milli, 1), p.ram_mib::float8 / greatest(h.ram_mib, 1))
    ) AS milli,
    p.finished_at IS NULL AS live,
    greatest(-60, extract(epoch FROM least(coalesce(p.finished_at, %(now)s), %(now)s) - %(now)s) / %(half)s) AS ended,
    greatest(-60, extract(epoch FROM greatest(p.created_at, mark.since) - %(now)s) / %(half)s) AS began
  FROM marketplace_placement p JOIN marketplace_host h ON h.id = p.host_id CROSS JOIN mark
  WHERE (p.finished_at > mark.since OR p.state NOT IN ('released', 'failed', 'lost')) AND p.created_at <= %(now)s
    AND (%(every)s OR p.organization_id = ANY(%(organizations)s))
),
parts AS (
  SELECT organization_id, milli * (power(2, ended) - power(2, began)) AS decayed, CASE WHEN live THEN milli ELSE 0 END AS held
  FROM lived WHERE ended > began
  UNION ALL
  SELECT organization_id, milli * power(2, greatest(-60, extract(epoch FROM as_of - %(now)s) / %(half)s)), 0
  FROM scheduler_fairusage
  WHERE %(every)s OR organization_id = ANY(%(organizations)s)
  UNION ALL
  SELECT organization_id, 0, milli FROM lived WHERE live AND ended <= began
)
SELECT organization_id, sum(decayed)::float8 AS decayed, sum(held)::float8 AS held FROM parts GROUP BY organization_id
"""
_ROLL_LOCK = (0x46 << 56) | 1


def of(organizations: Collection[int], *, now: datetime) -> dict[int, float]:
    """Milli-GPU held now and in the past (`core.order.weighed`), by organization; who never held anything is missing."""
    return {org: weighed(held, decayed) for org, (decayed, held) in parts(organizations, now=now).items()}


def bind(requests: Sequence[Request], *, now: datetime) -> None:
    """Gives every request the usage of its organization."""
    found = of({r.org for r in requests}, now=now)
    for r in requests:
        r.usage = found.get(r.org, 0.0)


def parts(organizations: Collection[int], *, now: datetime) -> dict[int, tuple[float, float]]:
    """(decayed mean, held now), milli-GPU, by organization."""
    asked = _arguments(now) | {"every": False, "organizations": sorted(organizations)}
    return {org: (decayed, held) for org, decayed, held in prepared.rows(_DECAYED, asked)}


def roll(*, now: datetime) -> int:
    """Moves the mark to `now`; returns how many organizations have usage. One at a time; a second one waits."""
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(%s)", [_ROLL_LOCK])
        cursor.execute("SELECT coalesce(max(as_of) >= %s, false) FROM scheduler_fairusage", [now])
        if cursor.fetchone()[0]:
            return 0
        cursor.execute(
            f"""
            INSERT INTO scheduler_fairusage (organization_id, milli, as_of)
            SELECT organization_id, decayed, %(now)s FROM ({_DECAYED}) AS sums
            ON CONFLICT (organization_id) DO UPDATE SET milli = excluded.milli, as_of = excluded.as_of
            """,  # noqa: S608  # both parts are constants of this module
            _arguments(now) | {"every": True, "organizations": []},
        )
        rolled = int(cursor.rowcount)
        # Who used nothing for long is forgotten; somebody's row always carries the mark.
        cursor.execute(
            "DELETE FROM scheduler_fairusage WHERE milli < 0.001 AND organization_id <> ("
            "SELECT min(organization_id) FROM scheduler_fairusage)"
        )
        return rolled


def _arguments(now: datetime) -> dict[str, Any]:
    return {"now": now, "half": float(settings.FAIR_SHARE_HALF_LIFE_SECONDS)}
