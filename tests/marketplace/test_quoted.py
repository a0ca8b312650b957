"""What a quote itemises and freezes: host shape, energy, tax, and the hours in which a listing is on offer."""

from datetime import timedelta

import pytest

from billing.core import tax
from marketplace.models import Contract, Host, Listing
from marketplace.services import catalogue, documents, feeds, host_shape, quotes, search
from tests import factories
from tests.factories import NOW
from tests.marketplace.trade import DAY, END, START, accept, ask, rate, refused

pytestmark = pytest.mark.django_db
SMALL = {
    "gpu_count": 4,
    "vcpu_milli": 96_000,
    "ram_mib": 1_048_576,
    "nvme_gib": 28_000,
    "cap_control": True,
    "nvlink_gpus": 2,
}


@pytest.fixture
def listing():
    """One host of 8 GPUs in one NVLink domain, one of 4 in two domains of two, with less of all but disk."""
    catalogue.forget()
    site = factories.site(pue_permille=1200)
    hosts = [
        factories.host(site),
        factories.host(site, gpus=4, vcpu_milli=96_000, ram_mib=1_048_576, nvlink_domains=[0, 0, 1, 1]),
    ]
    yield factories.listing(site, hosts=hosts, interconnect="InfiniBand NDR", fabric_gbps=400)
    catalogue.forget()


# --- host shape
def test_what_each_host_has_is_of_the_poorest_and_the_same_in_search(customer, listing):
    assert host_shape.of_listing(listing) == SMALL
    found = search.search(factories.actor(customer), search.Filters(), now=NOW).rows
    assert [row.host for row in found] == [SMALL]
    api = factories.client(factories.organization())
    assert api.get(f"/api/v1/listings/{listing.public_id}").json()["host"] == SMALL
    assert api.get("/api/v1/listings").json()["data"][0]["host"] == SMALL
    assert host_shape.words(SMALL) == "4 GPUs, 96 vCPU, 1,024 GiB RAM, 28,000 GiB NVMe, NVLink among 2"
    Host.objects.update(listing=None)
    assert host_shape.of_listing(listing) is None


def test_one_host_without_cap_control_and_the_listing_says_so(customer, listing, client):
    Host.objects.filter(gpu_count=4).update(cap_control=False)
    catalogue.forget()
    shape = SMALL | {"cap_control": False}
    assert host_shape.of_listing(listing) == shape
    api = factories.client(factories.organization())
    assert api.get(f"/api/v1/listings/{listing.public_id}").json()["host"]["cap_control"] is False
    assert api.get("/api/v1/listings").json()["data"][0]["host"]["cap_control"] is False
    assert (
        "without cap control a host counts at its nameplate"
        in client.get(f"/listings/{listing.public_id}").content.decode()
    )
    made = ask(customer, listing)
    assert made.terms["host"] == shape
    (paper,) = accept(customer, made).documents.filter(kind="order_form")
    assert "always at nameplate power (no cap control)" in paper.html
    assert host_shape.words({k: v for k, v in SMALL.items() if k != "cap_control"}) == host_shape.words(SMALL), (
        "as signed before"
    )


def test_what_was_sold_stays_as_it_was_whatever_becomes_of_the_hosts(customer, listing):
    made = ask(customer, listing)
    Host.objects.update(nvme_gib=1, ram_mib=1)
    contract = accept(customer, made)
    assert made.terms["host"] == SMALL == contract.terms["host"]
    (paper,) = contract.documents.filter(kind="order_form")
    assert "at least 4 GPUs, 96 vCPU, 1,024 GiB RAM" in paper.html
    assert documents.digest(paper.html) == paper.digest


# --- energy
def test_energy_is_itemised_at_full_power_and_at_the_published_price_alone(customer, listing):
    made = ask(customer, listing)  # 8 GPUs for a week
    gpu_w = -(-(700 + 4600 // 4) * 1200 // 1000)  # of the host that draws the most for each GPU
    energy = quotes.itemise(made)["energy"]
    assert energy == {
        "wh": 8 * gpu_w * 168,
        "watts": 8 * gpu_w,
        "minor": None,
        "source": "",
    }  # its own tariff is nobody's business
    feeds.store(
        "energy_microusd_per_mwh", 45_000_000, scope=listing.site.region, source="ercot", observed_at=NOW, now=NOW
    )
    made = ask(factories.organization(), listing, gpus=4)
    energy = quotes.itemise(made)["energy"]
    assert energy["minor"] == round(4 * gpu_w * 168 / 1_000_000 * 45 * 100)
    assert energy["source"] == "ercot"
    assert 0 < energy["minor"] < quotes.itemise(made)["operator_minor"]
    by_use = quotes.itemise(rate(factories.organization(), listing))["energy"]
    assert by_use["wh"] == by_use["watts"]  # of an hour


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("https://prices.example:8443/v1/rt?key=s3cret", "prices.example"),
        ("file:///srv/ours/prices.csv", ""),
        ("ercot", "ercot"),
    ],
)
def test_a_buyer_reads_who_publishes_the_price_and_not_where_we_ask_for_it(customer, listing, source, shown):
    feeds.store(
        "energy_microusd_per_mwh", 45_000_000, scope=listing.site.region, source=source, observed_at=NOW, now=NOW
    )
    made = ask(customer, listing)
    assert quotes.itemise(made)["energy"]["source"] == shown
    assert "s3cret" not in str(made.terms)
    assert "/srv/" not in str(made.terms)


# --- tax
@pytest.mark.parametrize(
    ("seller", "buyer", "rule"),
    [
        ("US", "DE", "reverse_charge"),
        ("US", "GB", "reverse_charge"),
        ("DE", "DE", "not_collected"),
        ("US", "US", "not_collected"),
        ("US", "BR", "not_collected"),
    ],
)
def test_tax_says_its_rule(seller, buyer, rule):
    found = tax.estimate(seller, buyer)
    assert (found.minor, found.rule, bool(found.source)) == (0, rule, rule == "reverse_charge")


def test_the_api_and_the_page_itemise_them(listing):
    customer = factories.organization(country="DE")
    items = factories.client(customer).post(
        "/api/v1/quotes", {"listing": listing.public_id, "kind": "on_demand", "gpu_count": 8}, format="json"
    ).json()["items"]  # fmt: skip
    assert items["tax"]["amount"] == {"amount_minor": 0, "currency": "USD"}
    assert items["tax"]["rule"] == "reverse_charge"
    assert items["energy"]["included"]
    assert items["energy"]["at_grid_price"] is None
    assert items["energy"]["wh"] == items["energy"]["watts"] > 8 * 700


# --- hours in which a listing is on offer
@pytest.mark.parametrize("kind", ["on_demand", "spot"])
def test_what_holds_nothing_keeps_to_the_hours_of_the_offer_too(customer, listing, kind):
    Listing.objects.filter(pk=listing.pk).update(available_from=START, available_until=END)
    limit = {"limit_price": 2_000_000} if kind == "spot" else {}
    error = refused("term_not_offered", rate, customer, listing, kind, **limit)
    assert list(error.fields) == ["/starts_at"]
    assert error.extra["available_from"] == START
    error = refused("term_not_offered", ask, customer, listing, kind, start=END, end=None, **limit)
    assert list(error.fields) == ["/starts_at"]
    error = refused("term_not_offered", ask, customer, listing, kind, end=END + timedelta(minutes=1), **limit)
    assert list(error.fields) == ["/ends_at"]
    made = ask(customer, listing, kind, end=None, **limit)
    assert made.ends_at == END
    Listing.objects.filter(pk=listing.pk).update(available_until=END - DAY)
    contract = accept(customer, made)  # what was signed stays
    assert Contract.objects.get(pk=contract.pk).ends_at == END
    assert ask(customer, listing, kind, end=START + DAY, **limit).ends_at == START + DAY


def test_an_offer_without_hours_has_no_end(customer, listing):
    assert rate(customer, listing).ends_at is None
