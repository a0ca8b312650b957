"""Nudges: one for each message, as soon as it is due; and what happens where the broker does not answer."""

import base64
import json
import logging
import socket
import time
from contextlib import contextmanager, suppress

import pytest
import redis
from django.db import transaction
from django.utils import timezone

from marketplace import outbox
from marketplace.models import OutboxMessage
from tests.marketplace.conftest import TOPIC, emit


@pytest.fixture
def nudges(settings):
    """What has come to the workers' queue since it was last asked: (topic, whether it is to be taken later)."""
    broker = redis.from_url(settings.CELERY_BROKER_URL)
    broker.delete(settings.CELERY_TASK_DEFAULT_QUEUE)

    def sent():
        found = []
        while packed := broker.rpop(settings.CELERY_TASK_DEFAULT_QUEUE):
            message = json.loads(packed)
            _, named, _ = json.loads(base64.b64decode(message["body"]))
            found.append((named["topic"], message["headers"]["eta"] is not None))
        return found

    yield sent
    broker.close()


@pytest.mark.django_db(transaction=True)
def test_a_message_is_nudged_once_and_again_when_it_comes_sooner(heard, nudges):
    for _ in range(3):
        emit("k")
    assert nudges() == [(TOPIC, False)]
    OutboxMessage.objects.all().delete()
    with transaction.atomic():
        outbox.emit(TOPIC, key="k", delay_s=0.3)
    emit("k")
    emit("k")
    assert nudges() == [(TOPIC, True), (TOPIC, False)]
    assert OutboxMessage.objects.get().available_at <= timezone.now()
    with transaction.atomic():
        outbox.emit(TOPIC, key="later", delay_s=60)
    assert nudges() == []


@pytest.mark.django_db(transaction=True)
def test_a_worker_that_leaves_before_all_is_done_calls_another(heard, nudges):
    for n in range(4):
        emit(n=n)
    assert len(nudges()) == 4
    assert outbox.drain(limit=3, topic=TOPIC) == 3
    assert nudges() == [(TOPIC, False)]
    assert outbox.drain(limit=3, topic=TOPIC) == 1
    assert nudges() == []


@contextmanager
def no_broker(settings, *, silent):
    """Where a broker should be nobody listens (refused), or somebody accepts and says nothing (silent): its socket."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        settings.CELERY_BROKER_URL = f"redis://127.0.0.1:{server.getsockname()[1]}/0"
        if not silent:
            server.close()
        yield server


def calls(server):
    """How many have connected."""
    server.setblocking(False)
    found = 0
    with suppress(BlockingIOError):
        while True:
            server.accept()[0].close()
            found += 1
    return found


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("silent", [False, True], ids=["refused", "silent"])
def test_without_redis_the_message_stands(heard, settings, monkeypatch, caplog, silent):
    monkeypatch.setattr(outbox, "_deaf_until", 0.0)
    caplog.set_level("WARNING", "marketplace.outbox")
    monkeypatch.setattr(logging.getLogger("marketplace.outbox"), "disabled", False)
    with no_broker(settings, silent=silent) as server:
        for key in "abc":
            emit(key)
        assert [record.args for record in caplog.records] == [(TOPIC,)]  # who comes after does not try
        assert not silent or calls(server) == 1  # nor did who came first try twice
    assert outbox.drain(topic=TOPIC) == 3


@pytest.mark.django_db(transaction=True)
def test_a_broker_that_is_back_is_nudged_again(heard, settings, monkeypatch, nudges):
    monkeypatch.setattr(outbox, "_deaf_until", 0.0)
    well = settings.CELERY_BROKER_URL
    with no_broker(settings, silent=False):
        emit("a")
    settings.CELERY_BROKER_URL = well
    emit("b")
    assert nudges() == []  # not at once
    assert 0 < outbox._deaf_until - time.monotonic() <= outbox.DEAF_S
    outbox._deaf_until = time.monotonic()  # later
    emit("c")
    assert nudges() == [(TOPIC, False)]
