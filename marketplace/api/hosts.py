"""GPU hosts of the operator's sites. They are made by import or by the agent's inventory; by hand they drain and come back."""

from typing import Any

from django.urls import path
from django.utils import timezone
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework.request import Request
from rest_framework.response import Response

from marketplace.api import reliability, shapes
from marketplace.api.base import Resource
from marketplace.api.keys import PAGE
from marketplace.api.site_shapes import DrainShape, HostShape, TaintsShape
from marketplace.models import Host
from marketplace.services import sites

ACTIONS = {"active": ["drain"], "draining": ["drain", "undrain"], "maintenance": ["undrain"], "lost": ["undrain"]}


class HostResource(Resource):
    model_queryset = Host.objects.select_related(
        "site", "power_node", "gpu_model", "listing", "reliability"
    ).prefetch_related("gpus")
    prefix = "hst"
    order = "id"
    filters = {"site": "site", "state": "state", "gpu_model": "gpu_model__name", "listing": "listing", "leaf": "leaf"}

    def represent(self, row: Host) -> dict[str, Any]:
        sick = sorted((gpu for gpu in row.gpus.all() if not gpu.healthy), key=lambda gpu: gpu.index)
        return {
            "id": row.public_id,
            "object": "host",
            "site": row.site.public_id,
            "power_node": row.power_node.name,
            "listing": row.listing.public_id if row.listing else None,
            "name": row.name,
            "state": row.state,
            "state_reason": row.state_reason,
            "leaves_at": row.leaves_at,
            "taints": row.taints,
            "gpu_model": row.gpu_model.name,
            "gpus": row.gpu_count,
            "vram_mib": row.vram_mib,
            "vcpu_milli": row.vcpu_milli,
            "ram_mib": row.ram_mib,
            "nvme_gib": row.nvme_gib,
            "leaf": row.leaf,
            "spine": row.spine,
            "nvlink_domains": row.nvlink_domains,
            "gpu_free": row.gpu_free,
            "vcpu_free_milli": row.vcpu_free,
            "ram_free_mib": row.ram_free,
            "nvme_free_gib": row.nvme_free,
            "sick_gpus": [{"index": gpu.index, "since": gpu.sick_at, "error": gpu.last_error} for gpu in sick],
            "cap_control": row.cap_control,
            "power_state": row.power_state,
            "reserved_w": row.reserved_w,
            "measured_w": row.measured_w,
            "beat_at": row.beat_at,
            "reliability_permille": reliability.score_of(row),
            "actions": [each for each in ACTIONS.get(row.state, []) if each != "undrain" or not sick],
        }

    def answer(self, host: Host) -> Response:
        return Response(self.represent(self.queryset().get(pk=host.pk)))


class Hosts(HostResource):
    actions = {"GET": "sites:read"}

    @extend_schema(
        tags=["hosts"], operation_id="hosts_list", responses={200: shapes.page_of("Host", HostShape)},
        parameters=[*PAGE, *(OpenApiParameter(name, str) for name in HostResource.filters)],
    )  # fmt: skip
    def get(self, request: Request) -> Response:
        return self.listing(request)


class HostDetail(HostResource):
    actions = {"GET": "sites:read"}

    @extend_schema(tags=["hosts"], operation_id="hosts_show", responses={200: HostShape})
    def get(self, request: Request, host: str) -> Response:  # noqa: ARG002
        return Response(self.represent(self.row(host)))


class HostDrain(HostResource):
    actions = {"POST": "sites:write"}

    @extend_schema(tags=["hosts"], operation_id="hosts_drain", request=DrainShape, responses={200: HostShape})
    def post(self, request: Request, host: str) -> Response:  # noqa: ARG002
        """Nothing new is placed here, or `by` an hour nothing that may outlast it. What runs stays until then, or leaves by `evict`."""
        row, body = self.row(host), self.read(DrainShape)
        return self.write(lambda: self.answer(sites.drain_host(row, actor=self.actor, now=timezone.now(), **body)))


class HostTaints(HostResource):
    actions = {"POST": "sites:write"}

    @extend_schema(tags=["hosts"], operation_id="hosts_set_taints", request=TaintsShape, responses={200: HostShape})
    def post(self, request: Request, host: str) -> Response:  # noqa: ARG002
        """From now on only jobs that tolerate all of these come here; those that run stay."""
        row, body = self.row(host), self.read(TaintsShape)
        return self.write(
            lambda: self.answer(sites.set_taints(row, body["taints"], actor=self.actor, now=timezone.now()))
        )


class HostUndrain(HostResource):
    actions = {"POST": "sites:write"}

    @extend_schema(tags=["hosts"], operation_id="hosts_undrain", request=None, responses={200: HostShape})
    def post(self, request: Request, host: str) -> Response:  # noqa: ARG002
        """Back to work."""
        row = self.row(host)
        return self.write(lambda: self.answer(sites.undrain_host(row, actor=self.actor, now=timezone.now())))


urlpatterns = [
    path("hosts", Hosts.as_view(), name="hosts"),
    path("hosts/<str:host>", HostDetail.as_view(), name="host"),
    path("hosts/<str:host>/drain", HostDrain.as_view(), name="host-drain"),
    path("hosts/<str:host>/taints", HostTaints.as_view(), name="host-taints"),
    path("hosts/<str:host>/undrain", HostUndrain.as_view(), name="host-undrain"),
]
