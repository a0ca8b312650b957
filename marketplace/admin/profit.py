"""A site's profit and loss: what each kind of use earned and what its energy cost, as a chart, as numbers and as CSV; and its receipts."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from django import forms
from django.contrib import admin, messages
from django.contrib.admin.utils import unquote
from django.core.exceptions import PermissionDenied
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.urls import URLPattern, path
from django.utils import timezone
from unfold.decorators import display

from billing.core.energy import ENERGY, KINDS
from marketplace.admin import look, profit_chart
from marketplace.admin.base import DeskForm, TenantAdmin
from marketplace.admin.doors import operator_site
from marketplace.admin.moves import dress, show_refusal
from marketplace.admin.tenancy import own
from marketplace.errors import MarketError
from marketplace.models import Receipt, Site
from marketplace.services import profit, receipts

WINDOWS = {
    "24h": (24, 1, "24 hours"),
    "7d": (7 * 24, 6, "7 days"),
    "31d": (31 * 24, 24, "31 days"),
}  # hours, hours a bar
NAMES = {"ai": "AI", "hashing": "Hashing", "demand_response": "Demand response", "energy": "Site itself"}


class ReceiptsForm(forms.Form):
    """A file, or its text."""

    file = forms.FileField(required=False, label="CSV file", help_text=", ".join(receipts.COLUMNS))
    text = forms.CharField(
        required=False,
        strip=False,
        label="or its text",
        widget=forms.Textarea(attrs={"rows": 4, "spellcheck": "false"}),
    )

    def clean(self) -> dict[str, Any]:
        values = super().clean() or {}
        if values.get("file") is not None:
            try:
                values["text"] = values["file"].read().decode("utf-8")
            except UnicodeDecodeError:
                self.add_error("file", "is no UTF-8 text: save it as CSV UTF-8.")
        elif not (values.get("text") or "").strip():
            self.add_error("file", "Choose a file, or type the text below.")
        return values


class ProfitPages:
    """The pages that a site's admin has besides its own: `<site>/profit/`, and the same as CSV."""

    def profit_urls(self: Any) -> list[URLPattern]:
        return [
            path("<path:object_id>/profit/", self.admin_site.admin_view(self.profit_view), name=self._name("profit")),
            path(
                "<path:object_id>/profit.csv",
                self.admin_site.admin_view(self.profit_file),
                name=self._name("profit-csv"),
            ),
        ]

    def profit_view(self: Any, request: HttpRequest, object_id: str) -> HttpResponse:
        row, actor, now = self._profit_of(request, object_id), self.actor(request), timezone.now()
        form: Any = dress(ReceiptsForm(request.POST or None, request.FILES or None))
        if request.method == "POST":
            if not actor.may("payouts:write"):
                raise PermissionDenied
            if form.is_valid():
                try:
                    made = receipts.take(row, form.cleaned_data["text"], actor=actor, now=now)
                except MarketError as error:
                    show_refusal(form, error)
                else:
                    messages.success(
                        request, f"{len(made)} receipts are on record; the hours they pay for are being told anew."
                    )
                    return HttpResponseRedirect(self.url_of("profit", row))
        window, start, end = _window(request, now)
        lines = profit.table(row, start, end)
        _, step, _ = WINDOWS[window]
        slices = profit_chart.slices(lines, start, end, timedelta(hours=step))
        context = {
            "title": f"Profit and loss of {row.name}",
            "original": row,
            "row": row,
            "chart": profit_chart.bars(slices, step) if lines else "",
            "cards": _cards(lines),
            "kinds": _kinds(lines),
            "hours": [_told(s) for s in reversed(slices) if s.seen],
            "receipts": _receipts(own(Receipt, actor).filter(site=row)),
            "form": form,
            "may": actor.may("payouts:write"),
            "window": window,
            "windows": [(key, name) for key, (_, _, name) in WINDOWS.items()],
            "back": self.url_of("change", row),
            "file": f"{self.url_of('profit-csv', row)}?window={window}",
        }
        answer: HttpResponse = self.render(request, "desk/profit.html", context)
        return answer

    def profit_file(self: Any, request: HttpRequest, object_id: str) -> HttpResponse:
        row = self._profit_of(request, object_id)
        _, start, end = _window(request, timezone.now())
        answer = HttpResponse(profit.as_csv(row, start, end), content_type="text/csv; charset=utf-8")
        answer["Content-Disposition"] = f'attachment; filename="{row.public_id}-profit.csv"'
        return answer

    def _profit_of(self: Any, request: HttpRequest, object_id: str) -> Site:
        row: Site = self.get_object(request, unquote(object_id))
        if not self.actor(request).may("payouts:read"):
            raise PermissionDenied
        return row


def _receipts(rows: QuerySet[Any]) -> list[Receipt]:
    """The newest, each with its amount in words."""
    found = list(rows.order_by("-end", "-pk")[:20])
    for row in found:
        row.amount = look.micro(row.amount_microusd)
    return found


def _window(request: HttpRequest, now: datetime) -> tuple[str, datetime, datetime]:
    """Key of WINDOWS, and whole bars of it that end with the running one."""
    asked = str(request.GET.get("window"))
    window = asked if asked in WINDOWS else "24h"
    hours, step, _ = WINDOWS[window]
    end = profit_chart.floor(now, timedelta(hours=step)) + timedelta(hours=step)
    return window, end - timedelta(hours=hours), end


def _cards(lines: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    sums = {kind: profit.summed(kind, [line for line in lines if line["kind"] == kind]) for kind in KINDS}
    spent, earned = (sum(s[name] for s in sums.values()) for name in ("energy_microusd", "revenue_microusd"))
    expected, paid = sums["hashing"]["revenue_microusd"], sums["hashing"]["paid_microusd"]
    seen = max((sum(line["seen_s"] for line in lines if line["kind"] == ENERGY)), 1)
    carbon = [line["carbon_g"] for line in lines]
    said = (
        "pool has not said" if paid is None else f"pool paid {look.micro(paid)}, {100 * paid / max(expected, 1):.0f} %"
    )
    return [
        (
            "AI, your share",
            look.micro(sums["ai"]["revenue_microusd"]),
            f"margin {look.micro(sums['ai']['margin_microusd'])}",
        ),
        ("Hashing, expected", look.micro(expected), said),
        ("Demand response", look.micro(sums["demand_response"]["revenue_microusd"]), "as received"),
        ("Energy", look.micro(spent), look.energy(sum(s["energy_mwh"] for s in sums.values()))),
        ("Margin", look.micro(earned - spent), f"{seen / 3600:.1f} hours accounted for"),
        (
            "Carbon",
            "–" if not carbon or None in carbon else f"{sum(carbon) / 1000:,.0f} kg",
            "by the intensity of each minute",
        ),
    ]


def _kinds(lines: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Name, revenue, paid, energy, its cost, margin."""
    out: list[tuple[str, ...]] = []
    for kind in KINDS:
        s = profit.summed(kind, [line for line in lines if line["kind"] == kind])
        paid = "–" if s["paid_microusd"] is None else look.micro(s["paid_microusd"])
        out.append(
            (NAMES[kind], look.micro(s["revenue_microusd"]), paid, look.energy(s["energy_mwh"]), look.micro(s["energy_microusd"]),
             look.micro(s["margin_microusd"]))
        )  # fmt: skip
    return out


def _told(s: profit_chart.Slice) -> tuple[str, ...]:
    return (f"{s.start:%m-%d %H:%M}", *(look.micro(v) for v in (*s.earned, *(-v for v in s.spent), s.margin)))


class ReceiptForm(DeskForm):
    class Meta:
        model = Receipt
        fields = ("site", "kind", "source", "reference", "start", "end", "amount_microusd", "amount_sat")
        labels = {
            "amount_microusd": "Amount, micro-USD",
            "amount_sat": "Amount, satoshi",
            "start": "For the time from",
            "end": "until",
        }


@admin.register(Receipt, site=operator_site)
class ReceiptAdmin(look.Shown, TenantAdmin):
    reads, writes, adds = "payouts:read", "payouts:write", True
    form = ReceiptForm
    list_display = ("source", "reference", "site", "kind", "start", "end", "shown_amount")
    list_select_related = ("site",)
    list_filter = ("site", "kind")
    search_fields = ("source", "reference")
    ordering = ("-end", "-id")

    @display(description="Amount", ordering="amount_microusd")
    def shown_amount(self, row: Receipt) -> str:
        return look.micro(row.amount_microusd)

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """A receipt is never edited."""
        return obj is None and super().has_change_permission(request, obj)

    def write(self, request: HttpRequest, form: Any, row: Any | None) -> Receipt:
        assert row is None
        values = dict(form.cleaned_data)
        return receipts.receive(values.pop("site"), actor=self.actor(request), now=timezone.now(), **values)
