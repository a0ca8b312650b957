"""What was asked of Stripe, and what it told us."""

from django.db import models
from django.db.models import Q
from django.db.models.functions import Now

from marketplace.models import Organization


class StripeCall(models.Model):
    """The idempotency key of a call, committed before the call is made, and its answer. What has none is repaired.

    Keys of invoices and payouts follow from their rows and stand here only when one was burnt.
    """

    key = models.CharField(max_length=120, unique=True)
    operation = models.CharField(max_length=40)
    organization = models.ForeignKey(Organization, null=True, on_delete=models.PROTECT, related_name="+")
    created_at = models.DateTimeField(db_default=Now())
    answered_at = models.DateTimeField(null=True)
    answer = models.CharField(max_length=500, blank=True, help_text="id or URL")
    error = models.CharField(max_length=200, blank=True)
    burnt = models.PositiveSmallIntegerField(
        default=0, help_text="500s answered under the key, which Stripe would replay"
    )

    def __str__(self) -> str:
        return self.key


class StripeEvent(models.Model):
    """Inserted once per event id; handled by re-fetching what it names."""

    event_id = models.CharField(max_length=64, unique=True)
    type = models.CharField(max_length=80)
    object_id = models.CharField(max_length=255, blank=True)
    livemode = models.BooleanField(default=False)
    event_created_at = models.DateTimeField()
    received_at = models.DateTimeField()
    handled_at = models.DateTimeField(null=True)
    attempts = models.PositiveIntegerField(default=0)
    last_error = models.CharField(max_length=200, blank=True)

    class Meta:
        indexes = [models.Index(fields=["id"], condition=Q(handled_at__isnull=True), name="stripe_event_waiting")]

    def __str__(self) -> str:
        return f"{self.event_id} {self.type}"
