"""What the scheduler did and why: cycles and decisions."""

from django.contrib.postgres.fields import ArrayField
from django.db import models

from marketplace import ids
from marketplace.models import Cell, Job, Organization
from marketplace.tenancy import TenantModel, TenantQuerySet


class Cycle(TenantModel):
    """One run of snapshot -> plan -> commit for a cell, with its counts and timings (microseconds)."""

    PREFIX = "cyc"

    cell = models.ForeignKey(Cell, on_delete=models.CASCADE, related_name="cycles")
    generation = models.BigIntegerField()
    started_at = models.DateTimeField()
    jobs_considered = models.PositiveIntegerField(default=0)
    jobs_placed = models.PositiveIntegerField(default=0)
    placements = models.PositiveIntegerField(default=0)
    preempted = models.PositiveIntegerField(default=0)
    conflicts = models.PositiveIntegerField(
        default=0, help_text="planned, but refused at commit because the rows had moved"
    )
    promises_broken = models.PositiveIntegerField(
        default=0, help_text="jobs whose promised start could not be kept: they have a later one, or none"
    )
    reasons = models.BinaryField(null=True, help_text="why the placed stand where they do (`scheduler.reasons`)")
    snapshot_us = models.PositiveIntegerField(default=0)
    plan_us = models.PositiveIntegerField(default=0)
    commit_us = models.PositiveIntegerField(default=0)

    def __str__(self) -> str:
        return f"{self.cell} #{self.generation}"


class CycleRecord(models.Model):
    """All that a cycle planned with and what came out, packed (`scheduler.record`): for replay and for explanations."""

    cycle = models.OneToOneField(Cycle, primary_key=True, on_delete=models.CASCADE, related_name="record")
    cell = models.ForeignKey(Cell, on_delete=models.CASCADE, related_name="+")
    at = models.DateTimeField()
    base = models.ForeignKey(
        "self",
        null=True,
        on_delete=models.PROTECT,
        related_name="deltas",
        help_text="the record that this one differs from",
    )
    code = models.CharField(max_length=80, help_text="of the core that planned it")
    body = models.BinaryField()
    size = models.PositiveIntegerField(help_text="bytes")
    pack_us = models.PositiveIntegerField(default=0)

    class Meta:
        indexes = [models.Index(fields=["cell", "-cycle"], condition=models.Q(base=None), name="record_alone")]

    def __str__(self) -> str:
        return f"record of {self.cycle_id}"


class DecisionQuerySet(TenantQuerySet):
    tenant_paths = ("job__organization",)


class Decision(models.Model):
    """The last decision on a job: where and why there, or what binds. One row a job, replaced by each cycle that looks at it."""

    job = models.OneToOneField(Job, primary_key=True, on_delete=models.CASCADE, related_name="decision")
    cycle = models.ForeignKey(Cycle, null=True, on_delete=models.SET_NULL, related_name="decisions")
    at = models.DateTimeField()
    outcome = models.CharField(max_length=12)  # placed | waiting | never
    reason = models.CharField(max_length=40, help_text="name of scheduler.core.fit.Reason")
    stages = ArrayField(models.CharField(max_length=40), default=list, help_text="stage names, in order")
    candidates = ArrayField(models.IntegerField(), default=list, help_text="hosts left after each stage")
    binding = models.CharField(max_length=200, blank=True)
    suggestion = models.CharField(max_length=300, blank=True)
    earliest_start = models.DateTimeField(null=True)
    held_hosts = ArrayField(
        models.BigIntegerField(),
        null=True,
        help_text="the host held for each replica from the earliest start on: then it is a promise, and kept",
    )

    objects = DecisionQuerySet.as_manager()

    class Meta:
        indexes = [
            models.Index(fields=["job"], condition=models.Q(held_hosts__isnull=False), name="decision_promised"),
        ]

    def __str__(self) -> str:
        return f"{ids.encode('job', self.job_id)}: {self.outcome}, {self.reason}"


class FairUsage(models.Model):
    """What an organization held lately over all cells, decayed (`scheduler.usage`), as it stood at `as_of`."""

    organization = models.OneToOneField(
        Organization, primary_key=True, on_delete=models.CASCADE, related_name="fair_usage"
    )
    milli = models.FloatField(help_text="milli-GPU, exponentially weighted mean")
    as_of = models.DateTimeField()

    def __str__(self) -> str:
        return f"{self.organization_id}: {self.milli:.0f} milli-GPU"
