"""Pool feeds: where a pool says what it paid. Add, list, show, change, remove; what they take are receipts (api.profit)."""

from typing import Any

from django.urls import path
from django.utils import timezone
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from marketplace import ids
from marketplace.api.base import PublicId, Resource, Shape
from marketplace.api.keys import PAGE
from marketplace.api.shapes import page_of
from marketplace.errors import MarketError
from marketplace.models import PoolFeed, Site
from marketplace.services import pool_payouts

_OPTIONAL: dict[str, Any] = {"required": False}


class PoolFeedChange(Shape):
    url = serializers.CharField(max_length=300, help_text="asked with `since`; its answer: docs/power.md", **_OPTIONAL)
    secret = serializers.CharField(
        max_length=400, write_only=True, help_text="sent as a bearer token; kept sealed", **_OPTIONAL
    )
    enabled = serializers.BooleanField(**_OPTIONAL)
    poll_s = serializers.IntegerField(min_value=60, max_value=86_400, **_OPTIONAL)
    stale_after_s = serializers.IntegerField(
        min_value=3600, max_value=40 * 86_400, help_text="nothing newer paid for so long: overdue", **_OPTIONAL
    )


class PoolFeedRequest(PoolFeedChange):
    site = PublicId("sit")
    name = serializers.CharField(max_length=40, help_text="the pool, and the `source` of its receipts; never changed")
    url = serializers.CharField(max_length=300, help_text="asked with `since`; its answer: docs/power.md")


class PoolFeedShape(serializers.Serializer):
    id = serializers.CharField()
    object = serializers.ChoiceField(["pool_feed"])
    created_at = serializers.DateTimeField()
    site = serializers.CharField()
    name = serializers.CharField()
    url = serializers.CharField()
    has_secret = serializers.BooleanField()
    enabled = serializers.BooleanField()
    poll_s = serializers.IntegerField()
    stale_after_s = serializers.IntegerField()
    asked_at = serializers.DateTimeField(allow_null=True)
    heard_at = serializers.DateTimeField(allow_null=True, help_text="the newest answer that was understood whole")
    paid_until = serializers.DateTimeField(allow_null=True, help_text="the end of the newest time that was paid for")
    overdue = serializers.BooleanField()
    error = serializers.CharField(help_text="what of its last answer was refused, or why there was none")


class PoolFeedResource(Resource):
    model_queryset = PoolFeed.objects.all()
    prefix = PoolFeed.PREFIX
    filters = {"site": "site"}

    def represent(self, row: PoolFeed) -> dict[str, Any]:
        plain = (
            "created_at",
            "name",
            "url",
            "enabled",
            "poll_s",
            "stale_after_s",
            "asked_at",
            "heard_at",
            "paid_until",
        )
        return {
            "id": row.public_id,
            "object": "pool_feed",
            "site": ids.encode("sit", row.site_id),
            **{name: getattr(row, name) for name in plain},
            "has_secret": row.secret is not None,
            "overdue": pool_payouts.overdue(row, timezone.now()),
            "error": row.error,
        }


class PoolFeeds(PoolFeedResource):
    actions = {"GET": "payouts:read", "POST": "payouts:write"}

    @extend_schema(
        tags=["power"], operation_id="pool_feeds_list", responses={200: page_of("PoolFeed", PoolFeedShape)},
        parameters=[*PAGE, OpenApiParameter("site", str)],
    )  # fmt: skip
    def get(self, request: Request) -> Response:
        return self.listing(request)

    @extend_schema(
        tags=["power"], operation_id="pool_feeds_add", request=PoolFeedRequest, responses={201: PoolFeedShape}
    )
    def post(self, request: Request) -> Response:  # noqa: ARG002
        """Ask a pool for what it paid; each payout becomes a receipt of the site, once by the feed's name and the payout's id."""
        body = self.read(PoolFeedRequest)
        site = Site.objects.owned_by(self.actor.organization_id).filter(pk=body.pop("site")).first()
        if site is None:
            raise MarketError("not_found", "site: there is none of that id.", {"/site": "unknown"})
        return self.write(
            lambda: Response(self.represent(pool_payouts.add(self.actor, site, now=timezone.now(), **body)), status=201)
        )


class PoolFeedDetail(PoolFeedResource):
    actions = {"GET": "payouts:read", "PATCH": "payouts:write", "DELETE": "payouts:write"}

    @extend_schema(tags=["power"], operation_id="pool_feeds_show", responses={200: PoolFeedShape})
    def get(self, request: Request, pool_feed: str) -> Response:  # noqa: ARG002
        return Response(self.represent(self.row(pool_feed)))

    @extend_schema(
        tags=["power"], operation_id="pool_feeds_change", request=PoolFeedChange, responses={200: PoolFeedShape}
    )
    def patch(self, request: Request, pool_feed: str) -> Response:  # noqa: ARG002
        """Change it; it is asked anew at once."""
        row, body = self.row(pool_feed), self.read(PoolFeedChange)
        return self.write(
            lambda: Response(self.represent(pool_payouts.update(self.actor, row, now=timezone.now(), **body)))
        )

    @extend_schema(tags=["power"], operation_id="pool_feeds_remove", request=None, responses={204: None})
    def delete(self, request: Request, pool_feed: str) -> Response:  # noqa: ARG002
        """Its receipts stay."""
        row = self.row(pool_feed)

        def effect() -> Response:
            pool_payouts.remove(self.actor, row, now=timezone.now())
            return Response(status=204)

        return self.write(effect)


urlpatterns = [
    path("pool-feeds", PoolFeeds.as_view(), name="pool-feeds"),
    path("pool-feeds/<str:pool_feed>", PoolFeedDetail.as_view(), name="pool-feed"),
]
