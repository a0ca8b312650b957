"""Is the house in order? For load balancers and status pages; asks for nobody and costs two round trips."""

from django.core.cache import cache
from django.db import DatabaseError, connection
from django.urls import path
from drf_spectacular.utils import extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from marketplace.errors import MarketError


class HealthShape(serializers.Serializer):
    status = serializers.ChoiceField(["ok"])
    database = serializers.ChoiceField(["ok"])
    redis = serializers.ChoiceField(["ok"])


def _database() -> str:
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
    except DatabaseError:
        return "does not answer"
    return "ok"


def _redis() -> str:
    try:
        cache.get("health")
    except Exception:
        return "does not answer"
    return "ok"


class Health(APIView):
    actions = {"GET": "public"}
    authentication_classes = ()
    throttle_classes = ()

    @extend_schema(tags=["health"], operation_id="health", auth=[], responses={200: HealthShape})
    def get(self, request: Request) -> Response:  # noqa: ARG002
        """200 where PostgreSQL and Redis answer, else 503 `service_unavailable` naming the one that does not."""
        parts = {"database": _database(), "redis": _redis()}
        silent = [name for name, state in parts.items() if state != "ok"]
        if silent:
            raise MarketError("service_unavailable", f"{' and '.join(silent)}: no answer", extra=parts)
        return Response({"status": "ok", **parts}, headers={"Cache-Control": "no-store"})


urlpatterns = [path("health", Health.as_view(), name="health")]
