"""Our own people's screenings: the queue of those that wait for a person, the evidence, the decision and what follows from it."""

from typing import Any

from django import forms
from django.contrib import admin
from django.http import HttpRequest
from unfold.decorators import display

from marketplace.admin import look
from marketplace.admin.base import RowsInline, StaffAdmin
from marketplace.admin.doors import staff_site
from marketplace.admin.moves import Call, Move
from marketplace.models import BusinessProfile, Contract, Job, Screening, ScreeningEvent
from marketplace.services import contracts, screening
from marketplace.services.screening.notices import CHECKS

SHOWN = 50
TONES = {"clear": "success", "pending": "warning", "review": "warning", "expired": "warning", "rejected": "danger"}


class DecisionForm(forms.Form):
    """`seen`: the version that was looked at when the form was opened."""

    seen = forms.IntegerField(widget=forms.HiddenInput)
    reason = forms.CharField(
        label="Reason",
        max_length=500,
        widget=forms.Textarea(attrs={"rows": 3}),
        help_text="On record; not shown to them.",
    )
    message = forms.CharField(
        label="Tell them", max_length=300, required=False, widget=forms.Textarea(attrs={"rows": 3}),
        help_text="In the mail and on their page; empty: only where the check stands.",
    )  # fmt: skip


class AskForm(DecisionForm):
    message = forms.CharField(
        label="Ask them",
        max_length=300,
        widget=forms.Textarea(attrs={"rows": 3}),
        help_text="In the mail and on their page.",
    )


class EndForm(forms.Form):
    reason = forms.CharField(label="Reason", max_length=120, help_text="On record of each contract, and in their mail.")


def _seen(row: Screening) -> dict[str, Any]:
    return {"seen": row.version}


def _decide(to: str) -> Any:
    def run(call: Call) -> str:
        row = screening.decide(
            call.actor, call.row.pk, to, seen=call.values["seen"], reason=call.values["reason"],
            message=call.values["message"], now=call.now,
        )  # fmt: skip
        if row.proposed:
            return f"Proposed: {to}. A second person must say the same."
        return f"The {row.kind} check of {row.organization} is {row.state}."

    return run


def _end(call: Call) -> str:
    gone = contracts.close_out(call.actor, call.row.organization_id, now=call.now, reason=call.values["reason"])
    return f"{len(gone)} contracts of {call.row.organization} end; their jobs get their checkpoint signal and grace."


def _live(row: Screening) -> Any:
    live = Contract.objects.owned_by(row.organization_id).filter(state__in=("pending_payment", "active", "ending"))
    return live.order_by("-pk")


class Events(RowsInline):
    model = ScreeningEvent
    fields = ("at", "actor", "what", "from_state", "to_state", "round", "reason")
    ordering = ("-pk",)
    verbose_name_plural = "what was asked, answered and decided"


@admin.register(Screening, site=staff_site)
class ScreeningAdmin(look.Shown, StaffAdmin):
    list_display = (
        "organization", "kind", "shown_state", "shown_waits", "country", "changed_at", "valid_until", "provider", "shown_error",
    )  # fmt: skip
    list_select_related = ("organization",)
    list_filter = ("state", "kind", "needs_person", "provider")
    search_fields = ("organization__name",)
    ordering = ("-needs_person", "changed_at", "pk")
    fields = (
        "organization", "kind", "shown_state", "round", "version", "changed_at", "valid_until", "renew_at", "provider",
        "provider_version", "ask_at", "failures", "last_error", "message", "decided_by", "proposed", "proposed_by",
    )  # fmt: skip
    inlines = (Events,)
    above = "desk/screening.html"
    moves = (
        Move(
            name="clear", label="Clear it", action="audit:read", run=_decide("clear"), form=DecisionForm, initial=_seen, icon="verified",
            question="The check has passed: they may sign and be paid as far as it goes.",
        ),
        Move(
            name="ask", label="Ask them", action="audit:read", run=_decide("review"), form=AskForm, initial=_seen, icon="contact_support",
            possible=lambda row: row.state != "rejected", question="It goes on waiting for one of us, and they are asked.",
        ),
        Move(
            name="reject", label="Reject it", action="audit:read", run=_decide("rejected"), form=DecisionForm, initial=_seen, icon="block",
            danger=True, possible=lambda row: row.state != "rejected",
            question="Nothing new from now on: no contract, no job, no payout. What runs goes on until you end it.",
        ),
        Move(
            name="end", label="End its contracts", action="audit:read", run=_end, form=EndForm, icon="cancel", danger=True,
            possible=lambda row: row.state == "rejected" and _live(row).exists(), atomic=False,
            question="All live contracts of the organization end now. Waiting jobs are cancelled, running ones get their checkpoint "
            "signal and grace; what nobody used is not billed.",
        ),
    )  # fmt: skip

    def more(self, request: HttpRequest, row: Screening) -> dict[str, Any]:
        profile = self.rows_of(BusinessProfile, request).filter(organization=row.organization_id).first()
        answers = self.rows_of(ScreeningEvent, request).filter(screening=row, what="answered").order_by("-pk")
        last = answers.first()
        found = dict(last.evidence) if last else {}
        matches = [match for match in found.pop("matches", []) if isinstance(match, dict)]
        return {
            "check": row,
            "asks": CHECKS[Screening.Kind(row.kind)],
            "profile": profile,
            "facts": [(name.replace("_", " "), _plain(value)) for name, value in row.facts.items()],
            "last": last,
            "matches": matches,
            "evidence": [(name.replace("_", " "), _plain(value)) for name, value in found.items()],
            "contracts": _live(row)[:SHOWN],
            "jobs": Job.objects.owned_by(row.organization_id).filter(state__in=("running", "placed", "queued")).count(),
            "others": self.rows_of(Screening, request).filter(organization=row.organization_id).exclude(pk=row.pk),
        }

    @display(description="State", ordering="state", label=TONES)
    def shown_state(self, row: Screening) -> str:
        return row.state

    @display(description="Waits for", label={"us": "danger", "them": "info", "the provider": "warning"})
    def shown_waits(self, row: Screening) -> str:
        if row.needs_person:
            return "us"
        if row.ask_at is not None:
            return "the provider"
        return "them" if row.state in {"pending", "expired"} else "–"

    @display(description="Country", ordering="organization__country")
    def country(self, row: Screening) -> str:
        return row.organization.country

    @display(description="Last error")
    def shown_error(self, row: Screening) -> str:
        return row.last_error[:80]


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
