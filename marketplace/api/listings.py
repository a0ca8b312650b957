"""Listings: search, show, calendar; and, for operators, draft, change, publish, pause, retire."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

from django.urls import path
from django.utils import timezone
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework.request import Request
from rest_framework.response import Response

from marketplace.api import reliability, shapes, verifications
from marketplace.api.base import Resource
from marketplace.api.listing_shapes import (
    DraftShape,
    ListingShape,
    MineShape,
    SearchPage,
    SearchShape,
    TermsShape,
    filters_of,
)
from marketplace.errors import MarketError
from marketplace.models import Listing, Maintenance, Site, SpotInterval
from marketplace.services import availability, host_shape, listings, maintenance, price_tiers, search, spot_prices
from marketplace.services.availability import Stock
from marketplace.services.price_tiers import Option
from scheduler.core.capacity import LEVELS


class ListingResource(Resource):
    model_queryset = Listing.objects.select_related(
        "site__cell", "gpu_model", "organization__reliability", "reliability", "resale"
    )
    prefix = "lst"
    filters = {"state": "state"}

    def represent(
        self,
        row: Listing,
        stock: Stock | None = None,
        level: str = "site",
        verified: dict[str, Any] | None = None,
        prices: dict[str, Option] | None = None,
        host: dict[str, int] | None = None,
    ) -> dict[str, Any]:
        site, model = row.site, row.gpu_model
        mine = self.actor.organization_id == row.organization_id
        return {
            "id": row.public_id,
            "object": "listing",
            "created_at": row.created_at,
            "title": row.title,
            "description": row.description,
            "state": row.state,
            "visibility": row.visibility,
            "version": row.version,
            "published_at": row.published_at,
            "operator": {
                "id": row.organization.public_id,
                "name": row.organization.name,
                "reliability_permille": reliability.score_of(row.organization),
            },
            "site": {
                "id": site.public_id,
                "name": site.name,
                "region": site.region,
                "country": site.country,
                "timezone": site.timezone,
                "carbon_g_per_kwh": site.carbon_g_per_kwh,
                "renewable_permille": site.renewable_permille,
            },
            "gpu_model": None
            if model is None
            else {"name": model.name, "vram_mib": model.vram_mib, "tdp_w": model.tdp_w},
            "host": host_shape.of_listing(row) if host is None else host,
            "interconnect": row.interconnect,
            "fabric_gbps": row.fabric_gbps,
            "runtime": row.runtime,
            "prices": shapes.prices(price_tiers.all_chosen(row) if prices is None else prices, row.currency),
            "price_tiers": row.price_tiers,
            "spot_price": self.spot_price(row),
            "reliability": reliability.shown(row),
            **({} if verified is None else {"verification": verified}),
            "terms": {
                "min_gpus": row.min_gpus,
                "min_term_hours": row.min_term_hours,
                "max_term_days": row.max_term_days,
                "upfront_permille": row.upfront_permille,
                "eviction_notice_s": row.eviction_notice_s,
                "flexible_hours_per_month": row.flexible_hours_per_month,
                "flexible_notice_s": row.flexible_notice_s,
                "emergency_notice_s": row.emergency_notice_s,
                "maintenance_hours_per_month": row.maintenance_hours_per_month,
                "available_from": row.available_from,
                "available_until": row.available_until,
            },
            "resale": _resale(row),
            "maintenance": [shapes.maintenance(work) for work in self.maintenance(row)],
            **({} if stock is None else {"stock": _stock(stock, level)}),
            "actions": listings.actions(row) if mine else (["quote"] if row.state == "published" else []),
        }

    def spot_price(self, row: Listing) -> dict[str, Any] | None:
        if row.pk not in self.spot:
            self.spot |= {row.pk: None, **spot_prices.in_force([row.pk], timezone.now())}
        found = self.spot[row.pk]
        return shapes.price(found.price, row.currency) if found and row.spot_floor is not None else None

    @cached_property
    def spot(self) -> dict[int, SpotInterval | None]:
        """Intervals in force, of listings that were looked up."""
        return {}

    def maintenance(self, row: Listing) -> list[Maintenance]:
        """Announced work on hosts that it offers."""
        if row.pk not in self.work:
            self.work |= {row.pk: [], **maintenance.upcoming([row.pk], timezone.now())}
        return self.work[row.pk]

    @cached_property
    def work(self) -> dict[int, list[Maintenance]]:
        """As `spot`."""
        return {}

    def answer(self, row: Listing, status: int = 200) -> Response:
        row = self.queryset().get(pk=row.pk)
        return Response(self.represent(row), status=status, headers={"ETag": f'"{row.version}"'})

    def terms(self, body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """(columns, {hosts, partners}) of a body."""
        columns = {k: v for k, v in body.items() if k not in {"hosts", "partners", "gpu_model", "site"}}
        if "gpu_model" in body:
            name = body["gpu_model"]
            columns["gpu_model_id"] = None if name is None else listings.gpu_model_id(name)
        hosts, partners = body.get("hosts"), body.get("partners")
        return columns, {
            "hosts": None if hosts is None else listings.own_hosts(self.actor, hosts),
            "partners": None if partners is None else listings.partner_ids(partners),
        }


def _resale(row: Listing) -> dict[str, Any] | None:
    if not row.is_resale:
        return None
    return {"id": row.resale.public_id, "starts_at": row.resale.starts_at, "ends_at": row.resale.ends_at}


def _stock(stock: Stock, level: str) -> dict[str, Any]:
    return {
        "gpus": stock.gpus,
        "listed": stock.total,
        "level": level,
        "as_of": stock.as_of,
        "heard_at": stock.heard_at,
    }


class Listings(ListingResource):
    actions = {"GET": "listings:read", "POST": "listings:write"}

    @extend_schema(
        tags=["listings"], operation_id="listings_search", responses={200: SearchPage},
        parameters=[
            SearchShape,
            OpenApiParameter("mine", bool, description="the organization's own, in every state; then only state, limit and cursor"),
        ],
    )  # fmt: skip
    def get(self, request: Request) -> Response:
        """Published offers that match every filter, with exact stock."""
        if "mine" in request.query_params:
            return self.mine(request)
        query = shapes.query(request, SearchShape)
        now = timezone.now()
        wanted = filters_of(query)
        found = search.search(
            self.actor, wanted, now=now, sort=query["sort"], limit=query["limit"], cursor=query.get("cursor"),
            with_facets=query["facets"],
        )  # fmt: skip
        shown = [f.listing.pk for f in found.rows]
        self.spot |= {**dict.fromkeys(shown), **spot_prices.in_force(shown, now)}
        self.work |= {**{pk: [] for pk in shown}, **maintenance.upcoming(shown, now)}
        return Response(
            {
                "data": [
                    self.represent(f.listing, f.stock, wanted.level, vars(f.checked), f.prices, f.host)
                    for f in found.rows
                ],
                "has_more": found.has_more,
                "cursor": found.cursor,
                "as_of": found.as_of,
                **({"facets": found.facets} if query["facets"] else {}),
                **({"nothing": found.nothing} if found.nothing is not None else {}),
            }
        )

    def mine(self, request: Request) -> Response:
        query = shapes.query(request, MineShape)
        if not query["mine"]:
            raise MarketError("invalid_request", "mine is true, or left out.", {"/mine": "true"})
        rows = self.queryset().filter(organization=self.actor.organization_id)
        if "state" in query:
            rows = rows.filter(state=query["state"])
        return Response(shapes.page(self.represent, rows, {k: query[k] for k in ("limit", "cursor") if k in query}))

    @extend_schema(tags=["listings"], operation_id="listings_draft", request=DraftShape, responses={201: ListingShape})
    def post(self, request: Request) -> Response:  # noqa: ARG002
        """A draft at one of your sites."""
        body = self.read(DraftShape)
        site = Site.objects.owned_by(self.actor.organization_id).filter(pk=body["site"]).first()
        if site is None:
            raise MarketError("not_found", "site: there is none of that id.", {"/site": "unknown"})
        columns, related = self.terms(body)
        related["partners"] = related["partners"] or ()
        return self.write(
            lambda: self.answer(listings.draft(self.actor, site, columns, **related, now=timezone.now()), 201)
        )


class ListingDetail(ListingResource):
    actions = {"GET": "listings:read", "PATCH": "listings:write"}

    @extend_schema(
        tags=["listings"], operation_id="listings_show", responses={200: ListingShape},
        parameters=[OpenApiParameter("level", str, enum=list(LEVELS))],
    )  # fmt: skip
    def get(self, request: Request, listing: str) -> Response:
        """With what is free for the next hour, as one block inside one cell of `level`."""
        row = self.row(listing)
        level = request.query_params.get("level", "site")
        if level not in LEVELS:
            raise MarketError("invalid_request", f"level is {level}", {"/level": f"one of {', '.join(LEVELS)}"})
        stock = availability.stock([row], now=timezone.now(), level=level)[row.pk]
        verified = verifications.of_listing(row)
        return Response(self.represent(row, stock, level, verified), headers={"ETag": f'"{row.version}"'})

    @extend_schema(
        tags=["listings"], operation_id="listings_update", request=TermsShape, responses={200: ListingShape},
        parameters=[OpenApiParameter("If-Match", str, OpenApiParameter.HEADER, description="the ETag that was read")],
    )  # fmt: skip
    def patch(self, request: Request, listing: str) -> Response:
        """Changes make the next version; contracts keep what was agreed."""
        row = self.row(listing)
        body = self.read(TermsShape, partial=True)
        columns, related = self.terms(body)
        match = request.headers.get("If-Match", "").strip('W/"')
        version = int(match) if match.isdigit() else None
        return self.write(
            lambda: self.answer(
                listings.update(self.actor, row, columns, **related, expected_version=version, now=timezone.now())
            )
        )


class ListingMove(ListingResource):
    actions = {"POST": "listings:write"}

    def move(self, public_id: str, act: Callable[..., Listing]) -> Response:
        row = self.row(public_id)
        return self.write(lambda: self.answer(act(self.actor, row, now=timezone.now())))


class ListingPublish(ListingMove):
    @extend_schema(tags=["listings"], operation_id="listings_publish", request=None, responses={200: ListingShape})
    def post(self, request: Request, listing: str) -> Response:  # noqa: ARG002
        """Put it on offer. Refused: every field that is in the way."""
        return self.move(listing, listings.publish)


class ListingPause(ListingMove):
    @extend_schema(tags=["listings"], operation_id="listings_pause", request=None, responses={200: ListingShape})
    def post(self, request: Request, listing: str) -> Response:  # noqa: ARG002
        """Off the market, to come back; contracts go on."""
        return self.move(listing, listings.pause)


class ListingRetire(ListingMove):
    @extend_schema(tags=["listings"], operation_id="listings_retire", request=None, responses={200: ListingShape})
    def post(self, request: Request, listing: str) -> Response:  # noqa: ARG002
        """Off the market for good; contracts go on with what was agreed."""
        return self.move(listing, listings.retire)


urlpatterns = [
    path("listings", Listings.as_view(), name="listings"),
    path("listings/<str:listing>", ListingDetail.as_view(), name="listing"),
    path("listings/<str:listing>/publish", ListingPublish.as_view(), name="listing-publish"),
    path("listings/<str:listing>/pause", ListingPause.as_view(), name="listing-pause"),
    path("listings/<str:listing>/retire", ListingRetire.as_view(), name="listing-retire"),
]
