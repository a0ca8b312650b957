"""What buyers read of reliability: on the market, on an offer, and the rules."""

from datetime import timedelta

import pytest
from django.db import transaction
from django.test import Client

from marketplace.models import Reliability
from marketplace.services import conditions, reliability, search
from marketplace.services.search import Filters, comparisons
from marketplace.tenancy import ANONYMOUS
from tests import factories as f
from tests.factories import NOW

pytestmark = pytest.mark.django_db


@pytest.fixture
def offers():
    """Three offers: one counted for a month, one that was away half of it, a new one."""
    found = [f.listing((site := f.site()), hosts=[f.host(site)], title=name) for name in ("good", "poor", "new")]
    rows = [site.pk for site in (listing.site for listing in found)]
    with transaction.atomic():
        conditions.record(sites=rows, now=NOW)
    reliability.score_all(now=NOW)
    reliability.roll_up(now=NOW + timedelta(minutes=5))
    for name, score in (("good", 995), ("poor", 700)):
        Reliability.objects.filter(listing__title=name).update(score_permille=score)
    Reliability.objects.filter(listing__title="new").delete()
    return {listing.title: listing for listing in found}


def titles(**asked):
    sort = asked.pop("sort", "oldest")
    return [row.listing.title for row in search.search(ANONYMOUS, Filters(**asked), now=NOW, sort=sort).rows]


def test_search_by_reliability(offers):
    assert titles() == ["good", "poor", "new"]
    assert titles(reliability_min=990) == ["good"]
    assert titles(where=comparisons("reliability_permille<990")) == ["poor"]  # nothing counted: no comparison holds
    assert titles(sort="-reliability") == ["good", "poor", "new"]
    assert titles(sort="reliability") == ["poor", "good", "new"]
    found = search.search(ANONYMOUS, Filters(reliability_min=999), now=NOW)
    assert found.nothing["removed_by"] == "reliability_min"
    Reliability.objects.filter(listing=offers["poor"]).update(score_permille=999)
    assert titles(reliability_min=999) == ["poor"]  # the kept columns follow


def test_pages_show_the_score_its_parts_and_the_rules(offers):
    client = Client()
    shown = client.get("/", {"reliability_min": "99.0"}).content.decode()
    assert "99.5 % reliable" in shown
    assert "poor" not in shown
    page = client.get(f"/listings/{offers['good'].public_id}").content.decode()
    assert "99.5 %" in page
    assert "hours on offer" in page
    assert "/reliability" in page
    assert "Nothing has been counted yet" in client.get(f"/listings/{offers['new'].public_id}").content.decode()
    rules = client.get("/reliability").content.decode()
    assert all(text in rules for text in ("0.97", "72.0", "availability^0.50"))


def test_api_shows_the_same(offers):
    _, key = f.key(f.organization())
    headers = {"Authorization": f"Bearer {key}"}
    answer = Client(headers=headers).get("/api/v1/listings", {"reliability_min": 990}).json()
    assert [row["title"] for row in answer["data"]] == ["good"]
    told = answer["data"][0]["reliability"]
    assert (told["score_permille"], told["window_days"], told["rules"][-12:]) == (995, 30, "/reliability")
    assert [part["name"] for part in told["parts"]] == ["availability", "starts", "gpus", "drains"]
    assert answer["data"][0]["operator"]["reliability_permille"] > 900
