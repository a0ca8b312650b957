"""A site's watts: the tree with what is booked and metered, what the site did minute by minute, and its money."""

from datetime import timedelta
from typing import Any

from django.db.models import Sum
from django.urls import path
from django.utils import timezone
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework.request import Request
from rest_framework.response import Response

from marketplace.api.base import Resource
from marketplace.api.power_shapes import PowerNowShape, SiteMinutesShape
from marketplace.errors import MarketError
from marketplace.models import PowerNode, Site
from marketplace.services import feeds
from marketplace.services.budgets import pending_w
from marketplace.services.power import frozen

MAX_MINUTES = 24 * 60
COLUMNS = (
    "firm_w", "flexible_w", "spot_w", "idle_gpu_w", "hashing_w", "overhead_w", "metered_w", "cap_w",
    "hashing_mwh", "ai_mwh", "hashing_microusd", "energy_microusd",
)  # fmt: skip


class SitePower(Resource):
    actions = {"GET": "power:read"}
    model_queryset = Site.objects.all()
    prefix = "sit"

    @extend_schema(tags=["power"], operation_id="site_power", responses={200: PowerNowShape})
    def get(self, request: Request, site: str) -> Response:  # noqa: ARG002
        row = self.row(site)
        nodes = row.power_nodes.select_related("parent").order_by("depth", "id")
        miners = row.miners.all()
        now = timezone.now()
        rates = feeds.rates(row, now=now)
        return Response(
            {
                "object": "site_power",
                "site": row.public_id,
                "mode": row.mode,
                "frozen": frozen(),
                "nodes": [_node(n) for n in nodes],
                "miners": {
                    "awake": miners.exclude(desired_mode=0).count(),
                    "asleep": miners.filter(desired_mode=0).count(),
                },
                "pending_w": pending_w([row.pk]).get(row.pk, 0),
                "hashprice_microusd_per_ph_day": rates.hashing.hashprice_uusd if rates.hashing else None,
                "energy_microusd_per_mwh": rates.energy.uusd_mwh,
                "tariff_microusd_per_mwh": rates.energy.added_uusd_mwh,
                "feeds": feeds.shown(row, now=now),
            }
        )


def _node(n: PowerNode) -> dict[str, Any]:
    return {
        "id": n.public_id,
        "name": n.name,
        "parent": n.parent.name if n.parent else None,
        "kind": n.kind,
        "cap_w": n.cap_w,
        "limit_w": n.limit_w,
        "fixed_w": n.fixed_w,
        "margin_w": n.margin_w,
        "reserved_w": -(-n.reserved_mw // 1000),
        "free_w": (n.allowed_mw - n.reserved_mw) // 1000,
        "measured_w": n.measured_w,
        "measured_at": n.measured_at,
    }


class SiteMinutes(Resource):
    actions = {"GET": "power:read"}
    model_queryset = Site.objects.all()
    prefix = "sit"

    @extend_schema(
        tags=["power"],
        operation_id="site_minutes",
        responses={200: SiteMinutesShape},
        parameters=[OpenApiParameter("minutes", int)],
    )
    def get(self, request: Request, site: str) -> Response:
        """Watts by use, energy in milliwatt-hours and money in micro-USD, one row a minute, newest last; and their sums."""
        row = self.row(site)
        text = request.query_params.get("minutes", "60")
        if not text.isdecimal() or not 1 <= int(text) <= MAX_MINUTES:
            raise MarketError(
                "invalid_request", f"minutes is {text}; it must be 1 to {MAX_MINUTES}.", {"/minutes": "out of range"}
            )
        since = timezone.now() - timedelta(minutes=int(text))
        rows = row.minutes.filter(start__gte=since).order_by("start")
        sums = rows.aggregate(**{c: Sum(c) for c in ("hashing_mwh", "ai_mwh", "hashing_microusd", "energy_microusd")})
        return Response(
            {
                "object": "site_minutes",
                "site": row.public_id,
                "data": list(rows.values("start", *COLUMNS)),
                "sums": {k: v or 0 for k, v in sums.items()},
            }
        )


urlpatterns = [
    path("sites/<str:site>/power", SitePower.as_view(), name="site-power"),
    path("sites/<str:site>/minutes", SiteMinutes.as_view(), name="site-minutes"),
]
