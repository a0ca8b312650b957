"""Quotes and contracts as a buyer makes them through the services, and what they leave behind."""

from datetime import timedelta

import pytest

from marketplace.errors import MarketError
from marketplace.models import OutboxMessage
from marketplace.services import contracts, quotes
from tests import factories
from tests.factories import NOW

DAY, HOUR = timedelta(days=1), timedelta(hours=1)
START, END = NOW + 2 * DAY, NOW + 9 * DAY


def ask(customer, listing, kind="reserved", gpus=8, *, now=NOW, start=START, end=END, **fields):
    wanted = quotes.Request(kind, gpus, starts_at=start, ends_at=end, **fields)
    return quotes.quote(factories.actor(customer), listing.pk, wanted, now=now)


def rate(customer, listing, kind="on_demand", gpus=8, **fields):
    return ask(customer, listing, kind, gpus, start=None, end=None, **fields)


def accept(customer, quote, now=NOW):
    return contracts.accept(factories.actor(customer), quote.pk, now=now)


def refused(code, call, *args, **kwargs):
    with pytest.raises(MarketError) as error:
        call(*args, **kwargs)
    assert error.value.code == code, error.value
    return error.value


def topics():
    return sorted(OutboxMessage.objects.values_list("topic", "payload__contract"))


def history(contract):
    return list(contract.events.values_list("from_state", "to_state"))


def upfront(listing, permille=250):
    type(listing).objects.filter(pk=listing.pk).update(upfront_permille=permille)
    listing.refresh_from_db()
