"""The checker itself, and that every route of the fake is a route of the pinned SDK with the SDK's own parameters."""

import re
from pathlib import Path

import pytest
import stripe

from sandbox.stripe import answers, resources, schema
from sandbox.stripe.app import ROUTES
from sandbox.stripe.errors import ApiError
from sandbox.stripe.forms import decode

pytestmark = pytest.mark.serverless
resources.load()


@pytest.fixture(scope="module")
def sdk_calls() -> set[tuple[str, str, str]]:
    """(method, path shape, params class) of every call in the SDK's service classes."""
    found = set()
    root = Path(stripe.__file__).parent
    for source in root.rglob("_*_service.py"):
        text = source.read_text()
        for body in re.split(r"\n    (?:async )?def ", text)[1:]:
            params = re.search(r'params: (?:Optional\[)?"(\w+)"', body)
            request = re.search(r'_request(?:_async)?\(\s*"(\w+)",\s*"([^"]+)"', body)
            if params and request:
                found.add((request.group(1).upper(), re.sub(r"\{\w+\}", "{}", request.group(2)), params.group(1)))
    assert len(found) > 400
    return found


@pytest.mark.parametrize("route", ROUTES, ids=lambda r: f"{r.method} {r.path}")
def test_every_route_is_the_sdks(route, sdk_calls):
    assert (route.method, re.sub(r"\{\w+\}", "{}", route.path), route.params.split(".")[-1]) in sdk_calls


def test_form_decoding():
    assert decode("a[b][0]=1&a[b][1]=2&c=&d[]=x&d[]=y") == {
        "a": {"b": {"0": "1", "1": "2"}},
        "c": "",
        "d": {"0": "x", "1": "y"},
    }
    with pytest.raises(ValueError, match="both"):
        decode("a=1&a[b]=2")


def test_strings_become_what_the_schema_says():
    checked = schema.check_request(
        "InvoiceAddLinesParams",
        decode("lines[0][amount]=-5&lines[0][period][start]=1&lines[0][period][end]=2&lines[1][discountable]=true"),
    )
    assert checked == {"lines": [{"amount": -5, "period": {"start": 1, "end": 2}}, {"discountable": True}]}


@pytest.mark.parametrize(
    ("params", "form", "param"),
    [
        ("TransferCreateParams", "currency=usd&destination=a&source_type=gold", "source_type"),
        ("TransferCreateParams", "currency=usd&destination=a&amount=1e3", "amount"),
        ("TransferCreateParams", "currency=usd&destination=a&api_key=sk_test_x", "api_key"),
        ("TransferCreateParams", "currency=usd&destination=a&metadata=x", "metadata"),
        ("InvoiceCreateParams", "customer=c&auto_advance=yes", "auto_advance"),
        ("InvoiceAddLinesParams", "lines[0][period][start]=1", "lines[0][period][end]"),
        ("InvoiceItemCreateParams", "customer=c&unit_amount_decimal=abc", "unit_amount_decimal"),
    ],
)
def test_what_does_not_fit_is_named(params, form, param):
    with pytest.raises(ApiError) as refused:
        schema.check_request(params, decode(form))
    assert (refused.value.status, refused.value.error["param"]) == (400, param)


GOOD = {
    "id": "trr_1", "object": "transfer_reversal", "amount": 5, "created": 1, "currency": "usd", "transfer": "tr_1",
}  # fmt: skip


def test_an_answer_gets_its_nullable_fields():
    out = answers.complete(GOOD)
    assert out["balance_transaction"] is None
    assert set(out) == set(answers.resource_fields(stripe.TransferReversal)) - answers.INCLUDABLE


@pytest.mark.parametrize(
    "change",
    [{"amount": 5.0}, {"amount": "5"}, {"amount": True}, {"amount": None}, {"colour": "red"}, {"object": "nonsense"}],
)
def test_a_wrong_answer_is_caught(change):
    with pytest.raises(answers.ContractError):
        answers.complete(GOOD | change)


def test_an_answer_without_a_required_field_is_caught():
    with pytest.raises(answers.ContractError, match="currency: missing"):
        answers.complete({k: v for k, v in GOOD.items() if k != "currency"})


def test_an_enum_is_checked_in_answers():
    intent = {
        "id": "seti_1", "object": "setup_intent", "created": 1, "livemode": False, "payment_method_types": ["card"], "usage": "off_session",
    }  # fmt: skip
    assert answers.complete(intent | {"status": "succeeded"})["customer"] is None
    with pytest.raises(answers.ContractError, match="flying"):
        answers.complete(intent | {"status": "flying"})
