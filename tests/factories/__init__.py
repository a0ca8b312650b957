"""Builders of rows for every test: plain functions, sensible defaults, `**fields` overrides any column.

    operator = factories.organization(is_operator=True)
    site = factories.site(operator)                          # 1 MW, nodes site > tx-1 > pdu-1, pdu-2
    host = factories.host(site, gpus=8)                      # reserved watts stand in every node above it
    contract = factories.contract(factories.listing(site, hosts=[host]), customer)
    job = factories.job(contract, gpus=2);  placement = factories.placement(job, host, [0, 1])
    api = factories.client(customer, role="engineer")        # or client(key=token), client(user=...)

Rows that follow from others are made as the services would leave them: free columns, reserved watts, node sums, events.
"""

from tests.factories.market import bid, contract, listing, price_version, quote, resale
from tests.factories.people import actor, client, key, member, organization, staff, user
from tests.factories.places import a_node, agent, cell, gpu_model, host, miner, node, reserve, site, unmark
from tests.factories.rows import NOW
from tests.factories.running import accounted, job, placement, reserved_w

__all__ = [
    "NOW",
    "a_node",
    "accounted",
    "actor",
    "agent",
    "bid",
    "cell",
    "client",
    "contract",
    "gpu_model",
    "host",
    "job",
    "key",
    "listing",
    "member",
    "miner",
    "node",
    "organization",
    "placement",
    "price_version",
    "quote",
    "resale",
    "reserve",
    "reserved_w",
    "site",
    "staff",
    "unmark",
    "user",
]
