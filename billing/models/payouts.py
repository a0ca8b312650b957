"""Transfers of the operators' shares."""

from django.db import models
from django.db.models import Q

from billing.models.invoices import InvoiceLine
from marketplace.models import Organization
from marketplace.tenancy import TenantModel, TenantQuerySet


class Payout(TenantModel):
    """One transfer to an operator: the operator's share of paid invoice lines."""

    PREFIX = "pyo"

    class State(models.TextChoices):
        PENDING = "pending"
        SENT = "sent"
        FAILED = "failed"

    TRANSITIONS = {"pending": {"sent", "failed"}, "failed": {"pending"}, "sent": set()}

    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="payouts")
    currency = models.CharField(max_length=3)
    amount_minor = models.BigIntegerField()
    state = models.CharField(max_length=8, choices=State, default=State.PENDING)
    attempt = models.PositiveIntegerField(default=1, help_text="part of Stripe's idempotency key")
    stripe_transfer = models.CharField(max_length=64, null=True, blank=True, unique=True)
    last_error = models.CharField(max_length=200, blank=True)
    created_at = models.DateTimeField()
    sent_at = models.DateTimeField(null=True, blank=True)

    objects = TenantQuerySet.as_manager()

    class Meta:
        ordering = ["-id"]
        constraints = [models.CheckConstraint(condition=Q(amount_minor__gt=0), name="payout_positive")]

    def __str__(self) -> str:
        return f"{self.public_id} {self.amount_minor} {self.currency}"


class PayoutLineQuerySet(TenantQuerySet):
    tenant_paths = ("payout__organization",)


class PayoutLine(models.Model):
    """Which invoice line a payout settles; each once (the key says so)."""

    payout = models.ForeignKey(Payout, on_delete=models.PROTECT, related_name="lines")
    invoice_line = models.OneToOneField(InvoiceLine, on_delete=models.PROTECT, related_name="payout_line")
    amount_minor = models.BigIntegerField()

    objects = PayoutLineQuerySet.as_manager()

    def __str__(self) -> str:
        return f"{self.payout_id}: {self.amount_minor}"
