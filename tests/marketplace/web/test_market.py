"""The market's front, a listing, and the way from a quote to a contract."""

from datetime import timedelta
from html import unescape

import pytest
from django.test import Client
from django.utils import timezone

from marketplace.models import Contract, Quote
from tests import factories

pytestmark = pytest.mark.django_db


def text(response) -> str:
    return response.content.decode()


def test_anybody_sees_the_market_with_prices_and_exact_stock(market, browser):
    page = text(browser().get("/"))
    assert market.listing.title in page
    assert "$2.50" in page
    assert "<strong>16</strong> of 16 GPUs free" in page


def test_a_filter_that_leaves_nothing_is_named_with_the_way_out(market, browser):
    page = text(browser().get("/?gpu_model=B200"))
    assert "The last 1 offer fell away by the filter: GPU model." in page
    assert "Without GPU model: 1 offer" in page
    page = text(browser().get("/?count=17"))
    assert "The last 1 offer fell away by the filter: number of GPUs." in page
    assert 'href="?count=16"' in page
    assert market.listing.title in text(browser().get("/?count=16"))


def test_a_wrong_filter_is_told_and_breaks_nothing(market, browser):
    assert "cursor is not one of this search" in text(browser().get("/?cursor=nonsense"))
    assert browser().get("/?start=2026-12-02T00:00&end=2026-12-01T00:00").status_code == 200


def test_a_fragment_for_htmx_is_the_results_alone(market, browser):
    page = text(browser().get("/", headers={"HX-Request": "true", "HX-Target": "results"}))
    assert market.listing.title in page
    assert "<html" not in page
    assert 'hx-swap-oob="true"' in page  # the facets come along


def test_the_table_keeps_the_filters(market, browser):
    page = text(browser().get("/?gpu_model=H100-SXM&view=table"))
    assert "<caption" in page
    assert "16 of 16" in page
    assert 'href="?gpu_model=H100-SXM"' in page  # back to the cards
    assert "HX-Request" in browser().get("/")["Vary"]


def test_a_fragment_whose_session_is_over_leads_to_log_in_and_back_to_its_page(market, browser):
    job = factories.job(market.contract())
    htmx = {"HX-Request": "true", "HX-Current-URL": f"http://testserver/jobs/{job.public_id}?stream=stderr"}
    response = browser().get(f"/jobs/{job.public_id}/live", headers=htmx)
    assert response.status_code == 204
    assert response["HX-Redirect"] == f"/accounts/login/?next=/jobs/{job.public_id}%3Fstream%3Dstderr"


def test_the_live_market_shows_no_test_offers_and_a_house_with_only_test_offers_shows_them(market, browser):
    test_operator = factories.organization("Test Power", is_operator=True, livemode=False)
    test_site = factories.site(test_operator)
    listing = factories.listing(test_site, hosts=[factories.host(test_site)], title="A test offer")
    assert listing.title not in text(browser().get("/"))
    assert browser().get(f"/listings/{listing.public_id}").status_code == 404
    market.listing.state = "paused"
    market.listing.save()
    assert listing.title in text(browser().get("/"))
    assert browser().get(f"/listings/{listing.public_id}").status_code == 200


def test_a_listing_shows_terms_and_a_calendar_whose_days_lead_to_a_quote(market, browser):
    page = text(browser().get(f"/listings/{market.listing.public_id}"))
    assert "Free, day by day" in page
    tomorrow = timezone.now() + timedelta(days=1)
    assert f"starts_at={tomorrow:%Y-%m-%d}T00%3A00" in page
    assert "H100-SXM" in page


def test_the_calendar_marks_what_fits_and_lists_the_first_windows(market, browser):
    here = f"/listings/{market.listing.public_id}"
    page = text(browser().get(f"{here}?count=16&level=spine&days=2&months=1"))
    assert "The first windows of <strong>16 GPUs</strong>, one fabric, for 2 days or longer" in page
    assert page.count("day-fits") >= 28
    assert "gpu_count=16&amp;level=spine" in page
    none = text(browser().get(f"{here}?count=17&months=1"))
    assert "No window of <strong>17 GPUs</strong>" in none
    assert "day-fits" not in none
    assert none.count("day-short") >= 28
    tomorrow = timezone.now() + timedelta(days=1)
    hours = text(browser().get(f"{here}?day={tomorrow:%Y-%m-%d}"))
    assert "hour by hour" in hours
    assert f"starts_at={tomorrow:%Y-%m-%d}T13%3A00" in hours
    part = text(browser().get(here, headers={"HX-Request": "true", "HX-Target": "free-days"}))
    assert '<table class="calendar"' in part
    assert "<html" not in part
    assert browser().get(f"{here}?count=x&months=2&day=never&start=-&level=moon").status_code == 200


def test_what_was_searched_for_goes_along_to_the_quote_and_to_the_calendar(market, browser):
    begin = (timezone.now() + timedelta(days=9)).replace(hour=0, minute=0)
    window = f"start={begin:%Y-%m-%d}T00:00&end={begin + timedelta(days=30):%Y-%m-%d}T00:00"
    client = browser(market.customer)
    page = unescape(text(client.get(f"/?kind=reserved&count=16&level=spine&{window}")))
    block = "gpu_count=16&level=spine"
    asked = f"?kind=reserved&{block}&starts_at={begin:%Y-%m-%d}T00%3A00&ends_at={begin + timedelta(days=30):%Y-%m-%d}T00%3A00"
    here = f"/listings/{market.listing.public_id}"
    assert f'href="{here}/quote{asked}"' in page
    assert f'href="{here}?count=16&level=spine&days=30&start={begin:%Y-%m-%d}"' in page
    form = text(client.get(f"{here}/quote{asked}"))
    assert "checked" in form.split('value="reserved"')[1].split(">")[0]
    assert f'value="{begin:%Y-%m-%d}T00:00"' in form
    assert 'value="16"' in form
    # On demand holds no window, and no search asks for nothing.
    assert f'href="{here}/quote?kind=on_demand&{block}"' in unescape(
        text(client.get(f"/?kind=on_demand&count=16&level=spine&{window}"))
    )
    assert f'href="{here}/quote"' in text(client.get("/"))


def test_prices_by_term_are_shown_searched_and_quoted(market, browser):
    tier = {
        "kind": "reserved",
        "min_term_hours": 720,
        "upfront_permille": 250,
        "flexible_hours_per_month": 0,
        "price": 1_111_000,
    }
    type(market.listing).objects.filter(pk=market.listing.pk).update(price_tiers=[tier])
    begin = (timezone.now() + timedelta(days=9)).replace(hour=0, minute=0)
    window = f"start={begin:%Y-%m-%d}T00:00&end={begin + timedelta(days=31):%Y-%m-%d}T00:00"
    client = browser(market.customer)
    assert "less on other terms" in text(client.get("/"))
    assert "$1.111" not in text(client.get(f"/?kind=reserved&{window}"))
    page = unescape(text(client.get(f"/?kind=reserved&upfront_max=25&{window}")))
    assert "$1.111" in page
    assert "upfront_max_permille=250" in page
    here = f"/listings/{market.listing.public_id}"
    assert "from 30 days" in text(client.get(here))
    form = text(client.get(f"{here}/quote?upfront_max_permille=250"))
    assert "25 % of the commitment" in form
    asked = {
        "kind": "reserved", "gpu_count": "8", "level": "site", "starts_at": f"{begin:%Y-%m-%d}T00:00",
        "ends_at": f"{begin + timedelta(days=31):%Y-%m-%d}T00:00", "upfront_max_permille": "250",
    }  # fmt: skip
    answer = client.post(f"{here}/quote", asked, follow=True)
    page = text(answer)
    assert "$1.111" in page
    assert "Due at signing, 25 %" in page
    answer = client.post(f"{here}/quote", {**asked, "kind": "on_demand"}, follow=True)  # nothing is due of it
    assert answer.status_code == 200


def test_two_to_four_offers_stand_side_by_side(market, browser):
    site = factories.site(region="no-north")
    host = factories.host(site, beat_at=timezone.now(), nvme_gib=0)
    tier = {
        "kind": "reserved",
        "min_term_hours": 720,
        "upfront_permille": 0,
        "flexible_hours_per_month": 0,
        "price": 1_111_000,
    }
    other = factories.listing(site, hosts=[host], title="Fjord", price_tiers=[tier], spot_floor=None)
    hidden = factories.listing(site, title="Hidden", state="draft")
    client = browser(market.customer)
    page = text(client.get("/?count=8"))
    assert f'form="compare" name="listing" value="{other.public_id}"' in page
    assert '<input type="hidden" name="count" value="8">' in page
    both = f"listing={market.listing.public_id}&listing={other.public_id}"
    page = text(client.get(f"/compare?{both}"))
    assert "Fjord" in page
    assert "from $1.111 on other terms" in page
    assert "8 of 8" in page
    assert "16 of 16" in page
    begin = (timezone.now() + timedelta(days=9)).replace(hour=0, minute=0)
    window = f"kind=reserved&start={begin:%Y-%m-%d}T00:00&end={begin + timedelta(days=31):%Y-%m-%d}T00:00"
    page = unescape(text(client.get(f"/compare?{both}&{window}")))
    assert ">$1.111<" in page
    assert f"/listings/{other.public_id}/quote?kind=reserved&starts_at=" in page
    for query, said in (
        (f"listing={other.public_id}", "Tick two to 4"),
        (f"listing={other.public_id}&listing={hidden.public_id}", "1 of what was ticked is not on offer"),
        ("listing=x&start=never", "Tick two to 4"),
    ):
        page = text(client.get(f"/compare?{query}"))
        assert said in page
        assert "Hidden" not in page
    many = "&".join(f"listing={factories.listing(site).public_id}" for _ in range(5))
    assert "Tick two to 4" in text(client.get(f"/compare?{many}"))


def test_who_asks_for_a_window_too_is_told_that_it_may_be_the_window(market, browser):
    begin = timezone.now() + timedelta(days=9)
    page = text(
        browser().get(f"/?count=17&start={begin:%Y-%m-%d}T00:00&end={begin + timedelta(days=3):%Y-%m-%d}T00:00")
    )
    assert "fell away by the filter: window and number of GPUs." in page


def test_memory_is_asked_for_as_it_is_shown(market, browser):
    """An H100 has 79.6 GiB and reads 80 GiB: who asks for 80 finds it."""
    model = market.listing.gpu_model
    model.vram_mib = 81_559
    model.save()
    page = text(browser().get("/?vram_min=80"))
    assert market.listing.title in page
    assert "80 GiB" in page
    assert "fell away" in text(browser().get("/?vram_min=81"))


def test_the_market_has_a_calendar_whose_days_lead_to_offers(market, browser):
    page = text(browser().get("/?view=calendar&count=16&level=spine"))
    assert "Largest free block of one offer" in page
    assert page.count("day-fits") >= 85
    tomorrow = timezone.now() + timedelta(days=1)
    assert f'href="?count=16&amp;level=spine&amp;start={tomorrow:%Y-%m-%d}T00%3A00' in page
    assert "view=calendar" in text(browser().get("/?count=17"))  # from "no offer matches"


def test_who_is_not_logged_in_comes_back_to_the_quote(market, browser):
    response = browser().get(f"/listings/{market.listing.public_id}/quote")
    assert response.status_code == 302
    assert response["Location"] == f"/accounts/login/?next=/listings/{market.listing.public_id}/quote"


def test_quote_accept_contract(market, browser):
    client = browser(market.customer)
    here = f"/listings/{market.listing.public_id}/quote"
    response = client.post(here, {"kind": "on_demand", "gpu_count": 8, "level": "host"})
    quote = Quote.objects.get()
    assert response["Location"] == f"/quotes/{quote.public_id}"
    page = text(client.get(response["Location"]))
    assert "$20.00" in page  # 8 x 2.50 an hour
    assert "Accept and sign" in page
    response = client.post(f"/quotes/{quote.public_id}/accept")
    contract = Contract.objects.get()
    assert response["Location"] == f"/contracts/{contract.public_id}"
    assert contract.gpu_count == 8
    assert "Submit a job" in text(client.get(response["Location"]))
    again = client.post(f"/quotes/{quote.public_id}/accept")
    assert again.status_code == 409
    assert Contract.objects.count() == 1


def test_without_a_card_the_quote_asks_for_one_and_signs_nothing(market, browser):
    poor = factories.organization("New Labs", standing="no_card")
    quote = factories.quote(market.listing, poor, ends_at=None, firm_until=timezone.now() + timedelta(minutes=15))
    client = browser(poor)
    page = text(client.get(f"/quotes/{quote.public_id}"))
    assert "Accept and sign" not in page
    assert f'href="/billing/card?next=/quotes/{quote.public_id}"' in page
    response = client.post(f"/quotes/{quote.public_id}/accept")
    assert response.status_code == 402
    assert "Add a card first" in text(response)
    assert not Contract.objects.exists()


def test_a_refused_quote_names_the_reason_and_links_to_what_would_fit(market, browser):
    other = factories.listing(
        market.site, hosts=[factories.host(market.site) for _ in range(4)], title="Another hall", spot_floor=None
    )
    client = browser(market.customer)
    end = timezone.now() + timedelta(days=2)
    asked = {"kind": "reserved", "gpu_count": 24, "level": "site", "ends_at": f"{end:%Y-%m-%dT%H:%M}"}
    response = client.post(f"/listings/{market.listing.public_id}/quote", asked)
    page = text(response)
    assert response.status_code == 409
    assert "There is not enough free capacity in that window" in page
    assert "This offer does not have 24 GPUs at work, whenever it begins. At most 16 can be had then." in page
    rows = page[page.index("What would fit, the nearest first") :].split("<tr>")[2:]
    assert len(rows) == 2
    assert f'href="/listings/{other.public_id}/quote?' in rows[0]  # all that was asked, next door
    assert "Another hall, us-tx" in rows[0]
    assert "$2.00" in rows[0]
    assert "gpu_count=16" in rows[1]
    assert ">Fewer GPUs<" in rows[1]
    filled = client.get(unescape(rows[1].split('href="')[1].split('"')[0]))
    assert 'value="16"' in text(filled)  # each opens the form with it
    assert f'value="{end:%Y-%m-%dT%H:%M}"' in text(filled)
    assert not Quote.objects.exists()


def test_where_nothing_near_fits_a_standing_bid_is_offered(market, browser):
    market.listing.hosts.update(state="draining")
    end = timezone.now() + timedelta(days=2)
    asked = {"kind": "reserved", "gpu_count": 8, "level": "host", "ends_at": f"{end:%Y-%m-%dT%H:%M}"}
    page = text(browser(market.customer).post(f"/listings/{market.listing.public_id}/quote", asked))
    assert "does not have 8 GPUs at work inside one host, whenever it begins." in page
    assert "At most" not in page
    assert 'href="/bids/new"' in page
    assert "What would fit" not in page


def test_wrong_terms_stand_beside_their_fields(market, browser):
    client = browser(market.customer)
    response = client.post(
        f"/listings/{market.listing.public_id}/quote", {"kind": "reserved", "gpu_count": 8, "level": "site"}
    )
    assert response.status_code == 400
    assert "reserved needs an end" in text(response)
    response = client.post(
        f"/listings/{market.listing.public_id}/quote",
        {"kind": "spot", "gpu_count": 1, "level": "site", "limit_price": "0.10"},
    )
    assert "the floor is" in text(response)


def test_a_quote_can_be_given_back(market, browser):
    quote = factories.quote(market.listing, market.customer, firm_until=timezone.now() + timedelta(minutes=15))
    assert browser(market.customer).post(f"/quotes/{quote.public_id}/release").status_code == 302
    quote.refresh_from_db()
    assert quote.state == "released"


def test_terminate_says_its_rule_and_does_it(market, browser):
    contract = market.contract()
    client = browser(market.customer)
    assert "It ends at once" in text(client.get(f"/contracts/{contract.public_id}"))
    client.post(f"/contracts/{contract.public_id}/terminate")
    contract.refresh_from_db()
    assert contract.state in {"ending", "terminated", "ended"}
    assert "Terminate this contract" not in text(client.get(f"/contracts/{contract.public_id}"))


def test_the_operator_sees_a_contract_sold_but_cannot_end_it(market, browser):
    contract = market.contract(reference="our secret note")
    client = browser(market.operator)
    page = text(client.get(f"/contracts/{contract.public_id}"))
    assert "Lumen Labs" in page
    assert "our secret note" not in page
    client.post(f"/contracts/{contract.public_id}/terminate")
    contract.refresh_from_db()
    assert contract.state == "active"


def test_every_post_wants_its_csrf_token(market, browser):
    contract = market.contract()
    client: Client = browser(market.customer, enforce_csrf_checks=True)
    response = client.post(f"/contracts/{contract.public_id}/terminate")
    assert response.status_code == 403
    assert "The form has gone stale" in text(response)
    contract.refresh_from_db()
    assert contract.state == "active"
