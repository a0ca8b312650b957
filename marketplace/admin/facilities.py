"""An operator's sites and the agents that speak for them."""

from typing import Any

from django import forms
from django.conf import settings
from django.contrib import admin, messages
from django.contrib.admin.utils import unquote
from django.core.exceptions import NON_FIELD_ERRORS, PermissionDenied
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils import timezone
from unfold.decorators import display

from marketplace.admin import dashboard, look
from marketplace.admin.base import DeskForm, TenantAdmin
from marketplace.admin.doors import operator_site
from marketplace.admin.freeze import FreezeShown
from marketplace.admin.freeze import shown as freeze_shown
from marketplace.admin.hosts import DrainForm
from marketplace.admin.moves import Call, Move, dress, show_refusal
from marketplace.admin.profit import ProfitPages
from marketplace.admin.tenancy import own
from marketplace.errors import MarketError
from marketplace.models import Agent, Organization, PowerNode, Site, SiteMinute
from marketplace.services import columns, imports, sites

MODES = {
    "auto": ("Let jobs and prices decide: place, hash and shed by the plan.", "play_arrow"),
    "hold": ("Keep what runs; place nothing new and wake no miner.", "pause"),
    "shed": ("Put every miner to sleep now; jobs go on.", "trending_down"),
    "off": ("Put every miner to sleep and ask every job to leave.", "power_settings_new"),
}


def _is_not(mode: str) -> Any:
    return lambda row: row.mode != mode


def _set_mode(mode: str) -> Any:
    def run(call: Call) -> str:
        sites.set_site_mode(call.row, mode, actor=call.actor, now=call.now)
        return f"{call.row.name} is in mode {mode}."

    return run


def _token(call: Call) -> HttpResponse:
    _, token = sites.create_enrolment_token(call.row, actor=call.actor, now=call.now)
    call.request.current_app = operator_site.name
    context = {
        **operator_site.each_context(call.request),
        "title": f"Enrol an agent at {call.row.name}",
        "opts": Site._meta,
        "row": call.row,
        "back": reverse("operator:marketplace_site_change", args=[call.row.pk]),
        "command": f"python -m agent enrol --url {settings.PUBLIC_URL} --token {token} --state /var/lib/tailrace --config agent.toml",
        "hours": sites.TOKEN_HOURS,
    }
    answer = TemplateResponse(call.request, "desk/token.html", context)
    answer["Cache-Control"] = "no-store"
    return answer.render()


def _drain_site(call: Call) -> str:
    hosts = sites.drain_site(call.row, actor=call.actor, now=call.now, **call.values)
    return f"{len(hosts)} hosts of {call.row.name} are draining."


def _undrain_site(call: Call) -> str:
    return f"{len(sites.undrain_site(call.row, actor=call.actor, now=call.now))} hosts are back at work."


class SiteForm(DeskForm):
    class Meta:
        model = Site
        fields = (
            "name", "region", "country", "timezone", "grid_operator", "contract_power_w", "pue_permille", "miner_pue_permille",
            "energy_price_microusd_per_kwh", "carbon_g_per_kwh", "renewable_permille", "tariff", "pool_scheme", "pool_fee_ppm",
            "switch_cost_uusd",
        )  # fmt: skip

        labels = {
            "contract_power_w": "Contract power, W",
            "pue_permille": "PUE of GPU load, per mille",
            "miner_pue_permille": "PUE of miners, per mille",
            "energy_price_microusd_per_kwh": "Energy tariff, micro-USD per kWh",
            "carbon_g_per_kwh": "Carbon, g per kWh",
            "renewable_permille": "Renewable share, per mille",
            "tariff": "Tariff, added by time",
            "pool_scheme": "Pool pays",
            "pool_fee_ppm": "Pool's fee, millionths",
            "switch_cost_uusd": "A miner's change of mode costs, micro-USD",
        }


@admin.register(Site, site=operator_site)
class SiteAdmin(FreezeShown, ProfitPages, look.Shown, TenantAdmin):
    reads, writes, adds = "sites:read", "sites:write", True
    above = "desk/site.html"
    form = SiteForm
    fieldsets = (
        ("Settings", {"fields": (("name", "region"), ("country", "timezone"), ("grid_operator", "contract_power_w"))}),
        (
            "Power and price",
            {
                "fields": (
                    ("pue_permille", "miner_pue_permille"),
                    ("energy_price_microusd_per_kwh", "carbon_g_per_kwh"),
                    ("renewable_permille", "tariff"),
                    ("pool_scheme", "pool_fee_ppm"),
                    "switch_cost_uusd",
                )
            },
        ),
    )
    ordering = ("name",)
    list_display = ("name", "region", "shown_mode", "shown_power", "shown_measured", "shown_free", "shown_agent")
    search_fields = ("name", "region")
    list_filter = ("mode",)
    moves = (
        *(
            Move(
                name=f"mode-{mode}", label=f"Mode {mode}", question=said, action="power:write", run=_set_mode(mode),
                possible=_is_not(mode), icon=icon, danger=mode in {"shed", "off"},
            )
            for mode, (said, icon) in MODES.items()
        ),
        Move(
            name="drain", label="Drain all hosts", action="sites:write", run=_drain_site, form=DrainForm, icon="do_not_disturb_on",
            danger=True, question="No host of this site takes new work until it is put back; by an hour, none that may outlast it.",
        ),
        Move(
            name="undrain", label="Put all hosts back to work", action="sites:write", run=_undrain_site, icon="play_arrow",
            question="Jobs may be placed on every host that drains or is in maintenance again.",
        ),
        Move(
            name="token", label="Enrol an agent", action="sites:write", run=_token, icon="key",
            question="Makes a token that enrols one agent within 24 hours. It is shown once.",
        ),
    )  # fmt: skip

    @display(description="Mode", ordering="mode", label=look.TONES)
    def shown_mode(self, row: Site) -> str:
        return row.mode

    @display(description="Cap", ordering="contract_power_w")
    def shown_power(self, row: Site) -> str:
        return look.watts(row.contract_power_w)

    @display(description="Drawn now")
    def shown_measured(self, row: Any) -> str:
        return look.watts(row.root.measured_w if row.root else None)

    @display(description="Not booked")
    def shown_free(self, row: Any) -> str:
        return look.watts((row.root.allowed_mw - row.root.reserved_mw) // 1000 if row.root else None)

    @display(description="Agent heard")
    def shown_agent(self, row: Any) -> str:
        return look.ago(row.heard)

    def get_changelist_instance(self, request: HttpRequest) -> Any:
        """With each site's root node and its agents' newest sync: two queries a page."""
        found = super().get_changelist_instance(request)
        rows = list(found.result_list)
        lines = {line["site"].pk: line for line in dashboard.site_rows(self.actor(request), rows, timezone.now())}
        agents = own(Agent, self.actor(request)).filter(site__in=rows, revoked_at=None).exclude(last_sync_at=None)
        heard = {a.site_id: a.last_sync_at for a in agents.order_by("last_sync_at")}
        for row in rows:
            row.root, row.heard = lines[row.pk]["root"], heard.get(row.pk)
        found.result_list = rows
        return found

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> tuple[str, ...]:  # noqa: ARG002
        return () if obj is None else ("region", "contract_power_w", "pue_permille", "miner_pue_permille")

    def write(self, request: HttpRequest, form: Any, row: Any | None) -> Site:
        actor, now = self.actor(request), timezone.now()
        values = form.cleaned_data
        if row is None:
            home = own(Organization, actor).get()
            return sites.create_site(home, actor=actor, now=now, **{k: v for k, v in values.items() if v is not None})
        changes = {name: values[name] for name in form.changed_data}
        return sites.update_site(row, actor=actor, now=now, **changes)

    def more(self, request: HttpRequest, row: Any) -> dict[str, Any]:
        actor = self.actor(request)
        window = dashboard.window_of(request.GET)
        return {
            **freeze_shown(request),
            "tree": dashboard.tree(own(PowerNode, actor).filter(site=row)),
            "chart": dashboard.chart(own(SiteMinute, actor).filter(site=row), window, timezone.now()),
            "money": dashboard.money(actor, [row], timezone.now() - dashboard.WINDOWS[window][0], timezone.now()),
            "line": dashboard.site_rows(actor, [row], timezone.now())[0],
            "agents": own(Agent, actor).filter(site=row, revoked_at=None).order_by("name"),
            "fleet": dashboard.fleet(actor, [row]),
            "window": window,
            "windows": [("1h", "60 minutes"), ("24h", "24 hours")],
            "import_url": self.url_of("import", row) if actor.may("sites:write") else None,
            "profit_url": self.url_of("profit", row) if actor.may("payouts:read") else None,
        }

    # --- CSV import
    def get_urls(self) -> list[URLPattern]:
        view = self.admin_site.admin_view(self.import_view)
        own_pages = [path("<path:object_id>/import/", view, name=self._name("import")), *self.profit_urls()]
        return [*own_pages, *super().get_urls()]

    def import_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """Check a file line by line (dry run), then import it: all or nothing."""
        row, actor = self.get_object(request, unquote(object_id)), self.actor(request)
        if not actor.may("sites:write"):
            raise PermissionDenied
        form: Any = dress(ImportForm(request.POST or None, request.FILES or None))
        report = None
        if request.method == "POST" and form.is_valid():
            text, kind = form.cleaned_data["text"], form.cleaned_data["kind"]
            dry = "import" not in request.POST
            try:
                report = imports.run(row, kind, text, dry_run=dry, now=timezone.now(), actor=actor)
            except MarketError as error:
                report = error.extra.get("report")
                if report is None:
                    show_refusal(form, error)
            else:
                if not dry:
                    said = ", ".join(f"{count} {what}" for what, count in report.counts.items())
                    messages.success(request, f"Imported {report.rows} rows of {kind}: {said}.")
                    return HttpResponseRedirect(self.url_of("change", row))
            form = dress(form.again(text))
        context = {
            "title": f"Import into {row.name}",
            "original": row,
            "row": row,
            "form": form,
            "report": report,
            "tables": [(kind, [_column(c) for c in table]) for kind, table in TABLES.items()],
            "back": self.url_of("change", row),
        }
        return self.render(request, "desk/import.html", context)


TABLES = {"power_nodes": columns.POWER_NODES, "hosts": columns.HOSTS, "miners": columns.MINERS}


def _column(column: columns.Column) -> dict[str, Any]:
    return {"name": column.name, "kind": column.kind, "required": column.default is columns.REQUIRED}


class ImportForm(forms.Form):
    """A file, or text typed in; after a dry run the text stands in the box, to be corrected there or imported."""

    kind = forms.ChoiceField(choices=[(kind, kind.replace("_", " ")) for kind in imports.KINDS], label="What it lists")
    file = forms.FileField(required=False, label="CSV file", help_text="UTF-8; the first line names the columns")
    text = forms.CharField(
        required=False,
        strip=False,
        label="or its text",
        widget=forms.Textarea(attrs={"rows": 10, "spellcheck": "false"}),
    )

    def clean(self) -> dict[str, Any]:
        values = super().clean() or {}
        upload = values.get("file")
        if upload is not None:
            try:
                values["text"] = upload.read().decode("utf-8")
            except UnicodeDecodeError:
                self.add_error("file", "is no UTF-8 text: save it as CSV UTF-8.")
        elif not (values.get("text") or "").strip():
            self.add_error("file", "Choose a file, or type the text below.")
        return values

    def again(self, text: str) -> "ImportForm":
        """The text in the box, with what was refused beside it."""
        form = ImportForm({"kind": self.cleaned_data["kind"], "text": text})
        for name, refused in self.errors.items():
            form.add_error(None if name == NON_FIELD_ERRORS else name, list(refused))
        return form


# --- agents
def _revoke(call: Call) -> str:
    sites.revoke_agent(call.row, actor=call.actor, now=call.now)
    return f"The key of {call.row.name} works no more."


@admin.register(Agent, site=operator_site)
class AgentAdmin(look.Shown, TenantAdmin):
    reads = "sites:read"
    list_display = ("name", "site", "runtime", "version", "shown_heard", "shown_key")
    list_select_related = ("site",)
    list_filter = ("site",)
    search_fields = ("name",)
    ordering = ("site", "name")
    fields = ("site", "name", "version", "runtime", "last_sync_at", "lease_until", "created_at", "revoked_at")
    moves = (
        Move(
            name="revoke", label="Revoke its key", action="sites:write", run=_revoke, icon="key_off", danger=True,
            possible=lambda row: row.revoked_at is None,
            question="The agent is shut out at once. What it runs goes on until its lease ends.",
        ),
    )  # fmt: skip

    @display(description="Heard", ordering="last_sync_at")
    def shown_heard(self, row: Agent) -> str:
        return look.ago(row.last_sync_at)

    @display(description="Key", label={"valid": "success", "revoked": "danger"})
    def shown_key(self, row: Agent) -> str:
        return "valid" if row.revoked_at is None else "revoked"
