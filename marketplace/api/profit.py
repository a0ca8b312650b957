"""A site's P&L by hour and kind, the energy of its devices, and what pools and grids paid."""

from datetime import UTC, datetime, timedelta
from typing import Any

from django.http import HttpResponse
from django.urls import path
from django.utils import timezone
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from billing.core.energy import KINDS, MJ_PER_MILLIWH
from marketplace import ids
from marketplace.api.base import Resource, Shape
from marketplace.api.keys import PAGE
from marketplace.api.shapes import page_of
from marketplace.errors import MarketError
from marketplace.models import DeviceHour, ProfitHour, Receipt, Site
from marketplace.services import profit, receipts

MAX_WINDOW = timedelta(days=93)
WINDOW = [
    OpenApiParameter("start", datetime, description="from this hour on; the last day when left out"),
    OpenApiParameter("end", datetime, description="not included; now when left out"),
]
_DEVICE_PREFIX = {"placement": "plc", "host": "hst", "miner": "min"}


class ProfitLineShape(serializers.Serializer):
    start = serializers.DateTimeField(help_text="of the hour")
    kind = serializers.ChoiceField(ProfitHour.Kind.choices)
    revenue_microusd = serializers.IntegerField(
        help_text="AI: your share by the clock; hashing: what FPPS would pay; demand response: what was paid"
    )
    paid_microusd = serializers.IntegerField(allow_null=True, help_text="of receipts; empty while there is none")
    energy_mwh = serializers.IntegerField(help_text="milliwatt-hours at the site's meter, cooling included")
    energy_microusd = serializers.IntegerField()
    carbon_g = serializers.IntegerField(allow_null=True)
    margin_microusd = serializers.IntegerField()
    seen_s = serializers.IntegerField(help_text="seconds of the hour that are accounted for")


class ProfitSumShape(serializers.Serializer):
    kind = serializers.ChoiceField(ProfitHour.Kind.choices)
    revenue_microusd = serializers.IntegerField()
    paid_microusd = serializers.IntegerField(allow_null=True)
    energy_mwh = serializers.IntegerField()
    energy_microusd = serializers.IntegerField()
    margin_microusd = serializers.IntegerField()


class ProfitShape(serializers.Serializer):
    object = serializers.ChoiceField(["site_profit"])
    site = serializers.CharField()
    start = serializers.DateTimeField()
    end = serializers.DateTimeField()
    data = ProfitLineShape(many=True, help_text="hours ascending")  # type: ignore[assignment]  # lists are `data`
    sums = ProfitSumShape(many=True)


class DeviceEnergyShape(serializers.Serializer):
    id = serializers.CharField()
    energy_mwh = serializers.IntegerField(help_text="milliwatt-hours at the device")


class DeviceEnergiesShape(serializers.Serializer):
    object = serializers.ChoiceField(["site_energy"])
    site = serializers.CharField()
    of = serializers.ChoiceField(DeviceHour.Of.choices)
    start = serializers.DateTimeField()
    end = serializers.DateTimeField()
    data = DeviceEnergyShape(many=True, help_text="most first")  # type: ignore[assignment]  # lists are `data`


class NewReceiptShape(Shape):
    kind = serializers.ChoiceField(Receipt.Kind.choices)
    source = serializers.CharField(max_length=40, help_text="the pool, or who runs the programme")  # type: ignore[assignment]
    reference = serializers.CharField(max_length=80, help_text="the payer's own; once by source")
    start = serializers.DateTimeField(help_text="what was paid is for this time")
    end = serializers.DateTimeField()
    amount_microusd = serializers.IntegerField(min_value=0, max_value=10**15)
    amount_sat = serializers.IntegerField(min_value=0, max_value=21 * 10**14, required=False, allow_null=True)


class ReceiptShape(serializers.Serializer):
    id = serializers.CharField()
    object = serializers.ChoiceField(["receipt"])
    created_at = serializers.DateTimeField()
    site = serializers.CharField()
    kind = serializers.ChoiceField(Receipt.Kind.choices)
    source = serializers.CharField()  # type: ignore[assignment]  # a column's name; DRF's own attribute is the instance's
    reference = serializers.CharField()
    start = serializers.DateTimeField()
    end = serializers.DateTimeField()
    amount_microusd = serializers.IntegerField()
    amount_sat = serializers.IntegerField(allow_null=True)


class ReceiptFileShape(Shape):
    csv = serializers.CharField(max_length=1_000_000, trim_whitespace=False, help_text=", ".join(receipts.COLUMNS))


class ReceiptsMadeShape(serializers.Serializer):
    object = serializers.ChoiceField(["receipts_import"])
    data = ReceiptShape(many=True, help_text="in the order of the file, known ones included")  # type: ignore[assignment]


ReceiptPage = page_of("Receipt", ReceiptShape)


class SiteResource(Resource):
    model_queryset = Site.objects.all()
    prefix = "sit"

    def window(self, request: Request) -> tuple[datetime, datetime]:
        now = timezone.now()
        end = self._time(request, "end", now)
        start = self._time(request, "start", end - timedelta(days=1))
        if not start < end or end - start > MAX_WINDOW:
            raise MarketError(
                "invalid_request",
                f"start must lie before end, {MAX_WINDOW.days} days at most.",
                {"/start": "out of range"},
            )
        return start, end

    def _time(self, request: Request, name: str, otherwise: datetime) -> datetime:
        text = request.query_params.get(name)
        if text is None:
            return otherwise
        try:
            found = datetime.fromisoformat(text.replace(" ", "+"))
        except ValueError as error:
            raise MarketError("invalid_request", f"{name} is {text!r}", {f"/{name}": "no time"}) from error
        return found if found.tzinfo else found.replace(tzinfo=UTC)


class SiteProfit(SiteResource):
    actions = {"GET": "payouts:read"}

    @extend_schema(tags=["power"], operation_id="site_profit", responses={200: ProfitShape}, parameters=WINDOW)
    def get(self, request: Request, site: str) -> Response:
        """What AI, hashing and demand response earned and what their energy cost, hour by hour. `energy` is the energy that none of
        them drew: the fixed load, and what the meter saw besides. Energy and its cost sum over the kinds to those of the site.
        """
        row, (start, end) = self.row(site), self.window(request)
        lines = profit.table(row, start, end)
        sums = [profit.summed(kind, [line for line in lines if line["kind"] == kind]) for kind in KINDS]
        return Response(
            {"object": "site_profit", "site": row.public_id, "start": start, "end": end, "data": lines, "sums": sums}
        )


class SiteProfitFile(SiteResource):
    actions = {"GET": "payouts:read"}

    @extend_schema(
        tags=["power"], operation_id="site_profit_csv", responses={(200, "text/csv"): str}, parameters=WINDOW
    )
    def get(self, request: Request, site: str) -> HttpResponse:
        row, (start, end) = self.row(site), self.window(request)
        answer = HttpResponse(profit.as_csv(row, start, end), content_type="text/csv; charset=utf-8")
        answer["Content-Disposition"] = f'attachment; filename="{row.public_id}-profit.csv"'
        return answer


class SiteEnergy(SiteResource):
    actions = {"GET": "power:read"}

    @extend_schema(
        tags=["power"], operation_id="site_energy", responses={200: DeviceEnergiesShape},
        parameters=[*WINDOW, OpenApiParameter("of", str, enum=DeviceHour.Of.values)],
    )  # fmt: skip
    def get(self, request: Request, site: str) -> Response:
        """Energy of each placement, of each host while none of its GPUs was in use, or of each miner; whole hours."""
        row, (start, end) = self.row(site), self.window(request)
        of = request.query_params.get("of", "placement")
        if of not in DeviceHour.Of.values:
            raise MarketError("invalid_request", f"of is {of!r}", {"/of": f"one of {', '.join(DeviceHour.Of.values)}"})
        found = profit.by_device(row, of, start, end)
        data = [
            {"id": ids.encode(_DEVICE_PREFIX[of], pk), "energy_mwh": mj // MJ_PER_MILLIWH}
            for pk, mj in sorted(found.items(), key=lambda item: (-item[1], item[0]))
        ]
        return Response(
            {"object": "site_energy", "site": row.public_id, "of": of, "start": start, "end": end, "data": data}
        )


def _receipt(row: Receipt) -> dict[str, Any]:
    return {
        "id": row.public_id, "object": "receipt", "created_at": row.created_at, "site": ids.encode("sit", row.site_id),
        "kind": row.kind, "source": row.source, "reference": row.reference, "start": row.start, "end": row.end,
        "amount_microusd": row.amount_microusd, "amount_sat": row.amount_sat,
    }  # fmt: skip


class SiteReceipts(SiteResource):
    actions = {"GET": "payouts:read", "POST": "payouts:write"}
    filters = {"kind": "kind"}

    def represent(self, row: Receipt) -> dict[str, Any]:
        return _receipt(row)

    @extend_schema(
        tags=["power"], operation_id="receipts_list", responses={200: ReceiptPage},
        parameters=[*PAGE, OpenApiParameter("kind", str)],
    )  # fmt: skip
    def get(self, request: Request, site: str) -> Response:
        return self.listing(request, Receipt.objects.all().visible_to(self.actor).filter(site=self.row(site)))

    @extend_schema(
        tags=["power"], operation_id="receipts_receive", request=NewReceiptShape, responses={201: ReceiptShape}
    )
    def post(self, request: Request, site: str) -> Response:  # noqa: ARG002
        """What a pool paid for hashing, or a grid for demand response. The same again is answered as before; other figures under a
        source and reference that are known are refused (conflict).
        """
        row, body = self.row(site), self.read(NewReceiptShape)
        return self.write(
            lambda: Response(_receipt(receipts.receive(row, actor=self.actor, now=timezone.now(), **body)), status=201)
        )


class SiteReceiptsImport(SiteResource):
    actions = {"POST": "payouts:write"}

    @extend_schema(
        tags=["power"], operation_id="receipts_import", request=ReceiptFileShape, responses={200: ReceiptsMadeShape}
    )
    def post(self, request: Request, site: str) -> Response:  # noqa: ARG002
        """A CSV file of receipts, all or nothing; what is known already stays as it is."""
        row, body = self.row(site), self.read(ReceiptFileShape)

        def effect() -> Response:
            made = receipts.take(row, body["csv"], actor=self.actor, now=timezone.now())
            return Response({"object": "receipts_import", "data": [_receipt(r) for r in made]})

        return self.write(effect)


urlpatterns = [
    path("sites/<str:site>/profit", SiteProfit.as_view(), name="site-profit"),
    path("sites/<str:site>/profit.csv", SiteProfitFile.as_view(), name="site-profit-csv"),
    path("sites/<str:site>/energy", SiteEnergy.as_view(), name="site-energy"),
    path("sites/<str:site>/receipts", SiteReceipts.as_view(), name="site-receipts"),
    path("sites/<str:site>/receipts/import", SiteReceiptsImport.as_view(), name="site-receipts-import"),
]
