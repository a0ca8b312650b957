"""Spot's intervals: how each price came about. To read, for the operator at its own listings and for our own people."""

from django.contrib import admin
from unfold.decorators import display

from marketplace.admin import look
from marketplace.admin.base import RowsInline, StaffAdmin, TenantAdmin
from marketplace.admin.doors import operator_site, staff_site
from marketplace.models import SpotInterval, SpotResult


class Results(RowsInline):
    model = SpotResult
    fields = ("contract", "limit_price", "price", "wanted_milli", "won_milli", "outcome", "reason")
    verbose_name_plural = "results"


class _Intervals(look.Shown):
    list_display = ("start", "listing", "shown_market_price", "shown_floor", "shown_gpus", "shown_carried")
    list_select_related = ("listing",)
    ordering = ("-start", "-id")
    fields = (
        "listing", "cell", "gpu_model", "start", "shown_market_price", "shown_floor", "shown_gpus", "shown_carried", "closed_at",
    )  # fmt: skip
    readonly_fields = ("shown_market_price", "shown_floor", "shown_gpus", "shown_carried")

    @display(description="Price", ordering="price")
    def shown_market_price(self, row: SpotInterval) -> str:
        return look.price(row.price, row.currency)

    @display(description="Floor", ordering="floor")
    def shown_floor(self, row: SpotInterval) -> str:
        return look.price(row.floor, row.currency)

    @display(description="Sold, wanted, for sale")
    def shown_gpus(self, row: SpotInterval) -> str:
        return f"{row.sold_milli / 1000:g} of {row.demand_milli / 1000:g}, {row.supply_milli / 1000:g} GPUs"

    @display(description="How", ordering="carried")
    def shown_carried(self, row: SpotInterval) -> str:
        return "carried on" if row.carried else "auctioned"


@admin.register(SpotInterval, site=operator_site)
class SpotIntervalAdmin(_Intervals, TenantAdmin):
    reads = "listings:read"
    list_filter = ("listing", "carried")


@admin.register(SpotInterval, site=staff_site)
class StaffSpotIntervalAdmin(_Intervals, StaffAdmin):
    list_filter = ("carried", "cell")
    inlines = (Results,)
