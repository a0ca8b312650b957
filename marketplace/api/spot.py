"""Spot: public price history by listing, and what a contract got in each auction. The limit is changed at the contract."""

from typing import Any

from django.urls import path
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from marketplace import ids
from marketplace.api import shapes
from marketplace.api.base import Resource
from marketplace.api.contracts import ContractResource
from marketplace.models import SpotInterval, SpotResult
from marketplace.models.spot import INTERVAL


class SpotPriceShape(serializers.Serializer):
    id = serializers.CharField()
    object = serializers.CharField()
    listing = serializers.CharField()
    cell = serializers.CharField()
    region = serializers.CharField()
    gpu_model = serializers.CharField(allow_null=True)
    start = serializers.DateTimeField()
    end = serializers.DateTimeField()
    price = shapes.PriceShape()
    floor = shapes.PriceShape()
    supply_gpus = serializers.FloatField(help_text="for sale")
    demand_gpus = serializers.FloatField(help_text="wanted by bids at any limit")
    sold_gpus = serializers.FloatField()
    carried = serializers.BooleanField(help_text="no auction took place: the price before it went on")


class SpotResultShape(serializers.Serializer):
    id = serializers.CharField()
    object = serializers.CharField()
    contract = serializers.CharField()
    start = serializers.DateTimeField()
    end = serializers.DateTimeField()
    limit_price = shapes.PriceShape(help_text="when the auction closed")
    price = shapes.PriceShape(help_text="what its running seconds cost: never more than its limit")
    wanted_gpus = serializers.FloatField()
    won_gpus = serializers.FloatField()
    outcome = serializers.ChoiceField(SpotResult.Outcome.choices)
    reason = serializers.CharField(help_text="why not all of it: under_floor, outbid, does_not_fit; or empty")
    lost_jobs = serializers.ListField(child=serializers.CharField(), help_text="may not run in it")


class SpotPrices(Resource):
    actions = {"GET": "public"}
    model_queryset = SpotInterval.objects.select_related("listing__site", "cell", "gpu_model")
    prefix = SpotInterval.PREFIX
    filters = {
        "listing": "listing", "cell": "cell__name", "region": "listing__site__region", "gpu_model": "gpu_model__name",
        "from": "start__gte", "to": "start__lt",
    }  # fmt: skip

    def represent(self, row: SpotInterval) -> dict[str, Any]:
        return {
            "id": row.public_id,
            "object": "spot_price",
            "listing": row.listing.public_id,
            "cell": row.cell.name,
            "region": row.listing.site.region,
            "gpu_model": row.gpu_model.name if row.gpu_model else None,
            "start": row.start,
            "end": row.end,
            "price": shapes.price(row.price, row.currency),
            "floor": shapes.price(row.floor, row.currency),
            "supply_gpus": row.supply_milli / 1000,
            "demand_gpus": row.demand_milli / 1000,
            "sold_gpus": row.sold_milli / 1000,
            "carried": row.carried,
        }

    @extend_schema(
        tags=["spot"], operation_id="spot_prices_list", responses={200: shapes.page_of("SpotPrice", SpotPriceShape)},
        parameters=[
            *(OpenApiParameter(n, str) for n in ("listing", "cell", "region", "gpu_model", "limit", "cursor")),
            OpenApiParameter("from", str, description="intervals that begin at this instant or later"),
            OpenApiParameter("to", str, description="intervals that begin before this instant"),
        ],
    )  # fmt: skip
    def get(self, request: Request) -> Response:
        """What spot has cost, the newest auction first. The next interval stands here from two minutes before it begins."""
        return self.listing(request)


class ContractSpotResults(ContractResource):
    actions = {"GET": "contracts:read"}

    @extend_schema(
        tags=["spot"], operation_id="contracts_spot_results", responses={200: shapes.page_of("SpotResult", SpotResultShape)},
        parameters=[OpenApiParameter(n, str) for n in ("limit", "cursor")],
    )  # fmt: skip
    def get(self, request: Request, contract: str) -> Response:
        """What a spot contract got in each auction in which it wanted something, newest first."""
        row = self.row(contract)
        query = shapes.query(request, shapes.PageQuery)
        rows = SpotResult.objects.visible_to(self.actor).filter(contract=row).select_related("contract")
        return Response(shapes.page(_result, rows, query))


def _result(row: SpotResult) -> dict[str, Any]:
    return {
        "id": row.public_id,
        "object": "spot_result",
        "contract": row.contract.public_id,
        "start": row.start,
        "end": row.start + INTERVAL,
        "limit_price": shapes.price(row.limit_price, row.contract.currency),
        "price": shapes.price(row.price, row.contract.currency),
        "wanted_gpus": row.wanted_milli / 1000,
        "won_gpus": row.won_milli / 1000,
        "outcome": row.outcome,
        "reason": row.reason,
        "lost_jobs": [ids.encode("job", pk) for pk in row.lost_jobs],
    }


urlpatterns = [
    path("spot-prices", SpotPrices.as_view(), name="spot-prices"),
    path("contracts/<str:contract>/spot-results", ContractSpotResults.as_view(), name="contract-spot-results"),
]
