"""Listings: what may be on offer, and that an edit never reaches a contract."""

from datetime import timedelta

import pytest

from marketplace.errors import MarketError
from marketplace.models import AuditEvent, Host, Listing
from marketplace.services import contracts, feeds, listings, quotes
from tests import factories
from tests.factories import NOW

pytestmark = pytest.mark.django_db

FIELDS = {"title": "H100, one leaf", "on_demand_price": 2_500_000, "reserved_price": 2_000_000}


def draft(site, *, hosts=1, **fields):
    rows = [factories.host(site) for _ in range(hosts)]
    model = {"gpu_model_id": rows[0].gpu_model_id} if rows else {}
    return listings.draft(
        factories.actor(site.organization), site, {**FIELDS, **model, **fields}, hosts=[h.pk for h in rows], now=NOW
    )


@pytest.fixture
def site():
    return factories.site(factories.organization(is_operator=True, livemode=False))


def publish(listing):
    return listings.publish(factories.actor(listing.organization), listing, now=NOW)


def test_a_draft_is_published_paused_and_retired_with_a_version_each(site):
    listing = draft(site)
    actor = factories.actor(site.organization)
    assert (listing.state, listing.version) == ("draft", 1)
    assert listings.actions(listing) == ["publish", "retire", "update"]
    listing = listings.publish(actor, listing, now=NOW)
    assert (listing.state, listing.version, listing.published_at) == ("published", 2, NOW)
    listing = listings.update(actor, listing, {"on_demand_price": 3_000_000}, now=NOW)
    assert (listing.on_demand_price, listing.version) == (3_000_000, 3)
    listing = listings.pause(actor, listing, now=NOW)
    listing = listings.publish(actor, listing, now=NOW + timedelta(hours=1))
    assert listing.published_at == NOW
    listing = listings.retire(actor, listing, now=NOW)
    assert listings.actions(listing) == []
    assert AuditEvent.objects.filter(subject=listing.public_id).count() == 6


@pytest.mark.parametrize(
    ("move", "path"), [("publish", ["retired"]), ("pause", ["draft", "retired"]), ("retire", ["retired"])]
)
def test_moves_that_the_table_does_not_have_are_refused(site, move, path):
    listing = draft(site)
    for state in path:
        Listing.objects.filter(pk=listing.pk).update(state=state)
        with pytest.raises(MarketError) as refused:
            getattr(listings, move)(factories.actor(site.organization), listing, now=NOW)
        assert refused.value.code == "illegal_transition"


def test_what_is_missing_is_named_all_at_once(site):
    for kind in ("pdu", "transformer", "site"):
        site.power_nodes.filter(kind=kind).delete()
    bare = listings.draft(factories.actor(site.organization), site, {"title": " "}, now=NOW)
    with pytest.raises(MarketError) as refused:
        publish(bare)
    assert refused.value.code == "listing_incomplete"
    assert set(refused.value.fields) == {"/hosts", "/on_demand_price", "/title", "/site"}


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"on_demand_price": 0}, "/on_demand_price"),
        ({"min_gpus": 0}, "/min_gpus"),
        ({"currency": "ZZZ"}, "/currency"),
        ({"min_term_hours": 48, "max_term_days": 1}, "/min_term_hours"),
        ({"available_from": NOW, "available_until": NOW}, "/available_until"),
    ],
)
def test_nonsense_is_refused_also_in_a_draft(site, fields, pointer):
    with pytest.raises(MarketError) as refused:
        draft(site, **fields)
    assert pointer in refused.value.fields


@pytest.mark.parametrize(("chunk", "right"), [(8, True), (16, True), (12, False), (17, False)])
def test_a_minimum_beyond_one_host_is_whole_hosts(site, chunk, right):
    listing = draft(site, hosts=2, min_gpus=chunk)
    if right:
        assert publish(listing).state == "published"
    else:
        with pytest.raises(MarketError) as refused:
            publish(listing)
        assert "/min_gpus" in refused.value.fields


def test_a_runtime_that_does_not_isolate_is_not_offered_to_the_public_on_live_cells():
    site = factories.site(factories.organization(is_operator=True, livemode=True))
    partner = factories.organization()
    listing = draft(site)
    with pytest.raises(MarketError) as refused:
        publish(listing)
    assert "/runtime" in refused.value.fields
    named = listings.update(
        factories.actor(site.organization), listing, {"visibility": "partners"}, partners=[partner.pk], now=NOW
    )
    assert publish(named).state == "published"
    assert Listing.objects.visible_to(factories.actor(partner)).filter(pk=named.pk).exists()
    assert not Listing.objects.visible_to(factories.actor(factories.organization())).filter(pk=named.pk).exists()
    factories.agent(site, runtime="podman")
    assert publish(draft(site)).runtime == "podman"


def test_only_the_sites_owner_writes(site):
    stranger = factories.actor(factories.organization(is_operator=True, livemode=False))
    listing = draft(site)
    for call in (
        lambda: listings.draft(stranger, site, FIELDS, now=NOW),
        lambda: listings.update(stranger, listing, {"title": "mine"}, now=NOW),
        lambda: listings.publish(stranger, listing, now=NOW),
        lambda: listings.pause(stranger, listing, now=NOW),
        lambda: listings.retire(stranger, listing, now=NOW),
    ):
        with pytest.raises(MarketError) as refused:
            call()
        assert refused.value.code == "forbidden"


def test_a_host_is_in_one_listing_that_is_not_retired(site):
    first = draft(site)
    host = first.hosts.get()
    actor = factories.actor(site.organization)
    with pytest.raises(MarketError) as refused:
        listings.draft(actor, site, FIELDS, hosts=[host.pk], now=NOW)
    assert refused.value.code == "conflict"
    listings.retire(actor, first, now=NOW)
    second = listings.draft(actor, site, FIELDS, hosts=[host.pk], now=NOW)
    assert list(second.hosts.all()) == [host]
    assert list(first.hosts.all()) == []


def test_hosts_of_another_site_model_or_life_are_refused(site):
    other = factories.host(factories.site(site.organization))
    a100 = factories.host(site, gpu_model=factories.gpu_model("A100", 40_960, 400))
    gone = factories.host(site, state="retired")
    listing = draft(site)
    for host in (other, a100, gone):
        with pytest.raises(MarketError) as refused:
            listings.update(factories.actor(site.organization), listing, {}, hosts=[host.pk], now=NOW)
        assert "/hosts" in refused.value.fields


def test_a_host_with_promised_gpus_stays(site):
    listing = publish(draft(site, hosts=2))
    customer = factories.organization(livemode=False)
    wanted = quotes.Request("reserved", 8, starts_at=NOW + timedelta(days=1), ends_at=NOW + timedelta(days=3))
    quote = quotes.quote(factories.actor(customer), listing.pk, wanted, now=NOW)
    held = quote.reservation.blocks.get().host_id
    free = listing.hosts.exclude(pk=held).get().pk
    actor = factories.actor(site.organization)
    with pytest.raises(MarketError) as refused:
        listings.update(actor, listing, {}, hosts=[free], now=NOW)
    assert refused.value.code == "conflict"
    listings.update(actor, listing, {}, hosts=[held], now=NOW)
    assert Host.objects.get(pk=free).listing_id is None


def test_an_edit_and_a_retirement_leave_the_contract_as_agreed(site):
    listing = publish(draft(site))
    customer = factories.organization(livemode=False)
    actor = factories.actor(site.organization)
    quote = quotes.quote(factories.actor(customer), listing.pk, quotes.Request("on_demand", 4), now=NOW)
    listings.update(actor, listing, {"on_demand_price": 9_000_000, "eviction_notice_s": 5}, now=NOW)
    contract = contracts.accept(factories.actor(customer), quote.pk, now=NOW)
    listings.retire(actor, listing, now=NOW)
    contract.refresh_from_db()
    assert (contract.price, contract.terms["price"], contract.state) == (2_500_000, 2_500_000, "active")


def test_a_stale_version_is_a_conflict(site):
    listing = draft(site)
    actor = factories.actor(site.organization)
    listings.update(actor, listing, {"title": "two"}, expected_version=1, now=NOW)
    with pytest.raises(MarketError) as refused:
        listings.update(actor, listing, {"title": "three"}, expected_version=1, now=NOW)
    assert refused.value.code == "conflict"


def test_the_spot_floor_is_what_the_watts_cost_or_earn(site):
    """W = 700 + 4600/8 = 1275; x PUE 1.25 x $45/MWh = $0.07171875, over (1 - 0.15) for the fee, rounded up."""
    listing = draft(site)
    assert listings.floor_of(listing, now=NOW) == 84_376
    factories.miner(site, modes=(("sleep", 25, 0), ("normal", 3500, 200_000)))  # 17.5 J/TH
    for kind, value in (("difficulty", 155_970_000_000_000), ("btc_usd_cents", 10_693_500), ("block_height", 921_700)):
        feeds.store(kind, value, source="test", observed_at=NOW, now=NOW)
    assert listings.floor_of(listing, now=NOW) == 84_376  # one feed is missing: hashing counts nothing
    feeds.store("fees_sat_per_block", 1_937_500, source="test", observed_at=NOW, now=NOW)
    # $43.3/PH/day over (0.024 x 17.5 J/TH) = $103/MWh at the machine, less the pool's 1 %, over the miners' PUE of 1.05 = $97.3;
    # x 1275 W x 1.25 = $0.1551, over 0.85.
    assert 181_000 < listings.floor_of(listing, now=NOW) < 184_000
    assert listings.floor_of(listing, now=NOW + timedelta(days=9)) == 84_376  # stale feeds decide nothing
    with pytest.raises(MarketError) as refused:
        publish(listings.update(factories.actor(site.organization), listing, {"spot_floor": 150_000}, now=NOW))
    assert "/spot_floor" in refused.value.fields
