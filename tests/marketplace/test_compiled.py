"""Querysets compiled once: the same rows as the queryset's own, for whoever asks, in every thread, prepared by the server."""

from datetime import UTC, datetime, timedelta
from threading import Thread

import pytest
from django.db import connection
from django.db.models import Q

from marketplace import prepared
from marketplace.compiled import Compiled, any_of, shape_of, slot, time
from marketplace.models import Host, Listing, Organization
from marketplace.tenancy import ANONYMOUS, SYSTEM
from tests import factories

NOW = datetime(2026, 11, 2, 12, tzinfo=UTC)
SEEN = Compiled(lambda actor: Listing.objects.visible_to(actor).select_related("site", "reliability").order_by("pk"))
NAMED = Compiled(
    lambda: Organization.objects.filter(any_of("pk", "ids")).order_by("-pk").values_list("name", flat=True)
)
HEARD = Compiled(
    lambda late: (
        Host.objects.filter(Q(beat_at__lt=time("at")) if late else Q(beat_at__gte=time("at")), site=slot("site"))
        .order_by("pk")
        .values_list("pk", "nvlink_domains", "beat_at")
    )
)


@pytest.mark.django_db
def test_everybody_sees_what_the_queryset_shows_and_nothing_else(django_assert_num_queries):
    site = factories.site()
    test_site = factories.site(cell_=factories.cell(livemode=False))
    partner, stranger = factories.organization(), factories.organization()
    factories.listing(site, hosts=[factories.host(site)], price_tiers=[], state="draft")
    factories.listing(site)
    factories.listing(site, visibility="partners").partners.add(partner)
    factories.listing(test_site)
    tester = factories.organization(livemode=False)
    counts = set()
    for actor in (*map(factories.actor, (partner, stranger, site.organization, tester)), ANONYMOUS, SYSTEM):
        wanted = list(Listing.objects.visible_to(actor).select_related("site", "reliability").order_by("pk"))
        found = SEEN(shape_of(actor), organization=actor.organization_id)
        assert found == wanted, actor
        with django_assert_num_queries(0):
            assert [row.site.name for row in found] == [row.site.name for row in wanted]
            assert [getattr(row, "reliability", None) for row in found] == [None] * len(found)
        assert [vars(row)["price_tiers"] for row in found] == [row.price_tiers for row in wanted]
        counts.add(len(found))
    assert len(counts) > 3  # they do not all see the same


@pytest.mark.django_db
def test_lists_of_any_length_and_times_are_one_text_each():
    made = [factories.organization(f"o{i}") for i in range(3)]
    assert NAMED(ids=[made[0].pk, made[2].pk]) == ["o2", "o0"]
    assert NAMED(ids=[]) == []
    assert NAMED(ids=[row.pk for row in made] * 50) == ["o2", "o1", "o0"]
    site = factories.site()
    early, late = (factories.host(site, beat_at=NOW + timedelta(minutes=m)) for m in (-5, 5))
    assert HEARD(True, at=NOW, site=site.pk) == [(early.pk, early.nvlink_domains, early.beat_at)]
    assert HEARD(False, at=NOW, site=site.pk) == [(late.pk, late.nvlink_domains, late.beat_at)]
    assert HEARD(True, at=NOW, site=site.pk + 1) == []
    with pytest.raises(KeyError, match="site"):
        HEARD(True, at=NOW)


@pytest.mark.django_db(transaction=True)
def test_a_thread_asks_by_its_own_connection_and_the_server_keeps_the_statement():
    made = factories.organization("of a thread")
    assert NAMED(ids=[made.pk]) == ["of a thread"]
    found = []

    def ask():
        found.extend(NAMED(ids=[made.pk])[0] for _ in range(3))
        kept = prepared.rows(
            "SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE %s", ["%ANY ($1::bigint[])%"]
        )
        found.append(kept[0][0])
        connection.close()

    thread = Thread(target=ask)
    thread.start()
    thread.join()
    assert found == ["of a thread"] * 3 + [1]
