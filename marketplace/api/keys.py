"""API keys. The token is in the answer that makes it, and nowhere else: not in the database, not in a replayed answer."""

from collections.abc import Callable
from typing import Any

from django.urls import path
from django.utils import timezone
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from marketplace.api import shapes
from marketplace.api.base import Resource, Shape
from marketplace.models import ApiKey
from marketplace.services import accounts
from marketplace.tenancy import SCOPES

PAGE = [OpenApiParameter("limit", int, description="1 to 100, 20 by default"), OpenApiParameter("cursor", str)]


def show_once(resource: Resource, make: Callable[[], tuple[dict[str, Any], str]], status: int = 201) -> Response:
    """Run an idempotent write that makes a secret. The stored answer has `token: null`, so a replay does not show it again."""
    shown: dict[str, str] = {}

    def effect() -> Response:
        body, shown["token"] = make()
        return Response({**body, "token": None}, status=status)

    response = resource.write(effect)
    response.data = {**response.data, "token": shown.get("token")}
    response["Cache-Control"] = "no-store"
    return response


class KeyShape(serializers.Serializer):
    id = serializers.CharField()
    object = serializers.ChoiceField(["key"])
    created_at = serializers.DateTimeField()
    name = serializers.CharField()
    prefix = serializers.CharField(help_text="the first characters, to recognise it by")
    scopes = serializers.ListField(child=serializers.ChoiceField(SCOPES))
    livemode = serializers.BooleanField()
    created_by = serializers.CharField(allow_null=True)
    expires_at = serializers.DateTimeField(allow_null=True)
    revoked_at = serializers.DateTimeField(allow_null=True)
    last_used_at = serializers.DateTimeField(allow_null=True)


class NewKeyShape(KeyShape):
    token = serializers.CharField(allow_null=True, help_text="shown once; null when the answer is replayed")


class IssueShape(Shape):
    name = serializers.CharField(max_length=80)
    scopes = serializers.ListField(child=serializers.ChoiceField(SCOPES), min_length=1, max_length=len(SCOPES))
    expires_at = serializers.DateTimeField(required=False, allow_null=True, default=None)


class KeyResource(Resource):
    model_queryset = ApiKey.objects.select_related("created_by", "organization")
    prefix = "key"

    def represent(self, row: ApiKey) -> dict[str, Any]:
        return {
            "id": row.public_id,
            "object": "key",
            "created_at": row.created_at,
            "name": row.name,
            "prefix": row.prefix,
            "scopes": row.scopes,
            "livemode": row.organization.livemode,
            "created_by": row.created_by.email if row.created_by else None,
            "expires_at": row.expires_at,
            "revoked_at": row.revoked_at,
            "last_used_at": row.last_used_at,
        }


class Keys(KeyResource):
    actions = {"GET": "keys:read", "POST": "keys:write"}

    @extend_schema(
        tags=["keys"], operation_id="keys_list", parameters=PAGE, responses={200: shapes.page_of("Key", KeyShape)}
    )
    def get(self, request: Request) -> Response:
        return self.listing(request)

    @extend_schema(tags=["keys"], operation_id="keys_issue", request=IssueShape, responses={201: NewKeyShape})
    def post(self, request: Request) -> Response:  # noqa: ARG002
        """Nobody issues a key that may do more than they may themselves."""
        body = self.read(IssueShape)

        def make() -> tuple[dict[str, Any], str]:
            row, token = accounts.issue_key(self.organization(), actor=self.actor, now=timezone.now(), **body)
            return self.represent(row), token

        return show_once(self, make)


class KeyDetail(KeyResource):
    actions = {"GET": "keys:read", "DELETE": "keys:write"}

    @extend_schema(tags=["keys"], operation_id="keys_show", responses={200: KeyShape})
    def get(self, request: Request, key: str) -> Response:  # noqa: ARG002
        return Response(self.represent(self.row(key)))

    @extend_schema(tags=["keys"], operation_id="keys_revoke", responses={204: None})
    def delete(self, request: Request, key: str) -> Response:  # noqa: ARG002
        """Revoke: from now on the key is refused. Revoking twice is no error."""
        row = self.row(key)

        def effect() -> Response:
            accounts.revoke_key(row, actor=self.actor, now=timezone.now())
            return Response(status=204)

        return self.write(effect)


urlpatterns = [
    path("keys", Keys.as_view(), name="keys"),
    path("keys/<str:key>", KeyDetail.as_view(), name="key"),
]
