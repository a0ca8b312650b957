"""From the placement timeline to usage records, and usage that partners report.

What is billed is the control plane's own timeline: from `running_at` (running confirmed) to `release_requested_at`,
less silence that nothing proves, less time parked. Records of a running placement are closed at whole UTC hours, those
of an ended one at once. When the timeline changes behind us, the record of that interval gets its next revision.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from itertools import zip_longest
from operator import attrgetter

from django.db import IntegrityError, OperationalError, connection, transaction
from django.db.models import F, Q
from psycopg.errors import DeadlockDetected

from billing import spot
from billing.core import metering, rating
from billing.core.metering import Interval
from billing.models import Meter, PriceVersion, UsageRecord
from marketplace.locks import Lock, acquire
from marketplace.models import Amendment, Contract, Kind, Placement, PlacementEvent
from marketplace.services.replicas import HELD

SOURCE = "timeline"
BATCH = 500
HOUR = 3600
_LAST_BEAT = re.compile(r"last beat (\d{4}-\d\d-\d\dT[0-9:.]+(?:Z|[+-]\d\d:\d\d))")


@dataclass(frozen=True, slots=True)
class Row:
    """One usage record to insert; see UsageRecord for the units."""

    organization_id: int
    contract_id: int
    placement_id: int
    price_version_id: int
    meter: int
    revision: int
    start_s: int
    end_s: int
    rate: int
    quantity: int
    previous: int
    source: str
    event_id: str

    @property
    def digest(self) -> str:
        """SHA-256 of the payload: the same event id with another digest is a conflict."""
        payload = (self.placement_id, self.meter, self.revision, self.start_s, self.end_s, self.rate, self.quantity)
        return hashlib.sha256(repr(payload).encode()).hexdigest()


_INSERT = (
    "INSERT INTO billing_usagerecord (organization_id, contract_id, placement_id, price_version_id, meter,"
    " revision, start_s, end_s, rate, quantity, previous, source, event_id, payload_digest)"
    " SELECT * FROM unnest(%s::bigint[], %s::bigint[], %s::bigint[], %s::bigint[], %s::smallint[],"
    " %s::smallint[], %s::bigint[], %s::bigint[], %s::bigint[], %s::bigint[], %s::bigint[], %s::text[],"
    " %s::text[], %s::text[]) {conflict} RETURNING event_id"
)
_ALL_NEW, _SOME_NEW = _INSERT.format(conflict=""), _INSERT.format(conflict="ON CONFLICT DO NOTHING")
_COLUMNS = (*(field.name for field in fields(Row)), "digest")
_ORDER = attrgetter("placement_id", "meter", "revision", "start_s", "source", "event_id")


def insert(rows: Sequence[Row]) -> set[str]:
    """Insert records in one statement; returns the event ids that were new.

    A row whose event id is known, or that overlaps another of its placement, meter and revision, is left out: the
    caller sees which by what is missing. That all are new, as a rule, is tried first: rows that may be left out are
    looked up in every index twice, which is a third of their cost. Everybody writes in one order, so that of two who write
    the same, one waits.
    """
    if not rows:
        return set()
    rows = sorted(rows, key=_ORDER)
    columns = [[getattr(row, name) for row in rows] for name in _COLUMNS]
    with connection.cursor() as cursor:
        try:
            with transaction.atomic():
                cursor.execute(_ALL_NEW, columns)
                return {event_id for (event_id,) in cursor.fetchall()}
        except IntegrityError:
            pass
        except OperationalError as error:  # somebody writes what overlaps, each waits for the other: we went back
            if not isinstance(error.__cause__, DeadlockDetected):
                raise
        cursor.execute(_SOME_NEW, columns)
        return {event_id for (event_id,) in cursor.fetchall()}


def price_versions(contract: Contract, kind: str = PriceVersion.Kind.RATE) -> list[PriceVersion]:
    """The contract's versions of a price by `valid_from_s`; the price that it was signed at is the first. Under a spot contract
    they go on with the prices of its closed intervals.
    """
    found = list(PriceVersion.objects.filter(contract=contract, kind=kind).order_by("valid_from_s"))
    if not found:
        overage = contract.overage_price if contract.overage_price is not None else contract.price
        millionths = contract.price if kind == PriceVersion.Kind.RATE else overage
        first, _ = PriceVersion.objects.get_or_create(
            contract=contract,
            kind=kind,
            valid_from_s=0,
            defaults={"millionths": millionths, "created_at": contract.created_at},
        )
        found = [first]
    if contract.kind == Kind.SPOT and kind == PriceVersion.Kind.RATE:
        found += spot.follow(contract, found[-1])
    return found


_AGREED = {Amendment.Kind.PRICE: PriceVersion.Kind.RATE, Amendment.Kind.RESIZE: PriceVersion.Kind.ADDED}


def keep_agreed_prices(contract_ids: Sequence[int]) -> None:
    """Versions of the prices that amendments have agreed, where they are missing. Ask before metering or rating.

    An amendment is accepted before its instant, so no second from it on is metered before its version stands here.
    """
    if not contract_ids:
        return
    agreed = Amendment.objects.filter(contract_id__in=contract_ids, state=Amendment.State.ACCEPTED, kind__in=_AGREED)
    rows: list[PriceVersion] = []
    first: set[int] = set()
    for row in agreed.order_by("effective_at", "pk"):
        if row.kind == Amendment.Kind.PRICE and row.contract_id not in first:
            first.add(row.contract_id)  # the contract's own column may say the new price already
            old = row.old_price or 0
            rows.append(
                PriceVersion(contract_id=row.contract_id, valid_from_s=0, millionths=old, created_at=row.created_at)
            )
        at, price = metering.floor_second(row.effective_at), row.price or 0
        rows.append(
            PriceVersion(
                contract_id=row.contract_id, kind=_AGREED[Amendment.Kind(row.kind)], valid_from_s=at, millionths=price,
                created_at=row.created_at,
            )
        )  # fmt: skip
    PriceVersion.objects.bulk_create(rows, ignore_conflicts=True)


_BEFORE_RUNNING = frozenset({"intended", "shedding", "granted", "starting"})


def billable(placement: Placement, events: Iterable[PlacementEvent], *, until: datetime) -> tuple[Interval, ...]:
    """The billable seconds of one placement up to `until`: the columns give the ends, the events the holes.

    Silence is proven by the agent's return: it reports the same task running, or its exit with a code.
    """
    if placement.running_at is None:
        return ()
    timeline = [metering.Transition(placement.running_at, 0, "running")]
    held: list[datetime] = []  # it waits for the rest of its gang: begin, end, begin, ...
    for event in events:
        if HELD in {event.from_state, event.to_state}:
            held.append(event.at)
            continue
        if event.to_state in _BEFORE_RUNNING:  # told late, when the work ran already: the column says since when
            continue
        at = event.at
        if event.to_state == "unreachable" and (seen := _LAST_BEAT.search(event.reason)):
            at = min(at, datetime.fromisoformat(seen.group(1)))
        if at < placement.running_at and event.to_state != "unreachable":
            continue
        exited = event.to_state in {"released", "failed"} and placement.exit_code is not None
        proven = event.from_state == "unreachable" and (event.to_state == "running" or exited)
        timeline.append(metering.Transition(max(at, placement.running_at), event.pk, event.to_state, proven))
    ends = [moment for moment in (placement.release_requested_at, placement.finished_at) if moment is not None]
    holes = [Interval(metering.floor_second(min(ends)), max(metering.floor_second(until), 1 << 40))] if ends else []
    for begin, end in zip_longest(held[::2], held[1::2]):
        last = 1 << 40 if end is None else metering.floor_second(end)
        holes.append(Interval(metering.floor_second(begin), max(metering.floor_second(begin), last)))
    return metering.billable_intervals(timeline, holes, until=until)


def due(organization_id: int | None = None) -> Q:
    """Placements whose timeline is not wholly recorded: running ones, and ended ones not metered to their end."""
    open_ended = Q(running_at__isnull=False) & (
        Q(finished_at__isnull=True) | Q(metered_through__isnull=True) | ~Q(metered_through=F("finished_at"))
    )
    return open_ended & Q(organization_id=organization_id) if organization_id is not None else open_ended


def meter_all(now: datetime) -> int:
    """Close what is due for every organization; returns the records written. Ended placements at once, others hourly."""
    return sum(meter(organization_id, through=None, now=now) for organization_id in _stale(now))


def _stale(now: datetime) -> list[int]:
    mark = _hour_mark(now)
    stale = Q(finished_at__isnull=False) | Q(metered_through__isnull=True) | Q(metered_through__lt=mark)
    rows = Placement.objects.filter(due() & stale).order_by().values_list("organization_id", flat=True).distinct()
    return sorted(rows)


def _hour_mark(now: datetime) -> datetime:
    return metering.instant(metering.floor_second(now) // HOUR * HOUR)


def meter(organization_id: int, *, through: datetime | None, now: datetime) -> int:
    """Record the billable seconds of an organization; returns the number of records written.

    Running placements are closed through `through` (a closing period), or through the last whole hour when it is None.
    """
    horizon = min(through, now) if through is not None else _hour_mark(now)
    written = 0
    last = 0
    while True:
        with transaction.atomic():
            acquire((Lock.WALLET, organization_id))
            rows = Placement.objects.filter(due(organization_id), pk__gt=last).select_related("contract")
            batch = list(rows.order_by("pk")[:BATCH])
            if not batch:
                return written
            written += _meter_batch(batch, horizon)
            last = batch[-1].pk


def pending(organization_id: int, *, until: datetime) -> list[Row]:
    """The records that metering through `until` would write now; writes none. For previews and running costs."""
    rows = Placement.objects.filter(due(organization_id)).select_related("contract").order_by("pk")
    return _plan(list(rows), until)[0]


def owing(organization_ids: Sequence[int]) -> list[int]:
    """Those of the organizations that have placements to meter."""
    rows = Placement.objects.filter(due(), organization_id__in=organization_ids).order_by()
    return sorted(rows.values_list("organization_id", flat=True).distinct())


def remeter(placement_ids: Sequence[int], *, now: datetime) -> int:
    """Compare ended or running placements with their records again and write corrections; returns records written."""
    written = 0
    placements = Placement.objects.filter(pk__in=placement_ids).select_related("contract").order_by("organization_id")
    for placement in placements:
        with transaction.atomic():
            acquire((Lock.WALLET, placement.organization_id))
            written += _meter_batch([placement], _hour_mark(now))
    return written


def _meter_batch(batch: Sequence[Placement], horizon: datetime) -> int:
    rows, marks = _plan(batch, horizon)
    written = len(insert(rows))
    for through, placement_ids in marks.items():
        Placement.objects.filter(pk__in=placement_ids).update(metered_through=through)
    return written


def _plan(batch: Sequence[Placement], horizon: datetime) -> tuple[list[Row], dict[datetime, list[int]]]:
    """Records to write for the placements through `horizon`, and the new `metered_through` of each."""
    ids = [placement.pk for placement in batch]
    events: dict[int, list[PlacementEvent]] = defaultdict(list)
    for event in PlacementEvent.objects.filter(placement_id__in=ids).order_by("id"):
        events[event.placement_id].append(event)
    known: dict[int, dict[Interval, UsageRecord]] = defaultdict(dict)
    records = UsageRecord.objects.filter(placement_id__in=ids, meter=Meter.GPU, source=SOURCE)
    for record in records.order_by("placement_id", "start_s", "revision"):
        known[record.placement_id][Interval(record.start_s, record.end_s)] = record
    keep_agreed_prices(sorted({placement.contract_id for placement in batch}))
    prices: dict[int, list[PriceVersion]] = {}
    rows: list[Row] = []
    marks: dict[datetime, list[int]] = defaultdict(list)
    priced = spot.closed_through({p.contract.listing_id for p in batch if p.contract.kind == Kind.SPOT})
    free = spot.short_notice(batch, events)
    for placement in batch:
        # Never backwards: a running placement metered beyond a past `horizon` keeps what it has.
        until = placement.finished_at or max(horizon, placement.metered_through or horizon)
        if placement.contract.kind == Kind.SPOT and (made := priced.get(placement.contract.listing_id)):
            until = min(until, max(made, placement.metered_through or made))
        if placement.milli_gpus:
            if placement.contract_id not in prices:
                prices[placement.contract_id] = price_versions(placement.contract)
            pieces = billable(placement, events[placement.pk], until=until)
            if placement.pk in free:
                pieces = metering.subtract(pieces, [free[placement.pk]])
            rows += _new_rows(placement, pieces, known[placement.pk], prices[placement.contract_id])
        if placement.metered_through != until:
            marks[until].append(placement.pk)
    return rows, marks


def _new_rows(
    placement: Placement,
    pieces: tuple[Interval, ...],
    known: dict[Interval, UsageRecord],
    versions: Sequence[PriceVersion],
) -> list[Row]:
    """First records of what has none, and next revisions of what no longer agrees with the timeline."""
    rate = placement.milli_gpus
    rows: list[Row] = []

    def row(span: Interval, *, quantity: int, before: UsageRecord | None, version: int) -> Row:
        revision = 0 if before is None else before.revision + 1
        return Row(
            organization_id=placement.organization_id,
            contract_id=placement.contract_id,
            placement_id=placement.pk,
            price_version_id=version,
            meter=Meter.GPU,
            revision=revision,
            start_s=span.start,
            end_s=span.end,
            rate=rate,
            quantity=quantity,
            previous=0 if before is None else before.quantity,
            source=SOURCE,
            event_id=f"{placement.pk}-{Meter.GPU.value}-{span.start}-{revision}",
        )

    for span, record in known.items():
        quantity = rate * sum(piece.seconds for piece in metering.clip(pieces, span))
        if quantity != record.quantity:
            rows.append(row(span, quantity=quantity, before=record, version=record.price_version_id))
    fresh = metering.subtract(pieces, known)
    changes = [version.valid_from_s for version in versions]
    months = [window.end for piece in fresh for window in rating.month_windows(piece)]
    for span in metering.cut(fresh, changes + months):
        version = max((v for v in versions if v.valid_from_s <= span.start), key=lambda v: v.valid_from_s)
        rows.append(row(span, quantity=rate * span.seconds, before=None, version=version.pk))
    return rows


def drift(*, since: datetime, until: datetime) -> int:
    """Milli-GPU-seconds by which the records of placements that ended in (since, until] and their timelines disagree: 0 unless
    metering is due. Batch by batch; what it costs depends on that window, not on history.
    """
    rows = Placement.objects.filter(running_at__isnull=False, finished_at__gt=since, finished_at__lte=until)
    total, last = 0, (since, 0)
    while True:
        after = Q(finished_at__gt=last[0]) | Q(finished_at=last[0], pk__gt=last[1])
        batch = list(rows.filter(after).select_related("contract").order_by("finished_at", "pk")[:BATCH])
        if not batch:
            return total
        planned, _ = _plan(sorted(batch, key=lambda row: row.pk), until)
        total += sum(abs(row.quantity - row.previous) for row in planned)
        assert batch[-1].finished_at is not None
        last = batch[-1].finished_at, batch[-1].pk
