"""Two operators with one of each thing, a customer and one of our own people, at the admins' doors."""

from types import SimpleNamespace

import pytest

from tests import factories


def operator(name):
    home = factories.organization(name, is_operator=True, is_customer=False)
    site = factories.site(home, name=f"{name} Hall")
    host, miner = factories.host(site, f"{name}-h1"), factories.miner(site, f"{name}-m1")
    return SimpleNamespace(
        home=home,
        site=site,
        host=host,
        miner=miner,
        listing=factories.listing(site, hosts=[host], title=f"{name} offer"),
        draft=factories.listing(site, state="draft", title=f"{name} draft"),
        agent=factories.agent(site)[0],
        node=site.power_nodes.get(name="pdu-1"),
    )


@pytest.fixture
def mine(db):
    return operator("Caprock")


@pytest.fixture
def theirs(db):
    return operator("Basin")


@pytest.fixture
def client(mine):
    return factories.client(mine.home, "owner")


@pytest.fixture
def staff(db):
    return factories.client(user=factories.staff())
