"""The forward market: resales of contracts, standing bids, and, for everybody, the book and what was sold."""

from typing import Any

from django.urls import path
from django.utils import timezone
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework.request import Request
from rest_framework.response import Response

from marketplace.api import shapes
from marketplace.api.base import Resource
from marketplace.api.contracts import ContractResource
from marketplace.api.forward_shapes import (
    BidRequest,
    BidShape,
    BookQuery,
    BookShape,
    FillShape,
    ResaleRequest,
    ResaleShape,
    ResaleTermsQuery,
    ResaleTermsShape,
)
from marketplace.errors import MarketError
from marketplace.models import Contract, Fill, Resale, StandingBid
from marketplace.services.forward import bids, book, resales

PAGE = [OpenApiParameter(n, str) for n in ("limit", "cursor")]


# --- resales
class ResaleResource(Resource):
    model_queryset = Resale.objects.select_related("contract", "listing", "organization")
    prefix = Resale.PREFIX
    filters = {"state": "state", "contract": "contract"}

    def represent(self, row: Resale) -> dict[str, Any]:
        mine = self.actor.organization_id == row.organization_id
        return {
            "id": row.public_id,
            "object": "resale",
            "created_at": row.created_at,
            "state": row.state,
            "reason": row.reason,
            "seller": {"id": row.organization.public_id, "name": row.organization.name},
            "contract": row.contract.public_id,
            "listing": row.listing.public_id,
            "gpu_count": row.gpu_count,
            "sold_gpus": row.sold_gpus,
            "left_gpus": row.left,
            "starts_at": row.starts_at,
            "ends_at": row.ends_at,
            "expires_at": row.expires_at,
            "closed_at": row.closed_at,
            "price": shapes.price(row.price, row.currency),
            "fee_permille": row.fee_permille,
            "actions": resales.actions(row, self.actor) if mine else [],
        }


class Resales(ResaleResource):
    actions = {"GET": "contracts:read", "POST": "contracts:write"}

    @extend_schema(
        tags=["forward"], operation_id="resales_list", responses={200: shapes.page_of("Resale", ResaleShape)},
        parameters=[*(OpenApiParameter(n, str) for n in ("state", "contract")), *PAGE],
    )  # fmt: skip
    def get(self, request: Request) -> Response:
        """One's own offers; an operator sees those of contracts with it."""
        return self.listing(request)

    @extend_schema(tags=["forward"], operation_id="resales_create", request=ResaleRequest, responses={201: ResaleShape})
    def post(self, request: Request) -> Response:  # noqa: ARG002
        """Offer part of a contract. Its GPUs are set aside at once; `GET contracts/{contract}/resale-terms` says first what it brings."""
        body = self.read(ResaleRequest)
        contract = Contract.objects.visible_to(self.actor).filter(pk=body.pop("contract")).first()
        if contract is None:
            raise MarketError("not_found", "There is no such contract.")

        def effect() -> Response:
            made = resales.offer(self.actor, contract, resales.Asked(**body), now=timezone.now())
            return Response(self.represent(self.queryset().get(pk=made.pk)), status=201)

        return self.write(effect)


class ResaleDetail(ResaleResource):
    actions = {"GET": "contracts:read"}

    @extend_schema(tags=["forward"], operation_id="resales_show", responses={200: ResaleShape})
    def get(self, request: Request, resale: str) -> Response:  # noqa: ARG002
        return Response(self.represent(self.row(resale)))


class ResaleWithdraw(ResaleResource):
    actions = {"POST": "contracts:write"}

    @extend_schema(tags=["forward"], operation_id="resales_withdraw", request=None, responses={200: ResaleShape})
    def post(self, request: Request, resale: str) -> Response:  # noqa: ARG002
        """What is unsold is the contract's again; a quote for it that was not signed is void."""
        row = self.row(resale)

        def effect() -> Response:
            resales.withdraw(self.actor, row, now=timezone.now())
            return Response(self.represent(self.row(resale)))

        return self.write(effect)


class ResaleTerms(ContractResource):
    actions = {"GET": "contracts:read"}

    @extend_schema(
        tags=["forward"],
        operation_id="contracts_resale_terms",
        parameters=[ResaleTermsQuery],
        responses={200: ResaleTermsShape},
    )
    def get(self, request: Request, contract: str) -> Response:
        """What an offer would bring: the most that can be offered then, the fee, what is credited and what stays due. Nothing is
        offered by asking.
        """
        row = self.row(contract)
        query = shapes.query(request, ResaleTermsQuery)
        found = resales.preview(self.actor, row, resales.Asked(**query), now=timezone.now())
        return Response(
            {
                "object": "resale_terms",
                "contract": row.public_id,
                "gpus": found.gpus,
                "chunk": found.chunk,
                "expires_at": found.expires_at,
                "fee_permille": found.fee_permille,
                "buyer_pays": shapes.amount(found.buyer_pays_minor, row.currency),
                "credited": shapes.amount(found.credited_minor, row.currency),
                "stays_due": shapes.amount(found.stays_due_minor, row.currency),
            }
        )


# --- standing bids
class BidResource(Resource):
    model_queryset = StandingBid.objects.select_related("gpu_model", "site")
    prefix = StandingBid.PREFIX
    filters = {"state": "state", "gpu_model": "gpu_model__name", "region": "region", "reference": "reference"}

    def represent(self, row: StandingBid) -> dict[str, Any]:
        return {
            "id": row.public_id,
            "object": "bid",
            "created_at": row.created_at,
            "state": row.state,
            "note": row.note,
            "gpu_model": row.gpu_model.name,
            "region": row.region,
            "site": row.site.public_id if row.site else None,
            "kind": row.kind,
            "gpu_count": row.gpu_count,
            "filled_gpus": row.filled_gpus,
            "min_gpus": row.min_gpus,
            "level": row.level,
            "earliest": row.earliest,
            "latest": row.latest,
            "duration_s": row.duration_s,
            "limit_price": shapes.price(row.limit_price, row.currency),
            "expires_at": row.expires_at,
            "closed_at": row.closed_at,
            "auto_accept": row.auto_accept,
            "consent": row.consent or None,
            "reference": row.reference,
            "metadata": row.metadata,
            "actions": bids.actions(row, self.actor),
        }


class Bids(BidResource):
    actions = {"GET": "quotes:read", "POST": "quotes:write"}

    @extend_schema(
        tags=["forward"], operation_id="bids_list", responses={200: shapes.page_of("Bid", BidShape)},
        parameters=[*(OpenApiParameter(n, str) for n in ("state", "gpu_model", "region", "reference")), *PAGE],
    )  # fmt: skip
    def get(self, request: Request) -> Response:
        return self.listing(request)

    @extend_schema(tags=["forward"], operation_id="bids_create", request=BidRequest, responses={201: BidShape})
    def post(self, request: Request) -> Response:  # noqa: ARG002
        """Wait in line for capacity at a limit. The bid turns into quotes (`GET quotes`); with `auto_accept` it signs them itself, for
        which one needs `contracts:write`.
        """
        body = self.read(BidRequest)
        if body["auto_accept"] and not self.actor.may("contracts:write"):
            raise MarketError("forbidden", "auto_accept signs contracts: it needs contracts:write.")

        def effect() -> Response:
            made = bids.place(self.actor, bids.Wanted(site_id=body.pop("site", None), **body), now=timezone.now())
            return Response(self.represent(self.queryset().get(pk=made.pk)), status=201)

        return self.write(effect)


class BidDetail(BidResource):
    actions = {"GET": "quotes:read"}

    @extend_schema(tags=["forward"], operation_id="bids_show", responses={200: BidShape})
    def get(self, request: Request, bid: str) -> Response:  # noqa: ARG002
        return Response(self.represent(self.row(bid)))


class BidCancel(BidResource):
    actions = {"POST": "quotes:write"}

    @extend_schema(tags=["forward"], operation_id="bids_cancel", request=None, responses={200: BidShape})
    def post(self, request: Request, bid: str) -> Response:  # noqa: ARG002
        """It looks for nothing any more. A quote it has made stays firm for its minutes."""
        row = self.row(bid)

        def effect() -> Response:
            bids.cancel(self.actor, row, now=timezone.now())
            return Response(self.represent(self.row(bid)))

        return self.write(effect)


# --- for everybody
class Book(Resource):
    actions = {"GET": "public"}

    @extend_schema(tags=["forward"], operation_id="book_show", parameters=[BookQuery], responses={200: BookShape})
    def get(self, request: Request) -> Response:
        """What is bid and offered for a GPU model in a region, by price, month by month: no names."""
        query = shapes.query(request, BookQuery)
        model = book.model_of(query["gpu_model"])
        now = timezone.now()
        found = [
            book.depth(model, query["region"], month, livemode=self.livemode, currency=query["currency"], now=now)
            for month in book.months(now, query["months"])
        ]
        return Response(
            {
                "object": "book",
                "gpu_model": model.name,
                "region": query["region"],
                "currency": query["currency"],
                "as_of": now,
                "months": [
                    {
                        "start": each.start, "end": each.end, "bids": [_level(v, each.currency) for v in each.bids],
                        "offers": [_level(v, each.currency) for v in each.offers],
                    }
                    for each in found
                ],
            }
        )  # fmt: skip

    @property
    def livemode(self) -> bool:
        return self.actor.livemode


def _level(level: book.Level, currency: str) -> dict[str, Any]:
    return {"price": shapes.price(level.price, currency), "gpus": level.gpus, "count": level.count}


class Fills(Resource):
    actions = {"GET": "public"}
    model_queryset = Fill.objects.all()
    prefix = Fill.PREFIX
    filters = {"gpu_model": "gpu_model__name", "region": "region", "from": "at__gte", "to": "at__lt"}

    def represent(self, row: Fill) -> dict[str, Any]:
        return {
            "id": row.public_id,
            "object": "fill",
            "at": row.at,
            "gpu_model": row.gpu_model.name if row.gpu_model else None,
            "region": row.region,
            "gpu_count": row.gpu_count,
            "starts_at": row.starts_at,
            "ends_at": row.ends_at,
            "price": shapes.price(row.price, row.currency),
            "resale": row.resale_id is not None,
        }

    @extend_schema(
        tags=["forward"], operation_id="fills_list", responses={200: shapes.page_of("Fill", FillShape)},
        parameters=[*(OpenApiParameter(n, str) for n in ("gpu_model", "region", "from", "to")), *PAGE],
    )  # fmt: skip
    def get(self, request: Request) -> Response:
        """What was sold on or met a bid, newest first: when, how much, at which price."""
        return self.listing(request, book.fills(self.actor))


urlpatterns = [
    path("resales", Resales.as_view(), name="resales"),
    path("resales/<str:resale>", ResaleDetail.as_view(), name="resale"),
    path("resales/<str:resale>/withdraw", ResaleWithdraw.as_view(), name="resale-withdraw"),
    path("contracts/<str:contract>/resale-terms", ResaleTerms.as_view(), name="contract-resale-terms"),
    path("bids", Bids.as_view(), name="bids"),
    path("bids/<str:bid>", BidDetail.as_view(), name="bid"),
    path("bids/<str:bid>/cancel", BidCancel.as_view(), name="bid-cancel"),
    path("book", Book.as_view(), name="book"),
    path("fills", Fills.as_view(), name="fills"),
]
