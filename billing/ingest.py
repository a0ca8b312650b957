"""Usage that partners' meters report: stored once, or kept in quarantine with the reason."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from django.db import transaction

from billing.core import metering, rating
from billing.core.metering import Interval
from billing.models import Meter, UsageQuarantine, UsageRecord
from billing.usage import SOURCE, Row, insert, price_versions
from marketplace.models import Placement

MAX_INGEST = 1000


@dataclass(frozen=True, slots=True)
class Event:
    """Usage that a partner's meter reports for one of its placements: a first record of a half-open interval.

    `quantity` in the meter's unit; both ends are floored to whole seconds; the interval lies in one UTC month.
    """

    event_id: str
    placement_id: int
    meter: int
    start: datetime
    end: datetime
    quantity: int


def ingest(source: str, events: Sequence[Event], *, organization_id: int | None = None) -> list[str]:
    """Store a batch of at most 1,000 events in one transaction; one result per event, in order.

    `accepted`; `duplicate` (same id, same payload); `conflict` (same id, other payload: nothing is stored); or
    `quarantined` (unknown placement, empty or month-crossing interval, overlap): kept with the reason, with an alert.
    """
    if len(events) > MAX_INGEST:
        raise ValueError(f"a batch holds at most {MAX_INGEST} events, not {len(events)}")
    if source == SOURCE:
        raise ValueError(f"the source {SOURCE!r} is our own timeline's")
    places = Placement.objects.filter(pk__in={event.placement_id for event in events}).select_related("contract")
    if organization_id is not None:
        places = places.filter(organization_id=organization_id)
    placements = {placement.pk: placement for placement in places}
    versions = {p.contract_id: price_versions(p.contract)[0].pk for p in placements.values()}
    rows: dict[str, Row] = {}
    results: dict[int, str] = {}
    for index, event in enumerate(events):
        span = metering.interval(event.start, event.end)
        placement = placements.get(event.placement_id)
        reason = _unacceptable(event, span, placement)
        if reason or placement is None:
            results[index] = reason
        elif event.event_id in rows:
            results[index] = ""  # judged below, against what was stored
        else:
            rows[event.event_id] = Row(
                placement.organization_id, placement.contract_id, placement.pk, versions[placement.contract_id],
                event.meter, 0, span.start, span.end, -(-event.quantity // span.seconds) or 1, event.quantity, 0,
                source, event.event_id,
            )  # fmt: skip
    with transaction.atomic():
        fresh = insert(list(rows.values()))
        stored = dict(
            UsageRecord.objects.filter(source=source, event_id__in=[k for k in rows if k not in fresh]).values_list(
                "event_id", "payload_digest"
            )
        )
        answers: list[str] = []
        first: set[str] = set()
        for index, event in enumerate(events):
            row = rows.get(event.event_id)
            if results.get(index) or row is None:
                answers.append(_quarantine(source, event, results[index]))
            elif event.event_id in first or event.event_id in stored:
                digest = stored.get(event.event_id, row.digest)
                answers.append("duplicate" if digest == _digest_of(row, event) else "conflict")
            elif event.event_id in fresh:
                first.add(event.event_id)
                answers.append("accepted")
            else:
                answers.append(_quarantine(source, event, "overlaps another record of its placement and meter"))
    return answers


def _digest_of(row: Row, event: Event) -> str:
    span = metering.interval(event.start, event.end)
    rate = -(-event.quantity // span.seconds) or 1
    payload = (event.placement_id, event.meter, row.revision, span.start, span.end, rate, event.quantity)
    return hashlib.sha256(repr(payload).encode()).hexdigest()


def _unacceptable(event: Event, span: Interval, placement: Placement | None) -> str:
    if placement is None:
        return "unknown placement"
    if event.meter not in Meter.values:
        return f"unknown meter {event.meter}"
    if event.meter == Meter.GPU:
        return "GPU time is metered by the control plane's own timeline"
    if span.seconds <= 0 or event.quantity < 0:
        return "the interval is empty or the quantity negative"
    if rating.month_of(span.start).end < span.end:
        return "the interval crosses the end of a UTC month"
    return ""


def _quarantine(source: str, event: Event, reason: str) -> str:
    payload = {
        "placement": event.placement_id,
        "meter": event.meter,
        "start": event.start.astimezone(UTC).isoformat(),
        "end": event.end.astimezone(UTC).isoformat(),
        "quantity": event.quantity,
    }
    UsageQuarantine.objects.get_or_create(
        source=source,
        event_id=event.event_id,
        payload_digest=hashlib.sha256(repr(sorted(payload.items())).encode()).hexdigest(),
        defaults={"payload": payload, "reason": reason},
    )
    return "quarantined"
