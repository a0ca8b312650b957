"""Pool feeds of an operator's sites: where each pool says what it paid, and what of that was refused."""

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
from marketplace.models import PoolFeed
from marketplace.services import pool_payouts


class PoolFeedForm(DeskForm):
    bearer = forms.CharField(
        label="Token", required=False, max_length=400, widget=forms.PasswordInput(attrs={"class": " ".join(widgets.INPUT_CLASSES)}),
        help_text="Sent as a bearer token. Kept sealed and never shown; empty leaves it as it is.",
    )  # fmt: skip

    class Meta:
        model = PoolFeed
        fields = ("site", "name", *pool_payouts.FIELDS)
        labels = {"name": "Pool", "url": "URL", "poll_s": "Asked every, s", "stale_after_s": "Overdue after, s"}
        help_texts = {"url": "Asked by GET, with the time since when; the shape of its answer: docs/power.md."}


@admin.register(PoolFeed, site=operator_site)
class PoolFeedAdmin(look.Shown, TenantAdmin):
    reads, writes, adds = "payouts:read", "payouts:write", True
    form = PoolFeedForm
    list_display = ("name", "site", "enabled", "shown_heard", "shown_paid", "error")
    list_select_related = ("site",)
    list_filter = ("site", "enabled")
    search_fields = ("name",)
    ordering = ("site", "name")

    @display(description="Understood")
    def shown_heard(self, row: PoolFeed) -> str:
        return look.ago(row.heard_at)

    @display(description="Paid until")
    def shown_paid(self, row: PoolFeed) -> str:
        said = f"{row.paid_until:%Y-%m-%d %H:%M} UTC" if row.paid_until else "no payout yet"
        return f"{said}, overdue" if pool_payouts.overdue(row, timezone.now()) else said

    def get_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:  # noqa: ARG002
        edited = ["site", "name", *pool_payouts.FIELDS, "bearer"]
        return edited if obj is None else [*edited, "shown_heard", "shown_paid", "error"]

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:  # noqa: ARG002
        return [] if obj is None else ["site", "name", "shown_heard", "shown_paid", "error"]

    def write(self, request: HttpRequest, form: Any, row: Any | None) -> PoolFeed:
        actor, now, values = self.actor(request), timezone.now(), dict(form.cleaned_data)
        secret = values.pop("bearer", "")
        if row is None:
            return pool_payouts.add(actor, values.pop("site"), now=now, secret=secret, **values)
        changed = {name: values[name] for name in form.changed_data if name in values}
        return pool_payouts.update(actor, row, now=now, secret=secret, **changed)
