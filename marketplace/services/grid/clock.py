"""The beat of the grid's sources. One that fails does not stop the others; one is asked by one worker at a time."""

import logging
from datetime import datetime, timedelta

from django.db import transaction
from django.utils import timezone

from marketplace.locks import Lock, acquire
from marketplace.models import GridSource
from marketplace.services.grid import openadr, rules

log = logging.getLogger(__name__)


def tick(now: datetime | None = None) -> None:
    for pk in GridSource.objects.filter(enabled=True).order_by("pk").values_list("pk", flat=True):
        try:
            ask(pk, now=now or timezone.now())
        except Exception:  # one source's trouble must not stop the others'
            log.exception("grid source %s failed", pk)


def ask(pk: int, *, now: datetime) -> None:
    """One source: listened to outside any transaction, judged inside one that holds its row."""
    row = GridSource.objects.select_related("site", "node").get(pk=pk)
    due = row.asked_at is None or now - row.asked_at >= timedelta(seconds=row.poll_s)
    mine = GridSource.objects.filter(pk=pk, asked_at=row.asked_at)  # a rival that has read the same finds it moved
    if row.kind == GridSource.Kind.OPENADR3 and due and mine.update(asked_at=now):
        openadr.poll(row, now=now)
    with transaction.atomic():
        acquire((Lock.SITE, row.site_id))
        locked = GridSource.objects.select_for_update(no_key=True, of=("self",)).select_related("site", "node")
        row = locked.get(pk=pk)
        if not row.enabled:
            return
        if row.kind == GridSource.Kind.PRICE:
            rules.judge_price(row, now=now)
        rules.judge_silence(row, now=now)


def holds(site_id: int, *, now: datetime) -> bool:
    """Whether a source that must be heard is silent, and its policy is that nothing rises meanwhile."""
    rows = GridSource.objects.filter(site=site_id, enabled=True, stale_policy=GridSource.Stale.HOLD)
    return any(rules.silent(row, now) for row in rows)
