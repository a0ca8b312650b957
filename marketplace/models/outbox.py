"""What must happen after a commit, and what an idempotency key answered."""

from django.db import models
from django.db.models import Q

from marketplace.models.accounts import Organization
from marketplace.tenancy import TenantQuerySet


class OutboxMessage(models.Model):
    """Written in the transaction of its cause; claimed with SKIP LOCKED; deleted when handled (marketplace.outbox)."""

    topic = models.CharField(max_length=60)
    key = models.CharField(
        max_length=120, blank=True, help_text="with one, a second unclaimed message of the topic is the same message"
    )
    payload = models.JSONField(default=dict)
    created_at = models.DateTimeField(auto_now_add=True)
    available_at = models.DateTimeField()
    claimed_until = models.DateTimeField(null=True)
    attempts = models.PositiveIntegerField(default=0)
    last_error = models.TextField(blank=True)
    parked_at = models.DateTimeField(null=True, help_text="gave up; a person must look")

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["topic", "key"],
                condition=Q(claimed_until__isnull=True, parked_at__isnull=True) & ~Q(key=""),
                name="outbox_coalesced",
            )
        ]
        indexes = [
            models.Index(fields=["topic", "available_at"], condition=Q(parked_at__isnull=True), name="outbox_due")
        ]

    def __str__(self) -> str:
        return f"{self.topic} {self.key}"


class IdempotencyKey(models.Model):
    organization = models.ForeignKey(Organization, on_delete=models.CASCADE, related_name="+")
    key = models.CharField(max_length=120)
    route = models.CharField(max_length=200)
    body_digest = models.CharField(max_length=64)
    status = models.PositiveSmallIntegerField()
    body = models.JSONField(null=True)
    created_at = models.DateTimeField()

    objects = TenantQuerySet.as_manager()

    class Meta:
        constraints = [models.UniqueConstraint(fields=["organization", "key"], name="idempotency_key_once")]

    def __str__(self) -> str:
        return self.key
