"""What was used, and at which price. Seconds are whole UTC seconds since 1970; quantities of GPU time milli-GPU-seconds."""

from django.db import models
from django.db.models import F, Q
from django.db.models.functions import Now

from marketplace.models import Contract, Organization, Placement
from marketplace.tenancy import TenantModel, TenantQuerySet


class Meter(models.IntegerChoices):
    GPU = 1, "gpu_milli_seconds"
    ENERGY = 2, "energy_wh"
    STORAGE = 3, "storage_mib_seconds"
    EGRESS = 4, "egress_bytes"


class PriceVersion(models.Model):
    """A price from an instant on, in millionths of the major unit per GPU-hour. Immutable; a change is a new row.

    `added`: of the GPUs alone that joined a commitment at that instant.
    """

    class Kind(models.TextChoices):
        RATE = "rate"
        OVERAGE = "overage"
        ADDED = "added"

    contract = models.ForeignKey(Contract, on_delete=models.PROTECT, related_name="price_versions", db_index=False)
    kind = models.CharField(max_length=8, choices=Kind, default=Kind.RATE)
    valid_from_s = models.BigIntegerField()
    millionths = models.BigIntegerField()
    created_at = models.DateTimeField()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["contract", "kind", "valid_from_s"], name="price_version_once"),
            models.CheckConstraint(condition=Q(millionths__gte=0), name="price_not_negative"),
        ]

    def __str__(self) -> str:
        return f"{self.contract_id} {self.kind} {self.millionths}"


class UsageQuerySet(TenantQuerySet):
    tenant_paths = ("organization", "contract__operator")


class UsageRecord(TenantModel):
    """Append-only: `quantity` in `[start_s, end_s)`. A correction is the same interval with the next revision.

    `previous` is the quantity of the revision before, so that the sum of `quantity - previous` over all rows is what
    counts, without looking for the highest revision. No two rows of one placement, meter and revision overlap
    (exclusion constraint, migration 0002).
    """

    PREFIX = "usg"

    # That the rows referred to are there, and stay, a trigger checks for a whole statement (migration 0005).
    organization = models.ForeignKey(
        Organization, on_delete=models.PROTECT, related_name="+", db_index=False, db_constraint=False
    )
    contract = models.ForeignKey(
        Contract, on_delete=models.PROTECT, related_name="usage", db_index=False, db_constraint=False
    )
    placement = models.ForeignKey(
        Placement, on_delete=models.PROTECT, related_name="usage", db_index=False, db_constraint=False
    )
    price_version = models.ForeignKey(
        PriceVersion, on_delete=models.PROTECT, related_name="+", db_index=False, db_constraint=False
    )
    meter = models.PositiveSmallIntegerField(choices=Meter, default=Meter.GPU)
    revision = models.PositiveSmallIntegerField(default=0)
    start_s = models.BigIntegerField()
    end_s = models.BigIntegerField()
    rate = models.BigIntegerField(help_text="quantity per second")
    quantity = models.BigIntegerField()
    previous = models.BigIntegerField(default=0)
    source = models.CharField(max_length=24)
    event_id = models.CharField(max_length=80)
    payload_digest = models.CharField(max_length=64)
    received_at = models.DateTimeField(db_default=Now())

    objects = UsageQuerySet.as_manager()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["source", "event_id"], name="usage_event_once"),
            models.CheckConstraint(condition=Q(end_s__gt=F("start_s")), name="usage_interval"),
            models.CheckConstraint(
                condition=Q(rate__gt=0, quantity__gte=0, previous__gte=0), name="usage_not_negative"
            ),
        ]
        indexes = [models.Index(fields=["organization", "start_s"], name="usage_of_organization")]

    def __str__(self) -> str:
        return f"{self.placement_id} [{self.start_s}, {self.end_s}) r{self.revision}"


class UsageQuarantine(models.Model):
    """Usage that names a placement we do not know, or that contradicts itself: kept, counted, looked at."""

    source = models.CharField(max_length=24)
    event_id = models.CharField(max_length=80)
    payload = models.JSONField()
    payload_digest = models.CharField(max_length=64)
    reason = models.CharField(max_length=200)
    received_at = models.DateTimeField(db_default=Now())
    settled_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["source", "event_id", "payload_digest"], name="quarantine_once")]

    def __str__(self) -> str:
        return f"{self.source}/{self.event_id}: {self.reason}"
