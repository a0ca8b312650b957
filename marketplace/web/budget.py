"""The budget: limits of an hour and a month, and how far the month has come."""

from decimal import Decimal
from typing import Any

from django import forms
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.urls import path, reverse
from django.utils import timezone

from billing.core import budgets
from billing.core.money import exponent
from marketplace.errors import MarketError
from marketplace.models import Organization
from marketplace.services import spending as services
from marketplace.web import charts
from marketplace.web.base import actor_of, done, page
from marketplace.web.forms import refuse
from scheduler import spending


class BudgetForm(forms.Form):
    """Amounts in the major unit."""

    def __init__(self, *args: Any, currency: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.digits = exponent(currency)
        for name, label, help_text in (
            ("monthly", "A month may cost", "Empty: no limit. Mails come at 50, 80 and 100 %, once each month."),
            ("hourly", "An hour may cost", "Empty: no limit. All work on demand and on spot together."),
        ):
            self.fields[name] = forms.DecimalField(
                label=f"{label}, {currency}", help_text=help_text, required=False, min_value=0, max_digits=14,
                decimal_places=self.digits,
            )  # fmt: skip

    def minor(self) -> dict[str, int | None]:
        values = {f"{name}_minor": self.cleaned_data[name] for name in ("hourly", "monthly")}
        return {name: None if value is None else int(value.scaleb(self.digits)) for name, value in values.items()}


@page(GET="billing:read", POST="billing:write")
def budget(request: HttpRequest) -> HttpResponse:
    organization: Organization = Organization.objects.owned_by(actor_of(request).organization_id).get()
    if request.method == "GET":
        return _show(request, organization)
    form = BudgetForm(request.POST, currency=organization.currency)
    if not form.is_valid():
        return _show(request, organization, form, status=400)
    try:
        services.set_limits(actor_of(request), organization, now=timezone.now(), **form.minor())
    except MarketError as error:
        refuse(form, error, {"monthly_minor": "monthly", "hourly_minor": "hourly"})
        return _show(request, organization, form, status=error.kind.status, error=error)
    return done(request, "The budget is set.", reverse("web:budget"))


def _show(
    request: HttpRequest, organization: Organization, form: BudgetForm | None = None, status: int = 200, **more: Any
) -> HttpResponse:
    row, currency, now = services.of(organization), organization.currency, timezone.now()
    measured = row.month is not None and (row.month.year, row.month.month) == (now.year, now.month)
    spent = row.spent_minor if measured else None
    part = spent * 100 // row.monthly_minor if spent is not None and row.monthly_minor else None
    running = budgets.minor(spending.running_rate(organization.pk, now=now), currency)
    if form is None:
        scale = -exponent(currency)
        minors = {"monthly": row.monthly_minor, "hourly": row.hourly_minor}
        initial = {name: None if minor is None else Decimal(minor).scaleb(scale) for name, minor in minors.items()}
        form = BudgetForm(currency=currency, initial=initial)
    context = {
        "row": row, "spent": spent, "part": part, "running": running, "currency": currency, "form": form, "now": now,
        "bar": charts.meter(max(0, min(100, part)), 100, label=f"{part} % of the budget is spent") if part is not None else "",
        "used_up": spent is not None and row.monthly_minor is not None and spent >= row.monthly_minor, **more,
    }  # fmt: skip
    return render(request, "budget.html", context, status=status)


urlpatterns = [path("billing/budget", budget, name="budget")]
