"""A site whose hosts go into maintenance, and those who have booked them."""

from datetime import timedelta

from django.db import transaction

from marketplace.models import (
    Host,
    MaintenanceNotice,
    Shortfall,
)
from marketplace.services import maintenance, placements
from scheduler import site_loop
from tests import factories
from tests.factories import NOW
from tests.marketplace.trade import accept, ask

MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
START, END = NOW + 10 * DAY, NOW + 10 * DAY + 4 * HOUR
TERM = (NOW + 2 * DAY, NOW + 30 * DAY)


class Yard:
    """A site of four 8-GPU hosts in two racks, offered in one listing."""

    def __init__(self, hosts=4, leaves=("leaf-1", "leaf-1", "leaf-2", "leaf-2")):
        self.site = factories.site()
        self.agent, _ = factories.agent(self.site, last_sync_at=NOW, lease_until=NOW + 90 * DAY)
        self.hosts = [factories.host(self.site, leaf=leaf) for leaf in leaves[:hosts]]
        self.listing = factories.listing(self.site, hosts=self.hosts)
        self.operator = factories.actor(self.site.organization)
        self.customer = factories.organization()

    def contract(self, gpus=8, term=TERM, customer=None, **fields):
        customer = customer or self.customer
        return accept(customer, ask(customer, self.listing, gpus=gpus, start=term[0], end=term[1], **fields))

    def on(self, contract):
        """{host: GPUs} of its own."""
        return {b.host_id: len(b.gpu_indices) for b in contract.reservation.blocks.all()}

    def draft(self, *hosts, start=START, end=END, now=NOW, **fields):
        asked = {"scope": "hosts", "hosts": list(hosts), "text": "New fans.", **fields}
        return maintenance.draft(self.operator, self.site, starts_at=start, ends_at=end, now=now, **asked)

    def announce(self, *hosts, now=NOW, **fields):
        return maintenance.announce(self.operator, self.draft(*hosts, now=now, **fields), now=now)

    def states(self):
        return [Host.objects.get(pk=host.pk).state for host in self.hosts]

    def runs(self, contract, host, **fields):
        job = factories.job(contract, state="running", gpus=8, attempt=1, **fields)
        return job, factories.placement(job, host, state="running", attempt=1, running_at=NOW)

    def gone(self, placement, now):
        """The agent's word that the replica has left, and a turn of the site's loop."""
        placement.refresh_from_db()
        with transaction.atomic():
            placements.lock_sites([self.site.pk])
            row = {"pk": placement.pk, "generation": placement.generation, "state": "exited", "exit_code": 143}
            placements.observe(self.agent, [row], now=now)
        site_loop.run(self.site.pk, now=now)


def told(contract):
    return list(
        MaintenanceNotice.objects.filter(contract=contract)
        .order_by("version")
        .values_list("what", "gpus", "short_gpus")
    )


def missed(contract):
    rows = Shortfall.objects.filter(contract=contract).order_by("starts_at")
    return [(row.gpus, row.starts_at, row.ends_at) for row in rows]
