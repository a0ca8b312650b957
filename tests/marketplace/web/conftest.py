"""A market with one listing of two hosts, a customer with a good card, and browsers."""

from collections.abc import Callable
from typing import Any

import pytest
from django.test import Client
from django.utils import timezone

from tests import factories


class Market:
    """One operator's listing of 16 GPUs, and a customer who may book."""

    def __init__(self) -> None:
        self.operator = factories.organization("Caprock Power", is_operator=True)
        self.site = factories.site(self.operator)
        self.hosts = [factories.host(self.site, beat_at=timezone.now()) for _ in range(2)]
        self.listing = factories.listing(self.site, hosts=self.hosts)
        self.customer = factories.organization("Lumen Labs")

    def contract(self, **fields: Any) -> Any:
        return factories.contract(self.listing, self.customer, gpu_count=16, **fields)


@pytest.fixture
def market(db: Any) -> Market:
    return Market()


@pytest.fixture
def browser() -> Callable[..., Client]:
    """A browser of a new member of `organization`, of a person, or of nobody."""

    def make(organization: Any = None, role: str = "owner", *, person: Any = None, **options: Any) -> Client:
        client = Client(**options)
        if organization is not None:
            person = factories.member(organization, role).user
        if person is not None:
            client.force_login(person)
        return client

    return make
