"""Shapes that several resources of the market show: money, prices, pages."""

from collections.abc import Callable, Mapping
from typing import Any

from django.db.models import QuerySet
from rest_framework import serializers
from rest_framework.request import Request

from billing.core import money
from marketplace.api import pagination
from marketplace.api.base import Shape
from marketplace.models import Maintenance
from marketplace.services.price_tiers import Option


class MoneyShape(serializers.Serializer):
    amount_minor = serializers.IntegerField(help_text="in the currency's minor unit")
    currency = serializers.CharField()


class PriceShape(serializers.Serializer):
    per_gpu_hour = serializers.IntegerField(help_text="millionths of the currency's major unit")
    currency = serializers.CharField()
    text = serializers.CharField(help_text="for people, such as `2.50 USD per GPU-hour`")


class AcceptShape(serializers.Serializer):
    method = serializers.CharField()
    path = serializers.CharField()
    body = serializers.DictField()


class PageQuery(Shape):
    limit = serializers.CharField(required=False)
    cursor = serializers.CharField(required=False)


class WorkShape(serializers.Serializer):
    """Announced maintenance, as everybody reads it."""

    id = serializers.CharField()
    object = serializers.ChoiceField(["maintenance"])
    state = serializers.ChoiceField(Maintenance.State.choices)
    category = serializers.ChoiceField(Maintenance.Category.choices)
    starts_at = serializers.DateTimeField()
    ends_at = serializers.DateTimeField()
    text = serializers.CharField(help_text="what is done")
    impact = serializers.CharField(help_text="what will likely be noticed")


class EventShape(serializers.Serializer):
    at = serializers.DateTimeField()
    actor = serializers.CharField()
    from_state = serializers.CharField()
    to_state = serializers.CharField()
    reason = serializers.CharField()


def page_of(name: str, shape: type[serializers.Serializer]) -> type[serializers.Serializer]:
    """`{data, has_more, cursor}` of a resource, for the OpenAPI document."""
    return type(
        f"{name}Page",
        (serializers.Serializer,),
        {
            "data": shape(many=True),
            "has_more": serializers.BooleanField(),
            "cursor": serializers.CharField(allow_null=True),
        },
    )


def amount(minor: int | None, currency: str) -> dict[str, Any] | None:
    return None if minor is None else {"amount_minor": minor, "currency": currency}


def price(millionths: int | None, currency: str) -> dict[str, Any] | None:
    """A price per GPU-hour with its text: at least the currency's digits, more where the price has more."""
    if millionths is None:
        return None
    whole, rest = divmod(millionths, money.MILLIONTHS)
    digits = f"{rest:06d}".rstrip("0").ljust(money.exponent(currency), "0")
    text = f"{whole}.{digits}" if digits else str(whole)
    return {"per_gpu_hour": millionths, "currency": currency, "text": f"{text} {currency} per GPU-hour"}


def prices(found: Mapping[str, Option], currency: str) -> dict[str, Any]:
    """Kind -> price, for the kinds on offer."""
    return {kind: price(option.price, currency) for kind, option in found.items()}


def maintenance(row: Maintenance) -> dict[str, Any]:
    """What everybody may read of announced work."""
    return {
        "id": row.public_id,
        "object": "maintenance",
        "state": row.state,
        "category": row.category,
        "starts_at": row.starts_at,
        "ends_at": row.ends_at,
        "text": row.text,
        "impact": row.impact,
    }


def query(request: Request, shape: type[serializers.Serializer]) -> dict[str, Any]:
    """The validated query string; unknown parameters are refused by name."""
    found = shape(data=request.query_params.dict())
    found.is_valid(raise_exception=True)
    return found.validated_data


def page(
    represent: Callable[[Any], dict[str, Any]], rows: QuerySet[Any], query: dict[str, str], *, order: str = "-id"
) -> dict[str, Any]:
    """One page of `rows`, each shown by `represent`."""
    data, more, cursor = pagination.page(rows, query, order=order)
    return {"data": [represent(row) for row in data], "has_more": more, "cursor": cursor}
