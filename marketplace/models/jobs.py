"""What shall run: jobs and their events. States and their legal moves are data; services.jobs is their only writer."""

from django.contrib.postgres.fields import ArrayField
from django.db import models
from django.db.models import Q

from marketplace.models.accounts import Organization
from marketplace.models.contracts import Contract
from marketplace.models.sites import Cell, Site
from marketplace.tenancy import TenantModel, TenantQuerySet


class JobQuerySet(TenantQuerySet):
    tenant_paths = ("organization",)


class Job(TenantModel):
    PREFIX = "job"

    class State(models.TextChoices):
        DRAFT = "draft"
        QUEUED = "queued"
        PLACED = "placed"
        RUNNING = "running"
        PREEMPTING = "preempting"
        REQUEUED = "requeued"
        SUCCEEDED = "succeeded"
        FAILED = "failed"
        CANCELLED = "cancelled"

    TRANSITIONS = {
        "draft": {"queued", "cancelled"},
        "queued": {"placed", "cancelled", "failed"},
        "placed": {"running", "preempting", "requeued", "succeeded", "failed", "cancelled"},
        "running": {"preempting", "requeued", "succeeded", "failed", "cancelled"},
        "preempting": {"requeued", "succeeded", "failed", "cancelled"},
        "requeued": {"placed", "cancelled", "failed"},
        "succeeded": set(),
        "failed": set(),
        "cancelled": set(),
    }
    FINAL = ("succeeded", "failed", "cancelled")
    WAITING = ("queued", "requeued")
    ON_HOSTS = ("placed", "running", "preempting")

    class OnReplicaLoss(models.TextChoices):
        """When a replica is lost by no fault of its own: all start again; that one is placed again; the rest goes on without."""

        RESTART_GANG = "restart_gang"
        REPLACE_REPLICA = "replace_replica"
        SHRINK = "shrink"

    class Nvlink(models.TextChoices):
        ANY = "any"
        PREFERRED = "preferred"
        REQUIRED = "required"

    class Level(models.TextChoices):
        """Failure domains; a gang never leaves its site."""

        HOST = "host"
        LEAF = "leaf"
        SPINE = "spine"

    class Topology(models.TextChoices):
        PACK = "pack"
        SPREAD = "spread"
        HOST = "host"
        LEAF = "leaf"
        SPINE = "spine"
        SITE = "site"

    # What has no index of its own is led by one of those below.
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="jobs", db_index=False)
    contract = models.ForeignKey(Contract, on_delete=models.PROTECT, related_name="jobs", db_index=False)
    cell = models.ForeignKey(Cell, on_delete=models.PROTECT, related_name="jobs", db_index=False)
    name = models.CharField(max_length=120, blank=True)
    state = models.CharField(max_length=12, choices=State, default=State.QUEUED)
    state_reason = models.CharField(max_length=300, blank=True)
    generation = models.BigIntegerField(default=1)
    # what runs
    image = models.CharField(max_length=300, blank=True)
    command = ArrayField(models.TextField())
    env = models.JSONField(default=dict, blank=True)
    secrets = models.BinaryField(null=True, blank=True, editable=False, help_text="encrypted; never shown")
    checkpoint_grace_s = models.PositiveIntegerField(default=30)
    movable = models.BooleanField(
        default=False, help_text="its owner lets us move it to another host; spot work with a grace may be moved anyhow"
    )
    max_seconds = models.PositiveIntegerField(null=True, blank=True)
    # per replica
    replicas = models.PositiveIntegerField(default=1)
    min_replicas = models.PositiveIntegerField(null=True, blank=True)
    gpus = models.PositiveSmallIntegerField(default=1)
    gpu_milli = models.PositiveSmallIntegerField(default=1000, help_text="of each GPU; under 1000 is a share")
    vram_mib = models.PositiveIntegerField(default=0, help_text="per GPU; 0: the same share of the device's")
    vcpu_milli = models.PositiveIntegerField(default=1000)
    ram_mib = models.PositiveIntegerField(default=1024)
    nvme_gib = models.PositiveIntegerField(default=0)
    gpu_models = ArrayField(models.CharField(max_length=40), default=list, blank=True)
    topology = models.CharField(max_length=8, choices=Topology, default=Topology.PACK)
    topology_required = models.BooleanField(default=False)
    nvlink = models.CharField(
        max_length=9, choices=Nvlink, default=Nvlink.ANY, help_text="the GPUs of a replica in one NVLink domain"
    )
    spread_level = models.CharField(max_length=5, choices=Level, blank=True, help_text="failure domains to spread over")
    max_per_domain = models.PositiveIntegerField(null=True, blank=True, help_text="replicas in one failure domain")
    site = models.ForeignKey(
        Site, null=True, blank=True, on_delete=models.PROTECT, related_name="+", db_index=False
    )  # nobody looks for jobs by it, and sites stay
    region = models.CharField(max_length=40, blank=True)
    price_limit = models.BigIntegerField(null=True, blank=True, help_text="millionths of the major unit per GPU-hour")
    labels = ArrayField(models.CharField(max_length=130), default=list, blank=True, help_text="name=value")
    affinity = models.JSONField(default=list, blank=True, help_text="[{rule: near|apart, level, labels: [name=value]}]")
    tolerations = ArrayField(models.CharField(max_length=80), default=list, blank=True, help_text="taints of hosts")
    ruled = models.BooleanField(
        default=False, editable=False, help_text="has any of the rules above: the scheduler reads them"
    )
    priority = models.SmallIntegerField(default=0)
    on_replica_loss = models.CharField(max_length=20, choices=OnReplicaLoss, default=OnReplicaLoss.RESTART_GANG)
    max_restarts = models.PositiveSmallIntegerField(default=3)
    # life
    attempt = models.PositiveIntegerField(default=0, help_text="grows with each placement")
    restarts = models.PositiveIntegerField(default=0, help_text="after faults; preemptions do not count")
    moves = models.PositiveIntegerField(
        default=0, help_text="to other hosts, to make room; they do not count as restarts"
    )
    epoch = models.PositiveIntegerField(default=0, help_text="grows when replicas of a running gang change")
    lost_ranks = ArrayField(
        models.PositiveIntegerField(),
        default=list,
        blank=True,
        help_text="gone: to be placed again, or for good (shrink)",
    )
    repair_since = models.DateTimeField(null=True, blank=True, help_text="lost ranks wait to be placed again")
    cancel_requested_at = models.DateTimeField(null=True, blank=True)
    checkpointed_at = models.DateTimeField(
        null=True,
        blank=True,
        help_text="its newest checkpoint, by its own word: work since then is lost with its place",
    )
    created_at = models.DateTimeField()
    queued_at = models.DateTimeField(null=True, blank=True)
    started_at = models.DateTimeField(null=True, blank=True)
    finished_at = models.DateTimeField(null=True, blank=True)
    exit_code = models.IntegerField(null=True, blank=True)
    reference = models.CharField(max_length=80, blank=True)
    metadata = models.JSONField(default=dict, blank=True)

    objects = JobQuerySet.as_manager()

    class Meta:
        constraints = [
            models.CheckConstraint(
                condition=Q(
                    state__in=(
                        "draft",
                        "queued",
                        "placed",
                        "running",
                        "preempting",
                        "requeued",
                        "succeeded",
                        "failed",
                        "cancelled",
                    )
                ),
                name="job_state",
            ),
            models.CheckConstraint(condition=Q(gpu_milli__gte=1, gpu_milli__lte=1000), name="job_gpu_milli"),
            models.CheckConstraint(condition=Q(gpu_milli=1000) | Q(gpus=1), name="job_share_of_one_gpu"),
            models.CheckConstraint(condition=Q(replicas__gte=1), name="job_replicas"),
            models.CheckConstraint(
                condition=Q(min_replicas__isnull=True) | Q(min_replicas__gte=1, min_replicas__lte=models.F("replicas")),
                name="job_min_replicas",
            ),
        ]
        indexes = [
            models.Index(
                fields=["cell", "queued_at"], condition=Q(state__in=("queued", "requeued")), name="job_waiting"
            ),
            models.Index(fields=["cell", "-id"], name="job_of_cell"),
            models.Index(fields=["cell"], condition=Q(repair_since__isnull=False), name="job_repair"),
            models.Index(fields=["cell"], condition=Q(state="preempting"), name="job_preempting"),
            models.Index(fields=["organization", "-id"], name="job_of_organization"),
            models.Index(fields=["contract", "state"], name="job_of_contract"),
        ]

    def __str__(self) -> str:
        return self.name or self.public_id

    @property
    def total_gpus(self) -> int:
        return self.replicas * self.gpus


class JobEvent(models.Model):
    """Append-only: who, when, why, before, after."""

    job = models.ForeignKey(Job, on_delete=models.CASCADE, related_name="events", db_constraint=False)  # as Placement's
    at = models.DateTimeField()
    actor = models.CharField(max_length=120)
    from_state = models.CharField(max_length=12, blank=True)
    to_state = models.CharField(max_length=12)
    reason = models.CharField(max_length=300, blank=True)

    class Meta:
        ordering = ["id"]

    def __str__(self) -> str:
        return f"{self.from_state} -> {self.to_state}"
