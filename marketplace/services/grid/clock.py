"""The beat of the grid's sources: a message for each, so that one that fails or does not answer holds up no other."""

from datetime import datetime, timedelta

from django.db import transaction

from marketplace import outbox
from marketplace.locks import Lock, acquire
from marketplace.models import GridSource
from marketplace.services.grid import openadr, rules

ASK = "marketplace.ask_grid"


def tick() -> int:
    """Returns how many sources are looked at."""
    found = GridSource.objects.filter(enabled=True).order_by("pk").values_list("pk", flat=True)
    for pk in found:
        outbox.emit(ASK, key=str(pk), payload={"source": pk})
    return len(found)


def ask(pk: int, *, now: datetime) -> None:
    """One source: listened to outside any transaction, judged inside one that holds its row. One that is gone says nothing."""
    row = GridSource.objects.select_related("site", "node").filter(pk=pk, enabled=True).first()
    if row is None:
        return
    due = row.asked_at is None or now - row.asked_at >= timedelta(seconds=row.poll_s)
    mine = GridSource.objects.filter(pk=pk, asked_at=row.asked_at)  # a rival that has read the same finds it moved
    if row.kind == GridSource.Kind.OPENADR3 and due and mine.update(asked_at=now):
        openadr.poll(row, now=now)
    with transaction.atomic():
        acquire((Lock.SITE, row.site_id))
        locked = GridSource.objects.select_for_update(no_key=True, of=("self",)).select_related("site", "node")
        row = locked.filter(pk=pk, enabled=True).first()
        if row is None:
            return
        if row.kind == GridSource.Kind.PRICE:
            rules.judge_price(row, now=now)
        rules.judge_silence(row, now=now)


def holds(site_id: int, *, now: datetime) -> bool:
    """Whether a source that must be heard is silent, and its policy is that nothing rises meanwhile."""
    rows = GridSource.objects.filter(site=site_id, enabled=True, stale_policy=GridSource.Stale.HOLD)
    return any(rules.silent(row, now) for row in rows)
