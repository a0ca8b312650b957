"""The grid's side of a site: who may call it down, what became of each call, and who was told.

Written by services.grid (sources), services.curtailments (reports, notices) and services.power.held (GPUs held lower) alone.
"""

from django.contrib.postgres.fields import ArrayField
from django.db import models
from django.db.models import F, Q

from marketplace.models.accounts import Organization
from marketplace.models.contracts import Contract
from marketplace.models.power import Curtailment
from marketplace.models.sites import Host, PowerNode, Site, SiteOwnedQuerySet
from marketplace.tenancy import TenantModel, TenantQuerySet


class OfCallQuerySet(TenantQuerySet):
    tenant_paths = ("curtailment__site__organization",)


class GridSource(TenantModel):
    """A signal that makes curtailments by itself: an OpenADR 3 programme, a price, a frequency."""

    PREFIX = "grd"

    class Kind(models.TextChoices):
        OPENADR3 = "openadr3", "OpenADR 3 programme"
        PRICE = "price", "Energy price"
        FREQUENCY = "frequency", "Grid frequency"

    class Stale(models.TextChoices):
        HOLD = "hold", "Hold: calls go on as announced, nothing is woken"
        CURTAIL = "curtail", "Curtail: as if it had called"

    site = models.ForeignKey(Site, on_delete=models.CASCADE, related_name="grid_sources")
    node = models.ForeignKey(PowerNode, on_delete=models.CASCADE, related_name="grid_sources")
    kind = models.CharField(max_length=12, choices=Kind)
    name = models.CharField(max_length=60)
    enabled = models.BooleanField(default=True)
    cap_w = models.BigIntegerField(help_text="W that the node is held to where the signal names no watts")
    pays_uusd_mwh = models.BigIntegerField(default=0, help_text="Paid for each MWh not drawn, millionths of a USD")
    stale_after_s = models.PositiveIntegerField(default=600, help_text="Silent for so long, s: its policy holds")
    stale_policy = models.CharField(max_length=8, choices=Stale, default=Stale.HOLD)
    # price, millionths of a USD per MWh
    strike_uusd_mwh = models.BigIntegerField(null=True, blank=True, help_text="Curtail at this price, or over it")
    resume_uusd_mwh = models.BigIntegerField(null=True, blank=True, help_text="Come back under this one")
    urgent_uusd_mwh = models.BigIntegerField(null=True, blank=True, help_text="At this price one interval is enough")
    windows = models.PositiveSmallIntegerField(default=2, help_text="Intervals in a row before it curtails")
    resume_windows = models.PositiveSmallIntegerField(default=2, help_text="Intervals in a row before it comes back")
    zone = models.CharField(max_length=40, blank=True, help_text="Of the price feed; empty: the site's region")
    # frequency, mHz
    trip_mhz = models.PositiveIntegerField(null=True, blank=True, help_text="Under it: curtail at once")
    back_mhz = models.PositiveIntegerField(null=True, blank=True, help_text="Not under it for hold_s: come back")
    hold_s = models.PositiveIntegerField(default=600)
    # OpenADR 3
    url = models.CharField(max_length=300, blank=True)
    token_url = models.CharField(max_length=300, blank=True, help_text="Empty: URL/auth/token")
    client_id = models.CharField(max_length=120, blank=True)
    secret = models.BinaryField(null=True, blank=True)
    program = models.CharField(max_length=128, blank=True, help_text="programName; empty: all that it shows us")
    ven_name = models.CharField(max_length=128, blank=True)
    poll_s = models.PositiveIntegerField(default=10)
    # what was heard
    asked_at = models.DateTimeField(null=True, blank=True)
    heard_at = models.DateTimeField(null=True, blank=True, help_text="The newest word of it that was understood")
    reading = models.BigIntegerField(null=True, blank=True, help_text="The newest price, or mHz")
    error = models.CharField(max_length=200, blank=True)
    created_by = models.CharField(max_length=120)
    created_at = models.DateTimeField()

    objects = SiteOwnedQuerySet.as_manager()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["site", "name"], name="grid_source_name_once"),
            models.CheckConstraint(
                condition=~Q(kind="price") | Q(strike_uusd_mwh__gt=0, resume_uusd_mwh__gt=0), name="grid_source_price"
            ),
            models.CheckConstraint(
                condition=~Q(kind="frequency") | Q(trip_mhz__gt=0, back_mhz__gt=0), name="grid_source_frequency"
            ),
        ]

    def __str__(self) -> str:
        return self.name


class CurtailmentReport(models.Model):
    """What a call found and what it did. Begun with the call, finished with it: then nothing of it changes."""

    curtailment = models.OneToOneField(Curtailment, on_delete=models.CASCADE, related_name="report", primary_key=True)
    baseline_w = models.BigIntegerField(help_text="What the node drew before")
    baseline_how = models.CharField(max_length=8, help_text="meter: mean of its readings before; books: booked watts")
    before = ArrayField(models.BigIntegerField(), help_text="Machines that were awake")
    dwelling = ArrayField(
        models.BigIntegerField(), default=list, help_text="Of an economic call: machines that had just changed"
    )
    finished_at = models.DateTimeField(null=True)
    offsets_s = ArrayField(models.IntegerField(), default=list, help_text="Of the meter's readings, from the start")
    watts = ArrayField(models.BigIntegerField(), default=list)
    delivered_wh = models.BigIntegerField(default=0)
    under_after_s = models.IntegerField(null=True, help_text="Until the meter was under the cap; null: never")
    restored_s = models.IntegerField(null=True, help_text="From the end until it was as before; null: not in time")
    hashing_lost_microusd = models.BigIntegerField(default=0)
    energy_saved_microusd = models.BigIntegerField(default=0)
    paid_microusd = models.BigIntegerField(default=0, help_text="What its programme pays for what was delivered")
    misses = models.JSONField(default=list, help_text="Machines that gave nothing: miner, reason, W")
    jobs = models.JSONField(default=list, help_text="Jobs touched: job, contract, kind, what, at, held_s")
    credits = models.JSONField(default=list, help_text="By contract: why, milli_gpu_seconds, amount_minor, currency")

    objects = OfCallQuerySet.as_manager()

    def __str__(self) -> str:
        return f"{self.curtailment} {self.delivered_wh} Wh"


class HeldLower(models.Model):
    """GPUs of a host held lower for a call: from the command until the host has read its full limits back. What runs on them
    meanwhile is credited by the power withheld (billing.held_lower).
    """

    curtailment = models.ForeignKey(Curtailment, on_delete=models.PROTECT, related_name="held_lower")
    host = models.ForeignKey(Host, on_delete=models.PROTECT, related_name="held_lower")
    gpu_w = models.PositiveIntegerField(help_text="The most that each of its GPUs may draw meanwhile")
    full_w = models.PositiveIntegerField(help_text="The most that each of them may draw otherwise")
    starts_at = models.DateTimeField()
    ends_at = models.DateTimeField(null=True, blank=True)
    lifted_generation = models.BigIntegerField(
        null=True, blank=True, help_text="Of the host's limits that give the watts back; over once they are read back"
    )

    objects = OfCallQuerySet.as_manager()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["host"], condition=Q(ends_at=None), name="held_lower_once"),
            models.UniqueConstraint(fields=["host", "starts_at"], name="held_lower_one_at_a_time"),
            models.CheckConstraint(condition=Q(gpu_w__lt=F("full_w")), name="held_lower_is_lower"),
            models.CheckConstraint(condition=Q(ends_at=None) | Q(ends_at__gt=F("starts_at")), name="held_lower_window"),
        ]

    def __str__(self) -> str:
        return f"GPUs of {self.host} held to {self.gpu_w} W each"


class CurtailmentNotice(models.Model):
    """A contract's holder was told of a call, once of each thing."""

    class What(models.TextChoices):
        ANNOUNCED = "announced"
        CHANGED = "changed"
        HELD = "held"
        OVER = "over"

    curtailment = models.ForeignKey(Curtailment, on_delete=models.CASCADE, related_name="notices")
    contract = models.ForeignKey(Contract, on_delete=models.CASCADE, related_name="curtailment_notices")
    organization = models.ForeignKey(Organization, on_delete=models.CASCADE, related_name="curtailment_notices")
    what = models.CharField(max_length=10, choices=What)
    curtailed_s = models.PositiveIntegerField(default=0, help_text="Seconds that are not billed")
    credit_minor = models.BigIntegerField(
        default=0, help_text="For GPUs held lower, by the clock, in the contract's currency"
    )
    at = models.DateTimeField()

    objects = TenantQuerySet.as_manager()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["curtailment", "contract", "what"], name="curtailment_notice_once")
        ]

    def __str__(self) -> str:
        return f"{self.what} {self.curtailment}"
