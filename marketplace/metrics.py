"""`/metrics` for those who hold settings.METRICS_TOKEN as a bearer token; for everybody else it is not there."""

from secrets import compare_digest

from django.conf import settings
from django.http import Http404, HttpRequest, HttpResponse
from django_prometheus.exports import ExportToDjangoView


def metrics(request: HttpRequest) -> HttpResponse:
    wanted = f"Bearer {settings.METRICS_TOKEN}".encode()
    if not settings.METRICS_TOKEN or not compare_digest(request.headers.get("Authorization", "").encode(), wanted):
        raise Http404
    answer: HttpResponse = ExportToDjangoView(request)
    return answer
