"""Power nodes and curtailments of an operator's sites."""

from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

from django import forms
from django.contrib import admin
from django.http import HttpRequest, HttpResponse
from django.utils import timezone
from unfold.decorators import display

from marketplace.admin import charts, dashboard, look
from marketplace.admin.base import DeskForm, TenantAdmin
from marketplace.admin.doors import operator_site
from marketplace.admin.moves import Call, Move
from marketplace.admin.tenancy import own
from marketplace.models import Curtailment, CurtailmentReport, PowerNode
from marketplace.services import curtailment_reports, curtailments, sites

MOST_STEPS = 500  # points of a chart
_FIXED = ("site", "parent", "name", "kind")  # after its making a node keeps its place
_EDITED = ("cap_w", "fixed_w", "metering", "overhead_gpu_permille", "overhead_miner_permille")


class PowerNodeForm(DeskForm):
    class Meta:
        model = PowerNode
        fields = ("parent", "name", "kind", *_EDITED)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if "parent" in self.fields:
            self.fields["parent"].required = True
            self.fields["parent"].help_text = "The node above: it says at which site this one hangs."


@admin.register(PowerNode, site=operator_site)
class PowerNodeAdmin(look.Shown, TenantAdmin):
    reads, writes, adds = "sites:read", "sites:write", True
    form = PowerNodeForm
    list_display = (
        "name",
        "site",
        "kind",
        "shown_bar",
        "shown_booked",
        "shown_measured",
        "shown_cap",
        "shown_limit",
        "shown_room",
    )
    list_select_related = ("site", "parent")
    list_filter = ("site", "kind", "metering")
    search_fields = ("name", "site__name")
    ordering = ("site", "depth", "name")
    autocomplete_fields = ("parent",)

    @display(description="Booked and measured under the cap")
    def shown_bar(self, row: PowerNode) -> Any:
        return dashboard.bar(row)

    @display(description="Booked", ordering="reserved_mw")
    def shown_booked(self, row: PowerNode) -> str:
        return look.watts(-(-row.reserved_mw // 1000) + row.fixed_w)

    @display(description="Measured", ordering="measured_w")
    def shown_measured(self, row: PowerNode) -> str:
        return look.watts(row.measured_w)

    @display(description="Curtailed to")
    def shown_limit(self, row: PowerNode) -> str:
        return look.watts(row.limit_w)

    @display(description="Room")
    def shown_room(self, row: PowerNode) -> str:
        return look.watts((row.allowed_mw - row.reserved_mw) // 1000)

    def get_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:  # noqa: ARG002
        if obj is None:
            return ["parent", "name", "kind", *_EDITED]
        return [
            *_FIXED,
            *_EDITED,
            "margin_w",
            "shown_booked",
            "shown_room",
            "shown_limit",
            "shown_measured",
            "measured_at",
        ]

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:
        return [] if obj is None else [name for name in self.get_fields(request, obj) if name not in _EDITED]

    def write(self, request: HttpRequest, form: Any, row: Any | None) -> PowerNode:
        actor, now, values = self.actor(request), timezone.now(), form.cleaned_data
        if row is None:
            return sites.add_power_node(values["parent"].site, actor=actor, now=now, **values)
        changes = {name: values[name] for name in form.changed_data}
        return sites.update_power_node(row, actor=actor, now=now, **changes)


# --- curtailments
class CurtailmentForm(DeskForm):
    class Meta:
        model = Curtailment
        fields = ("node", "cap_w", "starts_at", "ends_at", "mandatory", "emergency", "reference")
        labels = {"cap_w": "Down to, W", "starts_at": "From (UTC)", "ends_at": "To (UTC)"}
        help_texts = {"cap_w": "What the node may draw meanwhile, cooling included: its draw now less what is called"}

    reference = forms.CharField(
        max_length=80,
        required=False,
        help_text="The caller's own number for it; the same twice is the same call. Empty: one is made.",
    )


def _cancel(call: Call) -> str:
    curtailments.cancel(call.actor, call.row, now=call.now)
    return f"{call.row}: {call.row.state}."


def _csv(call: Call) -> HttpResponse:
    report = own(CurtailmentReport, call.actor).get(curtailment=call.row)
    text = curtailment_reports.seconds_csv(report, call.row, now=call.now)
    answer = HttpResponse(text, content_type="text/csv; charset=utf-8")
    answer["Content-Disposition"] = f'attachment; filename="{call.row.public_id}-seconds.csv"'
    return answer


def _what(job: Mapping[str, Any]) -> str:
    said = str(job["what"]).replace("_", " ")
    return f"{said} for {job['held_s']} s" if job.get("held_s") else said


def _credited(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for row in rows:
        found[row["currency"]] = found.get(row["currency"], 0) + row["amount_minor"]
    return found


class CurtailmentRows(look.Shown):
    """Curtailments in a list, the operator's and the staff's."""

    list_display = (
        "shown_id",
        "site",
        "node",
        "shown_cap",
        "starts_at",
        "ends_at",
        "source",
        "mandatory",
        "shown_state",
    )
    list_select_related = ("site", "node__site")


@admin.register(Curtailment, site=operator_site)
class CurtailmentAdmin(CurtailmentRows, TenantAdmin):
    reads, writes, adds = "power:read", "power:write", True
    form = CurtailmentForm
    list_filter = ("site", "state", "source")
    search_fields = ("reference",)
    ordering = ("-starts_at", "-id")
    autocomplete_fields = ("node",)
    readonly_fields = ("shown_cap",)
    above = "desk/curtailment.html"
    moves = (
        Move(
            name="seconds", label="Its seconds as CSV", action="power:read", run=_csv, icon="download",
            possible=lambda row: CurtailmentReport.objects.all().owned_by(row.site.organization_id).filter(curtailment=row).exists(),
            question="One line a second: drawn, baseline and delivered watts.",
        ),
        Move(
            name="cancel", label="Cancel the call", action="power:write", run=_cancel, icon="cancel", danger=True,
            possible=lambda row: row.state in {"announced", "active"},
            question="Not begun: it is cancelled. Under way: it ends now, and hashing comes back in steps.",
        ),
    )  # fmt: skip

    def more(self, request: HttpRequest, row: Any) -> dict[str, Any]:
        now = timezone.now()
        report = own(CurtailmentReport, self.actor(request)).filter(curtailment=row).first()
        seconds = curtailment_reports.seconds_of(row, now)
        if report is None or not seconds:
            return {"report": None}
        found = curtailment_reports.found(report, row, now=now)
        rows = curtailment_reports.series(report, row, now=now, step_s=max(1, -(-seconds // MOST_STEPS)))
        under = "never" if found.under_after_s is None else f"after {found.under_after_s} s"
        back = "" if report.restored_s is None else f"as before {report.restored_s} s after its end"
        return {
            "report": report,
            "cards": [
                (
                    "Baseline",
                    look.watts(report.baseline_w),
                    "mean of five minutes" if report.baseline_how == "meter" else "booked",
                ),
                ("Delivered", f"{found.delivered_wh / 1000:,.1f} kWh", "not drawn against the baseline"),
                ("Under its cap", under, "by the node's meter"),
                ("Hashing forgone", look.minor(found.hashing_lost_microusd // 10_000, "USD"), back),
                ("Energy not bought", look.minor(found.energy_saved_microusd // 10_000, "USD"), "at its price now"),
                *(
                    ("Credited", look.minor(amount, currency), "to customers, by the clock")
                    for currency, amount in sorted(_credited(found.credits).items())
                ),
                ("Its programme pays", look.minor(found.paid_microusd // 10_000, "USD"), ""),
            ],
            "chart": charts.against_baseline(
                [(r["at"], r["watts"]) for r in rows], baseline=report.baseline_w, cap=row.cap_w
            ),
            "cap": look.watts(row.cap_w),
            "baseline": look.watts(report.baseline_w),
            "misses": [
                {**m, "reason": m["reason"].replace("_", " "), "watts": look.watts(m["watts"])} for m in found.misses
            ],
            "jobs": [{**j, "what": _what(j), "at": j["at"][:19].replace("T", " ")} for j in found.jobs],
            "credits": [
                {
                    **c,
                    "why": c["why"].replace("_", " "),
                    "hours": f"{c['milli_gpu_seconds'] / 3_600_000:,.3f}",
                    "amount": look.minor(c["amount_minor"], c["currency"]),
                }
                for c in found.credits
            ],
        }

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """An announced call is never edited: cancel it and announce another."""
        return obj is None and super().has_change_permission(request, obj)

    def get_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:  # noqa: ARG002
        if obj is None:
            return ["node", "cap_w", "starts_at", "ends_at", "mandatory", "emergency", "reference"]
        return [
            "site",
            "node",
            "source",
            "reference",
            "shown_cap",
            "starts_at",
            "ends_at",
            "ended_at",
            "mandatory",
            "emergency",
            "state",
            "created_by",
            "created_at",
            "settled_at",
        ]

    def get_changeform_initial_data(self, request: HttpRequest) -> dict[str, Any]:
        now = timezone.now().replace(second=0, microsecond=0)
        return {
            "starts_at": now + timedelta(minutes=5),
            "ends_at": now + timedelta(minutes=65),
            **super().get_changeform_initial_data(request),
        }

    def write(self, request: HttpRequest, form: Any, row: Any | None) -> Curtailment:
        assert row is None
        now, values = timezone.now(), form.cleaned_data
        reference = values.pop("reference") or f"{values['node'].public_id} {now:%Y-%m-%dT%H:%M:%S}"
        return curtailments.announce(self.actor(request), now=now, reference=reference, **values)
