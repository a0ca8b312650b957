"""Our own people's view of money: cases, invoices, payments, payouts and the ledger. Only cases have an action."""

from typing import Any

from django.contrib import admin
from django.db.models import Sum
from django.http import HttpRequest
from unfold.decorators import display

from billing import invoices
from billing.models import (
    BillingAccount,
    BillingCase,
    Invoice,
    InvoiceLine,
    LedgerAccount,
    LedgerTransaction,
    Payment,
    Payout,
    Posting,
)
from marketplace.admin import look
from marketplace.admin.base import RowsInline, StaffAdmin
from marketplace.admin.doors import staff_site
from marketplace.admin.money import PayoutLines
from marketplace.admin.moves import Call, Move
from marketplace.services import audit


def _close(call: Call) -> str:
    """A parked account is billed again by it; of the other kinds, the case alone is closed."""
    invoices.close_case(call.row, now=call.now, closed_by=call.actor.label)
    audit.record(
        call.actor, "billing_case.closed", call.row.public_id, now=call.now, organization_id=call.row.organization_id,
        before={"kind": call.row.kind, "subject": call.row.subject}, after={"closed": True},
    )  # fmt: skip
    return f"Case {call.row.public_id} is closed."


def _unpark(call: Call) -> str:
    invoices.unpark(call.row, now=call.now, closed_by=call.actor.label)
    audit.record(
        call.actor, "billing_account.unparked", call.row.public_id, now=call.now, organization_id=call.row.organization_id,
        before={"state": "parked"}, after={"state": "open"},
    )  # fmt: skip
    return f"{call.row.organization} is billed again."


@admin.register(BillingCase, site=staff_site)
class BillingCaseAdmin(look.Shown, StaffAdmin):
    list_display = ("shown_id", "kind", "organization", "subject", "detail", "opened_at", "shown_open")
    list_select_related = ("organization",)
    list_filter = ("kind", ("closed_at", admin.EmptyFieldListFilter))
    search_fields = ("subject", "detail", "organization__name")
    ordering = ("closed_at", "-id")
    moves = (
        Move(
            name="close", label="Close the case", action="billing:write", run=_close, icon="task_alt", bulk=True,
            possible=lambda row: row.closed_at is None,
            question="Only when you have looked and put right what it names. A parked account is billed again from here on.",
        ),
    )  # fmt: skip

    @display(description="State", label={"open": "danger", "closed": "success"})
    def shown_open(self, row: BillingCase) -> str:
        return "open" if row.closed_at is None else "closed"


@admin.register(BillingAccount, site=staff_site)
class BillingAccountAdmin(look.Shown, StaffAdmin):
    list_display = (
        "organization",
        "currency",
        "shown_state",
        "shown_dunning",
        "card_brand",
        "card_last4",
        "billed_through",
    )
    list_select_related = ("organization",)
    list_filter = ("state", "dunning")
    search_fields = ("organization__name", "stripe_customer")
    ordering = ("-id",)
    moves = (
        Move(
            name="unpark", label="Bill again", action="billing:write", run=_unpark, icon="play_arrow",
            possible=lambda row: row.state == "parked", question="Its case is closed, and the next closing bills what was left.",
        ),
    )  # fmt: skip

    @display(description="Dunning", label=look.TONES)
    def shown_dunning(self, row: BillingAccount) -> str:
        return row.dunning


class InvoiceLines(RowsInline):
    model = InvoiceLine
    fields = (
        "position",
        "kind",
        "description",
        "shown_price",
        "shown_amount",
        "shown_operator",
        "shown_platform",
        "adjustment",
    )
    verbose_name_plural = "lines"

    def get_queryset(self, request: HttpRequest) -> Any:
        return super().get_queryset(request).select_related("invoice")

    @display(description="Per GPU-hour")
    def shown_price(self, row: InvoiceLine) -> str:
        return look.price(row.price_millionths, row.invoice.currency)

    @display(description="Amount")
    def shown_amount(self, row: InvoiceLine) -> str:
        return look.minor(row.amount_minor, row.invoice.currency)

    @display(description="Operator")
    def shown_operator(self, row: InvoiceLine) -> str:
        return look.minor(row.operator_minor, row.invoice.currency)

    @display(description="Platform")
    def shown_platform(self, row: InvoiceLine) -> str:
        return look.minor(row.platform_minor, row.invoice.currency)


class Payments(look.Shown, RowsInline):
    model = Payment
    fields = ("attempt", "state", "shown_amount", "stripe_payment_intent", "failure_code", "created_at", "settled_at")
    verbose_name_plural = "payments"


@admin.register(Invoice, site=staff_site)
class InvoiceAdmin(look.Shown, StaffAdmin):
    list_display = (
        "__str__",
        "organization",
        "kind",
        "period_start",
        "period_end",
        "shown_total",
        "shown_due",
        "shown_state",
        "paid_at",
    )
    list_select_related = ("organization",)
    list_filter = ("state", "kind")
    search_fields = ("organization__name", "stripe_invoice")
    ordering = ("-id",)
    inlines = (InvoiceLines, Payments)

    @display(description="Total", ordering="total_minor")
    def shown_total(self, row: Invoice) -> str:
        return look.minor(row.total_minor, row.currency)

    @display(description="Due", ordering="due_minor")
    def shown_due(self, row: Invoice) -> str:
        return look.minor(row.due_minor, row.currency)


@admin.register(Payment, site=staff_site)
class PaymentAdmin(look.Shown, StaffAdmin):
    list_display = (
        "shown_id",
        "organization",
        "invoice",
        "attempt",
        "shown_amount",
        "shown_state",
        "failure_code",
        "created_at",
    )
    list_select_related = ("organization", "invoice")
    list_filter = ("state",)
    search_fields = ("organization__name", "stripe_payment_intent")
    ordering = ("-id",)


@admin.register(Payout, site=staff_site)
class StaffPayoutAdmin(look.Shown, StaffAdmin):
    list_display = ("shown_id", "organization", "shown_amount", "shown_state", "created_at", "sent_at", "last_error")
    list_select_related = ("organization",)
    list_filter = ("state",)
    search_fields = ("organization__name", "stripe_transfer")
    ordering = ("-id",)
    inlines = (PayoutLines,)


# --- the ledger
@admin.register(LedgerAccount, site=staff_site)
class LedgerAccountAdmin(StaffAdmin):
    list_display = ("code", "organization", "currency", "shown_balance")
    list_select_related = ("organization",)
    list_filter = ("code", "currency")
    search_fields = ("organization__name", "code")
    ordering = ("code", "organization", "currency")
    fields = ("code", "organization", "currency", "shown_balance")
    readonly_fields = ("shown_balance",)

    def get_changelist_instance(self, request: HttpRequest) -> Any:
        """With the balances of the page's accounts."""
        found = super().get_changelist_instance(request)
        rows = list(found.result_list)
        sums = dict(Posting.objects.filter(account__in=rows).values_list("account").annotate(total=Sum("amount_minor")))
        for row in rows:
            row.balance = sums.get(row.pk, 0)
        found.result_list = rows
        return found

    @display(description="Balance, debit positive")
    def shown_balance(self, row: Any) -> str:
        if not hasattr(row, "balance"):
            row.balance = row.postings.aggregate(total=Sum("amount_minor"))["total"] or 0
        return look.minor(row.balance, row.currency)


class _Posted:
    @display(description="Account")
    def shown_account(self, row: Posting) -> str:
        return f"{row.account.code} {row.account.organization or ''}".strip()

    @display(description="Debit positive", ordering="amount_minor")
    def shown_amount(self, row: Posting) -> str:
        return look.minor(row.amount_minor, row.account.currency)


class Postings(_Posted, RowsInline):
    model = Posting
    fields = readonly_fields = ("shown_account", "shown_amount")

    def get_queryset(self, request: HttpRequest) -> Any:
        return super().get_queryset(request).select_related("account__organization").order_by("pk")


@admin.register(LedgerTransaction, site=staff_site)
class LedgerTransactionAdmin(look.Shown, StaffAdmin):
    list_display = ("key", "kind", "subject", "posting_count", "at", "created_at")
    list_filter = ("kind",)
    search_fields = ("key", "subject")
    ordering = ("-id",)
    inlines = (Postings,)


@admin.register(Posting, site=staff_site)
class PostingAdmin(_Posted, StaffAdmin):
    list_display = ("id", "transaction", "shown_account", "shown_amount")
    list_select_related = ("transaction", "account__organization")
    list_filter = ("account__code", "account__currency")
    search_fields = ("transaction__key", "transaction__subject")
    ordering = ("-id",)
    fields = ("transaction", "shown_account", "shown_amount")
    readonly_fields = ("shown_account", "shown_amount")
