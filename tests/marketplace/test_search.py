"""Search: every filter, every order, exact stock, and which filter removed the last offers."""

import base64
from datetime import timedelta

import pytest

from marketplace.errors import MarketError
from marketplace.models import Reservation, ReservationBlock
from marketplace.services import search
from marketplace.services.search import Filters
from marketplace.tenancy import ANONYMOUS, SYSTEM
from tests import factories
from tests.factories import NOW

pytestmark = pytest.mark.django_db
DAY = timedelta(days=1)


@pytest.fixture
def customer():
    return factories.actor(factories.organization())


def offer(title, *, hosts=1, gpus=8, leaf="leaf-1", model=None, site=None, **fields):
    """A listing at a site of its own; `site`: columns of the site."""
    at = factories.site(**(site or {}))
    gpu_model = model or factories.gpu_model()
    rows = [factories.host(at, gpus=gpus, leaf=leaf, gpu_model=gpu_model) for _ in range(hosts)]
    return factories.listing(at, hosts=rows, title=title, gpu_model=gpu_model, **fields)


def titles(actor, *args, **kwargs):
    return [found.listing.title for found in search.search(actor, *args, now=NOW, **kwargs).rows]


@pytest.fixture
def market():
    a100 = factories.gpu_model("A100-80", 81_920, 400)
    l40 = factories.gpu_model("L40S", 49_152, 350)
    return [
        offer("texas", interconnect="infiniband", fabric_gbps=400, site={"carbon_g_per_kwh": 380}),
        offer(
            "norway", hosts=2, model=a100, on_demand_price=1_500_000, reserved_price=1_900_000, flexible_price=None, runtime="podman",
            site={"region": "no-north", "country": "NO", "carbon_g_per_kwh": 20},
        ),
        offer("small", model=l40, gpus=4, on_demand_price=800_000, reserved_price=None, flexible_price=None, spot_floor=None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, ["small", "norway", "texas"]),
        ({"gpu_model": ("H100-SXM", "L40S")}, ["small", "texas"]),
        ({"vram_min_mib": 60_000}, ["norway", "texas"]),
        ({"region": ("no-north",)}, ["norway"]),
        ({"country": ("US",)}, ["small", "texas"]),
        ({"interconnect": ("infiniband",)}, ["texas"]),
        ({"fabric_gbps_min": 400}, ["texas"]),
        ({"carbon_max_g": 100}, ["norway"]),
        ({"runtime": ("podman",)}, ["norway"]),
        ({"kind": "flexible"}, ["texas"]),
        ({"kind": "reserved", "price_max": 1_900_000}, ["norway"]),
        ({"price_max": 900_000}, ["small", "norway", "texas"]),  # of any kind: spot is 900,000
        ({"kind": "on_demand", "price_max": 900_000}, ["small"]),
        ({"count": 5}, ["norway", "texas"]),
        ({"count": 16}, ["norway"]),
        ({"count": 16, "level": "host"}, []),
    ],
)
def test_filters(market, customer, filters, expected):
    assert titles(customer, Filters(**filters)) == expected


@pytest.mark.parametrize(
    ("sort", "expected"),
    [
        ("price", ["small", "norway", "texas"]),
        ("-price", ["texas", "norway", "small"]),
        ("vram", ["small", "texas", "norway"]),
        ("-fabric", ["texas", "small", "norway"]),
        ("carbon", ["norway", "texas", "small"]),
        ("-carbon", ["texas", "norway", "small"]),  # what is unknown comes last either way
        ("newest", ["small", "norway", "texas"]),
    ],
)
def test_orders(market, customer, sort, expected):
    assert titles(customer, Filters(), sort=sort) == expected


def test_pages_by_cursor_show_each_offer_once(customer):
    for i in range(7):
        offer(f"l{i}", on_demand_price=2_000_000 + i // 3)
    seen, cursor = [], None
    for _ in range(4):
        page = search.search(customer, Filters(), now=NOW, limit=2, cursor=cursor)
        seen += [found.listing.title for found in page.rows]
        cursor = page.cursor
        if not page.has_more:
            break
    assert sorted(seen) == [f"l{i}" for i in range(7)]
    assert seen == titles(customer, Filters())
    assert cursor is None


def test_a_cursor_of_another_sort_is_refused(market, customer):
    page = search.search(customer, Filters(), now=NOW, limit=1)
    odd = ('["vram", Infinity, 1]', "[" * 3000, '["vram", 1]', '["vram", 1, {}]')
    for bad in (page.cursor, "nonsense", *(base64.urlsafe_b64encode(text.encode()).decode() for text in odd)):
        with pytest.raises(MarketError) as refused:
            search.search(customer, Filters(), now=NOW, sort="vram", cursor=bad)
        assert "/cursor" in refused.value.fields


@pytest.mark.parametrize(
    ("filters", "pointer"),
    [
        ({"level": "planet"}, "/level"),
        ({"kind": "free"}, "/kind"),
        ({"count": 0}, "/count"),
        ({"end": NOW}, "/start"),
        ({"start": NOW, "end": NOW}, "/end"),
    ],
)
def test_questions_without_meaning_are_refused(filters, pointer):
    with pytest.raises(MarketError) as refused:
        Filters(**filters)
    assert pointer in refused.value.fields


def hold(listing, gpus, start, end, **fields):
    reservation = Reservation.objects.create(
        listing=listing, starts_at=start, ends_at=end, claims_at=start, state="firm", **fields
    )
    ReservationBlock.objects.create(reservation=reservation, host=listing.hosts.first(), gpu_indices=list(range(gpus)))


def test_stock_is_exact_for_the_window_asked(customer):
    listing = offer("only", hosts=2)
    hold(listing, 6, NOW + DAY, NOW + 2 * DAY)

    def free(**filters):
        rows = search.search(customer, Filters(kind="reserved", **filters), now=NOW).rows
        return [(found.stock.gpus, found.stock.total, found.stock.as_of) for found in rows]

    assert free() == [(16, 16, NOW)]
    assert free(start=NOW + DAY, end=NOW + 2 * DAY) == [(10, 16, NOW)]
    assert free(start=NOW + 3 * DAY, end=NOW + 4 * DAY) == [(16, 16, NOW)]
    assert free(start=NOW + DAY, end=NOW + 2 * DAY, count=10) == [(10, 16, NOW)]
    assert free(start=NOW + DAY, end=NOW + 2 * DAY, count=11) == []
    assert free(start=NOW + DAY, end=NOW + 2 * DAY, count=10, level="host") == []
    assert free(start=NOW + DAY, end=NOW + 2 * DAY, count=8, level="host") == [(8, 16, NOW)]


def test_a_page_is_full_although_most_offers_are_sold_out(customer):
    """The offers with room stand behind many that are sold out."""
    site, many = factories.site(), 35
    for i in range(many + 3):
        listing = factories.listing(
            site, hosts=[factories.host(site, gpus=1)], title=f"l{i:03d}", on_demand_price=1000 + i
        )
        if i < many:
            hold(listing, 1, NOW, NOW + DAY)
    assert titles(customer, Filters(count=1), limit=2) == [
        f"l{many:03d}",
        f"l{many + 1:03d}",
    ]
    assert search.search(customer, Filters(count=1), now=NOW, limit=2).has_more


def test_queries_do_not_grow_with_the_catalogue(customer, django_assert_max_num_queries):
    site = factories.site()
    for i in range(30):
        factories.listing(site, hosts=[factories.host(site, gpus=1)], title=f"l{i}")
    with django_assert_max_num_queries(
        10
    ):  # read anew, within a transaction that has written: test_catalogue has the others
        found = search.search(customer, Filters(count=1), now=NOW, limit=25, with_facets=True)
        [
            str(row.listing.site.name) + str(row.listing.gpu_model.name) + row.listing.organization.name
            for row in found.rows
        ]
    assert len(found.rows) == 25


def test_facets_count_each_value_as_if_its_own_filter_were_off(market, customer):
    found = search.search(customer, Filters(region=("no-north",)), now=NOW, with_facets=True).facets
    assert found["region"] == {"us-tx": 2, "no-north": 1}
    assert found["gpu_model"] == {"A100-80": 1}
    assert found["kind"] == {"on_demand": 1, "reserved": 1, "spot": 1}
    found = search.search(customer, Filters(kind="reserved", price_max=1_900_000), now=NOW, with_facets=True).facets
    assert found["kind"] == {"on_demand": 2, "spot": 2, "flexible": 1, "reserved": 1}
    assert found["country"] == {"NO": 1}


@pytest.mark.parametrize(
    ("filters", "removed_by", "left", "without"),
    [
        ({"gpu_model": ("B200",)}, "gpu_model", 3, {"gpu_model": 3}),
        ({"region": ("us-tx",), "carbon_max_g": 100}, "carbon_max_g", 2, {"region": 1, "carbon_max_g": 2}),
        ({"vram_min_mib": 60_000, "kind": "reserved", "price_max": 1}, "price_max", 2, {"price_max": 2}),
    ],
)
def test_no_match_names_the_filter_that_removed_the_last_offers(market, customer, filters, removed_by, left, without):
    found = search.search(customer, Filters(**filters), now=NOW)
    assert found.rows == []
    assert found.nothing == {"removed_by": removed_by, "left_before": left, "without": without}


def test_no_match_for_want_of_room_says_how_much_there_is(market, customer):
    found = search.search(customer, Filters(count=64), now=NOW)
    assert found.nothing == {"removed_by": "availability", "left_before": 3, "without": {}, "largest": 16}
    assert search.search(factories.actor(factories.organization(livemode=False)), Filters(), now=NOW).nothing == {
        "removed_by": None, "left_before": 0, "without": {}
    }  # fmt: skip


def test_terms_bind_reserved_windows(customer):
    offer("weekly", min_term_hours=168, max_term_days=30)
    window = {"start": NOW + DAY, "kind": "reserved"}
    assert titles(customer, Filters(**window, end=NOW + 2 * DAY)) == []
    assert titles(customer, Filters(**window, end=NOW + 9 * DAY)) == ["weekly"]
    assert titles(customer, Filters(**window, end=NOW + 40 * DAY)) == []
    assert titles(customer, Filters(start=NOW + DAY, end=NOW + 2 * DAY, kind="on_demand")) == ["weekly"]


def test_who_wants_no_grid_call_at_all_says_so(customer):
    offer("stays")
    yields = offer("yields", emergency_notice_s=300)
    assert titles(customer, Filters(where=search.comparisons("emergency_clause=0"))) == ["stays"]
    assert titles(customer, Filters(where=search.comparisons("emergency_notice_s>=300"))) == ["yields"]
    type(yields).objects.filter(pk=yields.pk).update(emergency_notice_s=None)
    assert sorted(titles(customer, Filters(where=search.comparisons("emergency_clause=0")))) == ["stays", "yields"]


def test_who_sees_what(customer):
    """Published and public, or named; of one's own mode; drafts are nobody's offer."""
    offer("public")
    offer("draft", state="draft")
    offer("paused", state="paused")
    named = offer("partners", visibility="partners")
    friend = factories.organization()
    named.partners.add(friend, factories.organization())
    test_site = factories.site(factories.organization(is_operator=True, livemode=False))
    factories.listing(test_site, hosts=[factories.host(test_site)], title="sandbox")
    assert titles(customer, Filters()) == ["public"]
    assert titles(ANONYMOUS, Filters()) == ["public"]
    assert titles(factories.actor(friend), Filters()) == ["public", "partners"]
    assert titles(factories.actor(named.organization), Filters()) == ["public", "partners"]
    assert titles(factories.actor(factories.organization(livemode=False)), Filters()) == ["sandbox"]
    assert sorted(titles(SYSTEM, Filters())) == ["partners", "public", "sandbox"]
