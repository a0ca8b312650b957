"""Grid sources: what may call a site down by itself. Add, list, show, change, remove; readings of a frequency."""

from typing import Any

from django.urls import path
from django.utils import timezone
from drf_spectacular.utils import extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from marketplace import ids
from marketplace.api.base import PublicId, Resource, Shape
from marketplace.api.power_shapes import GridSourcePage, GridSourceShape
from marketplace.errors import MarketError
from marketplace.models import GridSource, PowerNode
from marketplace.services import grid
from marketplace.services.grid import rules, sources

_OPTIONAL: dict[str, Any] = {"required": False}


class GridSourceChange(Shape):
    """Which fields a source of its kind has: docs/power.md."""

    name = serializers.CharField(max_length=60, **_OPTIONAL)
    enabled = serializers.BooleanField(**_OPTIONAL)
    cap_w = serializers.IntegerField(min_value=0, **_OPTIONAL)
    pays_uusd_mwh = serializers.IntegerField(min_value=0, max_value=10**13, **_OPTIONAL)
    stale_after_s = serializers.IntegerField(min_value=10, max_value=86_400 * 7, **_OPTIONAL)
    stale_policy = serializers.ChoiceField(GridSource.Stale.choices, **_OPTIONAL)
    strike_uusd_mwh = serializers.IntegerField(min_value=1, max_value=10**13, **_OPTIONAL)
    resume_uusd_mwh = serializers.IntegerField(min_value=1, max_value=10**13, **_OPTIONAL)
    urgent_uusd_mwh = serializers.IntegerField(min_value=1, max_value=10**13, allow_null=True, **_OPTIONAL)
    windows = serializers.IntegerField(min_value=1, max_value=96, **_OPTIONAL)
    resume_windows = serializers.IntegerField(min_value=1, max_value=96, **_OPTIONAL)
    zone = serializers.CharField(max_length=40, allow_blank=True, **_OPTIONAL)
    trip_mhz = serializers.IntegerField(min_value=1, max_value=100_000, **_OPTIONAL)
    back_mhz = serializers.IntegerField(min_value=1, max_value=100_000, **_OPTIONAL)
    hold_s = serializers.IntegerField(min_value=1, max_value=86_400, **_OPTIONAL)
    url = serializers.CharField(max_length=300, **_OPTIONAL)
    token_url = serializers.CharField(max_length=300, allow_blank=True, **_OPTIONAL)
    client_id = serializers.CharField(max_length=120, allow_blank=True, **_OPTIONAL)
    secret = serializers.CharField(max_length=400, write_only=True, help_text="of the client; kept sealed", **_OPTIONAL)
    program = serializers.CharField(max_length=128, allow_blank=True, **_OPTIONAL)
    ven_name = serializers.CharField(max_length=128, **_OPTIONAL)
    poll_s = serializers.IntegerField(min_value=5, max_value=3600, **_OPTIONAL)


class GridSourceRequest(GridSourceChange):
    node = PublicId("nod")
    kind = serializers.ChoiceField(GridSource.Kind.choices)
    name = serializers.CharField(max_length=60)
    cap_w = serializers.IntegerField(min_value=0)


class FrequencyReading(Shape):
    millihertz = serializers.IntegerField(min_value=0, max_value=1_000_000)
    at = serializers.DateTimeField(help_text="when it was measured; the same twice is one reading")


class FrequencyAnswer(serializers.Serializer):
    object = serializers.CharField()
    curtailment = serializers.CharField(allow_null=True, help_text="the call that stands for it")


class GridSourceResource(Resource):
    model_queryset = GridSource.objects.all()
    prefix = GridSource.PREFIX
    filters = {"site": "site", "kind": "kind"}

    def represent(self, row: GridSource) -> dict[str, Any]:
        common = {name: getattr(row, name) for name in sources.COMMON}
        return {
            "id": row.public_id,
            "object": "grid_source",
            "site": ids.encode("sit", row.site_id),
            "node": ids.encode("nod", row.node_id),
            "kind": row.kind,
            **common,
            "settings": {name: getattr(row, name) for name in sources.FIELDS[row.kind]},
            "has_secret": row.secret is not None,
            "heard_at": row.heard_at,
            "silent": rules.silent(row, timezone.now()),
            "reading": row.reading,
            "error": row.error,
        }


class GridSources(GridSourceResource):
    actions = {"GET": "power:read", "POST": "power:write"}

    @extend_schema(tags=["power"], operation_id="grid_sources_list", responses={200: GridSourcePage})
    def get(self, request: Request) -> Response:
        return self.listing(request)

    @extend_schema(
        tags=["power"], operation_id="grid_sources_add", request=GridSourceRequest, responses={201: GridSourceShape}
    )
    def post(self, request: Request) -> Response:  # noqa: ARG002
        body = self.read(GridSourceRequest)
        node = PowerNode.objects.owned_by(self.actor.organization_id).filter(pk=body.pop("node")).first()
        if node is None:
            raise MarketError("not_found", "node: there is none of that id.", {"/node": "unknown"})
        return self.write(
            lambda: Response(self.represent(grid.add(self.actor, node, now=timezone.now(), **body)), status=201)
        )


class GridSourceDetail(GridSourceResource):
    actions = {"GET": "power:read", "PATCH": "power:write", "DELETE": "power:write"}

    @extend_schema(tags=["power"], operation_id="grid_sources_show", responses={200: GridSourceShape})
    def get(self, request: Request, grid_source: str) -> Response:  # noqa: ARG002
        return Response(self.represent(self.row(grid_source)))

    @extend_schema(
        tags=["power"], operation_id="grid_sources_change", request=GridSourceChange, responses={200: GridSourceShape}
    )
    def patch(self, request: Request, grid_source: str) -> Response:  # noqa: ARG002
        row, body = self.row(grid_source), self.read(GridSourceChange)
        return self.write(lambda: Response(self.represent(grid.update(self.actor, row, now=timezone.now(), **body))))

    @extend_schema(tags=["power"], operation_id="grid_sources_remove", request=None, responses={204: None})
    def delete(self, request: Request, grid_source: str) -> Response:  # noqa: ARG002
        row = self.row(grid_source)

        def effect() -> Response:
            grid.remove(self.actor, row, now=timezone.now())
            return Response(status=204)

        return self.write(effect)


class GridSourceReadings(GridSourceResource):
    actions = {"POST": "power:write"}

    @extend_schema(
        tags=["power"], operation_id="grid_sources_reading", request=FrequencyReading, responses={200: FrequencyAnswer}
    )
    def post(self, request: Request, grid_source: str) -> Response:  # noqa: ARG002
        row, body = self.row(grid_source), self.read(FrequencyReading)

        def effect() -> Response:
            call = grid.take_frequency(row, now=timezone.now(), **body)
            return Response({"object": "frequency_reading", "curtailment": call.public_id if call else None})

        return self.write(effect)


urlpatterns = [
    path("grid-sources", GridSources.as_view(), name="grid-sources"),
    path("grid-sources/<str:grid_source>", GridSourceDetail.as_view(), name="grid-source"),
    path("grid-sources/<str:grid_source>/readings", GridSourceReadings.as_view(), name="grid-source-readings"),
]
