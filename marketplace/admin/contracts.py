"""What an operator has sold, and what runs at its sites: to read. The buyer is named; what it runs is its own business."""

from typing import Any

from django.contrib import admin
from unfold.decorators import display

from marketplace.admin import look
from marketplace.admin.base import RowsInline, TenantAdmin
from marketplace.admin.doors import operator_site
from marketplace.models import Contract, ContractEvent, Placement, PlacementEvent


class ContractEvents(RowsInline):
    model = ContractEvent
    fields = ("at", "from_state", "to_state", "reason")
    verbose_name_plural = "events"


@admin.register(Contract, site=operator_site)
class ContractAdmin(look.Shown, TenantAdmin):
    reads = "contracts:read"
    list_display = (
        "shown_id",
        "shown_buyer",
        "site",
        "kind",
        "gpu_count",
        "gpu_model",
        "shown_price",
        "starts_at",
        "ends_at",
        "shown_state",
    )
    list_select_related = ("organization", "site", "gpu_model")
    list_filter = ("site", "kind", "state", "listing")
    ordering = ("-id",)
    inlines = (ContractEvents,)
    fields = (
        "shown_id", "shown_buyer", "listing", "site", "kind", "gpu_model", "gpu_count", "starts_at", "ends_at", "shown_price",
        "fee_permille", "eviction_notice_s", "flexible_hours_per_month", "flexible_notice_s", "listing_version", "shown_state",
        "created_at", "ended_at",
    )  # fmt: skip
    readonly_fields = ("shown_id", "shown_buyer", "shown_price", "shown_state")

    @display(description="Buyer")
    def shown_buyer(self, row: Contract) -> str:
        return row.organization.name


class PlacementEvents(RowsInline):
    model = PlacementEvent
    fields: tuple[str, ...] = ("at", "from_state", "to_state", "reason")
    verbose_name_plural = "events"


@admin.register(Placement, site=operator_site)
class PlacementAdmin(look.Shown, TenantAdmin):
    reads = "sites:read"
    list_display = (
        "shown_id",
        "site",
        "host",
        "shown_gpus",
        "shown_kind",
        "shown_state",
        "running_at",
        "release_requested_at",
    )
    list_select_related = ("site", "host", "contract")
    list_filter = ("site", "state")
    search_fields = ("host__name",)
    ordering = ("-id",)
    inlines = (PlacementEvents,)
    fields = (
        "shown_id", "site", "host", "shown_kind", "shown_gpus", "gpu_milli", "vram_mib", "vcpu_milli", "ram_mib", "watts_delta",
        "shown_state", "desired", "reason", "created_at", "granted_at", "running_at", "release_requested_at", "finished_at", "exit_code",
    )  # fmt: skip
    readonly_fields = ("shown_id", "shown_kind", "shown_gpus", "shown_state")

    @display(description="Contract", ordering="contract__kind")
    def shown_kind(self, row: Placement) -> str:
        return str(row.contract.kind)

    @display(description="GPUs")
    def shown_gpus(self, row: Any) -> str:
        return ", ".join(map(str, row.gpu_indices)) or "none"
