"""Grid signals of an operator's sites: a price, a frequency, an OpenADR 3 programme."""

from typing import Any

from django import forms
from django.contrib import admin
from django.http import HttpRequest
from django.utils import timezone
from unfold import widgets
from unfold.decorators import display

from marketplace.admin import look
from marketplace.admin.base import DeskForm, TenantAdmin
from marketplace.admin.doors import operator_site
from marketplace.admin.prices import PriceField
from marketplace.models import GridSource
from marketplace.services import grid
from marketplace.services.grid import rules, sources

_ALL = tuple(dict.fromkeys(name for names in sources.FIELDS.values() for name in names))


def _price(name: str, help_text: str) -> PriceField:
    widget = widgets.UnfoldAdminTextInputWidget()
    return PriceField(required=False, widget=widget, label=f"{name}, USD a MWh", help_text=help_text)


class GridSourceForm(DeskForm):
    client_secret = forms.CharField(
        required=False, max_length=400, widget=forms.PasswordInput(attrs={"class": " ".join(widgets.INPUT_CLASSES)}),
        help_text="Of the OpenADR client. Kept sealed and never shown; empty leaves it as it is.",
    )  # fmt: skip
    pays_uusd_mwh = _price("Pays", "For what is not drawn")
    strike_uusd_mwh = _price("Strike", "Curtail at this price, or over it")
    resume_uusd_mwh = _price("Resume", "Come back under this one")
    urgent_uusd_mwh = _price("Urgent", "At this price one interval is enough")

    class Meta:
        model = GridSource
        fields = ("node", "kind", *sources.COMMON, *_ALL)

    def values(self) -> dict[str, Any]:
        """What of the kind's fields was filled in."""
        known = (*sources.COMMON, *sources.FIELDS[self.cleaned_data.get("kind") or self.instance.kind])
        found = {name: self.cleaned_data[name] for name in known if name in self.cleaned_data}
        return {name: value for name, value in found.items() if value is not None or name == "urgent_uusd_mwh"}


@admin.register(GridSource, site=operator_site)
class GridSourceAdmin(look.Shown, TenantAdmin):
    reads, writes, adds = "power:read", "power:write", True
    form = GridSourceForm
    list_display = ("name", "site", "node", "kind", "shown_cap", "enabled", "shown_heard", "shown_reading", "error")
    list_select_related = ("site", "node")
    list_filter = ("site", "kind", "enabled")
    search_fields = ("name",)
    ordering = ("site", "name")
    autocomplete_fields = ("node",)

    @display(description="Heard")
    def shown_heard(self, row: GridSource) -> str:
        return f"{look.ago(row.heard_at)}{', silent' if rules.silent(row, timezone.now()) else ''}"

    @display(description="Newest")
    def shown_reading(self, row: GridSource) -> str:
        if row.reading is None:
            return "–"
        return (
            f"{row.reading / 1000:.2f} Hz"
            if row.kind == GridSource.Kind.FREQUENCY
            else look.price(row.reading, "USD a MWh")
        )

    def get_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:  # noqa: ARG002
        if obj is None:
            return ["node", "kind", *sources.COMMON, *_ALL, "client_secret"]
        secret = ["client_secret"] if obj.kind == GridSource.Kind.OPENADR3 else []
        return [
            "site",
            "node",
            "kind",
            *sources.COMMON,
            *sources.FIELDS[obj.kind],
            *secret,
            "shown_heard",
            "shown_reading",
            "error",
        ]

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:  # noqa: ARG002
        return [] if obj is None else ["site", "node", "kind", "shown_heard", "shown_reading", "error"]

    def write(self, request: HttpRequest, form: Any, row: Any | None) -> GridSource:
        actor, now, secret = self.actor(request), timezone.now(), form.cleaned_data.get("client_secret", "")
        if row is None:
            kind, node = form.cleaned_data["kind"], form.cleaned_data["node"]
            return grid.add(actor, node, kind=kind, now=now, secret=secret, **form.values())
        return grid.update(actor, row, now=now, secret=secret, **form.values())
