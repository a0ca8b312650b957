"""The budget: what an organization allows itself to spend an hour and a month, and how far the month has come."""

from typing import Any

from django.urls import path
from django.utils import timezone
from drf_spectacular.utils import OpenApiExample, extend_schema, extend_schema_serializer
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from billing.core import budgets
from marketplace.api.base import Resource, Shape
from marketplace.api.shapes import MoneyShape
from marketplace.models import Budget
from marketplace.services import spending as services
from scheduler import spending

EXAMPLE = {
    "object": "budget", "hourly": {"amount_minor": 20_000, "currency": "USD"}, "running": {"amount_minor": 9_960, "currency": "USD"},
    "monthly": {"amount_minor": 5_000_000, "currency": "USD"}, "month": "2026-11",
    "spent": {"amount_minor": 2_731_044, "currency": "USD"}, "measured_at": "2026-11-18T09:30:00Z", "told_percent": 50,
}  # fmt: skip


class LimitsShape(Shape):
    hourly_minor = serializers.IntegerField(
        required=False, allow_null=True, min_value=0, max_value=services.MOST_MINOR,
        help_text="most that running work paid by use may cost an hour, minor units; null: no limit",
    )  # fmt: skip
    monthly_minor = serializers.IntegerField(
        required=False, allow_null=True, min_value=0, max_value=services.MOST_MINOR,
        help_text="most that a UTC month should come to, minor units; null: no limit",
    )  # fmt: skip


@extend_schema_serializer(examples=[OpenApiExample("half used", EXAMPLE, response_only=True)])
class BudgetShape(serializers.Serializer):
    object = serializers.ChoiceField(["budget"])
    hourly = MoneyShape(allow_null=True, help_text="most that running work paid by use may cost an hour")
    running = MoneyShape(help_text="what it costs now")
    monthly = MoneyShape(allow_null=True, help_text="most that a UTC month should come to")
    month = serializers.CharField(allow_null=True, help_text="that `spent` is of; null before the first measurement")
    spent = MoneyShape(help_text="reservations and running seconds included")
    measured_at = serializers.DateTimeField(allow_null=True)
    told_percent = serializers.ChoiceField([0, *budgets.STEPS], help_text="highest step told in that month")


class BudgetResource(Resource):
    actions = {"GET": "billing:read", "PATCH": "billing:write"}
    model_queryset = Budget.objects.all()
    prefix = Budget.PREFIX

    def represent(self, row: Budget) -> dict[str, Any]:
        currency = row.organization.currency

        def money(minor: int | None) -> dict[str, Any] | None:
            return None if minor is None else {"amount_minor": minor, "currency": currency}

        running = spending.running_rate(row.organization.pk, now=timezone.now())
        return {
            "object": "budget",
            "hourly": money(row.hourly_minor),
            "running": money(budgets.minor(running, currency)),
            "monthly": money(row.monthly_minor),
            "month": None if row.month is None else f"{row.month:%Y-%m}",
            "spent": money(row.spent_minor),
            "measured_at": row.measured_at,
            "told_percent": row.told_percent,
        }

    @extend_schema(tags=["billing"], operation_id="budget_show", responses={200: BudgetShape})
    def get(self, request: Request) -> Response:  # noqa: ARG002
        return Response(self.represent(services.of(self.organization())))

    @extend_schema(tags=["billing"], operation_id="budget_change", request=LimitsShape, responses={200: BudgetShape})
    def patch(self, request: Request) -> Response:  # noqa: ARG002
        """Set limits; what is not named stays. New work on demand and on spot waits where it would go beyond; what runs goes on."""
        organization, body = self.organization(), self.read(LimitsShape)

        def effect() -> Response:
            return Response(self.represent(services.set_limits(self.actor, organization, now=timezone.now(), **body)))

        return self.write(effect)


urlpatterns = [path("budget", BudgetResource.as_view(), name="budget")]
