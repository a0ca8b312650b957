"""Quotes: a firm price with held capacity, itemised, and the body that accepts it."""

from dataclasses import fields
from typing import Any

from django.urls import path
from django.utils import timezone
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from marketplace.api import shapes
from marketplace.api.base import PublicId, Resource, Shape
from marketplace.models import Kind, Quote
from marketplace.services import maintenance, quotes
from marketplace.services.availability import HOLDING
from scheduler.core.capacity import LEVELS


class QuoteRequest(Shape):
    listing = PublicId("lst")
    kind = serializers.ChoiceField(Kind.choices)
    gpu_count = serializers.IntegerField(min_value=1, max_value=1_000_000, help_text="what is held, or the ceiling")
    level = serializers.ChoiceField(
        LEVELS, required=False, default="site", help_text="all GPUs inside one host, leaf, spine or site"
    )
    starts_at = serializers.DateTimeField(
        required=False, allow_null=True, default=None, help_text="to the minute; left out: at once"
    )
    ends_at = serializers.DateTimeField(required=False, allow_null=True, default=None)
    limit_price = serializers.IntegerField(
        required=False,
        allow_null=True,
        default=None,
        min_value=1,
        max_value=1 << 50,
        help_text="spot: millionths per GPU-hour",
    )
    upfront_max_permille = serializers.IntegerField(
        required=False, allow_null=True, default=None, min_value=0, max_value=1000,
        help_text="of the commitment, at most due at signing; left out: what the listing's plain price asks",
    )  # fmt: skip
    flexible_hours_max = serializers.IntegerField(
        required=False, allow_null=True, default=None, min_value=0, max_value=720,
        help_text="flexible: hours of curtailment a month, at most; left out: what the listing's plain price asks",
    )  # fmt: skip
    reference = serializers.CharField(max_length=80, required=False, default="", allow_blank=True)
    metadata = serializers.DictField(required=False, default=dict)


class NoticeShape(shapes.WorkShape):
    touches = serializers.BooleanField(help_text="jobs may have to leave; what is held is held clear of it")


class QuoteShape(serializers.Serializer):
    id = serializers.CharField()
    object = serializers.CharField()
    created_at = serializers.DateTimeField()
    listing = serializers.CharField()
    listing_version = serializers.IntegerField(help_text="of the listing, as quoted")
    terms = serializers.DictField(help_text="the listing's terms as quoted; the contract is made of these")
    state = serializers.ChoiceField(Quote.State.choices)
    kind = serializers.ChoiceField(Kind.choices)
    gpu_count = serializers.IntegerField()
    level = serializers.ChoiceField(LEVELS)
    starts_at = serializers.DateTimeField()
    ends_at = serializers.DateTimeField(allow_null=True)
    price = shapes.PriceShape()
    overage_price = shapes.PriceShape(allow_null=True)
    limit_price = shapes.PriceShape(allow_null=True)
    total = shapes.MoneyShape(allow_null=True, help_text="of the commitment; null: billed by use")
    due_at_signing = shapes.MoneyShape(allow_null=True, help_text="drawn down first; null: nothing")
    items = serializers.DictField(
        help_text="`basis` commitment, or per_hour_at_ceiling; `gpu_seconds`; `total`, and of it `to_the_operator` (`energy` is in that: "
        "Wh and average watts at full power, the site's overhead included, and what they cost at the grid's published price), "
        "`to_the_seller` and `platform_fee`; `tax`: what is charged on top, by which rule"
    )
    maintenance = NoticeShape(many=True, help_text="announced work on hosts of the listing during the quoted window")
    held_until = serializers.DateTimeField(allow_null=True)
    firm_until = serializers.DateTimeField()
    holds_capacity = serializers.BooleanField()
    accept = shapes.AcceptShape(allow_null=True)
    contract = serializers.CharField(allow_null=True)
    bid = serializers.CharField(allow_null=True, help_text="the standing bid that it came of")
    reference = serializers.CharField()
    metadata = serializers.DictField()
    actions = serializers.ListField(child=serializers.CharField())


class QuoteResource(Resource):
    model_queryset = Quote.objects.select_related("listing__resale", "contract", "bid", "organization")
    prefix = "quo"
    filters = {"state": "state", "listing": "listing", "kind": "kind", "reference": "reference", "bid": "bid"}

    def represent(self, row: Quote) -> dict[str, Any]:
        now = timezone.now()
        state = quotes.state_of(row, now)
        contract = getattr(row, "contract", None)
        items = quotes.itemise(row)
        open_ = state == Quote.State.OPEN
        return {
            "id": row.public_id,
            "object": "quote",
            "created_at": row.created_at,
            "listing": row.listing.public_id,
            "listing_version": row.listing_version,
            "terms": {name: value for name, value in row.terms.items() if name != "gpu_model_id"},
            "state": state,
            "kind": row.kind,
            "gpu_count": row.gpu_count,
            "level": row.level,
            "starts_at": row.starts_at,
            "ends_at": row.ends_at,
            "price": shapes.price(row.price, row.currency),
            "overage_price": shapes.price(row.overage_price, row.currency),
            "limit_price": shapes.price(row.limit_price, row.currency),
            "total": shapes.amount(row.total_minor, row.currency),
            "due_at_signing": shapes.amount(items["upfront_minor"] or None, row.currency),
            "items": {
                "basis": items["basis"],
                "gpu_seconds": items["gpu_seconds"],
                "total": shapes.amount(items["total_minor"], row.currency),
                "to_the_operator": shapes.amount(items["operator_minor"], row.currency),
                "to_the_seller": shapes.amount(items["seller_minor"] or None, row.currency),
                "platform_fee": shapes.amount(items["platform_fee_minor"], row.currency),
                "energy": _energy(items["energy"], row.currency),
                "tax": {
                    "amount": shapes.amount(items["tax"]["minor"], row.currency),
                    **{name: items["tax"][name] for name in ("rule", "text", "source")},
                },
            },
            "maintenance": [
                {**shapes.maintenance(work), "touches": row.kind not in HOLDING}
                for work in (maintenance.during(row, now) if open_ else ())
            ],
            "held_until": row.held_until,
            "firm_until": row.firm_until,
            "holds_capacity": bool(open_ and row.kind in HOLDING and row.held_until and row.held_until > now),
            "accept": quotes.accept_body(row) if open_ else None,
            "contract": None if contract is None else contract.public_id,
            "bid": row.bid.public_id if row.bid else None,
            "reference": row.reference,
            "metadata": row.metadata,
            "actions": ["accept", "release"] if open_ else [],
        }


def _energy(found: dict[str, Any] | None, currency: str) -> dict[str, Any] | None:
    """Of the operator's part: at most so much, with all GPUs at full power."""
    if found is None:
        return None
    return {
        "included": True,
        "wh": found["wh"],
        "watts": found["watts"],
        "at_grid_price": shapes.amount(found["minor"], currency),
        "source": found["source"],
    }


class Quotes(QuoteResource):
    actions = {"GET": "quotes:read", "POST": "quotes:write"}

    @extend_schema(
        tags=["quotes"], operation_id="quotes_list", responses={200: shapes.page_of("Quote", QuoteShape)},
        parameters=[OpenApiParameter(n, str) for n in ("state", "listing", "kind", "reference", "bid", "limit", "cursor")],
    )  # fmt: skip
    def get(self, request: Request) -> Response:
        return self.listing(request)

    @extend_schema(tags=["quotes"], operation_id="quotes_create", request=QuoteRequest, responses={201: QuoteShape})
    def post(self, request: Request) -> Response:  # noqa: ARG002
        """A firm price; `reserved` and `flexible` hold their capacity for two minutes. Refused: the reason, and what would fit."""
        body = self.read(QuoteRequest)
        wanted = quotes.Request(**{field.name: body[field.name] for field in fields(quotes.Request)})

        def effect() -> Response:
            made = quotes.quote(
                self.actor,
                body["listing"],
                wanted,
                reference=body["reference"],
                metadata=body["metadata"],
                now=timezone.now(),
            )
            return Response(self.represent(self.queryset().get(pk=made.pk)), status=201)

        return self.write(effect)


class QuoteDetail(QuoteResource):
    actions = {"GET": "quotes:read"}

    @extend_schema(tags=["quotes"], operation_id="quotes_show", responses={200: QuoteShape})
    def get(self, request: Request, quote: str) -> Response:  # noqa: ARG002
        return Response(self.represent(self.row(quote)))


class QuoteRelease(QuoteResource):
    actions = {"POST": "quotes:write"}

    @extend_schema(tags=["quotes"], operation_id="quotes_release", request=None, responses={200: QuoteShape})
    def post(self, request: Request, quote: str) -> Response:  # noqa: ARG002
        """Give it back before it lapses; what it held is free at once."""
        row = self.row(quote)

        def effect() -> Response:
            quotes.release(self.actor, row.pk, now=timezone.now())
            return Response(self.represent(self.row(quote)))

        return self.write(effect)


urlpatterns = [
    path("quotes", Quotes.as_view(), name="quotes"),
    path("quotes/<str:quote>", QuoteDetail.as_view(), name="quote"),
    path("quotes/<str:quote>/release", QuoteRelease.as_view(), name="quote-release"),
]
