"""Bytes for the network part of a verification: from us, and to us. By a token that only the run knows, for half an hour."""

from collections.abc import Iterator
from typing import Any

from django.http import Http404, HttpRequest, HttpResponse, StreamingHttpResponse
from django.urls import path
from django.utils.decorators import method_decorator
from django.views import View
from django.views.decorators.csrf import csrf_exempt

from marketplace.services import verifications

MIB = 1 << 20
MOST = 64  # MiB a call
_BLOCK = bytes(range(256)) * 4096  # 1 MiB


@method_decorator(csrf_exempt, name="dispatch")
class Probe(View):
    actions = {"GET": "public", "POST": "public"}

    def dispatch(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        if not verifications.probe_allowed(kwargs["token"]):
            raise Http404
        return super().dispatch(request, *args, **kwargs)

    def get(self, request: HttpRequest, token: str) -> StreamingHttpResponse:  # noqa: ARG002
        asked = request.GET.get("mib", "")
        mib = min(int(asked), MOST) if asked.isascii() and asked.isdigit() and len(asked) < 6 else 1
        return StreamingHttpResponse(
            _blocks(mib),
            content_type="application/octet-stream",
            headers={"Content-Length": str(mib * MIB), "Cache-Control": "no-store"},
        )

    def post(self, request: HttpRequest, token: str) -> HttpResponse:  # noqa: ARG002
        """Reads and forgets; what is more than MOST is left unread."""
        left = MOST * MIB
        while left > 0 and (chunk := request.read(min(MIB, left))):
            left -= len(chunk)
        return HttpResponse(status=204)


def _blocks(mib: int) -> Iterator[bytes]:
    for _ in range(mib):
        yield _BLOCK


urlpatterns = [path("probe/<str:token>", Probe.as_view(), name="probe")]
