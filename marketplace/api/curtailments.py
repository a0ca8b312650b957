"""Curtailments: announce, list, show, cancel."""

from typing import Any

from django.urls import path
from django.utils import timezone
from drf_spectacular.utils import extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from marketplace import ids
from marketplace.api.base import PublicId, Resource, Shape
from marketplace.api.power_shapes import CurtailmentPage, CurtailmentShape
from marketplace.errors import MarketError
from marketplace.models import Curtailment, PowerNode
from marketplace.services import curtailments
from marketplace.services.transitions import legal_actions


class CurtailmentRequest(Shape):
    node = PublicId("nod")
    cap_w = serializers.IntegerField(min_value=0)
    starts_at = serializers.DateTimeField()
    ends_at = serializers.DateTimeField()
    reference = serializers.CharField(max_length=80)
    mandatory = serializers.BooleanField(required=False, default=True)


class CurtailmentResource(Resource):
    model_queryset = Curtailment.objects.all()
    prefix = Curtailment.PREFIX
    filters = {"site": "site", "state": "state"}

    def represent(self, row: Curtailment) -> dict[str, Any]:
        return {
            "id": row.public_id,
            "object": "curtailment",
            "site": ids.encode("sit", row.site_id),
            "node": ids.encode("nod", row.node_id),
            "source": row.source,
            "reference": row.reference,
            "cap_w": row.cap_w,
            "starts_at": row.starts_at,
            "ends_at": row.ends_at,
            "mandatory": row.mandatory,
            "state": row.state,
            "actions": ["cancel"] if {"cancelled", "restoring"} & set(legal_actions(Curtailment, row.state)) else [],
        }


class Curtailments(CurtailmentResource):
    actions = {"GET": "power:read", "POST": "power:write"}

    @extend_schema(tags=["power"], operation_id="curtailments_list", responses={200: CurtailmentPage})
    def get(self, request: Request) -> Response:
        return self.listing(request)

    @extend_schema(
        tags=["power"],
        operation_id="curtailments_announce",
        request=CurtailmentRequest,
        responses={201: CurtailmentShape},
    )
    def post(self, request: Request) -> Response:  # noqa: ARG002
        body = self.read(CurtailmentRequest)
        node = PowerNode.objects.owned_by(self.actor.organization_id).filter(pk=body.pop("node")).first()
        if node is None:
            raise MarketError("not_found", "node: there is none of that id.", {"/node": "unknown"})
        return self.write(
            lambda: Response(
                self.represent(curtailments.announce(self.actor, node, now=timezone.now(), **body)), status=201
            )
        )


class CurtailmentDetail(CurtailmentResource):
    actions = {"GET": "power:read"}

    @extend_schema(tags=["power"], operation_id="curtailments_show", responses={200: CurtailmentShape})
    def get(self, request: Request, curtailment: str) -> Response:  # noqa: ARG002
        return Response(self.represent(self.row(curtailment)))


class CurtailmentCancel(CurtailmentResource):
    actions = {"POST": "power:write"}

    @extend_schema(tags=["power"], operation_id="curtailments_cancel", request=None, responses={200: CurtailmentShape})
    def post(self, request: Request, curtailment: str) -> Response:  # noqa: ARG002
        row = self.row(curtailment)

        def effect() -> Response:
            curtailments.cancel(self.actor, row, now=timezone.now())
            return Response(self.represent(row))

        return self.write(effect)


urlpatterns = [
    path("curtailments", Curtailments.as_view(), name="curtailments"),
    path("curtailments/<str:curtailment>", CurtailmentDetail.as_view(), name="curtailment"),
    path("curtailments/<str:curtailment>/cancel", CurtailmentCancel.as_view(), name="curtailment-cancel"),
]
