"""Sites: the facility, its modes, its power tree, imports, enrolment tokens and agents."""

from functools import cached_property
from typing import Any

from django.conf import settings
from django.db.models import Max, Q
from django.http import Http404
from django.urls import path
from django.utils import timezone
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework.request import Request
from rest_framework.response import Response

from marketplace import ids
from marketplace.api import shapes
from marketplace.api.base import Resource
from marketplace.api.keys import PAGE, show_once
from marketplace.api.site_shapes import (
    AgentShape,
    CreateSiteShape,
    DrainedShape,
    DrainShape,
    EnrolmentShape,
    ImportReportShape,
    ImportShape,
    ModeShape,
    NewPowerNodeShape,
    PowerNodeShape,
    SiteShape,
    UpdatePowerNodeShape,
    UpdateSiteShape,
)
from marketplace.errors import MarketError
from marketplace.models import Agent, PowerNode, Site
from marketplace.services import imports, power, sites
from marketplace.tenancy import Actor

ROOT = Q(power_nodes__parent=None)


def site_of(actor: Actor, public_id: str) -> Site:
    """The site of that id that the actor may see, or 404."""
    pk = ids.decode("sit", public_id)
    found = Site.objects.visible_to(actor).filter(pk=pk).first() if pk else None
    if found is None:
        raise Http404
    return found


class SiteResource(Resource):
    model_queryset = Site.objects.select_related("cell").annotate(
        root_cap_w=Max("power_nodes__cap_w", filter=ROOT),
        root_limit_w=Max("power_nodes__limit_w", filter=ROOT),
        root_reserved_mw=Max("power_nodes__reserved_mw", filter=ROOT),
        root_fixed_w=Max("power_nodes__fixed_w", filter=ROOT),
        root_margin_w=Max("power_nodes__margin_w", filter=ROOT),
        root_measured_w=Max("power_nodes__measured_w", filter=ROOT),
    )
    prefix = "sit"
    filters = {"region": "region", "mode": "mode"}

    @cached_property
    def frozen(self) -> bool:
        return power.frozen()

    def represent(self, row: Any) -> dict[str, Any]:
        cap = row.root_cap_w if row.root_limit_w is None else min(row.root_cap_w, row.root_limit_w)
        reserved = -(-row.root_reserved_mw // 1000)
        return {
            "id": row.public_id,
            "object": "site",
            "created_at": row.created_at,
            "name": row.name,
            "cell": row.cell.name,
            "region": row.region,
            "country": row.country,
            "timezone": row.timezone,
            "grid_operator": row.grid_operator,
            "contract_power_w": row.contract_power_w,
            "pue_permille": row.pue_permille,
            "miner_pue_permille": row.miner_pue_permille,
            "energy_price_microusd_per_kwh": row.energy_price_microusd_per_kwh,
            "carbon_g_per_kwh": row.carbon_g_per_kwh,
            "renewable_permille": row.renewable_permille,
            "tariff": row.tariff,
            "pool_scheme": row.pool_scheme,
            "pool_fee_ppm": row.pool_fee_ppm,
            "switch_cost_uusd": row.switch_cost_uusd,
            "mode": row.mode,
            "frozen": self.frozen,
            "power": {
                "cap_w": cap,
                "fixed_w": row.root_fixed_w,
                "margin_w": row.root_margin_w,
                "reserved_w": reserved,
                "headroom_w": cap - row.root_fixed_w - row.root_margin_w - reserved,
                "measured_w": row.root_measured_w,
            },
            "actions": [mode for mode in Site.Mode.values if mode != row.mode],
        }

    def answer(self, site: Site, status: int = 200) -> Response:
        return Response(self.represent(self.queryset().get(pk=site.pk)), status=status)


class Sites(SiteResource):
    actions = {"GET": "sites:read", "POST": "sites:write"}

    @extend_schema(
        tags=["sites"], operation_id="sites_list", responses={200: shapes.page_of("Site", SiteShape)},
        parameters=[*PAGE, OpenApiParameter("region", str), OpenApiParameter("mode", str)],
    )  # fmt: skip
    def get(self, request: Request) -> Response:
        return self.listing(request)

    @extend_schema(tags=["sites"], operation_id="sites_create", request=CreateSiteShape, responses={201: SiteShape})
    def post(self, request: Request) -> Response:  # noqa: ARG002
        """With the root of its power tree, `site`: cap = contract power, overheads = the PUEs."""
        body = self.read(CreateSiteShape)

        def effect() -> Response:
            return self.answer(
                sites.create_site(self.organization(), actor=self.actor, now=timezone.now(), **body), 201
            )

        return self.write(effect)


class SiteDetail(SiteResource):
    actions = {"GET": "sites:read", "PATCH": "sites:write"}

    @extend_schema(tags=["sites"], operation_id="sites_show", responses={200: SiteShape})
    def get(self, request: Request, site: str) -> Response:  # noqa: ARG002
        return Response(self.represent(self.row(site)))

    @extend_schema(tags=["sites"], operation_id="sites_update", request=UpdateSiteShape, responses={200: SiteShape})
    def patch(self, request: Request, site: str) -> Response:  # noqa: ARG002
        """Caps and overheads are those of the root power node."""
        row, body = site_of(self.actor, site), self.read(UpdateSiteShape)
        return self.write(lambda: self.answer(sites.update_site(row, actor=self.actor, now=timezone.now(), **body)))


class SiteMode(SiteResource):
    actions = {"POST": "power:write"}

    @extend_schema(tags=["sites"], operation_id="sites_set_mode", request=ModeShape, responses={200: SiteShape})
    def post(self, request: Request, site: str) -> Response:  # noqa: ARG002
        """`auto`; `hold`: nothing is raised; `shed`: all miners sleep too; `off`: placements are drained too."""
        row, body = site_of(self.actor, site), self.read(ModeShape)
        return self.write(
            lambda: self.answer(sites.set_site_mode(row, body["mode"], actor=self.actor, now=timezone.now()))
        )


class SiteDrain(SiteResource):
    actions = {"POST": "sites:write"}

    @extend_schema(tags=["sites"], operation_id="sites_drain", request=DrainShape, responses={200: DrainedShape})
    def post(self, request: Request, site: str) -> Response:  # noqa: ARG002
        """As draining each of its hosts: for maintenance of a whole site, `by` an hour."""
        row, body = site_of(self.actor, site), self.read(DrainShape)

        def effect() -> Response:
            hosts = sites.drain_site(row, actor=self.actor, now=timezone.now(), **body)
            return Response({"object": "drain", "site": row.public_id, "hosts": len(hosts)})

        return self.write(effect)


class SiteUndrain(SiteResource):
    actions = {"POST": "sites:write"}

    @extend_schema(tags=["sites"], operation_id="sites_undrain", request=None, responses={200: DrainedShape})
    def post(self, request: Request, site: str) -> Response:  # noqa: ARG002
        """Back to work: every host that drains or is in maintenance."""
        row = site_of(self.actor, site)

        def effect() -> Response:
            hosts = sites.undrain_site(row, actor=self.actor, now=timezone.now())
            return Response({"object": "drain", "site": row.public_id, "hosts": len(hosts)})

        return self.write(effect)


class NodeResource(Resource):
    model_queryset = PowerNode.objects.select_related("parent", "site")
    prefix = "nod"
    order = "id"

    def represent(self, row: PowerNode) -> dict[str, Any]:
        return {
            "id": row.public_id,
            "object": "power_node",
            "site": row.site.public_id,
            "name": row.name,
            "kind": row.kind,
            "parent": row.parent.name if row.parent else None,
            "depth": row.depth,
            "cap_w": row.cap_w,
            "limit_w": row.limit_w,
            "fixed_w": row.fixed_w,
            "margin_w": row.margin_w,
            "metering": row.metering,
            "overhead_gpu_permille": row.overhead_gpu_permille,
            "overhead_miner_permille": row.overhead_miner_permille,
            "reserved_w": -(-row.reserved_mw // 1000),
            "headroom_w": (row.allowed_mw - row.reserved_mw) // 1000,
            "measured_w": row.measured_w,
            "measured_at": row.measured_at,
        }


class PowerNodes(NodeResource):
    actions = {"GET": "sites:read", "POST": "sites:write"}

    @extend_schema(
        tags=["sites"], operation_id="power_nodes_list", parameters=PAGE,
        responses={200: shapes.page_of("PowerNode", PowerNodeShape)},
    )  # fmt: skip
    def get(self, request: Request, site: str) -> Response:
        row = site_of(self.actor, site)
        return self.listing(request, self.queryset().filter(site=row))

    @extend_schema(
        tags=["sites"], operation_id="power_nodes_create", request=NewPowerNodeShape, responses={201: PowerNodeShape}
    )
    def post(self, request: Request, site: str) -> Response:  # noqa: ARG002
        """Under `parent`, by name; under the root where none is given."""
        row, body = site_of(self.actor, site), self.read(NewPowerNodeShape)
        name = body.pop("parent")
        parent = self.queryset().filter(site=row, name=name).first() if name else None
        if name and parent is None:
            raise MarketError("invalid_request", f"There is no node {name} at {row.name}.", {"/parent": "unknown"})

        def effect() -> Response:
            made = sites.add_power_node(row, parent=parent, actor=self.actor, now=timezone.now(), **body)
            return Response(self.represent(made), status=201)

        return self.write(effect)


class PowerNodeDetail(NodeResource):
    actions = {"GET": "sites:read", "PATCH": "sites:write"}

    @extend_schema(tags=["sites"], operation_id="power_nodes_show", responses={200: PowerNodeShape})
    def get(self, request: Request, node: str) -> Response:  # noqa: ARG002
        return Response(self.represent(self.row(node)))

    @extend_schema(
        tags=["sites"], operation_id="power_nodes_update", request=UpdatePowerNodeShape,
        responses={200: PowerNodeShape},
    )  # fmt: skip
    def patch(self, request: Request, node: str) -> Response:  # noqa: ARG002
        """Refused (`over_power_cap`) where what is booked there would not fit."""
        row, body = self.row(node), self.read(UpdatePowerNodeShape)

        def effect() -> Response:
            changed = sites.update_power_node(row, actor=self.actor, now=timezone.now(), **body)
            return Response(self.represent(changed))

        return self.write(effect)


class SiteImport(SiteResource):
    actions = {"POST": "sites:write"}

    @extend_schema(
        tags=["sites"], operation_id="sites_import", request=ImportShape, responses={200: ImportReportShape},
        parameters=[OpenApiParameter("dry_run", bool, description="check and count, keep nothing; errors come in the report")],
    )  # fmt: skip
    def post(self, request: Request, site: str) -> Response:
        """CSV of power nodes, hosts or miners: all or nothing. The first line names the columns (docs/imports.md)."""
        row, body = site_of(self.actor, site), self.read(ImportShape)
        query = request.query_params.dict()
        if set(query) - {"dry_run"} or query.get("dry_run", "false") not in {"true", "false"}:
            raise MarketError("invalid_request", "The one parameter is dry_run: true or false.", {"/dry_run": "?"})

        def effect() -> Response:
            report = imports.run(
                row,
                body["kind"],
                body["csv"],
                dry_run=query.get("dry_run") == "true",
                now=timezone.now(),
                actor=self.actor,
            )
            return Response({"object": "import_report", **report.as_dict()})

        return self.write(effect)


class EnrolmentTokens(SiteResource):
    actions = {"POST": "sites:write"}

    @extend_schema(
        tags=["sites"], operation_id="enrolment_tokens_create", request=None, responses={201: EnrolmentShape}
    )
    def post(self, request: Request, site: str) -> Response:  # noqa: ARG002
        """Enrols one agent within 24 hours. Shown once."""
        row = site_of(self.actor, site)

        def make() -> tuple[dict[str, Any], str]:
            made, token = sites.create_enrolment_token(row, actor=self.actor, now=timezone.now())
            body = {"object": "enrolment_token", "site": row.public_id, "expires_at": made.expires_at}
            return {**body, "url": settings.PUBLIC_URL}, token

        return show_once(self, make)


class AgentResource(Resource):
    model_queryset = Agent.objects.select_related("site")
    prefix = "agt"

    def represent(self, row: Agent) -> dict[str, Any]:
        return {
            "id": row.public_id,
            "object": "agent",
            "created_at": row.created_at,
            "site": row.site.public_id,
            "name": row.name,
            "version": row.version,
            "runtime": row.runtime,
            "last_sync_at": row.last_sync_at,
            "lease_until": row.lease_until,
            "revoked_at": row.revoked_at,
        }


class Agents(AgentResource):
    actions = {"GET": "sites:read"}

    @extend_schema(
        tags=["sites"], operation_id="agents_list", parameters=PAGE,
        responses={200: shapes.page_of("Agent", AgentShape)},
    )  # fmt: skip
    def get(self, request: Request, site: str) -> Response:
        row = site_of(self.actor, site)
        return self.listing(request, self.queryset().filter(site=row))


class AgentDetail(AgentResource):
    actions = {"GET": "sites:read", "DELETE": "sites:write"}

    @extend_schema(tags=["sites"], operation_id="agents_show", responses={200: AgentShape})
    def get(self, request: Request, agent: str) -> Response:  # noqa: ARG002
        return Response(self.represent(self.row(agent)))

    @extend_schema(tags=["sites"], operation_id="agents_revoke", responses={204: None})
    def delete(self, request: Request, agent: str) -> Response:  # noqa: ARG002
        """Its key stops working at once. What it runs ends by its lease unless another agent takes the site over."""
        row = self.row(agent)

        def effect() -> Response:
            sites.revoke_agent(row, actor=self.actor, now=timezone.now())
            return Response(status=204)

        return self.write(effect)


urlpatterns = [
    path("sites", Sites.as_view(), name="sites"),
    path("sites/<str:site>", SiteDetail.as_view(), name="site"),
    path("sites/<str:site>/mode", SiteMode.as_view(), name="site-mode"),
    path("sites/<str:site>/drain", SiteDrain.as_view(), name="site-drain"),
    path("sites/<str:site>/undrain", SiteUndrain.as_view(), name="site-undrain"),
    path("sites/<str:site>/power-nodes", PowerNodes.as_view(), name="power-nodes"),
    path("sites/<str:site>/import", SiteImport.as_view(), name="site-import"),
    path("sites/<str:site>/enrolment-tokens", EnrolmentTokens.as_view(), name="enrolment-tokens"),
    path("sites/<str:site>/agents", Agents.as_view(), name="agents"),
    path("agents/<str:agent>", AgentDetail.as_view(), name="agent"),
    path("power-nodes/<str:node>", PowerNodeDetail.as_view(), name="power-node"),
]
