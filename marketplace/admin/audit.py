"""The audit trail: an operator's own, and everybody's for our own people."""

from django.contrib import admin
from unfold.decorators import display

from marketplace.admin import look
from marketplace.admin.base import StaffAdmin, TenantAdmin
from marketplace.admin.doors import operator_site, staff_site
from marketplace.models import AuditEvent


class Trail(look.Shown):
    search_fields = ("subject", "actor", "verb")
    ordering = ("-id",)

    @display(description="Who", ordering="actor")
    def shown_who(self, row: AuditEvent) -> str:
        return row.actor

    @display(description="After")
    def shown_after(self, row: AuditEvent) -> str:
        parts = row.after.items() if isinstance(row.after, dict) else [("", row.after)] if row.after is not None else []
        text = ", ".join(f"{name}: {value}".removeprefix(": ") for name, value in parts) or "–"
        return text if len(text) <= 90 else f"{text[:89]}…"


@admin.register(AuditEvent, site=operator_site)
class OperatorAudit(Trail, TenantAdmin):
    reads = "audit:read"
    list_display = ("at", "shown_who", "verb", "subject", "shown_after")
    fields = ("at", "shown_who", "verb", "subject", "before", "after")
    readonly_fields = ("shown_who",)


@admin.register(AuditEvent, site=staff_site)
class StaffAudit(Trail, StaffAdmin):
    list_display = ("at", "shown_who", "organization", "verb", "subject", "shown_after")
    list_select_related = ("organization",)
    fields = ("at", "shown_who", "organization", "verb", "subject", "before", "after")
    readonly_fields = ("shown_who",)
