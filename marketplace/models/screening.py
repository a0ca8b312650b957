"""Whether an organization may be dealt with: what it tells of itself, the checks of it, and every word said in them."""

from django.contrib.postgres.fields import ArrayField
from django.db import models
from django.db.models import Q

from marketplace.models.accounts import Organization
from marketplace.tenancy import TenantModel, TenantQuerySet


class BusinessProfile(models.Model):
    """What an organization tells of itself for its screening. Its own people and ours see it, nobody else."""

    organization = models.OneToOneField(
        Organization, primary_key=True, on_delete=models.CASCADE, related_name="business_profile"
    )
    legal_name = models.CharField(max_length=160)
    registration_number = models.CharField(max_length=60)
    address = models.CharField(max_length=300)
    website = models.URLField(max_length=200, blank=True)
    beneficial_owners = ArrayField(
        models.CharField(max_length=160), help_text="people who own or control a quarter of it or more"
    )
    end_use = models.CharField(max_length=500, help_text="what the GPUs are used for")
    end_use_countries = ArrayField(models.CharField(max_length=2), help_text="where its results are used, ISO 3166")
    updated_at = models.DateTimeField()
    updated_by = models.CharField(max_length=120)

    objects = TenantQuerySet.as_manager()

    def __str__(self) -> str:
        return self.legal_name


class Screening(TenantModel):
    """One check of an organization, as it stands. A question is asked anew each `round`; an answer counts for its own round alone."""

    PREFIX = "scr"

    class Kind(models.TextChoices):
        BUSINESS = "business"
        SANCTIONS = "sanctions"
        EXPORT = "export"

    class State(models.TextChoices):
        PENDING = "pending"
        CLEAR = "clear"
        REVIEW = "review"
        REJECTED = "rejected"
        EXPIRED = "expired"

    TRANSITIONS = {
        "pending": {"clear", "review", "rejected"},
        "clear": {"pending", "review", "rejected", "expired"},
        "review": {"pending", "clear", "rejected"},
        "rejected": {"clear"},  # by a person alone: a rejected organization does not rename itself out of it
        "expired": {"pending", "clear", "review", "rejected"},
    }

    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="screenings")
    kind = models.CharField(max_length=10, choices=Kind)
    state = models.CharField(max_length=8, choices=State, default=State.PENDING)
    round = models.PositiveIntegerField(default=1, help_text="of questions: grows with each")
    version = models.PositiveIntegerField(
        default=1, help_text="grows with each change: who decides names what they saw"
    )
    facts = models.JSONField(default=dict, help_text="what the question is about, as the organization told it")
    provider = models.CharField(max_length=40, blank=True)
    provider_version = models.CharField(max_length=64, blank=True, help_text="of its lists, where it names one")
    ticket = models.CharField(max_length=120, blank=True, help_text="the provider's own name of the open question")
    ask_at = models.DateTimeField(null=True, help_text="when the provider is asked (again); null: nothing is asked")
    asked_at = models.DateTimeField(null=True, help_text="since when the round's question is open")
    failures = models.PositiveIntegerField(default=0, help_text="in a row")
    last_error = models.CharField(max_length=200, blank=True)
    needs_person = models.BooleanField(default=False, help_text="one of our own people decides")
    message = models.CharField(max_length=300, blank=True, help_text="what the organization is told or asked")
    proposed = models.CharField(max_length=8, blank=True, help_text="by the first of two who decide")
    proposed_by = models.CharField(max_length=120, blank=True)
    decided_by = models.CharField(max_length=120, blank=True)
    changed_at = models.DateTimeField(help_text="of the state")
    renew_at = models.DateTimeField(null=True, help_text="clear: when it is asked again")
    valid_until = models.DateTimeField(null=True, help_text="clear: until then")

    objects = TenantQuerySet.as_manager()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["organization", "kind"], name="screening_once"),
            models.CheckConstraint(
                condition=Q(state__in=("pending", "clear", "review", "rejected", "expired")), name="screening_state"
            ),
            models.CheckConstraint(
                condition=~Q(state="clear") | Q(valid_until__isnull=False), name="screening_clear_for_a_time"
            ),
        ]
        indexes = [
            models.Index(fields=["ask_at"], condition=Q(ask_at__isnull=False), name="screening_due"),
            models.Index(fields=["renew_at"], condition=Q(state="clear"), name="screening_renewal"),
            models.Index(fields=["changed_at"], condition=Q(needs_person=True), name="screening_queue"),
        ]

    def __str__(self) -> str:
        return f"{self.kind} of {self.organization}: {self.state}"


class ScreeningEvent(models.Model):
    """Append-only (a trigger refuses changes): what was asked, answered and decided, by whom, and on what evidence."""

    screening = models.ForeignKey(Screening, on_delete=models.PROTECT, related_name="events")
    at = models.DateTimeField()
    actor = models.CharField(max_length=120)
    what = models.CharField(max_length=16)
    from_state = models.CharField(max_length=8)
    to_state = models.CharField(max_length=8)
    round = models.PositiveIntegerField()
    reason = models.CharField(max_length=500, blank=True)
    evidence = models.JSONField(default=dict, help_text="for our own people")

    class Meta:
        ordering = ["id"]

    def __str__(self) -> str:
        return f"{self.what}: {self.from_state} -> {self.to_state}"
