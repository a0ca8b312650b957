"""How Stripe says no, how it answers the same key twice, and how it pages."""

import uuid

import pytest
import stripe

pytestmark = pytest.mark.serverless


def raw(api, path, **params):
    return api.raw_request("post", path, **params)


def test_an_unknown_parameter_is_400(api):
    with pytest.raises(stripe.InvalidRequestError) as refused:
        raw(api, "/v1/customers", bogus=1)
    assert (refused.value.http_status, refused.value.code, refused.value.param) == (400, "parameter_unknown", "bogus")


def test_an_unknown_nested_parameter_is_named(api, customer):
    with pytest.raises(stripe.InvalidRequestError) as refused:
        raw(
            api,
            "/v1/invoiceitems",
            customer=customer.id,
            amount=5,
            currency="usd",
            period={"start": 1, "end": 2, "mid": 1},
        )
    assert refused.value.param == "period[mid]"


def test_a_missing_parameter_is_named(api):
    with pytest.raises(stripe.InvalidRequestError) as refused:
        raw(api, "/v1/transfers", amount=5, destination="acct_x")
    assert (refused.value.code, refused.value.param) == ("parameter_missing", "currency")


def test_a_fraction_of_a_cent_is_no_integer(api, customer):
    with pytest.raises(stripe.InvalidRequestError) as refused:
        raw(api, "/v1/invoiceitems", customer=customer.id, currency="usd", amount="12.5")
    assert (refused.value.code, refused.value.param) == ("parameter_invalid_integer", "amount")


def test_a_value_outside_an_enum(api, customer):
    with pytest.raises(stripe.InvalidRequestError) as refused:
        raw(api, "/v1/invoices", customer=customer.id, collection_method="by_force")
    assert refused.value.param == "collection_method"


def test_an_unknown_id_is_404(api):
    with pytest.raises(stripe.InvalidRequestError) as gone:
        api.v1.customers.retrieve("cus_nowhere")
    assert (gone.value.http_status, gone.value.code) == (404, "resource_missing")


def test_an_unknown_id_among_the_parameters_is_400(api):
    with pytest.raises(stripe.InvalidRequestError) as gone:
        api.v1.invoices.create({"customer": "cus_nowhere"})
    assert (gone.value.http_status, gone.value.code, gone.value.param) == (400, "resource_missing", "customer")


def test_an_unknown_url(api):
    with pytest.raises(stripe.InvalidRequestError) as gone:
        raw(api, "/v1/nonsense")
    assert gone.value.http_status == 404


def test_a_bad_key_is_401(sandbox):
    with pytest.raises(stripe.AuthenticationError) as refused:
        sandbox.client("sk_wrong_key_0000").v1.customers.list()
    assert refused.value.http_status == 401
    sandbox.control("faults", {"api_keys": ["sk_test_only_this_one"]})
    with pytest.raises(stripe.AuthenticationError):
        sandbox.client().v1.customers.list()
    assert sandbox.client("sk_test_only_this_one").v1.customers.list() is not None


def test_the_same_key_answers_the_same(api):
    key = {"idempotency_key": uuid.uuid4().hex}
    first = api.v1.customers.create({"name": "Once"}, key)
    again = api.v1.customers.create({"name": "Once"}, key)
    assert again.id == first.id
    assert again.last_response.headers["idempotent-replayed"] == "true"
    assert first.last_response.headers.get("idempotent-replayed") is None


def test_the_same_key_with_other_parameters_is_an_error(api):
    key = {"idempotency_key": uuid.uuid4().hex}
    api.v1.customers.create({"name": "Once"}, key)
    with pytest.raises(stripe.IdempotencyError) as refused:
        api.v1.customers.create({"name": "Twice"}, key)
    assert refused.value.http_status == 400
    assert refused.value.error.type == "idempotency_error"


def test_a_decline_is_replayed_too(api, customer, card):
    method = card(customer, "pm_card_chargeCustomerFail")
    key = {"idempotency_key": uuid.uuid4().hex}
    asked = {
        "amount": 700, "currency": "usd", "customer": customer.id, "payment_method": method.id, "confirm": True, "off_session": True,
    }  # fmt: skip
    seen = []
    for _ in range(2):
        with pytest.raises(stripe.CardError) as declined:
            api.v1.payment_intents.create(asked, key)
        seen.append(declined.value.error.payment_intent.id)
    assert seen[0] == seen[1]


def test_a_request_that_failed_its_checks_does_not_burn_its_key(api):
    key = uuid.uuid4().hex
    with pytest.raises(stripe.InvalidRequestError):
        api.raw_request("post", "/v1/customers", bogus=1, idempotency_key=key)
    assert api.v1.customers.create({"name": "Fine"}, {"idempotency_key": key}).name == "Fine"


def test_lists_page_newest_first_without_gap_or_repeat(api, customer):
    made = [
        api.v1.invoice_items.create({"customer": customer.id, "amount": i, "currency": "usd"}).id for i in range(1, 8)
    ]
    first = api.v1.invoice_items.list({"customer": customer.id, "limit": 3})
    assert first.has_more is True
    paged = [i.id for i in api.v1.invoice_items.list({"customer": customer.id, "limit": 3}).auto_paging_iter()]
    assert paged == made[::-1]
    back = api.v1.invoice_items.list({"customer": customer.id, "limit": 2, "ending_before": paged[4]})
    assert [i.id for i in back.data] == paged[2:4]


def test_created_bounds(api, customer):
    inside = api.v1.customers.list({"created": {"gte": customer.created}, "limit": 100}).data
    assert customer.id in {c.id for c in inside}
    assert customer.id not in {c.id for c in api.v1.customers.list({"created": {"gt": customer.created + 60}}).data}


def test_expanding_nonsense_is_refused(api, customer):
    with pytest.raises(stripe.InvalidRequestError):
        api.v1.customers.retrieve(customer.id, {"expand": ["nonsense"]})


def test_metadata_has_limits(api):
    with pytest.raises(stripe.InvalidRequestError):
        api.v1.customers.create({"metadata": {"k" * 41: "v"}})
    with pytest.raises(stripe.InvalidRequestError):
        api.v1.customers.create({"metadata": {str(i): "v" for i in range(51)}})


def test_events_tell_what_happened(api, customer, open_invoice):
    invoice = open_invoice(customer, 500)
    api.v1.invoices.void_invoice(invoice.id)
    events = api.v1.events.list({"types": ["invoice.finalized", "invoice.voided"], "limit": 20}).data
    mine = [e for e in events if e.data.object.id == invoice.id]
    assert {e.type for e in mine} == {"invoice.finalized", "invoice.voided"}
    one = api.v1.events.retrieve(mine[0].id)
    assert one.data.object.id == invoice.id
    assert one.created >= customer.created
