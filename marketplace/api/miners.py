"""ASICs of the operator's sites: shown, and held by hand where dispatch shall leave them alone."""

from typing import Any

from django.urls import path
from django.utils import timezone
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework.request import Request
from rest_framework.response import Response

from marketplace.api import shapes
from marketplace.api.base import Resource
from marketplace.api.keys import PAGE
from marketplace.api.site_shapes import ManualShape, MinerShape
from marketplace.models import Miner
from marketplace.services import sites


class MinerResource(Resource):
    model_queryset = Miner.objects.select_related("site", "power_node")
    prefix = "min"
    order = "id"
    filters = {"site": "site", "state": "state", "manual": "manual", "power_node": "power_node__name", "model": "model"}

    def filter_value(self, name: str, text: str) -> Any:
        if name == "manual":
            return {"true": True, "false": False}.get(text, text)
        return super().filter_value(name, text)

    def represent(self, row: Miner) -> dict[str, Any]:
        return {
            "id": row.public_id,
            "object": "miner",
            "site": row.site.public_id,
            "power_node": row.power_node.name,
            "name": row.name,
            "model": row.model,
            "driver": row.driver,
            "address": row.address,
            "modes": [
                {"name": name, "watts": watts, "ghs": ghs}
                for name, watts, ghs in zip(row.mode_names, row.mode_watts, row.mode_ghs, strict=True)
            ],
            "state": row.state,
            "manual": row.manual,
            "mode": row.mode_names[row.desired_mode],
            "reserved_w": row.reserved_w,
            "measured_w": row.measured_w,
            "measured_ghs": row.measured_ghs,
            "measured_at": row.measured_at,
        }


class Miners(MinerResource):
    actions = {"GET": "sites:read"}

    @extend_schema(
        tags=["miners"], operation_id="miners_list", responses={200: shapes.page_of("Miner", MinerShape)},
        parameters=[*PAGE, *(OpenApiParameter(name, str) for name in MinerResource.filters)],
    )  # fmt: skip
    def get(self, request: Request) -> Response:
        return self.listing(request)


class MinerDetail(MinerResource):
    actions = {"GET": "sites:read", "PATCH": "power:write"}

    @extend_schema(tags=["miners"], operation_id="miners_show", responses={200: MinerShape})
    def get(self, request: Request, miner: str) -> Response:  # noqa: ARG002
        return Response(self.represent(self.row(miner)))

    @extend_schema(tags=["miners"], operation_id="miners_update", request=ManualShape, responses={200: MinerShape})
    def patch(self, request: Request, miner: str) -> Response:  # noqa: ARG002
        """Hold it by hand, in a mode of its ladder if you like, or give it back to dispatch."""
        row, body = self.row(miner), self.read(ManualShape)

        def effect() -> Response:
            changed = sites.set_miner_manual(
                row, body["manual"], mode=body.get("mode"), actor=self.actor, now=timezone.now()
            )
            return Response(self.represent(self.queryset().get(pk=changed.pk)))

        return self.write(effect)


urlpatterns = [
    path("miners", Miners.as_view(), name="miners"),
    path("miners/<str:miner>", MinerDetail.as_view(), name="miner"),
]
