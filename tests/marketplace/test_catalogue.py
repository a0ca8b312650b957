"""The catalogue's answers are those of the bare SQL, whatever has changed and in whatever order it became visible."""

import random
import threading
import time
from datetime import timedelta

import pytest
from django.db import connection, transaction

from marketplace.errors import MarketError
from marketplace.models import (
    Gpu,
    Host,
    HostVerification,
    Listing,
    OfferChange,
    Reliability,
    Reservation,
    ReservationBlock,
    Site,
)
from marketplace.services import catalogue, search
from marketplace.services.search import Filters
from marketplace.tenancy import SYSTEM
from tests import factories as f
from tests.factories import NOW
from tests.marketplace import bare_search
from tests.marketplace.changing import HOUR, Market, pages, same
from tests.threads import in_thread

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def cold():
    catalogue.forget()
    yield
    catalogue.forget()


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


_HOSTS = (
    "FROM marketplace_host h LEFT JOIN marketplace_hostverification v ON v.host_id = h.id"
    " WHERE h.listing_id = l.id AND h.state <> 'retired'"
)
_DOMAIN = "(SELECT coalesce(max(n), 0) FROM (SELECT count(*) AS n FROM unnest(h.nvlink_domains) AS d WHERE d >= 0 GROUP BY d) AS sizes)"
# Field -> what an offer states of it, in bare SQL; of hosts the least.
STATED = {
    "vram_mib": "m.vram_mib",
    "gpus_per_host": f"(SELECT min(h.gpu_count) {_HOSTS})",
    "nvlink_gpus": f"(SELECT min({_DOMAIN}) {_HOSTS})",
    "vcpu_milli_per_host": f"(SELECT min(h.vcpu_milli) {_HOSTS})",
    "ram_mib_per_host": f"(SELECT min(h.ram_mib) {_HOSTS})",
    "nvme_gib_per_host": f"(SELECT min(h.nvme_gib) {_HOSTS})",
    "fabric_gbps": "l.fabric_gbps",
    "carbon_g_per_kwh": "s.carbon_g_per_kwh",
    "renewable_permille": "s.renewable_permille",
    "reliability_permille": "(SELECT r.score_permille FROM marketplace_reliability r WHERE r.listing_id = l.id)",
    "verified": f"(SELECT bool_and(v.state IS NOT NULL AND v.state = 'verified')::int {_HOSTS})",
    "benchmark_score": f"(SELECT CASE WHEN bool_and(v.state IS NOT NULL AND v.state = 'verified') THEN min(v.score) END {_HOSTS})",
    "emergency_clause": "(l.emergency_notice_s IS NOT NULL)::int",
    **{name: f"l.{name}" for name in (
        "min_gpus", "min_term_hours", "max_term_days", "eviction_notice_s", "flexible_hours_per_month", "flexible_notice_s",
        "emergency_notice_s", "on_demand_price", "reserved_price", "flexible_price", "spot_floor",
    )},
}  # fmt: skip
STATED_TEXTS = {
    "gpu_model": "m.name", "region": "s.region", "country": "s.country", "interconnect": "l.interconnect", "runtime": "l.runtime",
    "currency": "l.currency",
}  # fmt: skip
SORTED_BY = {
    "vram": "vram_mib", "fabric": "fabric_gbps", "carbon": "carbon_g_per_kwh", "renewable": "renewable_permille",
    "reliability": "reliability_permille", "benchmark": "benchmark_score", "nvlink": "nvlink_gpus", "vcpu": "vcpu_milli_per_host",
    "ram": "ram_mib_per_host", "nvme": "nvme_gib_per_host", "notice": "eviction_notice_s", "term": "min_term_hours",
}  # fmt: skip


def stated(sql):
    """{listing: value} of all that are on offer, from the rows themselves."""
    with connection.cursor() as cursor:
        cursor.execute(
            f"SELECT l.id, {sql} FROM marketplace_listing l JOIN marketplace_site s ON s.id = l.site_id"
            " LEFT JOIN marketplace_gpumodel m ON m.id = l.gpu_model_id WHERE l.state = 'published' ORDER BY l.id"
        )
        return dict(cursor.fetchall())


@pytest.fixture
def varied():
    """A market in which every field has several values, and some state none."""
    dice = random.Random(5)
    market = Market(dice)
    for _ in range(16):
        market.offer()
    for host in Host.objects.order_by("pk"):
        host.nvlink_domains = [dice.choice([-1, 0, 1]) for _ in range(host.gpu_count)]
        for name, values in (("vcpu_milli", [1000, 2000]), ("ram_mib", [1000, 2000]), ("nvme_gib", [0, 100, 200])):
            setattr(host, name, dice.choice(values))
        host.save()
        if dice.random() < 0.85:
            state = dice.choice(["verified"] * 5 + ["stale"])
            HostVerification.objects.create(host=host, state=state, score=dice.choice([700, 900, 1000]), next_at=NOW)
    Host.objects.filter(pk=Host.objects.exclude(listing=None).first().pk).update(state="retired")
    for site, renewable in zip(market.sites, (None, 400, 900, 650), strict=True):
        Site.objects.filter(pk=site.pk).update(renewable_permille=renewable)
    for row in Listing.objects.order_by("pk"):
        Listing.objects.filter(pk=row.pk).update(
            min_term_hours=dice.choice([1, 24]), flexible_hours_per_month=dice.choice([10, 40]),
            flexible_notice_s=dice.choice([300, 900]), emergency_notice_s=dice.choice([None, 300, 600]),
            reserved_price=dice.choice([None, 900_000, 850_000]), flexible_price=dice.choice([None, 800_000, 700_000]),
            spot_floor=dice.choice([None, 300_000, 200_000]),
        )  # fmt: skip
        if dice.random() < 0.7:
            Reliability.objects.create(listing=row, score_permille=dice.choice([950, 990, 999]), as_of=NOW)
    return dice


def test_nothing_can_be_compared_or_sorted_by_that_is_not_compared_here():
    from marketplace.services.filters import COMPARABLE

    assert {"price", *STATED, *STATED_TEXTS} == set(COMPARABLE)
    orders = {sign + name for name in SORTED_BY for sign in ("", "-")}
    assert {"price", "-price", "newest", "oldest", *orders} == set(search.SORTS)


def test_every_comparison_of_every_field(varied):
    from marketplace.services.filters import OPERATORS

    def found(text):
        rows = search.search(SYSTEM, Filters(where=search.comparisons(text)), now=NOW, limit=100).rows
        return {row.listing.pk for row in rows}

    for name, sql in STATED.items():
        values = stated(sql)
        known = sorted({v for v in values.values() if v is not None})
        assert len(known) > 1, f"{name}: the market must differ in it"
        for at in {known[0], known[len(known) // 2], known[-1]}:
            for op, holds in OPERATORS.items():
                expected = {pk for pk, v in values.items() if v is not None and holds(v, at)}
                assert found(f"{name}{op}{at}") == expected, f"{name}{op}{at}"
    for name, sql in STATED_TEXTS.items():
        values = stated(sql)
        known = sorted({v for v in values.values() if v is not None})
        one = known[-1]
        assert found(f"{name}={one}") == {pk for pk, v in values.items() if v == one}, name
        assert found(f"{name}!={one}") == {pk for pk, v in values.items() if v is not None and v != one}, name
        assert found(f"{name}={'|'.join(known[:2])}") == {pk for pk, v in values.items() if v in known[:2]}, name


def test_every_order_is_that_of_the_bare_sql_page_by_page(varied):
    for name, field in SORTED_BY.items():
        values = stated(STATED[field])
        for sort, sign in ((name, 1), (f"-{name}", -1)):  # what is unknown comes last either way
            expected = sorted(values, key=lambda pk: (values[pk] is None, sign * (values[pk] or 0), sign * pk))
            seen, cursor = [], None
            while True:
                page = search.search(SYSTEM, Filters(), now=NOW, sort=sort, limit=4, cursor=cursor)
                seen += [row.listing.pk for row in page.rows]
                cursor = page.cursor
                if cursor is None:
                    break
            assert seen == expected, sort


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
