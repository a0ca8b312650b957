"""Hosts, for our own people: to read, and to say that sick GPUs are well where no benchmark can."""

from typing import Any

from django import forms
from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest
from unfold.decorators import display

from marketplace.admin import look
from marketplace.admin.base import StaffAdmin
from marketplace.admin.doors import staff_site
from marketplace.admin.hosts import GpuRows, VerificationRows
from marketplace.admin.moves import Call, Move
from marketplace.models import Gpu, Host
from marketplace.services import gpu_health, gpu_rule


class WellForm(forms.Form):
    why = forms.CharField(max_length=200, label="How we know", help_text="Stands in the audit trail.")


def _sick(row: Host) -> list[Gpu]:
    return sorted((gpu for gpu in row.gpus.all() if not gpu.healthy), key=lambda gpu: gpu.index)


def _well(call: Call) -> str:
    host = gpu_health.well(call.row, actor=call.actor, now=call.now, why=call.values["why"])
    return f"{host.name}: all GPUs count as well; the host is {host.state}."


class SickFilter(admin.SimpleListFilter):
    title = "GPUs"
    parameter_name = "gpus"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:  # noqa: ARG002
        return [("sick", "some sick")]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Host]) -> QuerySet[Host]:  # noqa: ARG002
        return queryset.filter(gpu_rule.SICK) if self.value() == "sick" else queryset


@admin.register(Host, site=staff_site)
class StaffHostAdmin(look.Shown, StaffAdmin):
    list_display = (
        "name",
        "site",
        "gpu_model",
        "gpu_count",
        "shown_state",
        "shown_sick",
        "shown_since",
        "shown_beat",
        "listing",
    )
    list_select_related = ("site", "gpu_model", "listing")
    list_filter = (SickFilter, "state", "site", "gpu_model")
    search_fields = ("name", "site__name")
    ordering = ("site", "name")
    fields = (
        "name", "site", "listing", "gpu_model", "gpu_count", "shown_state", "state_reason", "leaves_at", "shown_beat", "leaf", "spine",
        "power_state", "reserved_w", "measured_w",
    )  # fmt: skip
    inlines = (GpuRows, VerificationRows)
    above = "desk/sick.html"
    moves = (
        Move(
            name="well", label="GPUs are well", action="audit:read", run=_well, form=WellForm, icon="healing",
            possible=lambda row: bool(_sick(row)),
            question="Nothing uses its sick GPUs until a benchmark passes on them. Say it in its place only where you know more than a "
            "benchmark would: the host is back at work by this.",
        ),
    )  # fmt: skip

    def get_queryset(self, request: HttpRequest) -> QuerySet[Host]:
        return super().get_queryset(request).prefetch_related("gpus")

    def more(self, request: HttpRequest, row: Host) -> dict[str, Any]:  # noqa: ARG002
        return {"sick": _sick(row), "repair": gpu_health.REPAIR}

    @display(description="State", ordering="state", label=look.TONES)
    def shown_state(self, row: Host) -> str:
        return row.state

    @display(description="Sick GPUs")
    def shown_sick(self, row: Host) -> str:
        return gpu_rule.words(_sick(row)) or "–"

    @display(description="Since")
    def shown_since(self, row: Host) -> str:
        since = min((gpu.sick_at for gpu in _sick(row) if gpu.sick_at), default=None)
        return look.ago(since) if since else "–"

    @display(description="Heard", ordering="beat_at")
    def shown_beat(self, row: Any) -> str:
        return look.ago(row.beat_at)
