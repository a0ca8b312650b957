"""Saved searches: kept filters that tell by mail, and here, when an offer begins to fit them."""

from typing import Any

from django.urls import path
from django.utils import timezone
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from marketplace.api import pagination, shapes
from marketplace.api.base import Resource, Shape
from marketplace.api.listing_shapes import FilterShape, filters_of
from marketplace.models import SavedMatch, SavedSearch
from marketplace.services import saved, search

PAGE = [OpenApiParameter("limit", int, description="1 to 100, 20 by default"), OpenApiParameter("cursor", str)]


class KeepShape(Shape):
    name = serializers.CharField(max_length=80)
    filters = FilterShape(help_text="as the query of a search")
    sort = serializers.ChoiceField(search.SORTS, required=False)
    cadence = serializers.ChoiceField(
        SavedSearch.Cadence.choices, required=False, help_text="daily: one mail at 07:00 UTC"
    )
    pause_minutes = serializers.IntegerField(
        required=False, min_value=0, max_value=saved.MAX_PAUSE_MINUTES, help_text="the least between two notices"
    )


class SavedShape(serializers.Serializer):
    id = serializers.CharField()
    object = serializers.CharField()
    created_at = serializers.DateTimeField()
    name = serializers.CharField()
    filters = serializers.DictField()
    sort = serializers.ChoiceField(search.SORTS)
    cadence = serializers.ChoiceField(SavedSearch.Cadence.choices)
    pause_minutes = serializers.IntegerField()
    state = serializers.ChoiceField(SavedSearch.State.choices)
    touched_at = serializers.DateTimeField(help_text="long after this it expires; reading it here counts as a look")
    told_at = serializers.DateTimeField(allow_null=True, help_text="of its newest notice")
    actions = serializers.ListField(child=serializers.CharField())


class MatchShape(serializers.Serializer):
    object = serializers.CharField()
    listing = serializers.CharField()
    title = serializers.CharField()
    found_at = serializers.DateTimeField()
    told_at = serializers.DateTimeField(allow_null=True, help_text="null: its notice waits")


class SavedResource(Resource):
    model_queryset = SavedSearch.objects.all()
    prefix = "sav"
    filters = {"state": "state"}

    def represent(self, row: SavedSearch) -> dict[str, Any]:
        plain = {k: ",".join(v) if isinstance(v, list) else v for k, v in row.filters.items()}
        return {
            "id": row.public_id,
            "object": "saved_search",
            "created_at": row.created_at,
            "name": row.name,
            "filters": plain,
            "sort": row.sort,
            "cadence": row.cadence,
            "pause_minutes": row.pause_minutes,
            "state": row.state,
            "touched_at": row.touched_at,
            "told_at": row.told_at,
            "actions": saved.actions(row),
        }


class SavedSearches(SavedResource):
    actions = {"GET": "searches:read", "POST": "searches:write"}

    @extend_schema(
        tags=["saved searches"], operation_id="saved_searches_list", responses={200: shapes.page_of("SavedSearch", SavedShape)},
        parameters=[OpenApiParameter("state", str, enum=SavedSearch.State.values), *PAGE],
    )  # fmt: skip
    def get(self, request: Request) -> Response:
        return self.listing(request)

    @extend_schema(
        tags=["saved searches"], operation_id="saved_searches_create", request=KeepShape, responses={201: SavedShape}
    )
    def post(self, request: Request) -> Response:  # noqa: ARG002
        """Keep a search. What fits now is not told; each offer that begins to fit is, once."""
        body = self.read(KeepShape)
        wanted = filters_of(body.pop("filters"))

        def effect() -> Response:
            made = saved.save(self.actor, body.pop("name"), wanted, **body, now=timezone.now())
            return Response(self.represent(made), status=201)

        return self.write(effect)


class SavedDetail(SavedResource):
    actions = {"GET": "searches:read", "PATCH": "searches:write", "DELETE": "searches:write"}

    @extend_schema(tags=["saved searches"], operation_id="saved_searches_show", responses={200: SavedShape})
    def get(self, request: Request, search: str) -> Response:  # noqa: ARG002
        row = self.row(search)
        saved.touch(row, now=timezone.now())
        return Response(self.represent(row))

    @extend_schema(
        tags=["saved searches"], operation_id="saved_searches_change", request=KeepShape, responses={200: SavedShape}
    )
    def patch(self, request: Request, search: str) -> Response:  # noqa: ARG002
        """Other filters are a new beginning: what fits them now is not told."""
        row = self.row(search)
        body = self.read(KeepShape, partial=True)
        wanted = filters_of(body.pop("filters")) if "filters" in body else None
        return self.write(
            lambda: Response(self.represent(saved.change(self.actor, row.pk, body, wanted=wanted, now=timezone.now())))
        )

    @extend_schema(tags=["saved searches"], operation_id="saved_searches_delete", responses={204: None})
    def delete(self, request: Request, search: str) -> Response:  # noqa: ARG002
        row = self.row(search)

        def effect() -> Response:
            saved.delete(self.actor, row.pk, now=timezone.now())
            return Response(status=204)

        return self.write(effect)


class SavedPause(SavedResource):
    actions = {"POST": "searches:write"}

    @extend_schema(
        tags=["saved searches"], operation_id="saved_searches_pause", request=None, responses={200: SavedShape}
    )
    def post(self, request: Request, search: str) -> Response:  # noqa: ARG002
        """Nothing is looked for until it is resumed."""
        row = self.row(search)
        return self.write(lambda: Response(self.represent(saved.pause(self.actor, row.pk, now=timezone.now()))))


class SavedResume(SavedResource):
    actions = {"POST": "searches:write"}

    @extend_schema(
        tags=["saved searches"], operation_id="saved_searches_resume", request=None, responses={200: SavedShape}
    )
    def post(self, request: Request, search: str) -> Response:  # noqa: ARG002
        """Look again. What fits now is not told; what begins to fit is."""
        row = self.row(search)
        return self.write(lambda: Response(self.represent(saved.resume(self.actor, row.pk, now=timezone.now()))))


class SavedMatches(SavedResource):
    actions = {"GET": "searches:read"}

    @extend_schema(
        tags=["saved searches"], operation_id="saved_searches_matches", responses={200: shapes.page_of("SavedMatch", MatchShape)},
        parameters=PAGE,
    )  # fmt: skip
    def get(self, request: Request, search: str) -> Response:
        """Offers that fit it, as of the last change of the market that concerned it, newest first; only those you may see."""
        row = self.row(search)
        query = shapes.query(request, shapes.PageQuery)
        shown = saved.shown_matches(self.actor, row)
        data, more, cursor = pagination.page(shown, query)
        return Response({"data": [_match(each) for each in data], "has_more": more, "cursor": cursor})


def _match(row: SavedMatch) -> dict[str, Any]:
    return {
        "object": "saved_match",
        "listing": row.listing.public_id,
        "title": row.listing.title,
        "found_at": row.found_at,
        "told_at": row.told_at,
    }


urlpatterns = [
    path("saved-searches", SavedSearches.as_view(), name="saved-searches"),
    path("saved-searches/<str:search>", SavedDetail.as_view(), name="saved-search"),
    path("saved-searches/<str:search>/pause", SavedPause.as_view(), name="saved-search-pause"),
    path("saved-searches/<str:search>/resume", SavedResume.as_view(), name="saved-search-resume"),
    path("saved-searches/<str:search>/matches", SavedMatches.as_view(), name="saved-search-matches"),
]
