"""The platform's freeze: one button for our own people, on record, and shown wherever sites are."""

from typing import Any

from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.urls import reverse
from django.utils import timezone
from django.views.decorators.http import require_POST
from unfold.decorators import display

from marketplace.admin.base import StaffAdmin
from marketplace.admin.doors import staff_actor, staff_site
from marketplace.errors import MarketError
from marketplace.models import PowerFreeze
from marketplace.services.power import freeze


def shown(request: HttpRequest) -> dict[str, Any]:
    """What the banner says (`desk/frozen.html`), and whether this person may press its button."""
    return {
        "freeze": freeze.standing(),
        "frozen": freeze.frozen(),
        "may_freeze": freeze.may(staff_actor(request)),
    }


@require_POST
def press(request: HttpRequest) -> HttpResponse:
    """`do` = freeze (with a `reason`, if any) | lift; back to the overview."""
    actor, now = staff_actor(request), timezone.now()
    try:
        if request.POST.get("do") == "lift":
            said = "Sites go on, each by its own mode." if freeze.lift(actor, now=now) else "Nothing was frozen."
        else:
            freeze.freeze(actor, reason=request.POST.get("reason", ""), now=now)
            said = "Frozen: no site raises power until you lift it."
    except MarketError as error:
        raise PermissionDenied(str(error)) from error
    messages.success(request, said)
    return HttpResponseRedirect(reverse("staff:index"))


class FreezeShown:
    """The banner above a list of sites, and above a site."""

    list_before_template = "desk/frozen.html"

    def changelist_view(self, request: HttpRequest, extra_context: dict[str, Any] | None = None) -> HttpResponse:
        found: HttpResponse = super().changelist_view(request, {**shown(request), **(extra_context or {})})  # type: ignore[misc]
        return found


@admin.register(PowerFreeze, site=staff_site)
class PowerFreezeAdmin(StaffAdmin):
    list_display = ("began_at", "began_by", "reason", "ended_at", "ended_by", "shown_stands")
    ordering = ("-id",)

    @display(description="Stands", boolean=True)
    def shown_stands(self, row: PowerFreeze) -> bool:
        return row.ended_at is None
