"""What happens to maintenance because time passes. Each step is a transaction of its own that looks before it writes, so that any
number of copies may run beside each other, and one that is killed between two steps is no loss.
"""

from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta

from django.db import transaction

from marketplace.models import Maintenance
from marketplace.services import audit
from marketplace.services.maintenance import announcing, notices, planning, taking
from marketplace.tenancy import SYSTEM

REMIND = timedelta(hours=24)  # before its start, whoever has come to its hosts meanwhile is told
State = Maintenance.State


def clock(now: datetime) -> Counter[str]:
    """Live maintenance that begins within REMIND, or has begun; returns what was done, by step."""
    done: Counter[str] = Counter()
    rows = Maintenance.objects.filter(state__in=Maintenance.LIVE, starts_at__lte=now + REMIND).select_related("site")
    for row in rows.order_by("starts_at", "pk"):
        for step in STEPS:
            if step(row, now):
                done[step.__name__] += 1
    return done


def tell(row: Maintenance, now: datetime) -> bool:
    """Who runs there and has not been told of it is told."""
    if row.state != State.ANNOUNCED or not notices.untold(row):
        return False
    with transaction.atomic():
        fresh = announcing.locked(row)
        if fresh.state != State.ANNOUNCED:
            return False
        return bool(notices.tell_new(fresh, planning.impact(fresh, now=now), now=now))


def take(row: Maintenance, now: datetime) -> bool:
    """Its hosts are emptied, each in time for what runs there."""
    if row.starts_at - timedelta(seconds=taking.EARLIEST_S) > now or now >= row.ends_at or not taking.due(row, now):
        return False
    with transaction.atomic():
        fresh = announcing.locked(row)
        hosts = taking.due(fresh, now) if fresh.state in Maintenance.LIVE and now < fresh.ends_at else []
        if hosts:
            taking.take(fresh, hosts, now=now)
    return bool(hosts)


def begin(row: Maintenance, now: datetime) -> bool:
    """Its start has come."""
    if row.state != State.ANNOUNCED or row.starts_at > now:
        return False
    with transaction.atomic():
        fresh = announcing.locked(row)
        if fresh.state != State.ANNOUNCED or fresh.starts_at > now:
            return False
        announcing.move(fresh, State.IN_PROGRESS, started_at=now)
        _audit(fresh, "began", now)
    row.state = State.IN_PROGRESS
    return True


def end(row: Maintenance, now: datetime) -> bool:
    """Its end has come: what it took is back at work."""
    if row.state != State.IN_PROGRESS or row.ends_at > now:
        return False
    with transaction.atomic():
        fresh = announcing.locked(row)
        if fresh.state != State.IN_PROGRESS or fresh.ends_at > now:
            return False
        taking.give_back(fresh, now=now)
        planning.give_room(fresh)
        announcing.move(fresh, State.COMPLETED, settled_at=now)
        _audit(fresh, "completed", now)
    return True


STEPS: tuple[Callable[[Maintenance, datetime], bool], ...] = (tell, take, begin, end)


def _audit(row: Maintenance, verb: str, now: datetime) -> None:
    audit.record(SYSTEM, f"maintenance.{verb}", row.public_id, now=now, organization_id=row.site.organization_id)
