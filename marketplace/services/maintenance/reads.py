"""What is known of maintenance: for those who judge hosts, for buyers, for calendars. Reads alone."""

from collections import defaultdict
from collections.abc import Collection
from datetime import datetime

from django.db.models import F, Q

from marketplace.models import Listing, Maintenance, MaintenanceHost, Quote

Window = tuple[datetime, datetime]


def covers(host_ids: Collection[int], start: datetime, end: datetime) -> dict[int, list[Window]]:
    """{host: [(from, to), ...]} inside [start, end), sorted and disjoint: when announced maintenance has a host, or will have it.

    What had no due notice (an emergency, or an extension announced too late) is no excuse and is left out.
    """
    rows = (
        MaintenanceHost.objects.filter(host_id__in=list(host_ids), maintenance__noticed_until__gt=start)
        .filter(Q(maintenance__state__in=Maintenance.LIVE) | Q(taken_at__isnull=False))
        .filter(maintenance__starts_at__lt=end)
        .select_related("maintenance")
    )
    found: dict[int, list[Window]] = defaultdict(list)
    for row in rows:
        of = row.maintenance
        assert of.noticed_until is not None
        begin = max(row.taken_at or of.starts_at, start)
        until = min(row.given_back_at or of.ends_at, of.noticed_until, end)
        if begin < until:
            found[row.host_id].append((begin, until))
    return {host: joined(windows) for host, windows in found.items()}


def joined(windows: Collection[Window]) -> list[Window]:
    """The same instants as disjoint windows, sorted. Pure."""
    out: list[Window] = []
    for start, end in sorted(windows):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, end))
    return out


def upcoming(
    listing_ids: Collection[int], now: datetime, *, starts_at: datetime | None = None, ends_at: datetime | None = None
) -> dict[int, list[Maintenance]]:
    """{listing: announced and running maintenance of hosts that it offers, soonest first}, of those that touch the window; of a resale
    those that touch its own window.
    """
    rows = MaintenanceHost.objects.filter(
        maintenance__state__in=Maintenance.LIVE, maintenance__ends_at__gt=max(now, starts_at or now), given_back_at=None
    )
    if ends_at is not None:
        rows = rows.filter(maintenance__starts_at__lt=ends_at)
    wanted, resale = list(listing_ids), "host__reservation_blocks__reservation__resale"
    pairs = set(rows.filter(host__listing_id__in=wanted).values_list("host__listing_id", "maintenance_id"))
    aside = rows.filter(
        **{f"{resale}__listing_id__in": wanted},
        maintenance__starts_at__lt=F(f"{resale}__ends_at"), maintenance__ends_at__gt=F(f"{resale}__starts_at"),
    )  # fmt: skip
    pairs |= set(aside.values_list(f"{resale}__listing_id", "maintenance_id"))
    known = Maintenance.objects.in_bulk({pk for _, pk in pairs})
    found: dict[int, list[Maintenance]] = defaultdict(list)
    for listing, pk in sorted(pairs, key=lambda pair: (known[pair[1]].starts_at, pair[1])):
        found[listing].append(known[pk])
    return found


def of_listing(listing: Listing, now: datetime) -> list[Maintenance]:
    """As `upcoming`, of one listing."""
    return upcoming([listing.pk], now).get(listing.pk, [])


def during(quote: Quote, now: datetime) -> list[Maintenance]:
    """What is announced for hosts of a quote's listing in the window that it quotes."""
    found = upcoming([quote.listing_id], now, starts_at=quote.starts_at, ends_at=quote.ends_at)
    return found.get(quote.listing_id, [])
