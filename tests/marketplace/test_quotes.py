"""Quotes: a firm price, capacity held, and when there is none: the reason and what would fit."""

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marketplace.models import Contract, Quote, Reservation
from marketplace.services import availability, calendars, contracts, documents, holds, listings, quotes
from marketplace.services.holds import Taken
from tests import factories
from tests.factories import NOW
from tests.marketplace.trade import DAY, END, START, ask, refused


@pytest.fixture
def site():
    return factories.site()


def offer(site, *, hosts=1, leaf="leaf-1", **fields):
    return factories.listing(site, hosts=[factories.host(site, leaf=leaf) for _ in range(hosts)], **fields)


@pytest.mark.django_db
def test_a_reserved_quote_is_firm_held_and_itemised(site, customer):
    listing = offer(site)
    wanted = quotes.Request("reserved", 6, starts_at=START, ends_at=END)
    quote = quotes.quote(
        factories.actor(customer), listing.pk, wanted, reference="po-7", metadata={"team": "vision"}, now=NOW
    )
    # 6 GPUs x 168 h x $2.00
    assert (quote.price, quote.total_minor, quote.currency) == (2_000_000, 201_600, "USD")
    assert quote.overage_price == 2_500_000
    assert quote.firm_until == NOW + timedelta(seconds=900)
    held = quote.reservation
    assert (held.state, held.held_until) == ("held", NOW + timedelta(seconds=120))
    assert held.starts_at - held.claims_at == timedelta(seconds=120 + 60 + 60)
    assert [(b.host_id, b.gpu_indices) for b in held.blocks.all()] == [(listing.hosts.get().pk, [0, 1, 2, 3, 4, 5])]
    items = quotes.itemise(quote)
    assert items["gpu_seconds"] == 6 * 7 * 86_400
    assert items["operator_minor"] + items["platform_fee_minor"] == items["total_minor"] == 201_600
    assert items["platform_fee_minor"] == 30_240
    assert quotes.accept_body(quote)["body"] == {"quote": quote.public_id, "terms_version": documents.CURRENT}
    assert (quote.reference, quote.metadata) == ("po-7", {"team": "vision"})


@pytest.mark.django_db
@pytest.mark.parametrize("kind", ["on_demand", "spot"])
def test_a_rate_holds_nothing(site, customer, kind):
    listing = offer(site)
    quote = ask(customer, listing, kind, start=None, end=None, **({"limit_price": 1_500_000} if kind == "spot" else {}))
    assert (quote.total_minor, quote.held_until, quote.starts_at) == (None, None, NOW)
    assert not Reservation.objects.exists()
    assert quotes.itemise(quote)["basis"] == "per_hour_at_ceiling"


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("fields", "code", "pointer"),
    [
        ({"kind": "flexible"}, "kind_not_offered", "/kind"),
        ({"end": None}, "invalid_request", "/ends_at"),
        ({"end": START}, "invalid_request", "/ends_at"),
        ({"start": NOW - DAY}, "invalid_request", "/starts_at"),
        ({"start": START + timedelta(seconds=1)}, "invalid_request", "/starts_at"),
        ({"gpus": 3}, "invalid_request", "/gpu_count"),
        ({"gpus": 0}, "invalid_request", "/gpu_count"),
        ({"level": "planet"}, "invalid_request", "/level"),
        ({"limit_price": 1}, "invalid_request", "/limit_price"),
        ({"kind": "spot", "end": None}, "invalid_request", "/limit_price"),
        ({"kind": "spot", "end": None, "limit_price": 899_999}, "invalid_request", "/limit_price"),
        ({"end": START + timedelta(hours=5)}, "term_not_offered", "/ends_at"),
        ({"end": START + 31 * DAY}, "term_not_offered", "/ends_at"),
        ({"start": NOW + 366 * DAY, "end": NOW + 367 * DAY}, "term_not_offered", "/starts_at"),
    ],
)
def test_a_request_that_the_terms_do_not_allow_is_refused_by_field(site, customer, fields, code, pointer):
    listing = offer(site, flexible_price=None, min_gpus=2, min_term_hours=6, max_term_days=30)
    error = refused(code, ask, customer, listing, **fields)
    assert pointer in error.fields
    assert not Quote.objects.exists()


@pytest.mark.django_db
def test_what_is_not_on_offer_cannot_be_quoted(site, customer):
    paused = offer(site, state="paused")
    refused("not_found", ask, customer, paused)
    refused("listing_unavailable", ask, site.organization, paused)
    refused("not_found", ask, factories.organization(livemode=False), offer(site))
    refused("listing_unavailable", ask, factories.organization(currency="EUR"), offer(site))
    error = refused("limit_exceeded", ask, factories.organization(gpu_limit=4), offer(site))
    assert error.extra["allowed"] == 4


@pytest.mark.django_db
def test_three_live_holds_an_organization(site, customer):
    listing = offer(site)
    for _ in range(3):
        ask(customer, listing, gpus=1)
    error = refused("too_many_holds", ask, customer, listing, gpus=1)
    assert error.extra["retry_after"] == 120
    ask(factories.organization(), listing, gpus=1)  # another organization's are its own
    ask(customer, listing, "on_demand", gpus=1, start=None, end=None)  # a rate holds nothing
    ask(customer, listing, gpus=1, now=NOW + timedelta(seconds=120))
    first = Quote.objects.order_by("pk").last()
    quotes.release(factories.actor(customer), first.pk, now=NOW + timedelta(seconds=121))
    ask(customer, listing, gpus=6, now=NOW + timedelta(seconds=121))


@pytest.mark.django_db
def test_a_hold_takes_the_capacity_until_it_lapses(site, customer):
    listing = offer(site)
    ask(customer, listing)
    error = refused("no_capacity", ask, factories.organization(), listing)
    assert error.extra["reason"] == "no_capacity_in_window"
    assert error.kind.status == 409
    ask(factories.organization(), listing, now=NOW + timedelta(seconds=120))


@pytest.mark.django_db
def test_the_refusal_says_what_would_fit_and_it_does(site, customer):
    listing, other = offer(site, hosts=2), offer(site)
    contract = contracts.accept(factories.actor(customer), ask(customer, listing, gpus=12).pk, now=NOW)
    error = refused("no_capacity", ask, customer, listing, gpus=8)
    offers = error.extra["alternatives"]
    assert offers["gpu_count"] == {"host": 4, "leaf": 4, "spine": 4, "site": 4}
    assert offers["later"] == {
        "starts_at": contract.ends_at + timedelta(seconds=240), "ends_at": contract.ends_at + timedelta(seconds=240) + 7 * DAY
    }  # fmt: skip
    assert [o["listing"] for o in offers["listings"]] == [other.public_id]
    ask(customer, listing, gpus=offers["gpu_count"]["site"])
    ask(customer, listing, gpus=8, start=offers["later"]["starts_at"], end=offers["later"]["ends_at"])
    ask(factories.organization(), other, gpus=8)


@pytest.mark.django_db
def test_a_window_that_starts_at_once_is_offered_later_with_its_lead(site, customer):
    """What begins now needs no lead; moved behind another contract it does."""
    listing = offer(site)
    busy = ask(customer, listing, start=None, end=NOW + DAY)
    assert busy.reservation.claims_at == NOW
    error = refused("no_capacity", ask, customer, listing, start=None, end=NOW + DAY)
    later = error.extra["alternatives"]["later"]
    assert later["starts_at"] == NOW + DAY + timedelta(seconds=240)
    quote = ask(customer, listing, start=later["starts_at"], end=later["ends_at"])
    assert quote.reservation.claims_at == NOW + DAY


@pytest.mark.django_db
def test_one_fabric_is_promised_only_where_it_exists(site, customer):
    hosts = [factories.host(site, leaf=leaf) for leaf in ("a", "a", "b", "b")]
    listing = factories.listing(site, hosts=hosts)
    error = refused("no_capacity", ask, customer, listing, gpus=24, level="leaf")
    assert error.extra["reason"] == "shape_never_fits"
    quote = ask(customer, listing, gpus=16, level="leaf")
    assert len({b.host.leaf for b in quote.reservation.blocks.all()}) == 1
    ask(customer, listing, gpus=8, level="host")
    error = refused("no_capacity", ask, factories.organization(), listing, gpus=16, level="leaf")
    assert error.extra["alternatives"]["gpu_count"]["leaf"] == 8


@pytest.mark.django_db
def test_running_on_demand_work_is_not_promised_away_and_spot_is(site, customer):
    listing = offer(site)
    host = listing.hosts.get()
    job = factories.job(factories.contract(listing, kind="on_demand"), gpus=4, state="running")
    factories.placement(job, host, [2, 3, 4, 5], state="running")
    assert availability.largest(listing, now=NOW, starts_at=START, ends_at=END) == 4
    quote = ask(customer, listing, gpus=4)
    assert quote.reservation.blocks.get().gpu_indices == [0, 1, 6, 7]
    spot = factories.job(factories.contract(listing, kind="spot"), gpus=4, state="running")
    factories.placement(spot, host, [0, 1, 6, 7], state="running")
    assert availability.largest(listing, now=NOW, starts_at=END + DAY, ends_at=END + 2 * DAY) == 4


@pytest.mark.django_db
def test_shares_of_one_gpu_count_once_and_end_with_the_last_contract(site, customer):
    listing = offer(site)
    host = listing.hosts.get()
    for ends_at in (NOW + DAY, NOW + 3 * DAY):
        job = factories.job(factories.contract(listing, ends_at=ends_at), gpu_milli=500, state="running")
        factories.placement(job, host, [0], state="running")
    assert availability.largest(listing, now=NOW, starts_at=NOW + DAY, ends_at=NOW + 2 * DAY) == 7
    assert availability.largest(listing, now=NOW, starts_at=NOW + 4 * DAY, ends_at=NOW + 5 * DAY) == 8


@pytest.mark.django_db
def test_a_contracts_own_jobs_do_not_count_twice(site, customer):
    listing = offer(site, hosts=2)
    actor = factories.actor(customer)
    contract = contracts.accept(actor, ask(customer, listing, gpus=8, start=None, end=NOW + 5 * DAY).pk, now=NOW)
    block = contract.reservation.blocks.get()
    job = factories.job(contract, gpus=8, state="running")
    factories.placement(job, block.host, block.gpu_indices, state="running")
    window = {"now": NOW, "starts_at": NOW + DAY, "ends_at": NOW + 2 * DAY}
    assert availability.largest(listing, **window) == 8
    other = listing.hosts.exclude(pk=block.host_id).get()
    factories.placement(factories.job(contract, gpus=2, state="running"), other, [0, 1], state="running")
    assert availability.largest(listing, **window) == 6  # beyond its own GPUs, to the end of its contract
    assert availability.largest(listing, now=NOW, starts_at=NOW + 6 * DAY, ends_at=NOW + 7 * DAY) == 16


@pytest.mark.django_db
@pytest.mark.parametrize("broken", [{"state": "lost"}, {"state": "draining"}, {"state": "maintenance"}, "gpu", "site"])
def test_what_does_not_work_is_not_stock(site, broken):
    listing = offer(site)
    host = listing.hosts.get()
    if broken == "gpu":
        host.gpus.filter(index=3).update(healthy=False)
    elif broken == "site":
        type(site).objects.filter(pk=site.pk).update(mode="off")
    else:
        listing.hosts.update(**broken)
    found = availability.stock([listing], now=NOW)[listing.pk]
    assert (found.gpus, found.total) == (7 if broken == "gpu" else 0, 8)


@pytest.mark.django_db
@pytest.mark.parametrize("kind", ["reserved", "on_demand"])
def test_a_listing_without_hosts_has_nothing(site, customer, kind):
    window = {} if kind == "reserved" else {"start": None, "end": None}
    error = refused("no_capacity", ask, customer, factories.listing(site), kind, **window)
    assert error.extra["reason"] == "shape_never_fits"


@pytest.mark.django_db
def test_closed_hours_are_not_stock_and_the_calendar_shows_them(site, customer):
    listing = offer(site, available_from=NOW + DAY, available_until=NOW + 4 * DAY)
    cuts = calendars.steps(NOW, NOW + 5 * DAY, DAY, NOW)
    cells = calendars.of_listing(listing, cuts, now=NOW, kind="reserved")
    assert [c.gpus["site"] for c in cells] == [0, 8, 8, 8, 0]
    assert [c.start - c.at for c in cells] == [timedelta(0), timedelta(seconds=240), *[timedelta(0)] * 3]  # its lead
    refused("no_capacity", ask, customer, listing)


@pytest.mark.django_db
def test_devices_are_renumbered_where_counts_allow_and_devices_do_not(site, customer):
    """One GPU early, another late, then one through both: each instant has a GPU free, but no one device all along."""
    host = factories.host(site, gpus=2)
    listing = factories.listing(site, hosts=[host])
    hour = timedelta(hours=1)
    early = ask(customer, listing, gpus=1, start=NOW + 10 * hour, end=NOW + 20 * hour)
    late = ask(customer, listing, gpus=1, start=NOW + 30 * hour, end=NOW + 40 * hour)
    late.reservation.blocks.update(gpu_indices=[1])
    through = ask(customer, listing, gpus=1, start=NOW + 15 * hour, end=NOW + 35 * hour)
    devices = {q: q.reservation.blocks.get().gpu_indices for q in (early, late, through)}
    assert devices[early] != devices[through] != devices[late]
    assert set(devices[early] + devices[through]) == {0, 1}


@pytest.mark.serverless
@given(
    st.integers(1, 6),
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20), st.integers(1, 4)), max_size=12),
    st.integers(0, 30),
)
def test_devices_are_found_wherever_the_counts_fit(gpus, wanted, now):
    """Claims that come one by one, admitted by count alone, always find devices; what has begun never moves."""
    have: dict[int, Taken] = {}
    for key, (start, length, count) in enumerate(wanted, 1):
        at = max(start, now)
        end = at + length
        overlapping = [t for t in have.values() if t.start < end and at < t.end]
        instants = {at, *(t.start for t in overlapping if t.start > at)}
        peak = max(sum(len(t.indices) for t in overlapping if t.start <= i < t.end) for i in instants)
        found = holds.number(range(gpus), have.values(), at, end, count)
        assert (found is not None) == (peak + count <= gpus)
        if found is None:
            continue
        indices, moves = found
        assert len(set(indices)) == count
        assert not any(have[k].pinned for k in moves)
        have = {k: Taken(k, t.start, t.end, moves.get(k, t.indices), t.pinned) for k, t in have.items()}
        have[key] = Taken(key, at, end, indices, pinned=at <= now)
        for a in have.values():
            for b in have.values():
                if a.key < b.key and a.start < b.end and b.start < a.end:
                    assert not set(a.indices) & set(b.indices)


@pytest.mark.django_db
def test_an_organization_sees_and_releases_its_own_quotes_alone(site, customer):
    quote = ask(customer, offer(site))
    stranger = factories.actor(factories.organization())
    refused("not_found", quotes.release, stranger, quote.pk, now=NOW)
    refused("not_found", contracts.accept, stranger, quote.pk, now=NOW)
    quotes.release(factories.actor(customer), quote.pk, now=NOW)
    refused("illegal_transition", quotes.release, factories.actor(customer), quote.pk, now=NOW)
    refused("quote_expired", contracts.accept, factories.actor(customer), quote.pk, now=NOW)
    assert not Contract.objects.exists()


@pytest.mark.django_db
def test_the_contract_is_made_of_what_the_quote_froze(site, customer):
    listing = offer(
        site,
        title="as quoted",
        eviction_notice_s=120,
        flexible_notice_s=600,
        emergency_notice_s=300,
        fabric_gbps=400,
        version=3,
    )
    quote = ask(customer, listing, "flexible")
    later = type(listing).objects.get(pk=listing.pk)
    for name, value in {
        "title": "another", "eviction_notice_s": 7200, "emergency_notice_s": None, "flexible_notice_s": 5,
        "flexible_hours_per_month": 700, "fabric_gbps": 0, "flexible_price": 1, "runtime": "virtual",
        "gpu_model": factories.gpu_model("L40S"), "version": 4, "state": "paused",
    }.items():  # fmt: skip
        setattr(later, name, value)
    later.save()
    type(site).objects.filter(pk=site.pk).update(name="renamed")
    contract = contracts.accept(
        factories.actor(customer), quote.pk, now=NOW + timedelta(minutes=10)
    )  # admitted once more
    assert (contract.price, contract.listing_version, contract.gpu_model.name) == (1_600_000, 3, "H100-SXM")
    assert (contract.eviction_notice_s, contract.flexible_notice_s, contract.flexible_hours_per_month) == (120, 600, 40)
    assert contract.emergency_notice_s == 300
    assert contract.terms["grid_emergency"] == {"rule": "leaves_last", "notice_s": 300, "time_taken": "not_charged"}
    agreed = {k: contract.terms[k] for k in ("title", "fabric_gbps", "runtime", "site", "gpu_model", "listing_version")}
    assert agreed == {
        "title": "as quoted", "fabric_gbps": 400, "runtime": "process", "site": site.name, "gpu_model": "H100-SXM",
        "listing_version": 3,
    }  # fmt: skip
    held = contract.reservation
    assert held.starts_at - held.claims_at == timedelta(seconds=240)  # the lead of the notice that was quoted
    later.refresh_from_db()
    assert later.title == "another"


@pytest.mark.django_db
@pytest.mark.parametrize("kind", ["reserved", "on_demand"])
def test_a_quote_of_a_withdrawn_listing_is_not_accepted(site, customer, kind):
    listing = offer(site)
    quote = ask(customer, listing, kind)
    listings.retire(factories.actor(site.organization), listing, now=NOW)
    error = refused("listing_unavailable", contracts.accept, factories.actor(customer), quote.pk, now=NOW)
    assert "withdrawn" in error.detail
    assert error.extra["listing"] == listing.public_id
    assert not Contract.objects.exists()


@pytest.mark.django_db
def test_a_quote_without_frozen_terms_is_asked_for_again(site, customer):
    quote = ask(customer, offer(site))
    Quote.objects.update(terms={})
    error = refused("quote_expired", contracts.accept, factories.actor(customer), quote.pk, now=NOW)
    assert error.extra["quote_again"]["body"]["gpu_count"] == 8


@pytest.mark.django_db
def test_statements_of_a_quote_do_not_grow_with_the_listing(site, customer, django_assert_max_num_queries):
    listing = offer(site, hosts=6)
    for gpus in (4, 20):
        ask(factories.organization(), listing, gpus=gpus)
    with django_assert_max_num_queries(26):
        ask(customer, listing, gpus=24)
