"""Usage: GPU-hours by day, what this period costs so far, and the records that bills are made of."""

from collections import defaultdict
from datetime import UTC, date, datetime
from typing import Any

from django.db.models import F, Sum
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.urls import path
from django.utils import timezone

from billing import invoices
from billing.models import Meter, UsageRecord
from marketplace.models import Organization
from marketplace.web import charts
from marketplace.web.base import actor_of, listed, page

DAYS = 28
DAY_S = 86_400
GPU_HOUR = 3_600_000  # milli-GPU-seconds


@page(GET="usage:read")
def usage(request: HttpRequest) -> HttpResponse:
    actor = actor_of(request)
    now = timezone.now()
    records = UsageRecord.objects.owned_by(actor.organization_id).filter(meter=Meter.GPU)
    days = _days(records, now)
    total = sum(value for _, value in days)
    label = f"GPU-hours of the last {DAYS} days: {total // GPU_HOUR} in all"
    rows = records.select_related("contract__listing", "placement__job")
    return render(
        request,
        "usage.html",
        {
            "chart": charts.bars(days, label=label, unit="GPU-hours", per_unit=GPU_HOUR),
            "days": [(day, value) for day, value in days if value],
            "total": total,
            "page": listed(request, rows, UsageRecord.PREFIX),
            "so_far": so_far(request) if actor.may("billing:read") else None,
        },
    )


def _days(records: Any, now: datetime) -> list[tuple[date, int]]:
    """Milli-GPU-seconds by the UTC day in which a record begins, today last. Corrections count by what they changed."""
    first = int(now.timestamp()) // DAY_S - DAYS + 1
    rows = (
        records.filter(start_s__gte=first * DAY_S)
        .order_by()
        .annotate(day=F("start_s") / DAY_S)
        .values("day")
        .annotate(used=Sum(F("quantity") - F("previous")))
    )
    used: dict[int, int] = defaultdict(int, {row["day"]: row["used"] for row in rows})
    return [(datetime.fromtimestamp(day * DAY_S, UTC).date(), used[day]) for day in range(first, first + DAYS)]


def so_far(request: HttpRequest) -> dict[str, Any]:
    """What an invoice closed now would say, running seconds included, by contract."""
    organization = Organization.objects.owned_by(actor_of(request).organization_id).get()
    draft = invoices.preview(organization, timezone.now().replace(microsecond=0))
    sums: dict[int, dict[str, Any]] = {}
    for row in draft.lines:
        line = sums.setdefault(row.contract.pk, {"contract": row.contract, "quantity": 0, "amount": 0})
        line["quantity"] += row.line.quantity
        line["amount"] += row.line.amount
    return {
        "start": draft.start,
        "end": draft.end,
        "total": draft.total_minor,
        "currency": draft.account.currency,
        "lines": sorted(sums.values(), key=lambda line: -line["amount"])[:20],
        "error": draft.error,
    }


urlpatterns = [path("usage", usage, name="usage")]
