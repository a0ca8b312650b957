"""Each request's line in the log, and what every line that is written meanwhile says of it."""

import structlog
from django.conf import settings
from django.http import HttpRequest
from django_structlog.middlewares import RequestMiddleware


class RequestLog(RequestMiddleware):
    """django-structlog's, which looks through fifteen headers for an address and opens a session for each call of the API:
    a twelfth of what such a call costs.
    """

    @classmethod
    def bind_ip(cls, request: HttpRequest) -> None:
        """Who spoke to us, and for whom, as a proxy says."""
        structlog.contextvars.bind_contextvars(ip=request.META.get("REMOTE_ADDR"))
        if forwarded := request.META.get("HTTP_X_FORWARDED_FOR"):
            structlog.contextvars.bind_contextvars(forwarded_for=forwarded)

    @staticmethod
    def bind_user_id(request: HttpRequest) -> None:
        """Only whoever has a session is a person."""
        if settings.SESSION_COOKIE_NAME in request.COOKIES:
            RequestMiddleware.bind_user_id(request)
