"""The builders leave the books as the services would: sums up the tree and free columns agree."""

import pytest

from tests import factories

pytestmark = pytest.mark.django_db


def test_a_placement_takes_capacity_and_watts_up_the_tree():
    site = factories.site()
    host = factories.host(site)
    factories.miner(site, power_node="pdu-2")
    job = factories.job(factories.contract(factories.listing(site, hosts=[host])), gpus=2)
    placement = factories.placement(job, host, [0, 1], state="granted")
    host.refresh_from_db()
    assert host.gpu_free == [0, 0] + [1000] * 6
    assert host.reserved_w == 4600 + 2 * 700 + 6 * 200 == 1100 + placement.watts_delta
    sums = dict(site.power_nodes.values_list("name", "reserved_mw"))
    assert sums["pdu-1"] == host.reserved_w * 1000
    assert sums["pdu-2"] == 3500 * 1000
    assert sums["tx-1"] == sums["pdu-1"] + sums["pdu-2"]
    assert sums["site"] == host.reserved_w * site.pue_permille + 3500 * site.miner_pue_permille
    assert placement.events.count() == job.events.count() == 1
    assert (placement.grant.state, placement.grant.delta_w) == ("granted", placement.watts_delta)


def test_a_placement_that_waits_for_watts_has_none():
    host = factories.host(factories.site())
    job = factories.job(factories.contract(factories.listing(host.site, hosts=[host])))
    placement = factories.placement(job, host, [3], state="shedding")
    host.refresh_from_db()
    assert host.gpu_free[3] == 0
    assert host.reserved_w == host.parked_w
    assert (placement.grant.state, placement.grant.delta_w) == ("shedding", 4600 + 700 + 7 * 200 - 1100)


def test_a_client_is_whoever_it_is_told_to_be():
    organization = factories.organization(livemode=False)
    row, token = factories.key(organization, ["jobs:read"])
    assert row.scopes == ["jobs:read"]
    assert token.startswith("tr_test_")
    assert factories.client(organization, "viewer").session["_auth_user_id"]
