"""The market as columns that the process keeps, brought up to date before every search from what has changed.

Triggers write a row of `OfferChange` (what, which, by which transaction) whenever something changes that a search shows; changes of
hosts, and with them the placements on them, already carry `Host.changed_in`. What an earlier reading could not see is asked of its
own `pg_current_snapshot()`: a transaction that was open then and commits later is read again, whatever was read in between (as
`scheduler.fleet` does it). The rows named are then read whole: newer still does no harm, for what they miss is named next time.

A transaction that has written reads on from what is kept, and keeps nothing: it may yet be undone.
"""

from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple

import numpy as np
from django.db import connection, transaction

from marketplace import arrays
from marketplace.services.offers import Names, Offers, Rows
from scheduler.core.capacity import FOREVER
from scheduler.core.claims import Ints

PRUNE_EVERY = timedelta(minutes=10)  # a process that has not searched for so long reads everything anew
ALL, LISTING, HOST, SITE, MODEL = range(5)  # OfferChange.what


class Moment(NamedTuple):
    """What a reading could see: PostgreSQL's own snapshot, on which server; `floor`: changes below it are pruned."""

    snapshot: str
    xmin: int
    xmax: int
    writing: bool
    server: str
    floor: int


class _Kept(NamedTuple):
    moment: Moment
    offers: Offers


_kept: _Kept | None = None

_HEAD: Final = """
pg_current_snapshot()::text, pg_snapshot_xmin(pg_current_snapshot())::text::bigint,
pg_snapshot_xmax(pg_current_snapshot())::text::bigint, pg_current_xact_id_if_assigned() IS NOT NULL,
(SELECT oid::text FROM pg_database WHERE datname = current_database()) || pg_postmaster_start_time()::text,
coalesce((SELECT max(floor) FROM marketplace_offerfloor), 0)
"""
_CHANGED: Final = f"""
WITH changes AS (
  SELECT DISTINCT what, row_id FROM marketplace_offerchange
  WHERE changed_in >= %(xmin)s AND NOT pg_visible_in_snapshot(changed_in::text::xid8, %(seen)s::pg_snapshot)
), sites AS (SELECT row_id FROM changes WHERE what = {SITE}), models AS (SELECT row_id FROM changes WHERE what = {MODEL})
SELECT {_HEAD}, EXISTS (SELECT FROM changes WHERE what = {ALL}),
ARRAY(SELECT row_id FROM changes WHERE what = {LISTING}
  UNION SELECT id FROM marketplace_listing WHERE site_id IN (SELECT row_id FROM sites)
  UNION SELECT id FROM marketplace_listing WHERE gpu_model_id IN (SELECT row_id FROM models)),
ARRAY(SELECT row_id FROM changes WHERE what = {HOST}
  UNION SELECT id FROM marketplace_host WHERE site_id IN (SELECT row_id FROM sites)
  UNION SELECT id FROM marketplace_host WHERE cell_id = ANY (ARRAY(SELECT id FROM marketplace_cell))
    AND changed_in >= %(xmin)s AND NOT pg_visible_in_snapshot(changed_in::text::xid8, %(seen)s::pg_snapshot))
"""  # noqa: S608


def _epoch(column: str, missing: int) -> str:
    return f"coalesce(floor(extract(epoch FROM {column})), {missing})"


# Column -> SQL. `text` columns become numbers (Names).
_LISTING: Final = {
    "id": "l.id",
    "organization_id": "l.organization_id",
    "livemode": "c.livemode::int",
    "partners_only": "(l.visibility <> 'public')::int",
    "on_demand_price": "coalesce(l.on_demand_price, -1)",
    "reserved_price": "coalesce(l.reserved_price, -1)",
    "flexible_price": "coalesce(l.flexible_price, -1)",
    "spot_floor": "coalesce(l.spot_floor, -1)",
    "upfront_permille": "l.upfront_permille",
    "min_gpus": "l.min_gpus",
    "min_term_hours": "l.min_term_hours",
    "max_term_days": "l.max_term_days",
    "eviction_notice_s": "l.eviction_notice_s",
    "flexible_hours_per_month": "l.flexible_hours_per_month",
    "flexible_notice_s": "l.flexible_notice_s",
    "emergency_clause": "(l.emergency_notice_s IS NOT NULL)::int",
    "emergency_notice_s": "coalesce(l.emergency_notice_s, -1)",
    "available_from": _epoch("l.available_from", -1),
    "available_until": _epoch("l.available_until", -1),
    "is_resale": "l.is_resale::int",
    "fabric_gbps": "l.fabric_gbps",
    "vram_mib": "coalesce(m.vram_mib, -1)",
    "carbon_g_per_kwh": "coalesce(s.carbon_g_per_kwh, -1)",
    "renewable_permille": "coalesce(s.renewable_permille, -1)",
    "reliability_permille": "coalesce(r.score_permille, -1)",
}
_LISTING_TEXT: Final = {
    "gpu_model": "m.name",
    "region": "s.region",
    "country": "s.country",
    "interconnect": "l.interconnect",
    "runtime": "l.runtime",
    "currency": "l.currency",
}
_LISTINGS: Final = """
marketplace_listing l JOIN marketplace_site s ON s.id = l.site_id JOIN marketplace_cell c ON c.id = s.cell_id
LEFT JOIN marketplace_gpumodel m ON m.id = l.gpu_model_id LEFT JOIN marketplace_reliability r ON r.listing_id = l.id
WHERE l.state = 'published'
"""
_PARTNER: Final = {"listing_id": "p.listing_id", "organization_id": "p.organization_id"}
_PARTNERS: Final = "marketplace_listing_partners p WHERE true"
_TIER: Final = {
    "listing_id": "l.id",
    "flexible": "(t.kind = 'flexible')::int",
    "min_term_hours": "t.min_term_hours",
    "upfront_permille": "t.upfront_permille",
    "flexible_hours_per_month": "t.flexible_hours_per_month",
    "price": "t.price",
}
_TIERS: Final = """
marketplace_listing l CROSS JOIN LATERAL jsonb_to_recordset(l.price_tiers)
AS t(kind text, min_term_hours bigint, upfront_permille bigint, flexible_hours_per_month bigint, price bigint)
WHERE l.state = 'published'
"""
_HOST: Final = {
    "id": "h.id",
    "listing_id": "h.listing_id",
    "gpu_count": "h.gpu_count",
    # What maintenance has comes back (`back_at`); until then its claim, a reservation of nobody's contract, has the host.
    "up": "((h.state = 'active' OR h.back_at IS NOT NULL OR (h.state = 'draining' AND h.leaves_at IS NOT NULL))"
    " AND s.mode <> 'off')::int",
    "leaves": f"CASE WHEN h.state = 'draining' AND h.back_at IS NULL THEN {_epoch('h.leaves_at', FOREVER)} ELSE {FOREVER} END",
    "broken": "(SELECT count(*) FROM marketplace_gpu g WHERE g.host_id = h.id AND NOT g.healthy)",
    "vcpu_milli": "h.vcpu_milli",
    "ram_mib": "h.ram_mib",
    "nvme_gib": "h.nvme_gib",
    "cap_control": "h.cap_control::int",
    "part": "0",
    "verified": "coalesce((v.state = 'verified')::int, 0)",
    "benchmark_score": "CASE WHEN v.state = 'verified' THEN v.score ELSE -1 END",
}
_HOST_TEXT: Final = {"spine": "h.spine", "leaf": "h.leaf"}
_HOSTS: Final = """
marketplace_host h JOIN marketplace_site s ON s.id = h.site_id LEFT JOIN marketplace_hostverification v ON v.host_id = h.id
WHERE h.listing_id IS NOT NULL AND h.state <> 'retired'
"""
# What a resale has set aside on a host is a host of its own to the market.
_PART: Final = {
    **_HOST,
    "listing_id": "x.listing_id",
    "gpu_count": "cardinality(a.gpu_indices)",
    "broken": "(SELECT count(*) FROM marketplace_gpu g WHERE g.host_id = h.id AND NOT g.healthy AND g.index = ANY (a.gpu_indices))",
    "part": "a.id",
}
_PARTS: Final = """
marketplace_resale x JOIN marketplace_reservationblock a ON a.reservation_id = x.reservation_id
JOIN marketplace_host h ON h.id = a.host_id JOIN marketplace_site s ON s.id = h.site_id
LEFT JOIN marketplace_hostverification v ON v.host_id = h.id WHERE x.state = 'open' AND h.state <> 'retired'
"""
_HOLD: Final = {
    "host_id": "b.host_id",
    "claims_at": _epoch("r.claims_at", 0),
    "ends_at": _epoch("r.ends_at", 0),
    "gpus": "cardinality(b.gpu_indices)",
    "part": "CASE WHEN r.within_id IS NULL THEN 0 ELSE coalesce((SELECT a.id FROM marketplace_reservationblock a"
    " WHERE a.reservation_id = r.within_id AND a.host_id = b.host_id), -1) END",
    "held_until": f"CASE r.state WHEN 'held' THEN {_epoch('r.held_until', 0)} ELSE {FOREVER} END",
}
_HOLDS: Final = """
marketplace_reservationblock b JOIN marketplace_reservation r ON r.id = b.reservation_id WHERE r.state IN ('held', 'firm')
"""
_TASK: Final = {
    "host_id": "p.host_id",
    "gpu": "u.gpu",
    "ends_at": _epoch("c.ends_at", FOREVER),
    "own_until": _epoch("own.ends_at", 0),
}
_TASKS: Final = """
marketplace_placement p JOIN marketplace_contract c ON c.id = p.contract_id CROSS JOIN LATERAL unnest(p.gpu_indices) u(gpu)
LEFT JOIN LATERAL (
  SELECT max(r.ends_at) ends_at FROM marketplace_reservation r JOIN marketplace_reservationblock b ON b.reservation_id = r.id
  WHERE r.contract_id = c.id AND r.state = 'firm' AND b.host_id = p.host_id AND u.gpu = ANY (b.gpu_indices)
) own ON c.kind IN ('reserved', 'flexible')
WHERE p.state NOT IN ('released', 'failed', 'lost') AND c.kind <> 'spot'
"""


def read() -> Offers:
    """The market as the running transaction sees it; one statement where nothing has changed since the last reading."""
    before = _kept
    if before is not None:
        seen = before.moment
        *head, everything, listings, hosts = arrays.columns(_CHANGED, {"xmin": seen.xmin, "seen": seen.snapshot})
        now = Moment(*head)
        if not everything and _continues(seen, now):
            offers = _updated(before.offers, listings, hosts)
            return offers if now.writing else _keep(_Kept(now, offers))
    now = Moment(*arrays.columns(f"SELECT {_HEAD}"))
    offers = _updated(None, None, None)
    return offers if now.writing else _keep(_Kept(now, offers))


def since(before: Moment | None) -> tuple[Moment, tuple[Ints, Ints] | None]:
    """The moment now, and (listing ids, host ids) of what has changed since `before`; None: anything may have."""
    if before is not None:
        *head, everything, listings, hosts = arrays.columns(_CHANGED, {"xmin": before.xmin, "seen": before.snapshot})
        now = Moment(*head)
        if not everything and _continues(before, now):
            return now, (listings, hosts)
    return Moment(*arrays.columns(f"SELECT {_HEAD}")), None


def _continues(before: Moment, now: Moment) -> bool:
    """The same server since then, going forward, and nothing is pruned that the earlier reading had not seen."""
    pruned = before.xmin < now.floor <= now.xmax  # a floor from the future came with another server's data
    return before.server == now.server and before.xmax <= now.xmax and not pruned


def _keep(made: _Kept) -> Offers:
    """Two threads may read at once; the later reading stays."""
    global _kept
    if _kept is None or _kept.moment.server != made.moment.server or _kept.moment.xmax <= made.moment.xmax:
        _kept = made
    return made.offers


def forget() -> None:
    """Drop what is kept: the next reading is a cold one."""
    global _kept
    _kept = None


def _updated(before: Offers | None, listings: Ints | None, hosts: Ints | None) -> Offers:
    names = Names() if before is None else before.names
    tables: dict[str, Rows] = {}
    if listings is None or len(listings):
        tables["listings"] = _rows(names, _LISTING, _LISTING_TEXT, _LISTINGS, "l.id", listings)
        tables["partners"] = _rows(names, _PARTNER, {}, _PARTNERS, "p.listing_id", listings)
        tables["tiers"] = _rows(names, _TIER, {}, _TIERS, "l.id", listings)
    if hosts is None or len(hosts):
        tables["hosts"] = _hosts(names, hosts)
        tables["holds"] = _rows(names, _HOLD, {}, _HOLDS, "b.host_id", hosts)
        tables["tasks"] = _rows(names, _TASK, {}, _TASKS, "p.host_id", hosts, ", u.gpu")
    if before is None:
        return Offers(**tables, names=names)
    if not tables:
        return before
    keys = {
        "listings": listings,
        "partners": listings,
        "tiers": listings,
        "hosts": hosts,
        "holds": hosts,
        "tasks": hosts,
    }
    return before.updated(**{n: getattr(before, n).replaced(keys[n], rows) for n, rows in tables.items()})


def _rows(
    names: Names,
    numbers: dict[str, str],
    texts: dict[str, str],
    source: str,
    key: str,
    ids: Ints | None,
    then: str = "",
) -> Rows:
    """`numbers` and `texts` of `source` in order of `key`; `ids`: only of these keys."""
    inner = ", ".join(f"{sql} AS {name}" for name, sql in {**numbers, **texts}.items())
    outer = ", ".join([*(f"array_agg({n}::bigint)" for n in numbers), *(f"array_agg({n}::text)" for n in texts)])
    only = "" if ids is None else f" AND {key} = ANY (%(ids)s)"
    query = f"SELECT {outer} FROM (SELECT {inner} FROM {source}{only} ORDER BY {key}{then}) t"  # noqa: S608
    found: list[Any] = list(arrays.columns(query, {} if ids is None else {"ids": ids}))
    made = {n: np.zeros(0, np.int64) if c is None else c for n, c in zip(numbers, found, strict=False)}
    made |= {n: names.codes(c or ()) for n, c in zip(texts, found[len(numbers) :], strict=True)}
    return Rows(made)


def _hosts(names: Names, ids: Ints | None) -> Rows:
    """With `nvlink_gpus`, the size of the largest NVLink domain, worked out here: a host has at most 16 GPUs."""
    rows = _rows(names, _HOST, _HOST_TEXT, _HOSTS, "h.id", ids)
    only = "" if ids is None else " AND h.id = ANY (%(ids)s)"
    padded = arrays.padded("h.nvlink_domains", "-1", "smallint")
    inner = f"SELECT h.id, {padded} AS domains FROM {_HOSTS}{only} ORDER BY h.id"  # noqa: S608
    query = f"SELECT array_agg(id), string_agg(domains, '') FROM ({inner}) t"  # noqa: S608
    of, domains = arrays.columns(query, {} if ids is None else {"ids": ids})
    matrix = arrays.matrix(domains, np.int16)
    largest = np.zeros(len(matrix), np.int64)
    for column in range(matrix.shape[1]):
        mine = matrix[:, column : column + 1]
        np.maximum(largest, np.where(mine[:, 0] >= 0, (matrix == mine).sum(axis=1), 0), out=largest)
    parts = _rows(names, _PART, _HOST_TEXT, _PARTS, "h.id", ids, ", a.id")
    if len(parts):
        both = {name: np.concatenate([column, parts[name]]) for name, column in rows.columns.items()}
        order = np.argsort(both["id"], kind="stable")  # the host itself before its parts
        rows = Rows({name: column[order] for name, column in both.items()})
    made = np.zeros(len(rows), np.int64)
    if len(rows) and of is not None:  # a host that came in between the two statements is named next time
        at = Rows({"id": of}).position(rows["id"])
        made = np.where(at >= 0, np.minimum(largest[at], rows["gpu_count"]), 0)
    return Rows({**rows.columns, "nvlink_gpus": made})


def prune(now: datetime) -> int:
    """Forget changes that every process which searched in the last PRUNE_EVERY has read; returns how many. Called by the clock.

    The floor moves to what was the oldest open transaction one round ago: all below it had ended then.
    """
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute(
            """
            INSERT INTO marketplace_offerfloor AS f (id, floor, next_floor, at)
            VALUES (1, 0, pg_snapshot_xmin(pg_current_snapshot())::text::bigint, %(now)s)
            ON CONFLICT (id) DO UPDATE SET at = excluded.at, next_floor = excluded.next_floor,
              floor = CASE WHEN f.next_floor <= excluded.next_floor THEN f.next_floor ELSE 0 END
            WHERE f.at <= %(before)s
            RETURNING floor
            """,
            {"now": now, "before": now - PRUNE_EVERY},
        )
        found = cursor.fetchone()
        if found is None:
            return 0
        cursor.execute(
            "DELETE FROM marketplace_offerchange WHERE changed_in < %s"  # or came with the data of another server
            " OR changed_in > pg_snapshot_xmax(pg_current_snapshot())::text::bigint",
            [found[0]],
        )
        return int(cursor.rowcount)
