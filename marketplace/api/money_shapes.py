"""What the API answers about money, for the OpenAPI document: invoices, cards, usage, payouts, and the staff's counts."""

from drf_spectacular.utils import OpenApiExample, extend_schema_serializer
from rest_framework import serializers

from billing.models import Invoice, InvoiceLine, Payout
from marketplace.api.shapes import MoneyShape, page_of
from marketplace.models import BillingStanding

INVOICE = {
    "id": "ivc_7k2m9x4q8w3e", "object": "invoice", "number": 42, "kind": "period", "state": "open",
    "period_start": "2026-10-01T00:00:00Z", "period_end": "2026-11-01T00:00:00Z",
    "total": {"amount_minor": 148_800, "currency": "USD"}, "due": {"amount_minor": 148_800, "currency": "USD"},
    "legal_entity": "Tailrace Inc.", "created_at": "2026-11-01T00:05:00Z", "finalized_at": "2026-11-01T00:05:00Z",
    "paid_at": None, "stripe_invoice": None, "pay_url": "", "last_error": "", "actions": ["pay"],
}  # fmt: skip


@extend_schema_serializer(examples=[OpenApiExample("open", INVOICE, response_only=True)], many=False)
class InvoiceShape(serializers.Serializer):
    id = serializers.CharField()
    object = serializers.CharField()
    number = serializers.IntegerField(allow_null=True, help_text="null until it is finalized; without gaps")
    kind = serializers.ChoiceField(Invoice.Kind.choices)
    state = serializers.ChoiceField(Invoice.State.choices)
    period_start = serializers.DateTimeField()
    period_end = serializers.DateTimeField()
    total = MoneyShape()
    due = MoneyShape(help_text="the total less the credit applied")
    legal_entity = serializers.CharField()
    created_at = serializers.DateTimeField()
    finalized_at = serializers.DateTimeField(allow_null=True)
    paid_at = serializers.DateTimeField(allow_null=True)
    stripe_invoice = serializers.CharField(allow_null=True)
    pay_url = serializers.CharField(allow_blank=True, help_text="Stripe's page: pay, or confirm with the bank")
    last_error = serializers.CharField(allow_blank=True)
    actions = serializers.ListField(child=serializers.CharField(), help_text="what is legal now")


class InvoiceLineShape(serializers.Serializer):
    id = serializers.CharField()
    contract = serializers.CharField()
    kind = serializers.ChoiceField(InvoiceLine.Kind.choices)
    adjustment = serializers.BooleanField(help_text="usage of an earlier period that came or changed late")
    description = serializers.CharField()
    period_start = serializers.IntegerField(help_text="seconds since 1970")
    period_end = serializers.IntegerField(help_text="seconds since 1970")
    milli_gpu_seconds = serializers.IntegerField()
    energy_wh = serializers.IntegerField(
        allow_null=True,
        help_text="drawn by the work behind it, the site's cooling aside; null: not known, or behind another line",
    )
    price_millionths_per_gpu_hour = serializers.IntegerField()
    amount = MoneyShape()
    operator_share = MoneyShape()
    seller_share = MoneyShape(help_text="of capacity that another customer sold on; below zero: credited to you")
    platform_fee = MoneyShape()


class InvoiceDetailShape(InvoiceShape):
    lines = InvoiceLineShape(many=True)


class PreviewLineShape(serializers.Serializer):
    contract = serializers.CharField()
    kind = serializers.ChoiceField(InvoiceLine.Kind.choices)
    milli_gpu_seconds = serializers.IntegerField()
    amount = MoneyShape()


class PreviewShape(serializers.Serializer):
    object = serializers.CharField()
    period_start = serializers.DateTimeField()
    period_end = serializers.DateTimeField()
    total = MoneyShape()
    lines = PreviewLineShape(many=True)
    error = serializers.CharField(allow_blank=True)


class CardShape(serializers.Serializer):
    brand = serializers.CharField()
    last4 = serializers.CharField()
    expires = serializers.CharField(help_text="YYYY-MM")


class PaymentMethodShape(serializers.Serializer):
    object = serializers.CharField()
    card = CardShape(allow_null=True)
    standing = serializers.ChoiceField(BillingStanding.State.choices)


class LinkShape(serializers.Serializer):
    object = serializers.CharField()
    url = serializers.CharField(help_text="a page of Stripe; send the person there")


class UsageRecordShape(serializers.Serializer):
    id = serializers.CharField()
    object = serializers.CharField()
    contract = serializers.CharField()
    placement = serializers.CharField()
    meter = serializers.CharField()
    revision = serializers.IntegerField(help_text="the newest of an interval counts")
    start_s = serializers.IntegerField(help_text="seconds since 1970")
    end_s = serializers.IntegerField(help_text="seconds since 1970, not included")
    rate = serializers.IntegerField(help_text="per second")
    quantity = serializers.IntegerField(help_text="in the meter's unit")
    source = serializers.CharField()  # type: ignore[assignment]  # a column's name; DRF's own attribute is the instance's


class PayoutShape(serializers.Serializer):
    id = serializers.CharField()
    object = serializers.CharField()
    amount = MoneyShape()
    state = serializers.ChoiceField(Payout.State.choices)
    stripe_transfer = serializers.CharField(allow_null=True)
    last_error = serializers.CharField(allow_blank=True)
    created_at = serializers.DateTimeField()
    sent_at = serializers.DateTimeField(allow_null=True)


class PayoutAccountShape(serializers.Serializer):
    object = serializers.CharField()
    stripe_account = serializers.CharField(allow_null=True)
    transfers_enabled = serializers.BooleanField()
    waiting = MoneyShape(many=True, help_text="earned and not paid out yet, by currency")


class ClosedShape(serializers.Serializer):
    invoice = InvoiceShape(allow_null=True, help_text="null: there was nothing to bill")


class CountsField(serializers.DictField):
    child = serializers.IntegerField()


class InvariantsShape(serializers.Serializer):
    object = serializers.CharField()
    invariants = CountsField(help_text="each must be zero")
    ledger = CountsField(help_text="minor units by account, debit positive")
    trial_balance = CountsField(help_text="by currency; each must be zero")
    open_cases = serializers.IntegerField()
    jobs = CountsField(help_text="by state")
    placements = CountsField(help_text="by state")
    outbox = CountsField(help_text="by topic")
    parked = serializers.IntegerField()


class ReconciliationShape(serializers.Serializer):
    object = serializers.CharField()
    swept = CountsField()
    compared = CountsField()


InvoicePage = page_of("Invoice", InvoiceShape)
UsagePage = page_of("UsageRecord", UsageRecordShape)
PayoutPage = page_of("Payout", PayoutShape)
