"""A holder of a reserved contract, buyers, and what is always true of their reservations."""

from datetime import timedelta

from marketplace.models import Contract, Fill, Resale, Reservation
from marketplace.services import availability, contracts, quotes
from marketplace.services.forward import pieces, resales
from scheduler.core import capacity, parts
from tests import factories
from tests.factories import NOW

DAY = timedelta(days=1)
HOUR = timedelta(hours=1)
START, END = NOW + DAY, NOW + 11 * DAY
ASK = 1_500_000


class Desk:
    """One listing of `hosts` x 8 GPUs, and a holder of all of it from START to END."""

    def __init__(self, hosts=1, gpus=None, kind="reserved", **listing):
        self.site = factories.site()
        self.hosts = [factories.host(self.site, leaf=f"leaf-{n // 2}") for n in range(hosts)]
        self.listing = factories.listing(self.site, hosts=self.hosts, **listing)
        self.holder = factories.actor(factories.organization("Aurora Models"))
        self.contract = self.sign(self.holder, self.listing, gpus or 8 * hosts, kind)
        self.held = parts.size(self.strips(self.contract))

    def sign(self, actor, listing, gpus, kind="reserved", start=START, end=END, at=NOW):
        wanted = quotes.Request(kind, gpus, starts_at=start, ends_at=end)
        return contracts.accept(actor, quotes.quote(actor, listing.pk, wanted, now=at).pk, now=at)

    def offer(self, gpus=4, start=START + 2 * DAY, end=START + 4 * DAY, price=ASK, at=NOW, **more):
        return resales.offer(self.holder, self.contract, resales.Asked(gpus, start, end, price, **more), now=at)

    def buyer(self):
        return factories.actor(factories.organization())

    def quote(self, buyer, resale, gpus=4, at=NOW, kind="reserved"):
        return quotes.quote(buyer, resale.listing_id, quotes.Request(kind, gpus), now=at)

    def buy(self, buyer, resale, gpus=4, at=NOW, kind="reserved", *, paid=True):
        made = contracts.accept(buyer, self.quote(buyer, resale, gpus, at, kind).pk, now=at)
        if paid:
            contracts.confirm_payment(made.pk, now=at)
            made.refresh_from_db()
        return made

    @staticmethod
    def strips(contract):
        return pieces.strips_of(contract.reservations.filter(state="firm").prefetch_related("blocks"))

    def whole(self):
        """The holder has again what he signed for, in one piece."""
        windows = list(self.contract.reservations.filter(state="firm").values_list("starts_at", "ends_at"))
        return windows == [(START, END)] and parts.size(self.strips(self.contract)) == self.held

    def sound(self, now=NOW):
        """Nothing is promised twice; what the holder, the offers and the buyers have is what the holder had; the sums agree."""
        pool = availability.load([self.listing], now).pool
        assert capacity.violations(pool) == ()
        firm = Reservation.objects.filter(state="firm").prefetch_related("blocks")
        rows = [s for row in firm for s in pieces.strips_of([row])]
        for n, a in enumerate(rows):
            for b in rows[n + 1 :]:
                apart = a.host != b.host or a.end <= b.start or b.end <= a.start
                assert apart or not a.gpus & b.gpus, (a, b)
        for resale in Resale.objects.all():
            live = Fill.objects.filter(resale=resale, undone_at=None)
            assert sum(live.values_list("gpu_count", flat=True)) == resale.sold_gpus <= resale.gpu_count
            aside = sum(
                len(s.gpus)
                for s in pieces.strips_of(Reservation.objects.filter(pk=resale.reservation_id, state="firm"))
            )
            assert aside == resale.left
        for fill in Fill.objects.filter(
            undone_at=None, contract__state__in=("active", "pending_payment"), contract__resales=None
        ):
            got = sum(len(b.gpu_indices) for b in fill.contract.reservation.blocks.all())
            assert got == fill.gpu_count == Contract.objects.get(pk=fill.contract_id).gpu_count
        if Contract.objects.get(pk=self.contract.pk).state == "active" and not self.contract.terminated_at:
            assert parts.size(rows) == self.held, "GPU-seconds are neither made nor lost"
