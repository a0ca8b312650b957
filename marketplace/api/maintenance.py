"""Maintenance: drafted and announced by operators, read by whoever it touches."""

from datetime import datetime
from typing import Any

from django.urls import path
from django.utils import timezone
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from marketplace.api import shapes
from marketplace.api.base import PublicId, Resource, Shape
from marketplace.api.keys import PAGE
from marketplace.errors import MarketError
from marketplace.models import Host, Maintenance, MaintenanceNotice, PowerNode, Site
from marketplace.services import maintenance
from marketplace.services.maintenance import Impact


class ChangeShape(Shape):
    """What may be changed until it takes hosts; afterwards `text`, `impact` and `category`."""

    category = serializers.ChoiceField(Maintenance.Category.choices, required=False)
    starts_at = serializers.DateTimeField(required=False, help_text="UTC, to the minute")
    ends_at = serializers.DateTimeField(required=False)
    text = serializers.CharField(max_length=500, required=False, help_text="what is done; customers read it")
    impact = serializers.CharField(
        max_length=500, required=False, allow_blank=True, help_text="what customers will likely notice"
    )
    emergency = serializers.BooleanField(required=False, help_text="without due notice; what it takes is not charged")
    emergency_reason = serializers.CharField(max_length=500, required=False, allow_blank=True)
    cap_w = serializers.IntegerField(
        min_value=0,
        required=False,
        allow_null=True,
        help_text="work on power of a site or node: what it may draw meanwhile, W",
    )


class DraftMaintenanceShape(ChangeShape):
    site = PublicId("sit")
    scope = serializers.ChoiceField(Maintenance.Scope.choices)
    node = PublicId("nod", required=False, allow_null=True, default=None, help_text="with scope node")
    domain = serializers.CharField(
        max_length=40, required=False, allow_blank=True, default="", help_text="with scope domain: a leaf (rack)"
    )
    hosts = serializers.ListField(
        child=PublicId("hst"), required=False, default=list, max_length=1000, help_text="with scope hosts"
    )
    starts_at = serializers.DateTimeField(help_text="UTC, to the minute")
    ends_at = serializers.DateTimeField()
    text = serializers.CharField(max_length=500, help_text="what is done; customers read it")


class ExtendShape(Shape):
    ends_at = serializers.DateTimeField(help_text="later than now announced; to the minute")
    reason = serializers.CharField(
        max_length=500, required=False, allow_blank=True, default="",
        help_text="where the added time comes without a week's notice; customers read it",
    )  # fmt: skip


class TouchedShape(serializers.Serializer):
    contract = serializers.CharField()
    what = serializers.ChoiceField(MaintenanceNotice.What.choices)
    gpus = serializers.IntegerField(help_text="of it that stand there")
    short_gpus = serializers.IntegerField(help_text="for which no others stand in, at most at once")
    told_at = serializers.DateTimeField()


class MaintenanceShape(shapes.WorkShape):
    created_at = serializers.DateTimeField()
    site = serializers.DictField()
    scope = serializers.ChoiceField(Maintenance.Scope.choices)
    node = serializers.CharField(allow_null=True, help_text="its operator's alone, as domain and cap_w")
    domain = serializers.CharField(allow_null=True)
    cap_w = serializers.IntegerField(allow_null=True)
    jobs_leave_at = serializers.DateTimeField(
        help_text="jobs there are asked to leave then, earlier where their grace is longer"
    )
    emergency = serializers.BooleanField()
    emergency_reason = serializers.CharField()
    noticed_until = serializers.DateTimeField(
        allow_null=True, help_text="the window had due notice up to here; what it takes beyond is not charged"
    )
    version = serializers.IntegerField()
    announced_at = serializers.DateTimeField(allow_null=True)
    started_at = serializers.DateTimeField(allow_null=True)
    settled_at = serializers.DateTimeField(allow_null=True)
    contracts = TouchedShape(many=True, help_text="its operator sees all, a customer the organization's own")
    actions = serializers.ListField(child=serializers.CharField())


class ImpactContractShape(serializers.Serializer):
    contract = serializers.CharField()
    kind = serializers.CharField()
    gpus = serializers.IntegerField()
    kept_gpus = serializers.IntegerField(help_text="others stand in")
    short_gpus = serializers.IntegerField()
    jobs = serializers.IntegerField(help_text="that run there now and may run then")


class ImpactShape(serializers.Serializer):
    object = serializers.CharField()
    maintenance = serializers.CharField()
    text = serializers.CharField()
    hosts = serializers.IntegerField()
    gpus = serializers.IntegerField()
    short_gpus = serializers.IntegerField(help_text="of all firm contracts together, at the worst instant")
    short_from = serializers.DateTimeField(allow_null=True)
    short_until = serializers.DateTimeField(allow_null=True)
    firm_contracts = serializers.IntegerField()
    earliest_with_notice = serializers.DateTimeField(
        help_text="announced now, it may begin then where firm contracts are touched"
    )
    contracts = ImpactContractShape(many=True)


class MaintenanceResource(Resource):
    model_queryset = Maintenance.objects.select_related("site", "node").prefetch_related("notices__contract")
    prefix = "mnt"
    filters = {"site": "site", "state": "state", "category": "category"}

    def represent(self, row: Maintenance) -> dict[str, Any]:
        mine = self.actor.is_staff or self.actor.organization_id == row.site.organization_id
        notices = sorted(row.notices.all(), key=lambda n: (n.contract_id, n.version))
        last = {n.contract_id: n for n in notices if mine or n.organization_id == self.actor.organization_id}
        return {
            **shapes.maintenance(row),
            "created_at": row.created_at,
            "site": {"id": row.site.public_id, "name": row.site.name},
            "scope": row.scope,
            "node": row.node.public_id if mine and row.node else None,
            "domain": row.domain or None if mine else None,
            "cap_w": row.cap_w if mine else None,
            "jobs_leave_at": row.away_at,
            "emergency": row.emergency,
            "emergency_reason": row.emergency_reason,
            "noticed_until": row.noticed_until,
            "version": row.version,
            "announced_at": row.announced_at,
            "started_at": row.started_at,
            "settled_at": row.settled_at,
            "contracts": [
                {
                    "contract": n.contract.public_id,
                    "what": n.what,
                    "gpus": n.gpus,
                    "short_gpus": n.short_gpus,
                    "told_at": n.at,
                }
                for n in last.values()
            ],
            "actions": maintenance.actions(row, self.actor),
        }

    def answer(self, row: Maintenance, status: int = 200) -> Response:
        fresh = self.queryset().get(pk=row.pk)
        return Response(self.represent(fresh), status=status, headers={"ETag": f'"{fresh.version}"'})


class Maintenances(MaintenanceResource):
    actions = {"GET": "maintenance:read", "POST": "maintenance:write"}

    @extend_schema(
        tags=["maintenance"], operation_id="maintenances_list",
        responses={200: shapes.page_of("Maintenance", MaintenanceShape)},
        parameters=[*PAGE, *(OpenApiParameter(name, str) for name in MaintenanceResource.filters)],
    )  # fmt: skip
    def get(self, request: Request) -> Response:
        """Of one's own sites, drafts too; and what touches, or touched, one's contracts."""
        return self.listing(request)

    @extend_schema(
        tags=["maintenance"], operation_id="maintenances_draft", request=DraftMaintenanceShape,
        responses={201: MaintenanceShape},
    )  # fmt: skip
    def post(self, request: Request) -> Response:  # noqa: ARG002
        """A draft at one of your sites: look at its impact, then announce it."""
        body = self.read(DraftMaintenanceShape)
        mine = self.actor.organization_id
        site = Site.objects.owned_by(mine).filter(pk=body.pop("site")).first()
        if site is None:
            raise MarketError("not_found", "site: there is none of that id.", {"/site": "unknown"})
        named, wanted = body.pop("node"), set(body.pop("hosts"))
        node = PowerNode.objects.owned_by(mine).filter(pk=named).first() if named else None
        hosts = list(Host.objects.owned_by(mine).filter(pk__in=wanted))
        if (named and node is None) or len(hosts) < len(wanted):
            raise MarketError(
                "not_found", "A node or host of that id is not yours.", {"/node" if named else "/hosts": "unknown"}
            )

        def effect() -> Response:
            row = maintenance.draft(self.actor, site, node=node, hosts=hosts, now=timezone.now(), **body)
            return self.answer(row, 201)

        return self.write(effect)


class MaintenanceDetail(MaintenanceResource):
    actions = {"GET": "maintenance:read", "PATCH": "maintenance:write"}

    @extend_schema(tags=["maintenance"], operation_id="maintenances_show", responses={200: MaintenanceShape})
    def get(self, request: Request, work: str) -> Response:  # noqa: ARG002
        return self.answer(self.row(work))

    @extend_schema(
        tags=["maintenance"], operation_id="maintenances_change", request=ChangeShape, responses={200: MaintenanceShape},
        parameters=[OpenApiParameter("If-Match", str, OpenApiParameter.HEADER, description="the ETag that was read")],
    )  # fmt: skip
    def patch(self, request: Request, work: str) -> Response:
        """Once announced, whoever it touches is told again; a window that is not inside the announced one needs its notice anew."""
        row, body = self.row(work), self.read(ChangeShape)
        match = request.headers.get("If-Match", "").strip('W/"')
        expected = int(match) if match.isdecimal() else None

        def effect() -> Response:
            changed = maintenance.change(self.actor, row, now=timezone.now(), expected_version=expected, **body)
            return self.answer(changed)

        return self.write(effect)


class MaintenanceImpact(MaintenanceResource):
    actions = {"GET": "maintenance:write"}

    @extend_schema(tags=["maintenance"], operation_id="maintenances_impact", responses={200: ImpactShape})
    def get(self, request: Request, work: str) -> Response:  # noqa: ARG002
        """A dry run: which contracts it touches, how many GPUs others stand in for, and how many are short from when to when."""
        row, now = self.row(work), timezone.now()
        return Response(_impact(row, maintenance.dry_run(self.actor, row, now=now), now))


def _impact(row: Maintenance, found: Impact, now: datetime) -> dict[str, Any]:
    return {
        "object": "maintenance_impact",
        "maintenance": row.public_id,
        "text": found.sentence,
        "hosts": found.hosts,
        "gpus": found.gpus,
        "short_gpus": found.short,
        "short_from": found.short_from,
        "short_until": found.short_until,
        "firm_contracts": len(found.firm),
        "earliest_with_notice": now + maintenance.NOTICE_DUE,
        "contracts": [
            {
                "contract": each.contract.public_id,
                "kind": each.contract.kind,
                "gpus": each.gpus,
                "kept_gpus": each.kept,
                "short_gpus": each.short,
                "jobs": each.jobs,
            }
            for each in found.touched
        ],
    }


class Step(MaintenanceResource):
    """Announce, finish or cancel."""

    actions = {"POST": "maintenance:write"}

    def step(self, public_id: str, call: Any, **more: Any) -> Response:
        row = self.row(public_id)
        return self.write(lambda: self.answer(call(self.actor, row, now=timezone.now(), **more)))


class MaintenanceAnnounce(Step):
    @extend_schema(
        tags=["maintenance"], operation_id="maintenances_announce", request=None, responses={200: MaintenanceShape}
    )
    def post(self, request: Request, work: str) -> Response:  # noqa: ARG002
        """From now on nothing is sold over it, whoever is touched is told, and its hosts are emptied by themselves.

        Refused (`notice_too_short`) where it touches firm contracts in less than a week and is no emergency.
        """
        return self.step(work, maintenance.announce)


class MaintenanceExtend(Step):
    @extend_schema(
        tags=["maintenance"], operation_id="maintenances_extend", request=ExtendShape, responses={200: MaintenanceShape}
    )
    def post(self, request: Request, work: str) -> Response:  # noqa: ARG002
        """A later end; whoever is touched is told."""
        self.row(work)  # a stranger learns nothing, not even what is asked for
        return self.step(work, maintenance.extend, **self.read(ExtendShape))


class MaintenanceFinish(Step):
    @extend_schema(
        tags=["maintenance"], operation_id="maintenances_finish", request=None, responses={200: MaintenanceShape}
    )
    def post(self, request: Request, work: str) -> Response:  # noqa: ARG002
        """Over before its end: what it took is back at work now."""
        return self.step(work, maintenance.finish)


class MaintenanceCancel(Step):
    @extend_schema(
        tags=["maintenance"], operation_id="maintenances_cancel", request=None, responses={200: MaintenanceShape}
    )
    def post(self, request: Request, work: str) -> Response:  # noqa: ARG002
        """It does not happen; whoever was told is told so."""
        return self.step(work, maintenance.cancel)


urlpatterns = [
    path("maintenances", Maintenances.as_view(), name="maintenances"),
    path("maintenances/<str:work>", MaintenanceDetail.as_view(), name="maintenance"),
    path("maintenances/<str:work>/impact", MaintenanceImpact.as_view(), name="maintenance-impact"),
    path("maintenances/<str:work>/announce", MaintenanceAnnounce.as_view(), name="maintenance-announce"),
    path("maintenances/<str:work>/extend", MaintenanceExtend.as_view(), name="maintenance-extend"),
    path("maintenances/<str:work>/finish", MaintenanceFinish.as_view(), name="maintenance-finish"),
    path("maintenances/<str:work>/cancel", MaintenanceCancel.as_view(), name="maintenance-cancel"),
]
