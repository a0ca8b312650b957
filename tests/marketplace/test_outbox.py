"""The outbox: with its cause or not at all, coalesced but never lost, claimed once, backed off, parked, taken again."""

import ast
import importlib
import threading
from datetime import timedelta
from importlib import import_module
from pathlib import Path

import pytest
from django.db import transaction
from django.utils import timezone

from marketplace import outbox
from marketplace.models import OutboxMessage
from tests.marketplace.conftest import TOPIC, emit
from tests.threads import in_thread


def due():
    """Time passes: every lapse is over."""
    past = timezone.now() - timedelta(seconds=1)
    OutboxMessage.objects.exclude(claimed_until=None).update(claimed_until=past)


@pytest.mark.django_db
def test_messages_of_one_key_are_one_and_others_are_not(heard):
    for n in range(5):
        emit("cell-1", n=n)
    emit("cell-2")
    emit()
    emit()
    assert OutboxMessage.objects.count() == 4
    assert outbox.drain(topic=TOPIC) == 4
    assert not OutboxMessage.objects.exists()
    assert heard[0] == {"n": 0}


@pytest.mark.django_db
def test_what_is_rolled_back_leaves_no_message(heard):
    def act():
        with transaction.atomic():
            outbox.emit(TOPIC)
            raise ValueError

    with pytest.raises(ValueError):
        act()
    assert not OutboxMessage.objects.exists()


@pytest.mark.django_db
def test_a_claimed_message_takes_in_no_newer_one(heard):
    emit("cell-1", n=1)
    (claimed,) = outbox.claim(10, TOPIC)
    emit("cell-1", n=2)
    assert outbox.drain(topic=TOPIC) == 1
    assert heard == [{"n": 2}]
    assert outbox._handle(claimed) == 1
    assert heard == [{"n": 2}, {"n": 1}]


@pytest.mark.django_db
def test_a_delayed_message_waits(heard):
    with transaction.atomic():
        outbox.emit(TOPIC, key="k", delay_s=3600)
    assert outbox.drain(topic=TOPIC) == 0
    OutboxMessage.objects.update(available_at=timezone.now())
    assert outbox.drain(topic=TOPIC) == 1


@pytest.mark.django_db
def test_an_undelayed_message_is_not_held_up_by_a_delayed_one_of_its_key(heard):
    with transaction.atomic():
        outbox.emit(TOPIC, key="k", delay_s=3600)
    emit("k")
    assert outbox.drain(topic=TOPIC) == 1
    assert not OutboxMessage.objects.exists()


@pytest.mark.django_db
def test_a_failure_backs_off_and_holds_up_nobody(heard):
    emit("bad")
    heard.broken = True
    assert outbox.drain(topic=TOPIC) == 0
    heard.broken = False
    emit("good")
    assert outbox.drain(topic=TOPIC) == 1  # the failed one is not due yet
    message = OutboxMessage.objects.get()
    assert (message.key, message.attempts, message.last_error) == ("bad", 1, "RuntimeError: not today")
    waits = []
    for _ in range(4):
        heard.broken = True
        due()
        before = timezone.now()
        outbox.drain(topic=TOPIC)
        waits.append(round((OutboxMessage.objects.get().claimed_until - before).total_seconds()))
    assert waits == [4, 8, 16, 32]
    heard.broken = False
    due()
    assert outbox.drain(topic=TOPIC) == 1


@pytest.mark.django_db
def test_after_the_last_attempt_a_person_must_look(heard):
    emit("bad")
    heard.broken = True
    for _ in range(outbox.MAX_ATTEMPTS + 3):
        due()
        outbox.drain(topic=TOPIC)
    message = OutboxMessage.objects.get()
    assert message.attempts == outbox.MAX_ATTEMPTS
    assert message.parked_at is not None
    heard.broken = False
    due()
    assert outbox.drain(topic=TOPIC) == 0
    emit("bad")  # a parked one takes in nothing
    assert outbox.drain(topic=TOPIC) == 1
    assert outbox.retry(message.pk, now=timezone.now())
    assert not outbox.retry(message.pk, now=timezone.now())
    assert outbox.drain(topic=TOPIC) == 1
    assert not OutboxMessage.objects.exists()


@pytest.mark.django_db
def test_a_parked_message_with_a_newer_twin_is_dropped_on_retry(heard):
    emit("k", n=1)
    OutboxMessage.objects.update(parked_at=timezone.now(), claimed_until=timezone.now())
    parked = OutboxMessage.objects.get().pk
    emit("k", n=2)
    assert outbox.retry(parked, now=timezone.now())
    assert [m.payload for m in OutboxMessage.objects.all()] == [{"n": 2}]


@pytest.mark.django_db
def test_what_a_crash_left_claimed_is_taken_again(heard):
    emit("k")
    (message,) = outbox.claim(10, TOPIC)  # and here the worker dies
    assert outbox.drain(topic=TOPIC) == 0
    due()
    assert outbox.drain(topic=TOPIC) == 1
    assert heard == [{}]
    assert OutboxMessage.objects.filter(pk=message.pk).count() == 0


@pytest.mark.django_db
def test_a_slow_worker_does_not_delete_what_another_has_taken_over(heard):
    emit()
    (mine,) = outbox.claim(10, TOPIC)
    due()
    (theirs,) = outbox.claim(10, TOPIC)
    assert outbox._handle(mine) == 1
    assert OutboxMessage.objects.count() == 1
    assert outbox._handle(theirs) == 1
    assert OutboxMessage.objects.count() == 0


@pytest.mark.django_db(transaction=True)
def test_two_workers_share_the_messages(heard):
    for n in range(60):
        emit(str(n), n=n)
    barrier = threading.Barrier(3)

    def work():
        barrier.wait(30)
        return outbox.drain(limit=1000, topic=TOPIC)

    joins = [in_thread(work) for _ in range(3)]
    assert sum(join() for join in joins) == 60
    assert sorted(p["n"] for p in heard) == list(range(60))


@pytest.mark.django_db(transaction=True)
def test_a_worker_skips_rows_that_a_rival_is_claiming(heard):
    emit("a")
    emit("b")
    with transaction.atomic():
        OutboxMessage.objects.select_for_update().get(key="a")
        assert [m.key for m in in_thread(lambda: outbox.claim(10, TOPIC))()] == ["b"]


@pytest.mark.django_db(transaction=True)
def test_a_message_coalesced_before_a_claim_is_not_lost_with_it(heard):
    """The cause commits after the worker claimed: the handler has to see it, or a message must be left for later."""
    seen = []
    outbox._handlers[TOPIC] = lambda _: seen.append(OutboxMessage.objects.filter(topic="tests.cause").count())
    emit("cell-1")
    with transaction.atomic():
        OutboxMessage.objects.create(topic="tests.cause", available_at=timezone.now())
        outbox.emit(TOPIC, key="cell-1")  # coalesced with the one that waits
        join = in_thread(lambda: outbox.drain(topic=TOPIC))
        for _ in range(50):  # the worker claims it now, if it ever will before our commit
            if in_thread(lambda: OutboxMessage.objects.filter(topic=TOPIC).exclude(claimed_until=None).exists())():
                break
    join()
    due()
    outbox.drain(topic=TOPIC)
    assert seen[-1] == 1


@pytest.mark.django_db(transaction=True)
def test_emitters_of_one_key_do_not_wait_for_each_other(heard):
    emit("cell-1")
    with transaction.atomic():
        outbox.emit(TOPIC, key="cell-1")
        in_thread(lambda: emit("cell-1"))()
    assert OutboxMessage.objects.filter(topic=TOPIC).count() == 1


def topics(path):
    """Every topic that a module emits, its constants resolved."""
    module = importlib.import_module(".".join(path.with_suffix("").parts))
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"emit", "outbox.emit"}:
            yield eval(ast.unparse(node.args[0]), vars(module).copy())


def test_every_topic_that_is_emitted_has_a_handler():
    for app in ("marketplace", "scheduler", "billing"):
        import_module(f"{app}.tasks")
    emitted = set()
    for path in sorted(Path().glob("*/**/*.py")):
        if path.parts[0] in {"marketplace", "scheduler", "billing"} and "emit(" in path.read_text():
            emitted |= set(topics(path)) if path.name != "outbox.py" else set()
    assert len(emitted) > 5
    assert emitted - set(outbox._handlers) == set()


# --- work that somebody else is at
@pytest.mark.django_db(transaction=True)
def test_busy_hands_the_message_back_and_leaves_it_to_whoever_is_at_it(heard):
    emit("k", n=1)

    def busy(_):
        raise outbox.Busy(lambda: True)

    outbox._handlers[TOPIC] = busy
    assert outbox.drain(topic=TOPIC) == 0
    message = OutboxMessage.objects.get()
    assert (message.claimed_until, message.attempts, message.parked_at, message.last_error) == (None, 0, None, "")
    outbox._handlers[TOPIC] = heard
    assert outbox.drain(topic=TOPIC) == 1
    assert heard == [{"n": 1}]


@pytest.mark.django_db(transaction=True)
def test_who_is_busy_does_not_keep_what_was_claimed_with_it_from_its_handler(heard):
    """Of any topic, not only of those taken one at a time: what lies claimed beside it would wait until its claim is over."""
    emit("a", n=1)
    emit("b", n=2)

    def handle(payload):
        if payload["n"] == 1:
            raise outbox.Busy(lambda: True)
        heard(payload)

    outbox._handlers[TOPIC] = handle
    assert outbox.drain(topic=TOPIC) == 1
    assert heard == [{"n": 2}]
    assert [(m.key, m.claimed_until) for m in OutboxMessage.objects.all()] == [("a", None)]


@pytest.mark.django_db(transaction=True)
def test_who_was_at_it_may_have_ended_meanwhile_then_the_message_is_taken_again(heard):
    """The other looked for more before we handed ours back: nobody but us is left to take it."""
    emit("k", n=1)
    asked = []

    def busy_once(payload):
        if not asked:
            raise outbox.Busy(lambda: asked.append(1))  # None: nobody is at it any more
        heard(payload)

    outbox._handlers[TOPIC] = busy_once
    assert outbox.drain(topic=TOPIC) == 1
    assert heard == [{"n": 1}]
    assert not OutboxMessage.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_a_message_handed_back_gives_way_to_a_newer_one(heard):
    emit("k", n=1)

    def busy(_):
        emit("k", n=2)
        raise outbox.Busy(lambda: True)

    outbox._handlers[TOPIC] = busy
    assert outbox.drain(topic=TOPIC) == 0
    assert [m.payload for m in OutboxMessage.objects.all()] == [{"n": 2}]


@pytest.mark.django_db(transaction=True)
def test_long_work_is_claimed_one_message_at_a_time(heard):
    outbox.handler(TOPIC, one_at_a_time=True)(heard)
    try:
        for key in "abc":
            emit(key)
        assert len(outbox._next(10, TOPIC)) == 1
        assert len(outbox._next(10, None)) == 1
    finally:
        outbox._alone.discard(TOPIC)
    assert len(outbox._next(10, TOPIC)) == 1  # what is left
