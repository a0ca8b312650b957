"""A contract's page: what stands, what it may become, what was agreed."""

from datetime import timedelta

import pytest
from django.utils import timezone

from marketplace.services import contracts, documents, quotes
from tests import factories

pytestmark = pytest.mark.django_db


def text(answer):
    assert answer.status_code == 200
    return answer.content.decode()


def minute(days):
    return timezone.now().replace(second=0, microsecond=0) + timedelta(days=days)


@pytest.fixture
def signed(market):
    wanted = quotes.Request("reserved", 4, starts_at=minute(2), ends_at=minute(12))
    actor = factories.actor(market.customer)
    made = quotes.quote(actor, market.listing.pk, wanted, now=timezone.now())
    return contracts.accept(actor, made.pk, now=timezone.now())


def test_a_contract_is_extended_and_grows_on_its_page(market, browser, signed):
    client = browser(market.customer)
    here = f"/contracts/{signed.public_id}"
    page = text(client.get(here))
    for words in (
        "Signed. 4 GPUs are yours from",
        "Extend it",
        "More GPUs",
        "Stays due",
        f"Order form {signed.public_id}",
    ):
        assert words in page
    answer = client.post(
        f"{here}/amend", {"kind": "extend", "ends_at": f"{signed.ends_at + timedelta(days=2):%Y-%m-%dT%H:%M}"}
    )
    page = text(client.get(answer.url))
    assert "A later end" in page
    assert "$384.00" in page  # 4 GPUs, 48 hours, 2.00
    page = text(client.post(f"{answer.url}/accept", follow=True))
    assert "Accepted" in page
    answer = client.post(f"{here}/amend", {"kind": "resize", "gpu_count": "8"})
    page = text(client.post(f"{answer.url}/accept", follow=True))
    assert "4 GPUs more from" in page
    assert page.count("/documents/doc_") == 3 * 2  # each as a page and as PDF
    page = text(client.post(f"{here}/amend", {"kind": "resize", "gpu_count": "64"}, follow=True))
    assert "16 GPUs in all would fit" in page
    assert "New end: is needed." in text(client.post(f"{here}/amend", {"kind": "extend"}, follow=True))


def test_a_paper_is_shown_with_its_hash_to_both_sides_and_to_nobody_else(market, browser, signed):
    paper = signed.documents.get()
    here = f"/contracts/{signed.public_id}/documents/{paper.public_id}"
    for side in (market.customer, market.operator):
        page = text(browser(side).get(here))
        assert paper.digest in page
        assert "1/4 of the time that is left stays due" in page
    assert browser(factories.organization()).get(here).status_code == 404
    other = factories.contract(market.listing, market.customer)
    assert browser(market.customer).get(here.replace(signed.public_id, other.public_id)).status_code == 404


def test_a_price_is_proposed_and_answered_on_the_pages(market, browser):
    contract = market.contract()
    here = f"/contracts/{contract.public_id}"
    day = minute(31)
    operator, customer = browser(market.operator), browser(market.customer)
    assert "Propose another price" in text(operator.get(here))
    assert "Propose another price" not in text(customer.get(here))
    asked = {
        "kind": "price",
        "price": "3",
        "effective_at": f"{day:%Y-%m-%dT%H:%M}",
        "reason": "energy costs more",
    }
    where = operator.post(f"{here}/amend", asked).url
    assert "The operator asks for $3.00" in text(customer.get(here))
    page = text(customer.get(where))
    assert "energy costs more" in page
    assert "Nothing changes without your consent" in page
    assert "<button" not in text(operator.get(where)).split("<main")[1].split("</main")[0]
    assert "Declined" in text(customer.post(f"{where}/decline", follow=True))
    contract.refresh_from_db()
    assert contract.ends_at == day


def test_who_signs_for_later_is_told_from_when_and_the_order_form_says_fabric(market, browser):
    client = browser(market.customer)
    wanted = quotes.Request("reserved", 16, level="spine", starts_at=minute(2), ends_at=minute(12))
    made = quotes.quote(factories.actor(market.customer), market.listing.pk, wanted, now=timezone.now())
    page = text(client.post(f"/quotes/{made.public_id}/accept", follow=True))
    assert f"Signed. 16 GPUs are yours from {minute(2):%-d %b %Y}" in page.split("<h1>")[0]
    assert "submit a job" not in page.split("<h1>")[0]
    paper = made.contract.documents.get()
    shown = text(client.get(f"/contracts/{made.contract.public_id}/documents/{paper.public_id}"))
    assert "16 × H100-SXM, in one fabric" in shown


def test_the_terms_of_service_are_ticked_once(market, browser):
    buyer = factories.organization("Newcomer", terms=False)
    client = browser(buyer)

    def firm():
        made = quotes.quote(
            factories.actor(buyer), market.listing.pk, quotes.Request("on_demand", 1), now=timezone.now()
        )
        return f"/quotes/{made.public_id}"

    first = firm()
    assert f'name="terms_version" value="{documents.CURRENT}"' in text(client.get(first))
    answer = client.post(f"{first}/accept")
    assert (answer.status_code, "has not been accepted" in answer.content.decode()) == (409, True)
    assert client.post(f"{first}/accept", {"terms_version": documents.CURRENT}).status_code == 302
    assert "terms_version" not in text(client.get(firm()))
    assert documents.terms().digest in text(browser().get("/terms"))
    assert browser().get("/terms/1999-01-01").status_code == 404
