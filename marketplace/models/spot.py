"""Spot: the price of each listing in each interval, what every contract got there, and who was told to leave."""

from datetime import datetime, timedelta

from django.contrib.postgres.fields import ArrayField
from django.db import models
from django.db.models import Q

from marketplace.models.contracts import Contract
from marketplace.models.jobs import Job
from marketplace.models.listings import Listing
from marketplace.models.sites import Cell, GpuModel
from marketplace.tenancy import Actor, TenantModel, TenantQuerySet
from scheduler.core.auction import INTERVAL_S, Loss

INTERVAL = timedelta(seconds=INTERVAL_S)


class SpotIntervalQuerySet(TenantQuerySet):
    tenant_paths = ("listing__organization",)

    def public_to(self, actor: Actor) -> Q:
        """Who may see a listing may see its prices."""
        return Q(listing__in=Listing.objects.filter(Listing.objects.all().public_to(actor)).values("pk"))


class SpotInterval(TenantModel):
    """What a GPU-hour on spot costs at a listing in [start, start + 5 minutes). Never changed once written.

    `carried`: no auction took place in time; the price before it goes on. GPUs in thousandths, prices in millionths of the major
    unit per GPU-hour.
    """

    PREFIX = "spi"

    listing = models.ForeignKey(Listing, on_delete=models.PROTECT, related_name="spot_intervals", db_index=False)
    cell = models.ForeignKey(Cell, on_delete=models.PROTECT, related_name="+", db_index=False)
    gpu_model = models.ForeignKey(GpuModel, null=True, on_delete=models.PROTECT, related_name="+", db_index=False)
    start = models.DateTimeField()
    price = models.BigIntegerField()
    floor = models.BigIntegerField(help_text="the listing's own or that of its watts, whichever is higher")
    currency = models.CharField(max_length=3)
    supply_milli = models.BigIntegerField()
    demand_milli = models.BigIntegerField()
    sold_milli = models.BigIntegerField()
    carried = models.BooleanField(default=False)
    closed_at = models.DateTimeField()

    objects = SpotIntervalQuerySet.as_manager()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["listing", "start"], name="spot_interval_once"),
            models.CheckConstraint(condition=Q(price__gte=models.F("floor")) | Q(carried=True), name="spot_over_floor"),
            models.CheckConstraint(condition=Q(sold_milli__lte=models.F("supply_milli")), name="spot_not_oversold"),
        ]
        indexes = [models.Index(fields=["cell", "gpu_model", "-start", "-id"], name="spot_history")]

    def __str__(self) -> str:
        return f"{self.listing_id} {self.start:%F %R} {self.price}"

    @property
    def end(self) -> datetime:
        return self.start + INTERVAL


class SpotResultQuerySet(TenantQuerySet):
    tenant_paths = ("contract__organization", "contract__operator")


class SpotResult(TenantModel):
    """What a contract with demand got in an interval, and what it pays there: the interval's price, but never over its limit."""

    PREFIX = "spr"

    class Outcome(models.TextChoices):
        WON = "won"
        PART = "part"
        LOST = "lost"

    interval = models.ForeignKey(SpotInterval, on_delete=models.CASCADE, related_name="results")
    contract = models.ForeignKey(Contract, on_delete=models.PROTECT, related_name="spot_results", db_index=False)
    start = models.DateTimeField(help_text="of the interval")
    limit_price = models.BigIntegerField()
    price = models.BigIntegerField()
    wanted_milli = models.BigIntegerField()
    won_milli = models.BigIntegerField()
    outcome = models.CharField(max_length=4, choices=Outcome)
    reason = models.CharField(max_length=16, blank=True, choices=[(r.value, r.value) for r in Loss])
    lost_jobs = ArrayField(models.BigIntegerField(), default=list, help_text="jobs that may not run in it")

    objects = SpotResultQuerySet.as_manager()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["contract", "start"], name="spot_result_once"),
            models.CheckConstraint(condition=Q(price__lte=models.F("limit_price")), name="spot_within_limit"),
            models.CheckConstraint(condition=Q(won_milli__lte=models.F("wanted_milli")), name="spot_won_wanted"),
        ]

    def __str__(self) -> str:
        return f"{self.contract_id} {self.start:%F %R} {self.outcome}"


class SpotNotice(models.Model):
    """A running job was told that it leaves at `leaves_at`. Once for a job and interval."""

    interval = models.ForeignKey(SpotInterval, on_delete=models.CASCADE, related_name="notices")
    job = models.ForeignKey(Job, on_delete=models.CASCADE, related_name="spot_notices", db_index=False)
    told_at = models.DateTimeField()
    leaves_at = models.DateTimeField()

    class Meta:
        constraints = [models.UniqueConstraint(fields=["job", "interval"], name="spot_notice_once")]

    def __str__(self) -> str:
        return f"{self.job_id} leaves at {self.leaves_at:%F %T}"
