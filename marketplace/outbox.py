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

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from functools import cache
from typing import Any

from django.conf import settings
from django.db import IntegrityError, connection, transaction
from django.utils import timezone
from kombu.pools import producers

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


def emit(topic: str, *, payload: dict[str, Any] | None = None, key: str = "", delay_s: float = 0) -> None:
    """Write the message in the running transaction; after its commit nudge a worker, unless whoever wrote it first does."""
    with connection.cursor() as cursor:
        new = _insert(cursor, topic, key, payload, delay_s)
        sooner = False
        while not new:
            found, sooner = _join(cursor, topic, key, delay_s)
            if found:
                break
            new = _insert(
                cursor, topic, key, payload, delay_s
            )  # it has been claimed between the two: now there is room
    if (new or sooner) and delay_s <= NUDGED_S:
        transaction.on_commit(lambda: nudge(topic, delay_s), robust=True)


def _insert(cursor: Any, topic: str, key: str, payload: dict[str, Any] | None, delay_s: float) -> bool:
    cursor.execute(
        "INSERT INTO marketplace_outboxmessage (topic, key, payload, created_at, available_at, attempts, last_error)"
        " VALUES (%s, %s, %s, now(), clock_timestamp() + make_interval(secs => %s), 0, '')"
        " ON CONFLICT (topic, key) WHERE claimed_until IS NULL AND parked_at IS NULL AND NOT (key = '') DO NOTHING",
        [topic, key, _json(payload or {}), delay_s],
    )
    return bool(cursor.rowcount)


def _join(cursor: Any, topic: str, key: str, delay_s: float) -> tuple[bool, bool]:
    """Coalesce with the message that waits: (whether there is one still, whether it was to come later and now comes at once).

    The shared lock tells its handler to begin after our commit (`_await_causes`): a message claimed before we commit would
    otherwise be handled without seeing what we did, and nothing would be left to tell of it. Emitters share it.
    """
    cursor.execute(
        "SELECT id, available_at > clock_timestamp() + make_interval(secs => %s) FROM marketplace_outboxmessage"
        " WHERE topic = %s AND key = %s AND claimed_until IS NULL AND parked_at IS NULL FOR KEY SHARE",
        [delay_s + SOONER_S if delay_s else 0, topic, key],
    )
    found = cursor.fetchone()
    if found and found[1]:
        cursor.execute(
            "UPDATE marketplace_outboxmessage SET available_at = clock_timestamp() + make_interval(secs => %s) WHERE id = %s",
            [delay_s, found[0]],
        )
    return found is not None, bool(found and found[1])


def _await_causes(message: OutboxMessage) -> None:
    """Wait for the open transactions that have coalesced with a message we claimed; the handler then sees what they did."""
    if message.key:
        with _undoable() as cursor:
            cursor.execute("SELECT set_config('lock_timeout', %s, true)", [f"{CAUSE_WAIT_S}s"])
            cursor.execute("SELECT 1 FROM marketplace_outboxmessage WHERE id = %s FOR UPDATE", [message.pk])


def _json(payload: dict[str, Any]) -> str:
    import json

    return json.dumps(payload, separators=(",", ":"))


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


@contextmanager
def _undoable() -> Iterator[Any]:
    """A transaction whose commit does not wait for the disk: a crash may undo it, and it is done again."""
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SET LOCAL synchronous_commit = off")
        yield cursor


def claim(limit: int, topic: str | None = None, *, alone: bool | None = None) -> list[OutboxMessage]:
    """Claim due messages, oldest first, for CLAIM_SECONDS; rivals skip them. `alone`: only (not) topics taken one at a time.

    NO KEY UPDATE passes by emitters that are joining a message: a steady stream of them cannot keep it from being claimed.
    """
    now = timezone.now()
    with _undoable() as cursor:
        cursor.execute(
            "UPDATE marketplace_outboxmessage SET claimed_until = %s, attempts = attempts + 1 WHERE id IN ("
            " SELECT id FROM marketplace_outboxmessage WHERE parked_at IS NULL AND available_at <= %s"
            " AND (claimed_until IS NULL OR claimed_until < %s) AND (%s::text IS NULL OR topic = %s)"
            " AND (%s::bool IS NULL OR (topic = ANY(%s::text[])) = %s)"
            " ORDER BY available_at, id LIMIT %s FOR NO KEY UPDATE SKIP LOCKED) RETURNING id",
            [now + timedelta(seconds=CLAIM_SECONDS), now, now, topic, topic, alone, sorted(_alone), alone, limit],
        )
        ids = [row[0] for row in cursor.fetchall()]
        return list(OutboxMessage.objects.filter(pk__in=ids).order_by("id"))


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
    with _undoable() as cursor:
        cursor.execute(
            "DELETE FROM marketplace_outboxmessage WHERE id = %s AND attempts = %s", [message.pk, message.attempts]
        )
    return 1


def _hand_back(message: OutboxMessage) -> None:
    """Unclaim it; where a newer one of its key waits already, that one says it all."""
    with _undoable() as cursor:
        cursor.execute(
            "DELETE FROM marketplace_outboxmessage m WHERE m.id = %s AND m.attempts = %s AND m.key <> '' AND EXISTS (SELECT 1 FROM"
            " marketplace_outboxmessage o WHERE o.topic = m.topic AND o.key = m.key AND o.claimed_until IS NULL AND o.parked_at IS NULL)",
            [message.pk, message.attempts],
        )
    with (
        suppress(IntegrityError),
        _undoable() as cursor,
    ):  # a newer one has come this moment: ours comes again when its claim is over
        cursor.execute(
            "UPDATE marketplace_outboxmessage SET claimed_until = NULL, attempts = attempts - 1 WHERE id = %s AND attempts = %s",
            [message.pk, message.attempts],
        )


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
