"""What a site's energy became: by device and hour, by kind and hour, and what pools and grids paid. Written by services.site_minutes,
services.profit, services.receipts and services.pool_payouts alone.
"""

from django.contrib.postgres.fields import ArrayField
from django.db import models
from django.db.models import F, Q

from marketplace.models.sites import Site, SiteOwnedQuerySet
from marketplace.tenancy import TenantModel


class DeviceHour(models.Model):
    """Millijoules by device in one hour; sums over the rows of an hour are those of its minutes. `ms`: of placements, for how long each
    was accounted for; empty in hours from before it was kept.
    """

    class Of(models.TextChoices):
        PLACEMENT = "placement"
        HOST = "host"  # while none of its GPUs is in use
        MINER = "miner"

    site = models.ForeignKey(Site, on_delete=models.CASCADE, related_name="device_hours", db_index=False)
    start = models.DateTimeField()
    of = models.CharField(max_length=12, choices=Of)
    ids = ArrayField(models.BigIntegerField(), default=list)
    mj = ArrayField(models.BigIntegerField(), default=list)
    ms = ArrayField(models.IntegerField(), default=list)

    objects = SiteOwnedQuerySet.as_manager()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["site", "start", "of"], name="device_hour_once"),
            models.CheckConstraint(condition=Q(of__in=("placement", "host", "miner")), name="device_hour_of"),
        ]

    def __str__(self) -> str:
        return f"{self.site} {self.start:%F %R} {self.of}"


class ProfitHour(TenantModel):
    """What one kind of use earned and cost at a site in one hour: a projection of minutes, placements and receipts, made anew at
    any time (`services.profit.rebuild`). Micro-USD; `foreign`: AI revenue in other currencies, millionths of their major unit.
    """

    PREFIX = "pnl"

    class Kind(models.TextChoices):
        AI = "ai"
        HASHING = "hashing"
        DEMAND_RESPONSE = "demand_response"
        ENERGY = "energy"

    site = models.ForeignKey(Site, on_delete=models.CASCADE, related_name="profit_hours", db_index=False)
    start = models.DateTimeField()
    kind = models.CharField(max_length=16, choices=Kind)
    revenue_microusd = models.BigIntegerField()
    paid_microusd = models.BigIntegerField(null=True, help_text="received; empty while nobody has said")
    foreign = models.JSONField(default=dict)
    energy_mj = models.BigIntegerField()
    energy_microusd = models.BigIntegerField()
    carbon_mg = models.BigIntegerField(null=True)
    seen_ms = models.PositiveIntegerField(help_text="of the hour, accounted for")

    objects = SiteOwnedQuerySet.as_manager()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["site", "start", "kind"], name="profit_hour_once"),
            models.CheckConstraint(
                condition=Q(kind__in=("ai", "hashing", "demand_response", "energy")), name="profit_hour_kind"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.site} {self.start:%F %R} {self.kind}"


class Receipt(TenantModel):
    """What a pool paid for hashing, or the grid for demand response, in `[start, end)`. Once by site, source and reference; immutable."""

    PREFIX = "rcp"

    class Kind(models.TextChoices):
        HASHING = "hashing"
        DEMAND_RESPONSE = "demand_response"

    site = models.ForeignKey(Site, on_delete=models.PROTECT, related_name="receipts", db_index=False)
    kind = models.CharField(max_length=16, choices=Kind)
    source = models.CharField(max_length=40, help_text="the pool, or who runs the programme")
    reference = models.CharField(max_length=80)
    start = models.DateTimeField()
    end = models.DateTimeField()
    amount_microusd = models.BigIntegerField()
    amount_sat = models.BigIntegerField(null=True, blank=True, help_text="as the pool paid it")
    created_by = models.CharField(max_length=120)
    created_at = models.DateTimeField()

    objects = SiteOwnedQuerySet.as_manager()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["site", "source", "reference"], name="receipt_once"),
            models.CheckConstraint(condition=Q(kind__in=("hashing", "demand_response")), name="receipt_kind"),
            models.CheckConstraint(condition=Q(end__gt=F("start"), amount_microusd__gte=0), name="receipt_whole"),
        ]
        indexes = [models.Index(fields=["site", "start"], name="receipt_of_site")]

    def __str__(self) -> str:
        return f"{self.source} {self.reference}"


class PoolFeed(TenantModel):
    """Where a pool says what it paid; its payouts become receipts, once by the feed's name and the pool's own id of each."""

    PREFIX = "plf"

    site = models.ForeignKey(Site, on_delete=models.CASCADE, related_name="pool_feeds", db_index=False)
    name = models.CharField(max_length=40, help_text="The pool: the source of its receipts. It cannot be changed")
    url = models.CharField(max_length=300)
    secret = models.BinaryField(null=True, blank=True)
    enabled = models.BooleanField(default=True)
    poll_s = models.PositiveIntegerField(default=3600)
    stale_after_s = models.PositiveIntegerField(default=172_800, help_text="Nothing newer paid for so long, s: overdue")
    # what was heard
    asked_at = models.DateTimeField(null=True, blank=True)
    heard_at = models.DateTimeField(null=True, blank=True, help_text="The newest answer that was understood whole")
    paid_until = models.DateTimeField(null=True, blank=True, help_text="The end of the newest time that was paid for")
    error = models.CharField(max_length=400, blank=True)
    told_at = models.DateTimeField(
        null=True, blank=True, help_text="Its operator has a mail of the trouble that it is in"
    )
    created_by = models.CharField(max_length=120)
    created_at = models.DateTimeField()

    objects = SiteOwnedQuerySet.as_manager()

    class Meta:
        constraints = [models.UniqueConstraint(fields=["site", "name"], name="pool_feed_name_once")]

    def __str__(self) -> str:
        return self.name
