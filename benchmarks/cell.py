"""A cell for the benchmarks of the scheduler's road through the database: sites, power nodes and hosts in bulk, customers in
good standing with contracts on all of it, and queues of jobs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

HOSTS_PER_SITE = 2000
HOSTS_PER_NODE = 40
GPUS = 8


@dataclass(frozen=True)
class World:
    cell: Any
    contracts: list[Any]

    @property
    def hosts(self) -> int:
        from marketplace.models import Host

        return Host.objects.filter(cell=self.cell).count()


def build(hosts: int, customers: int = 8) -> World:
    """A live cell of hosts with 8 GPUs each, agents alive, watts enough for all."""
    from datetime import timedelta

    from django.db import connection
    from django.utils import timezone

    from benchmarks.books import clone
    from tests import factories

    now = timezone.now()
    cell = factories.cell()
    left = hosts
    first: Any = None
    listing: Any = None
    while left > 0:
        count = min(left, HOSTS_PER_SITE)
        left -= count
        nodes = -(-count // HOSTS_PER_NODE)
        site = factories.site(cell_=cell, pdus=1, power_w=2_000_000_000)
        factories.agent(site, last_sync_at=now + timedelta(days=1), lease_until=now + timedelta(days=1))
        pdu = site.power_nodes.get(name="pdu-1")
        clone("marketplace_powernode", pdu.pk, nodes - 1, name="'pdu-' || (g + 1)")
        one = factories.host(site, gpus=GPUS, beat_at=now + timedelta(days=1))
        if listing is None:
            first, listing = one, factories.listing(site)
        with connection.cursor() as cursor:
            cursor.execute("UPDATE marketplace_host SET listing_id = %s WHERE id = %s", [listing.pk, one.pk])
        pdus = list(site.power_nodes.filter(kind="pdu").order_by("pk").values_list("pk", flat=True))
        clone(
            "marketplace_host", one.pk, count - 1, name="'h' || g",
            power_node_id=f"('{{{','.join(map(str, pdus))}}}'::bigint[])[1 + g %% {len(pdus)}]",
            leaf="'leaf-' || (g / 16)", spine="'spine-' || (g / 256)",
        )  # fmt: skip
    assert first is not None
    contracts = []
    for _ in range(customers):
        customer = factories.organization(gpu_limit=1 << 30)
        contracts.append(factories.contract(listing, customer, gpu_count=1 << 30, starts_at=now - timedelta(days=1)))
    analyze()
    return World(cell, contracts)


def analyze() -> None:
    """What autovacuum does on a database that lives longer than a minute."""
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute("ANALYZE")


SHAPES = (
    (1, 1000, 8000, 65_536),
    (1, 500, 4000, 32_768),
    (1, 250, 2000, 16_384),
    (2, 1000, 16_000, 131_072),
    (4, 1000, 32_000, 262_144),
)


def queue(world: World, jobs: int) -> list[int]:
    """Queued jobs of a mix of shapes: one of each shape and contract submitted through the service, the others copied from it."""
    from django.utils import timezone

    from benchmarks.books import clone
    from marketplace.services import jobs as service
    from tests import factories

    made: list[int] = []
    kinds = [(contract, shape) for contract in world.contracts for shape in SHAPES]
    for n, (contract, (gpus, milli, cpu, ram)) in enumerate(kinds):
        copies = jobs // len(kinds) + (n < jobs % len(kinds))
        if not copies:
            break
        spec = {"command": ["true"], "gpus": gpus, "gpu_milli": milli, "vcpu_milli": cpu, "ram_mib": ram}
        job = service.submit(factories.actor(contract.organization), contract, spec, now=timezone.now())
        made += [job.pk, *clone("marketplace_job", job.pk, copies - 1, queued_at="t.queued_at + g * interval '1 ms'")]
    analyze()
    return made
