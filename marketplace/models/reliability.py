"""What hosts have been like: their condition as intervals, errors of their GPUs, days counted, and the scores that come of them.

Written by services.conditions and services.reliability alone. The database itself refuses intervals of a host that overlap or
leave a gap, and any change of one but its end (migration 0025).
"""

from django.db import models
from django.db.models import F, Q

from marketplace.models.accounts import Organization
from marketplace.models.listings import Listing
from marketplace.models.sites import Host
from marketplace.tenancy import TenantModel, TenantQuerySet


class OfHostQuerySet(TenantQuerySet):
    tenant_paths = ("host__site__organization",)


class HostCondition(TenantModel):
    """A host was of one kind over [starts_at, ends_at); without an end it is so now."""

    PREFIX = "cnd"

    class Kind(models.TextChoices):
        ABLE = "able"
        DRAINING = "draining"
        MAINTENANCE = "maintenance"
        LOST = "lost"
        SILENT = "silent"
        OFF = "off"
        NOT_OFFERED = "not_offered"

    host = models.ForeignKey(Host, on_delete=models.CASCADE, related_name="conditions")
    kind = models.CharField(max_length=12, choices=Kind)
    starts_at = models.DateTimeField()
    ends_at = models.DateTimeField(null=True, blank=True)
    reason = models.CharField(
        max_length=200, blank=True, help_text="as it stood on the host then; its operator's words"
    )
    recorded_at = models.DateTimeField(help_text="when we knew; a silence begins with the last word heard")

    objects = OfHostQuerySet.as_manager()

    class Meta:
        constraints = [
            models.CheckConstraint(
                condition=Q(ends_at__isnull=True) | Q(ends_at__gte=F("starts_at")), name="condition_window"
            )
        ]
        indexes = [
            models.Index(fields=["host"], condition=Q(ends_at__isnull=True), name="condition_open"),
            models.Index(fields=["ends_at"], name="condition_ended"),
        ]

    def __str__(self) -> str:
        return f"{self.host} {self.kind} from {self.starts_at:%F %T}"


class GpuError(TenantModel):
    """An error that a device reported, as its site's agent told it: once by the event's id."""

    PREFIX = "gpe"

    host = models.ForeignKey(Host, on_delete=models.CASCADE, related_name="gpu_errors")
    event_id = models.UUIDField(unique=True)
    at = models.DateTimeField()
    received_at = models.DateTimeField()
    gpu = models.PositiveSmallIntegerField(help_text="index on the host")
    kind = models.CharField(max_length=12, help_text="xid, ecc, lost, retired")
    code = models.PositiveIntegerField(default=0, help_text="the XID, or how many")
    text = models.CharField(max_length=120, blank=True)

    objects = OfHostQuerySet.as_manager()

    class Meta:
        indexes = [models.Index(fields=["host", "-at"], name="gpu_error_of_host"), models.Index(fields=["received_at"])]

    def __str__(self) -> str:
        return f"{self.host}/{self.gpu} {self.kind} {self.code}"


class Counted(models.Model):
    """The columns of scheduler.core.reliability.Counts."""

    offered_s = models.BigIntegerField(default=0)
    able_s = models.BigIntegerField(default=0)
    silent_s = models.BigIntegerField(default=0)
    excused_s = models.BigIntegerField(default=0)
    starts = models.BigIntegerField(default=0)
    failed_starts = models.BigIntegerField(default=0)
    gpu_days = models.BigIntegerField(default=0)
    sick_gpu_days = models.BigIntegerField(default=0)
    drains = models.BigIntegerField(default=0)
    late_drains = models.BigIntegerField(default=0)

    class Meta:
        abstract = True


class HostDay(Counted):
    """One host's UTC day, counted; of today, what has passed."""

    host = models.ForeignKey(Host, on_delete=models.CASCADE, related_name="days", db_index=False)
    day = models.DateField()

    class Meta:
        constraints = [models.UniqueConstraint(fields=["host", "day"], name="host_day_once")]
        indexes = [models.Index(fields=["day"])]

    def __str__(self) -> str:
        return f"{self.host} on {self.day}"


class Reliability(Counted):
    """The last 30 days of a host, of a listing's hosts, or of an operator's: sums, and the score in thousandths."""

    host = models.OneToOneField(Host, null=True, on_delete=models.CASCADE, related_name="reliability")
    listing = models.OneToOneField(Listing, null=True, on_delete=models.CASCADE, related_name="reliability")
    organization = models.OneToOneField(Organization, null=True, on_delete=models.CASCADE, related_name="reliability")
    score_permille = models.PositiveSmallIntegerField()
    as_of = models.DateTimeField()

    class Meta:
        constraints = [
            models.CheckConstraint(
                condition=Q(host__isnull=False, listing__isnull=True, organization__isnull=True)
                | Q(host__isnull=True, listing__isnull=False, organization__isnull=True)
                | Q(host__isnull=True, listing__isnull=True, organization__isnull=False),
                name="reliability_of_one",
            )
        ]

    def __str__(self) -> str:
        return f"{self.host or self.listing or self.organization}: {self.score_permille}"
