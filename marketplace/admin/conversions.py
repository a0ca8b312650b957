"""Plans to convert a site: a form with the few inputs that decide, and a page with the calendar, charts, swings and sources."""

from itertools import accumulate
from typing import Any

from django import forms
from django.contrib import admin
from django.http import HttpRequest, HttpResponse
from django.utils import timezone
from unfold import widgets
from unfold.decorators import display

from marketplace.admin import look, plan_charts
from marketplace.admin.base import DeskForm, TenantAdmin
from marketplace.admin.doors import operator_site
from marketplace.admin.moves import Call, Move
from marketplace.models import ConversionPlan
from marketplace.services import conversions
from scheduler.core.conversion.defaults import DEFAULTS

_SAID = ("unit", "source", "date", "confidence")
_NUMBER = {"widget": widgets.UnfoldAdminIntegerFieldWidget(), "required": False}
_HALLS = {
    "usable_percent": ("usable_permille", 10),
    "capex_usd_per_mw": ("capex_cents_per_mw", 100),
    "build_months": ("build_months", 1),
    "keep_kw": ("keep_w", 1000),
}
_SITE = {"capital_musd": ("capital_cents", 10**8), "wacc_percent": ("wacc_permille", 10), "crews": ("crews", 1)}
# _HALLS of each hall, _SITE of all: the form's field -> the input's, and how many of the one are one of the other


_ASSUMED = {name: f"Assumed: {DEFAULTS[name].value}" for name in ("income", "cooling")}


class PlanForm(DeskForm):
    """What is left empty is read off the site, or assumed with its source."""

    kind = forms.ChoiceField(
        choices=[("", _ASSUMED["income"]), ("lease", "Lease the halls (colocation)"), ("rental", "Rent GPU-hours")],
        label="What AI pays for", widget=widgets.UnfoldAdminSelectWidget(), required=False,
    )  # fmt: skip
    price_usd = forms.DecimalField(
        required=False, min_value=0, max_digits=9, decimal_places=2, label="Its price, $", widget=widgets.UnfoldAdminDecimalFieldWidget(),
        help_text="A kW of critical IT a month, or a GPU-hour.",
    )  # fmt: skip
    cooling = forms.ChoiceField(
        choices=[("", _ASSUMED["cooling"]), ("liquid", "Liquid"), ("air", "Air")],
        required=False,
        widget=widgets.UnfoldAdminSelectWidget(),
    )
    usable_percent = forms.IntegerField(min_value=1, max_value=100, label="Usable power, %", **_NUMBER)
    capex_usd_per_mw = forms.IntegerField(min_value=0, max_value=10**9, label="Capital a MW of critical IT, $", **_NUMBER)  # fmt: skip
    build_months = forms.IntegerField(min_value=1, max_value=120, label="Months to build a hall", **_NUMBER)
    keep_kw = forms.IntegerField(
        min_value=0, max_value=10**6, label="Miners that stay in each hall, kW",
        help_text="They hash with what the racks leave.", **_NUMBER,
    )  # fmt: skip
    capital_musd = forms.IntegerField(min_value=0, max_value=10**6, label="Capital there is, million $", **_NUMBER)
    crews = forms.IntegerField(min_value=1, max_value=12, label="Halls under works at a time", **_NUMBER)
    wacc_percent = forms.IntegerField(min_value=0, max_value=100, label="Cost of capital, % a year", **_NUMBER)

    class Meta:
        model = ConversionPlan
        fields = ("site", "name")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name, (to, times) in {**_HALLS, **_SITE}.items():
            if name in self.fields and to in DEFAULTS:
                value = DEFAULTS[to].value
                said = f"{value // times:,}" if isinstance(value, int) else value
                self.fields[name].widget.attrs["placeholder"] = f"assumed: {said}"

    def inputs(self) -> dict[str, Any]:
        """As `services.conversions.make` takes them."""
        values = {name: value for name, value in self.cleaned_data.items() if value not in (None, "")}
        income: dict[str, Any] = {"kind": values["kind"]} if "kind" in values else {}
        if "price_usd" in values:
            lease = values.get("kind", DEFAULTS["income"].value) == "lease"
            name, unit = ("cents_per_kw_month", 100) if lease else ("price_uusd", 10**6)
            income[name] = int(values["price_usd"] * unit)
        cooling = {"cooling": values["cooling"]} if "cooling" in values else {}
        each = {to: values[name] * times for name, (to, times) in _HALLS.items() if name in values}
        out: dict[str, Any] = {
            "income": income,
            "halls": [{**hall, **cooling, **each} for hall in conversions.halls_of(values["site"])],
        }
        for name, (to, times) in _SITE.items():
            if name in values:
                out[to] = values[name] * times
        return out


def _told(rows: list[dict[str, Any]], halls: int) -> list[dict[str, Any]]:
    """For people: what every hall has alike stands once."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        hall, _, name = row["name"].rpartition(": ")
        alike.setdefault((name, *(row[column] for column in ("value", *_SAID))), []).append(hall)
    told = []
    for (name, value, *rest), of in alike.items():
        whose = "" if of == [""] else " (every hall)" if len(of) == halls > 1 else f" ({', '.join(of)})"
        for part in ("_permille", "_cents", "_uusd"):
            name = name.replace(part, "")  # noqa: PLW2901 - the unit stands beside it
        words = name.replace(".", ", ").replace("_", " ")
        told.append(
            {
                "name": words + whose,
                "value": f"{value:,}" if isinstance(value, int) else value,
                **dict(zip(_SAID, rest, strict=True)),
            }
        )
    return told


def _file(call: Call, what: str, text: str) -> HttpResponse:
    answer = HttpResponse(text, content_type="text/csv; charset=utf-8")
    answer["Content-Disposition"] = f'attachment; filename="{call.row.public_id}-{what}.csv"'
    return answer


@admin.register(ConversionPlan, site=operator_site)
class ConversionPlanAdmin(look.Shown, TenantAdmin):
    reads, writes, adds = "sites:read", "sites:write", True
    form = PlanForm
    above = "desk/conversion.html"
    list_display = ("name", "site", "shown_gain", "shown_capital", "shown_rate", "shown_payback", "created_at")
    list_select_related = ("site",)
    list_filter = ("site",)
    search_fields = ("name",)
    ordering = ("-id",)
    moves = (
        Move(
            name="months", label="Its months as CSV", action="sites:read", icon="download",
            run=lambda call: _file(call, "months", conversions.months_csv(call.row)),
            question="One line a month: watts, cash, and each hall's phase.",
        ),
        Move(
            name="assumptions", label="Its values as CSV", action="sites:read", icon="download",
            run=lambda call: _file(call, "assumptions", conversions.assumptions_csv(call.row)),
            question="One line a value: with its source, date and confidence.",
        ),
    )  # fmt: skip

    @display(description="Worth more than hashing on", ordering="npv_cents")
    def shown_gain(self, row: ConversionPlan) -> str:
        return plan_charts.dollars(row.gain_cents)

    @display(description="Capital", ordering="capital_cents")
    def shown_capital(self, row: ConversionPlan) -> str:
        return plan_charts.dollars(row.capital_cents)

    @display(description="Rate of return", ordering="irr_permille")
    def shown_rate(self, row: ConversionPlan) -> str:
        return "–" if row.irr_permille is None else f"{row.irr_permille / 10:.1f} % a year"

    @display(description="Payback", ordering="payback_months")
    def shown_payback(self, row: ConversionPlan) -> str:
        return "–" if row.payback_months is None else f"{row.payback_months} months"

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """A plan is never edited: make another."""
        return obj is None and super().has_change_permission(request, obj)

    def get_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:  # noqa: ARG002
        if obj is None:
            return ["site", "name", "kind", "price_usd", "cooling", *_HALLS, "capital_musd", "crews", "wacc_percent"]
        return ["site", "name", "created_by", "created_at"]

    def write(self, request: HttpRequest, form: Any, row: Any | None) -> ConversionPlan:
        assert row is None
        site, name = form.cleaned_data["site"], form.cleaned_data["name"]
        return conversions.make(self.actor(request), site, name=name, now=timezone.now(), **form.inputs())

    def more(self, request: HttpRequest, row: Any) -> dict[str, Any]:  # noqa: ARG002
        found = row.outcome
        months = [dict(zip(conversions.COLUMNS, values, strict=True)) for values in found["months"]]
        sums = list(accumulate(sum(values[4:]) for values in found["months"]))
        stays = list(accumulate(found["hashing_on"]))
        return {
            "cards": [
                ("Worth today", plan_charts.dollars(row.npv_cents), f"at {row.used['wacc_permille'] / 10:g} % a year"),
                ("Hashing on is worth", plan_charts.dollars(row.npv_hashing_on_cents), "nothing converted"),
                ("Rate of return", self.shown_rate(row), "of what is gained"),
                ("Payback", self.shown_payback(row), "from the first month"),
                ("Capital", plan_charts.dollars(row.capital_cents), f"most spent at once {plan_charts.dollars(-min(0, *sums))}"),
            ],
            "megawatts": plan_charts.megawatts(months),
            "cash": plan_charts.cash(sums, stays),
            "halls": plan_charts.calendar(found["halls"], len(months)),
            "swings": plan_charts.swings(found["sensitivity"], row.gain_cents),
            "assumptions": _told(row.assumptions, len(found["halls"])),
            "legend": plan_charts.phases(),
            "years": [
                (
                    y // 12 + 1,
                    *(look.watts(max(m[c] for m in months[y : y + 12])) for c in ("ai_w", "hashing_w")),
                    *(
                        plan_charts.dollars(sum(m[c] for m in months[y : y + 12]))
                        for c in ("ai_cents", "hashing_cents", "energy_cents", "running_cents", "capital_cents", "resale_cents")
                    ),
                    plan_charts.dollars(sums[min(y + 11, len(sums) - 1)]),
                )
                for y in range(0, len(months), 12)
            ],
        }  # fmt: skip
