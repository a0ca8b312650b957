"""The OpenAPI document, and what drf-spectacular must be told: our keys, our ids, our refusals.

`make openapi` writes docs/openapi.yaml; a test and `make lint` compare it with the code.
"""

from typing import Any

from django.urls import path
from drf_spectacular.extensions import OpenApiAuthenticationExtension, OpenApiSerializerFieldExtension
from drf_spectacular.utils import extend_schema
from drf_spectacular.views import SpectacularAPIView

from marketplace.errors import CATALOGUE


class KeyScheme(OpenApiAuthenticationExtension):
    target_class = "marketplace.api.auth.KeyAuthentication"
    name = "key"

    def get_security_definition(self, auto_schema: Any) -> dict[str, Any]:  # noqa: ARG002
        return {"type": "http", "scheme": "bearer", "description": "An API key: `Bearer tr_live_...` or `tr_test_...`."}


class PersonScheme(OpenApiAuthenticationExtension):
    target_class = "marketplace.api.auth.PersonAuthentication"
    name = "session"

    def get_security_definition(self, auto_schema: Any) -> dict[str, Any]:  # noqa: ARG002
        return {"type": "apiKey", "in": "cookie", "name": "sessionid", "description": "The session of the pages."}


class AgentScheme(OpenApiAuthenticationExtension):
    target_class = "marketplace.api.auth.AgentAuthentication"
    name = "agent"

    def get_security_definition(self, auto_schema: Any) -> dict[str, Any]:  # noqa: ARG002
        return {"type": "http", "scheme": "bearer", "description": "An agent's key: `Bearer agk_...`."}


class PublicIdField(OpenApiSerializerFieldExtension):
    target_class = "marketplace.api.base.PublicId"

    def map_serializer_field(self, auto_schema: Any, direction: str) -> dict[str, Any]:  # noqa: ARG002
        return {"type": "string", "pattern": f"^{self.target.prefix}_[0-9a-hjkmnp-tv-z]{{12}}$"}


PROBLEM = {
    "type": "object",
    "description": "RFC 9457. What to do about each `code` stands in docs/errors.md.",
    "required": ["type", "code", "title", "status", "detail", "retry", "instance"],
    "properties": {
        "type": {"type": "string", "format": "uri"},
        "code": {"type": "string", "enum": sorted(CATALOGUE)},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "retry": {"type": "string", "enum": ["never", "after", "same_key"]},
        "instance": {"type": "string"},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["pointer", "message"],
                "properties": {"pointer": {"type": "string"}, "message": {"type": "string"}},
            },
        },
    },
}
IDEMPOTENCY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "schema": {"type": "string", "maxLength": 120},
    "description": "A retry with the same key and body gets the same answer, once (kept 7 days).",
}


def problems(result: dict[str, Any], generator: Any, request: Any, public: bool) -> dict[str, Any]:  # noqa: ARG001
    """Every operation may refuse, in one form; every write takes an idempotency key."""
    result.setdefault("components", {}).setdefault("schemas", {})["Problem"] = PROBLEM
    refusal = {
        "description": "A refusal, by its `code`.",
        "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
    for operations in result["paths"].values():
        for method, operation in operations.items():
            operation.setdefault("responses", {}).setdefault("default", refusal)
            if method in {"post", "patch", "put", "delete"} and {"agent": []} not in operation.get("security", []):
                operation.setdefault("parameters", []).append(IDEMPOTENCY)
    return result


class Document(SpectacularAPIView):
    actions = {"GET": "public"}
    authentication_classes = ()
    throttle_classes = ()

    @extend_schema(exclude=True)
    def get(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """YAML, or JSON by `?format=json` or `Accept`."""
        return super().get(request, *args, **kwargs)


urlpatterns = [path("schema", Document.as_view(), name="schema")]
