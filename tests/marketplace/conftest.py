"""An offer and who may buy it; a topic of the outbox that only tests use, and its handler."""

import logging

import pytest
from django.db import transaction

from marketplace import outbox
from tests import factories

TOPIC = "tests.topic"


@pytest.fixture
def listing():
    site = factories.site()
    return factories.listing(site, hosts=[factories.host(site)])


@pytest.fixture
def customer():
    return factories.organization()


class Heard(list):
    """A handler that remembers its payloads, and fails while `broken`."""

    broken = False

    def __call__(self, payload):
        if self.broken:
            raise RuntimeError("not today")
        self.append(payload)


@pytest.fixture
def heard(monkeypatch):
    monkeypatch.setattr(logging.getLogger("marketplace.outbox"), "disabled", True)
    handler = Heard()
    monkeypatch.setitem(outbox._handlers, TOPIC, handler)
    return handler


def emit(key="", **payload):
    with transaction.atomic():
        outbox.emit(TOPIC, key=key, payload=payload)
