"""GPU hosts: looked at, drained and put back to work. Their shapes come by CSV import or from the site's agent."""

import re
from datetime import UTC, datetime
from typing import Any

from django import forms
from django.contrib import admin
from django.http import HttpRequest
from django.utils import timezone
from unfold.decorators import display

from marketplace.admin import look
from marketplace.admin.base import RowsInline, TenantAdmin
from marketplace.admin.doors import operator_site
from marketplace.admin.moves import Call, Move
from marketplace.models import Gpu, Host, Verification
from marketplace.services import drains, gpu_health, gpu_rule, job_rules, reliability, sites, verifications


class DrainForm(forms.Form):
    reason = forms.CharField(max_length=120, help_text="Stands on the host and in the audit trail.")
    public = forms.BooleanField(
        required=False,
        label="Customers whose jobs run there may read the reason",
        help_text="Otherwise they read the kind of work and the hours alone.",
    )
    category = forms.ChoiceField(
        label="Kind of work",
        required=False,
        choices=[(key, said[0].upper() + said[1:]) for key, said in drains.CATEGORIES.items()],
    )
    evict = forms.BooleanField(
        required=False,
        label="Ask what runs to leave, too",
        help_text="Checkpoint signal, then its grace, then it is queued again. Otherwise jobs run to their end.",
    )
    by = forms.DateTimeField(
        required=False, label="Leaves at (UTC)", help_text="Until then it takes what is sure to end before. Empty: nothing from now on.",
        widget=forms.DateTimeInput(attrs={"type": "datetime-local"}, format="%Y-%m-%dT%H:%M"),
    )  # fmt: skip

    until = forms.DateTimeField(
        required=False, label="Likely back at (UTC)", help_text="Customers read it; nothing happens at that hour by itself.",
        widget=forms.DateTimeInput(attrs={"type": "datetime-local"}, format="%Y-%m-%dT%H:%M"),
    )  # fmt: skip

    def clean_category(self) -> str:
        return self.cleaned_data["category"] or "other"

    def clean_by(self) -> datetime | None:
        return self._utc("by")

    def clean_until(self) -> datetime | None:
        return self._utc("until")

    def _utc(self, name: str) -> datetime | None:
        given: datetime | None = self.cleaned_data[name]
        return given.replace(tzinfo=UTC) if given is not None else None


class TaintsForm(forms.Form):
    taints = forms.CharField(
        required=False,
        max_length=1000,
        help_text="All that it shall have, by spaces, as dedicated=nlp. Empty: none, and all jobs may come.",
    )

    def clean_taints(self) -> list[str]:
        found = self.cleaned_data["taints"].split()
        wrong = next((taint for taint in found if not re.match(job_rules.TAINT, taint)), None)
        if wrong is not None or len(found) > 16:
            raise forms.ValidationError(
                f"At most 16, each name or name=value of letters, digits and _ . / - ({wrong})."
            )
        return found


def _taint(call: Call) -> str:
    host = sites.set_taints(call.row, actor=call.actor, now=call.now, **call.values)
    return f"{host.name}: {', '.join(host.taints) or 'no taint'}."


def _drain(call: Call) -> str:
    sites.drain_host(call.row, actor=call.actor, now=call.now, **call.values)
    return f"{call.row.name} is draining."


def _undrain(call: Call) -> str:
    sites.undrain_host(call.row, actor=call.actor, now=call.now)
    return f"{call.row.name} is back at work."


def _verify(call: Call) -> str:
    verifications.begin(call.row, actor=call.actor, now=call.now)
    return f"{call.row.name} runs its benchmark; it takes some minutes."


class VerificationRows(RowsInline):
    model = Verification
    fields = (
        "started_at",
        "finished_at",
        "state",
        "reason",
        "score",
        "matmul_gflops",
        "memory_mb_s",
        "fabric_mb_s",
        "asked_by",
    )
    ordering = ("-id",)
    per_page = 10


class GpuRows(RowsInline):
    model = Gpu
    fields = ("index", "serial", "healthy", "last_error", "sick_at", "well_at")
    ordering = ("index",)


@admin.register(Host, site=operator_site)
class HostAdmin(look.Shown, TenantAdmin):
    reads = "sites:read"
    list_display = (
        "name",
        "site",
        "shown_node",
        "gpu_model",
        "shown_gpus",
        "shown_state",
        "power_state",
        "shown_watts",
        "shown_beat",
        "shown_reliability",
        "shown_verification",
        "listing",
    )
    list_select_related = ("site", "power_node__site", "gpu_model", "listing", "reliability", "verification")
    list_filter = ("site", "state", "power_state", "gpu_model", "listing")
    search_fields = ("name", "leaf", "site__name")
    ordering = ("site", "name")
    inlines = (GpuRows, VerificationRows)
    above = "desk/host.html"
    fieldsets = (
        (None, {"fields": ("name", "site", "power_node", "listing", "shown_state", "state_reason", "leaves_at", "taints", "shown_beat")}),
        ("Shape", {"fields": ("gpu_model", "shown_gpus", "vram_mib", "vcpu_milli", "ram_mib", "nvme_gib", "leaf", "spine")}),
        ("Watts", {"fields": (
            "power_state", "desired_power_state", "shown_watts", "reserved_w", "base_w", "parked_w", "gpu_min_w", "gpu_max_w",
            "cap_control",
        )}),
    )  # fmt: skip
    readonly_fields = ("shown_state", "shown_gpus", "shown_watts", "shown_beat")
    moves = (
        Move(
            name="drain", label="Drain", action="sites:write", run=_drain, form=DrainForm, icon="do_not_disturb_on", bulk=True,
            possible=lambda row: row.state == Host.State.ACTIVE, danger=True,
            question="Nothing new is placed here until it is put back to work.",
        ),
        Move(
            name="verify", label="Verify", action="sites:write", run=_verify, icon="speed", bulk=True,
            possible=lambda row: row.state in {Host.State.ACTIVE, Host.State.DRAINING, Host.State.MAINTENANCE},
            question="It runs our benchmark now, on all of its GPUs, for some minutes. Refused where jobs run or customers wait. Out of "
            "work for a sick GPU it is back when the benchmark passes.",
        ),
        Move(
            name="taints", label="Set taints", action="sites:write", run=_taint, form=TaintsForm, icon="block", bulk=True,
            initial=lambda row: {"taints": " ".join(row.taints)},
            possible=lambda row: row.state != Host.State.RETIRED,
            question="From now on only jobs that tolerate all of its taints come here. What runs here stays.",
        ),
        Move(
            name="undrain", label="Put back to work", action="sites:write", run=_undrain, icon="play_arrow", bulk=True,
            possible=lambda row: row.state in {Host.State.DRAINING, Host.State.MAINTENANCE, Host.State.LOST},
            barred=gpu_health.barred,
            question="Jobs may be placed here again.",
        ),
    )  # fmt: skip

    def more(self, request: HttpRequest, row: Host) -> dict[str, Any]:  # noqa: ARG002
        found = getattr(row, "reliability", None)
        return {
            "sick": gpu_rule.sick_on([row.pk]).get(row.pk, []),
            "repair": gpu_health.REPAIR,
            "verification": getattr(row, "verification", None),
            "score": look.permille(found.score_permille) if found else None,
            "parts": [(what, look.permille(share), told) for what, share, told in reliability.said(found)]
            if found
            else [],
            "events": reliability.events(row, now=timezone.now(), limit=20),
        }

    @display(description="Reliability", ordering="reliability__score_permille")
    def shown_reliability(self, row: Host) -> str:
        found = getattr(row, "reliability", None)
        return look.permille(found.score_permille) if found else "new"

    @display(description="Benchmark", ordering="verification__score", label=look.TONES)
    def shown_verification(self, row: Host) -> str:
        found = getattr(row, "verification", None)
        return found.state if found else "unverified"

    @display(description="GPUs free")
    def shown_gpus(self, row: Host) -> str:
        return f"{sum(milli == 1000 for milli in row.gpu_free)} of {row.gpu_count}"

    @display(description="Drawn / booked", ordering="reserved_w")
    def shown_watts(self, row: Host) -> str:
        return f"{look.watts(row.measured_w)} / {look.watts(row.reserved_w)}"

    @display(description="Heard", ordering="beat_at")
    def shown_beat(self, row: Any) -> str:
        return look.ago(row.beat_at)
