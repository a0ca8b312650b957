"""Amendments of a contract: a later end or more GPUs by its customer, another price by its operator; and its papers."""

from typing import Any

from django.shortcuts import get_object_or_404
from django.urls import path
from django.utils import timezone
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import serializers
from rest_framework.renderers import BaseRenderer, JSONRenderer
from rest_framework.request import Request
from rest_framework.response import Response

from marketplace import ids
from marketplace.api import shapes
from marketplace.api.base import Resource, Shape
from marketplace.api.contracts import ContractResource
from marketplace.errors import MarketError
from marketplace.models import Amendment, Contract, ContractDocument
from marketplace.services import contracts, documents


class AmendmentRequest(Shape):
    kind = serializers.ChoiceField(Amendment.Kind.choices)
    ends_at = serializers.DateTimeField(required=False, help_text="extend: the later end, to the minute")
    gpu_count = serializers.IntegerField(
        required=False, min_value=1, max_value=1_000_000, help_text="resize: GPUs in all, for the rest of the window"
    )
    price = serializers.IntegerField(
        required=False, min_value=1, max_value=1 << 50, help_text="price (by the operator): millionths per GPU-hour"
    )
    effective_at = serializers.DateTimeField(required=False, help_text="price: a rise, 30 days ahead or more")
    reason = serializers.CharField(required=False, max_length=200, default="", help_text="price: for the customer")

    NEEDED = {"extend": {"ends_at"}, "resize": {"gpu_count"}, "price": {"price"}}

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        missing = {name: "needed" for name in self.NEEDED[attrs["kind"]] if name not in attrs}
        if missing:
            raise serializers.ValidationError(missing)
        return attrs


class AmendmentShape(serializers.Serializer):
    id = serializers.CharField()
    object = serializers.CharField()
    created_at = serializers.DateTimeField()
    contract = serializers.CharField()
    kind = serializers.ChoiceField(Amendment.Kind.choices)
    state = serializers.ChoiceField(Amendment.State.choices)
    proposed_by = serializers.CharField()
    reason = serializers.CharField()
    answer_by = serializers.DateTimeField(help_text="it stands until then")
    effective_at = serializers.DateTimeField(help_text="from when on it counts")
    ends_at = serializers.DateTimeField(allow_null=True)
    added_gpus = serializers.IntegerField()
    price = shapes.PriceShape(allow_null=True, help_text="of what is added, or the new price")
    old_price = shapes.PriceShape(allow_null=True)
    total = shapes.MoneyShape(allow_null=True, help_text="what it adds to the commitment")
    decided_at = serializers.DateTimeField(allow_null=True)
    decided_by = serializers.CharField()
    accept = shapes.AcceptShape(allow_null=True)
    actions = serializers.ListField(child=serializers.CharField())


class DocumentShape(serializers.Serializer):
    id = serializers.CharField()
    object = serializers.CharField()
    created_at = serializers.DateTimeField()
    contract = serializers.CharField()
    amendment = serializers.CharField(allow_null=True)
    kind = serializers.ChoiceField(ContractDocument.Kind.choices)
    title = serializers.CharField()
    sha256 = serializers.CharField(help_text="of the HTML as UTF-8")
    html = serializers.CharField(help_text="the paper as it was agreed; it never changes")


class OfContract(ContractResource):
    """What hangs under a contract that the actor may see."""

    def contract(self, public_id: str) -> Contract:
        found: Contract = self.row(public_id)
        return found


class AmendmentResource(Resource):
    model_queryset = Amendment.objects.select_related("contract__organization", "contract__listing")
    prefix = "amd"

    def of(self, contract: str, amendment: str) -> Amendment:
        row: Amendment = self.row(amendment)
        if row.contract.public_id != contract:
            raise MarketError("not_found", f"{contract} has no amendment {amendment}.")
        return row

    def represent(self, row: Amendment) -> dict[str, Any]:
        return shown(row, contracts.amendment_actions(row, self.actor, timezone.now()))


def shown(row: Amendment, actions: list[str]) -> dict[str, Any]:
    contract = row.contract
    here = f"/api/v1/contracts/{contract.public_id}/amendments/{row.public_id}/accept"
    return {
        "id": row.public_id,
        "object": "amendment",
        **{name: getattr(row, name) for name in SAME},
        "contract": contract.public_id,
        "price": shapes.price(row.price, contract.currency),
        "old_price": shapes.price(row.old_price, contract.currency),
        "total": shapes.amount(row.total_minor, contract.currency),
        "accept": {"method": "POST", "path": here, "body": {}} if "accept" in actions else None,
        "actions": actions,
    }


SAME = (
    "created_at", "kind", "state", "proposed_by", "reason", "answer_by", "effective_at", "ends_at", "added_gpus", "decided_at",
    "decided_by",
)  # fmt: skip


class Amendments(OfContract):
    actions = {"GET": "contracts:read", "POST": "contracts:write"}

    @extend_schema(
        tags=["contracts"], operation_id="amendments_list", responses={200: shapes.page_of("Amendment", AmendmentShape)},
        parameters=[OpenApiParameter(n, str) for n in ("limit", "cursor")],
    )  # fmt: skip
    def get(self, request: Request, contract: str) -> Response:
        rows = self.contract(contract).amendments.select_related("contract")
        now = timezone.now()

        def represent(row: Amendment) -> dict[str, Any]:
            return shown(row, contracts.amendment_actions(row, self.actor, now))

        return Response(shapes.page(represent, rows, shapes.query(request, shapes.PageQuery)))

    @extend_schema(
        tags=["contracts"], operation_id="amendments_create", request=AmendmentRequest, responses={201: AmendmentShape}
    )
    def post(self, request: Request, contract: str) -> Response:  # noqa: ARG002
        """Propose a change. `extend` and `resize` are firm like a quote and hold nothing until accepted; a higher `price` is for
        the customer to accept or decline.
        """
        row = self.contract(contract)
        body = self.read(AmendmentRequest)

        def effect() -> Response:
            now = timezone.now()
            if body["kind"] == Amendment.Kind.EXTEND:
                made = contracts.amendments.extend(self.actor, row, body["ends_at"], now=now)
            elif body["kind"] == Amendment.Kind.RESIZE:
                made = contracts.amendments.resize(self.actor, row, body["gpu_count"], now=now)
            else:
                made = contracts.prices.propose(
                    self.actor, row, body["price"], body.get("effective_at"), now=now, reason=body["reason"]
                )
            return Response(shown(made, contracts.amendment_actions(made, self.actor, now)), status=201)

        return self.write(effect)


class AmendmentDetail(AmendmentResource):
    actions = {"GET": "contracts:read"}

    @extend_schema(tags=["contracts"], operation_id="amendments_show", responses={200: AmendmentShape})
    def get(self, request: Request, contract: str, amendment: str) -> Response:  # noqa: ARG002
        return Response(self.represent(self.of(contract, amendment)))


class AmendmentAccept(AmendmentResource):
    actions = {"POST": "contracts:write"}

    @extend_schema(tags=["contracts"], operation_id="amendments_accept", request=None, responses={200: AmendmentShape})
    def post(self, request: Request, contract: str, amendment: str) -> Response:  # noqa: ARG002
        """It holds from now on. Room is looked for once more: `capacity_gone` says what would fit."""
        row = self.of(contract, amendment)

        def effect() -> Response:
            contracts.accept_amendment(self.actor, row, now=timezone.now())
            return Response(self.represent(self.row(amendment)))

        return self.write(effect)


class AmendmentDecline(AmendmentResource):
    actions = {"POST": "contracts:write"}

    @extend_schema(tags=["contracts"], operation_id="amendments_decline", request=None, responses={200: AmendmentShape})
    def post(self, request: Request, contract: str, amendment: str) -> Response:  # noqa: ARG002
        """A higher price is not accepted: the old one holds until its day, and the contract ends then."""
        row = self.of(contract, amendment)

        def effect() -> Response:
            contracts.decline_amendment(self.actor, row, now=timezone.now())
            return Response(self.represent(self.row(amendment)))

        return self.write(effect)


class Documents(OfContract):
    actions = {"GET": "contracts:read"}

    @extend_schema(
        tags=["contracts"], operation_id="documents_list", responses={200: shapes.page_of("Document", DocumentShape)},
        parameters=[OpenApiParameter(n, str) for n in ("limit", "cursor")],
    )  # fmt: skip
    def get(self, request: Request, contract: str) -> Response:
        """The order form and the amendments, as agreed. The page prints them."""
        rows = self.contract(contract).documents.select_related("contract", "amendment")
        return Response(shapes.page(_paper, rows, shapes.query(request, shapes.PageQuery)))


def _paper(row: ContractDocument) -> dict[str, Any]:
    return {
        "id": row.public_id,
        "object": "document",
        "created_at": row.created_at,
        "contract": row.contract.public_id,
        "amendment": row.amendment.public_id if row.amendment else None,
        "kind": row.kind,
        "title": row.title,
        "sha256": row.digest,
        "html": row.html,
    }


class PdfRenderer(BaseRenderer):
    """Lets `Accept: application/pdf` through; a refusal is a problem document all the same."""

    media_type, format, charset, render_style = "application/pdf", "pdf", None, "binary"

    def render(self, data: Any, accepted_media_type: str | None = None, renderer_context: Any = None) -> bytes:  # noqa: ARG002
        if isinstance(data, bytes):
            return data
        found: bytes = JSONRenderer().render(data, None, renderer_context)
        return found


class Pdf(OfContract):
    actions = {"GET": "contracts:read"}
    renderer_classes = [PdfRenderer]

    def file(self, row: ContractDocument) -> Response:
        file = documents.file_of(row, now=timezone.now())
        name = f'attachment; filename="{row.public_id}.pdf"'
        return Response(bytes(file.body), headers={"Content-Disposition": name, "ETag": f'"{file.digest}"'})


class DocumentPdf(Pdf):
    @extend_schema(
        tags=["contracts"], operation_id="documents_pdf", responses={(200, "application/pdf"): OpenApiTypes.BINARY}
    )
    def get(self, request: Request, contract: str, document: str) -> Response:  # noqa: ARG002
        """The paper as a PDF file: of the same HTML, made once, and the same bytes ever after."""
        rows = self.contract(contract).documents.filter(pk=ids.decode("doc", document) or 0)
        return self.file(get_object_or_404(rows))


class OrderFormPdf(Pdf):
    @extend_schema(
        tags=["contracts"], operation_id="order_form_pdf", responses={(200, "application/pdf"): OpenApiTypes.BINARY}
    )
    def get(self, request: Request, contract: str) -> Response:  # noqa: ARG002
        """The contract's order form as a PDF file."""
        rows = self.contract(contract).documents.filter(kind=ContractDocument.Kind.ORDER_FORM)
        return self.file(get_object_or_404(rows))


class TermsRequest(Shape):
    version = serializers.CharField(max_length=20)


class TermsShape(serializers.Serializer):
    object = serializers.CharField()
    version = serializers.CharField(help_text="the one in force")
    sha256 = serializers.CharField(help_text="of the HTML as UTF-8")
    html = serializers.CharField()
    accepted_at = serializers.DateTimeField(allow_null=True)
    accepted_by = serializers.CharField(allow_null=True)


class TermsOfService(Resource):
    actions = {"GET": "contracts:read", "POST": "contracts:write"}

    @extend_schema(tags=["contracts"], operation_id="terms_show", responses={200: TermsShape})
    def get(self, request: Request) -> Response:  # noqa: ARG002
        """The terms of service in force, and who accepted them for the organization."""
        return Response(self._shown())

    @extend_schema(tags=["contracts"], operation_id="terms_accept", request=TermsRequest, responses={200: TermsShape})
    def post(self, request: Request) -> Response:  # noqa: ARG002
        """Accept them for the organization; the body of a quote's `accept` does so too."""
        version = self.read(TermsRequest)["version"]

        def effect() -> Response:
            documents.accept_terms(self.actor, version, now=timezone.now())
            return Response(self._shown())

        return self.write(effect)

    def _shown(self) -> dict[str, Any]:
        found, accepted = documents.terms(), documents.acceptance(self.actor.organization_id)
        return {
            "object": "terms",
            "version": found.version,
            "sha256": found.digest,
            "html": found.html,
            "accepted_at": accepted.accepted_at if accepted else None,
            "accepted_by": accepted.accepted_by if accepted else None,
        }


urlpatterns = [
    path("terms", TermsOfService.as_view(), name="terms"),
    path("contracts/<str:contract>/amendments", Amendments.as_view(), name="amendments"),
    path("contracts/<str:contract>/amendments/<str:amendment>", AmendmentDetail.as_view(), name="amendment"),
    path(
        "contracts/<str:contract>/amendments/<str:amendment>/accept", AmendmentAccept.as_view(), name="amendment-accept"
    ),
    path(
        "contracts/<str:contract>/amendments/<str:amendment>/decline",
        AmendmentDecline.as_view(),
        name="amendment-decline",
    ),
    path("contracts/<str:contract>/documents/<str:document>/pdf", DocumentPdf.as_view(), name="document-pdf"),
    path("contracts/<str:contract>/order-form.pdf", OrderFormPdf.as_view(), name="order-form-pdf"),
    path("contracts/<str:contract>/documents", Documents.as_view(), name="documents"),
]
