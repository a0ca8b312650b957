"""Usage records: what is metered, interval by interval; the newest revision is what is billed."""

from typing import Any

from django.urls import path
from drf_spectacular.utils import extend_schema
from rest_framework.request import Request
from rest_framework.response import Response

from billing.models import UsageRecord
from marketplace import ids
from marketplace.api.base import Resource
from marketplace.api.money_shapes import UsagePage


class Usage(Resource):
    actions = {"GET": "usage:read"}
    model_queryset = UsageRecord.objects.all()
    prefix = UsageRecord.PREFIX
    filters = {"contract": "contract", "placement": "placement", "job": "placement__job"}

    def represent(self, row: UsageRecord) -> dict[str, Any]:
        return {
            "id": row.public_id,
            "object": "usage_record",
            "contract": ids.encode("ctr", row.contract_id),
            "placement": ids.encode("plc", row.placement_id),
            "meter": row.get_meter_display(),
            "revision": row.revision,
            "start_s": row.start_s,
            "end_s": row.end_s,
            "rate": row.rate,
            "quantity": row.quantity,
            "source": row.source,
        }

    @extend_schema(tags=["billing"], operation_id="usage_list", responses={200: UsagePage})
    def get(self, request: Request) -> Response:
        return self.listing(request)


urlpatterns = [path("usage", Usage.as_view(), name="usage")]
