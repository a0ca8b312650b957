"""Jobs: submit (one or a batch), list, show, explain, events, logs, cancel."""

import re
from collections.abc import Sequence
from typing import Any

from django.http import Http404
from django.urls import path
from django.utils import timezone
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from billing import costs
from marketplace import ids
from marketplace.api import shapes
from marketplace.api.base import PublicId, Resource, Shape
from marketplace.api.errors import translate
from marketplace.api.job_shapes import (
    AffinityShape,
    BatchAnswerShape,
    CostShape,
    ExplanationShape,
    JobDetailShape,
    JobEventPage,
    JobPage,
    JobShape,
    LogShape,
    PlacementPage,
)
from marketplace.errors import MarketError
from marketplace.models import Job, Placement
from marketplace.services import calls_ahead, job_rules, job_views, jobs, placement_energy
from scheduler import why

MAX_BATCH = 100


def _holds_nul(value: Any) -> bool:
    """Whether a NUL stands anywhere in a JSON value: PostgreSQL keeps none."""
    if isinstance(value, str):
        return "\x00" in value
    if isinstance(value, dict):
        return any(_holds_nul(part) for pair in value.items() for part in pair)
    return isinstance(value, list) and any(_holds_nul(part) for part in value)


class JobRequest(Shape):
    contract = PublicId("ctr")
    name = serializers.CharField(max_length=120, required=False, default="")
    image = serializers.CharField(max_length=300, required=False, default="", allow_blank=True)
    command = serializers.ListField(child=serializers.CharField(max_length=100_000), min_length=1, max_length=256)
    env = serializers.DictField(
        child=serializers.CharField(max_length=32_768, allow_blank=True), required=False, default=dict
    )
    secrets = serializers.DictField(
        child=serializers.CharField(max_length=32_768), required=False, default=dict, write_only=True
    )
    replicas = serializers.IntegerField(min_value=1, max_value=4096, required=False, default=1)
    gpus = serializers.IntegerField(min_value=0, max_value=16, required=False, default=1, help_text="per replica")
    gpu_milli = serializers.IntegerField(
        min_value=1, max_value=1000, required=False, default=1000, help_text="of each GPU; below 1000 a share of one"
    )
    vram_mib = serializers.IntegerField(
        min_value=0, max_value=100_000_000, required=False, default=0, help_text="per GPU; 0: the device's, by share"
    )
    vcpu_milli = serializers.IntegerField(min_value=0, max_value=10_000_000, required=False, default=1000)
    ram_mib = serializers.IntegerField(min_value=0, max_value=100_000_000, required=False, default=1024)
    nvme_gib = serializers.IntegerField(min_value=0, max_value=100_000_000, required=False, default=0)
    gpu_models = serializers.ListField(child=serializers.CharField(max_length=40), required=False, default=list)
    topology = serializers.ChoiceField(Job.Topology.choices, required=False, default="pack")
    topology_required = serializers.BooleanField(
        required=False, default=False, help_text="wait until it is possible; otherwise it is a preference"
    )
    nvlink = serializers.ChoiceField(
        Job.Nvlink.choices, required=False, default="any", help_text="the GPUs of a replica inside one NVLink domain"
    )
    spread_level = serializers.ChoiceField(
        Job.Level.choices, required=False, default="", allow_blank=True, allow_null=True,
        help_text="failure domains that replicas are spread over; with topology spread: host when left out",
    )  # fmt: skip
    max_per_domain = serializers.IntegerField(
        min_value=1, max_value=4096, required=False, allow_null=True, default=None,
        help_text="replicas in one failure domain, always kept; a required spread has 1 when left out",
    )  # fmt: skip
    labels = serializers.DictField(child=serializers.RegexField(job_rules.WORD), required=False, default=dict)
    affinity = AffinityShape(many=True, required=False, default=list)
    tolerations = serializers.ListField(
        child=serializers.RegexField(job_rules.TAINT), required=False, default=list, max_length=32,
        help_text="taints of hosts that the job may go to all the same",
    )  # fmt: skip
    site = PublicId("sit", required=False, allow_null=True, default=None)
    region = serializers.CharField(max_length=40, required=False, default="", allow_blank=True)
    price_limit = serializers.IntegerField(
        min_value=0, max_value=10**15, required=False, allow_null=True, default=None,
        help_text="millionths of the major unit per GPU-hour: it waits while the price is above",
    )  # fmt: skip
    priority = serializers.IntegerField(min_value=-100, max_value=100, required=False, default=0)
    on_replica_loss = serializers.ChoiceField(Job.OnReplicaLoss.choices, required=False, default="restart_gang")
    min_replicas = serializers.IntegerField(
        min_value=1, max_value=4096, required=False, allow_null=True, default=None, help_text="for shrink"
    )
    max_restarts = serializers.IntegerField(min_value=0, max_value=100, required=False, default=3)
    checkpoint_grace_s = serializers.IntegerField(min_value=0, max_value=3600, required=False, default=30)
    movable = serializers.BooleanField(
        required=False, default=False,
        help_text="we may move it to another host so that a larger job fits: it gets its checkpoint signal and its grace, stops, and"
        " queues again. Not billed meanwhile, no restart. For spot work with a grace that holds without it",
    )  # fmt: skip
    max_seconds = serializers.IntegerField(min_value=1, max_value=10**9, required=False, allow_null=True, default=None)
    reference = serializers.CharField(max_length=80, required=False, default="", allow_blank=True)
    metadata = serializers.DictField(required=False, default=dict)

    def validate(self, data: dict[str, Any]) -> dict[str, Any]:
        for name in ("env", "metadata"):
            if _holds_nul(data[name]):
                raise serializers.ValidationError({name: "NUL characters are not kept: leave them out"})
        for at, rules in (("labels", [data["labels"]]), ("affinity", [rule["labels"] for rule in data["affinity"]])):
            if any(not re.match(job_rules.WORD, name) for labels in rules for name in labels):
                raise serializers.ValidationError({at: "a label's name is letters, digits, and _ . / - between them"})
            if any(len(labels) > job_rules.MAX_LABELS for labels in rules) or len(rules) > job_rules.MAX_RULES:
                raise serializers.ValidationError(
                    {at: f"at most {job_rules.MAX_LABELS} labels, {job_rules.MAX_RULES} rules"}
                )
        if any(not rule["labels"] for rule in data["affinity"]):
            raise serializers.ValidationError({"affinity": "name at least one label"})
        data["labels"] = job_rules.pairs(data["labels"])
        data["affinity"] = [{**rule, "labels": job_rules.pairs(rule["labels"])} for rule in data["affinity"]]
        data["site_id"] = data.pop("site")
        data["spread_level"] = data["spread_level"] or ""
        if data["gpu_milli"] < 1000 and data["gpus"] != 1:
            raise serializers.ValidationError(
                {"gpu_milli": "a share is of one GPU: set gpus to 1, or gpu_milli to 1000"}
            )
        return data


class BatchRequest(Shape):
    jobs = serializers.ListField(child=serializers.DictField(), min_length=1, max_length=MAX_BATCH)


class JobResource(Resource):
    model_queryset = Job.objects.select_related("contract")
    prefix = "job"
    order = "-id"
    filters = {"state": "state", "contract": "contract", "reference": "reference"}

    def represent(self, row: Job) -> dict[str, Any]:
        return job_views.shown(row)


class Jobs(JobResource):
    actions = {"GET": "jobs:read", "POST": "jobs:write"}

    @extend_schema(
        tags=["jobs"], operation_id="jobs_list", responses={200: JobPage},
        parameters=[OpenApiParameter(n, str) for n in ("state", "contract", "reference", "limit", "cursor")],
    )  # fmt: skip
    def get(self, request: Request) -> Response:
        return self.listing(request)

    @extend_schema(tags=["jobs"], operation_id="jobs_submit", request=JobRequest, responses={201: JobShape})
    def post(self, request: Request) -> Response:  # noqa: ARG002
        spec = JobRequest.checked(self.request.data)
        contract = spec.pop("contract")

        def effect() -> Response:
            return Response(self.represent(jobs.submit(self.actor, contract, spec, now=timezone.now())), status=201)

        return self.write(effect)


class JobBatch(JobResource):
    actions = {"POST": "jobs:write"}

    @extend_schema(
        tags=["jobs"], operation_id="jobs_submit_batch", request=BatchRequest, responses={200: BatchAnswerShape}
    )
    def post(self, request: Request) -> Response:  # noqa: ARG002
        """Up to 100 jobs; each item answers for itself, in order. A refused item does not hold up the others."""
        wanted = self.read(BatchRequest)["jobs"]
        now = timezone.now()

        def effect() -> Response:
            return Response({"data": self._submit(wanted, now)})

        return self.write(effect)

    def _submit(self, wanted: list[dict[str, Any]], now: Any) -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = [{} for _ in wanted]
        good: list[tuple[int, int, dict[str, Any]]] = []  # place, contract, job
        for i, body in enumerate(wanted):
            try:
                spec = JobRequest.checked(body)
                good.append((i, spec.pop("contract"), spec))
            except serializers.ValidationError as error:
                answers[i] = {"error": _short(error)}
        try:
            made = jobs.submit_many(self.actor, [(c, s) for _, c, s in good], now=now)
            for (i, _, _), job in zip(good, made, strict=True):
                answers[i] = {"job": self.represent(job)}
        except MarketError:  # one of them is refused: find out which, one by one
            for i, contract, spec in good:
                try:
                    answers[i] = {"job": self.represent(jobs.submit(self.actor, contract, spec, now=now))}
                except MarketError as error:
                    answers[i] = {"error": _short(error)}
        return answers


def _short(error: Exception) -> dict[str, Any]:
    known = translate(error)
    assert known is not None
    return {"code": known.code, "title": known.kind.title, "detail": known.detail, "retry": known.kind.retry}


class JobDetail(JobResource):
    actions = {"GET": "jobs:read"}

    @extend_schema(tags=["jobs"], operation_id="jobs_show", responses={200: JobDetailShape})
    def get(self, request: Request, job: str) -> Response:  # noqa: ARG002
        row = self.row(job)
        calls = (
            [] if row.state in Job.FINAL else calls_ahead.ahead([row.contract], timezone.now()).get(row.contract_id, [])
        )
        return Response(
            {
                **self.represent(row),
                "placements": job_views.placements(row),
                "grid_calls": [calls_ahead.shown(each) for each in calls],
            }
        )


class JobCancel(JobResource):
    actions = {"POST": "jobs:write"}

    @extend_schema(tags=["jobs"], operation_id="jobs_cancel", request=None, responses={200: JobShape})
    def post(self, request: Request, job: str) -> Response:  # noqa: ARG002
        row = self.row(job)
        return self.write(lambda: Response(self.represent(jobs.cancel(self.actor, row, now=timezone.now()))))


class JobExplain(JobResource):
    actions = {"GET": "jobs:read"}

    @extend_schema(tags=["jobs"], operation_id="jobs_explain", responses={200: ExplanationShape})
    def get(self, request: Request, job: str) -> Response:  # noqa: ARG002
        """Why the job waits, or why it stands where it does: hosts left after each stage of the fit rule, what binds, the
        earliest start that is promised, and changes that would make it fit. Each change has been tried with the planner on
        the cell as the last cycle left it.
        """
        return Response(why.explain(self.row(job), staff=self.actor.is_staff))


class JobCost(JobResource):
    actions = {"GET": "jobs:read"}

    @extend_schema(tags=["jobs"], operation_id="jobs_cost", responses={200: CostShape})
    def get(self, request: Request, job: str) -> Response:  # noqa: ARG002
        """What it has used up to now, from the timeline that is billed, and what it costs an hour as it runs now."""
        row, now = self.row(job), timezone.now()
        found = costs.of_job(row, now=now)
        return Response(
            {
                "object": "job_cost",
                "job": row.public_id,
                "as_of": now,
                "milli_gpu_seconds": found.used,
                "amount": shapes.amount(found.minor, found.currency),
                "per_hour": shapes.amount(found.hourly, found.currency),
                "committed": found.committed,
            }
        )


class JobEvents(JobResource):
    actions = {"GET": "jobs:read"}

    @extend_schema(
        tags=["jobs"], operation_id="jobs_events", responses={200: JobEventPage},
        parameters=[OpenApiParameter(n, str) for n in ("limit", "cursor")],
    )  # fmt: skip
    def get(self, request: Request, job: str) -> Response:
        """What became of it, oldest first."""
        row = self.row(job)
        query = shapes.query(request, shapes.PageQuery)
        return Response(shapes.page(job_views.event, row.events.all(), query, order="id"))


class JobLogs(JobResource):
    actions = {"GET": "jobs:read"}

    @extend_schema(
        tags=["jobs"], operation_id="jobs_logs", responses={200: LogShape},
        parameters=[OpenApiParameter("placement", str), OpenApiParameter("stream", str), OpenApiParameter("offset", int)],
    )  # fmt: skip
    def get(self, request: Request, job: str) -> Response:
        """Output of one replica from a byte offset; without `placement`, of rank 0 of the newest attempt."""
        row = self.row(job)
        query = request.query_params
        offset = query.get("offset", "0")
        if not offset.isdecimal():
            raise MarketError(
                "invalid_request", f"offset is {offset}; it must be a number of bytes.", {"/offset": "not a number"}
            )
        placement = _placement(row, query.get("placement"))
        if query.get("stream", "stdout") not in {"stdout", "stderr"}:
            raise MarketError("invalid_request", "stream is stdout or stderr.", {"/stream": "stdout or stderr"})
        return Response(job_views.logs(placement, query.get("stream", "stdout"), int(offset)))


class Placements(Resource):
    """All placements of the organization's jobs, or at its sites: where each replica ran, and when it was billed."""

    actions = {"GET": "jobs:read"}
    model_queryset = Placement.objects.select_related("host", "site")
    prefix = "plc"
    order = "id"
    filters = {"job": "job", "contract": "contract", "state": "state", "site": "site"}

    def represent(self, row: Placement) -> dict[str, Any]:
        return job_views.placement(row, self.drew[row.pk])

    def look(self, rows: Sequence[Placement]) -> None:
        self.drew = placement_energy.of_placements(rows, now=timezone.now())

    @extend_schema(
        tags=["jobs"], operation_id="placements_list", responses={200: PlacementPage},
        parameters=[OpenApiParameter(n, str) for n in ("job", "contract", "state", "site", "limit", "cursor")],
    )  # fmt: skip
    def get(self, request: Request) -> Response:
        return self.listing(request)


def _placement(job: Job, public_id: str | None) -> Placement | None:
    rows = job.placements.order_by("-attempt", "rank")
    if public_id is None:
        return rows.first()
    found = rows.filter(pk=ids.decode("plc", public_id) or 0).first()
    if found is None:
        raise Http404
    return found


urlpatterns = [
    path("jobs", Jobs.as_view(), name="jobs"),
    path("jobs/batch", JobBatch.as_view(), name="job-batch"),
    path("jobs/<str:job>", JobDetail.as_view(), name="job"),
    path("jobs/<str:job>/cancel", JobCancel.as_view(), name="job-cancel"),
    path("jobs/<str:job>/explain", JobExplain.as_view(), name="job-explain"),
    path("jobs/<str:job>/cost", JobCost.as_view(), name="job-cost"),
    path("jobs/<str:job>/events", JobEvents.as_view(), name="job-events"),
    path("jobs/<str:job>/logs", JobLogs.as_view(), name="job-logs"),
    path("placements", Placements.as_view(), name="placements"),
]
