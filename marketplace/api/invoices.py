"""Invoices: list, show with lines, the running preview, and the usage behind each line."""

from typing import Any

from django.http import HttpResponse
from django.urls import path
from django.utils import timezone
from drf_spectacular.utils import extend_schema
from rest_framework.request import Request
from rest_framework.response import Response

from billing import invoices, line_energy, payments
from billing.models import Invoice, InvoiceLine
from marketplace import ids
from marketplace.api.base import Resource
from marketplace.api.money_shapes import InvoiceDetailShape, InvoicePage, InvoiceShape, PreviewShape
from marketplace.api.shapes import amount


def shown(row: Invoice) -> dict[str, Any]:
    return {
        "id": row.public_id,
        "object": "invoice",
        "number": row.number,
        "kind": row.kind,
        "state": row.state,
        "period_start": row.period_start,
        "period_end": row.period_end,
        "total": amount(row.total_minor, row.currency),
        "due": amount(row.due_minor, row.currency),
        "legal_entity": row.legal_entity,
        "created_at": row.created_at,
        "finalized_at": row.finalized_at,
        "paid_at": row.paid_at,
        "stripe_invoice": row.stripe_invoice,
        "pay_url": row.pay_url,
        "last_error": row.last_error,
        "actions": ["pay"] if row.state == Invoice.State.OPEN else [],
    }


def line(row: InvoiceLine, currency: str, energy_wh: int | None) -> dict[str, Any]:
    return {
        "id": row.public_id,
        "contract": ids.encode("ctr", row.contract_id),
        "kind": row.kind,
        "adjustment": row.adjustment,
        "description": row.description,
        "period_start": row.start_s,
        "period_end": row.end_s,
        "milli_gpu_seconds": row.quantity,
        "energy_wh": energy_wh,
        "price_millionths_per_gpu_hour": row.price_millionths,
        "amount": amount(row.amount_minor, currency),
        "operator_share": amount(row.operator_minor, currency),
        "seller_share": amount(row.seller_minor, currency),
        "platform_fee": amount(row.platform_minor, currency),
    }


class InvoiceResource(Resource):
    model_queryset = Invoice.objects.all()
    prefix = Invoice.PREFIX
    filters = {"state": "state", "kind": "kind"}

    def represent(self, row: Invoice) -> dict[str, Any]:
        return shown(row)


class Invoices(InvoiceResource):
    actions = {"GET": "billing:read"}

    @extend_schema(tags=["billing"], operation_id="invoices_list", responses={200: InvoicePage})
    def get(self, request: Request) -> Response:
        return self.listing(request)


class Preview(InvoiceResource):
    actions = {"GET": "billing:read"}

    @extend_schema(tags=["billing"], operation_id="invoices_preview", responses={200: PreviewShape})
    def get(self, request: Request) -> Response:  # noqa: ARG002
        """What an invoice closed now would say, running seconds included."""
        draft = invoices.preview(self.organization(), timezone.now())
        currency = draft.account.currency
        rows = [
            {
                "contract": row.contract.public_id,
                "kind": row.line.kind,
                "milli_gpu_seconds": row.line.quantity,
                "amount": amount(row.line.amount, currency),
            }
            for row in draft.lines
        ]
        return Response(
            {
                "object": "invoice_preview",
                "period_start": draft.start,
                "period_end": draft.end,
                "total": amount(draft.total_minor, currency),
                "lines": rows,
                "error": draft.error,
            }
        )


class InvoiceDetail(InvoiceResource):
    actions = {"GET": "billing:read"}

    @extend_schema(tags=["billing"], operation_id="invoices_show", responses={200: InvoiceDetailShape})
    def get(self, request: Request, invoice: str) -> Response:  # noqa: ARG002
        row = self.row(invoice)
        lines = list(row.lines.order_by("position"))
        drew = line_energy.of_lines(lines)
        return Response({**shown(row), "lines": [line(each, row.currency, drew.get(each.pk)) for each in lines]})


class InvoicePay(InvoiceResource):
    actions = {"POST": "billing:write"}

    @extend_schema(tags=["billing"], operation_id="invoices_pay", request=None, responses={200: InvoiceShape})
    def post(self, request: Request, invoice: str) -> Response:  # noqa: ARG002
        """Try the default card again now."""
        row = self.row(invoice)
        payments.pay_again(row, now=timezone.now())
        row.refresh_from_db()
        return Response(shown(row))


class InvoiceUsage(InvoiceResource):
    """The usage behind an invoice, as CSV: one row a record, every line traceable to its placements."""

    actions = {"GET": "billing:read"}

    @extend_schema(tags=["billing"], operation_id="invoices_usage", responses={(200, "text/csv"): str})
    def get(self, request: Request, invoice: str) -> HttpResponse:  # noqa: ARG002
        row = self.row(invoice)
        out = ["line,contract,placement,start,end,milli_gpu,milli_gpu_seconds,revision"]
        for each in row.lines.order_by("position"):
            out += [
                f"{each.public_id},{ids.encode('ctr', r.contract_id)},{ids.encode('plc', r.placement_id)},{r.start_s},{r.end_s},"
                f"{r.rate},{r.quantity},{r.revision}"
                for r in invoices.records_of(each)
            ]
        return HttpResponse("\n".join(out) + "\n", content_type="text/csv")


urlpatterns = [
    path("invoices", Invoices.as_view(), name="invoices"),
    path("invoices/preview", Preview.as_view(), name="invoice-preview"),
    path("invoices/<str:invoice>", InvoiceDetail.as_view(), name="invoice"),
    path("invoices/<str:invoice>/pay", InvoicePay.as_view(), name="invoice-pay"),
    path("invoices/<str:invoice>/usage", InvoiceUsage.as_view(), name="invoice-usage"),
]
