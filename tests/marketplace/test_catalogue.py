"""The catalogue's answers are those of the bare SQL, whatever has changed and in whatever order it became visible."""

import random
import threading
import time
from datetime import timedelta

import pytest
from django.db import connection, transaction

from marketplace.errors import MarketError
from marketplace.models import (
    Cell,
    Contract,
    Gpu,
    GpuModel,
    Host,
    Listing,
    OfferChange,
    Placement,
    Reservation,
    ReservationBlock,
    Site,
)
from marketplace.services import catalogue, search
from marketplace.services.search import Filters
from marketplace.tenancy import ANONYMOUS, SYSTEM
from tests import factories as f
from tests.factories import NOW
from tests.marketplace import bare_search
from tests.threads import in_thread

pytestmark = pytest.mark.django_db(transaction=True)
HOUR = timedelta(hours=1)
OLD_SORTS = ("price", "-price", "vram", "-vram", "fabric", "-fabric", "carbon", "-carbon", "newest", "term")


@pytest.fixture(autouse=True)
def cold():
    catalogue.forget()
    yield
    catalogue.forget()


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
        host = self.dice.choice(list(Host.objects.exclude(listing=None)))
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
        listing = dice.choice(list(Listing.objects.all()))
        one, host = Listing.objects.filter(pk=listing.pk), dice.choice(list(Host.objects.exclude(listing=None)))
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
                state=dice.choice(["active", "active", "lost", "draining", "retired"]),
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


@pytest.mark.parametrize("seed", range(3))
def test_a_kept_catalogue_answers_as_the_bare_sql(seed):
    dice = random.Random(seed)
    market = Market(dice)
    same(dice, market.actors, NOW)
    now = NOW
    for _ in range(30):
        for _ in range(dice.choice([1, 1, 3])):
            if Host.objects.exclude(listing=None).exists():
                try:
                    market.change(now)
                except Host.DoesNotExist:
                    continue
        now += dice.choice([0, 0, 600, 3600]) * timedelta(seconds=1)
        same(dice, market.actors, now)
    assert catalogue._kept is not None


def test_time_alone_moves_the_stock():
    """A hold lapses, a contract runs out while its work still drains, a reservation sets its GPUs free: nothing is written then."""
    dice = random.Random(4)
    site = f.site()
    hosts = [f.host(site) for _ in range(3)]
    listing = f.listing(site, hosts=hosts)
    held = Reservation.objects.create(
        listing=listing, starts_at=NOW, claims_at=NOW, ends_at=NOW + 9 * HOUR, state="held", held_until=NOW + HOUR
    )
    ReservationBlock.objects.create(reservation=held, host=hosts[0], gpu_indices=[0, 1, 2])
    late = f.job(f.contract(listing, ends_at=NOW + 2 * HOUR), gpus=2, state="running")
    f.placement(late, hosts[1], [0, 1], state="running")
    contract = f.contract(listing, kind="reserved", ends_at=NOW + 4 * HOUR)
    own = Reservation.objects.create(
        listing=listing, starts_at=NOW, claims_at=NOW, ends_at=NOW + 3 * HOUR, state="firm", contract=contract
    )
    ReservationBlock.objects.create(reservation=own, host=hosts[2], gpu_indices=[0, 1, 2, 3])
    f.placement(f.job(contract, gpus=4, state="running"), hosts[2], [0, 1, 2, 3], state="running")
    catalogue.read()
    seen = catalogue._kept.offers
    moments = [
        NOW + dice.choice([0, 1, 2, 3, 4, 5]) * HOUR + dice.choice([-1, 0, 1]) * timedelta(minutes=1) for _ in range(25)
    ]
    for now in [*sorted(moments), *moments]:
        wanted = Filters(start=now + dice.choice([0, 1, 6]) * HOUR)
        expected = pages(bare_search.search, SYSTEM, wanted, now, "price", 5)
        assert pages(search.search, SYSTEM, wanted, now, "price", 5) == expected, now
    assert catalogue._kept.offers is seen


def shown(actor=SYSTEM):
    return [(row.listing.pk, row.stock.gpus) for row in search.search(actor, Filters(), now=NOW).rows]


def test_what_commits_late_is_read_again():
    """A transaction that changed the market first and commits last, with other changes read in between."""
    site = f.site()
    one, other = (f.listing(site, hosts=[f.host(site)], on_demand_price=price) for price in (1, 2))
    host = one.hosts.get()
    assert shown() == [(one.pk, 8), (other.pk, 8)]
    written, commit = threading.Event(), threading.Event()

    def late():
        with transaction.atomic():
            Gpu.objects.filter(host=host, index__lt=3).update(healthy=False)
            Listing.objects.filter(pk=other.pk).update(state="paused")
            written.set()
            assert commit.wait(30)

    join = in_thread(late)
    assert written.wait(30)
    third = f.listing(site, on_demand_price=3)
    assert shown() == [(one.pk, 8), (other.pk, 8), (third.pk, 0)]
    commit.set()
    join()
    assert shown() == [(one.pk, 5), (third.pk, 0)]


def test_what_a_transaction_wrote_is_seen_by_it_and_not_kept():
    site = f.site()
    listing = f.listing(site, hosts=[f.host(site)])
    assert shown() == [(listing.pk, 8)]
    kept = catalogue._kept
    with transaction.atomic():
        Gpu.objects.filter(host__listing=listing, index=0).update(healthy=False)
        assert shown() == [(listing.pk, 7)]
        assert catalogue._kept is kept
        transaction.set_rollback(True)
    assert shown() == [(listing.pk, 8)]


def test_a_search_of_a_market_that_stands_still_is_four_statements(django_assert_num_queries):
    site = f.site()
    for _ in range(3):
        f.listing(site, hosts=[f.host(site)])
    actor = f.actor(f.organization())
    search.search(actor, Filters(), now=NOW)
    seen = catalogue._kept.offers
    with django_assert_num_queries(
        2
    ):  # the row of the page and the beats; the columns are asked for past Django's cursor
        assert len(search.search(actor, Filters(count=1), now=NOW, with_facets=True).rows) == 3
    assert catalogue._kept.offers is seen


def test_a_reading_older_than_what_was_pruned_starts_anew():
    site = f.site()
    listing = f.listing(site, hosts=[f.host(site)])
    assert shown() == [(listing.pk, 8)]
    early = catalogue._kept
    assert catalogue.prune(NOW) == 0  # sets out the floor
    Listing.objects.filter(pk=listing.pk).update(state="paused")
    assert catalogue.prune(NOW + HOUR) == 0 or OfferChange.objects.exists()
    assert shown() == []  # nothing that it needs is gone yet
    catalogue.prune(NOW + 2 * HOUR)
    # The floor passes the change once no transaction is open that is older: on a shared server others' tests are.
    later = NOW + 3 * HOUR
    deadline = time.monotonic() + 60
    while OfferChange.objects.exists() and time.monotonic() < deadline:
        f.organization()
        catalogue.prune(later)
        later += HOUR
        time.sleep(0.05)
    assert not OfferChange.objects.exists()
    catalogue._kept = early
    assert shown() == []
    assert catalogue.prune(later - HOUR) == 0  # not before its time


def test_a_later_reading_is_not_replaced_by_an_earlier_one():
    listing = f.listing(f.site())
    shown()
    early = catalogue._kept
    Listing.objects.filter(pk=listing.pk).update(state="paused")
    shown()
    late = catalogue._kept
    catalogue._keep(early)
    assert catalogue._kept is late


def test_what_was_withdrawn_since_the_columns_were_read_is_not_shown():
    """The columns say who matches; the database says who is shown. The offer goes between the two."""
    listing = f.listing(f.site())
    asked = []

    def withdraw(execute, sql, params, many, context):
        if not asked and 'FROM "marketplace_listing"' in sql:
            asked.append(sql)
            in_thread(lambda: Listing.objects.filter(pk=listing.pk).update(state="paused"))()
        return execute(sql, params, many, context)

    assert shown() == [(listing.pk, 0)]
    with connection.execute_wrapper(withdraw):
        assert shown() == []
    assert asked


COMPARED = {
    "vram_mib": lambda row, hosts: row.gpu_model and row.gpu_model.vram_mib,
    "gpus_per_host": lambda _, hosts: min((h.gpu_count for h in hosts), default=None),
    "nvlink_gpus": lambda _, hosts: min(
        (max(map([d for d in h.nvlink_domains if d >= 0].count, h.nvlink_domains), default=0) for h in hosts), default=None
    ),
    "ram_mib_per_host": lambda _, hosts: min((h.ram_mib for h in hosts), default=None),
    "carbon_g_per_kwh": lambda row, _: row.site.carbon_g_per_kwh,
    "renewable_permille": lambda row, _: row.site.renewable_permille,
    "max_term_days": lambda row, _: row.max_term_days,
    "spot_floor": lambda row, _: row.spot_floor,
}  # fmt: skip


def test_every_comparison_of_every_field():
    dice = random.Random(5)
    market = Market(dice)
    for host in Host.objects.all():
        host.nvlink_domains = [dice.choice([-1, 0, 1]) for _ in range(host.gpu_count)]
        host.ram_mib = dice.choice([1000, 2000])
        host.save()
    for site in market.sites[1:]:
        Site.objects.filter(pk=site.pk).update(renewable_permille=dice.choice([400, 900]))
    rows = list(search.on_offer(SYSTEM).select_related("site", "gpu_model"))
    for name, value_of in COMPARED.items():
        values = {row.pk: value_of(row, list(row.hosts.exclude(state="retired"))) for row in rows}
        at = dice.choice([v for v in values.values() if v is not None])
        for op, holds in search_operators().items():
            found = search.search(SYSTEM, Filters(where=search.comparisons(f"{name}{op}{at}")), now=NOW, limit=100)
            assert {r.listing.pk for r in found.rows} == {
                pk for pk, v in values.items() if v is not None and holds(v, at)
            }, f"{name}{op}{at}"


def search_operators():
    from marketplace.services.filters import OPERATORS

    return OPERATORS


def test_comparisons_of_text_prices_and_several_at_once():
    norway = f.site(region="no-north", country="NO")
    a = f.listing(norway, on_demand_price=500, spot_floor=None, reserved_price=None, flexible_price=None)
    b = f.listing(norway, on_demand_price=900, spot_floor=100, gpu_model=None)

    def found(text, **fields):
        rows = search.search(SYSTEM, Filters(where=search.comparisons(text), **fields), now=NOW, sort="oldest").rows
        return [row.listing for row in rows]

    assert found("region=no-north|us-tx") == [a, b]
    assert found("gpu_model!=L40S") == [a]  # b states no model
    assert found("price<300") == [b]
    assert found("price<=900, price>=500", kind="on_demand") == [a, b]
    assert found("price<=900,price>500", kind="on_demand") == [b]
    nothing = search.search(SYSTEM, Filters(where=search.comparisons("price<=1000,fabric_gbps>0")), now=NOW).nothing
    assert nothing == {"removed_by": "fabric_gbps>0", "left_before": 2, "without": {"fabric_gbps>0": 2}}
    for bad in (
        "colour=red",
        "region>us",
        "vram_mib=much",
        "vram_mib>",
        "price",
        "vram_mib>=-1",
        ",".join(["price>1"] * 31),
    ):
        with pytest.raises(MarketError) as refused:
            search.comparisons(bad)
        assert "/where" in refused.value.fields


@pytest.mark.parametrize("sort", ["renewable", "-nvlink", "ram", "-vcpu", "nvme", "oldest", "-term", "notice"])
def test_every_order_pages_through_all_offers_once(sort):
    dice = random.Random(2)
    Market(dice)
    whole = [r.listing.pk for r in search.search(SYSTEM, Filters(), now=NOW, sort=sort, limit=100).rows]
    seen, cursor = [], None
    while True:
        page = search.search(SYSTEM, Filters(), now=NOW, sort=sort, limit=2, cursor=cursor)
        seen += [r.listing.pk for r in page.rows]
        cursor = page.cursor
        if cursor is None:
            break
    assert seen == whole
    assert sorted(seen) == sorted(search.on_offer(SYSTEM).values_list("pk", flat=True))
