"""Who buys and who is paid, and what a person must look at."""

from django.db import models
from django.db.models import Q

from marketplace.models import Organization
from marketplace.tenancy import TenantModel, TenantQuerySet


class BillingAccount(TenantModel):
    """One per organization that buys. `billed_through`: every second before it is on an invoice."""

    PREFIX = "bac"

    class State(models.TextChoices):
        OPEN = "open"
        PARKED = "parked"
        CLOSED = "closed"

    class Dunning(models.TextChoices):
        NONE = "none"
        PAST_DUE = "past_due"
        SUSPENDED = "suspended"

    organization = models.OneToOneField(Organization, on_delete=models.PROTECT, related_name="billing_account")
    currency = models.CharField(max_length=3)
    state = models.CharField(max_length=8, choices=State, default=State.OPEN)
    dunning = models.CharField(max_length=10, choices=Dunning, default=Dunning.NONE)
    credit_limit_minor = models.BigIntegerField(default=1_000_000)
    stripe_customer = models.CharField(max_length=64, null=True, blank=True, unique=True)
    payment_method = models.CharField(max_length=64, blank=True, help_text="Stripe's id of the default card")
    card_brand = models.CharField(max_length=20, blank=True)
    card_last4 = models.CharField(max_length=4, blank=True)
    card_expires = models.CharField(max_length=7, blank=True, help_text="YYYY-MM")
    billed_through = models.DateTimeField(null=True, blank=True)
    usage_cutoff = models.DateTimeField(null=True, blank=True, help_text="usage received after it may be late")
    created_at = models.DateTimeField()

    objects = TenantQuerySet.as_manager()

    def __str__(self) -> str:
        return f"{self.organization} ({self.currency})"


class OperatorAccount(TenantModel):
    """An operator at Stripe (Accounts v2, recipient)."""

    PREFIX = "opa"

    organization = models.OneToOneField(Organization, on_delete=models.PROTECT, related_name="operator_account")
    currency = models.CharField(max_length=3)
    stripe_account = models.CharField(max_length=64, null=True, blank=True, unique=True)
    transfers_enabled = models.BooleanField(default=False)
    created_at = models.DateTimeField()
    checked_at = models.DateTimeField(null=True, blank=True)

    objects = TenantQuerySet.as_manager()

    def __str__(self) -> str:
        return f"{self.organization} {self.stripe_account or '(not onboarded)'}"


class BillingCase(TenantModel):
    """Something a person must look at: a parked account, a total that differs, books that do not agree."""

    PREFIX = "bcs"

    class Kind(models.TextChoices):
        PARKED = "parked"
        MIRROR = "mirror"
        LEDGER = "ledger"
        RECONCILE = "reconcile"
        USAGE = "usage"

    kind = models.CharField(max_length=12, choices=Kind)
    organization = models.ForeignKey(Organization, null=True, on_delete=models.PROTECT, related_name="billing_cases")
    subject = models.CharField(max_length=80)
    detail = models.TextField()
    opened_at = models.DateTimeField()
    closed_at = models.DateTimeField(null=True, blank=True)
    closed_by = models.CharField(max_length=120, blank=True)

    objects = TenantQuerySet.as_manager()

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["kind", "subject"], condition=Q(closed_at__isnull=True), name="billing_case_once_open"
            )
        ]

    def __str__(self) -> str:
        return f"{self.kind} {self.subject}"
