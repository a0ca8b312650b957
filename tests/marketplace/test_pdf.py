"""Papers as PDF files: the same content as the HTML, its hash, numbered pages; made once and kept; nobody else's."""

import re

import pytest
from django.db import IntegrityError, transaction

from marketplace.models import DocumentFile
from marketplace.services import documents, pdf
from tests import factories
from tests.factories import NOW
from tests.marketplace.trade import DAY, accept, ask

pytestmark = pytest.mark.django_db
HTML = (
    "<h2>Parties</h2><dl class='facts'><dt>Customer</dt><dd>Łódź &amp; <b>Co</b></dd></dl>"
    "<ul><li>One\n  line</li></ul><p>Stays.</p>"
)


def render(html=HTML, **more):
    return pdf.render(**{"title": "Order form", "html": html, "digest": "d" * 64, "kept": "Kept.", **more})


def pages(body):
    return body.count(b"/Type /Page\n")


def test_every_word_of_the_paper_is_in_it(listing, customer):
    assert pdf.blocks(HTML) == [
        ("heading", "Parties"), ("name", "Customer"), ("value", "Łódź & Co"), ("item", "One line"), ("text", "Stays."),
    ]  # fmt: skip
    paper = accept(customer, ask(customer, listing)).documents.get()
    plain = " ".join(re.sub(r"<[^>]+>", " ", paper.html).split())
    said = " ".join(text for _, text in pdf.blocks(paper.html)).replace("&", "&amp;")
    assert re.sub(r"\s", "", said) == re.sub(r"\s", "", plain)


def test_it_names_itself_and_is_the_same_bytes_each_time():
    body = render(title="Order form ctr_1")
    assert body.startswith(b"%PDF-")
    assert b"/Title (Order form ctr_1)" in body
    assert b"/Lang (en)" in body
    assert b"/DisplayDocTitle true" in body
    assert b"sha256:" + b"d" * 64 in body
    assert b"/Title (Parties)" in body  # the outline
    assert body == render(title="Order form ctr_1")
    assert body != render(title="Order form ctr_1", html=HTML + "<p>More.</p>")


def test_long_papers_have_several_numbered_pages():
    assert pages(render()) == 1
    assert pages(render("<p>word</p>" * 200)) > 2


@pytest.mark.parametrize("name", ["北京 GmbH", "Δelta", "A<script>", "", "x" * 400])
def test_no_name_breaks_it(name):
    from html import escape

    assert render(f"<dl><dt>Customer</dt><dd>{escape(name)}</dd></dl>").startswith(b"%PDF-")


def test_it_is_made_once_and_kept(listing, customer):
    paper = accept(customer, ask(customer, listing)).documents.get()
    first = documents.file_of(paper, now=NOW)
    again = documents.file_of(paper, now=NOW + DAY)
    assert (bytes(first.body), again.created_at) == (bytes(again.body), NOW)
    with pytest.raises(IntegrityError, match="append-only"), transaction.atomic():
        DocumentFile.objects.update(body=b"")


def test_both_sides_download_it_and_a_stranger_does_not(listing, customer):
    contract = accept(customer, ask(customer, listing))
    paper = contract.documents.get()
    base = f"/api/v1/contracts/{contract.public_id}"
    answers = [
        factories.client(side).get(path, headers={"Accept": "application/pdf"})
        for side in (customer, contract.operator)
        for path in (f"{base}/documents/{paper.public_id}/pdf", f"{base}/order-form.pdf")
    ]
    assert {(a.status_code, a["Content-Type"]) for a in answers} == {(200, "application/pdf")}
    assert len({a.content for a in answers}) == 1
    assert f'filename="{paper.public_id}.pdf"' in answers[0]["Content-Disposition"]
    stranger = factories.client(factories.organization()).get(f"{base}/order-form.pdf")
    assert (stranger.status_code, stranger["Content-Type"]) == (404, "application/problem+json")
    assert stranger.json()["code"] == "not_found"
    page = factories.client(customer)
    assert page.get(f"/contracts/{contract.public_id}/documents/{paper.public_id}/pdf").content == answers[0].content
    assert "PDF" in page.get(f"/contracts/{contract.public_id}").content.decode()
    terms = factories.client().get(f"/terms/{documents.CURRENT}/pdf")
    assert terms.content.startswith(b"%PDF-")
    assert factories.client().get("/terms/1999-01-01/pdf").status_code == 404
