"""What a refused quote offers instead: each of it is admitted as it stands, the nearest first; which filter removed the last offers."""

import random
from datetime import timedelta

import pytest
from django.db import transaction

from marketplace import ids
from marketplace.errors import MarketError
from marketplace.models import Host, Kind, Listing, Quote
from marketplace.services import catalogue, contracts, filters, quotes, search
from marketplace.services.filters import Filters
from tests import factories
from tests.factories import NOW
from tests.marketplace.changing import Market, asked
from tests.marketplace.trade import DAY, END, HOUR, ask, refused

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def cold():
    catalogue.forget()
    yield
    catalogue.forget()


def offer(site, *, hosts=1, leaf="leaf-1", **fields):
    return factories.listing(site, hosts=[factories.host(site, leaf=leaf) for _ in range(hosts)], **fields)


def take(actor, offered, now=NOW):
    """Post what an alternative says, as a client would."""
    body = dict(offered["quote"]["body"])
    return quotes.quote(actor, ids.decode("lst", body.pop("listing")), quotes.Request(**body), now=now)


def test_nearest_first_itemised_with_the_body_that_asks_for_it(customer):
    site = factories.site(region="us-tx")
    listing = offer(site, hosts=2)
    offer(site, hosts=2, title="next door")
    offer(factories.site(region="no-north"), hosts=2, reserved_price=2_500_000, title="far away")
    contracts.accept(factories.actor(customer), ask(customer, listing, gpus=12).pk, now=NOW)
    error = refused("no_capacity", ask, customer, listing, gpus=16)
    nearest = error.extra["alternatives"]["nearest"]
    assert [each["distance"] for each in nearest] == sorted(each["distance"] for each in nearest)
    by = {(each["what"], each["title"]): each for each in nearest}
    assert nearest[0]["title"] == "next door"
    assert (nearest[0]["reliability_permille"], nearest[0]["items"]["tax"]["rule"]) == (None, "not_collected")
    assert (by["listing", "next door"]["distance"], by["listing", "far away"]["distance"]) == (50, 200 + 250)
    later = by["later", listing.title]
    assert later["quote"]["body"]["starts_at"] == END + timedelta(seconds=240)
    assert later["distance"] == 1000 * (7 * 86_400 + 240) // (7 * 86_400)
    fewer = by["fewer", listing.title]
    assert (fewer["quote"]["body"]["gpu_count"], fewer["distance"]) == (4, 750)
    items = fewer["items"]
    assert items["total_minor"] == items["operator_minor"] + items["platform_fee_minor"] == 4 * 168 * 200
    for each in nearest:
        assert take(factories.actor(factories.organization()), each, NOW).total_minor == each["items"]["total_minor"]
        Quote.objects.order_by("-pk")[0].reservation.delete()


def test_an_earlier_window_and_a_wider_cell_are_offered(customer):
    site = factories.site()
    listing = factories.listing(site, hosts=[factories.host(site, leaf=f"leaf-{i}") for i in range(2)])
    contracts.accept(
        factories.actor(customer), ask(customer, listing, gpus=16, start=NOW + 9 * DAY, end=NOW + 20 * DAY).pk, now=NOW
    )
    error = refused(
        "no_capacity", ask, customer, listing, gpus=8, level="leaf", start=NOW + 8 * DAY, end=NOW + 10 * DAY
    )
    earlier = next(each for each in error.extra["alternatives"]["nearest"] if each["what"] == "earlier")
    assert earlier["quote"]["body"]["ends_at"] == NOW + 9 * DAY - timedelta(
        seconds=240
    )  # the other's lead is kept clear
    error = refused("no_capacity", ask, customer, listing, gpus=16, level="leaf", start=NOW + DAY, end=NOW + 2 * DAY)
    assert error.extra["alternatives"]["nearest"][0]["what"] == "level"
    assert error.extra["alternatives"]["nearest"][0]["quote"]["body"]["level"] == "spine"


@pytest.mark.parametrize("kind", ["on_demand", "spot"])
def test_a_ceiling_beyond_what_is_listed_has_alternatives_too(customer, kind):
    listing, large = offer(factories.site()), offer(factories.site(), hosts=3)
    limit = {"limit_price": 2_000_000} if kind == "spot" else {}
    error = refused("no_capacity", ask, customer, listing, kind, 20, start=None, end=None, **limit)
    found = [(each["what"], each["quote"]["body"]["gpu_count"]) for each in error.extra["alternatives"]["nearest"]]
    assert sorted(found) == [("fewer", 8), ("listing", 20)]
    for each in error.extra["alternatives"]["nearest"]:
        take(factories.actor(customer), each)
    assert error.extra["alternatives"]["listings"][0]["listing"] == large.public_id


def test_what_the_asker_may_not_see_or_have_is_not_offered(customer):
    listing = offer(factories.site())
    friends = offer(factories.site(), hosts=3, visibility="partners")
    euros = offer(factories.site(), hosts=3, currency="EUR")
    short = offer(factories.site(), hosts=3, max_term_days=1)
    error = refused("no_capacity", ask, customer, listing, gpus=16)
    shown = str(error.extra)
    for hidden in (friends, euros, short):
        assert hidden.public_id not in shown
    friends.partners.add(customer)
    error = refused("no_capacity", ask, customer, listing, gpus=16)
    assert [each["title"] for each in error.extra["alternatives"]["nearest"] if each["what"] == "listing"] == [
        friends.title
    ]


def test_capacity_gone_offers_what_the_listing_is_now(customer):
    """The quote froze its terms; what is offered instead has the present price, and nothing of a paused listing."""
    listing = offer(factories.site())
    quote = ask(customer, listing)
    other = factories.organization()
    later = NOW + timedelta(seconds=120)
    contracts.accept(factories.actor(other), ask(other, listing, gpus=6, now=later).pk, now=later)
    Listing.objects.filter(pk=listing.pk).update(reserved_price=2_200_000)
    at = later + timedelta(seconds=1)
    error = refused("capacity_gone", contracts.accept, factories.actor(customer), quote.pk, now=at)
    fewer = next(each for each in error.extra["alternatives"]["nearest"] if each["what"] == "fewer")
    assert (fewer["price"], fewer["distance"]) == (2_200_000, 750 + 100)
    assert take(factories.actor(customer), fewer, at).gpu_count == 2
    Listing.objects.filter(pk=listing.pk).update(state="paused")
    error = refused("capacity_gone", contracts.accept, factories.actor(customer), quote.pk, now=at)
    assert error.extra["alternatives"]["nearest"] == []


@pytest.mark.parametrize("seed", [0, 1, 3, 4])  # each has refusals with something near
def test_every_alternative_is_admitted_at_that_moment(seed):
    """A market after seeded changes, random requests: whatever a refusal offers is a quote, one after the other."""
    dice = random.Random(seed)
    market = Market(dice)
    for _ in range(12):
        try:
            market.change(NOW)
        except Host.DoesNotExist:
            continue
    rich = factories.actor(factories.organization(gpu_limit=10_000))
    offered = tried = 0
    for row in search.on_offer(rich):
        for _ in range(10):
            kind = dice.choice([k for k in Kind.values if row.price_of(k) is not None] or ["reserved"])
            begins = dice.choice([None, NOW + dice.randrange(1, 72) * HOUR])
            ends = (begins or NOW) + dice.choice([1, 5, 30, 200]) * HOUR if kind in {"reserved", "flexible"} else None
            limit = 9_000_000 if kind == "spot" else None
            wanted = quotes.Request(
                kind,
                dice.choice([1, 2, 8, 12, 24]),
                dice.choice(["host", "leaf", "spine", "site"]),
                begins,
                ends,
                limit,
            )
            nearest = []
            try:
                with transaction.atomic():
                    quotes.quote(rich, row.pk, wanted, now=NOW)
                    transaction.set_rollback(True)
            except MarketError as error:
                nearest = error.extra.get("alternatives", {}).get("nearest", [])
                tried += error.code == "no_capacity"
            assert [n["distance"] for n in nearest] == sorted(n["distance"] for n in nearest)
            for each in nearest:
                with transaction.atomic():
                    made = take(rich, each)
                    assert quotes.itemise(made) == each["items"]
                    transaction.set_rollback(True)
                offered += 1
    assert tried
    assert offered


@pytest.mark.parametrize("seed", range(6))
def test_which_filter_removed_the_last_offers_and_what_helps_is_what_brute_force_finds(seed):
    """Any mixture of filters and comparisons: taken away one at a time, and in order, by whole searches."""
    dice = random.Random(seed)
    market = Market(dice)
    actor = max(market.actors, key=lambda each: int(catalogue.read().visible(each).sum()))
    seen: set[str] = set()

    def found(wanted):
        """Offers of a search without regard to room."""
        offers = catalogue.read()
        shown = offers.visible(actor)
        for _, mask in filters.conditions(offers, wanted, NOW):
            shown &= mask
        return int(shown.sum())

    for _ in range(60):
        wanted = asked(dice)
        if dice.random() < 0.4:
            text = dice.choice(
                [
                    "vram_mib>81920",
                    "gpu_model!=H100-SXM",
                    "min_gpus>3",
                    "price<500000",
                    "region=mars",
                    "fabric_gbps>=400",
                ]
            )
            wanted = Filters(
                **{**{n: getattr(wanted, n) for n in filters.FILTER_NAMES}, "where": filters.comparisons(text)}
            )
        result = search.search(actor, wanted, now=NOW)
        if result.nothing is None:
            continue
        given = {n: getattr(wanted, n) for n in filters.FILTER_NAMES}
        names = [name for name, _ in filters.conditions(catalogue.read(), wanted, NOW)]

        def only(keep, given=given):
            """The same question with the filters `keep` alone; a price's kind stays, for it says which price."""
            plain = {n: v for n, v in given.items() if n in {"level", "start"}}
            plain |= {n: given[n] for n in keep if n in given}
            if "price_max" in keep or any(each not in given for each in keep):
                plain["where"] = tuple(w for w in given["where"] if str(w) in keep)
            return Filters(**plain)

        why = result.nothing
        seen.add(str(why["removed_by"]))
        if why["removed_by"] == "availability":
            assert found(wanted) == why["left_before"] > 0
            assert why["largest"] < max(wanted.count or 1, 1) or wanted.start is not None or wanted.count is not None
            continue
        if why["removed_by"] is None:
            assert found(Filters()) == 0
            continue
        at = names.index(why["removed_by"])
        if wanted.kind is None or "kind" in names[: at + 1]:
            assert found(only(names[:at])) == why["left_before"] > 0
            assert found(only(names[: at + 1])) == 0
        for name in names:
            if name != "kind" and wanted.kind is None:
                assert found(only([n for n in names if n != name])) == why["without"].get(name, 0)
    assert len(seen) >= 2
