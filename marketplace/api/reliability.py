"""How far a host can be relied on: what was counted, the score, and what stands behind it. Rules: docs/reliability.md."""

from typing import Any

from django.conf import settings
from django.urls import path, reverse
from django.utils import timezone
from drf_spectacular.utils import extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from marketplace.api import shapes
from marketplace.api.base import Resource
from marketplace.api.keys import PAGE
from marketplace.models import Host, HostCondition, Reliability
from marketplace.services import reliability
from scheduler.core import reliability as core


class PartShape(serializers.Serializer):
    name = serializers.ChoiceField(list(core.PRIORS))
    good = serializers.FloatField(
        help_text="of `of`: hours able to work, starts that came to run, GPU-days without error, leaves in time"
    )
    of = serializers.FloatField(help_text="hours on offer (announced work apart), starts, GPU-days, leaves asked for")
    share_permille = serializers.IntegerField(help_text="drawn towards what is usual while little is counted")
    power = serializers.FloatField(help_text="in the product that is the score")


class ReliabilityShape(serializers.Serializer):
    score_permille = serializers.IntegerField()
    window_days = serializers.IntegerField()
    as_of = serializers.DateTimeField()
    silent_s = serializers.IntegerField(help_text="of the time away: the whole site was silent")
    excused_s = serializers.IntegerField(help_text="away for work announced in due time: not counted")
    parts = PartShape(many=True)
    rules = serializers.CharField(help_text="where the rules are published")


class FaultShape(serializers.Serializer):
    at = serializers.DateTimeField()
    until = serializers.DateTimeField(allow_null=True)
    kind = serializers.CharField()
    text = serializers.CharField()
    record = serializers.CharField(help_text="id of the row that says so")


class HostReliabilityShape(serializers.Serializer):
    object = serializers.ChoiceField(["host_reliability"])
    host = serializers.CharField()
    reliability = ReliabilityShape(allow_null=True)
    events = FaultShape(many=True, help_text="the newest that counted against it, at most 100")


class ConditionShape(serializers.Serializer):
    id = serializers.CharField()
    object = serializers.ChoiceField(["host_condition"])
    host = serializers.CharField()
    kind = serializers.ChoiceField(HostCondition.Kind.choices)
    starts_at = serializers.DateTimeField()
    ends_at = serializers.DateTimeField(allow_null=True, help_text="null: it is so now")
    reason = serializers.CharField()
    recorded_at = serializers.DateTimeField()


def found(of: Any) -> Reliability | None:
    """Of a host, listing or organization; None where nothing was counted yet."""
    row: Reliability | None = getattr(of, "reliability", None)
    return row


def score_of(of: Any) -> int | None:
    row = found(of)
    return None if row is None else row.score_permille


def shown(of: Any) -> dict[str, Any] | None:
    """As ReliabilityShape."""
    row = found(of)
    if row is None:
        return None
    return {
        "score_permille": row.score_permille,
        "window_days": core.WINDOW_DAYS,
        "as_of": row.as_of,
        "silent_s": row.silent_s,
        "excused_s": row.excused_s,
        "parts": [
            {
                "name": part.name,
                "good": round(part.good, 2),
                "of": round(part.of, 2),
                "share_permille": int(part.value * 1000),
                "power": core.PRIORS[part.name].power,
            }
            for part in core.parts(reliability.counts_of(row))
        ],
        "rules": settings.PUBLIC_URL.rstrip("/") + reverse("web:reliability"),
    }


class HostReliability(Resource):
    actions = {"GET": "sites:read"}
    model_queryset = Host.objects.select_related("reliability")
    prefix = "hst"

    @extend_schema(tags=["hosts"], operation_id="hosts_reliability", responses={200: HostReliabilityShape})
    def get(self, request: Request, host: str) -> Response:  # noqa: ARG002
        """Its last 30 days: what was counted, the score, and what counted against it, each with the record that says so."""
        row = self.row(host)
        told = [vars(event) for event in reliability.events(row, now=timezone.now())]
        return Response(
            {"object": "host_reliability", "host": row.public_id, "reliability": shown(row), "events": told}
        )


class HostConditions(Resource):
    actions = {"GET": "sites:read"}
    model_queryset = Host.objects.all()
    prefix = "hst"

    @extend_schema(
        tags=["hosts"], operation_id="hosts_conditions", responses={200: shapes.page_of("HostCondition", ConditionShape)},
        parameters=PAGE,
    )  # fmt: skip
    def get(self, request: Request, host: str) -> Response:
        """What it was like, the newest first: intervals without gap or overlap."""
        row = self.row(host)
        query = shapes.query(request, shapes.PageQuery)
        return Response(shapes.page(_condition, row.conditions.select_related("host"), query))


def _condition(row: HostCondition) -> dict[str, Any]:
    return {
        "id": row.public_id,
        "object": "host_condition",
        "host": row.host.public_id,
        "kind": row.kind,
        "starts_at": row.starts_at,
        "ends_at": row.ends_at,
        "reason": row.reason,
        "recorded_at": row.recorded_at,
    }


urlpatterns = [
    path("hosts/<str:host>/reliability", HostReliability.as_view(), name="host-reliability"),
    path("hosts/<str:host>/conditions", HostConditions.as_view(), name="host-conditions"),
]
