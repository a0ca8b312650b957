"""Plans to convert a site: make one, list, show, its months as CSV."""

from typing import Any

from django.http import HttpResponse
from django.urls import path
from django.utils import timezone
from drf_spectacular.utils import OpenApiParameter, extend_schema, extend_schema_field
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from marketplace import ids
from marketplace.api.base import Resource, Shape
from marketplace.api.keys import PAGE
from marketplace.api.shapes import page_of
from marketplace.api.sites import site_of
from marketplace.models import ConversionPlan
from marketplace.services import conversions


def whole(low: int, high: int, text: str = "") -> serializers.IntegerField:
    return serializers.IntegerField(min_value=low, max_value=high, required=False, help_text=text)


CENTS = 10**13


class BatchShape(Shape):
    model = serializers.CharField(max_length=40)
    count = serializers.IntegerField(min_value=1, max_value=1_000_000)
    watts = serializers.IntegerField(min_value=1, max_value=20_000)
    ghs = serializers.IntegerField(min_value=1, max_value=10_000_000, help_text="GH/s")
    resale_cents = whole(0, 10**7, "each, today")


class HallShape(Shape):
    name = serializers.CharField(max_length=60)
    gross_w = serializers.IntegerField(min_value=1, max_value=5 * 10**9, help_text="W at the meter")
    cooling = serializers.ChoiceField(conversions.COOLING, required=False, help_text="chooses the assumed PUE and rack")
    usable_permille = whole(1, 1000, "of its power, for AI: after redundancy and the continuous rule")
    pue_permille = whole(1000, 3000)
    mining_pue_permille = whole(1000, 3000)
    rack_w = whole(1000, 2_000_000)
    capex_cents_per_mw = whole(0, CENTS, "of critical IT")
    permit_months = whole(0, 120)
    lead_months = whole(0, 120)
    build_months = whole(1, 120)
    commission_months = whole(0, 120)
    keep_w = whole(0, 5 * 10**9, "IT watts of miners that stay beside the racks, and hash with what these leave")
    miners = serializers.ListField(child=BatchShape(), max_length=50, required=False)


class IncomeShape(Shape):
    kind = serializers.ChoiceField(conversions.INCOME, required=False)
    cents_per_kw_month = whole(0, 10**7, "lease: of delivered critical IT")
    energy_passed_on = serializers.BooleanField(required=False, help_text="lease: the tenant pays its energy")
    price_uusd = whole(0, 10**10, "rental: millionths of a USD per GPU-hour")
    decline_permille = whole(0, 1000, "rental: a year")
    gpu_w = whole(1, 20_000, "rental: IT watts a GPU")
    gpu_cents = whole(0, 10**9, "rental: a GPU with its part of the server and fabric")
    cost_permille = whole(0, 1000, "of what is earned, to run it")


class ConversionMarketShape(Shape):
    hashprice = whole(1, 10**10, "uUSD per PH/s per day")
    hashprice_permille_month = whole(-500, 500)
    energy_uusd_mwh = whole(0, 10**10)
    energy_permille_year = whole(-500, 500)
    pool_fee_ppm = whole(0, 1_000_000)
    mining_cost_uusd_mwh = whole(0, 10**10)
    resale_permille_month = whole(0, 1000)


class NewConversionPlanShape(Shape):
    name = serializers.CharField(max_length=80)
    halls = serializers.ListField(
        child=HallShape(), max_length=12, required=False, help_text="left out: the site's own, with their miners"
    )
    income = IncomeShape(required=False)
    market = ConversionMarketShape(required=False)
    horizon_months = whole(12, 240)
    term_months = whole(1, 240, "so long a live hall earns")
    ramp_months = whole(1, 60)
    target_permille = whole(0, 1000)
    deposit_permille = whole(0, 1000)
    crews = whole(1, 12, "halls under works at a time")
    capital_cents = whole(0, 10**15, "left out: no limit")
    wacc_permille = whole(0, 1000)


@extend_schema_field({"oneOf": [{"type": "integer"}, {"type": "string"}]})
class NumberOrChoice(serializers.JSONField):
    """A number, or the name of a choice."""


class AssumptionShape(serializers.Serializer):
    name = serializers.CharField()
    value = NumberOrChoice(help_text="a number of the unit, or the name of a choice")
    unit = serializers.CharField()
    source = serializers.CharField()  # type: ignore[assignment]  # the field's word for where it is from
    date = serializers.CharField()
    confidence = serializers.ChoiceField(("high", "medium", "low", "given"))


class HallPhaseShape(serializers.Serializer):
    month = serializers.IntegerField()
    phase = serializers.CharField()


class PlannedHallShape(serializers.Serializer):
    name = serializers.CharField()
    start = serializers.IntegerField(allow_null=True, help_text="month; null: it stays as it is")
    it_w = serializers.IntegerField()
    racks = serializers.IntegerField()
    phases = HallPhaseShape(many=True)


class PlannedMonthShape(serializers.Serializer):
    month = serializers.IntegerField()
    ai_w = serializers.IntegerField()
    hashing_w = serializers.IntegerField()
    works_w = serializers.IntegerField()
    ai_cents = serializers.IntegerField()
    hashing_cents = serializers.IntegerField()
    energy_cents = serializers.IntegerField()
    running_cents = serializers.IntegerField()
    capital_cents = serializers.IntegerField()
    resale_cents = serializers.IntegerField()
    hashing_on_cents = serializers.IntegerField(help_text="had nothing been converted")


class SwingShape(serializers.Serializer):
    name = serializers.CharField()
    low = serializers.CharField()
    high = serializers.CharField()
    low_cents = serializers.IntegerField()
    high_cents = serializers.IntegerField()


class ConversionSummaryShape(serializers.Serializer):
    id = serializers.CharField()
    object = serializers.CharField()
    created_at = serializers.DateTimeField()
    site = serializers.CharField()
    name = serializers.CharField()
    currency = serializers.CharField()
    npv_cents = serializers.IntegerField(help_text="an estimate, at wacc_permille")
    npv_hashing_on_cents = serializers.IntegerField()
    gain_cents = serializers.IntegerField()
    irr_permille = serializers.IntegerField(allow_null=True, help_text="a year, of the gain")
    payback_months = serializers.IntegerField(allow_null=True)
    capital_cents = serializers.IntegerField()


class ConversionPlanShape(ConversionSummaryShape):
    halls = PlannedHallShape(many=True)
    months = PlannedMonthShape(many=True)
    sensitivity = SwingShape(many=True)
    assumptions = AssumptionShape(many=True)
    given = serializers.JSONField()


ConversionPlanPage = page_of("ConversionPlan", ConversionSummaryShape)


class ConversionResource(Resource):
    model_queryset = ConversionPlan.objects.all()
    prefix = ConversionPlan.PREFIX
    filters = {"site": "site"}

    def represent(self, row: ConversionPlan) -> dict[str, Any]:
        return {
            "id": row.public_id,
            "object": "conversion_plan",
            "created_at": row.created_at,
            "site": ids.encode("sit", row.site_id),
            "name": row.name,
            "currency": "USD",
            "npv_cents": row.npv_cents,
            "npv_hashing_on_cents": row.npv_hashing_on_cents,
            "gain_cents": row.gain_cents,
            "irr_permille": row.irr_permille,
            "payback_months": row.payback_months,
            "capital_cents": row.capital_cents,
        }

    def whole(self, row: ConversionPlan) -> dict[str, Any]:
        found = row.outcome
        return {
            **self.represent(row),
            "halls": [
                {**hall, "phases": [{"month": month, "phase": phase} for month, phase in hall["phases"]]}
                for hall in found["halls"]
            ],
            "months": [
                {**dict(zip(conversions.COLUMNS, values, strict=True)), "hashing_on_cents": stays}
                for values, stays in zip(found["months"], found["hashing_on"], strict=True)
            ],
            "sensitivity": found["sensitivity"],
            "assumptions": row.assumptions,
            "given": row.given,
        }


class ConversionPlans(ConversionResource):
    actions = {"GET": "sites:read"}

    @extend_schema(
        tags=["sites"], operation_id="conversion_plans_list", responses={200: ConversionPlanPage},
        parameters=[*PAGE, OpenApiParameter("site", str)],
    )  # fmt: skip
    def get(self, request: Request) -> Response:
        return self.listing(request, self.queryset().defer("given", "used", "assumptions", "outcome"))


class SiteConversionPlans(ConversionResource):
    actions = {"POST": "sites:write"}

    @extend_schema(
        tags=["sites"], operation_id="conversion_plans_make", request=NewConversionPlanShape,
        responses={201: ConversionPlanShape},
    )  # fmt: skip
    def post(self, request: Request, site: str) -> Response:  # noqa: ARG002
        """Which halls to convert and when, the megawatts and the cash of each month. A plan is advice: nothing changes by it.

        What is left out is read off the site, or assumed: `assumptions` has each value with its source, date and confidence.
        """
        row, body = site_of(self.actor, site), self.read(NewConversionPlanShape)
        return self.write(
            lambda: Response(self.whole(conversions.make(self.actor, row, now=timezone.now(), **body)), status=201)
        )


class ConversionPlanDetail(ConversionResource):
    actions = {"GET": "sites:read"}

    @extend_schema(tags=["sites"], operation_id="conversion_plans_show", responses={200: ConversionPlanShape})
    def get(self, request: Request, plan: str) -> Response:  # noqa: ARG002
        return Response(self.whole(self.row(plan)))


class ConversionPlanMonths(ConversionResource):
    actions = {"GET": "sites:read"}

    @extend_schema(tags=["sites"], operation_id="conversion_plans_months", responses={(200, "text/csv"): str})
    def get(self, request: Request, plan: str) -> HttpResponse:  # noqa: ARG002
        row = self.row(plan)
        return _file(row, "months", conversions.months_csv(row))


class ConversionPlanAssumptions(ConversionResource):
    actions = {"GET": "sites:read"}

    @extend_schema(tags=["sites"], operation_id="conversion_plans_assumptions", responses={(200, "text/csv"): str})
    def get(self, request: Request, plan: str) -> HttpResponse:  # noqa: ARG002
        row = self.row(plan)
        return _file(row, "assumptions", conversions.assumptions_csv(row))


def _file(row: ConversionPlan, what: str, text: str) -> HttpResponse:
    answer = HttpResponse(text, content_type="text/csv; charset=utf-8")
    answer["Content-Disposition"] = f'attachment; filename="{row.public_id}-{what}.csv"'
    return answer


urlpatterns = [
    path("conversion-plans", ConversionPlans.as_view(), name="conversion-plans"),
    path("conversion-plans/<str:plan>", ConversionPlanDetail.as_view(), name="conversion-plan"),
    path("conversion-plans/<str:plan>/months.csv", ConversionPlanMonths.as_view(), name="conversion-plan-months"),
    path(
        "conversion-plans/<str:plan>/assumptions.csv",
        ConversionPlanAssumptions.as_view(),
        name="conversion-plan-assumptions",
    ),
    path("sites/<str:site>/conversion-plans", SiteConversionPlans.as_view(), name="site-conversion-plans"),
]
