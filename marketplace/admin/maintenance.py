"""Maintenance of an operator's sites: drafted, looked at (whom it touches, who is short of what), announced, extended, over."""

from datetime import UTC, datetime, timedelta
from typing import Any

from django import forms
from django.contrib import admin
from django.http import HttpRequest
from django.utils import timezone
from unfold import widgets
from unfold.decorators import display

from marketplace.admin import look
from marketplace.admin.base import DeskForm, StaffAdmin, TenantAdmin
from marketplace.admin.doors import operator_site, staff_site
from marketplace.admin.moves import Call, Move
from marketplace.admin.tenancy import own
from marketplace.errors import MarketError
from marketplace.models import Host, Maintenance
from marketplace.services import maintenance

_PLACE = ("site", "scope", "node", "domain")
_PLAN = ("category", "starts_at", "ends_at", "text", "impact", "emergency", "emergency_reason", "cap_w")
_RECORD = ("state", "version", "noticed_until", "created_by", "announced_at", "started_at", "settled_at")


class MaintenanceForm(DeskForm):
    class Meta:
        model = Maintenance
        fields = (*_PLACE, *_PLAN)
        labels = {
            "domain": "Leaf (rack)",
            "starts_at": "From (UTC)",
            "ends_at": "To (UTC)",
            "text": "What is done",
            "impact": "Likely impact",
            "cap_w": "Power meanwhile, W",
        }

    hosts = forms.CharField(
        required=False,
        max_length=20_000,
        widget=widgets.UnfoldAdminTextareaWidget(attrs={"rows": 2}),
        help_text="Scope hosts: their names, by spaces.",
    )


class ExtendForm(forms.Form):
    ends_at = forms.DateTimeField(
        label="New end (UTC)", widget=forms.DateTimeInput(attrs={"type": "datetime-local"}, format="%Y-%m-%dT%H:%M")
    )
    reason = forms.CharField(
        required=False, max_length=500,
        help_text="Where firm contracts are touched and the added time has no week's notice: why. Customers read it.",
    )  # fmt: skip

    def clean_ends_at(self) -> datetime:
        given: datetime = self.cleaned_data["ends_at"]
        return given.replace(tzinfo=UTC)


def _announce(call: Call) -> str:
    row = maintenance.announce(call.actor, call.row, now=call.now)
    n = row.notices.count()
    return f"Announced; {n} contract{'s are' if n != 1 else ' is'} told."


def _extend(call: Call) -> str:
    row = maintenance.extend(call.actor, call.row, call.values["ends_at"], reason=call.values["reason"], now=call.now)
    return f"It goes on until {row.ends_at:%F %R} UTC; those touched are told."


def _finish(call: Call) -> str:
    maintenance.finish(call.actor, call.row, now=call.now)
    return "It is over; its hosts are back at work."


def _cancel(call: Call) -> str:
    maintenance.cancel(call.actor, call.row, now=call.now)
    return "It does not happen; those told of it are told so."


class MaintenanceRows(look.Shown):
    """Maintenance in a list, the operator's and the staff's."""

    list_display = (
        "shown_id",
        "site",
        "scope",
        "category",
        "starts_at",
        "ends_at",
        "shown_notice",
        "shown_hosts",
        "shown_state",
    )
    list_select_related = ("site",)

    @display(description="Notice", ordering="emergency")
    def shown_notice(self, row: Maintenance) -> str:
        return "emergency" if row.emergency else "as due"

    @display(description="Hosts")
    def shown_hosts(self, row: Maintenance) -> str:
        taken = row.hosts.filter(taken_at__isnull=False, given_back_at=None).count()
        return (
            f"{taken} of {row.hosts.count()} away" if row.state in Maintenance.LIVE else str(row.hosts.count() or "–")
        )


@admin.register(Maintenance, site=operator_site)
class MaintenanceAdmin(MaintenanceRows, TenantAdmin):
    reads, writes, adds = "maintenance:read", "maintenance:write", True
    form = MaintenanceForm
    above = "desk/impact.html"
    list_filter = ("site", "state", "category", "emergency")
    search_fields = ("text", "site__name")
    ordering = ("-starts_at", "-id")
    autocomplete_fields = ("node",)
    moves = (
        Move(
            name="announce", label="Announce", action="maintenance:write", run=_announce, icon="campaign",
            possible=lambda row: row.state == "draft",
            question="Those whom it touches are told, nothing is sold over it any more, and its hosts are emptied in time by themselves.",
        ),
        Move(
            name="extend", label="Extend", action="maintenance:write", run=_extend, form=ExtendForm, icon="more_time",
            possible=lambda row: row.state in Maintenance.LIVE, initial=lambda row: {"ends_at": row.ends_at},
            question="A later end. Those whom it touches are told again.",
        ),
        Move(
            name="finish", label="Over early", action="maintenance:write", run=_finish, icon="task_alt",
            possible=lambda row: row.state == "in_progress",
            question="What it took is back at work now.",
        ),
        Move(
            name="cancel", label="Cancel", action="maintenance:write", run=_cancel, icon="cancel", danger=True,
            possible=lambda row: row.state in {"draft", "announced"},
            question="It does not happen. Whoever was told of it is told so.",
        ),
    )  # fmt: skip

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """What is over stays as it was."""
        return super().has_change_permission(request, obj) and (obj is None or bool(Maintenance.TRANSITIONS[obj.state]))

    def get_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:  # noqa: ARG002
        return [*_PLACE, "hosts", *_PLAN] if obj is None else [*_PLACE, *_PLAN, *_RECORD]

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:  # noqa: ARG002
        return [] if obj is None else [*_PLACE, *_RECORD]

    def get_changeform_initial_data(self, request: HttpRequest) -> dict[str, Any]:
        start = (timezone.now() + maintenance.NOTICE_DUE + timedelta(days=1)).replace(minute=0, second=0, microsecond=0)
        return {
            "starts_at": start,
            "ends_at": start + timedelta(hours=4),
            **super().get_changeform_initial_data(request),
        }

    def more(self, request: HttpRequest, row: Maintenance) -> dict[str, Any]:
        """The dry run of a draft; of what is announced, what it means."""
        if row.state != Maintenance.State.DRAFT and row.state not in Maintenance.LIVE:
            return {"impact": None}
        now = timezone.now()
        try:
            found = maintenance.dry_run(self.actor(request), row, now=now)
        except MarketError as error:
            return {"impact": None, "unknown": str(error)}
        short_notice = bool(found.firm) and not row.emergency and row.starts_at - now < maintenance.NOTICE_DUE
        return {"impact": found, "short_notice": short_notice and row.state == Maintenance.State.DRAFT}

    def write(self, request: HttpRequest, form: Any, row: Any | None) -> Maintenance:
        actor, now, values = self.actor(request), timezone.now(), dict(form.cleaned_data)
        if row is not None:
            changes = {name: values[name] for name in form.changed_data if name in _PLAN}
            return maintenance.change(actor, row, now=now, **changes)
        names = values.pop("hosts").split()
        hosts = list(own(Host, actor).filter(site=values["site"], name__in=names))
        if unknown := sorted(set(names) - {host.name for host in hosts}):
            said = f"Not at {values['site'].name}: {', '.join(unknown)}"
            raise MarketError("invalid_request", f"{said}.", {"/hosts": said})
        return maintenance.draft(actor, values.pop("site"), hosts=hosts, now=now, **values)


@admin.register(Maintenance, site=staff_site)
class StaffMaintenanceAdmin(MaintenanceRows, StaffAdmin):
    list_filter = ("state", "site", "category", "emergency")
    search_fields = ("text", "site__name")
    ordering = ("-id",)
