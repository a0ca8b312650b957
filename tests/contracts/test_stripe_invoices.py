"""Invoices as the product mirrors them: built, compared, finalized, collected, corrected."""

import uuid

import pytest
import stripe

pytestmark = pytest.mark.serverless


def test_mirror_road_from_draft_to_paid(api, customer, card, open_invoice):
    card(customer)
    invoice = open_invoice(customer, 12_345, 655, -1_000)
    assert (invoice.status, invoice.total, invoice.amount_due) == ("open", 12_000, 12_000)
    assert invoice.number
    assert invoice.hosted_invoice_url
    paid = api.v1.invoices.pay(invoice.id)
    assert (paid.status, paid.amount_paid, paid.amount_remaining) == ("paid", 12_000, 0)
    read = api.v1.invoices.retrieve(invoice.id, {"expand": ["payments"]})
    payment = read.payments.data[0]
    assert payment.status == "paid"
    intent = api.v1.payment_intents.retrieve(
        payment.payment.payment_intent, {"expand": ["latest_charge.balance_transaction"]}
    )
    assert (intent.status, intent.amount_received) == ("succeeded", 12_000)
    transaction = intent.latest_charge.balance_transaction
    assert transaction.net == transaction.amount - transaction.fee == 12_000 - transaction.fee


def test_our_own_number_is_kept_and_unique(api, customer):
    number = f"TR-{uuid.uuid4().hex[:10].upper()}"
    first = api.v1.invoices.create({"customer": customer.id, "number": number, "auto_advance": False})
    assert api.v1.invoices.finalize_invoice(first.id).number == number
    with pytest.raises(stripe.InvalidRequestError):
        api.v1.invoices.create({"customer": customer.id, "number": number, "auto_advance": False})


def test_quantity_times_unit_price_rounds_half_away_from_zero(api, customer):
    draft = api.v1.invoices.create({"customer": customer.id, "currency": "usd", "auto_advance": False})
    item = api.v1.invoice_items.create(
        {"customer": customer.id, "invoice": draft.id, "currency": "usd", "quantity": 3, "unit_amount_decimal": "0.5"}
    )
    assert item.amount == 2
    assert api.v1.invoices.retrieve(draft.id).total == 2


def test_pending_items_stay_out_unless_included(api, customer):
    api.v1.invoice_items.create({"customer": customer.id, "amount": 700, "currency": "usd"})
    without = api.v1.invoices.create({"customer": customer.id, "pending_invoice_items_behavior": "exclude"})
    assert without.total == 0
    including = api.v1.invoices.create({"customer": customer.id, "pending_invoice_items_behavior": "include"})
    assert including.total == 700


def test_at_most_250_lines(api, customer):
    draft = api.v1.invoices.create({"customer": customer.id, "currency": "usd", "auto_advance": False})
    lines = [{"amount": 1, "description": str(i)} for i in range(250)]
    for start in range(0, 250, 50):
        api.v1.invoices.add_lines(draft.id, {"lines": lines[start : start + 50]})
    with pytest.raises(stripe.InvalidRequestError):
        api.v1.invoices.add_lines(draft.id, {"lines": lines[:1]})
    assert api.v1.invoices.retrieve(draft.id).total == 250
    listed = list(api.v1.invoices.line_items.list(draft.id, {"limit": 100}).auto_paging_iter())
    assert sum(line.amount for line in listed) == 250
    assert len({line.id for line in listed}) == 250


def test_a_finalized_invoice_is_not_edited(api, customer, open_invoice):
    invoice = open_invoice(customer, 500)
    with pytest.raises(stripe.InvalidRequestError):
        api.v1.invoices.add_lines(invoice.id, {"lines": [{"amount": 1}]})
    with pytest.raises(stripe.InvalidRequestError):
        api.v1.invoices.delete(invoice.id)
    with pytest.raises(stripe.InvalidRequestError):
        api.v1.invoices.finalize_invoice(invoice.id)


def test_a_draft_can_be_deleted(api, customer):
    draft = api.v1.invoices.create({"customer": customer.id, "auto_advance": False})
    assert api.v1.invoices.delete(draft.id).deleted is True
    with pytest.raises(stripe.InvalidRequestError) as gone:
        api.v1.invoices.retrieve(draft.id)
    assert (gone.value.http_status, gone.value.code) == (404, "resource_missing")


def test_without_a_card_paying_is_refused(api, customer, open_invoice):
    with pytest.raises(stripe.InvalidRequestError):
        api.v1.invoices.pay(open_invoice(customer, 500).id)


def test_paying_twice_is_refused(api, customer, card, open_invoice):
    card(customer)
    invoice = open_invoice(customer, 500)
    api.v1.invoices.pay(invoice.id)
    with pytest.raises(stripe.InvalidRequestError):
        api.v1.invoices.pay(invoice.id)


def test_a_declined_card_leaves_the_invoice_open(api, customer, card, open_invoice):
    card(customer, "pm_card_chargeCustomerFail")
    invoice = open_invoice(customer, 500)
    with pytest.raises(stripe.CardError) as declined:
        api.v1.invoices.pay(invoice.id)
    assert declined.value.code == "card_declined"
    read = api.v1.invoices.retrieve(invoice.id)
    assert (read.status, read.attempt_count, read.amount_remaining) == ("open", 1, 500)
    good = api.v1.payment_methods.attach("pm_card_visa", {"customer": customer.id})
    assert api.v1.invoices.pay(invoice.id, {"payment_method": good.id}).status == "paid"


def test_3d_secure_on_an_invoice_asks_for_the_customer(api, customer, card, open_invoice):
    card(customer, "pm_card_authenticationRequired")
    invoice = open_invoice(customer, 500)
    with pytest.raises(stripe.CardError) as asked:
        api.v1.invoices.pay(invoice.id)
    assert asked.value.code == "invoice_payment_intent_requires_action"
    read = api.v1.invoices.retrieve(invoice.id, {"expand": ["payments.data.payment.payment_intent"]})
    assert read.status == "open"
    assert read.payments.data[0].payment.payment_intent.status == "requires_action"


def test_void_is_final(api, customer, open_invoice):
    invoice = open_invoice(customer, 500)
    assert api.v1.invoices.void_invoice(invoice.id).status == "void"
    with pytest.raises(stripe.InvalidRequestError):
        api.v1.invoices.pay(invoice.id)
    with pytest.raises(stripe.InvalidRequestError):
        api.v1.invoices.void_invoice(invoice.id)


def test_an_uncollectible_invoice_may_still_be_paid(api, customer, card, open_invoice):
    invoice = open_invoice(customer, 500)
    assert api.v1.invoices.mark_uncollectible(invoice.id).status == "uncollectible"
    card(customer)
    assert api.v1.invoices.pay(invoice.id).status == "paid"


def test_paid_out_of_band(api, customer, open_invoice):
    paid = api.v1.invoices.pay(open_invoice(customer, 500).id, {"paid_out_of_band": True})
    assert paid.status == "paid"


def test_a_zero_invoice_is_paid_when_it_is_finalized(api, customer, open_invoice):
    assert open_invoice(customer, 500, -500).status == "paid"


def test_credit_note_before_payment_lowers_what_is_due(api, customer, card, open_invoice):
    card(customer)
    invoice = open_invoice(customer, 900)
    note = api.v1.credit_notes.create({"invoice": invoice.id, "amount": 300, "reason": "order_change"})
    assert (note.type, note.pre_payment_amount) == ("pre_payment", 300)
    assert api.v1.invoices.retrieve(invoice.id).amount_remaining == 600
    with pytest.raises(stripe.InvalidRequestError):
        api.v1.credit_notes.create({"invoice": invoice.id, "amount": 601})
    assert api.v1.invoices.pay(invoice.id).amount_paid == 600


def test_a_voided_credit_note_makes_the_amount_due_again(api, customer, card, open_invoice):
    card(customer)
    invoice = open_invoice(customer, 900)
    note = api.v1.credit_notes.create({"invoice": invoice.id, "amount": 300})
    assert api.v1.credit_notes.void_credit_note(note.id).status == "void"
    assert api.v1.invoices.retrieve(invoice.id).amount_remaining == 900
    assert api.v1.invoices.pay(invoice.id).amount_paid == 900


def test_credit_note_after_payment_refunds(api, customer, card, open_invoice):
    card(customer)
    invoice = open_invoice(customer, 900)
    api.v1.invoices.pay(invoice.id)
    with pytest.raises(stripe.InvalidRequestError):
        api.v1.credit_notes.create({"invoice": invoice.id, "amount": 300})
    note = api.v1.credit_notes.create(
        {"invoice": invoice.id, "amount": 300, "refund_amount": 300, "memo": "SLA credit"}
    )
    assert (note.type, note.post_payment_amount) == ("post_payment", 300)
    refund = api.v1.refunds.retrieve(note.refunds[0].refund)
    assert refund.amount == 300
    with pytest.raises(stripe.InvalidRequestError):
        api.v1.credit_notes.create({"invoice": invoice.id, "amount": 700, "refund_amount": 700})


def test_invoices_are_listed_by_customer_and_status(api, customer, open_invoice):
    first, second = open_invoice(customer, 100), open_invoice(customer, 200)
    api.v1.invoices.void_invoice(first.id)
    assert [i.id for i in api.v1.invoices.list({"customer": customer.id, "status": "open"}).data] == [second.id]
    assert len(api.v1.invoices.list({"customer": customer.id}).data) == 2


def test_automatic_tax_is_added_by_line(sandbox):
    """Our rates are for show, so real Stripe is not asked; the arithmetic between the fields is Stripe's."""
    api = sandbox.client()
    customer = api.v1.customers.create({"address": {"country": "US", "state": "TX"}})
    draft = api.v1.invoices.create({"customer": customer.id, "currency": "usd", "automatic_tax": {"enabled": True}})
    invoice = api.v1.invoices.add_lines(draft.id, {"lines": [{"amount": 1_000}, {"amount": 333}]})
    assert (invoice.subtotal, invoice.total) == (1_333, 1_333 + 63 + 21)  # 6.25 % of each line, half away from zero
    assert invoice.automatic_tax.status == "complete"
    assert sum(t.amount for t in invoice.total_taxes) == 84
    assert api.v1.invoices.finalize_invoice(draft.id).amount_due == 1_417
    exempt = api.v1.customers.create({"address": {"country": "DE"}, "tax_exempt": "reverse"})
    draft = api.v1.invoices.create({"customer": exempt.id, "currency": "eur", "automatic_tax": {"enabled": True}})
    invoice = api.v1.invoices.add_lines(draft.id, {"lines": [{"amount": 1_000}]})
    assert (invoice.total, invoice.total_taxes[0].taxability_reason) == (1_000, "reverse_charge")


def test_payments_of_an_invoice_and_the_sweep_by_time(api, customer, card, open_invoice):
    method = card(customer)
    invoice = open_invoice(customer, 800)
    api.v1.invoices.pay(invoice.id, {"payment_method": method.id, "off_session": True})
    payments = api.v1.invoice_payments.list({"invoice": invoice.id}).data
    assert [(p.invoice, p.status, p.amount_paid, p.payment.type) for p in payments] == [
        (invoice.id, "paid", 800, "payment_intent")
    ]
    swept = api.v1.invoices.list({"created": {"gte": invoice.created}, "limit": 100})
    assert invoice.id in {i.id for i in swept.auto_paging_iter()}
    events = api.v1.events.list({"created": {"gte": invoice.created}, "limit": 100})
    assert ("invoice.paid", invoice.id) in {(e.type, e.data.object.id) for e in events.auto_paging_iter()}
