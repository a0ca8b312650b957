"""How far an offer can be relied on, in words and figures, and the page with the rules of it."""

from datetime import timedelta
from typing import Any

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.urls import path

from marketplace.models import HostVerification, Listing, Verification
from marketplace.services import gpu_rule, reliability, verifications
from marketplace.web.base import page
from scheduler.core import reliability as core
from scheduler.core import verification as benchmark


def of(row: Listing) -> dict[str, Any]:
    """What part/trust.html needs."""
    found = getattr(row, "reliability", None)
    return {
        "reliability": found,
        "operator_reliability": getattr(row.organization, "reliability", None),
        "reliability_parts": reliability.said(found) if found else [],
        **_verified(row),
    }


def _verified(row: Listing) -> dict[str, Any]:
    """How many hosts have passed, and the poorest's figures with their date."""
    verified, hosts, rows = verifications.of_listing(row)
    passed = [r for r in rows if r.state == HostVerification.State.VERIFIED and r.run is not None]
    poorest = min(passed, key=lambda r: (r.score, r.pk), default=None)
    return {
        "verified": verified,
        "verified_of": hosts,
        "poorest": poorest,
        "oldest": min((r.verified_at for r in passed if r.verified_at), default=None),
        "figures": figures(poorest.run) if poorest and poorest.run else [],
    }


def figures(run: Verification) -> list[tuple[str, str]]:
    """(what, how much) of each figure of a run that it has."""
    told = [benchmark.said(name, value) for name in benchmark.FIGURES if (value := getattr(run, name))]
    return [(what, amount) for what, _, amount in (text.partition(": ") for text in told)]


def _wanted() -> list[tuple[str, list[tuple[str, str]], str]]:
    """(GPU model, what is wanted of a device and its link, where that comes from)."""
    devices = {"matmul_gflops", "memory_mb_s", "fabric_mb_s"}
    return [
        (
            model,
            [
                (benchmark.WORDS[bound.figure][0], benchmark.bound_said(bound))
                for bound in benchmark.bounds(model, 8, linked=True)
                if bound.figure in devices
            ],
            found.source,
        )
        for model, found in benchmark.EXPECTED.items()
    ]


@page(GET="public")
def rules(request: HttpRequest) -> HttpResponse:
    context = {
        "priors": [(*reliability.WORDS[name], name, prior) for name, prior in core.PRIORS.items()],
        "days": core.WINDOW_DAYS,
        "slack_s": core.DRAIN_SLACK_S,
        "new_permille": core.permille(core.Counts()),
        "at_once": gpu_rule.AT_ONCE.items(),
        "again": gpu_rule.AGAIN.items(),
        "reports": gpu_rule.REPORTS,
        "within_hours": gpu_rule.WITHIN // timedelta(hours=1),
        "wanted": _wanted(),
        "floors": benchmark.FLOORS,
        "ceiling": benchmark.CEILING,
        "disk": benchmark.DISK_MB_S,
        "network": benchmark.NETWORK_KB_S / 1000,
        "every": verifications.EVERY.days,
        "stale": verifications.STALE.days,
    }
    return render(request, "reliability.html", context)


urlpatterns = [path("reliability", rules, name="reliability")]
