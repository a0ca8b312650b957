"""Prices by term, share due at signing and curtailment: rows and columns say the same, quotes take the cheapest, contracts keep it."""

from datetime import timedelta

import pytest
from django.utils import timezone
from hypothesis import given, settings
from hypothesis import strategies as st

from marketplace.models import Kind, Listing, Quote
from marketplace.services import catalogue, contracts, listings, price_tiers, search
from marketplace.services.forward import bids
from marketplace.services.price_tiers import Asked, Option
from tests import factories
from tests.factories import NOW
from tests.marketplace.reselling import START as FROM
from tests.marketplace.reselling import Desk
from tests.marketplace.trade import DAY, START, accept, ask, refused

HELD = ("reserved", "flexible")


def tier(kind="reserved", hours=1, upfront=0, price=1_500_000, *, curtailed=0):
    return {
        "kind": kind, "min_term_hours": hours, "upfront_permille": upfront, "flexible_hours_per_month": curtailed, "price": price,
    }  # fmt: skip


LADDER = [
    tier(hours=30 * 24, price=1_800_000),
    tier(hours=30 * 24, upfront=500, price=1_600_000),
    tier(hours=7 * 24, upfront=1000, price=1_700_000),
    tier("flexible", price=1_900_000, curtailed=10),
    tier("flexible", price=1_200_000, curtailed=120),
    tier("flexible", 30 * 24, price=1_400_000, curtailed=40),
]


def unsaved(*tiers, **fields):
    given = {"reserved_price": 2_000_000, "flexible_price": 1_600_000, "max_term_days": 365, **fields}
    return Listing(price_tiers=list(tiers), **given)


# --- which price
@pytest.mark.parametrize(
    ("kind", "asked", "found"),
    [
        ("reserved", Asked(), Option(2_000_000)),
        ("reserved", Asked(7 * 86_400), Option(2_000_000)),
        ("reserved", Asked(7 * 86_400, 1000), Option(1_700_000, 1000, 0, 168)),
        ("reserved", Asked(7 * 86_400 - 61, 1000), Option(2_000_000)),
        ("reserved", Asked(7 * 86_400 - 59, 1000), Option(1_700_000, 1000, 0, 168)),  # it began within this minute
        ("reserved", Asked(30 * 86_400), Option(1_800_000, 0, 0, 720)),
        ("reserved", Asked(30 * 86_400, 700), Option(1_600_000, 500, 0, 720)),
        ("flexible", Asked(), Option(1_600_000, 0, 40)),
        ("flexible", Asked(30 * 86_400), Option(1_400_000, 0, 40, 720)),
        ("flexible", Asked(86_400, flexible_hours_max=200), Option(1_200_000, 0, 120, 1)),
        ("flexible", Asked(86_400, flexible_hours_max=20), Option(1_900_000, 0, 10, 1)),
        ("flexible", Asked(86_400, flexible_hours_max=5), None),
        ("on_demand", Asked(86_400, 1000, 720), Option(2_500_000)),
        ("spot", Asked(), None),
    ],
)
def test_the_cheapest_that_meets_what_is_asked(kind, asked, found):
    assert price_tiers.chosen(unsaved(*LADDER, on_demand_price=2_500_000), kind, asked) == found


def test_a_plain_price_with_something_due_is_not_for_who_would_pay_nothing():
    assert price_tiers.chosen(unsaved(upfront_permille=200), "reserved", Asked(upfront_max_permille=100)) is None
    row = unsaved(tier(price=2_300_000), upfront_permille=200)
    assert price_tiers.chosen(row, "reserved", Asked(86_400, 100)) == Option(2_300_000, 0, 0, 1)
    assert price_tiers.chosen(row, "reserved", Asked(86_400)) == Option(2_000_000, 200)


@pytest.mark.parametrize(
    ("tiers", "fields", "pointer"),
    [
        ([tier("spot")], {}, "/price_tiers/0"),
        ([tier(price=0)], {}, "/price_tiers/0"),
        ([tier(hours=0)], {}, "/price_tiers/0"),
        ([tier(hours=31 * 24)], {"max_term_days": 30}, "/price_tiers/0"),
        ([tier(upfront=1001)], {}, "/price_tiers/0"),
        ([tier(curtailed=5)], {}, "/price_tiers/0"),
        ([tier()], {"reserved_price": None}, "/price_tiers/0"),
        ([tier(hours=24), tier(price=2_000_000)], {}, "/price_tiers/1"),  # no cheaper than the plain price
        ([tier(hours=24), tier(hours=48, upfront=100)], {}, "/price_tiers/1"),  # nor than the first
        ([tier(hours=24), tier(hours=24)], {}, "/price_tiers/0"),
        ([tier(hours=h + 1, price=1_500_000 - h) for h in range(25)], {}, "/price_tiers"),
    ],
)
def test_a_tier_that_nobody_could_take_is_named(tiers, fields, pointer):
    assert pointer in price_tiers.wrong(unsaved(*tiers, **fields))
    assert price_tiers.wrong(unsaved(*LADDER)) == {}


options = st.builds(
    Option, st.integers(1, 9), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)
)  # fmt: skip


@given(options, options, st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)))
@settings(max_examples=60)
def test_what_is_bettered_is_never_needed(one, other, asked):
    if one.betters(other) and other.meets(*asked):
        assert one.meets(*asked)
        assert one.price <= other.price


# --- search: on columns, as each listing says by itself
@pytest.fixture
def cold():
    catalogue.forget()
    yield
    catalogue.forget()


ASKS = [
    {},
    {"days": 7},
    {"days": 40},
    {"days": 40, "upfront_max_permille": 500},
    {"days": 7, "upfront_max_permille": 0},
    {"days": 3, "flexible_hours_max": 0},
    {"days": 31, "flexible_hours_max": 300, "upfront_max_permille": 1000},
    {"upfront_max_permille": 1000},
]


@pytest.mark.django_db
def test_a_search_shows_filters_and_sorts_by_the_price_for_what_is_asked(customer, cold):
    site = factories.site()
    for tiers, fields in (
        (LADDER, {}),
        ([tier(hours=24, price=1_950_000)], {"upfront_permille": 300}),
        ([], {"upfront_permille": 100, "flexible_hours_per_month": 0}),
        ([tier("flexible", 72, 250, 1_000_000, curtailed=200)], {"reserved_price": None}),
        (LADDER[:3], {"flexible_price": None, "reserved_price": 1_900_000}),
    ):
        factories.listing(site, hosts=[factories.host(site)], price_tiers=tiers, **fields)
    rows = list(Listing.objects.all())
    actor = factories.actor(customer)
    for each in ASKS:
        asks = {k: v for k, v in each.items() if k != "days"}
        if "days" in each:
            asks |= {"start": START, "end": START + each["days"] * DAY}
        for kind in HELD:
            asked = search.Filters(kind=kind, **asks).asked(NOW)
            want = {row.pk: found.price for row in rows if (found := price_tiers.chosen(row, kind, asked))}
            found = search.search(actor, search.Filters(kind=kind, **asks), now=NOW)
            shown = [(f.listing.pk, f.prices[kind].price) for f in found.rows]
            assert dict(shown) == want
            assert [price for _, price in shown] == sorted(want.values())
            most = min(want.values()) if want else 1
            cheap = search.search(actor, search.Filters(kind=kind, price_max=most, **asks), now=NOW)
            assert {f.listing.pk for f in cheap.rows} == {pk for pk, price in want.items() if price <= most}
    why = search.search(actor, search.Filters(kind="flexible", flexible_hours_max=0, country=("US",)), now=NOW)
    assert why.nothing is None
    Listing.objects.update(flexible_hours_per_month=40, price_tiers=[])  # the columns hear of it
    why = search.search(actor, search.Filters(kind="flexible", flexible_hours_max=0), now=NOW)
    assert why.nothing["removed_by"] == "flexible_hours_max"


# --- quoted, signed, kept
@pytest.fixture
def listing():
    site = factories.site()
    return factories.listing(site, hosts=[factories.host(site) for _ in range(2)], price_tiers=LADDER, runtime="kata")


@pytest.mark.django_db
def test_a_quote_takes_the_tier_and_the_contract_keeps_it(customer, listing):
    made = ask(customer, listing, end=START + 31 * DAY, upfront_max_permille=600)
    assert (made.price, made.terms["upfront_permille"], made.terms["price_term_hours"]) == (1_600_000, 500, 720)
    assert made.total_minor == 8 * 31 * 24 * 160
    assert made.overage_price == 2_500_000
    operator = factories.actor(listing.organization)
    listings.update(operator, listing, {"price_tiers": [], "reserved_price": 9_000_000}, now=NOW)
    contract = accept(customer, made)
    assert (contract.price, contract.upfront_minor) == (1_600_000, made.total_minor // 2)
    assert (contract.terms["upfront_permille"], contract.terms["price_term_hours"]) == (500, 720)
    assert contract.state == "pending_payment"


@pytest.mark.django_db
def test_more_hours_of_curtailment_cost_less_and_bind_the_contract(customer, listing):
    made = ask(customer, listing, "flexible", flexible_hours_max=150)
    contract = accept(customer, made)
    assert (contract.price, contract.flexible_hours_per_month) == (1_200_000, 120)
    assert contract.terms["flexible_hours_per_month"] == 120


@pytest.mark.django_db
def test_what_is_not_offered_for_so_little_is_refused_with_what_is(customer, listing):
    error = refused("term_not_offered", ask, customer, listing, "flexible", flexible_hours_max=5)
    assert error.fields == {"/flexible_hours_max": "at least 10 for such a term"}
    assert [o["price"] for o in error.extra["offered"]] == [1_200_000, 1_600_000, 1_900_000]
    Listing.objects.filter(pk=listing.pk).update(upfront_permille=250)
    assert ask(customer, listing).terms["upfront_permille"] == 250
    listings.update(factories.actor(listing.organization), listing, {"price_tiers": []}, now=NOW)
    error = refused("term_not_offered", ask, customer, listing, upfront_max_permille=100)
    assert error.fields == {"/upfront_max_permille": "at least 250 for such a term"}
    error = refused(
        "invalid_request", ask, customer, listing, "on_demand", start=None, end=None, upfront_max_permille=0
    )
    assert "/upfront_max_permille" in error.fields
    error = refused("invalid_request", ask, customer, listing, flexible_hours_max=0)
    assert "/flexible_hours_max" in error.fields


@pytest.mark.django_db
def test_alternatives_are_priced_for_their_own_term_and_ask_the_same(customer, listing):
    accept(customer, ask(customer, listing, gpus=16, start=START + 10 * DAY, end=START + 20 * DAY))
    error = refused("no_capacity", ask, customer, listing, end=START + 31 * DAY, gpus=16, upfront_max_permille=500)
    nearest = {each["what"]: each for each in error.extra["alternatives"]["nearest"]}
    assert (nearest["later"]["price"], nearest["shorter"]["price"]) == (1_600_000, 2_000_000)
    assert nearest["later"]["quote"]["body"]["upfront_max_permille"] == 500
    assert nearest["later"]["items"]["upfront_minor"] * 2 == nearest["later"]["items"]["total_minor"]


@pytest.mark.django_db
def test_gpus_that_join_later_cost_what_the_rest_of_the_window_costs_with_nothing_at_signing(customer, listing):
    contract = accept(customer, ask(customer, listing, end=START + 31 * DAY, upfront_max_permille=1000))
    contracts.confirm_payment(contract.pk, now=NOW)
    contract.refresh_from_db()
    more = contracts.amendments.resize(factories.actor(customer), contract, 9, now=NOW)
    assert (contract.price, more.price) == (1_600_000, 1_800_000)
    late = contracts.amendments.resize(factories.actor(customer), contract, 9, now=START + 10 * DAY)
    assert late.price == 2_000_000


@pytest.mark.django_db
def test_gpus_that_join_a_flexible_contract_bear_no_more_than_it_does(customer, listing):
    contract = accept(customer, ask(customer, listing, "flexible", flexible_hours_max=20))
    assert contract.price == 1_900_000
    assert contracts.amendments.resize(factories.actor(customer), contract, 9, now=NOW).price == 1_900_000


@pytest.mark.django_db
def test_a_standing_bid_meets_the_price_of_its_own_length():
    desk = Desk(hosts=2, gpus=8)
    Listing.objects.filter(pk=desk.listing.pk).update(
        reserved_price=2_000_000,
        price_tiers=[tier(hours=72, price=1_700_000), tier(hours=72, upfront=900, price=900_000)],
    )
    for hours, limit, found in ((72, 1_000_000, []), (48, 1_750_000, []), (72, 1_750_000, [1_700_000])):
        wanted = bids.Wanted(
            gpu_model=desk.listing.gpu_model.name, region=desk.site.region, gpu_count=4, earliest=FROM,
            duration_s=hours * 3600, limit_price=limit, expires_at=FROM,
        )  # fmt: skip
        bids.place(desk.buyer(), wanted, now=NOW)
        looked = bids.run(True, desk.listing.gpu_model_id, desk.site.region, now=NOW + timedelta(minutes=1))
        assert looked.refused == 0  # a price with more due at signing is for who says so
        assert list(Quote.objects.filter(bid__isnull=False).values_list("price", flat=True)) == found


@pytest.mark.django_db
def test_the_api_writes_shows_and_searches_them(listing):
    operator = factories.client(listing.organization)
    url = f"/api/v1/listings/{listing.public_id}"
    short = {"kind": "reserved", "min_term_hours": 168, "upfront_permille": 200, "price": 1_850_000}
    answer = operator.patch(url, {"price_tiers": [short]}, format="json")
    assert answer.status_code == 200, answer.content
    assert answer.json()["price_tiers"] == [{**short, "flexible_hours_per_month": 0}]
    assert answer.json()["version"] == 2
    bad = operator.patch(url, {"price_tiers": [{**short, "price": 3_000_000}]}, format="json")
    assert bad.json()["errors"][0]["pointer"] == "/price_tiers/0"
    bad = operator.patch(url, {"price_tiers": [{"kind": "reserved"}]}, format="json")
    assert (bad.status_code, bad.json()["errors"][0]["pointer"]) == (400, "/price_tiers/0/price")
    api = factories.client(factories.organization())
    start = timezone.now() + DAY
    window = {"start": start.isoformat(), "end": (start + 8 * DAY).isoformat(), "kind": "reserved"}
    plain, cheap = (
        api.get("/api/v1/listings", {**window, **more}).json()["data"][0]["prices"]["reserved"]["per_gpu_hour"]
        for more in ({}, {"upfront_max_permille": 200})
    )
    assert (plain, cheap) == (2_000_000, 1_850_000)
    assert Kind.RESERVED in answer.json()["prices"]
