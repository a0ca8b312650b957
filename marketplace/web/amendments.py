"""A contract's changes and papers: propose, look, accept or decline; the order form to print; the terms of service."""

from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import render
from django.urls import path, reverse
from django.utils import timezone

from marketplace.errors import MarketError
from marketplace.models import Amendment, ContractDocument
from marketplace.services import contracts as service
from marketplace.services import documents
from marketplace.web.base import actor_of, done, failed, page, row_of
from marketplace.web.contracts import contract_of
from marketplace.web.forms import AmendForm, millionths


@page(POST="contracts:write")
def propose(request: HttpRequest, contract: str) -> HttpResponse:
    row = contract_of(request, contract)
    here = reverse("web:contract", args=[row.public_id])
    form = AmendForm(request.POST)
    if not form.is_valid():
        return failed(request, MarketError("invalid_request", " ".join(form.wrong())), here)
    asked, actor, now = form.cleaned_data, actor_of(request), timezone.now()
    try:
        if asked["kind"] == Amendment.Kind.EXTEND:
            made = service.amendments.extend(actor, row, asked["ends_at"], now=now)
        elif asked["kind"] == Amendment.Kind.RESIZE:
            made = service.amendments.resize(actor, row, asked["gpu_count"], now=now)
        else:
            price = millionths(asked["price"]) or 0
            made = service.prices.propose(actor, row, price, asked["effective_at"], now=now, reason=asked["reason"])
    except MarketError as error:
        error.detail += _instead(error)
        return failed(request, error, here)
    return done(request, "Proposed.", _page_of(made))


def _instead(error: MarketError) -> str:
    """What would fit, in words."""
    found = error.extra.get("alternatives") or {}
    until, count, others = found.get("ends_at"), found.get("gpu_count"), found.get("listings") or ()
    words = [f"It could go on until {until:%-d %b %Y %H:%M} UTC." if until else ""]
    words.append(f"{count} GPUs in all would fit." if count else "")
    words.append("Other GPUs of this offer are free then: ask for another quote." if found.get("quote") else "")
    words += [f"{other['title']} has room for another contract." for other in others[:1]]
    return "".join(f" {w}" for w in words if w)


def _page_of(row: Amendment) -> str:
    return reverse("web:amendment", args=[row.contract.public_id, row.public_id])


def _amendment(request: HttpRequest, contract: str, public_id: str) -> Amendment:
    of = contract_of(request, contract)
    rows = Amendment.objects.visible_to(actor_of(request)).filter(contract=of).select_related("contract__listing")
    found: Amendment = row_of(rows, Amendment.PREFIX, public_id)
    return found


@page(GET="contracts:read")
def amendment(request: HttpRequest, contract: str, amendment: str) -> HttpResponse:
    row = _amendment(request, contract, amendment)
    now = timezone.now()
    actions = service.amendment_actions(row, actor_of(request), now)
    firm_s = max(0, int((row.answer_by - now).total_seconds()))
    return render(
        request, "amendment.html",
        {"row": row, "contract": row.contract, "actions": actions, "firm_s": firm_s, "price": row.kind == "price"},
    )  # fmt: skip


@page(POST="contracts:write")
def accept(request: HttpRequest, contract: str, amendment: str) -> HttpResponse:
    row = _amendment(request, contract, amendment)
    try:
        service.accept_amendment(actor_of(request), row, now=timezone.now())
    except MarketError as error:
        error.detail += _instead(error)
        return failed(request, error, _page_of(row))
    return done(request, "Accepted; its paper stands below.", reverse("web:contract", args=[row.contract.public_id]))


@page(POST="contracts:write")
def decline(request: HttpRequest, contract: str, amendment: str) -> HttpResponse:
    row = _amendment(request, contract, amendment)
    here = reverse("web:contract", args=[row.contract.public_id])
    try:
        service.decline_amendment(actor_of(request), row, now=timezone.now())
    except MarketError as error:
        return failed(request, error, _page_of(row))
    return done(request, "Declined. The old price holds until that day; the contract ends then.", here)


@page(GET="contracts:read")
def document(request: HttpRequest, contract: str, document: str) -> HttpResponse:
    of = contract_of(request, contract)
    rows = ContractDocument.objects.visible_to(actor_of(request)).filter(contract=of)
    row: ContractDocument = row_of(rows, ContractDocument.PREFIX, document)
    return render(request, "paper.html", {"row": row, "contract": of})


@page(GET="contracts:read")
def document_pdf(request: HttpRequest, contract: str, document: str) -> HttpResponse:
    of = contract_of(request, contract)
    rows = ContractDocument.objects.visible_to(actor_of(request)).filter(contract=of)
    row: ContractDocument = row_of(rows, ContractDocument.PREFIX, document)
    file = documents.file_of(row, now=timezone.now())
    return pdf_answer(bytes(file.body), row.public_id)


def pdf_answer(body: bytes, name: str) -> HttpResponse:
    return HttpResponse(
        body, content_type="application/pdf", headers={"Content-Disposition": f'attachment; filename="{name}.pdf"'}
    )


@page(GET="public")
def terms_pdf(request: HttpRequest, version: str) -> HttpResponse:  # noqa: ARG001
    try:
        return pdf_answer(documents.terms_file(version), f"terms-{version}")
    except MarketError as error:
        raise Http404 from error


@page(GET="public")
def terms(request: HttpRequest, version: str = documents.CURRENT) -> HttpResponse:
    try:
        found = documents.terms(version)
    except MarketError as error:
        raise Http404 from error
    return render(request, "terms.html", {"terms": found, "current": documents.CURRENT})


urlpatterns = [
    path("contracts/<str:contract>/amend", propose, name="contract-amend"),
    path("contracts/<str:contract>/amendments/<str:amendment>", amendment, name="amendment"),
    path("contracts/<str:contract>/amendments/<str:amendment>/accept", accept, name="amendment-accept"),
    path("contracts/<str:contract>/amendments/<str:amendment>/decline", decline, name="amendment-decline"),
    path("contracts/<str:contract>/documents/<str:document>", document, name="document"),
    path("contracts/<str:contract>/documents/<str:document>/pdf", document_pdf, name="document-pdf"),
    path("terms", terms, name="terms"),
    path("terms/<str:version>/pdf", terms_pdf, name="terms-pdf"),
    path("terms/<str:version>", terms, name="terms-version"),
]
