"""Watts: readings, grants and their shedding, curtailments, price feeds, and what a site did minute by minute.

Written by services.power (grants, reservations), services.agents (raw readings) and services.feeds alone.
"""

from datetime import datetime

from django.contrib.postgres.fields import ArrayField
from django.db import models
from django.db.models import F, Q

from marketplace.models.sites import Host, Miner, PowerNode, Site, SiteOwnedQuerySet
from marketplace.tenancy import TenantModel


class MeterReading(models.Model):
    """One raw reading of a node's meter; the newest also stands on the node."""

    node = models.ForeignKey(PowerNode, on_delete=models.CASCADE, related_name="readings")
    at = models.DateTimeField()
    watts = models.BigIntegerField()

    class Meta:
        constraints = [models.UniqueConstraint(fields=["node", "at"], name="meter_reading_once")]

    def __str__(self) -> str:
        return f"{self.node} {self.watts} W"


class PowerGrant(TenantModel):
    """The watts of one host for one placement: reserved, then freed by sleeping miners, then granted.

    `delta_w` is what the host's reservation grew by when it was placed, or would have without the others who waited there: a
    record. What hosts are short of now is counted by host (`services.budgets`).
    """

    PREFIX = "grt"

    class State(models.TextChoices):
        SHEDDING = "shedding"
        GRANTED = "granted"
        RELEASED = "released"

    # References are checked for a whole statement, as those of Placement.
    placement = models.OneToOneField(
        "marketplace.Placement", on_delete=models.CASCADE, related_name="grant", db_constraint=False
    )
    host = models.ForeignKey(Host, on_delete=models.CASCADE, related_name="grants", db_index=False, db_constraint=False)
    site = models.ForeignKey(Site, on_delete=models.CASCADE, related_name="grants", db_index=False, db_constraint=False)
    delta_w = models.PositiveIntegerField()
    state = models.CharField(max_length=12, choices=State)
    created_at = models.DateTimeField()
    granted_at = models.DateTimeField(null=True, blank=True)
    released_at = models.DateTimeField(null=True, blank=True)

    objects = SiteOwnedQuerySet.as_manager()

    class Meta:
        indexes = [  # of what counts now: the past grows, and nobody asks it by host or site
            models.Index(fields=["site"], condition=models.Q(state="shedding"), name="grant_pending_by_site"),
            models.Index(fields=["host"], condition=models.Q(state="granted"), name="grant_live_by_host"),
        ]

    def __str__(self) -> str:
        return f"{self.delta_w} W on {self.host}"


class NodeResidual(models.Model):
    """What a node's meter sees and no device below admits to (scheduler.core.power_proof): the last looks, newest last."""

    node = models.OneToOneField(PowerNode, on_delete=models.CASCADE, related_name="residual", primary_key=True)
    at = models.DateTimeField(help_text="Of the newest look's meter reading")
    watts = ArrayField(models.BigIntegerField())

    def __str__(self) -> str:
        return f"{self.node} {self.watts[-1]} W"


class ShedBatch(models.Model):
    """Machines lowered by one command, and what the meters above them saw just before. Open while any of them sleeps on it."""

    site = models.ForeignKey(Site, on_delete=models.CASCADE, related_name="shed_batches")
    commanded_at = models.DateTimeField()
    before = models.JSONField(default=dict, help_text="Residual by node id, W")
    silent = ArrayField(models.CharField(max_length=24), default=list, help_text="Devices that gave no reading then")
    answered = models.JSONField(default=dict, help_text="Of those: what each drew when it first spoke again, W")
    closed_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        indexes = [models.Index(fields=["site"], condition=Q(closed_at=None), name="shed_batch_open")]

    def __str__(self) -> str:
        return f"{self.site} {self.commanded_at:%F %T}"


class ShedClaim(models.Model):
    """A miner told to draw less; the difference is freed only when its readings and the meters above it confirm the drop."""

    class State(models.TextChoices):
        COMMANDED = "commanded"
        CONFIRMED = "confirmed"
        FAILED = "failed"

    site = models.ForeignKey(Site, on_delete=models.CASCADE, related_name="shed_claims")
    miner = models.ForeignKey(Miner, on_delete=models.CASCADE, related_name="shed_claims")
    batch = models.ForeignKey(ShedBatch, null=True, on_delete=models.CASCADE, related_name="claims")
    generation = models.BigIntegerField()
    baseline_w = models.PositiveIntegerField()
    target_w = models.PositiveIntegerField(default=0)
    drew_w = models.PositiveIntegerField(
        null=True, help_text="Its own reading when it was told; null: none that was fresh"
    )
    state = models.CharField(max_length=12, choices=State, default=State.COMMANDED)
    reason = models.CharField(max_length=40, blank=True)
    attempts = models.PositiveSmallIntegerField(default=1)
    commanded_at = models.DateTimeField(help_text="Of the last attempt")
    votes = models.PositiveSmallIntegerField(default=0, help_text="Looks at the meters that agree with it")
    voted_at = models.DateTimeField(null=True, blank=True)
    settled_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["miner"], condition=Q(state="commanded"), name="shed_claim_one_open")
        ]
        indexes = [models.Index(fields=["site", "state"])]

    def __str__(self) -> str:
        return f"{self.miner} {self.state}"


class Curtailment(TenantModel):
    PREFIX = "cur"

    class State(models.TextChoices):
        ANNOUNCED = "announced"
        ACTIVE = "active"
        RESTORING = "restoring"
        COMPLETED = "completed"
        FAILED = "failed"
        CANCELLED = "cancelled"

    TRANSITIONS = {
        "announced": {"active", "cancelled"},
        "active": {"restoring"},
        "restoring": {"completed", "failed"},
        "completed": set(),
        "failed": set(),
        "cancelled": set(),
    }

    site = models.ForeignKey(Site, on_delete=models.CASCADE, related_name="curtailments")
    node = models.ForeignKey(PowerNode, on_delete=models.CASCADE, related_name="curtailments")
    source = models.CharField(max_length=24, default="operator")
    reference = models.CharField(max_length=200)
    origin = models.ForeignKey(
        "marketplace.GridSource", null=True, blank=True, on_delete=models.SET_NULL, related_name="curtailments"
    )
    cap_w = models.BigIntegerField()
    starts_at = models.DateTimeField()
    ends_at = models.DateTimeField()
    mandatory = models.BooleanField(default=True, help_text="Economic otherwise: machines sleep, no job is touched")
    emergency = models.BooleanField(default=False, help_text="The grid's own: contracts may name what then gives way")
    state = models.CharField(max_length=12, choices=State, default=State.ANNOUNCED)
    created_by = models.CharField(max_length=120)
    created_at = models.DateTimeField(auto_now_add=True)
    ended_at = models.DateTimeField(null=True, blank=True, help_text="since then its limit does not stand any more")
    settled_at = models.DateTimeField(null=True, blank=True, help_text="restored, or cancelled")

    objects = SiteOwnedQuerySet.as_manager()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["site", "source", "reference"], name="curtailment_once"),
            models.CheckConstraint(
                condition=Q(state__in=("announced", "active", "restoring", "completed", "failed", "cancelled")),
                name="curtailment_state",
            ),
            models.CheckConstraint(condition=Q(ends_at__gt=F("starts_at")), name="curtailment_window"),
        ]

    @property
    def over_at(self) -> datetime:
        """When it ends, or ended: sooner than agreed where somebody took it back."""
        return self.ends_at if self.ended_at is None else min(self.ends_at, self.ended_at)

    def __str__(self) -> str:
        return f"{self.site} to {self.cap_w} W"


class FeedValue(models.Model):
    """A value of the outside world with its time and source. Zero or stale ones are refused when read."""

    class Kind(models.TextChoices):
        DIFFICULTY = "difficulty"
        BTC_USD = "btc_usd_cents"
        BLOCK_HEIGHT = "block_height"
        FEES_SAT = "fees_sat_per_block"
        HASHPRICE = "hashprice_microusd_per_ph_day"
        ENERGY = "energy_microusd_per_mwh"
        CARBON = "carbon_g_per_mwh"

    kind = models.CharField(max_length=32, choices=Kind)
    scope = models.CharField(max_length=40, blank=True, help_text="site or price zone; empty: the world")
    value = models.DecimalField(max_digits=30, decimal_places=0)
    source = models.CharField(max_length=80)
    observed_at = models.DateTimeField()
    fetched_at = models.DateTimeField()

    class Meta:
        constraints = [models.UniqueConstraint(fields=["kind", "scope", "observed_at"], name="feed_value_once")]
        indexes = [models.Index(fields=["kind", "scope", "-observed_at"])]

    def __str__(self) -> str:
        return f"{self.kind} {self.value}"


class PowerFreeze(models.Model):
    """The platform's freeze: while one stands, no site raises power anywhere. One at a time; those that are over stay on record."""

    began_at = models.DateTimeField()
    began_by = models.CharField(max_length=120)
    reason = models.CharField(max_length=200, blank=True)
    ended_at = models.DateTimeField(null=True, blank=True)
    ended_by = models.CharField(max_length=120, blank=True)

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["ended_at"], condition=Q(ended_at=None), nulls_distinct=False, name="power_freeze_stands_once"
            )
        ]
        permissions = [("freeze_power", "Can freeze the power of every site, and let it go on")]

    def __str__(self) -> str:
        return f"{self.began_at:%F %R} UTC, by {self.began_by}"


class SiteMinute(models.Model):
    """What a site did in one minute: average watts by use, energy, and money. Source of the chart and the P&L."""

    site = models.ForeignKey(Site, on_delete=models.CASCADE, related_name="minutes")
    start = models.DateTimeField()
    firm_w = models.BigIntegerField(default=0)
    flexible_w = models.BigIntegerField(default=0)
    spot_w = models.BigIntegerField(default=0)
    idle_gpu_w = models.BigIntegerField(default=0)
    hashing_w = models.BigIntegerField(default=0)
    overhead_w = models.BigIntegerField(default=0)
    metered_w = models.BigIntegerField(null=True)
    cap_w = models.BigIntegerField()
    hashing_ghs = models.BigIntegerField(default=0)
    hashing_mwh = models.BigIntegerField(default=0, help_text="milliwatt-hours of hashing")
    ai_mwh = models.BigIntegerField(default=0, help_text="milliwatt-hours of GPU hosts")
    hashing_microusd = models.BigIntegerField(default=0)
    energy_microusd = models.BigIntegerField(default=0)
    # exact (billing.core.energy): millijoules by use, hash work in GH/s x ms; prices are those in force when the minute began
    seen_ms = models.PositiveIntegerField(default=0)
    placements_mj = models.BigIntegerField(default=0)
    idle_mj = models.BigIntegerField(default=0)
    miners_mj = models.BigIntegerField(default=0)
    cooling_hosts_mj = models.BigIntegerField(default=0)
    cooling_miners_mj = models.BigIntegerField(default=0)
    fixed_mj = models.BigIntegerField(default=0)
    site_mj = models.BigIntegerField(default=0)
    hash_work = models.BigIntegerField(default=0)
    energy_uusd_mwh = models.BigIntegerField(default=0)
    hashprice_uusd = models.BigIntegerField(null=True)
    pool_fee_ppm = models.PositiveIntegerField(default=0)
    carbon_g_mwh = models.PositiveIntegerField(null=True)

    objects = SiteOwnedQuerySet.as_manager()

    class Meta:
        constraints = [models.UniqueConstraint(fields=["site", "start"], name="site_minute_once")]

    def __str__(self) -> str:
        return f"{self.site} {self.start:%F %R}"
