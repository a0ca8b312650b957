"""Hosts and sites out of work, and what is looked at when they are: for tests of windows on them."""

from datetime import timedelta
from itertools import product
from uuid import uuid4

from django.conf import settings
from django.core import mail
from django.db import transaction

from marketplace import outbox, tasks
from marketplace.locks import Lock, acquire
from marketplace.models import ContractEvent, Host, ReservationBlock
from marketplace.services import (
    agents,
    conditions,
    gpu_health,
    leases,
)
from marketplace.services.contracts import healing, notices
from marketplace.tenancy import Actor
from tests.factories import NOW
from tests.marketplace.works import DAY, HOUR

STAFF = Actor(kind="staff", user_id=1, label="dana@tailrace.example")
SECOND = timedelta(seconds=1)
START, END = NOW + 2 * DAY, NOW + 30 * DAY
LATER = START + 3 * HOUR
LEASE = timedelta(seconds=settings.SITE_LEASE_SECONDS)


def heard(yard, now):
    """The site speaks: it is not silent, and none of its hosts is lost."""
    type(yard.agent).objects.update(last_sync_at=now)
    Host.objects.exclude(state="lost").update(beat_at=now)


def sicken(yard, host, now, gpu=3):
    heard(yard, now)
    event = {
        "id": str(uuid4()), "at": now, "kind": "gpu_error", "subject": host.name, "data": {"gpu": gpu, "kind": "xid", "code": 79},
    }  # fmt: skip
    agents.observe(yard.agent, {"agent_time": now, "boot": str(uuid4()), "sequence": 1, "events": [event]}, now=now)


def lose(yard, host, beat, now):
    heard(yard, now)
    Host.objects.filter(pk=host.pk).update(state="lost", state_reason="no beat", beat_at=beat)
    conditions.record(hosts=[host.pk], now=now)


def watched(yard, last, now):
    """The site has spoken last at `last`, its lease is a quarter of an hour, and its loop looks now."""
    type(yard.agent).objects.update(last_sync_at=last, lease_until=last + LEASE)
    Host.objects.exclude(state="lost").update(beat_at=last)
    with transaction.atomic():
        acquire((Lock.SITE, yard.site.pk))
        leases.watch(yard.site, now=now)


def well(yard, host, now):
    heard(yard, now)
    gpu_health.well(Host.objects.get(pk=host.pk), actor=STAFF, now=now, why="replaced")


def hosts_of(yard, contract):
    return [yard.hosts.index(Host.objects.get(pk=pk)) for pk in sorted(yard.on(contract))]


def told(contract):
    return list(ContractEvent.objects.filter(contract=contract, actor=healing.ACTOR).values_list("reason", flat=True))


def letters():
    """Mails of what is looked at here."""
    assert tasks.contracts
    outbox.drain(topic=notices.NOTICE)
    endings = tuple(notices.SUBJECTS[what].removeprefix("{id}: ") for what in notices.WORK)
    return [letter for letter in mail.outbox if letter.subject.endswith(endings)]


def never_oversold(yard):
    """No GPU is promised twice at any instant."""
    blocks = ReservationBlock.objects.filter(reservation__state="firm").select_related("reservation")
    for a, b in product(blocks, blocks):
        if a.pk < b.pk and a.host_id == b.host_id and set(a.gpu_indices) & set(b.gpu_indices):
            assert a.reservation.ends_at <= b.reservation.claims_at or b.reservation.ends_at <= a.reservation.claims_at
    for block in blocks:
        assert max(block.gpu_indices) < 8
