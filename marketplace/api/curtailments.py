"""Curtailments: announce, list, show, cancel, and what each delivered."""

from typing import Any

from django.http import HttpResponse
from django.urls import path
from django.utils import timezone
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from marketplace import ids
from marketplace.api.base import PublicId, Resource, Shape
from marketplace.api.power_shapes import CurtailmentPage, CurtailmentReportShape, CurtailmentShape
from marketplace.errors import MarketError
from marketplace.models import Curtailment, CurtailmentReport, PowerNode
from marketplace.services import curtailment_reports, curtailments
from marketplace.services.transitions import legal_actions


class CurtailmentRequest(Shape):
    node = PublicId("nod")
    cap_w = serializers.IntegerField(min_value=0)
    starts_at = serializers.DateTimeField()
    ends_at = serializers.DateTimeField()
    reference = serializers.CharField(max_length=80)
    mandatory = serializers.BooleanField(required=False, default=True)
    emergency = serializers.BooleanField(
        required=False,
        default=False,
        help_text="the grid's own: contracts that name emergencies give way too, last of all",
    )


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
            "ended_at": row.ended_at,
            "mandatory": row.mandatory,
            "emergency": row.emergency,
            "grid_source": ids.encode("grd", row.origin_id) if row.origin_id else None,
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


class CurtailmentReports(CurtailmentResource):
    actions = {"GET": "power:read"}

    def report(self, row: Curtailment) -> CurtailmentReport:
        """Its report; a call that has not begun has none."""
        found = CurtailmentReport.objects.all().visible_to(self.actor).filter(curtailment=row).first()
        if found is None:
            raise MarketError("not_found", f"{row.public_id} is {row.state}: it has not begun, so there is no report.")
        return found

    @extend_schema(
        tags=["power"],
        operation_id="curtailments_report",
        parameters=[
            OpenApiParameter("step_s", int, description="seconds of a row of `seconds`: 1 to 3600, 1 when not given")
        ],
        responses={200: CurtailmentReportShape},
    )
    def get(self, request: Request, curtailment: str) -> Response:
        row, now = self.row(curtailment), timezone.now()
        report = self.report(row)
        text = request.query_params.get("step_s", "1")
        if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 3600):
            raise MarketError("invalid_request", f"step_s is {text!r}; it is 1 to 3600.", {"/step_s": "1 to 3600"})
        found = curtailment_reports.found(report, row, now=now)
        return Response(
            {
                "object": "curtailment_report",
                "curtailment": row.public_id,
                "finished": report.finished_at is not None,
                "baseline_w": report.baseline_w,
                "baseline_how": report.baseline_how,
                "delivered_wh": found.delivered_wh,
                "under_after_s": found.under_after_s,
                "restored_s": report.restored_s,
                "hashing_lost_microusd": found.hashing_lost_microusd,
                "energy_saved_microusd": found.energy_saved_microusd,
                "paid_microusd": found.paid_microusd,
                "misses": found.misses,
                "jobs": found.jobs,
                "credits": found.credits,
                "seconds": curtailment_reports.series(report, row, now=now, step_s=int(text)),
            }
        )


class CurtailmentSeconds(CurtailmentReports):
    @extend_schema(
        tags=["power"], operation_id="curtailments_seconds", parameters=[], responses={(200, "text/csv"): str}
    )
    def get(self, request: Request, curtailment: str) -> HttpResponse:  # type: ignore[override]  # noqa: ARG002
        row = self.row(curtailment)
        return _csv(row, curtailment_reports.seconds_csv(self.report(row), row, now=timezone.now()))


def _csv(row: Curtailment, text: str) -> HttpResponse:
    answer = HttpResponse(text, content_type="text/csv; charset=utf-8")
    answer["Content-Disposition"] = f'attachment; filename="{row.public_id}-seconds.csv"'
    return answer


urlpatterns = [
    path("curtailments", Curtailments.as_view(), name="curtailments"),
    path("curtailments/<str:curtailment>", CurtailmentDetail.as_view(), name="curtailment"),
    path("curtailments/<str:curtailment>/report", CurtailmentReports.as_view(), name="curtailment-report"),
    path("curtailments/<str:curtailment>/seconds.csv", CurtailmentSeconds.as_view(), name="curtailment-seconds"),
    path("curtailments/<str:curtailment>/cancel", CurtailmentCancel.as_view(), name="curtailment-cancel"),
]
