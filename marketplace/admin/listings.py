"""An operator's offers: drafted, edited, published, paused and retired."""

from typing import Any

from django import forms
from django.contrib import admin
from django.contrib.admin.utils import flatten
from django.http import HttpRequest
from django.utils import timezone
from unfold import widgets
from unfold.decorators import display

from marketplace import ids
from marketplace.admin import look
from marketplace.admin.base import DeskForm, TenantAdmin
from marketplace.admin.doors import operator_site
from marketplace.admin.moves import Call, Move
from marketplace.admin.prices import PriceField, TiersField
from marketplace.admin.tenancy import own
from marketplace.errors import MarketError
from marketplace.models import Host, Listing
from marketplace.services import listings


class HostChoice(forms.ModelMultipleChoiceField):
    def label_from_instance(self, host: Any) -> str:
        taken = f" · in {host.listing}" if host.listing_id else ""
        return f"{host.site.name} / {host.name} · {host.gpu_count} x {host.gpu_model}{taken}"


def price_field(label: str) -> PriceField:
    return PriceField(
        required=False, label=label, widget=widgets.UnfoldAdminTextInputWidget(attrs={"inputmode": "decimal"}),
        help_text="Per GPU-hour, in the listing's currency. Empty: not offered.",
    )  # fmt: skip


class ListingForm(DeskForm):
    on_demand_price = price_field("On demand")
    reserved_price = price_field("Reserved")
    flexible_price = price_field("Flexible")
    price_tiers = TiersField()
    spot_floor = price_field("Spot, at least")
    hosts = HostChoice(
        queryset=Host.objects.none(), required=False, widget=widgets.UnfoldAdminSelectMultipleWidget(attrs={"size": 12}),
        help_text="All at the listing's site; each in one listing at a time. Keep Ctrl pressed to choose several.",
    )  # fmt: skip
    partner_ids = forms.CharField(
        required=False, label="Partners", widget=widgets.UnfoldAdminTextInputWidget(),
        help_text="For visibility `partners`: the organizations' ids (org_...), with blanks between.",
    )  # fmt: skip

    class Meta:
        model = Listing
        fields = (
            "site", "title", "description", "gpu_model", "visibility", "currency", "min_gpus", "min_term_hours", "max_term_days",
            "upfront_permille", "eviction_notice_s",
            "flexible_hours_per_month", "flexible_notice_s", "emergency_notice_s", "maintenance_hours_per_month", "available_from",
            "available_until", "interconnect", "fabric_gbps",
        )  # fmt: skip

        labels = {
            "gpu_model": "GPU model",
            "min_gpus": "Least GPUs",
            "min_term_hours": "Shortest term, hours",
            "max_term_days": "Longest term, days",
            "upfront_permille": "Due at signing (reserved, flexible), per mille",
            "eviction_notice_s": "Notice before eviction (spot), s",
            "flexible_hours_per_month": "Curtailment (flexible), hours a month",
            "flexible_notice_s": "Notice before curtailment (flexible), s",
            "emergency_notice_s": "Notice before firm jobs leave in a grid emergency, s (empty: never)",
            "maintenance_hours_per_month": "Maintenance that firm contracts bear, hours a month",
            "fabric_gbps": "Fabric, Gb/s",
        }

    # set per request by ListingAdmin.get_form
    own_hosts: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        row = self.instance if self.instance.pk else None
        if "hosts" in self.fields:
            hosts: Any = self.fields["hosts"]
            hosts.queryset = self.own_hosts if row is None else self.own_hosts.filter(site_id=row.site_id)
        if row is not None:
            for name in (*listings.PRICES, "price_tiers"):
                self.initial.setdefault(name, getattr(row, name))
            self.initial["hosts"] = list(row.hosts.values_list("pk", flat=True))
            self.initial["partner_ids"] = " ".join(
                ids.encode("org", pk) for pk in row.partners.order_by("pk").values_list("pk", flat=True)
            )

    def clean_partner_ids(self) -> list[int]:
        found = []
        for text in self.cleaned_data["partner_ids"].replace(",", " ").split():
            pk = ids.decode("org", text)
            if pk is None:
                raise forms.ValidationError(f"{text} is no id of the form org_...")
            found.append(pk)
        try:
            return listings.partner_ids(found)
        except MarketError as error:
            raise forms.ValidationError(error.detail) from None


def _moved(service: Any, said: str) -> Any:
    def run(call: Call) -> str:
        service(call.actor, call.row, now=call.now)
        return f"{call.row.title} is {said}."

    return run


@admin.register(Listing, site=operator_site)
class ListingAdmin(look.Shown, TenantAdmin):
    reads, writes, adds = "listings:read", "listings:write", True
    form = ListingForm
    list_display = (
        "title",
        "site",
        "gpu_model",
        "shown_gpus",
        "shown_cap",
        "shown_state",
        "shown_on_demand",
        "shown_reserved",
        "shown_flexible",
        "shown_spot",
    )
    list_select_related = ("site", "gpu_model")
    list_filter = ("site", "state", "gpu_model", "visibility")
    search_fields = ("title", "site__name")
    ordering = ("-id",)
    fieldsets = (
        (None, {"fields": (("site", "gpu_model"), "title", "description", "hosts")}),
        ("Prices", {"fields": ("currency", ("on_demand_price", "reserved_price"), ("flexible_price", "spot_floor"), "price_tiers")}),
        ("Terms", {"fields": (
            ("min_gpus", "min_term_hours"), ("max_term_days", "upfront_permille"),
            "eviction_notice_s", ("flexible_hours_per_month", "flexible_notice_s"),
            ("emergency_notice_s", "maintenance_hours_per_month"),
            ("available_from", "available_until"),
        )}),
        ("Shown to buyers", {"fields": ("visibility", "partner_ids", ("interconnect", "fabric_gbps"))}),
    )  # fmt: skip
    moves = (
        Move(
            name="publish", label="Publish", action="listings:write", run=_moved(listings.publish, "on offer"), icon="publish", bulk=True,
            possible=lambda row: row.state in {"draft", "paused"},
            question="It is shown to buyers at once. Prices and terms freeze into each contract that takes it.",
        ),
        Move(
            name="pause", label="Pause", action="listings:write", run=_moved(listings.pause, "paused"), icon="pause", bulk=True,
            possible=lambda row: row.state == "published", question="Off the market, to come back. Contracts and firm quotes go on.",
        ),
        Move(
            name="retire", label="Retire", action="listings:write", run=_moved(listings.retire, "retired"), icon="archive", danger=True,
            possible=lambda row: row.state != "retired", question="Off the market for good. Contracts go on with their frozen terms.",
        ),
    )  # fmt: skip

    @display(description="GPUs")
    def shown_gpus(self, row: Any) -> int:
        return sum(host.gpu_count for host in row.hosts.all())

    @display(description="Power cap")
    def shown_cap(self, row: Any) -> str:
        """Whether the power of its hosts can be limited; one that cannot counts at nameplate at all times."""
        without = sum(not host.cap_control for host in row.hosts.all())
        return f"{without} at nameplate" if without else "yes"

    @display(description="On demand", ordering="on_demand_price")
    def shown_on_demand(self, row: Listing) -> str:
        return look.price(row.on_demand_price, row.currency)

    @display(description="Reserved", ordering="reserved_price")
    def shown_reserved(self, row: Listing) -> str:
        return look.price(row.reserved_price, row.currency)

    @display(description="Flexible", ordering="flexible_price")
    def shown_flexible(self, row: Listing) -> str:
        return look.price(row.flexible_price, row.currency)

    @display(description="Spot from", ordering="spot_floor")
    def shown_spot(self, row: Listing) -> str:
        return look.price(row.spot_floor, row.currency)

    def get_changelist_instance(self, request: HttpRequest) -> Any:
        found = super().get_changelist_instance(request)
        found.result_list = found.result_list.prefetch_related("hosts")
        return found

    def get_form(self, request: HttpRequest, obj: Any = None, change: bool = False, **kwargs: Any) -> Any:
        form = super().get_form(request, obj, change, **kwargs)
        form.own_hosts = (
            own(Host, self.actor(request))
            .exclude(state="retired")
            .select_related("site", "gpu_model", "listing")
            .order_by("site", "name")
        )
        return form

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> tuple[str, ...]:  # noqa: ARG002
        return () if obj is None else ("site",)

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        """To read only, what the form shows its own way is shown as in the list."""
        if obj is None or self.has_change_permission(request, obj):
            return super().get_fieldsets(request, obj)
        shown = {"hosts": "shown_hosts", "partner_ids": None, "price_tiers": "shown_tiers"}
        shown |= {name: f"shown_{name.removesuffix('_price').removesuffix('_floor')}" for name in listings.PRICES}
        return [
            (title, {"fields": [f for name in flatten(options["fields"]) if (f := shown.get(name, name))]})
            for title, options in self.fieldsets
        ]

    @display(description="Prices by term")
    def shown_tiers(self, row: Listing) -> str:
        told = [
            f"{tier['kind']} from {tier['min_term_hours']} h, {tier['upfront_permille'] / 10:g} % at signing"
            + (f", {tier['flexible_hours_per_month']} h of curtailment" if tier["flexible_hours_per_month"] else "")
            + f": {look.price(tier['price'], row.currency)}"
            for tier in row.price_tiers
        ]
        return "; ".join(told) or "none"

    @display(description="Hosts")
    def shown_hosts(self, row: Any) -> str:
        return ", ".join(row.hosts.order_by("name").values_list("name", flat=True)) or "none"

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return (obj is None or obj.state != "retired") and super().has_change_permission(request, obj)

    def write(self, request: HttpRequest, form: Any, row: Any | None) -> Listing:
        actor, now, values = self.actor(request), timezone.now(), form.cleaned_data
        hosts = [host.pk for host in values["hosts"]]
        said = {
            ("gpu_model_id" if name == "gpu_model" else name): (value.pk if name == "gpu_model" and value else value)
            for name, value in values.items()
            if name not in {"site", "hosts", "partner_ids"} and (row is None or name in form.changed_data)
        }
        if row is None:
            return listings.draft(actor, values["site"], said, hosts=hosts, partners=values["partner_ids"], now=now)
        return listings.update(
            actor, row, said, now=now, hosts=hosts if "hosts" in form.changed_data else None,
            partners=values["partner_ids"] if "partner_ids" in form.changed_data else None,
        )  # fmt: skip
