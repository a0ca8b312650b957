"""What is free, when: of one listing, and of all offers that match a search."""

from datetime import datetime, timedelta
from typing import Any

from django.urls import path
from django.utils import timezone
from drf_spectacular.utils import extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from marketplace import ids
from marketplace.api import shapes
from marketplace.api.base import Shape
from marketplace.api.listing_shapes import FilterShape, filters_of
from marketplace.api.listings import ListingResource
from marketplace.errors import MarketError
from marketplace.models import Kind, Listing
from marketplace.services import availability, calendars
from scheduler.core.capacity import LEVELS


class CalendarQuery(Shape):
    start = serializers.DateTimeField(required=False, help_text="now, where left out")
    end = serializers.DateTimeField(required=False, help_text="31 days after start, where left out")
    step_hours = serializers.IntegerField(required=False, min_value=1, max_value=24 * 31, default=24)
    level = serializers.ChoiceField(LEVELS, required=False, default="site", help_text="`gpus` is of this one")
    kind = serializers.ChoiceField(
        Kind.choices, required=False, help_text="decides the lead; the first that holds capacity"
    )
    count = serializers.IntegerField(
        required=False,
        min_value=1,
        max_value=1_000_000,
        help_text="GPUs in one block: says which steps and windows fit",
    )
    term_hours = serializers.IntegerField(
        required=False, min_value=1, max_value=24 * 1096, default=24, help_text="the least that a window must last"
    )


class CellShape(serializers.Serializer):
    at = serializers.DateTimeField(help_text="where the step begins")
    starts_at = serializers.DateTimeField(
        help_text="of the window counted: the step, less the lead where a neighbour needs it"
    )
    ends_at = serializers.DateTimeField()
    gpus = serializers.IntegerField(help_text="largest block for all of the window, at `level`")


class ListingCell(CellShape):
    levels = serializers.DictField(child=serializers.IntegerField(), help_text="the same at every level")
    fits = serializers.BooleanField(required=False, help_text="`count` GPUs; only where a count was asked for")


class WindowShape(serializers.Serializer):
    starts_at = serializers.DateTimeField()
    ends_at = serializers.DateTimeField(help_text="the latest end for this start")


class CalendarShape(serializers.Serializer):
    object = serializers.CharField()
    listing = serializers.CharField()
    kind = serializers.ChoiceField(Kind.choices)
    level = serializers.ChoiceField(LEVELS)
    as_of = serializers.DateTimeField()
    data = ListingCell(many=True)  # type: ignore[assignment]
    windows = WindowShape(many=True, help_text="the first in which `count` GPUs are free for `term_hours` or longer")


class MarketCalendarQuery(FilterShape):
    step_hours = serializers.IntegerField(required=False, min_value=1, max_value=24 * 31, default=24)


class MarketCell(CellShape):
    offers = serializers.IntegerField(help_text="that have `count` GPUs free in it")
    cheapest = serializers.CharField(
        allow_null=True, help_text="of these, the listing with the lowest price of its kind"
    )


class MarketCalendarShape(serializers.Serializer):
    object = serializers.CharField()
    level = serializers.ChoiceField(LEVELS)
    as_of = serializers.DateTimeField()
    data = MarketCell(many=True)  # type: ignore[assignment]


def _cuts(query: dict[str, Any], now: datetime) -> list[tuple[datetime, datetime]]:
    start = query.get("start") or now
    end = query.get("end") or start + timedelta(days=31)
    step = timedelta(hours=query["step_hours"])
    if end <= start or (end - start) / step > calendars.MAX_STEPS:
        most = f"after start, at most {calendars.MAX_STEPS} steps"
        raise MarketError("invalid_request", f"end is {end:%F %R}: {most}.", {"/end": most})
    return calendars.steps(start, end, step, now)


class ListingCalendar(ListingResource):
    actions = {"GET": "listings:read"}

    @extend_schema(
        tags=["listings"], operation_id="listings_calendar", responses={200: CalendarShape}, parameters=[CalendarQuery]
    )
    def get(self, request: Request, listing: str) -> Response:
        """Per step, the most GPUs that one block can have for all of it, at every level of the topology; what is past is left out.

        With `count`: which steps have that many, and the first windows that do.
        """
        row = self.row(listing)
        query = shapes.query(request, CalendarQuery)
        now = timezone.now().replace(microsecond=0)
        kind, level, count = query.get("kind") or calendars.kind_of(row), query["level"], query.get("count")
        cuts = _cuts(query, now)
        market = availability.load([row], now)
        cells = [
            {
                "at": c.at, "starts_at": c.start, "ends_at": c.end, "gpus": c.gpus[level], "levels": c.gpus,
                **({} if count is None else {"fits": c.gpus[level] >= count}),
            }
            for c in calendars.of_listing(row, cuts, now=now, kind=kind, market=market)
        ]  # fmt: skip
        windows = (
            calendars.first_windows(
                row, gpus=count, level=level, span=timedelta(hours=query["term_hours"]), starts_at=cuts[0][0],
                ends_at=cuts[-1][1], now=now, kind=kind, market=market,
            )
            if count and cuts
            else []
        )  # fmt: skip
        return Response(
            {
                "object": "calendar", "listing": row.public_id, "kind": kind, "level": level, "as_of": now, "data": cells,
                "windows": [{"starts_at": a, "ends_at": b} for a, b in windows],
            }
        )  # fmt: skip


class MarketCalendar(ListingResource):
    actions = {"GET": "listings:read"}

    @extend_schema(
        tags=["listings"],
        operation_id="calendar",
        responses={200: MarketCalendarShape},
        parameters=[MarketCalendarQuery],
    )
    def get(self, request: Request) -> Response:
        """Per step of [start, end), what the offers that match the other filters could give for all of it."""
        query = shapes.query(request, MarketCalendarQuery)
        now = timezone.now().replace(microsecond=0)
        if "end" in query and "start" not in query:
            query["start"] = now
        wanted = filters_of({k: v for k, v in query.items() if k not in {"start", "end"}})
        found = calendars.of_search(self.actor, wanted, _cuts(query, now), now=now)
        cells = [
            {
                "at": c.at, "starts_at": c.start, "ends_at": c.end, "gpus": c.gpus, "offers": c.offers,
                "cheapest": None if c.cheapest is None else ids.encode(Listing.PREFIX, c.cheapest),
            }
            for c in found
        ]  # fmt: skip
        return Response({"object": "market_calendar", "level": wanted.level, "as_of": now, "data": cells})


urlpatterns = [
    path("calendar", MarketCalendar.as_view(), name="calendar"),
    path("listings/<str:listing>/calendar", ListingCalendar.as_view(), name="listing-calendar"),
]
