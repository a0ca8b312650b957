"""RFC 9457 problem documents with a stable code, from every refusal that can happen."""

import structlog
from django.core.exceptions import PermissionDenied
from django.db import InterfaceError, OperationalError
from django.http import Http404
from rest_framework import exceptions
from rest_framework.request import Request
from rest_framework.response import Response

from marketplace.errors import CATALOGUE, MarketError

log = structlog.get_logger(__name__)


def problem(error: MarketError, path: str) -> Response:
    kind = error.kind
    body = {
        "type": f"https://docs.tailrace.invalid/errors/{error.code}",
        "code": error.code,
        "title": kind.title,
        "status": kind.status,
        "detail": error.detail,
        "retry": kind.retry,
        "instance": path,
        **({"errors": [{"pointer": p, "message": m} for p, m in error.fields.items()]} if error.fields else {}),
        **error.extra,
    }
    headers = {"Retry-After": str(error.extra.get("retry_after", 1))} if kind.retry == "after" else {}
    return Response(body, status=kind.status, headers=headers, content_type="application/problem+json")


def handle(error: Exception, context: dict) -> Response | None:
    """DRF's exception handler. What is not foreseen stays a 500 with its trace in the log."""
    request: Request = context["request"]
    found = translate(error)
    if found is None:
        return None
    response = problem(found, request.path)
    if found.kind.status == 401:
        response["WWW-Authenticate"] = "Bearer"
    return response


def translate(error: Exception) -> MarketError | None:
    if isinstance(error, MarketError):
        return error
    if isinstance(error, exceptions.ValidationError):
        fields = _pointers(error.detail)
        code = "unknown_field" if any(m == "unknown field" for m in fields.values()) else "invalid_request"
        return MarketError(code, "; ".join(f"{p}: {m}" for p, m in fields.items()), fields)
    if isinstance(error, (Http404, exceptions.NotFound)):
        return MarketError("not_found")
    if isinstance(error, exceptions.NotAuthenticated | exceptions.AuthenticationFailed):
        return MarketError("not_authenticated", str(error))
    if isinstance(error, exceptions.PermissionDenied | PermissionDenied):
        return MarketError("forbidden", str(error))
    if isinstance(error, exceptions.MethodNotAllowed):
        return MarketError("method_not_allowed", str(error))
    if isinstance(error, exceptions.Throttled):
        return MarketError("rate_limited", "", extra={"retry_after": int(getattr(error, "wait", None) or 1)})
    if isinstance(error, exceptions.ParseError | exceptions.UnsupportedMediaType):
        return MarketError("invalid_request", str(error))
    if isinstance(error, (OperationalError, InterfaceError)):
        log.warning("the database does not answer", error=str(error))
        return MarketError("service_unavailable", "The database does not answer; nothing was changed. Try again.")
    assert "invalid_request" in CATALOGUE
    return None


def _pointers(detail: object, at: str = "") -> dict[str, str]:
    if isinstance(detail, dict):
        return {k: v for name, part in detail.items() for k, v in _pointers(part, f"{at}/{name}").items()}
    if isinstance(detail, list):
        if all(not isinstance(part, (dict, list)) for part in detail):
            return {at or "/": " ".join(str(part) for part in detail)}
        return {k: v for i, part in enumerate(detail) for k, v in _pointers(part, f"{at}/{i}").items()}
    return {at or "/": str(detail)}
