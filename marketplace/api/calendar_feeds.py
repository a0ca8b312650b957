"""Calendars of maintenance for calendar programs: issued, listed, revoked."""

from typing import Any

from django.urls import path
from django.utils import timezone
from drf_spectacular.utils import extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from marketplace.api import shapes
from marketplace.api.base import Resource, Shape
from marketplace.api.keys import PAGE, show_once
from marketplace.models import CalendarFeed
from marketplace.services.maintenance import feeds


class CalendarFeedShape(serializers.Serializer):
    id = serializers.CharField()
    object = serializers.ChoiceField(["calendar_feed"])
    created_at = serializers.DateTimeField()
    name = serializers.CharField()
    last_used_at = serializers.DateTimeField(allow_null=True)
    revoked_at = serializers.DateTimeField(allow_null=True)


class NewCalendarFeedShape(CalendarFeedShape):
    token = serializers.CharField(allow_null=True, help_text="shown once; null when the answer is replayed")
    url = serializers.CharField(help_text="with {token} in the place of the token")


class IssueFeedShape(Shape):
    name = serializers.CharField(max_length=60, help_text="who reads it")


class CalendarFeedResource(Resource):
    model_queryset = CalendarFeed.objects.all()
    prefix = "cal"

    def represent(self, row: CalendarFeed) -> dict[str, Any]:
        return {
            "id": row.public_id,
            "object": "calendar_feed",
            "created_at": row.created_at,
            "name": row.name,
            "last_used_at": row.last_used_at,
            "revoked_at": row.revoked_at,
        }


class CalendarFeeds(CalendarFeedResource):
    actions = {"GET": "maintenance:read", "POST": "maintenance:write"}

    @extend_schema(
        tags=["maintenance"], operation_id="calendar_feeds_list", parameters=PAGE,
        responses={200: shapes.page_of("CalendarFeed", CalendarFeedShape)},
    )  # fmt: skip
    def get(self, request: Request) -> Response:
        return self.listing(request)

    @extend_schema(
        tags=["maintenance"], operation_id="calendar_feeds_issue", request=IssueFeedShape,
        responses={201: NewCalendarFeedShape},
    )  # fmt: skip
    def post(self, request: Request) -> Response:  # noqa: ARG002
        """A secret address at which a calendar program reads the maintenance that touches your contracts."""
        body = self.read(IssueFeedShape)

        def make() -> tuple[dict[str, Any], str]:
            row, token = feeds.issue(self.actor, body["name"], now=timezone.now())
            return {**self.represent(row), "url": feeds.address("{token}")}, token

        return show_once(self, make)


class CalendarFeedDetail(CalendarFeedResource):
    actions = {"GET": "maintenance:read", "DELETE": "maintenance:write"}

    @extend_schema(tags=["maintenance"], operation_id="calendar_feeds_show", responses={200: CalendarFeedShape})
    def get(self, request: Request, feed: str) -> Response:  # noqa: ARG002
        return Response(self.represent(self.row(feed)))

    @extend_schema(tags=["maintenance"], operation_id="calendar_feeds_revoke", responses={204: None})
    def delete(self, request: Request, feed: str) -> Response:  # noqa: ARG002
        """From now on its address answers nothing. Revoking twice is no error."""
        row = self.row(feed)

        def effect() -> Response:
            feeds.revoke(self.actor, row, now=timezone.now())
            return Response(status=204)

        return self.write(effect)


urlpatterns = [
    path("calendar-feeds", CalendarFeeds.as_view(), name="calendar-feeds"),
    path("calendar-feeds/<str:feed>", CalendarFeedDetail.as_view(), name="calendar-feed"),
]
