"""What spot costs and who may run at it: the readings of closed intervals. `services.spot` alone writes them.

A price is in force from its interval's start until the next one's. A job may run under a spot contract while it has lost in no
closed interval that is not over: neither by its limit, nor by its place in the line.
"""

from collections.abc import Collection
from datetime import datetime
from typing import NamedTuple

from django.db import connection

from marketplace.models import Contract, Kind, Listing, SpotInterval, SpotResult
from marketplace.models.spot import INTERVAL

HISTORY = 288  # intervals of a day


class Barred(NamedTuple):
    """A job that may not run: the interval's price, the limit that counted there (millionths per GPU-hour), and when it began."""

    job: int
    contract: int
    interval: int
    start: datetime
    price: int
    limit: int


# A contract's result says with which limit, and with which jobs, it stood in the auction. One that had no demand then may run
# beside the winners at their price, on what is left.
_BARRED = """
SELECT j.id, c.id, i.id, i.start, i.price, least(coalesce(r.limit_price, c.limit_price), coalesce(j.price_limit, c.limit_price))
FROM marketplace_job j JOIN marketplace_contract c ON c.id = j.contract_id
JOIN marketplace_spotinterval i ON i.listing_id = c.listing_id AND i.start > %(open)s
LEFT JOIN marketplace_spotresult r ON r.contract_id = c.id AND r.start = i.start
WHERE j.id = ANY(%(jobs)s) AND c.kind = 'spot'
  AND (i.price > least(coalesce(r.limit_price, c.limit_price), coalesce(j.price_limit, c.limit_price)) OR j.id = ANY(r.lost_jobs))
ORDER BY j.id, i.start DESC
"""


def barred(jobs: Collection[int], now: datetime) -> dict[int, Barred]:
    """Those of the jobs that lost in an interval that is not over, each with the latest of them."""
    if not jobs:
        return {}
    with connection.cursor() as cursor:
        cursor.execute(_BARRED, {"jobs": list(jobs), "open": now - INTERVAL})
        return {row[0]: Barred(*row) for row in reversed(cursor.fetchall())}


def in_force(listing_ids: Collection[int], now: datetime) -> dict[int, SpotInterval]:
    """The interval in force at each listing: the newest that has begun. Listings without one are left out."""
    rows = SpotInterval.objects.filter(listing_id__in=list(listing_ids), start__lte=now)
    return {row.listing_id: row for row in rows.order_by("listing_id", "-start").distinct("listing_id")}


def now_under(contract: Contract, now: datetime) -> int | None:
    """What a GPU-hour costs now under a spot contract, millionths; None under another, and before its listing's first interval."""
    return of_contracts([contract.pk], now).get(contract.pk) if contract.kind == Kind.SPOT else None


def quoted(listing: Listing, floor: int, limit: int, now: datetime) -> int:
    """The price that a quote tells: that of now, which is never over the limit that it is asked with (millionths)."""
    found = in_force([listing.pk], now).get(listing.pk)
    return min(limit, max(floor, found.price if found else floor))


def upcoming(listing: Listing, now: datetime) -> SpotInterval | None:
    """The next interval, once its price is made."""
    return SpotInterval.objects.filter(listing=listing, start__gt=now).order_by("start").first()


def of_contracts(contract_ids: Collection[int], now: datetime) -> dict[int, int]:
    """What a GPU-hour costs now under each spot contract whose listing has a price, millionths."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT c.id, i.price FROM marketplace_contract c CROSS JOIN LATERAL (SELECT price FROM marketplace_spotinterval i"
            " WHERE i.listing_id = c.listing_id AND i.start <= %s ORDER BY i.start DESC LIMIT 1) i"
            " WHERE c.id = ANY(%s) AND c.kind = 'spot'",
            [now, list(contract_ids)],
        )
        return dict(cursor.fetchall())


def history(listing: Listing, now: datetime) -> list[SpotInterval]:
    """The listing's intervals of the last day, oldest first; the next one too, once its price is made."""
    rows = SpotInterval.objects.filter(listing=listing, start__gt=now - HISTORY * INTERVAL)
    return list(rows.order_by("start"))


def latest_result(contract_id: int) -> SpotResult | None:
    """What the contract got in the newest interval in which it wanted something."""
    rows = SpotResult.objects.filter(contract_id=contract_id).select_related("interval")
    return rows.order_by("-start").first()


# --- in words
def why(lost: Barred, currency: str) -> str:
    """`the spot price is 2.5 USD per GPU-hour, the limit 2`; with a limit at or over the price, that others came before it."""
    if lost.price > lost.limit:
        return f"the spot price is {money(lost.price)} {currency} per GPU-hour, the limit {money(lost.limit)}"
    return f"others came before it at a spot price of {money(lost.price)} {currency} per GPU-hour, the limit is {money(lost.limit)}"


def money(millionths: int) -> str:
    """A price in the major unit, as short as it is exact: 2.5, 0.990001."""
    whole, rest = divmod(millionths, 1_000_000)
    return f"{whole}.{rest:06d}".rstrip("0").rstrip(".")
