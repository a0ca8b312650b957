"""The forward market: what customers sell on of an operator's capacity, and, for our own people, bids and sales. To read."""

from django.contrib import admin
from unfold.decorators import display

from marketplace.admin import look
from marketplace.admin.base import RowsInline, StaffAdmin, TenantAdmin
from marketplace.admin.doors import operator_site, staff_site
from marketplace.models import Fill, Resale, StandingBid


class Sales(RowsInline):
    model = Fill
    fields = ("at", "gpu_count", "price", "currency", "undone_at")
    verbose_name_plural = "sales"


class _Resales(look.Shown):
    list_display = (
        "shown_id",
        "shown_seller",
        "contract",
        "shown_sold",
        "shown_price",
        "starts_at",
        "ends_at",
        "shown_state",
    )
    list_select_related = ("organization", "contract")
    ordering = ("-id",)
    inlines = (Sales,)
    fields = (
        "shown_id", "shown_seller", "contract", "listing", "shown_sold", "shown_price", "fee_permille", "starts_at", "ends_at",
        "expires_at", "shown_state", "reason", "created_at", "closed_at",
    )  # fmt: skip
    readonly_fields = ("shown_id", "shown_seller", "shown_sold", "shown_price", "shown_state")

    @display(description="Seller")
    def shown_seller(self, row: Resale) -> str:
        return row.organization.name

    @display(description="Sold")
    def shown_sold(self, row: Resale) -> str:
        return f"{row.sold_gpus} of {row.gpu_count} GPUs"


@admin.register(Resale, site=operator_site)
class ResaleAdmin(_Resales, TenantAdmin):
    reads = "contracts:read"
    list_filter = ("state",)


@admin.register(Resale, site=staff_site)
class StaffResaleAdmin(_Resales, StaffAdmin):
    list_filter = ("state",)


@admin.register(StandingBid, site=staff_site)
class StandingBidAdmin(look.Shown, StaffAdmin):
    list_display = (
        "shown_id",
        "organization",
        "gpu_model",
        "region",
        "gpu_count",
        "filled_gpus",
        "shown_limit",
        "expires_at",
        "shown_state",
    )
    list_select_related = ("organization", "gpu_model")
    list_filter = ("state", "auto_accept", "livemode")
    ordering = ("-id",)

    @display(description="Limit", ordering="limit_price")
    def shown_limit(self, row: StandingBid) -> str:
        return look.price(row.limit_price, row.currency)


@admin.register(Fill, site=staff_site)
class FillAdmin(look.Shown, StaffAdmin):
    list_display = ("at", "gpu_model", "region", "gpu_count", "shown_price", "contract", "resale", "bid", "undone_at")
    list_select_related = ("gpu_model", "contract", "resale__contract", "bid")
    list_filter = ("livemode",)
    ordering = ("-id",)
