"""Benchmarks of hosts: what a host is taken for, its runs, and running one. Rules: docs/verification.md."""

from typing import Any

from django.urls import path
from django.utils import timezone
from drf_spectacular.utils import extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from marketplace.api import shapes
from marketplace.api.base import Resource
from marketplace.api.keys import PAGE
from marketplace.models import Host, HostVerification, Listing, Verification
from marketplace.services import verifications
from scheduler.core import verification as core


class ListedVerificationShape(serializers.Serializer):
    verified = serializers.IntegerField(help_text="hosts that have passed")
    hosts = serializers.IntegerField(help_text="hosts listed")
    score = serializers.IntegerField(
        allow_null=True, help_text="of the poorest host, 1000: an H100-SXM by its data sheet; null: one has not passed"
    )


class FiguresShape(serializers.Serializer):
    gpus = serializers.IntegerField(help_text="that answered")
    matmul_gflops = serializers.IntegerField(help_text="slowest GPU, dense BF16 or FP16")
    memory_mb_s = serializers.IntegerField(help_text="slowest GPU")
    fabric_mb_s = serializers.IntegerField(help_text="slowest link to the next GPU, one direction; 0: one GPU")
    disk_write_mb_s = serializers.IntegerField()
    disk_read_mb_s = serializers.IntegerField()
    network_down_kb_s = serializers.IntegerField()
    network_up_kb_s = serializers.IntegerField()


class RunShape(serializers.Serializer):
    id = serializers.CharField()
    object = serializers.ChoiceField(["verification"])
    host = serializers.CharField()
    state = serializers.ChoiceField(Verification.State.choices)
    reason = serializers.CharField(help_text="what fell short, and what to look at")
    asked_by = serializers.CharField()
    started_at = serializers.DateTimeField()
    finished_at = serializers.DateTimeField(allow_null=True)
    gpu_model = serializers.CharField()
    figures = FiguresShape()
    score = serializers.IntegerField()


class BoundShape(serializers.Serializer):
    figure = serializers.ChoiceField(list(core.FIGURES))
    low = serializers.IntegerField()
    high = serializers.IntegerField(allow_null=True)


class HostVerificationShape(serializers.Serializer):
    object = serializers.ChoiceField(["host_verification"])
    host = serializers.CharField()
    state = serializers.ChoiceField(HostVerification.State.choices)
    score = serializers.IntegerField(allow_null=True)
    verified_at = serializers.DateTimeField(allow_null=True)
    failures = serializers.IntegerField(help_text="runs in a row that failed; two take the state away")
    next_at = serializers.DateTimeField(allow_null=True, help_text="not before then by itself")
    waits_for = serializers.CharField(help_text="why a run that is due has not begun")
    wanted = BoundShape(many=True, help_text="what a run must show; empty: there is no published figure for the model")
    run = RunShape(allow_null=True, help_text="that verified it")


def represent(row: Verification) -> dict[str, Any]:
    return {
        "id": row.public_id,
        "object": "verification",
        "host": row.host.public_id,
        "state": row.state,
        "reason": row.reason,
        "asked_by": row.asked_by,
        "started_at": row.started_at,
        "finished_at": row.finished_at,
        "gpu_model": row.gpu_model,
        "figures": {name: getattr(row, name) for name in core.FIGURES},
        "score": row.score,
    }


def of_listing(row: Listing) -> dict[str, Any]:
    """As ListedVerificationShape."""
    verified, hosts, rows = verifications.of_listing(row)
    return {
        "verified": verified,
        "hosts": hosts,
        "score": min(r.score for r in rows) if hosts and verified == hosts else None,
    }


class HostResource(Resource):
    model_queryset = Host.objects.select_related("site", "gpu_model", "verification__run__host")
    prefix = "hst"


class HostStanding(HostResource):
    actions = {"GET": "sites:read"}

    @extend_schema(tags=["hosts"], operation_id="hosts_verification", responses={200: HostVerificationShape})
    def get(self, request: Request, host: str) -> Response:  # noqa: ARG002
        """What the host is taken for, the figures that it showed, and what is wanted of it."""
        row = self.row(host)
        found: HostVerification | None = getattr(row, "verification", None)
        verified = found is not None and found.state == HostVerification.State.VERIFIED
        return Response(
            {
                "object": "host_verification",
                "host": row.public_id,
                "state": found.state if found else HostVerification.State.UNVERIFIED,
                "score": found.score if found and verified else None,
                "verified_at": found.verified_at if found else None,
                "failures": found.failures if found else 0,
                "next_at": found.next_at if found else None,
                "waits_for": found.waits_for if found else "",
                "wanted": [
                    {"figure": b.figure, "low": b.low, "high": b.high or None} for b in verifications.bounds_of(row)
                ],
                "run": represent(found.run) if found and found.run else None,
            }
        )


class HostRuns(HostResource):
    actions = {"GET": "sites:read", "POST": "sites:write"}

    @extend_schema(
        tags=["hosts"], operation_id="hosts_verifications", responses={200: shapes.page_of("HostRun", RunShape)},
        parameters=PAGE,
    )  # fmt: skip
    def get(self, request: Request, host: str) -> Response:
        """Its runs, the newest first."""
        row = self.row(host)
        query = shapes.query(request, shapes.PageQuery)
        return Response(shapes.page(represent, row.verifications.select_related("host"), query))

    @extend_schema(tags=["hosts"], operation_id="hosts_verify", request=None, responses={201: RunShape})
    def post(self, request: Request, host: str) -> Response:  # noqa: ARG002
        """Run the benchmark now. It takes all GPUs of the host for some minutes; refused where anybody uses or waits for them."""
        row = self.row(host)

        def effect() -> Response:
            made = verifications.begin(row, actor=self.actor, now=timezone.now())
            return Response(represent(made), status=201)

        return self.write(effect)


urlpatterns = [
    path("hosts/<str:host>/verification", HostStanding.as_view(), name="host-verification"),
    path("hosts/<str:host>/verifications", HostRuns.as_view(), name="host-verifications"),
]
