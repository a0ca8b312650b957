"""What the API answers about jobs and placements, for the OpenAPI document; `services/job_views` makes the answers."""

from drf_spectacular.utils import OpenApiExample, extend_schema_serializer
from rest_framework import serializers

from marketplace.api.base import Shape
from marketplace.api.shapes import MoneyShape, page_of
from marketplace.models import Job, Placement
from marketplace.services import job_rules

EXAMPLE = {
    "id": "job_7k2m9x4q8w3e", "object": "job", "name": "train", "contract": "ctr_5h8j2n6p4r7t", "state": "running", "reason": "",
    "replicas": 2, "gpus": 8, "gpu_milli": 1000, "vram_mib": 0, "vcpu_milli": 64000, "ram_mib": 524288, "nvme_gib": 0,
    "gpu_models": ["H100-SXM"], "topology": "leaf", "topology_required": True, "nvlink": "required", "spread_level": None,
    "max_per_domain": None, "labels": {"app": "train"}, "affinity": [{"rule": "apart", "level": "host", "labels": {"app": "db"}}],
    "tolerations": [], "site": None, "region": None, "price_limit": None, "on_replica_loss": "replace_replica",
    "min_replicas": None, "epoch": 0, "lost_ranks": [], "priority": 0, "image": "", "command": ["python", "train.py"],
    "env": {"SEED": "1"}, "attempt": 1, "restarts": 0, "movable": False, "moves": 0, "exit_code": None,
    "created_at": "2026-11-22T12:00:00Z",
    "queued_at": "2026-11-22T12:00:00Z", "started_at": "2026-11-22T12:00:21Z", "finished_at": None,
    "checkpointed_at": "2026-11-22T12:14:02Z", "reference": "run-17",
    "metadata": {}, "actions": ["cancel"],
}  # fmt: skip


class AffinityShape(Shape):
    """Every replica in one domain of `level` with a job of yours that carries all these labels (near), or with none (apart)."""

    rule = serializers.ChoiceField([job_rules.NEAR, job_rules.APART])
    level = serializers.ChoiceField(job_rules.LEVELS)
    labels = serializers.DictField(child=serializers.RegexField(job_rules.WORD))


@extend_schema_serializer(examples=[OpenApiExample("running", EXAMPLE, response_only=True)], many=False)
class JobShape(serializers.Serializer):
    id = serializers.CharField()
    object = serializers.CharField()
    name = serializers.CharField(allow_blank=True)
    contract = serializers.CharField()
    state = serializers.ChoiceField(Job.State.choices)
    reason = serializers.CharField(allow_blank=True)
    replicas = serializers.IntegerField()
    gpus = serializers.IntegerField(help_text="per replica")
    gpu_milli = serializers.IntegerField(help_text="of each GPU; below 1000 a share of one")
    vram_mib = serializers.IntegerField()
    vcpu_milli = serializers.IntegerField()
    ram_mib = serializers.IntegerField()
    nvme_gib = serializers.IntegerField()
    gpu_models = serializers.ListField(child=serializers.CharField())
    topology = serializers.ChoiceField(Job.Topology.choices)
    topology_required = serializers.BooleanField()
    nvlink = serializers.ChoiceField(Job.Nvlink.choices)
    spread_level = serializers.ChoiceField(Job.Level.choices, allow_null=True)
    max_per_domain = serializers.IntegerField(allow_null=True)
    labels = serializers.DictField(child=serializers.CharField())
    affinity = AffinityShape(many=True)
    tolerations = serializers.ListField(child=serializers.CharField())
    site = serializers.CharField(allow_null=True)
    region = serializers.CharField(allow_null=True)
    price_limit = serializers.IntegerField(allow_null=True, help_text="millionths of the major unit per GPU-hour")
    on_replica_loss = serializers.ChoiceField(Job.OnReplicaLoss.choices)
    min_replicas = serializers.IntegerField(allow_null=True)
    epoch = serializers.IntegerField(help_text="grows when replicas of the running gang change")
    lost_ranks = serializers.ListField(
        child=serializers.IntegerField(), help_text="replicas that wait to be placed again, or that it went on without"
    )
    priority = serializers.IntegerField()
    image = serializers.CharField(allow_blank=True)
    command = serializers.ListField(child=serializers.CharField())
    env = serializers.DictField(child=serializers.CharField())
    attempt = serializers.IntegerField(help_text="grows with each placement")
    restarts = serializers.IntegerField(help_text="after faults; preemptions do not count")
    movable = serializers.BooleanField(help_text="we may move it to another host")
    moves = serializers.IntegerField(help_text="to other hosts so far, to make room")
    exit_code = serializers.IntegerField(allow_null=True)
    created_at = serializers.DateTimeField()
    queued_at = serializers.DateTimeField(allow_null=True)
    started_at = serializers.DateTimeField(allow_null=True)
    finished_at = serializers.DateTimeField(allow_null=True)
    checkpointed_at = serializers.DateTimeField(
        allow_null=True, help_text="its newest checkpoint, as its replicas say (`TAILRACE_SAVED_FILE`)"
    )
    reference = serializers.CharField(allow_blank=True)
    metadata = serializers.DictField()
    actions = serializers.ListField(child=serializers.CharField(), help_text="what is legal now")


class PlacementShape(serializers.Serializer):
    id = serializers.CharField()
    object = serializers.CharField()
    job = serializers.CharField()
    contract = serializers.CharField()
    attempt = serializers.IntegerField()
    rank = serializers.IntegerField()
    site = serializers.CharField(help_text="its name")
    host = serializers.CharField(help_text="its name")
    gpus = serializers.ListField(child=serializers.IntegerField(), help_text="indices on the host")
    gpu_milli = serializers.IntegerField(help_text="of each GPU")
    state = serializers.ChoiceField(Placement.State.choices)
    reason = serializers.CharField(allow_blank=True)
    granted_at = serializers.DateTimeField(allow_null=True)
    running_at = serializers.DateTimeField(allow_null=True, help_text="billed from here")
    release_requested_at = serializers.DateTimeField(
        allow_null=True, help_text="billed to here; under spot less the notice that was missing"
    )
    finished_at = serializers.DateTimeField(allow_null=True)
    exit_code = serializers.IntegerField(allow_null=True)
    energy_wh = serializers.IntegerField(
        help_text="its part of what its host drew, by its part of the GPUs in use; without cooling"
    )
    average_w = serializers.IntegerField(allow_null=True, help_text="of that; null: not accounted for yet")


class GridCallShape(serializers.Serializer):
    id = serializers.CharField()
    object = serializers.CharField()
    starts_at = serializers.DateTimeField()
    ends_at = serializers.DateTimeField()
    emergency = serializers.BooleanField(help_text="declared by the grid")
    leaves_from = serializers.DateTimeField(help_text="the job is not asked to leave before, and perhaps not at all")


class JobDetailShape(JobShape):
    placements = PlacementShape(many=True, help_text="newest attempt first, at most 200")
    grid_calls = GridCallShape(
        many=True, help_text="announced or in force, that may take the job; empty once it is over"
    )


class RefusalShape(serializers.Serializer):
    code = serializers.CharField()
    title = serializers.CharField()
    detail = serializers.CharField()
    retry = serializers.CharField()


class BatchItemShape(serializers.Serializer):
    """One of the two."""

    job = JobShape(required=False)
    error = RefusalShape(required=False)


class BatchAnswerShape(serializers.Serializer):
    data = BatchItemShape(many=True, help_text="one for each job asked for, in order")  # type: ignore[assignment]  # lists are `data`


class StageShape(serializers.Serializer):
    stage = serializers.CharField()
    label = serializers.CharField(help_text="what the hosts left have")  # type: ignore[assignment]  # the answer's name
    hosts_left = serializers.IntegerField()


class ChangeShape(serializers.Serializer):
    kind = serializers.CharField()
    text = serializers.CharField(help_text="for people")
    fields = serializers.DictField(
        help_text="of the job, as they would have to be; `listing`: whose contract it would need"
    )  # type: ignore[assignment]  # the answer's name
    starts_at = serializers.DateTimeField(allow_null=True, help_text="null: now")
    jobs = serializers.ListField(child=serializers.CharField(), help_text="your own jobs whose end it waits for")


class TermShape(serializers.Serializer):
    name = serializers.CharField()
    milli_gpu = serializers.FloatField()
    label = serializers.CharField()  # type: ignore[assignment]  # the answer's name


class ReplicaShape(serializers.Serializer):
    rank = serializers.IntegerField()
    site = serializers.CharField()
    host = serializers.CharField()
    gpus = serializers.ListField(child=serializers.IntegerField())


class PlacedShape(serializers.Serializer):
    replicas = ReplicaShape(many=True, help_text="the first 64")
    hosts = serializers.IntegerField(required=False, help_text="of the cell")
    candidates = serializers.IntegerField(allow_null=True, help_text="hosts that could have taken a replica")
    level = serializers.CharField(required=False, help_text="smallest domain of the fabric that holds all replicas")
    domains = serializers.IntegerField(required=False, help_text="of that level, with room for all")
    score = serializers.FloatField(required=False, help_text="of the first replica's host, milli-GPU")
    second = serializers.FloatField(required=False, allow_null=True, help_text="the next best host's")
    terms = TermShape(many=True, help_text="what the score is made of")
    evicted = serializers.ListField(child=serializers.CharField(), required=False)


class CostShape(serializers.Serializer):
    object = serializers.ChoiceField(["job_cost"])
    job = serializers.CharField()
    as_of = serializers.DateTimeField()
    milli_gpu_seconds = serializers.IntegerField(help_text="billable so far")
    amount = MoneyShape(help_text="of these at the contract's rates; an invoice rounds once for all of a line")
    per_hour = MoneyShape(help_text="as it runs now")
    committed = serializers.BooleanField(help_text="these seconds lie inside a commitment, which is owed in any case")


class ExplanationShape(serializers.Serializer):
    object = serializers.CharField()
    job = serializers.CharField()
    state = serializers.ChoiceField(Job.State.choices)
    outcome = serializers.CharField()
    reason = serializers.CharField(allow_null=True)
    text = serializers.CharField(help_text="for people")
    stages = StageShape(many=True, help_text="hosts left after each stage of the fit rule")
    binding = serializers.CharField(required=False, allow_blank=True)
    suggestion = serializers.CharField(required=False, allow_blank=True)
    earliest_start = serializers.DateTimeField(required=False, allow_null=True)
    at = serializers.DateTimeField(required=False)
    changes = ChangeShape(many=True, help_text="each would make it fit: tried with the planner")
    placed = PlacedShape(allow_null=True, help_text="where it stands and why there")
    note = serializers.CharField(required=False, allow_blank=True)


# `from` is no name in Python, but it is the field's.
JobEventShape = type(
    "JobEventShape",
    (serializers.Serializer,),
    {
        "at": serializers.DateTimeField(),
        "actor": serializers.CharField(),
        "from": serializers.CharField(allow_blank=True),
        "to": serializers.CharField(),
        "reason": serializers.CharField(allow_blank=True),
    },
)


class LogShape(serializers.Serializer):
    object = serializers.CharField()
    placement = serializers.CharField(allow_null=True)
    stream = serializers.ChoiceField(["stdout", "stderr"])
    offset = serializers.IntegerField(help_text="bytes")
    next = serializers.IntegerField(help_text="where to go on")
    data = serializers.CharField(allow_blank=True)  # type: ignore[assignment]  # the field's name in the answer
    complete = serializers.BooleanField(help_text="there will be no more")


JobPage = page_of("Job", JobShape)
PlacementPage = page_of("Placement", PlacementShape)
JobEventPage = page_of("JobEvent", JobEventShape)
