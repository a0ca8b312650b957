"""What an operator has sold, and what runs at its sites: to read, but for the price of what has no end.

The buyer is named; what it runs is its own business.
"""

from typing import Any

from django import forms
from django.contrib import admin
from unfold.decorators import display

from marketplace.admin import look
from marketplace.admin.base import RowsInline, TenantAdmin
from marketplace.admin.doors import operator_site
from marketplace.admin.moves import Call, Move
from marketplace.models import Amendment, Contract, ContractEvent, Kind, Placement, PlacementEvent
from marketplace.services import contracts, terms


class PriceForm(forms.Form):
    price = forms.DecimalField(label="Price per GPU-hour", min_value=0, max_digits=12, decimal_places=6)
    effective_at = forms.DateTimeField(
        label="Counts from (UTC)", required=False, help_text=f"A higher one: at least {terms.PRICE_NOTICE_DAYS} days ahead, to the minute.",
        widget=forms.DateTimeInput(attrs={"type": "datetime-local"}, format="%Y-%m-%dT%H:%M"),
    )  # fmt: skip
    reason = forms.CharField(label="Reason", max_length=200, required=False, help_text="The customer reads it.")


def _propose(call: Call) -> str:
    row = contracts.prices.propose(
        call.actor, call.row, int(call.values["price"] * look.MICRO), call.values["effective_at"], now=call.now,
        reason=call.values["reason"],
    )  # fmt: skip
    if row.state == Amendment.State.ACCEPTED:
        return f"The lower price counts from {row.effective_at:%F %R} UTC; the customer is told."
    return f"The customer is asked, and answers until {row.answer_by:%F %R} UTC."


def _open_ended(row: Contract) -> bool:
    return row.kind == Kind.ON_DEMAND and row.state == Contract.State.ACTIVE and row.ends_at is None


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
    moves = (
        Move(
            name="price", label="Propose a price", action="contracts:write", run=_propose, form=PriceForm, icon="sell",
            possible=_open_ended,
            question="A lower price counts from the next minute. A higher one needs the customer's consent: without it the old price "
            "holds until the day, and the contract ends.",
        ),
    )  # fmt: skip
    fields = (
        "shown_id", "shown_buyer", "listing", "site", "kind", "gpu_model", "gpu_count", "starts_at", "ends_at", "shown_price",
        "fee_permille", "eviction_notice_s", "flexible_hours_per_month", "flexible_notice_s", "emergency_notice_s", "listing_version",
        "shown_state", "created_at", "ended_at",
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
