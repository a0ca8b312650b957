"""Invoices: list, one with its lines, the usage behind it as CSV, and paying an open one."""

from collections.abc import Iterator

from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.shortcuts import render
from django.urls import path, reverse
from django.utils import timezone

from billing import invoices as service
from billing import line_energy, payments
from billing.models import Invoice, InvoiceLine
from marketplace import ids
from marketplace.errors import MarketError
from marketplace.services.availability import instant
from marketplace.web.base import actor_of, done, failed, listed, page, row_of
from marketplace.web.usage import so_far

SHOWN_LINES = 250


@page(GET="billing:read")
def invoices(request: HttpRequest) -> HttpResponse:
    rows = Invoice.objects.owned_by(actor_of(request).organization_id)
    context = {"page": listed(request, rows, Invoice.PREFIX), "so_far": so_far(request)}
    return render(request, "invoices.html", context)


def _invoice(request: HttpRequest, public_id: str) -> Invoice:
    rows = Invoice.objects.owned_by(actor_of(request).organization_id).select_related("account", "organization")
    found: Invoice = row_of(rows, Invoice.PREFIX, public_id)
    return found


@page(GET="billing:read")
def invoice(request: HttpRequest, invoice: str) -> HttpResponse:
    row = _invoice(request, invoice)
    lines = list(row.lines.select_related("contract__listing").order_by("position")[: SHOWN_LINES + 1])
    drew = line_energy.of_lines(lines[:SHOWN_LINES])
    context = {
        "row": row,
        "lines": [
            {"row": each, "start": instant(each.start_s), "end": instant(each.end_s), "wh": drew.get(each.pk)}
            for each in lines[:SHOWN_LINES]
        ],
        "more": len(lines) > SHOWN_LINES,
        "payments": row.payments.order_by("-attempt")[:10],
        "payable": row.state == Invoice.State.OPEN,
    }
    return render(request, "invoice.html", context)


@page(GET="billing:read")
def usage_csv(request: HttpRequest, invoice: str) -> HttpResponse:
    """Every record behind every line: what a customer checks the bill against."""
    row = _invoice(request, invoice)
    name = row.display_number or row.public_id
    response = StreamingHttpResponse(_csv(row), content_type="text/csv; charset=utf-8")
    response["Content-Disposition"] = f'attachment; filename="{name}-usage.csv"'
    return response  # type: ignore[return-value]


def _csv(row: Invoice) -> Iterator[str]:
    yield "line,contract,placement,start,end,milli_gpu,milli_gpu_seconds,revision\n"
    for line in InvoiceLine.objects.owned_by(row.organization_id).filter(invoice=row).order_by("position"):
        for record in service.records_of(line):
            contract, placement = ids.encode("ctr", record.contract_id), ids.encode("plc", record.placement_id)
            yield (
                f"{line.public_id},{contract},{placement},{record.start_s},{record.end_s},{record.rate},{record.quantity},"
                f"{record.revision}\n"
            )


@page(POST="billing:write")
def pay(request: HttpRequest, invoice: str) -> HttpResponse:
    row = _invoice(request, invoice)
    here = reverse("web:invoice", args=[row.public_id])
    try:
        payments.pay_again(row, now=timezone.now())
    except MarketError as error:
        return failed(request, error, here)
    return done(request, "Paid.", here)


urlpatterns = [
    path("invoices", invoices, name="invoices"),
    path("invoices/<str:invoice>", invoice, name="invoice"),
    path("invoices/<str:invoice>/usage.csv", usage_csv, name="invoice-usage"),
    path("invoices/<str:invoice>/pay", pay, name="invoice-pay"),
]
