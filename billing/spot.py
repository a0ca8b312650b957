"""What spot adds to billing: a price version where the price of a contract's intervals changes, and notice that was cut short.

A placement is metered only as far as its intervals are closed, so a second is never rated before its price is made. What nobody
auctioned is carried by `services.spot`, so that is a matter of seconds.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta

from django.db import connection
from django.db.models import Max

from billing.core.metering import Interval, floor_second
from billing.models import PriceVersion
from marketplace.models import Contract, Job, Kind, Placement, PlacementEvent, SpotInterval, SpotNotice
from marketplace.models.spot import INTERVAL

# Ends that are the customer's own doing: no notice is owed for them.
OWN = ("cancelled", "the contract ended", "a replica ended")

# An interval costs a contract what its result says; one that had no demand when it closed pays the same price as all, and no
# more than its limit. Only where that differs from the interval before is there a new version.
_CHANGES = """
SELECT second, price FROM (
  SELECT second, price, lag(price, 1, %(price)s::bigint) OVER (ORDER BY second) AS before FROM (
    SELECT floor(extract(epoch FROM i.start))::bigint AS second, coalesce(r.price, least(i.price, %(limit)s::bigint)) AS price
    FROM marketplace_spotinterval i
    LEFT JOIN marketplace_spotresult r ON r.contract_id = %(contract)s AND r.start = i.start
    WHERE i.listing_id = %(listing)s AND i.start > %(after)s
  ) each
) changing WHERE price <> before ORDER BY second
"""


def follow(contract: Contract, last: PriceVersion) -> list[PriceVersion]:
    """The versions after `last` that closed intervals ask for, written where they are missing; by their start."""
    begins = contract.starts_at - INTERVAL  # the interval in which it starts began after this
    after = max(begins, datetime.fromtimestamp(last.valid_from_s, tz=begins.tzinfo))
    asked = {
        "contract": contract.pk, "listing": contract.listing_id, "limit": contract.limit_price, "price": last.millionths, "after": after,
    }  # fmt: skip
    with connection.cursor() as cursor:
        cursor.execute(_CHANGES, asked)
        changes = cursor.fetchall()
    if not changes:
        return []
    PriceVersion.objects.bulk_create(
        [
            PriceVersion(
                contract=contract, kind=PriceVersion.Kind.RATE, valid_from_s=second, millionths=price, created_at=contract.created_at
            )
            for second, price in changes
        ],
        ignore_conflicts=True,
    )  # fmt: skip
    rows = PriceVersion.objects.filter(
        contract=contract, kind=PriceVersion.Kind.RATE, valid_from_s__gt=last.valid_from_s
    )
    return list(rows.order_by("valid_from_s"))


def closed_through(listings: Collection[int]) -> dict[int, datetime]:
    """Listing -> until when its prices are made. One without any interval yet has its contracts' own price, and is left out."""
    rows = SpotInterval.objects.filter(listing_id__in=listings).order_by().values_list("listing_id")
    return {listing: start + INTERVAL for listing, start in rows.annotate(last=Max("start"))}


def short_notice(batch: Iterable[Placement], events: Mapping[int, Sequence[PlacementEvent]]) -> dict[int, Interval]:
    """Placement -> seconds before its release that are free, because it was asked to leave with less notice than its contract
    promises. Notice is the time from being told, or from the checkpoint signal, to the end of the checkpoint grace.
    """
    gone = {
        p.pk: p for p in batch
        if p.contract.kind == Kind.SPOT and p.release_requested_at is not None and _evicted(events[p.pk])
    }  # fmt: skip
    if not gone:
        return {}
    ids = {p.job_id for p in gone.values()}
    grace = dict(Job.objects.filter(pk__in=ids).values_list("pk", "checkpoint_grace_s"))
    notices = list(SpotNotice.objects.filter(job_id__in=ids).order_by("told_at"))
    found: dict[int, Interval] = {}
    for pk, p in gone.items():
        assert p.release_requested_at is not None
        told = [
            n.told_at for n in notices if n.job_id == p.job_id and p.created_at <= n.told_at <= p.release_requested_at
        ]
        given = p.release_requested_at - min(told, default=p.release_requested_at) + timedelta(seconds=grace[p.job_id])
        missing = timedelta(seconds=p.contract.eviction_notice_s) - given
        if missing > timedelta():
            end = floor_second(p.release_requested_at)
            found[pk] = Interval(floor_second(p.release_requested_at - missing), end)
    return found


def _evicted(events: Sequence[PlacementEvent]) -> bool:
    """Whether it left because we asked: the first word on its leaving says who wanted it."""
    first = next((e for e in events if e.to_state == "draining"), None)
    return first is not None and not first.reason.startswith(OWN)
