"""Mails: each kind is text and HTML with the same words, leads where one can act, and keeps what is secret to itself."""

import re
from datetime import timedelta

import pytest
from django.test import Client
from django.utils import timezone

from billing import tasks as billing_tasks
from billing.models import BillingAccount, Invoice
from marketplace.models import Amendment, Contract, OutboxMessage
from marketplace.services import contracts, mails
from marketplace.services.contracts import notices
from tests import factories
from tests.factories import NOW
from tests.marketplace.trade import DAY, END, accept, ask, rate

pytestmark = pytest.mark.django_db


def links(html):
    return re.findall(r'href="([^"]+)"', html)


def path_of(url, settings):
    assert url.startswith(settings.PUBLIC_URL + "/")
    return url.removeprefix(settings.PUBLIC_URL)


@pytest.fixture
def contract(listing, customer):
    return accept(customer, ask(customer, listing))


@pytest.mark.parametrize("what", sorted(notices.SUBJECTS))
def test_every_kind_is_text_and_html_and_leads_to_a_page_that_opens(contract, customer, settings, what):
    settings.PUBLIC_URL = "https://tailrace.example"
    contract.organization.name = "A & <b>"
    letter = notices.letter(contract, what, "Because <i>of</i> it.", now=NOW)
    text, html = mails.render(letter)
    assert contract.public_id in letter.subject
    assert "Because <i>of</i> it." in text
    assert "Because &lt;i&gt;of&lt;/i&gt; it." in html
    (link,) = links(html)
    assert link in text
    for name, value in letter.facts:
        assert f"{name}: {value}" in text
    assert ("A & <b>" in text, "A &amp; &lt;b&gt;" in html, "<b>" in html) == (
        (False, False, False) if what in notices.OPERATORS else (True, True, False)
    )
    reader = Client()
    reader.force_login(factories.member(contract.operator if what in notices.OPERATORS else customer).user)
    contract.operator.__class__.objects.filter(pk=contract.operator_id).update(is_operator=True)
    assert reader.get(path_of(link, settings)).status_code == 200


def whats(contract):
    rows = OutboxMessage.objects.filter(topic=contracts.NOTICE, payload__contract=contract.pk)
    return sorted(rows.values_list("payload__what", flat=True))


def test_signing_and_changing_are_told_with_their_papers(contract, customer, listing):
    assert whats(contract) == ["signed"]
    order_form = contract.documents.get()
    assert order_form.public_id in notices.letter(contract, "signed", "", now=NOW).path
    actor = factories.actor(customer)
    proposal = contracts.amendments.extend(actor, contract, END + DAY, now=NOW)
    contracts.accept_amendment(actor, proposal, now=NOW)
    contract.refresh_from_db()
    assert whats(contract) == ["extended", "signed"]
    letter = notices.letter(contract, "extended", "", now=NOW)
    assert contract.documents.get(kind="amendment").public_id in letter.path
    assert ("Until", f"{END + DAY:%-d %b %Y %H:%M} UTC") in letter.facts


@pytest.mark.parametrize("accepted", [True, False])
def test_a_price_rise_asks_and_tells_the_operator_what_was_answered(listing, customer, accepted, mailoutbox):
    contract = accept(customer, rate(customer, listing))
    seller = factories.member(contract.operator).user
    buyer = factories.member(customer).user
    operator = factories.actor(contract.operator)
    row = contracts.prices.propose(operator, contract, 3_000_000, NOW + 40 * DAY, now=NOW, reason="dearer power")
    asked = OutboxMessage.objects.get(payload__what="price_proposed").payload
    contracts.send_notice(contract.pk, asked["what"], asked["detail"])
    (mail,) = mailoutbox
    assert mail.to == [buyer.email]
    assert f"/contracts/{contract.public_id}/amendments/{row.public_id}" in mail.body
    assert "Accept or decline" in mail.body
    assert "dearer power" in mail.body
    answer = contracts.accept_amendment if accepted else contracts.decline_amendment
    answer(factories.actor(customer), row, now=NOW + DAY)
    told = OutboxMessage.objects.get(payload__what__in=["price_accepted", "price_declined"]).payload
    assert told["what"] == ("price_accepted" if accepted else "price_declined")
    contracts.send_notice(contract.pk, told["what"], told["detail"])
    assert mailoutbox[1].to == [seller.email]
    if accepted:
        contracts.clock(NOW + 41 * DAY)
        assert "price_applied" in whats(contract)
        assert Contract.objects.get(pk=contract.pk).price == 3_000_000
    assert Amendment.objects.get().state == ("accepted" if accepted else "declined")


def test_what_comes_by_the_dozen_is_gathered(contract):
    for _ in range(3):
        notices.tell([contract.pk], "outbid", "x")
    message = OutboxMessage.objects.get(payload__what="outbid")
    assert message.available_at > timezone.now() + timedelta(seconds=200)


@pytest.mark.parametrize("pay_url", ["", "https://pay.stripe.example/x"])
def test_a_reminder_names_the_amount_and_leads_to_paying(customer, pay_url):
    account = BillingAccount.objects.create(organization=customer, currency="USD", created_at=NOW)
    invoice = Invoice.objects.create(
        account=account, organization=customer, kind="period", legal_entity="Tailrace Inc.", currency="USD", due_minor=12_345,
        period_start=NOW - 30 * DAY, period_end=NOW, created_at=NOW, pay_url=pay_url, last_error="Your card was declined.",
    )  # fmt: skip
    text, html = mails.render(billing_tasks.reminder(invoice))
    assert "123.45" in text
    assert "Your card was declined." in html
    assert links(html) == [pay_url or f"http://127.0.0.1:8000/invoices/{invoice.public_id}"]
