"""What must happen after a commit is a row of the same transaction. Workers claim rows; a Redis nudge only makes it sooner.

    emit("scheduler.run_cycle", key=str(cell_id), payload={"cell": cell_id})      # inside the transaction
    @handler("scheduler.run_cycle")                                               # in that app's tasks.py
    def run_cycle(payload): ...

A handler is at-least-once: it may run again after a crash, so it is idempotent by guarded updates. A message with a key is
coalesced with an unclaimed one of the same topic and key: a thousand submissions are one cycle.

Whoever writes a message nudges a worker once; who coalesces with it need not. A handler that finds somebody else at the same
work raises `Busy`: the message goes back, and the other, who looks for more when it is done, takes it with no delay.
Claiming and deleting do not wait for the disk: what a crash undoes of them is done again.
"""

import json
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from functools import cache
from typing import Any

from django.conf import settings
from django.db import IntegrityError, transaction
from django.utils import timezone
from kombu.pools import producers

from marketplace import prepared
from marketplace.models import OutboxMessage

log = logging.getLogger(__name__)
Handler = Callable[[dict[str, Any]], None]
_handlers: dict[str, Handler] = {}
_alone: set[str] = set()  # topics of which a worker takes one message at a time: others may take the rest

CLAIM_SECONDS = 150  # longer than a task's hard limit: a live handler is never claimed twice
MAX_ATTEMPTS = 12
CAUSE_WAIT_S = 10  # for a transaction that coalesced with a claimed message; then the message waits its turn again
NUDGED_S = 10  # a message delayed by more than this waits for a sweep
SOONER_S = 1  # a message delayed by more than this is brought forward by one delayed less
DEAF_S = 5  # a broker that did not answer is let be for so long
# What a worker waits out patiently, a request must not: one try, no retry, and a second for each answer.
IMPATIENT = {"socket_connect_timeout": 1, "socket_timeout": 1, "retry_on_timeout": False, "max_retries": 0}
_deaf_until = 0.0  # time.monotonic()


class Busy(Exception):  # noqa: N818 (it is no error)
    """Somebody else is at this work and looks for more of it when done. `still` says whether it is so: it is asked when the
    message has gone back, so that the other has seen it or we take it again.
    """

    def __init__(self, still: Callable[[], bool]) -> None:
        super().__init__("somebody else is at it")
        self.still = still


def handler(topic: str, *, one_at_a_time: bool = False) -> Callable[[Handler], Handler]:
    """Register the function for a topic. `one_at_a_time`: of long work, so that other workers share what waits."""

    def register(function: Handler) -> Handler:
        _handlers[topic] = function
        if one_at_a_time:
            _alone.add(topic)
        return function

    return register


# The message that waits already, else a new one; nothing at all where it has been claimed between the two.
# The shared lock tells the handler of one that waits to begin after our commit (`_await_causes`): a message claimed before we
# commit would otherwise be handled without seeing what we did, and nothing would be left to tell of it. Emitters share it.
_EMIT = """
WITH waits AS (
  SELECT id, available_at > clock_timestamp() + make_interval(secs => %(sooner)s) AS later FROM marketplace_outboxmessage
  WHERE topic = %(topic)s::text AND key = %(key)s::text AND key <> '' AND claimed_until IS NULL AND parked_at IS NULL FOR KEY SHARE
), made AS (
  INSERT INTO marketplace_outboxmessage (topic, key, payload, created_at, available_at, attempts, last_error)
  SELECT %(topic)s::text, %(key)s::text, %(payload)s::jsonb, now(), clock_timestamp() + make_interval(secs => %(delay)s), 0, ''
  WHERE NOT EXISTS (SELECT FROM waits)
  ON CONFLICT (topic, key) WHERE claimed_until IS NULL AND parked_at IS NULL AND NOT (key = '') DO NOTHING RETURNING id
)
SELECT id, true, false FROM made UNION ALL SELECT id, false, later FROM waits
"""
_SOONER = (
    "UPDATE marketplace_outboxmessage SET available_at = clock_timestamp() + make_interval(secs => %s) WHERE id = %s"
)


def emit(topic: str, *, payload: dict[str, Any] | None = None, key: str = "", delay_s: float = 0) -> None:
    """Write the message in the running transaction; after its commit nudge a worker, unless whoever wrote it first does."""
    asked = {
        "topic": topic,
        "key": key,
        "payload": json.dumps(payload or {}, separators=(",", ":")),
        "delay": float(delay_s),
        "sooner": float(delay_s + SOONER_S if delay_s else 0),
    }
    found = None
    while found is None:
        found = prepared.row(_EMIT, asked)
    pk, new, later = found
    if later:
        prepared.count(_SOONER, [float(delay_s), pk])
    if (new or later) and delay_s <= NUDGED_S:
        transaction.on_commit(lambda: nudge(topic, delay_s), robust=True)


def _await_causes(message: OutboxMessage) -> None:
    """Wait for the open transactions that have coalesced with a message we claimed; the handler then sees what they did."""
    if message.key:
        prepared.rows(_WAIT, [f"{CAUSE_WAIT_S}s", message.pk])


def nudge(topic: str, delay_s: float = 0) -> None:
    """Tell a worker that rows wait, or soon will. Losing it costs a sweep's interval, nothing else: so a request tries once, for
    a second or two at most, and after a failure nobody of this process tries for DEAF_S.
    """
    global _deaf_until
    from marketplace.celery import app

    if time.monotonic() < _deaf_until:
        return
    try:
        with _impatient(settings.CELERY_BROKER_URL).acquire(block=True, timeout=1) as producer:
            app.send_task(
                "marketplace.tasks.drain_outbox",
                kwargs={"topic": topic},
                countdown=delay_s or None,
                expires=30,
                retry=False,
                producer=producer,
            )
    except Exception:
        _deaf_until = time.monotonic() + DEAF_S
        log.warning("the broker does not answer; the sweep will find the message of %s", topic)


@cache
def _impatient(url: str) -> Any:
    """The process's pool of connections to a broker for nudges."""
    from marketplace.celery import app

    return producers[app.connection_for_write(url, transport_options=IMPATIENT)]


# Each of these is a transaction of its own whose commit does not wait for the disk.
_CALM = "(SELECT set_config('synchronous_commit', 'off', true) OFFSET 0) calm"
_COLUMNS = [field.attname for field in OutboxMessage._meta.concrete_fields]
_CLAIM = f"""
WITH due AS MATERIALIZED (
  SELECT id FROM marketplace_outboxmessage WHERE parked_at IS NULL AND available_at <= %(now)s
    AND (claimed_until IS NULL OR claimed_until < %(now)s) AND (%(topic)s::text IS NULL OR topic = %(topic)s::text)
    AND (%(alone)s::bool IS NULL OR (topic = ANY(%(topics)s::text[])) = %(alone)s::bool)
  ORDER BY available_at, id LIMIT %(limit)s FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE marketplace_outboxmessage m SET claimed_until = %(until)s, attempts = m.attempts + 1 FROM due, {_CALM} WHERE m.id = due.id
RETURNING {", ".join(f"m.{name}" for name in _COLUMNS)}
"""  # noqa: S608
_WAIT = f"""
SELECT 1 FROM (SELECT set_config('lock_timeout', %s, true) OFFSET 0) patience, {_CALM}, marketplace_outboxmessage m
WHERE m.id = %s FOR UPDATE OF m
"""  # noqa: S608
_NEEDLESS = f"""
DELETE FROM marketplace_outboxmessage m USING {_CALM} WHERE m.id = %s AND m.attempts = %s AND m.key <> '' AND EXISTS (
  SELECT 1 FROM marketplace_outboxmessage o
  WHERE o.topic = m.topic AND o.key = m.key AND o.claimed_until IS NULL AND o.parked_at IS NULL)
"""  # noqa: S608
_BACK = f"""
UPDATE marketplace_outboxmessage m SET claimed_until = NULL, attempts = m.attempts - 1 FROM {_CALM} WHERE m.id = %s AND m.attempts = %s
"""  # noqa: S608
_DONE = f"DELETE FROM marketplace_outboxmessage m USING {_CALM} WHERE m.id = %s AND m.attempts = %s"  # noqa: S608


def claim(limit: int, topic: str | None = None, *, alone: bool | None = None) -> list[OutboxMessage]:
    """Claim due messages, oldest first, for CLAIM_SECONDS; rivals skip them. `alone`: only (not) topics taken one at a time.

    NO KEY UPDATE passes by emitters that are joining a message: a steady stream of them cannot keep it from being claimed.
    """
    now = timezone.now()
    asked = {
        "until": now + timedelta(seconds=CLAIM_SECONDS),
        "now": now,
        "topic": topic,
        "alone": alone,
        "topics": sorted(_alone),
        "limit": limit,
    }
    found = [dict(zip(_COLUMNS, row, strict=True)) for row in prepared.rows(_CLAIM, asked)]
    messages = [OutboxMessage(**{**row, "payload": json.loads(row["payload"])}) for row in found]
    return sorted(messages, key=lambda message: message.pk)


def _next(limit: int, topic: str | None) -> list[OutboxMessage]:
    """What a worker takes now: several of what is quick, or one of what is long."""
    if topic is not None:
        return claim(1 if topic in _alone else limit, topic)
    return claim(limit, alone=False) or claim(1, alone=True)


def drain(*, limit: int = 50, topic: str | None = None) -> int:
    """Handle due messages until `limit`; returns how many succeeded. One failure delays its message only."""
    done = tried = 0
    while tried < limit:
        messages = _next(min(10, limit - tried), topic)
        if not messages:
            return done
        taken = False
        for message in messages:
            tried += 1
            try:
                done += _handle(message)
            except Busy as busy:
                _hand_back(message)
                taken = busy.still() or taken
        if taken:  # what we would claim next is what we have just handed back
            return done
    if topic is not None:  # who hands messages back to us counts on it that we look again
        nudge(topic)
    return done


def _handle(message: OutboxMessage) -> int:
    try:
        _await_causes(message)
        _handlers[message.topic](message.payload)
    except Busy:
        raise
    except Exception as error:
        log.exception("outbox %s %s failed (attempt %d)", message.topic, message.key, message.attempts)
        _postpone(message, error)
        return 0
    prepared.count(_DONE, [message.pk, message.attempts])
    return 1


def _hand_back(message: OutboxMessage) -> None:
    """Unclaim it; where a newer one of its key waits already, that one says it all."""
    mine = [message.pk, message.attempts]
    # A newer one that comes between the two: ours comes again when its claim is over.
    with suppress(IntegrityError), transaction.atomic():
        if not prepared.count(_NEEDLESS, mine):
            prepared.count(_BACK, mine)


def _postpone(message: OutboxMessage, error: Exception) -> None:
    """Back off exponentially; after MAX_ATTEMPTS park it, where a person sees it. A newer twin makes this one needless."""
    now = timezone.now()
    if (
        message.key
        and OutboxMessage.objects.filter(
            topic=message.topic, key=message.key, claimed_until=None, parked_at=None
        ).exists()
    ):
        OutboxMessage.objects.filter(pk=message.pk).delete()
        return
    gave_up = message.attempts >= MAX_ATTEMPTS
    OutboxMessage.objects.filter(pk=message.pk, attempts=message.attempts).update(
        claimed_until=now + timedelta(seconds=min(300, 2**message.attempts)),
        parked_at=now if gave_up else None,
        last_error=f"{type(error).__name__}: {error}"[:2000],
    )


def retry(pk: int, *, now: datetime) -> bool:
    """A person has looked at a parked message: try it again from the first attempt. False where it is not parked any more.

    A newer twin (same topic and key, unclaimed) does the same work, so the parked one is dropped.
    """
    with transaction.atomic():
        message = OutboxMessage.objects.select_for_update().filter(pk=pk).exclude(parked_at=None).first()
        if message is None:
            return False
        twins = OutboxMessage.objects.filter(topic=message.topic, key=message.key, claimed_until=None, parked_at=None)
        if message.key and twins.exists():
            message.delete()
        else:
            message.parked_at = message.claimed_until = None
            message.attempts, message.available_at = 0, now
            message.save(update_fields=["parked_at", "claimed_until", "attempts", "available_at"])
        topic = message.topic
        transaction.on_commit(lambda: nudge(topic), robust=True)
    return True
