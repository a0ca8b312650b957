"""The spot market: closes each interval once, tells who lost, and lets them leave. The only writer of SpotInterval, -Result, -Notice
(`services.spot_record` takes old ones away).

Rules (the auction's own: scheduler.core.auction; why a listing is a market: ADR 16).
  - An interval is five minutes. Its price is made `settings.SPOT_LEAD_SECONDS` before it begins, from the contracts with jobs that
    run or wait at that moment, and never changes.
  - One that began without a price is carried: the price before it goes on, nobody loses by it. Auctions look forward only.
  - Supply is what firm work and claims leave of the hosts that work; what spot itself runs on is for sale again.
  - Who lost and runs is told, and leaves when the interval begins or his contract's notice is over, whichever is later, with a
    checkpoint signal, and queues again. If the price has fallen by then, he stays.
  - A new limit counts from the next auction on.
Every step holds the cell's lock, so an interval closes while neither placements nor limits change; the unique keys are the fence
behind it.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from django.conf import settings
from django.db import connection, transaction
from django.db.models import Q, QuerySet

from marketplace import outbox
from marketplace.errors import MarketError
from marketplace.locks import Lock, acquire
from marketplace.models import (
    Contract,
    Gpu,
    Host,
    Job,
    Kind,
    Listing,
    Placement,
    ReservationBlock,
    Site,
    SpotInterval,
    SpotNotice,
    SpotResult,
)
from marketplace.models.spot import INTERVAL
from marketplace.services import audit, availability, jobs, listings, placements, replicas, spot_prices
from marketplace.services.availability import seconds
from marketplace.services.contracts import notices
from marketplace.services.spot_prices import Barred
from marketplace.tenancy import Actor
from scheduler.core import auction

ACTOR: Final = "spot"
TOPIC: Final = "marketplace.spot"
OUTBID: Final = "outbid"  # so begins the reason of one that leaves
OUTBID_WORDS: Final = (
    "Running jobs were outbid and got their notice: each has its checkpoint signal and its grace, and queues again until an auction is "
    "won. Their pages say when they leave; a higher limit counts from the next auction on."
)
FILLED: Final = (
    2016  # carried intervals written at most after a stop: a week of them; before that the price stands as it was
)


# --- the clock
def ask() -> None:
    """A message to each cell with a spot market, unless one is on its way already."""
    with transaction.atomic():
        for cell_id in sorted(set(_markets().values_list("site__cell_id", flat=True))):
            outbox.emit(TOPIC, key=str(cell_id), payload={"cell": cell_id})


def run(cell_id: int, *, now: datetime) -> None:
    """What the time asks for in one cell: intervals are closed, losers told, those whose notice is over leave."""
    close(cell_id, now=now)
    tell(cell_id, now=now)
    leave(cell_id, now=now)


def _markets() -> QuerySet[Listing]:
    """Listings that offer spot, and those under which somebody still has it."""
    live = Contract.objects.filter(kind=Kind.SPOT, state=Contract.State.ACTIVE)
    return Listing.objects.filter(
        Q(state=Listing.State.PUBLISHED, spot_floor__isnull=False) | Q(pk__in=live.values("listing"))
    )


# --- an interval closes
def close(cell_id: int, *, now: datetime) -> list[SpotInterval]:
    """Makes the prices that are due: those of the coming interval within its lead, and carries those that nobody made in time."""
    start = interval_of(now + timedelta(seconds=settings.SPOT_LEAD_SECONDS))
    markets = list(_markets().filter(site__cell_id=cell_id).select_related("site").order_by("pk"))
    behind = _behind(markets, start, now)
    if not behind:
        return []
    floors = {row.pk: floor_of(row, now=now) for row in behind} if start > now else {}
    with transaction.atomic():
        acquire((Lock.CELL, cell_id))
        behind = _behind(list(behind), start, now)
        made = [row for listing, last in behind.items() if last for row in _carried(listing, last, start, now)]
        sold: list[tuple[SpotInterval, list[SpotResult]]] = []
        if floors and behind:
            supply, bids = spare_milli(list(behind), start=start, now=now), _bids(list(behind), start)
            sold = [_sell(row, floors[row.pk], supply[row.pk], bids[row.pk], start, now) for row in behind]
        SpotInterval.objects.bulk_create([*made, *(interval for interval, _ in sold)])
        results = []
        for interval, each in sold:
            for result in each:
                result.interval = interval
            results += each
        SpotResult.objects.bulk_create(results)
        if sold:
            jobs.nudge_cell(cell_id)  # who may run has changed
    return [*made, *(interval for interval, _ in sold)]


def interval_of(at: datetime) -> datetime:
    """The start of the interval that `at` lies in."""
    return datetime.fromtimestamp(auction.interval_of(seconds(at)), UTC)


def floor_of(listing: Listing, *, now: datetime) -> int:
    """Millionths per GPU-hour under which nothing is sold: the listing's own, or what its watts cost or would earn hashing."""
    return max(listing.spot_floor or 0, listings.floor_of(listing, now=now))


def _behind(markets: Sequence[Listing], start: datetime, now: datetime) -> dict[Listing, SpotInterval | None]:
    """Those without a row for `start`, each with its newest. One that never had any begins with an auction."""
    rows = SpotInterval.objects.filter(listing__in=markets).order_by("listing_id", "-start").distinct("listing_id")
    last = {row.listing_id: row for row in rows}
    late = {row: last.get(row.pk) for row in markets if row.pk not in last or last[row.pk].start < start}
    return {row: found for row, found in late.items() if found or start > now}


def _carried(listing: Listing, last: SpotInterval, start: datetime, now: datetime) -> Iterable[SpotInterval]:
    """Intervals after `last` that have begun without a price."""
    at = max(last.start + INTERVAL, interval_of(now) - FILLED * INTERVAL)
    while at <= now and at <= start:
        yield SpotInterval(
            listing=listing, cell_id=last.cell_id, gpu_model_id=last.gpu_model_id, start=at, price=last.price,
            floor=last.floor, currency=last.currency, supply_milli=0, demand_milli=0, sold_milli=0, carried=True, closed_at=now,
        )  # fmt: skip
        at += INTERVAL


@dataclass(frozen=True)
class Bid:
    """A contract with jobs that run or wait: what each of them asks for, in the order in which they are to be served."""

    contract: int
    since: int
    limit: int
    lots: list[tuple[int, int, int]]  # job, milli-GPU, its own limit


def _sell(
    listing: Listing, floor: int, supply: int, bids: Sequence[Bid], start: datetime, now: datetime
) -> tuple[SpotInterval, list[SpotResult]]:
    owner = [(bid, job) for bid in bids for job, _, _ in bid.lots]
    lots = [
        auction.Lot(bid.contract, bid.since, limit, n, milli)
        for bid in bids
        for n, (_, milli, limit) in enumerate(bid.lots)
    ]
    found = auction.clear([auction.Step(floor, supply)], lots)
    price = floor if found.price is None else found.price
    interval = SpotInterval(
        listing=listing, cell_id=listing.site.cell_id, gpu_model_id=listing.gpu_model_id, start=start, price=price, floor=floor,
        currency=listing.currency, supply_milli=supply, demand_milli=found.demand, sold_milli=found.sold, closed_at=now,
    )  # fmt: skip
    won: dict[int, int] = defaultdict(int)
    lost: dict[int, list[int]] = defaultdict(list)
    why: dict[int, str] = {}
    for i in found.served:
        won[owner[i][0].contract] += lots[i].milli
    for i, reason in found.lost.items():
        bid, job = owner[i]
        lost[bid.contract].append(job)
        why.setdefault(bid.contract, reason)
    outcome = SpotResult.Outcome
    return interval, [
        SpotResult(
            contract_id=bid.contract, start=start, limit_price=bid.limit, price=min(price, bid.limit),
            wanted_milli=sum(milli for _, milli, _ in bid.lots), won_milli=won[bid.contract], reason=why.get(bid.contract, ""),
            outcome=outcome.WON if not lost[bid.contract] else outcome.PART if won[bid.contract] else outcome.LOST,
            lost_jobs=sorted(lost[bid.contract]),
        )
        for bid in bids
    ]  # fmt: skip


# What runs comes before what waits, and a contract asks for no more than its ceiling.
_DEMAND = """
WITH demand AS (
  SELECT c.id AS contract, c.listing_id, floor(extract(epoch FROM c.created_at))::bigint AS since, c.limit_price, c.gpu_count, j.id,
    j.replicas * j.gpus * j.gpu_milli AS milli, least(c.limit_price, coalesce(j.price_limit, c.limit_price)) AS own,
    sum(j.replicas * j.gpus * j.gpu_milli) OVER (PARTITION BY c.id
      ORDER BY j.state IN ('placed', 'running') DESC, j.priority DESC, j.queued_at, j.id) AS upto
  FROM marketplace_contract c JOIN marketplace_job j ON j.contract_id = c.id
  LEFT JOIN marketplace_billingstanding s ON s.organization_id = c.organization_id
  WHERE c.listing_id = ANY(%(listings)s) AND c.kind = 'spot' AND c.limit_price IS NOT NULL AND c.state = 'active'
    AND c.starts_at <= %(start)s
    AND (c.ends_at IS NULL OR c.ends_at > %(start)s) AND s.state IS DISTINCT FROM 'suspended'
    AND j.state IN ('queued', 'requeued', 'placed', 'running', 'preempting') AND j.cancel_requested_at IS NULL AND j.gpus > 0
)
SELECT listing_id, contract, since, limit_price, id, milli, own FROM demand WHERE upto <= gpu_count * 1000 ORDER BY contract, upto, id
"""


def _bids(markets: Collection[Listing], start: datetime) -> dict[int, list[Bid]]:
    """Listing -> its bids."""
    found: dict[int, dict[int, Bid]] = defaultdict(dict)
    with connection.cursor() as cursor:
        cursor.execute(_DEMAND, {"listings": [row.pk for row in markets], "start": start})
        for listing, contract, since, limit, job, milli, own in cursor.fetchall():
            bid = found[listing].setdefault(contract, Bid(contract, since, limit, []))
            bid.lots.append((job, milli, own))
    return {row.pk: list(found[row.pk].values()) for row in markets}


def spare_milli(markets: Sequence[Listing], *, start: datetime, now: datetime) -> dict[int, int]:
    """Listing -> milli-GPU for sale on spot in the interval from `start`: GPUs that work, on hosts that stay all of it, less what
    other kinds run on and what is claimed before its end.
    """
    end = start + INTERVAL
    up = Q(state=Host.State.ACTIVE) | Q(state=Host.State.DRAINING, leaves_at__gte=end)
    rows = Host.objects.filter(up, listing__in=markets).exclude(site__mode=Site.Mode.OFF)
    hosts = {
        pk: (listing, set(range(count))) for pk, listing, count in rows.values_list("id", "listing_id", "gpu_count")
    }
    for host, index in Gpu.objects.filter(host_id__in=hosts, healthy=False).values_list("host_id", "index"):
        hosts[host][1].discard(index)
    blocks = ReservationBlock.objects.filter(
        availability.live_reservations(now, "reservation__"), host_id__in=hosts, reservation__claims_at__lt=end
    )
    for host, indices in blocks.values_list("host_id", "gpu_indices"):
        hosts[host][1].difference_update(indices)
    for host, taken in availability.unreserved_gpus(hosts, now).items():
        hosts[host][1].difference_update(taken)
    found = {row.pk: 0 for row in markets}
    for listing, free in hosts.values():
        found[listing] += 1000 * len(free)
    for row in markets:
        closed = (row.available_from and row.available_from > start) or (
            row.available_until and row.available_until < end
        )
        found[row.pk] = 0 if closed else found[row.pk]
    return found


# --- who lost leaves
def tell(cell_id: int, *, now: datetime) -> list[SpotNotice]:
    """Running jobs that lost get their notice: in their story, and with the hour at which they leave."""
    if not _told(cell_id, now):
        return []
    with transaction.atomic():
        acquire((Lock.CELL, cell_id))
        found = _told(cell_id, now)
        rows = Job.objects.filter(pk__in=found).select_related("contract").order_by("pk")
        made = []
        for job in rows:
            lost = found[job.pk]
            at = max(lost.start, now + timedelta(seconds=job.contract.eviction_notice_s))
            made.append(SpotNotice(interval_id=lost.interval, job=job, told_at=now, leaves_at=at))
            replicas.note(
                [job],
                f"notice: {spot_prices.why(lost, job.contract.currency)}; it leaves at {at:%F %T} UTC",
                now=now,
                actor=ACTOR,
            )
        SpotNotice.objects.bulk_create(made)
        if made:
            notices.tell(sorted({job.contract_id for job in rows}), OUTBID, OUTBID_WORDS)
    return made


def _told(cell_id: int, now: datetime) -> dict[int, Barred]:
    """Jobs that run, have lost and do not know it yet."""
    lost = spot_prices.barred(_running(cell_id), now)
    knows = {
        n.job_id for n in SpotNotice.objects.filter(job_id__in=lost)
        if n.leaves_at > now or n.interval_id == lost[n.job_id].interval
    }  # fmt: skip
    return {pk: found for pk, found in lost.items() if pk not in knows}


def _running(cell_id: int) -> list[int]:
    """Jobs on hosts under spot contracts that nobody has asked to leave."""
    live = Placement.objects.filter(
        cell_id=cell_id, contract__kind=Kind.SPOT, release_requested_at=None, job__cancel_requested_at=None,
        job__state__in=(Job.State.PLACED, Job.State.RUNNING),
    ).exclude(state__in=Placement.FINAL)  # fmt: skip
    return sorted(set(live.values_list("job_id", flat=True)))


def leave(cell_id: int, *, now: datetime) -> list[int]:
    """Whose notice is over is asked to leave; whose price has fallen meanwhile stays, and reads so. Returns those who leave."""
    if not _due(cell_id, now):
        return []
    with transaction.atomic():
        acquire((Lock.CELL, cell_id))
        due = _due(cell_id, now)
        lost = spot_prices.barred(due, now)
        stay = due.keys() - lost.keys()
        SpotNotice.objects.filter(pk__in=[due[pk].pk for pk in stay]).delete()
        replicas.note(
            Job.objects.filter(pk__in=stay).order_by("pk"),
            "the notice is withdrawn: its limit is good again",
            now=now,
            actor=ACTOR,
        )
        live = Placement.objects.filter(job_id__in=lost).exclude(state__in=Placement.FINAL)
        placements.lock_sites(live.values_list("site_id", flat=True))
        moved: list[int] = []
        currency = dict(Job.objects.filter(pk__in=lost).values_list("pk", "contract__currency"))
        for pk in sorted(lost):
            moved += jobs.preempt(
                [pk], now=now, actor=ACTOR, reason=f"{OUTBID}: {spot_prices.why(lost[pk], currency[pk])}"
            )
    return moved


def _due(cell_id: int, now: datetime) -> dict[int, SpotNotice]:
    """Job -> its notice, where that is over and the job still stands where it was told."""
    running = _running(cell_id)
    rows = SpotNotice.objects.filter(job_id__in=running, leaves_at__lte=now).order_by("told_at")
    notices = {row.job_id: row for row in rows}
    came: dict[int, datetime] = {}
    for job, at in (
        Placement.objects.filter(job_id__in=notices)
        .exclude(state__in=Placement.FINAL)
        .values_list("job_id", "created_at")
    ):
        came[job] = max(at, came.get(job, at))
    return {pk: row for pk, row in notices.items() if came[pk] <= row.told_at}


# --- the limit
def actions(contract: Contract, actor: Actor) -> list[str]:
    """What the actor may do with a spot contract beside what it may do with any."""
    mine = contract.organization_id == actor.organization_id and contract.kind == Kind.SPOT
    return ["set_limit"] if mine and contract.state == Contract.State.ACTIVE else []


def set_limit(actor: Actor, contract: Contract, limit: int, *, now: datetime, expected: int | None = None) -> Contract:
    """Another limit for a spot contract, from the next auction on. `expected`: the limit that the caller has read, refused when
    it is another by now. MarketError: forbidden, illegal_transition, conflict, invalid_request under the floor.
    """
    if contract.organization_id != actor.organization_id:
        raise MarketError("forbidden", "Only the customer changes the limit of its contract.")
    floor = floor_of(contract.listing, now=now)
    with transaction.atomic():
        acquire((Lock.CELL, contract.cell_id))
        rows = Contract.objects.select_for_update(no_key=True, of=("self",)).select_related("listing", "site")
        row: Contract = rows.get(pk=contract.pk)
        if row.kind != Kind.SPOT:
            raise MarketError("illegal_transition", f"{row.public_id} is {row.kind}: only spot has a limit.")
        if row.state != Contract.State.ACTIVE:
            raise MarketError("illegal_transition", f"{row.public_id} is {row.state}.")
        if expected is not None and row.limit_price != expected:
            raise MarketError("conflict", f"The limit is {row.limit_price} by now; read the contract again.")
        if limit < floor:
            raise MarketError(
                "invalid_request",
                f"limit_price: nothing is sold under {floor} there now.",
                {"/limit_price": f"at least {floor}"},
            )
        before = row.limit_price
        if before == limit:
            return row
        row.limit_price = limit
        row.save(update_fields=["limit_price"])
        text = f"limit {spot_prices.money(before or 0)} -> {spot_prices.money(limit)} {row.currency} per GPU-hour, from the next auction on"
        row.events.create(at=now, actor=actor.label[:120], from_state=row.state, to_state=row.state, reason=text)
        audit.record(
            actor,
            "contract.limit_changed",
            row.public_id,
            now=now,
            before={"limit_price": before},
            after={"limit_price": limit},
        )
        jobs.nudge_cell(row.cell_id)
    return row
