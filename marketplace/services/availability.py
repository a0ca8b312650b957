"""Rows -> the capacity core: what of a listing's GPUs can be promised, where, from when to when.

Search, calendar, quote and accept all ask here, and so come to the same answer. Three or four queries whatever is asked:
hosts, broken GPUs, reservations, and jobs that run outside a reservation.

What claims a GPU: a quote's live hold and a contract's reservation (`Reservation`, from `claims_at` to `ends_at`); a
placement of an on-demand contract, or of a reserved one beyond its own GPUs, to the end of its contract or for ever;
a listing's closed hours; and announced maintenance, whose
claim is a reservation of nobody's contract. Spot claims nothing: it leaves when somebody firm comes.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from math import gcd

from django.db.models import F, Q

from marketplace.compiled import Compiled, any_of, time
from marketplace.models import Gpu, Host, Kind, Listing, Placement, Reservation, ReservationBlock, Site
from scheduler.core import capacity
from scheduler.core.capacity import FOREVER, Admission, Claim, Hosts, Pool, Shape

CHECKPOINT_GRACE_S = 60  # what runs there as spot may use this to write its checkpoint, after its notice
SHED_LEAD_S = 60  # miners asleep and confirmed by readings, before the GPUs start
# A placed job's GPUs are back so long after its limit and its grace, at most, and that is what is promised to whoever comes next:
# it may have waited `WATTS_S` for its watts (miners shed; then it goes, see scheduler.site_loop), the rest is its start and its end.
LAG_S = 120
WATTS_S = 90
BEGAN = ("running_at", "created_at")
HOLDING = (Kind.RESERVED, Kind.FLEXIBLE)  # kinds that hold capacity
NOW_WINDOW = timedelta(hours=1)  # "free now" means: for all of the next hour
HORIZON_S = 400 * 86_400


@dataclass(frozen=True)
class Stock:
    """What one block could be: `gpus` of `total` listed, exact at `as_of`. `heard_at`: the oldest last beat of the hosts counted."""

    gpus: int
    total: int
    as_of: datetime
    heard_at: datetime | None


@dataclass(frozen=True)
class Market:
    """Hosts of some listings and all claims on them; the core's "site" is the listing here, for a contract stays inside one."""

    pool: Pool
    beats: dict[int, datetime | None]  # oldest beat per listing
    totals: dict[int, int]  # GPUs listed, working or not
    chunks: dict[int, int]


def seconds(at: datetime) -> int:
    return int(at.timestamp())


def instant(second: int) -> datetime:
    return datetime.fromtimestamp(second, UTC)


def lead_s(listing: Listing) -> int:
    """How long before a start the GPUs must be clear: spot's notice + checkpoint grace + shed lead, in whole minutes (s)."""
    lead = listing.eviction_notice_s + CHECKPOINT_GRACE_S + SHED_LEAD_S
    return -(-lead // 60) * 60


def claim_window(listing: Listing, starts_at: datetime, ends_at: datetime, now: datetime) -> tuple[int, int]:
    """The seconds in which the capacity of [starts_at, ends_at) is taken: early by the lead, but not in the past."""
    return capacity.claim_window(seconds(starts_at), seconds(ends_at), lead_s(listing), seconds(now))


_HOSTS = Compiled(
    lambda: (
        Host.objects.filter(any_of("listing_id", "ids"))
        .exclude(state=Host.State.RETIRED)
        .order_by("id")
        .values_list(
            "id", "listing_id", "gpu_count", "leaf", "spine", "state", "leaves_at", "back_at", "site__mode", "beat_at"
        )
    )
)
_BROKEN = Compiled(
    lambda: Gpu.objects.filter(any_of("host__listing_id", "ids"), healthy=False).values_list("host_id", "index")
)


def load(
    listings: Sequence[Listing], now: datetime, *, without: Collection[int] = (), among: Collection[int] | None = None
) -> Market:
    """Hosts and claims of `listings`; `without`: ids of reservations that shall not count (the asker's own hold); `among`: ids of
    the only hosts that count.
    """
    ids = [listing.pk for listing in listings]
    hosts = _HOSTS(ids=ids)
    if among is not None:
        counted = set(among)
        hosts = [host for host in hosts if host[0] in counted]
    broken = _broken(ids)
    rows: list[tuple[int, int, str, str, int]] = []
    totals: dict[int, int] = dict.fromkeys(ids, 0)
    smallest: dict[int, int] = {}
    beats: dict[int, datetime | None] = dict.fromkeys(ids)
    leaving: list[Claim] = []
    for pk, listing_id, count, leaf, spine, state, leaves_at, back_at, mode, beat in hosts:
        leaves = leaves_at if state == Host.State.DRAINING and leaves_at is not None and leaves_at > now else None
        up = (state == Host.State.ACTIVE or leaves is not None) and mode != Site.Mode.OFF
        if back_at is not None:  # maintenance has it, whose claim says until when
            up = mode != Site.Mode.OFF
        elif leaves is not None:  # it can be had until then
            leaving.append(Claim(("leaves", pk), seconds(leaves), FOREVER, ((pk, count),)))
        rows.append((pk, max(0, count - len(broken.get(pk, ()))) if up else 0, leaf, spine, listing_id))
        totals[listing_id] += count
        smallest[listing_id] = min(smallest.get(listing_id, count), count)
        if up and back_at is None and beat is not None:
            beats[listing_id] = min(beats[listing_id] or beat, beat)
    host_ids = [row[0] for row in rows]
    claims = [*_reservations(host_ids, now, without), *_placements(host_ids, now), *leaving]
    set_aside = [listing for listing in listings if listing.is_resale]
    if set_aside:
        parts, inside, heard = _set_aside(set_aside, now, without)
        beats |= heard
        rows += parts
        claims += inside
        smallest.update((listing.pk, listing.min_gpus) for listing in set_aside)
        for _, count, _, _, listing_id in parts:
            totals[listing_id] += count
    claims += _closed(listings, rows)
    return Market(
        pool=Pool.build(Hosts.of(rows), claims),
        beats=beats,
        totals=totals,
        chunks={listing.pk: max(1, min(listing.min_gpus, smallest.get(listing.pk, 1))) for listing in listings},
    )


def _set_aside(
    listings: Sequence[Listing], now: datetime, without: Collection[int]
) -> tuple[list[tuple[int, int, str, str, int]], list[Claim], dict[int, datetime | None]]:
    """What is left of resales, as hosts of their own (id: that of the block set aside, below zero), the live holds on them, and the
    oldest beat of each.
    """
    beats: dict[int, datetime | None] = {}
    rows: list[tuple[int, int, str, str, int]] = []
    claims: list[Claim] = []
    blocks = ReservationBlock.objects.filter(
        reservation__resale__listing__in=listings, reservation__resale__state="open", reservation__state=Reservation.State.FIRM
    ).select_related("host__site", "reservation__resale")  # fmt: skip
    at: dict[tuple[int, int], int] = {}
    for block in blocks.order_by("pk"):
        host, resale = block.host, block.reservation.resale
        stays = host.back_at is not None or (host.leaves_at is not None and host.leaves_at >= resale.ends_at)
        up = host.site.mode != Site.Mode.OFF and (
            host.state == Host.State.ACTIVE or host.back_at is not None or (host.state == Host.State.DRAINING and stays)
        )
        sick = set(host.gpus.filter(healthy=False).values_list("index", flat=True))
        rows.append(
            (-block.pk, len(set(block.gpu_indices) - sick) if up else 0, host.leaf, host.spine, resale.listing_id)
        )
        at[block.reservation_id, block.host_id] = -block.pk
        if up and host.beat_at is not None:
            beats[resale.listing_id] = min(beats.get(resale.listing_id) or host.beat_at, host.beat_at)
    live = Reservation.objects.filter(
        within__in={key for key, _ in at}, state=Reservation.State.HELD, held_until__gt=now
    ).exclude(pk__in=list(without))  # fmt: skip
    for hold in live.order_by("pk").prefetch_related("blocks"):
        held = tuple(
            (at[hold.within_id or 0, b.host_id], len(b.gpu_indices))
            for b in hold.blocks.all()
            if (hold.within_id or 0, b.host_id) in at
        )
        claims.append(Claim(("reservation", hold.pk), seconds(hold.claims_at), seconds(hold.ends_at), held))
    return rows, claims, beats


def _broken(listing_ids: Sequence[int]) -> dict[int, set[int]]:
    """GPU indices that do not work, per host."""
    found: dict[int, set[int]] = defaultdict(set)
    for host, index in _BROKEN(ids=listing_ids):
        found[host].add(index)
    return found


def live_reservations(now: datetime, path: str = "") -> Q:
    """Those that claim capacity now or later; `path` leads to Reservation, such as `reservation__`."""
    held = Q(**{f"{path}state": Reservation.State.HELD, f"{path}held_until__gt": now, f"{path}within": None})
    return (held | Q(**{f"{path}state": Reservation.State.FIRM})) & Q(**{f"{path}ends_at__gt": now})


_RESERVED = Compiled(
    lambda: (
        ReservationBlock.objects.filter(live_reservations(time("now"), "reservation__"), any_of("host_id", "hosts"))
        .order_by("id")
        .values_list("reservation_id", "reservation__claims_at", "reservation__ends_at", "host_id", "gpu_indices")
    )
)
_AT_WORK = Compiled(
    lambda: (
        Placement.objects.filter(any_of("host_id", "hosts"))
        .exclude(state__in=Placement.FINAL)
        .exclude(contract__kind=Kind.SPOT)
        .values_list(
            "host_id",
            "gpu_indices",
            "contract_id",
            "contract__kind",
            "contract__ends_at",
            F("job__max_seconds") + F("job__checkpoint_grace_s"),
            *BEGAN,
        )
    )
)
_HELD_BY = Compiled(
    lambda: ReservationBlock.objects.filter(
        any_of("reservation__contract_id", "contracts"),
        reservation__state=Reservation.State.FIRM,
        reservation__ends_at__gt=time("now"),
    ).values_list("reservation__contract_id", "host_id", "gpu_indices")
)


def _reservations(host_ids: Sequence[int], now: datetime, without: Collection[int]) -> list[Claim]:
    blocks: dict[tuple[int, int, int], list[tuple[int, int]]] = defaultdict(list)
    for pk, claims_at, ends_at, host, indices in _RESERVED(hosts=host_ids, now=now):
        if pk in without:
            continue
        blocks[pk, seconds(claims_at), seconds(ends_at)].append((host, len(indices)))
    return [Claim(("reservation", pk), start, end, tuple(hold)) for (pk, start, end), hold in blocks.items()]


def unreserved_gpus(host_ids: Collection[int], now: datetime, *, limits: bool = False) -> dict[int, dict[int, int]]:
    """{host: {GPU index: end in s}} of GPUs that running work occupies outside its own reservation; spot is left out. With
    `limits` a job's own time limit and the grace after it end it, too, `LAG_S` later at most.
    """
    rows = _AT_WORK(hosts=list(host_ids))
    holders = {contract for _, _, contract, kind, *_ in rows if kind in HOLDING}
    own: dict[tuple[int, int], set[int]] = defaultdict(set)
    if holders:
        for contract, host, indices in _HELD_BY(contracts=list(holders), now=now):
            own[contract, host].update(indices)
    taken: dict[int, dict[int, int]] = defaultdict(dict)
    for host, indices, contract, _, ends_at, limit, running_at, created_at in rows:
        # Past its contract's end, or its own, a placement still drains, nobody knows how long.
        end = seconds(ends_at) if ends_at is not None and ends_at > now else FOREVER
        if limits and limit and (over := seconds(running_at or created_at) + limit + LAG_S) > seconds(now):
            end = min(end, over)
        for index in set(indices) - own.get((contract, host), set()):
            taken[host][index] = max(end, taken[host].get(index, 0))
    return taken


def _placements(host_ids: Sequence[int], now: datetime) -> Iterable[Claim]:
    start = seconds(now)
    for host, ends in unreserved_gpus(host_ids, now).items():
        for end in sorted(set(ends.values())):
            count = sum(1 for other in ends.values() if other == end)
            yield Claim(("placements", host, end), start, end, ((host, count),))


def _closed(listings: Sequence[Listing], rows: Sequence[tuple[int, int, str, str, int]]) -> Iterable[Claim]:
    """Hours in which a listing is not on offer are claims on all of it."""
    for listing in listings:
        if listing.available_from is None and listing.available_until is None:
            continue
        hold = tuple((row[0], row[1]) for row in rows if row[4] == listing.pk and row[1])
        if listing.available_from is not None and seconds(listing.available_from) > 0:
            yield Claim(("closed", listing.pk, "before"), 0, seconds(listing.available_from), hold)
        if listing.available_until is not None:
            yield Claim(("closed", listing.pk, "after"), seconds(listing.available_until), FOREVER, hold)


def stock(
    listings: Sequence[Listing],
    *,
    now: datetime,
    level: str = "site",
    kind: str = Kind.ON_DEMAND,
    starts_at: datetime | None = None,
    ends_at: datetime | None = None,
    market: Market | None = None,
) -> dict[int, Stock]:
    """{listing id: Stock}: the most GPUs one block inside one cell of `level` can have; without a window, in the next hour.
    Who asks more than once hands over the `market` that it has loaded.
    """
    market = market or load(listings, now)
    start, end = window(starts_at, ends_at, now)
    groups: dict[tuple[int, tuple[int, int]], list[int]] = defaultdict(list)
    for listing in listings:
        taken = claim_window(listing, start, end, now) if kind in HOLDING else (seconds(start), seconds(end))
        if listing.is_resale and starts_at is None and listing.available_from and listing.available_until:
            taken = (
                seconds(listing.available_from),
                seconds(listing.available_until),
            )  # its own window, the only one there is
        groups[market.chunks[listing.pk], taken].append(listing.pk)
    most: dict[int, int] = {}
    for (chunk, (t1, t2)), ids in groups.items():
        each = capacity.largest_each(market.pool, Shape(chunk), level, t1, t2)
        most.update((pk, each.get(pk, 0)) for pk in ids)
    return {
        listing.pk: Stock(most[listing.pk], market.totals[listing.pk], now, market.beats[listing.pk])
        for listing in listings
    }


def window(starts_at: datetime | None, ends_at: datetime | None, now: datetime) -> tuple[datetime, datetime]:
    """The window that is meant: not in the past; without an end, the next hour of it."""
    start = max(starts_at or now, now)
    return start, ends_at if ends_at is not None and ends_at > start else start + NOW_WINDOW


def largest(
    listing: Listing,
    *,
    now: datetime,
    level: str = "site",
    kind: str = Kind.RESERVED,
    starts_at: datetime | None = None,
    ends_at: datetime | None = None,
) -> int:
    """Most GPUs of one block of `listing` in the window; exact, a multiple of its chunk."""
    return stock([listing], now=now, level=level, kind=kind, starts_at=starts_at, ends_at=ends_at)[listing.pk].gpus


def admit(
    listing: Listing,
    *,
    gpus: int,
    level: str,
    starts_at: datetime,
    ends_at: datetime,
    now: datetime,
    without: Collection[int] = (),
    among: Collection[int] | None = None,
    market: Market | None = None,
) -> Admission:
    """The hold of `gpus` GPUs for [starts_at, ends_at) with its lead, or the reason and what would fit instead.

    Alternatives come back as windows for the customer, the lead taken off. Call it under the cell's lock where the answer is written down.
    """
    market = market or load([listing], now, without=without, among=among)
    # A firm quote outlives an edit of the minimum: what was no multiple then is asked for in smaller pieces.
    shape = Shape(gcd(market.chunks[listing.pk], gpus))
    t1, t2 = claim_window(listing, starts_at, ends_at, now)
    found = capacity.admit(market.pool, shape, level, gpus, t1, t2, horizon_s=0)
    if found.admitted or found.alternatives is None:
        return found
    start, at, span = seconds(starts_at), seconds(now), seconds(ends_at) - seconds(starts_at)
    earlier, later = capacity.nearest_starts(
        market.pool, shape, level, gpus, start, span, since=at, until=start + HORIZON_S, lead_s=lead_s(listing), now=at,
        grain_s=60,
    )  # fmt: skip
    until = found.alternatives.until
    until = until // 60 * 60 if until is not None and until // 60 * 60 > start else None
    return replace(
        found,
        alternatives=replace(
            found.alternatives,
            later=None if later is None else (later, later + span),
            earlier=None if earlier is None else (earlier, earlier + span),
            until=until,
        ),
    )


def free_until(
    listing: Listing,
    hold: Collection[tuple[int, int]],
    *,
    starts_at: datetime,
    ends_at: datetime,
    now: datetime,
    without: Collection[int],
) -> datetime:
    """How long, up to `ends_at`, the `hold` ((host id, GPUs), ...) is free from `starts_at` on, to the minute; `starts_at`: not at all."""
    pool = load([listing], now, without=without).pool
    start, end = seconds(starts_at), seconds(ends_at)
    places = {int(str(host)): i for host, i in pool.hosts.position.items()}
    if any(host not in places for host, _ in hold):
        return starts_at

    def fits(until: int) -> bool:
        free = pool.free(start, until)
        return all(free[places[host]] >= count for host, count in hold)

    if fits(end):
        return ends_at
    marks = sorted({int(t) for t in pool.starts if start < t < end})
    low, high = 0, len(marks)  # a longer window never has more room
    while low < high:
        middle = (low + high) // 2
        if fits(marks[middle]):
            low = middle + 1
        else:
            high = middle
    return max(starts_at, instant(marks[low - 1] // 60 * 60)) if low else starts_at
