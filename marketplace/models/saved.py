"""Searches that are kept and tell when something fits them."""

from django.contrib.postgres.fields import ArrayField
from django.contrib.postgres.indexes import GinIndex
from django.db import models
from django.db.models import Q

from marketplace.models.accounts import Organization, User
from marketplace.models.listings import Listing
from marketplace.tenancy import TenantModel, TenantQuerySet


class SavedSearch(TenantModel):
    """`gpu_models` and `regions` are what the filters name, or ANY alone: by these a change of the market finds the searches that
    it could concern. `filters` is read back whole, never asked about.
    """

    PREFIX = "sav"
    ANY = "*"

    class State(models.TextChoices):
        ACTIVE = "active"
        PAUSED = "paused"
        EXPIRED = "expired"

    TRANSITIONS = {
        "active": {"paused", "expired"},
        "paused": {"active", "expired"},
        "expired": {"active"},
    }

    class Cadence(models.TextChoices):
        AT_ONCE = "at_once"
        DAILY = "daily"

    organization = models.ForeignKey(Organization, on_delete=models.CASCADE, related_name="saved_searches")
    created_by = models.ForeignKey(
        User, null=True, on_delete=models.SET_NULL, related_name="+", help_text="gets the mail"
    )
    name = models.CharField(max_length=80)
    filters = models.JSONField(default=dict)
    sort = models.CharField(max_length=16, default="price")
    gpu_models = ArrayField(models.CharField(max_length=40))
    regions = ArrayField(models.CharField(max_length=40))
    window_ends = models.DateTimeField(null=True, help_text="of the filters; behind it nothing can fit")
    cadence = models.CharField(max_length=8, choices=Cadence, default=Cadence.AT_ONCE)
    pause_minutes = models.PositiveIntegerField(default=60, help_text="the least between two mails")
    state = models.CharField(max_length=8, choices=State, default=State.ACTIVE)
    created_at = models.DateTimeField()
    touched_at = models.DateTimeField(help_text="when somebody last looked at it or changed it")
    warned_at = models.DateTimeField(null=True, help_text="that it will expire")
    told_at = models.DateTimeField(null=True, help_text="of its newest notice")

    objects = TenantQuerySet.as_manager()

    class Meta:
        constraints = [
            models.CheckConstraint(condition=Q(state__in=("active", "paused", "expired")), name="saved_search_state")
        ]
        indexes = [
            models.Index(fields=["organization", "-id"]),
            GinIndex(fields=["gpu_models", "regions"], condition=Q(state="active"), name="saved_search_concerns"),
            models.Index(fields=["touched_at"], condition=Q(state="active"), name="saved_search_idle"),
        ]

    def __str__(self) -> str:
        return self.name


class SavedMatch(models.Model):
    """An offer that fits the search now; gone when it stops. Told at most once while it lasts."""

    search = models.ForeignKey(SavedSearch, on_delete=models.CASCADE, related_name="matches")
    listing = models.ForeignKey(Listing, on_delete=models.CASCADE, related_name="+")
    found_at = models.DateTimeField()
    told_at = models.DateTimeField(null=True, help_text="empty: a notice waits")

    class Meta:
        constraints = [models.UniqueConstraint(fields=["search", "listing"], name="saved_match_once")]
        indexes = [models.Index(fields=["search"], condition=Q(told_at__isnull=True), name="saved_match_waits")]

    def __str__(self) -> str:
        return f"{self.listing} fits {self.search}"


class SavedMoment(models.Model):
    """One row: up to which reading of the market (services.catalogue) saved searches have been compared with it."""

    moment = models.JSONField(null=True)
    at = models.DateTimeField()

    def __str__(self) -> str:
        return f"{self.at:%F %T}"
