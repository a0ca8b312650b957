"""A replica on a host: what the scheduler grants, what the agent runs, what is metered."""

from django.contrib.postgres.fields import ArrayField
from django.db import models
from django.db.models import F, Q

from marketplace.models.accounts import Organization
from marketplace.models.contracts import Contract
from marketplace.models.jobs import Job
from marketplace.models.sites import Cell, Host, Site
from marketplace.tenancy import TenantModel, TenantQuerySet


class PlacementQuerySet(TenantQuerySet):
    tenant_paths = ("organization", "site__organization")


class Placement(TenantModel):
    PREFIX = "plc"

    class State(models.TextChoices):
        INTENDED = "intended"
        SHEDDING = "shedding"
        GRANTED = "granted"
        STARTING = "starting"
        RUNNING = "running"
        DRAINING = "draining"
        UNREACHABLE = "unreachable"
        PARKED = "parked"
        RELEASED = "released"
        FAILED = "failed"
        LOST = "lost"

    TRANSITIONS = {
        "intended": {"shedding", "granted", "released", "failed"},
        "shedding": {"granted", "released", "failed"},
        "granted": {"starting", "running", "draining", "unreachable", "parked", "released", "failed", "lost"},
        "starting": {"running", "draining", "unreachable", "parked", "released", "failed", "lost"},
        "running": {"draining", "unreachable", "parked", "released", "failed", "lost"},
        "draining": {"unreachable", "parked", "released", "failed", "lost"},
        "unreachable": {"granted", "starting", "running", "draining", "parked", "released", "failed", "lost"},
        "parked": {"released", "failed", "lost"},
        "released": set(),
        "failed": set(),
        "lost": set(),
    }
    FINAL = ("released", "failed", "lost")
    AT_SITE = ("granted", "starting", "running", "draining", "unreachable")

    class Desired(models.TextChoices):
        RUN = "run"
        DRAIN = "drain"
        STOP = "stop"

    # What has no index of its own is led by one of those below: each costs every placement made. That the rows referred to are
    # there, triggers check for a whole statement (migration 0011): a check for each row and column is half of a commit.
    job = models.ForeignKey(
        Job, on_delete=models.PROTECT, related_name="placements", db_index=False, db_constraint=False
    )
    contract = models.ForeignKey(
        Contract, on_delete=models.PROTECT, related_name="placements", db_index=False, db_constraint=False
    )
    organization = models.ForeignKey(
        Organization, on_delete=models.PROTECT, related_name="placements", db_constraint=False
    )
    host = models.ForeignKey(
        Host, on_delete=models.PROTECT, related_name="placements", db_index=False, db_constraint=False
    )
    site = models.ForeignKey(Site, on_delete=models.PROTECT, related_name="placements", db_constraint=False)
    cell = models.ForeignKey(
        Cell, on_delete=models.PROTECT, related_name="placements", db_index=False, db_constraint=False
    )
    attempt = models.PositiveIntegerField()
    rank = models.PositiveIntegerField()
    epoch = models.PositiveIntegerField(
        default=0, db_default=0, help_text="the job's, when it was placed: a lost rank comes again in a later one"
    )
    gpu_indices = ArrayField(models.PositiveSmallIntegerField())
    gpu_milli = models.PositiveSmallIntegerField(help_text="of each GPU")
    vram_mib = models.PositiveIntegerField(help_text="of each GPU")
    vcpu_milli = models.PositiveIntegerField()
    ram_mib = models.PositiveIntegerField()
    nvme_gib = models.PositiveIntegerField(default=0)
    watts_delta = models.PositiveIntegerField(default=0, help_text="what the plan reserved")
    state = models.CharField(max_length=12, choices=State, default=State.INTENDED)
    desired = models.CharField(max_length=8, choices=Desired, default=Desired.RUN)
    generation = models.BigIntegerField(default=1, help_text="of the desired state")
    reason = models.CharField(max_length=200, blank=True)
    created_at = models.DateTimeField()
    granted_at = models.DateTimeField(null=True, blank=True)
    running_at = models.DateTimeField(null=True, blank=True, help_text="running confirmed: billing starts")
    release_requested_at = models.DateTimeField(null=True, blank=True, help_text="billing stops")
    finished_at = models.DateTimeField(null=True, blank=True)
    exit_code = models.IntegerField(null=True, blank=True)
    metered_through = models.DateTimeField(
        null=True, blank=True, help_text="usage is recorded up to here (billing.usage)"
    )

    objects = PlacementQuerySet.as_manager()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["job", "attempt", "rank", "epoch"], name="placement_once"),
            models.CheckConstraint(
                condition=Q(
                    state__in=(
                        "intended",
                        "shedding",
                        "granted",
                        "starting",
                        "running",
                        "draining",
                        "unreachable",
                        "parked",
                        "released",
                        "failed",
                        "lost",
                    )
                ),
                name="placement_state",
            ),
        ]
        indexes = [
            models.Index(
                fields=["site"], condition=~Q(state__in=("released", "failed", "lost")), name="placement_live_by_site"
            ),
            models.Index(
                fields=["host"], condition=~Q(state__in=("released", "failed", "lost")), name="placement_live_by_host"
            ),
            models.Index(
                fields=["cell"], condition=~Q(state__in=("released", "failed", "lost")), name="placement_live_by_cell"
            ),
            models.Index(fields=["cell"], condition=Q(state="draining"), name="placement_draining"),
            models.Index(fields=["contract", "running_at"], name="placement_of_contract"),
            models.Index(fields=["finished_at"], condition=Q(finished_at__isnull=False), name="placement_ended"),
            models.Index(  # what billing.usage.due asks for, in its words
                fields=["organization"],
                condition=Q(running_at__isnull=False)
                & (
                    Q(finished_at__isnull=True) | Q(metered_through__isnull=True) | ~Q(metered_through=F("finished_at"))
                ),
                name="placement_unmetered",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.public_id} on {self.host}"

    @property
    def milli_gpus(self) -> int:
        return len(self.gpu_indices) * self.gpu_milli


class PlacementEvent(models.Model):
    """Append-only; the timeline that is billed."""

    placement = models.ForeignKey(Placement, on_delete=models.CASCADE, related_name="events", db_constraint=False)
    at = models.DateTimeField()
    actor = models.CharField(max_length=120)
    from_state = models.CharField(max_length=12, blank=True)
    to_state = models.CharField(max_length=12)
    reason = models.CharField(max_length=200, blank=True)

    class Meta:
        ordering = ["id"]
        # Whom a call of the grid took work from (services.sheds, services.commitments) is asked by its words.
        indexes = [models.Index(fields=["reason"], condition=Q(to_state="draining"), name="drained_why")]

    def __str__(self) -> str:
        return f"{self.from_state} -> {self.to_state}"


class LogChunk(models.Model):
    """A piece of a placement's output; `offset` and `size` in bytes of UTF-8."""

    placement = models.ForeignKey(Placement, on_delete=models.CASCADE, related_name="log_chunks")
    stream = models.CharField(max_length=8)
    offset = models.BigIntegerField()
    size = models.PositiveIntegerField()
    data = models.TextField()
    received_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["placement", "stream", "offset"], name="log_chunk_once")]

    def __str__(self) -> str:
        return f"{self.placement} {self.stream}@{self.offset}"
