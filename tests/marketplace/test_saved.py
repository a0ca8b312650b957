"""Saved searches: what a change of the market makes fit is told once, to who may see it, and nothing else is."""

import random
from datetime import timedelta

import pytest
from django.core import mail as outbound
from django.db import connection
from django.test.utils import CaptureQueriesContext

from marketplace.models import AuditEvent, Host, Listing, OutboxMessage, Reservation, SavedMatch, SavedSearch
from marketplace.services import catalogue, contracts, filters, listings, saved, saved_matches, saved_notices, search
from marketplace.services.filters import Filters
from tests import factories
from tests.factories import NOW
from tests.marketplace.changing import Market, asked
from tests.marketplace.trade import DAY, HOUR, ask, refused

pytestmark = pytest.mark.django_db(transaction=True)
MINUTE = timedelta(minutes=1)


@pytest.fixture(autouse=True)
def cold():
    catalogue.forget()
    yield
    catalogue.forget()


@pytest.fixture
def organization():
    found = factories.organization("Lumen Labs")
    factories.member(found)
    return found


def keep(organization, *, name="64 in one fabric", now=NOW, **options):
    wanted = Filters(**{k: v for k, v in options.items() if k in filters.FILTER_NAMES})
    fields = {k: v for k, v in options.items() if k not in filters.FILTER_NAMES}
    return saved.save(factories.actor(organization), name, wanted, now=now, **fields)


def offered(site=None, **fields):
    at = site or factories.site()
    return factories.listing(at, hosts=[factories.host(at)], **fields)


def round_(now=NOW):
    """What the workers do: follow, then the notices that are due and their mails."""
    saved_matches.follow(now=now)
    for row in taken(saved_matches.NOTICE, available_at__lte=now):
        saved_notices.tell(row["search"], now=now)
    for row in taken(saved_notices.MAIL):
        saved_notices.mail(row["search"], row["listings"], now=now)


def taken(topic, **due):
    rows = OutboxMessage.objects.filter(topic=topic, **due)
    found = list(rows.values_list("payload", flat=True))
    rows.delete()
    return found


def mails():
    found = [m.subject for m in outbound.outbox]
    outbound.outbox.clear()
    return found


def test_what_fits_already_is_not_told_and_what_begins_to_fit_is_once(organization):
    offered(gpu_model=factories.gpu_model("H100-SXM"))
    row = keep(organization, gpu_model=("H100-SXM",), price_max=2_600_000, kind="on_demand")
    round_()
    assert mails() == []
    dear = offered(on_demand_price=9_000_000, runtime="podman")
    other = offered(gpu_model=factories.gpu_model("L40S", 49_152, 350))
    round_(NOW + MINUTE)
    assert mails() == []
    actor = factories.actor(dear.organization)
    listings.update(actor, dear, {"on_demand_price": 2_500_000}, now=NOW)  # a price cut
    round_(NOW + 2 * MINUTE)
    assert mails() == [f"An offer fits {row.name}"]
    round_(NOW + 3 * MINUTE)
    assert mails() == []
    told = AuditEvent.objects.get(verb="saved_search.matched")
    assert (told.organization_id, told.after["listings"]) == (organization.pk, [dear.public_id])
    assert other.public_id not in str(told.after)


def test_paused_and_published_again_is_told_again_after_the_pause(organization):
    row = keep(organization, region=("us-tx",), pause_minutes=60)
    listing = offered()
    owner = factories.actor(listing.organization)
    round_()
    assert len(mails()) == 1
    listings.pause(owner, listing, now=NOW)
    round_(NOW + MINUTE)
    assert SavedMatch.objects.count() == 0
    Listing.objects.filter(pk=listing.pk).update(state="published")
    round_(NOW + 2 * MINUTE)
    assert mails() == []  # it was told two minutes ago
    round_(NOW + 61 * MINUTE)
    assert mails() == [f"An offer fits {row.name}"]


def test_what_stops_fitting_before_it_is_told_is_not_told(organization):
    keep(organization)
    listing = offered()
    saved_matches.follow(now=NOW)
    Listing.objects.filter(pk=listing.pk).update(state="paused")
    assert saved_notices.tell(SavedSearch.objects.get().pk, now=NOW) == 0
    assert SavedMatch.objects.count() == 0
    assert mails() == []


def test_freed_capacity_is_told_also_when_time_alone_frees_it(organization, customer):
    listing = offered()
    contract = contracts.accept(
        factories.actor(customer), ask(customer, listing, start=None, end=NOW + DAY).pk, now=NOW
    )
    row = keep(organization, count=8)
    round_()
    assert mails() == []
    assert saved_matches.follow(now=NOW + HOUR).compared == 0  # nothing has changed
    round_(contract.ends_at)
    assert mails() == [f"An offer fits {row.name}"]
    assert Reservation.objects.get().state == "firm"  # nobody wrote anything


def test_a_digest_comes_once_a_day_with_all_that_was_found(organization):
    row = keep(organization, cadence="daily")
    seven = NOW.replace(hour=7, minute=0, second=0, microsecond=0)
    seven = seven if seven > NOW else seven + DAY
    for i in range(3):
        offered(title=f"offer {i}")
        round_(NOW + i * MINUTE)
    assert mails() == []
    round_(seven + timedelta(seconds=2))
    (sent,) = outbound.outbox
    assert sent.subject == f"3 offers fit {row.name}"
    assert all(f"offer {i}" in sent.body for i in range(3))
    mails()
    offered()
    round_(seven + HOUR)
    assert mails() == []
    round_(seven + DAY)
    assert len(mails()) == 1


def test_a_partners_listing_is_never_shown_to_who_may_not_see_it(organization):
    """Neither when it is matched, nor when it turns private between the match and the notice, or between notice and mail."""
    stranger = factories.organization("Stranger")
    factories.member(stranger)
    for each in (organization, stranger):
        keep(each, name=each.name)
    listing = offered(visibility="partners", title="for friends")
    listing.partners.add(organization)
    round_()
    (sent,) = outbound.outbox
    assert "Lumen Labs" in sent.subject
    assert SavedMatch.objects.filter(search__organization=stranger).count() == 0
    outbound.outbox.clear()

    second = offered(title="public for a moment")
    saved_matches.follow(now=NOW + 2 * HOUR)
    Listing.objects.filter(pk=second.pk).update(visibility="partners")
    search_of = SavedSearch.objects.get(organization=stranger)
    assert saved_notices.tell(search_of.pk, now=NOW + 2 * HOUR) == 0
    Listing.objects.filter(pk=second.pk).update(visibility="public")
    saved_matches.follow(now=NOW + 2 * HOUR + MINUTE)
    assert saved_notices.tell(search_of.pk, now=NOW + 2 * HOUR + MINUTE) == 1
    Listing.objects.filter(pk=second.pk).update(visibility="partners")
    assert not saved_notices.mail(search_of.pk, [second.pk], now=NOW + 2 * HOUR + MINUTE)
    assert outbound.outbox == []
    assert not saved.shown_matches(factories.actor(stranger), search_of).exists()


def test_test_mode_and_live_never_mix(organization):
    test = factories.organization(livemode=False)
    factories.member(test)
    keep(test)
    offered()
    round_()
    assert mails() == []
    site = factories.site(factories.organization(is_operator=True, livemode=False))
    offered(site)
    round_(NOW + MINUTE)
    assert len(mails()) == 1


def test_the_mail_is_left_with_one_click_and_no_log_in(organization):
    row = keep(organization)
    offered()
    round_()
    (sent,) = outbound.outbox
    link = sent.extra_headers["List-Unsubscribe"].strip("<>")
    assert sent.extra_headers["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
    assert link in sent.body
    token = link.rpartition("/")[2]
    saved.unsubscribe(token, now=NOW)
    saved.unsubscribe(token, now=NOW)  # again is no error
    row.refresh_from_db()
    assert row.state == "paused"
    refused("not_found", saved.unsubscribe, token[:-1] + ("a" if token[-1] != "a" else "b"), now=NOW)
    refused("not_found", saved.unsubscribe, saved.signing.dumps([row.pk, 1], salt="another"), now=NOW)
    saved.resume(factories.actor(organization), row.pk, now=NOW)
    saved.delete(factories.actor(organization), row.pk, now=NOW)
    assert saved.unsubscribe(token, now=NOW) is None


def test_who_left_the_organization_gets_no_mail(organization):
    person = factories.member(organization, "engineer")
    row = keep(organization)
    SavedSearch.objects.update(created_by=person.user)
    offered()
    round_()
    assert outbound.outbox.pop().to == [person.user.email]
    person.delete()
    offered()
    round_(NOW + 2 * HOUR)
    assert outbound.outbox.pop().to == [organization.memberships.get(role="owner").user.email]
    assert row.name


def test_searches_are_limited_and_belong_to_their_organization(organization, settings):
    settings.SAVED_SEARCHES = 1
    row = keep(organization)
    error = refused("limit_exceeded", keep, organization)
    assert error.extra["allowed"] == 1
    stranger = factories.actor(factories.organization())
    for act in (saved.pause, saved.resume, saved.delete):
        refused("not_found", act, stranger, row.pk, now=NOW)
    refused("not_found", saved.change, stranger, row.pk, {"name": "mine"}, now=NOW)
    refused("invalid_request", saved.change, factories.actor(organization), row.pk, {"name": " "}, now=NOW)
    refused("invalid_request", saved.change, factories.actor(organization), row.pk, {"sort": "luck"}, now=NOW)
    refused("unknown_field", saved.change, factories.actor(organization), row.pk, {"state": "active"}, now=NOW)


def test_paused_ones_are_silent_and_a_change_begins_anew(organization):
    row, actor = keep(organization, gpu_model=("B200",)), factories.actor(organization)
    saved.pause(actor, row.pk, now=NOW)
    refused("illegal_transition", saved.pause, actor, row.pk, now=NOW)
    offered(gpu_model=factories.gpu_model("B200", 196_608, 1000))
    round_()
    saved.resume(actor, row.pk, now=NOW)
    round_(NOW + MINUTE)
    saved.change(actor, row.pk, {"name": "any"}, wanted=Filters(), now=NOW)
    round_(NOW + 2 * MINUTE)
    assert mails() == []  # what fits now is known
    offered()
    round_(NOW + 3 * MINUTE)
    assert mails() == ["An offer fits any"]


def test_an_idle_search_is_warned_of_and_expires_and_so_does_one_whose_window_is_over(organization):
    row = keep(organization)
    late = keep(organization, name="window", start=NOW + DAY, end=NOW + 2 * DAY)
    assert saved.clock(NOW + DAY) == 0
    assert saved.clock(NOW + 2 * DAY) == 1
    late.refresh_from_db()
    assert late.state == "expired"
    refused("illegal_transition", saved.resume, factories.actor(organization), late.pk, now=NOW + 2 * DAY)
    assert saved.clock(NOW + 174 * DAY) == 0
    assert OutboxMessage.objects.filter(topic=saved.IDLE_NOTICE).count() == 1
    saved_notices.warn(row.pk)
    assert mails() == [f"{row.name} stops soon"]
    assert saved.clock(NOW + 180 * DAY) == 0  # the notice was given six days ago
    assert saved.clock(NOW + 181 * DAY) == 1
    saved.resume(factories.actor(organization), row.pk, now=NOW + 182 * DAY)
    saved.touch(row, now=NOW + 300 * DAY)
    assert saved.clock(NOW + 362 * DAY) == 0


def test_a_search_that_fits_half_the_market_is_refused(organization, monkeypatch):
    monkeypatch.setattr(saved_matches, "MOST_AT_FIRST", 1)
    site = factories.site()
    offered(site)
    keep(organization)
    offered(site)
    error = refused("invalid_request", keep, organization, name="all")
    assert "/filters" in error.fields


@pytest.mark.parametrize("seed", range(3))
def test_matches_are_what_a_search_would_show_whatever_changes(seed):
    """Seeded changes, random filters; after each round the kept matches are those of a whole search."""
    dice = random.Random(seed)
    market = Market(dice)
    people = [factories.organization(f"o{i}") for i in range(2)]
    now = NOW
    for organization in people:
        for n in range(6):
            wanted = asked(dice)
            if wanted.end is None or wanted.end > NOW:
                saved.save(factories.actor(organization), f"s{n}", wanted, now=NOW)
    assert SavedSearch.objects.exists()
    for _ in range(12):
        for _ in range(dice.choice([1, 3])):
            try:
                market.change(now)
            except Host.DoesNotExist:
                continue
        saved_matches.follow(now=now)
        for row in SavedSearch.objects.select_related("organization"):
            wanted = filters.restored(row.filters)
            if wanted.end is not None and wanted.end <= now:
                continue
            shown = search.search(factories.actor(row.organization), wanted, now=now, limit=100)
            assert set(row.matches.values_list("listing_id", flat=True)) == {f.listing.pk for f in shown.rows}, (
                row.filters
            )


def test_filters_are_read_back_as_they_were_asked():
    dice = random.Random(5)
    for _ in range(200):
        wanted = asked(dice)
        assert filters.restored(filters.stored(wanted)) == wanted
    wanted = Filters(where=filters.comparisons("vram_mib>=81920, gpu_model!=L40S|A100-80"))
    assert filters.restored(filters.stored(wanted)) == wanted


def test_one_change_concerns_few_of_many_searches(organization):
    """2,000 searches; a change of one listing compares those of its model and region, in a bounded number of statements."""
    models, regions = [f"gpu-{i}" for i in range(20)], [f"r-{i}" for i in range(20)]
    rows = [
        SavedSearch(
            organization=organization, name="x", filters={"gpu_model": [m], "region": [r]}, gpu_models=[m], regions=[r],
            created_at=NOW, touched_at=NOW,
        )
        for m in models
        for r in regions
        for _ in range(5)
    ]  # fmt: skip
    SavedSearch.objects.bulk_create(rows)
    saved_matches.follow(now=NOW)
    offered(factories.site(region="r-3"), gpu_model=factories.gpu_model("gpu-7"))
    saved_matches.follow(now=NOW)
    listing = offered(factories.site(region="r-4"), gpu_model=factories.gpu_model("gpu-7"))
    with CaptureQueriesContext(
        connection,
    ) as seen:
        found = saved_matches.follow(now=NOW + MINUTE)
    assert (found.listings, found.compared, found.began) == (1, 5, 5)
    assert len(seen) <= 34
    Listing.objects.filter(pk=listing.pk).update(title="a new title")  # nothing that a search asks about
    assert saved_matches.follow(now=NOW + MINUTE).compared == 0
