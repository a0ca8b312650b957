"""Our own people's view of the market: who, what is offered, agreed and run. To read, but for an organization's GPU limit and who of us
may freeze the power.
"""

from collections.abc import Callable
from typing import Any

from django import forms
from django.contrib import admin
from django.db.models import Exists, OuterRef, QuerySet
from django.http import HttpRequest
from unfold.decorators import display

from marketplace.admin import look
from marketplace.admin.base import RowsInline, StaffAdmin
from marketplace.admin.contracts import ContractEvents, PlacementEvents
from marketplace.admin.doors import staff_site
from marketplace.admin.freeze import FreezeShown
from marketplace.admin.moves import Call, Move
from marketplace.admin.power import CurtailmentRows
from marketplace.models import (
    Contract,
    Curtailment,
    Job,
    JobEvent,
    Listing,
    Membership,
    Organization,
    Placement,
    Site,
    User,
)
from marketplace.services import accounts
from marketplace.services.power import freeze
from scheduler import why
from scheduler.models import Cycle, CycleRecord, Decision
from scheduler.record import code

SHOWN_DECISIONS = 200


class LimitForm(forms.Form):
    """`seen`: the limit that was looked at when the form was opened."""

    seen = forms.IntegerField(widget=forms.HiddenInput)
    gpu_limit = forms.IntegerField(label="Most GPUs at once", min_value=0, max_value=accounts.MOST_GPUS)
    reason = forms.CharField(
        label="Why", max_length=200, help_text="Stands in the audit trail, which its people can read."
    )


def _limit_seen(row: Organization) -> dict[str, Any]:
    return {"seen": row.gpu_limit, "gpu_limit": row.gpu_limit}


def _limit(call: Call) -> str:
    row = accounts.set_gpu_limit(
        call.row,
        call.values["gpu_limit"],
        seen=call.values["seen"],
        actor=call.actor,
        reason=call.values["reason"],
        now=call.now,
    )
    return f"{row} may run or hold {row.gpu_limit} GPUs at once."


class Members(RowsInline):
    model = Membership
    fields = ("user", "role", "created_at")
    verbose_name_plural = "members"


@admin.register(Organization, site=staff_site)
class OrganizationAdmin(look.Shown, StaffAdmin):
    list_display = (
        "name",
        "shown_id",
        "is_customer",
        "is_operator",
        "livemode",
        "country",
        "shown_verification",
        "shown_standing",
        "gpu_limit",
        "created_at",
    )
    list_select_related = ("standing",)
    list_filter = ("is_operator", "is_customer", "livemode", "verification")
    search_fields = ("name",)
    ordering = ("-id",)
    inlines = (Members,)
    moves = (
        Move(
            name="limit", label="Change its GPU limit", action="audit:read", run=_limit, form=LimitForm, initial=_limit_seen, icon="tune",
            question="Most GPUs that it may run or hold at once, over all regions. What waits for a higher limit is planned anew at once; "
            "a lower one takes nothing away, and lets nothing be added.",
        ),
    )  # fmt: skip

    @display(description="Verification", label=look.TONES)
    def shown_verification(self, row: Organization) -> str:
        return row.verification

    @display(description="Billing", label=look.TONES)
    def shown_standing(self, row: Any) -> str:
        return row.standing.state if hasattr(row, "standing") else "–"


class Memberships(RowsInline):
    model = Membership
    fields = ("organization", "role", "created_at")
    verbose_name_plural = "memberships"


def _permit(allowed: bool) -> Callable[[Call], str]:
    def run(call: Call) -> str:
        freeze.permit(call.actor, call.row, allowed=allowed, now=call.now)
        return f"{call.row.email} may {'freeze' if allowed else 'no longer freeze'} the power of every site."

    return run


@admin.register(User, site=staff_site)
class UserAdmin(StaffAdmin):
    list_display = ("email", "name", "is_active", "is_staff", "shown_freeze", "last_login", "date_joined")
    list_filter = ("is_staff", "is_active")
    search_fields = ("email", "name")
    ordering = ("-id",)
    fields = ("email", "name", "is_active", "is_staff", "shown_freeze", "last_login", "date_joined")
    readonly_fields = ("shown_freeze",)
    inlines = (Memberships,)
    moves = (
        Move(
            name="permit-freeze", label="Let freeze power", action="audit:read", run=_permit(True), icon="ac_unit", danger=True,
            possible=lambda row: row.is_staff and row.is_active and not row.may_freeze,
            question="They may then hold the power of every site by one button, and let it go on. It is in the audit trail.",
        ),
        Move(
            name="withdraw-freeze", label="No longer let freeze power", action="audit:read", run=_permit(False), icon="block", danger=True,
            possible=lambda row: not row.is_superuser and row.user_permissions.filter(codename="freeze_power").exists(),
            question="A freeze that stands, stands on: somebody else lifts it.",
        ),
    )  # fmt: skip

    def may_move(self, request: HttpRequest, move: Move) -> bool:  # noqa: ARG002
        """Both are for a superuser to say."""
        return self.actor(request).kind == "staff" and bool(getattr(request.user, "is_superuser", False))

    @display(description="May freeze power", boolean=True)
    def shown_freeze(self, row: User) -> bool:
        return bool(getattr(row, "may_freeze", False))

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        found: QuerySet[Any] = super().get_queryset(request)
        return found.annotate(may_freeze=Exists(freeze.permitted().filter(pk=OuterRef("pk"))))


@admin.register(Site, site=staff_site)
class StaffSiteAdmin(FreezeShown, look.Shown, StaffAdmin):
    list_display = ("name", "organization", "cell", "region", "shown_power", "shown_mode")
    list_select_related = ("organization", "cell")
    list_filter = ("mode", "cell", "organization")
    search_fields = ("name", "organization__name")
    ordering = ("name",)

    @display(description="Cap", ordering="contract_power_w")
    def shown_power(self, row: Site) -> str:
        return look.watts(row.contract_power_w)

    @display(description="Mode", label=look.TONES)
    def shown_mode(self, row: Site) -> str:
        return row.mode


@admin.register(Listing, site=staff_site)
class StaffListingAdmin(look.Shown, StaffAdmin):
    list_display = ("title", "organization", "site", "gpu_model", "shown_state", "visibility", "version")
    list_select_related = ("organization", "site", "gpu_model")
    list_filter = ("state", "organization")
    search_fields = ("title", "organization__name")
    ordering = ("-id",)


@admin.register(Contract, site=staff_site)
class StaffContractAdmin(look.Shown, StaffAdmin):
    list_display = (
        "shown_id",
        "organization",
        "operator",
        "kind",
        "gpu_count",
        "gpu_model",
        "shown_price",
        "starts_at",
        "ends_at",
        "shown_state",
    )
    list_select_related = ("organization", "operator", "gpu_model")
    list_filter = ("state", "kind")
    search_fields = ("organization__name", "operator__name", "reference")
    ordering = ("-id",)
    inlines = (ContractEvents,)


class JobEvents(RowsInline):
    model = JobEvent
    fields = ("at", "actor", "from_state", "to_state", "reason")
    verbose_name_plural = "events"


class Decisions(RowsInline):
    model = Decision
    fields = ("at", "outcome", "reason", "binding", "suggestion", "earliest_start")
    verbose_name_plural = "last decision"


class Placements(RowsInline):
    model = Placement
    fields = ("attempt", "rank", "host", "state", "reason", "running_at", "finished_at")
    fk_name = "job"
    verbose_name_plural = "placements"


@admin.register(Job, site=staff_site)
class JobAdmin(look.Shown, StaffAdmin):
    list_display = ("shown_id", "name", "organization", "replicas", "gpus", "shown_state", "state_reason", "created_at")
    list_select_related = ("organization",)
    list_filter = ("state", "cell")
    search_fields = ("name", "organization__name", "reference")
    ordering = ("-id",)
    inlines = (Decisions, Placements, JobEvents)
    above = "desk/why.html"

    def more(self, request: HttpRequest, row: Job) -> dict[str, Any]:  # noqa: ARG002
        return {"why": why.explain(row, staff=True), "job": row}


class StaffPlacementEvents(PlacementEvents):
    fields = ("at", "actor", "from_state", "to_state", "reason")


@admin.register(Placement, site=staff_site)
class StaffPlacementAdmin(look.Shown, StaffAdmin):
    list_display = (
        "shown_id",
        "job",
        "organization",
        "site",
        "host",
        "shown_state",
        "desired",
        "reason",
        "running_at",
        "finished_at",
    )
    list_select_related = ("job", "organization", "site", "host")
    list_filter = ("state", "site")
    search_fields = ("job__name", "host__name", "organization__name")
    ordering = ("-id",)
    inlines = (StaffPlacementEvents,)


@admin.register(Cycle, site=staff_site)
class CycleAdmin(look.Shown, StaffAdmin):
    list_display = (
        "generation", "cell", "started_at", "jobs_considered", "jobs_placed", "placements", "preempted", "conflicts", "promises_broken",
        "shown_ms",
    )  # fmt: skip
    list_select_related = ("cell",)
    list_filter = ("cell",)
    ordering = ("-id",)
    fields = list_display
    above = "desk/cycle.html"

    @display(description="Snapshot / plan / commit, ms")
    def shown_ms(self, row: Cycle) -> str:
        return " / ".join(f"{us / 1000:.1f}" for us in (row.snapshot_us, row.plan_us, row.commit_us))

    def more(self, request: HttpRequest, row: Cycle) -> dict[str, Any]:
        decided = self.rows_of(Decision, request).filter(cycle=row).select_related("job__organization").order_by("job")
        kept = self.rows_of(CycleRecord, request).filter(cycle=row).defer("body").first()
        return {"record": kept, "code": code(), "decided": decided[:SHOWN_DECISIONS]}


@admin.register(Decision, site=staff_site)
class DecisionAdmin(look.Shown, StaffAdmin):
    list_display = ("job", "at", "shown_outcome", "reason", "binding", "suggestion", "earliest_start")
    list_select_related = ("job", "cycle__cell")
    list_filter = ("outcome", "reason")
    search_fields = ("job__name",)
    ordering = ("-at",)
    fields = ("job", "cycle", "at", "shown_outcome", "reason", "binding", "suggestion", "earliest_start", "held_hosts")
    above = "desk/why.html"

    def more(self, request: HttpRequest, row: Decision) -> dict[str, Any]:  # noqa: ARG002
        return {"why": why.explain(row.job, staff=True), "job": row.job}

    @display(description="Outcome", ordering="outcome", label=look.TONES)
    def shown_outcome(self, row: Decision) -> str:
        return row.outcome


@admin.register(Curtailment, site=staff_site)
class StaffCurtailmentAdmin(CurtailmentRows, StaffAdmin):
    list_filter = ("state", "site", "source")
    search_fields = ("reference", "site__name")
    ordering = ("-id",)
