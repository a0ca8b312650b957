"""A market that changes by seeded dice, and questions to it: the kept columns beside the bare SQL."""

from datetime import timedelta

from django.db import transaction

from marketplace.models import (
    Cell,
    Contract,
    Gpu,
    GpuModel,
    Host,
    Listing,
    Placement,
    Reservation,
    ReservationBlock,
    Site,
)
from marketplace.services import search
from marketplace.services.search import Filters
from marketplace.tenancy import ANONYMOUS, SYSTEM
from tests import factories as f
from tests.factories import NOW
from tests.marketplace import bare_search

HOUR = timedelta(hours=1)
OLD_SORTS = ("price", "-price", "vram", "-vram", "fabric", "-fabric", "carbon", "-carbon", "newest", "term")


def asked(dice):
    """A buyer's question, any mixture of filters."""
    wanted = {}
    for name, values in (
        ("gpu_model", [("H100-SXM",), ("A100-80", "B200"), ("none such",)]),
        ("vram_min_mib", [0, 81_920]),
        ("region", [("us-tx",), ("no-north", "us-tx")]),
        ("country", [("NO",)]),
        ("interconnect", [("roce",), ("",)]),
        ("fabric_gbps_min", [0, 400]),
        ("carbon_max_g", [100]),
        ("runtime", [("podman",)]),
        ("kind", ["on_demand", "reserved", "flexible", "spot"]),
        ("price_max", [1_000_000, 2_000_000]),
        ("count", [1, 3, 8, 12]),
        ("level", ["host", "leaf", "spine", "site"]),
    ):
        if dice.random() < (0.5 if name in {"count", "level", "kind"} else 0.12):
            wanted[name] = dice.choice(values)
    if dice.random() < 0.5:
        wanted["start"] = NOW + dice.choice([-1, 0, 1, 3, 30]) * HOUR
        if dice.random() < 0.7:
            wanted["end"] = wanted["start"] + dice.choice([1, 2, 24, 400]) * HOUR
    return Filters(**wanted)


def pages(how, actor, wanted, now, sort, limit):
    """Every page: (id, GPUs free, of, heard at), facets and why there is nothing, and the cursors between."""
    shown, cursor = [], None
    while True:
        page = how(actor, wanted, now=now, sort=sort, limit=limit, cursor=cursor, with_facets=True)
        stock = [(r.listing.pk, r.stock.gpus, r.stock.total, r.stock.as_of, r.stock.heard_at) for r in page.rows]
        facets = {name: list(values.items()) for name, values in page.facets.items()}
        shown.append((stock, facets, page.nothing, page.has_more, page.cursor))
        cursor = page.cursor
        if cursor is None:
            return shown


def same(dice, actors, now):
    for _ in range(3):
        actor, wanted, sort, limit = dice.choice(actors), asked(dice), dice.choice(OLD_SORTS), dice.choice([1, 2, 20])
        expected = pages(bare_search.search, actor, wanted, now, sort, limit)
        assert pages(search.search, actor, wanted, now, sort, limit) == expected, (actor, wanted, sort)


class Market:
    """A few sites with listings of every sort, and a buyer for each rule of sight."""

    def __init__(self, dice):
        self.dice = dice
        self.models = [f.gpu_model(), f.gpu_model("A100-80", 81_920, 400), f.gpu_model("L40S", 49_152, 350)]
        self.sites = [
            f.site(f.organization(is_operator=True, livemode=live), region=region, country=country, carbon_g_per_kwh=carbon)
            for live, region, country, carbon in (
                (True, "us-tx", "US", 380), (True, "no-north", "NO", 20), (True, "us-tx", "US", None), (False, "us-tx", "US", 1),
            )
        ]  # fmt: skip
        self.friend = f.organization()
        for _ in range(8):
            self.offer()
        own = f.actor(self.sites[0].organization)
        self.actors = [
            ANONYMOUS, SYSTEM, own, f.actor(self.friend), f.actor(f.organization()), f.actor(f.organization(livemode=False)),
        ]  # fmt: skip

    def offer(self):
        dice, site = self.dice, self.dice.choice(self.sites)
        model = dice.choice(self.models)
        hosts = [
            f.host(
                site, gpus=dice.choice([1, 4, 8]), leaf=dice.choice(["", "a", "b"]), spine=dice.choice(["", "s", "t"]),
                gpu_model=model, beat_at=dice.choice([None, NOW, NOW - HOUR]),
            )
            for _ in range(dice.randrange(3))
        ]  # fmt: skip
        listing = f.listing(
            site, hosts=hosts, gpu_model=dice.choice([model, model, None]), state=dice.choice(["published"] * 3 + ["draft"]),
            on_demand_price=dice.choice([None, 800_000, 1_900_000]), reserved_price=dice.choice([None, 900_000]),
            spot_floor=dice.choice([None, 300_000]), min_gpus=dice.choice([1, 1, 2, 8]), runtime=dice.choice(["podman", "process"]),
            fabric_gbps=dice.choice([0, 400]), interconnect=dice.choice(["", "roce"]), max_term_days=dice.choice([1, 365]),
            eviction_notice_s=dice.choice([0, 120, 7200]), visibility=dice.choice(["public", "public", "partners"]),
        )  # fmt: skip
        if dice.random() < 0.5:
            listing.partners.add(self.friend)

    def hold(self, **fields):
        host = self.dice.choice(list(Host.objects.exclude(listing=None).order_by("pk")))
        start = NOW + self.dice.randrange(-3, 6) * HOUR
        made = Reservation.objects.create(
            listing_id=host.listing_id, starts_at=start, claims_at=start - self.dice.choice([0, 1]) * HOUR,
            ends_at=start + self.dice.choice([1, 4, 100]) * HOUR, **{"state": "firm", **fields},
        )  # fmt: skip
        count = self.dice.randrange(1, host.gpu_count + 1)
        ReservationBlock.objects.create(reservation=made, host=host, gpu_indices=list(range(count)))
        return made, host

    def change(self, now):
        """One thing that may happen to the market."""
        dice = self.dice
        listing = dice.choice(list(Listing.objects.order_by("pk")))
        one, host = (
            Listing.objects.filter(pk=listing.pk),
            dice.choice(list(Host.objects.exclude(listing=None).order_by("pk"))),
        )
        kind = dice.choice([
            "offer", "price", "state", "partners", "hours", "gone", "hold", "quoted", "release", "shorten", "renumber", "run", "own",
            "end", "contract", "gpu", "host", "move", "retire", "delete", "site", "mode", "model", "cell", "beat", "undone",
        ])  # fmt: skip
        if kind == "offer":
            self.offer()
        elif kind == "price":
            one.update(on_demand_price=dice.choice([None, 700_000, 3_000_000]), min_gpus=dice.choice([1, 4]))
        elif kind == "state":
            one.update(state=dice.choice(["published", "paused"]))
        elif kind == "partners":
            dice.choice([listing.partners.add, listing.partners.remove])(self.friend)
            one.update(visibility=dice.choice(["public", "partners"]))
        elif kind == "hours":
            one.update(
                available_from=dice.choice([None, now + 2 * HOUR]), available_until=dice.choice([None, now + 90 * HOUR])
            )
        elif kind == "gone":
            bare = f.listing(listing.site)
            assert search.search(SYSTEM, Filters(), now=now, sort="newest").rows[0].listing == bare
            bare.delete()
        elif kind == "hold":
            self.hold()
        elif kind == "quoted":
            self.hold(state="held", held_until=now + dice.choice([-1, 1, 2]) * HOUR)
        elif kind in {"release", "shorten"}:
            held = Reservation.objects.filter(pk__in=list(Reservation.objects.values_list("pk", flat=True))[:2])
            held.update(**({"state": "released"} if kind == "release" else {"ends_at": NOW + 50 * HOUR}))
        elif kind == "renumber":
            ReservationBlock.objects.filter(host=host).update(gpu_indices=[0])
        elif kind in {"run", "own"}:
            ends_at = dice.choice([None, now + 3 * HOUR])
            contract = f.contract(
                host.listing, kind=dice.choice(["on_demand", "spot"]) if kind == "run" else "reserved", ends_at=ends_at
            )
            if kind == "own":
                _, host = self.hold(contract=contract)
            job = f.job(contract, gpus=1, gpu_milli=100, state="running")
            try:
                f.placement(job, host, [dice.randrange(host.gpu_count)], state="running")
            except Exception:  # full: the database refuses it
                return
        elif kind == "end":
            placed = Placement.objects.exclude(state__in=Placement.FINAL).first()
            if placed is not None:
                with transaction.atomic():  # as services.placements: the share goes back with the state
                    Placement.objects.filter(pk=placed.pk).update(state="released")
                    at = Host.objects.get(pk=placed.host_id)
                    at.gpu_free[placed.gpu_indices[0]] += placed.gpu_milli
                    at.save()
        elif kind == "contract":
            Contract.objects.update(ends_at=dice.choice([None, now + HOUR, now + 200 * HOUR]))
        elif kind == "gpu":
            Gpu.objects.filter(host=host, index=0).update(healthy=dice.choice([True, False]))
        elif kind == "host":
            Host.objects.filter(pk=host.pk).update(
                state=dice.choice(["active", "active", "lost", "draining", "maintenance", "retired"]),
                back_at=dice.choice([None, None, now + 3 * HOUR]),
                leaf=dice.choice(["", "a"]),
                leaves_at=dice.choice([None, now - HOUR, now + 2 * HOUR]),
            )
        elif kind == "move":
            host.listing = listing
            host.save()
        elif kind == "retire":
            Host.objects.filter(pk=host.pk).update(listing=None)
            f.listing(host.site, hosts=[host])
        elif kind == "delete":
            Host.objects.filter(placements=None, reservation_blocks=None).exclude(pk=host.pk)[:1].get().delete()
        elif kind == "site":
            Site.objects.filter(pk=listing.site_id).update(
                region=dice.choice(["us-tx", "no-north"]), carbon_g_per_kwh=50
            )
        elif kind == "mode":
            Site.objects.filter(pk=listing.site_id).update(mode=dice.choice(["auto", "off"]))
        elif kind == "model":
            GpuModel.objects.filter(name="L40S").update(vram_mib=dice.choice([49_152, 98_304]))
        elif kind == "cell":
            Cell.objects.filter(pk=listing.site.cell_id).update(livemode=dice.choice([True, True, False]))
        elif kind == "beat":
            Host.objects.filter(pk=host.pk).update(beat_at=NOW - 2 * HOUR)
        else:
            with transaction.atomic():
                one.update(state="paused")
                Host.objects.filter(pk=host.pk).update(state="lost")
                same(dice, self.actors, now)
                transaction.set_rollback(True)
