"""Scheduled work at a site: what is announced, which hosts it takes and gives back, who was told, and what it cost whom."""

from datetime import datetime, timedelta

from django.db import models
from django.db.models import F, Q

from marketplace.models.accounts import Organization
from marketplace.models.contracts import Contract
from marketplace.models.sites import Host, PowerNode, Site
from marketplace.tenancy import Actor, TenantModel, TenantQuerySet

LEAD = timedelta(minutes=15)  # before the start its hosts are asked to leave; earlier where a job's grace is longer


class MaintenanceQuerySet(TenantQuerySet):
    tenant_paths = ("site__organization",)

    def public_to(self, actor: Actor) -> Q | None:
        """Whoever was told of it sees it."""
        if actor.organization_id is None:
            return None
        told = MaintenanceNotice.objects.all().owned_by(actor.organization_id)
        return ~Q(state="draft") & Q(pk__in=told.values("maintenance"))


class Maintenance(TenantModel):
    """Work in the window [starts_at, ends_at), UTC, to the minute. Once announced, its hosts are a claim on the market's capacity."""

    PREFIX = "mnt"

    class State(models.TextChoices):
        DRAFT = "draft"
        ANNOUNCED = "announced"
        IN_PROGRESS = "in_progress"
        COMPLETED = "completed"
        CANCELLED = "cancelled"

    TRANSITIONS = {
        "draft": {"announced", "cancelled"},
        "announced": {"in_progress", "cancelled"},
        "in_progress": {"completed"},
        "completed": set(),
        "cancelled": set(),
    }
    LIVE = (State.ANNOUNCED, State.IN_PROGRESS)

    class Scope(models.TextChoices):
        SITE = "site"
        NODE = "node"
        DOMAIN = "domain"
        HOSTS = "hosts"

    class Category(models.TextChoices):
        OTHER = "other"
        HARDWARE = "hardware"
        NETWORK = "network"
        POWER = "power"
        COOLING = "cooling"
        SOFTWARE = "software"

    site = models.ForeignKey(Site, on_delete=models.PROTECT, related_name="maintenances")
    scope = models.CharField(max_length=8, choices=Scope)
    node = models.ForeignKey(
        PowerNode, null=True, blank=True, on_delete=models.PROTECT, help_text="scope node: all hosts under it"
    )
    domain = models.CharField(max_length=40, blank=True, help_text="scope domain: all hosts of this leaf (rack)")
    category = models.CharField(max_length=12, choices=Category, default=Category.OTHER)
    starts_at = models.DateTimeField()
    ends_at = models.DateTimeField()
    text = models.CharField(max_length=500, help_text="what is done; customers read it")
    impact = models.CharField(max_length=500, blank=True, help_text="what customers will likely notice")
    emergency = models.BooleanField(default=False, help_text="announced without due notice: owes credit, and counts")
    emergency_reason = models.CharField(max_length=500, blank=True, help_text="customers read it")
    cap_w = models.BigIntegerField(
        null=True, blank=True, help_text="work on power: what the node (or site) may draw in the window, W"
    )
    state = models.CharField(max_length=12, choices=State, default=State.DRAFT)
    version = models.PositiveIntegerField(default=1, help_text="grows with every change")
    noticed_until = models.DateTimeField(
        null=True, blank=True, help_text="the window had due notice up to here; empty: none of it"
    )
    created_by = models.CharField(max_length=120)
    created_at = models.DateTimeField()
    announced_at = models.DateTimeField(null=True, blank=True)
    started_at = models.DateTimeField(null=True, blank=True)
    settled_at = models.DateTimeField(null=True, blank=True, help_text="completed or cancelled")

    objects = MaintenanceQuerySet.as_manager()

    class Meta:
        constraints = [
            models.CheckConstraint(
                condition=Q(state__in=("draft", "announced", "in_progress", "completed", "cancelled")),
                name="maintenance_state",
            ),
            models.CheckConstraint(condition=Q(ends_at__gt=F("starts_at")), name="maintenance_window"),
            models.CheckConstraint(
                condition=Q(scope="node", node__isnull=False) | (~Q(scope="node") & Q(node__isnull=True)),
                name="maintenance_names_its_node",
            ),
            models.CheckConstraint(
                condition=Q(emergency=False) | ~Q(emergency_reason=""), name="maintenance_emergency_has_a_reason"
            ),
        ]
        indexes = [
            models.Index(fields=["site", "-starts_at", "-id"]),
            models.Index(
                fields=["starts_at"], condition=Q(state__in=("announced", "in_progress")), name="maintenance_live"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.public_id} {self.starts_at:%F %R}"

    @property
    def away_at(self) -> datetime:
        """From then on its hosts are claimed."""
        return self.starts_at - LEAD


class MaintenanceHost(models.Model):
    """A host that it takes. From `taken_at` to `given_back_at` it is out of work for this."""

    maintenance = models.ForeignKey(Maintenance, on_delete=models.CASCADE, related_name="hosts")
    host = models.ForeignKey(Host, on_delete=models.CASCADE, related_name="maintenance_rows")
    taken_at = models.DateTimeField(null=True, blank=True)
    given_back_at = models.DateTimeField(null=True, blank=True)
    comes_back = models.BooleanField(
        default=False, help_text="it worked when it was taken, and nobody else keeps it out"
    )

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["maintenance", "host"], name="maintenance_host_once"),
            models.CheckConstraint(
                condition=Q(given_back_at__isnull=True) | Q(taken_at__isnull=False), name="maintenance_taken_first"
            ),
        ]
        indexes = [models.Index(fields=["host"], condition=Q(given_back_at__isnull=True), name="maintenance_host_open")]

    def __str__(self) -> str:
        return f"{self.host} in {self.maintenance_id}"


class MaintenanceNotice(models.Model):
    """Append-only: a customer was told of this version of it, about one contract."""

    class What(models.TextChoices):
        ANNOUNCED = "announced"
        CHANGED = "changed"
        CANCELLED = "cancelled"
        FINISHED = "finished"

    maintenance = models.ForeignKey(Maintenance, on_delete=models.CASCADE, related_name="notices")
    contract = models.ForeignKey(Contract, on_delete=models.CASCADE, related_name="maintenance_notices")
    organization = models.ForeignKey(Organization, on_delete=models.CASCADE, related_name="+")
    version = models.PositiveIntegerField()
    what = models.CharField(max_length=10, choices=What)
    gpus = models.PositiveIntegerField(help_text="that stand there")
    short_gpus = models.PositiveIntegerField(help_text="for which no others were found, at most at once")
    at = models.DateTimeField()

    objects = TenantQuerySet.as_manager()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["maintenance", "contract", "version"], name="maintenance_told_once")
        ]

    def __str__(self) -> str:
        return f"{self.contract_id} {self.what} of {self.maintenance_id}"


class Shortfall(models.Model):
    """`gpus` of a contract's own GPUs could not be had in [starts_at, ends_at), and no others stood in: for announced `maintenance`, or
    because `host` was out of work without any. Billing rates it.
    """

    maintenance = models.ForeignKey(Maintenance, null=True, on_delete=models.PROTECT, related_name="shortfalls")
    host = models.ForeignKey(Host, null=True, on_delete=models.PROTECT, related_name="shortfalls")
    contract = models.ForeignKey(Contract, on_delete=models.PROTECT, related_name="shortfalls")
    gpus = models.PositiveIntegerField()
    starts_at = models.DateTimeField()
    ends_at = models.DateTimeField(help_text="as planned, until its hosts are back")

    class Meta:
        constraints = [
            models.CheckConstraint(condition=Q(ends_at__gt=F("starts_at")), name="shortfall_window"),
            models.CheckConstraint(condition=Q(gpus__gt=0), name="shortfall_of_some"),
            models.CheckConstraint(
                condition=Q(maintenance__isnull=True, host__isnull=False)
                | Q(maintenance__isnull=False, host__isnull=True),
                name="shortfall_has_one_cause",
            ),
        ]
        indexes = [
            models.Index(fields=["contract", "starts_at"]),
            models.Index(fields=["ends_at"], condition=Q(host__isnull=False), name="shortfall_of_host"),
        ]

    def __str__(self) -> str:
        return f"{self.contract_id}: {self.gpus} GPUs {self.starts_at:%F %R} to {self.ends_at:%F %R}"


class CalendarFeed(TenantModel):
    """A secret address under which an organization's calendar of maintenance is read by a calendar program."""

    PREFIX = "cal"

    organization = models.ForeignKey(Organization, on_delete=models.CASCADE, related_name="calendar_feeds")
    name = models.CharField(max_length=60, help_text="who reads it")
    digest = models.CharField(max_length=64, unique=True, help_text="SHA-256 of the token, which is shown once")
    created_by = models.CharField(max_length=120)
    created_at = models.DateTimeField()
    last_used_at = models.DateTimeField(null=True, blank=True)
    revoked_at = models.DateTimeField(null=True, blank=True)

    objects = TenantQuerySet.as_manager()

    def __str__(self) -> str:
        return self.name
