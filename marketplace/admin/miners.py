"""ASICs: looked at, and held by hand where dispatch shall leave them alone."""

from typing import Any

from django import forms
from django.contrib import admin
from unfold.decorators import display

from marketplace.admin import look
from marketplace.admin.base import TenantAdmin
from marketplace.admin.doors import operator_site
from marketplace.admin.moves import Call, Move
from marketplace.models import Miner
from marketplace.services import sites


class HoldForm(forms.Form):
    mode = forms.CharField(
        required=False,
        max_length=24,
        help_text="A mode of its ladder, such as sleep. Empty: it keeps the mode that it is in.",
    )


def _hold(call: Call) -> str:
    sites.set_miner_manual(call.row, True, mode=call.values["mode"] or None, actor=call.actor, now=call.now)
    return f"{call.row.name} is held by hand."


def _release(call: Call) -> str:
    sites.set_miner_manual(call.row, False, actor=call.actor, now=call.now)
    return f"{call.row.name} is back in dispatch."


@admin.register(Miner, site=operator_site)
class MinerAdmin(look.Shown, TenantAdmin):
    reads = "sites:read"
    list_display = (
        "name",
        "site",
        "shown_node",
        "model",
        "shown_mode",
        "shown_state",
        "shown_watts",
        "shown_rate",
        "manual",
        "shown_read",
    )
    list_select_related = ("site", "power_node__site")
    list_filter = ("site", "state", "manual", "power_node")
    search_fields = ("name", "model", "address", "site__name")
    ordering = ("site", "name")
    fieldsets = (
        (None, {"fields": ("name", "site", "power_node", "model", "driver", "address")}),
        ("State", {"fields": ("shown_state", "manual", "shown_mode", "shown_ladder", "changed_at")}),
        ("Watts", {"fields": ("commanded_w", "confirmed_w", "measured_w", "reserved_w", "shown_rate", "measured_at")}),
    )
    readonly_fields = ("shown_state", "shown_mode", "shown_ladder", "shown_rate")
    moves = (
        Move(
            name="hold", label="Hold by hand", action="power:write", run=_hold, form=HoldForm, icon="back_hand", bulk=True,
            possible=lambda row: not row.manual,
            question="Dispatch leaves it alone until you give it back. Its watts stay booked.",
        ),
        Move(
            name="release", label="Give back to dispatch", action="power:write", run=_release, icon="autorenew", bulk=True,
            possible=lambda row: row.manual, question="Dispatch decides its mode again.",
        ),
    )  # fmt: skip

    @display(description="Mode", ordering="desired_mode")
    def shown_mode(self, row: Miner) -> str:
        return row.mode_names[row.desired_mode]

    @display(description="Ladder")
    def shown_ladder(self, row: Miner) -> str:
        modes = zip(row.mode_names, row.mode_watts, row.mode_ghs, strict=True)
        return " · ".join(f"{name}: {look.watts(w)}, {ghs // 1000} TH/s" for name, w, ghs in modes)

    @display(description="Drawn / booked", ordering="reserved_w")
    def shown_watts(self, row: Miner) -> str:
        return f"{look.watts(row.measured_w)} / {look.watts(row.reserved_w)}"

    @display(description="TH/s", ordering="measured_ghs")
    def shown_rate(self, row: Miner) -> str:
        return "–" if row.measured_ghs is None else f"{row.measured_ghs / 1000:.1f}"

    @display(description="Read", ordering="measured_at")
    def shown_read(self, row: Any) -> str:
        return look.ago(row.measured_at)
