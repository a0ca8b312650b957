"""Contracts: accept a quote, list, show, events, terminate. Both sides see a contract; only its customer acts on it."""

from typing import Any

from django.urls import path
from django.utils import timezone
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from marketplace.api import shapes
from marketplace.api.base import PublicId, Resource, Shape
from marketplace.models import Contract, ContractEvent, Kind
from marketplace.services import contracts, spot, spot_prices, terms


class AcceptRequest(Shape):
    quote = PublicId("quo")
    terms_version = serializers.CharField(
        required=False,
        max_length=20,
        help_text="of the terms of service (`GET /terms`), accepted with it where they are not yet",
    )


class TerminateRequest(Shape):
    reason = serializers.CharField(max_length=120, required=False, default="terminated by the customer")


class LimitRequest(Shape):
    limit_price = serializers.IntegerField(
        min_value=1, max_value=1 << 50, help_text="millionths of the major unit per GPU-hour"
    )


class ContractShape(serializers.Serializer):
    id = serializers.CharField()
    object = serializers.CharField()
    created_at = serializers.DateTimeField()
    state = serializers.ChoiceField(Contract.State.choices)
    kind = serializers.ChoiceField(Kind.choices)
    customer = serializers.DictField()
    operator = serializers.DictField()
    listing = serializers.CharField()
    quote = serializers.CharField(allow_null=True)
    site = serializers.DictField()
    gpu_model = serializers.CharField(allow_null=True)
    gpu_count = serializers.IntegerField()
    missing_gpus = serializers.IntegerField(
        help_text="of them, that cannot be used now: their host is out of work; not charged"
    )
    missing_since = serializers.DateTimeField(allow_null=True, help_text="null: none is missing")
    starts_at = serializers.DateTimeField()
    ends_at = serializers.DateTimeField(allow_null=True)
    ended_at = serializers.DateTimeField(allow_null=True)
    price = shapes.PriceShape()
    overage_price = shapes.PriceShape(allow_null=True)
    limit_price = shapes.PriceShape(allow_null=True)
    spot_price = shapes.PriceShape(allow_null=True, help_text="of the interval in force; null: not spot, or none yet")
    total = shapes.MoneyShape(allow_null=True, help_text="of the commitment as agreed; null: billed by use")
    due_at_signing = shapes.MoneyShape(allow_null=True, help_text="drawn down first by the commitment; null: nothing")
    pay_by = serializers.DateTimeField(allow_null=True, help_text="until then what is due at signing is waited for")
    summary = serializers.CharField(help_text="where it stands and what comes next, for people")
    platform_fee_permille = serializers.IntegerField()
    terms = serializers.DictField(help_text="the order form as agreed; never changes")
    terminates_at = serializers.DateTimeField(allow_null=True, help_text="its end if it were terminated now")
    reference = serializers.CharField(required=False)
    metadata = serializers.DictField(required=False)
    actions = serializers.ListField(child=serializers.CharField())


class TerminationShape(serializers.Serializer):
    object = serializers.CharField()
    contract = serializers.CharField()
    ends_at = serializers.DateTimeField(help_text="its end if it were terminated now")
    stays_due = shapes.MoneyShape(help_text="of the commitment, from now to that end")
    released = shapes.MoneyShape(help_text="of the commitment, not owed any more")
    accept = shapes.AcceptShape()


class ContractResource(Resource):
    model_queryset = Contract.objects.select_related(
        "organization", "operator", "listing", "quote", "site", "gpu_model"
    ).prefetch_related("shortfalls")
    prefix = "ctr"
    filters = {"state": "state", "kind": "kind", "listing": "listing", "reference": "reference"}

    def represent(self, row: Contract) -> dict[str, Any]:
        now = timezone.now()
        actions = sorted([*contracts.actions(row, self.actor), *spot.actions(row, self.actor)])
        sold = self.actor.organization_id == row.operator_id != row.organization_id
        missing, missing_since = contracts.missing(row, now)
        return {
            "id": row.public_id,
            "object": "contract",
            "created_at": row.created_at,
            "state": row.state,
            "kind": row.kind,
            "customer": {"id": row.organization.public_id, "name": row.organization.name},
            "operator": {"id": row.operator.public_id, "name": row.operator.name},
            "listing": row.listing.public_id,
            "quote": row.quote.public_id if row.quote else None,
            "site": {"id": row.site.public_id, "name": row.site.name, "region": row.site.region},
            "gpu_model": row.gpu_model.name if row.gpu_model else None,
            "gpu_count": row.gpu_count,
            "missing_gpus": missing,
            "missing_since": missing_since,
            "starts_at": row.starts_at,
            "ends_at": row.ends_at,
            "ended_at": row.ended_at,
            "price": shapes.price(row.price, row.currency),
            "overage_price": shapes.price(row.overage_price, row.currency),
            "limit_price": shapes.price(row.limit_price, row.currency),
            "spot_price": shapes.price(spot_prices.now_under(row, now), row.currency),
            "total": shapes.amount(row.terms.get("total_minor"), row.currency),
            "due_at_signing": shapes.amount(row.upfront_minor or None, row.currency),
            "pay_by": row.pay_by,
            "summary": contracts.sentence(row, now),
            "platform_fee_permille": row.fee_permille,
            "terms": row.terms,
            "terminates_at": terms.termination(row, now) if "terminate" in actions else None,
            # The customer's own notes are not the operator's business.
            **({} if sold else {"reference": row.reference, "metadata": row.metadata}),
            "actions": actions,
        }


class Contracts(ContractResource):
    actions = {"GET": "contracts:read", "POST": "contracts:write"}

    @extend_schema(
        tags=["contracts"], operation_id="contracts_list", responses={200: shapes.page_of("Contract", ContractShape)},
        parameters=[OpenApiParameter(n, str) for n in ("state", "kind", "listing", "reference", "limit", "cursor")],
    )  # fmt: skip
    def get(self, request: Request) -> Response:
        rows = self.queryset()
        if "reference" in request.query_params:  # of one's own contracts only: it is the customer's note
            rows = rows.filter(organization=self.actor.organization_id)
        return self.listing(request, rows)

    @extend_schema(
        tags=["contracts"], operation_id="contracts_accept", request=AcceptRequest, responses={201: ContractShape}
    )
    def post(self, request: Request) -> Response:  # noqa: ARG002
        """Accept a quote while its price is firm. A hold that lapsed is looked for again: `capacity_gone` says what would fit."""
        body = self.read(AcceptRequest)

        def effect() -> Response:
            made = contracts.accept(
                self.actor, body["quote"], now=timezone.now(), terms_version=body.get("terms_version")
            )
            return Response(self.represent(self.queryset().get(pk=made.pk)), status=201)

        return self.write(effect)


class ContractDetail(ContractResource):
    actions = {"GET": "contracts:read", "PATCH": "contracts:write"}

    def answer(self, row: Contract) -> Response:
        etag = {"ETag": f'"{row.limit_price}"'} if row.kind == Kind.SPOT else {}
        return Response(self.represent(row), headers=etag)

    @extend_schema(tags=["contracts"], operation_id="contracts_show", responses={200: ContractShape})
    def get(self, request: Request, contract: str) -> Response:  # noqa: ARG002
        return self.answer(self.row(contract))

    @extend_schema(
        tags=["contracts"], operation_id="contracts_set_limit", request=LimitRequest, responses={200: ContractShape},
        parameters=[OpenApiParameter("If-Match", str, OpenApiParameter.HEADER, description="the ETag that was read")],
    )  # fmt: skip
    def patch(self, request: Request, contract: str) -> Response:
        """Another limit for a spot contract, from the next auction on. What runs is told where it loses by it, as always."""
        row = self.row(contract)
        limit = self.read(LimitRequest)["limit_price"]
        match = request.headers.get("If-Match", "").strip('W/"')
        expected = int(match) if match.isdigit() else None

        def effect() -> Response:
            spot.set_limit(self.actor, row, limit, now=timezone.now(), expected=expected)
            return self.answer(self.row(contract))

        return self.write(effect)


class ContractTerminate(ContractResource):
    actions = {"POST": "contracts:write"}

    @extend_schema(
        tags=["contracts"], operation_id="contracts_terminate", request=TerminateRequest, responses={200: ContractShape}
    )
    def post(self, request: Request, contract: str) -> Response:  # noqa: ARG002
        """End it early by the rule in its terms: on-demand and spot at once, reserved and flexible at `terminates_at`."""
        row = self.row(contract)
        reason = self.read(TerminateRequest)["reason"]

        def effect() -> Response:
            contracts.terminate(self.actor, row, now=timezone.now(), reason=reason)
            return Response(self.represent(self.row(contract)))

        return self.write(effect)


class ContractTermination(ContractResource):
    actions = {"GET": "contracts:read"}

    @extend_schema(tags=["contracts"], operation_id="contracts_termination", responses={200: TerminationShape})
    def get(self, request: Request, contract: str) -> Response:  # noqa: ARG002
        """What an early end would cost now. Nothing is ended by asking."""
        row = self.row(contract)
        found = contracts.leaving(row, timezone.now())
        path = f"/api/v1/contracts/{row.public_id}/terminate"
        return Response(
            {
                "object": "termination",
                "contract": row.public_id,
                "ends_at": found.ends_at,
                "stays_due": shapes.amount(found.stays_due_minor, row.currency),
                "released": shapes.amount(found.released_minor, row.currency),
                "accept": {"method": "POST", "path": path, "body": {}},
            }
        )


class ContractEvents(ContractResource):
    actions = {"GET": "contracts:read"}

    @extend_schema(
        tags=["contracts"], operation_id="contracts_events", responses={200: shapes.page_of("ContractEvent", shapes.EventShape)},
        parameters=[OpenApiParameter(n, str) for n in ("limit", "cursor")],
    )  # fmt: skip
    def get(self, request: Request, contract: str) -> Response:
        """What became of it, oldest first."""
        row = self.row(contract)
        query = shapes.query(request, shapes.PageQuery)
        return Response(shapes.page(_event, row.events.all(), query, order="id"))


def _event(row: ContractEvent) -> dict[str, Any]:
    return {name: getattr(row, name) for name in ("at", "actor", "from_state", "to_state", "reason")}


urlpatterns = [
    path("contracts", Contracts.as_view(), name="contracts"),
    path("contracts/<str:contract>", ContractDetail.as_view(), name="contract"),
    path("contracts/<str:contract>/terminate", ContractTerminate.as_view(), name="contract-terminate"),
    path("contracts/<str:contract>/termination", ContractTermination.as_view(), name="contract-termination"),
    path("contracts/<str:contract>/events", ContractEvents.as_view(), name="contract-events"),
]
