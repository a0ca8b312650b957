"""Every list x cursors and limits that nobody gave out: 400 with our error and its field, never a 500, never a page."""

import base64
import json

import pytest

from marketplace.api import pagination
from marketplace.errors import MarketError
from marketplace.services import search
from tests import factories
from tests.contracts.test_matrix import url_of
from tests.matrix import ROUTES, World

pytestmark = pytest.mark.django_db


def packed(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode()


FORGED = {
    "no base64": "nonsense!",
    "not ASCII": "é",
    "cut": packed("17")[:3],
    "empty inside": "====",
    "no number": packed("x"),
    "negative": packed("-1"),
    "zero": packed("0"),
    "a sign": packed("+17"),
    "blanks": packed(" 17 "),
    "underscores": packed("1_7"),
    "other digits": packed("١٧"),
    "a float": packed("17.0"),
    "infinite": packed("1e400"),
    "past 64 bits": packed(str(1 << 63)),
    "past all bits": packed("9" * 5000),
    "a NUL": packed("17\0"),
    "half a character": base64.urlsafe_b64encode(b"\xff\xfe").decode(),
    **{
        f"JSON {json.dumps(value)[:30]}": packed(json.dumps(value))
        for value in (
            None, True, [], {}, [17, 17], [None, 17], ["2026-11-02T12:00:00Z", 17], ["2026-13-45T99:99:99Z", 17], ["\0", 17],
            [{"a": 1}, 17], [17, None], [17, "17"], [17, 1 << 70], ["price", 1 << 70, 1], ["price", "x", 1], ["price", None, None],
            ["price", 17.5, 1], ["price", True, 1], [["price"], 1, 1],
        )
    },
    "JSON, deep": packed("[" * 5000),
}  # fmt: skip


def answer(client, url, **query):
    """(status, code, what is wrong)."""
    body = client.get(url, query).json()
    return body.get("status"), body.get("code"), [e["pointer"] for e in body.get("errors", ())]


@pytest.mark.parametrize("about", FORGED)
def test_nothing_but_our_own_is_read(about):
    text = FORGED[about]
    for read in (pagination._decode, lambda cursor: search._decode(cursor, "price")):
        with pytest.raises(MarketError) as refused:
            read(text)
        assert (refused.value.code, list(refused.value.fields)) == ("invalid_request", ["/cursor"])


def test_our_own_are_read():
    for pk in (1, 17, (1 << 63) - 1):
        assert pagination._decode(pagination._encode(pk)) == pk
        assert search._decode(search._encode("price", 1_000_000, pk >> 1), "price") == (1_000_000, pk >> 1)


def test_every_list_refuses_what_it_did_not_give():
    world = World()
    client = factories.client(user=world.members["owner"].user)
    client.raise_request_exception = False
    lists = 0
    for route in ROUTES:
        if not route.is_api or route.method != "GET" or route.outside:
            continue
        url = url_of(route, world)
        shown = client.get(url)
        if shown["Content-Type"] != "application/json" or not {"data", "has_more", "cursor"} <= shown.json().keys():
            continue
        lists += 1
        for about in ("no base64", "past 64 bits", 'JSON ["2026-13-45T99:99:99Z", 17]'):
            assert answer(client, url, cursor=FORGED[about]) == (400, "invalid_request", ["/cursor"]), (url, about)
        for limit in ("0", "9" * 5000):
            assert answer(client, url, limit=limit) == (400, "invalid_request", ["/limit"]), (url, limit)
    assert lists >= 20


@pytest.mark.parametrize("path", ["jobs", "contracts", "invoices", "usage", "keys", "team"])
def test_a_page_refuses_it_too(path):
    client = factories.client(factories.organization())
    client.raise_request_exception = False
    assert client.get(f"/{path}").status_code == 200
    assert [client.get(f"/{path}", {"before": text}).status_code for text in ("job_x", "\0", "9" * 5000)] == [400] * 3
