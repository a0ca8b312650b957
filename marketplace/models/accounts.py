"""Who: people, organizations, memberships, keys, and what billing lets an organization do."""

from typing import Any, ClassVar

from django.contrib.auth.models import AbstractUser, BaseUserManager
from django.contrib.postgres.fields import ArrayField
from django.db import models
from django.db.models import Q
from django.db.models.functions import Lower

from marketplace.tenancy import ROLES, TenantModel, TenantQuerySet


class UserManager(BaseUserManager["User"]):
    """E-mail is the name."""

    use_in_migrations = True

    def create_user(self, email: str, password: str | None = None, **extra: Any) -> "User":
        user = self.model(email=self.normalize_email(email).lower(), **extra)
        user.set_password(password)
        user.save(using=self._db)
        return user

    def create_superuser(self, email: str, password: str | None = None, **extra: Any) -> "User":
        return self.create_user(email, password, is_staff=True, is_superuser=True, **extra)


class User(AbstractUser):
    # None takes an inherited field away, and the inherited manager asks for a username: the stubs know neither.
    username = None  # type: ignore[assignment]
    first_name = None  # type: ignore[assignment]
    last_name = None  # type: ignore[assignment]
    email = models.EmailField("e-mail", unique=True)
    name = models.CharField(max_length=120, blank=True)

    USERNAME_FIELD = "email"
    REQUIRED_FIELDS = []
    objects: ClassVar[UserManager] = UserManager()  # type: ignore[assignment]

    class Meta:
        constraints = [models.UniqueConstraint(Lower("email"), name="user_email_ci")]

    def __str__(self) -> str:
        return self.email

    def get_full_name(self) -> str:
        return self.name or self.email

    def get_short_name(self) -> str:
        return self.name or self.email.split("@")[0]


class OrganizationQuerySet(TenantQuerySet):
    tenant_paths = ("pk",)


class Organization(TenantModel):
    PREFIX = "org"

    class Verification(models.TextChoices):
        NEW = "new"
        VERIFIED = "verified"
        REFUSED = "refused"

    name = models.CharField(max_length=120)
    is_customer = models.BooleanField(default=True)
    is_operator = models.BooleanField(default=False)
    livemode = models.BooleanField(
        default=True, help_text="False: a test tenant, which sees only test cells and test money"
    )
    country = models.CharField(max_length=2, default="US")
    currency = models.CharField(max_length=3, default="USD")
    verification = models.CharField(max_length=16, choices=Verification, default=Verification.NEW)
    gpu_limit = models.PositiveIntegerField(default=1024, help_text="Most GPUs that may run or be held at once")
    is_house = models.BooleanField(
        default=False, editable=False, help_text="our own: its jobs verify hosts, for nothing"
    )
    fair_share_weight = models.PositiveIntegerField(default=1)
    created_at = models.DateTimeField(auto_now_add=True)

    objects = OrganizationQuerySet.as_manager()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["livemode"], condition=Q(is_house=True), name="organization_one_house")
        ]

    def __str__(self) -> str:
        return self.name


class Membership(TenantModel):
    PREFIX = "mem"
    Role = models.TextChoices("Role", [(r.upper(), r) for r in ROLES])  # type: ignore[call-overload]  # enum's functional form

    user = models.ForeignKey(User, on_delete=models.CASCADE, related_name="memberships")
    organization = models.ForeignKey(Organization, on_delete=models.CASCADE, related_name="memberships")
    role = models.CharField(max_length=16, choices=Role)
    created_at = models.DateTimeField(auto_now_add=True)

    objects = TenantQuerySet.as_manager()

    class Meta:
        constraints = [models.UniqueConstraint(fields=["user", "organization"], name="membership_once")]

    def __str__(self) -> str:
        return f"{self.user} in {self.organization} as {self.role}"


class Invitation(TenantModel):
    PREFIX = "inv"

    organization = models.ForeignKey(Organization, on_delete=models.CASCADE, related_name="invitations")
    email = models.EmailField()
    role = models.CharField(max_length=16, choices=Membership.Role)
    digest = models.CharField(max_length=64, unique=True, help_text="SHA-256 of the token; the token is shown once")
    expires_at = models.DateTimeField()
    accepted_at = models.DateTimeField(null=True, blank=True)
    created_at = models.DateTimeField(auto_now_add=True)

    objects = TenantQuerySet.as_manager()

    def __str__(self) -> str:
        return f"{self.email} to {self.organization}"


class ApiKey(TenantModel):
    PREFIX = "key"

    organization = models.ForeignKey(Organization, on_delete=models.CASCADE, related_name="api_keys")
    name = models.CharField(max_length=80)
    prefix = models.CharField(max_length=16, unique=True, help_text="The first characters, to recognise it by")
    digest = models.CharField(max_length=64, unique=True, help_text="SHA-256 of the whole key; the key is shown once")
    scopes = ArrayField(models.CharField(max_length=32))
    created_by = models.ForeignKey(User, null=True, on_delete=models.SET_NULL, related_name="+")
    created_at = models.DateTimeField(auto_now_add=True)
    expires_at = models.DateTimeField(null=True, blank=True)
    revoked_at = models.DateTimeField(null=True, blank=True)
    last_used_at = models.DateTimeField(null=True, blank=True)

    objects = TenantQuerySet.as_manager()

    def __str__(self) -> str:
        return f"{self.name} ({self.prefix}...)"


class BillingStanding(models.Model):
    """The one row by which accept, submit and commit learn about money. Written by billing through services.accounts."""

    class State(models.TextChoices):
        NO_CARD = "no_card"
        GOOD = "good"
        PAST_DUE = "past_due"
        SUSPENDED = "suspended"

    organization = models.OneToOneField(
        Organization, primary_key=True, on_delete=models.CASCADE, related_name="standing"
    )
    state = models.CharField(max_length=16, choices=State, default=State.NO_CARD)
    available_minor = models.BigIntegerField(default=0)
    updated_at = models.DateTimeField()

    objects = TenantQuerySet.as_manager()

    def __str__(self) -> str:
        return f"{self.organization}: {self.state}"


class AuditEvent(models.Model):
    """Append-only: who did what to which object, before and after."""

    organization = models.ForeignKey(Organization, null=True, on_delete=models.CASCADE, related_name="audit_events")
    at = models.DateTimeField(db_index=True)
    actor = models.CharField(max_length=120)
    verb = models.CharField(max_length=64)
    subject = models.CharField(max_length=80, db_index=True)
    before = models.JSONField(null=True)
    after = models.JSONField(null=True)

    objects = TenantQuerySet.as_manager()

    def __str__(self) -> str:
        return f"{self.at:%F %T} {self.actor} {self.verb} {self.subject}"
