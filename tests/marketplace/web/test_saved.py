"""Saved searches on the pages, and the way out of their mails."""

import pytest
from django.test import Client

from marketplace.models import SavedSearch
from marketplace.services import saved

pytestmark = pytest.mark.django_db
FORM = {
    "query": "gpu_model=B200&count=8&level=host&price_max=2.5&where=min_gpus%3C%3D8",
    "name": "B200",
    "cadence": "at_once",
    "pause_minutes": 60,
}


def text(response) -> str:
    return response.content.decode()


def test_from_no_offer_matches_to_a_kept_search_and_back_to_its_market(market, browser):
    client = browser(market.customer, "engineer")
    page = text(client.get("/?gpu_model=B200"))
    assert "No offer matches" in page
    assert "Tell me when something fits" in page
    assert 'value="gpu_model=B200"' in page
    assert client.post("/searches", FORM)["Location"] == "/searches"
    row = SavedSearch.objects.get()
    assert row.filters == {
        "gpu_model": ["B200"], "count": 8, "level": "host", "price_max": 2_500_000, "where": ["min_gpus<=8"]
    }  # fmt: skip
    page = text(client.get("/searches"))
    assert "8 GPUs, one host" in page
    assert "up to $2.50" in page
    back = client.get(f"/searches/{row.public_id}")["Location"]
    assert back == "/?gpu_model=B200&count=8&level=host&price_max=2.5&where=min_gpus%3C%3D8"
    assert 'name="where" value="min_gpus&lt;=8"' in text(client.get(back))


def test_rename_pause_resume_delete(market, browser):
    client = browser(market.customer)
    client.post("/searches", FORM)
    row = SavedSearch.objects.get()
    here = f"/searches/{row.public_id}"
    client.post(f"{here}/change", {"name": "renamed", "cadence": "daily", "pause_minutes": 360})
    client.post(f"{here}/pause")
    row.refresh_from_db()
    assert (row.name, row.cadence, row.pause_minutes, row.state) == ("renamed", "daily", 360, "paused")
    client.post(f"{here}/resume")
    assert "renamed looks again." in text(client.get("/searches"))
    assert browser(market.operator).post(f"{here}/delete").status_code == 404
    client.post(f"{here}/delete")
    assert not SavedSearch.objects.exists()


def test_a_wrong_search_is_told_where_it_was_asked(market, browser):
    client = browser(market.customer)
    response = client.post("/searches", {**FORM, "query": "count=0"})
    assert response["Location"] == "/?count=0"
    assert "Ensure this value is greater than or equal to 1" in text(client.get("/"))
    assert not SavedSearch.objects.exists()


def test_a_look_at_the_mails_link_changes_nothing_and_one_click_stops_it_logged_out(market, browser):
    browser(market.customer).post("/searches", FORM)
    row = SavedSearch.objects.get()
    link = f"/searches/unsubscribe/{saved.unsubscribe_token(row)}"
    client = Client(enforce_csrf_checks=True)
    assert "Stop the mails" in text(client.get(link))
    row.refresh_from_db()
    assert row.state == "active"
    response = client.post(link, {"List-Unsubscribe": "One-Click"})  # RFC 8058: no cookie, no token of a form
    assert "No more of these mails" in text(response)
    row.refresh_from_db()
    assert row.state == "paused"
    assert client.get("/searches/unsubscribe/nonsense").status_code == 404


def test_who_is_logged_out_or_only_looks_is_offered_no_form(market, browser):
    assert "Log in</a> to be told" in text(browser().get("/?gpu_model=B200"))
    assert "Tell me when" not in text(browser(market.customer, "viewer").get("/?gpu_model=B200"))
