"""What is agreed: contracts with frozen terms, and the capacity they hold."""

from django.contrib.postgres.fields import ArrayField
from django.db import models
from django.db.models import F, Q

from marketplace.models.accounts import Organization
from marketplace.models.listings import Kind, Listing, Quote
from marketplace.models.sites import Cell, GpuModel, Host, Site
from marketplace.tenancy import TenantModel, TenantQuerySet


class ContractQuerySet(TenantQuerySet):
    tenant_paths = ("organization", "operator")


class Contract(TenantModel):
    """Prices, fee and terms are copies: a later edit of the listing never touches them."""

    PREFIX = "ctr"

    class State(models.TextChoices):
        PENDING_PAYMENT = "pending_payment"
        ACTIVE = "active"
        ENDING = "ending"
        ENDED = "ended"
        TERMINATED = "terminated"
        CANCELLED = "cancelled"
        DEFAULTED = "defaulted"

    TRANSITIONS = {
        "pending_payment": {"active", "cancelled"},
        "active": {"ending", "ended", "terminated", "defaulted"},
        "ending": {"ended", "terminated", "defaulted"},
        "ended": set(),
        "terminated": set(),
        "cancelled": set(),
        "defaulted": set(),
    }

    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="contracts")
    operator = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="sold_contracts")
    listing = models.ForeignKey(Listing, on_delete=models.PROTECT, related_name="contracts")
    quote = models.OneToOneField(Quote, null=True, on_delete=models.PROTECT, related_name="contract")
    site = models.ForeignKey(Site, on_delete=models.PROTECT, related_name="contracts")
    cell = models.ForeignKey(Cell, on_delete=models.PROTECT, related_name="contracts")
    kind = models.CharField(max_length=12, choices=Kind)
    gpu_model = models.ForeignKey(GpuModel, null=True, blank=True, on_delete=models.PROTECT)
    gpu_count = models.PositiveIntegerField(help_text="what is held, or the ceiling")
    starts_at = models.DateTimeField()
    ends_at = models.DateTimeField(null=True, blank=True)
    price = models.BigIntegerField(help_text="millionths of the major unit per GPU-hour")
    overage_price = models.BigIntegerField(null=True, blank=True)
    limit_price = models.BigIntegerField(null=True, blank=True)
    currency = models.CharField(max_length=3)
    fee_permille = models.PositiveIntegerField()
    eviction_notice_s = models.PositiveIntegerField(default=120)
    flexible_hours_per_month = models.PositiveIntegerField(default=0)
    flexible_notice_s = models.PositiveIntegerField(default=600)
    emergency_notice_s = models.PositiveIntegerField(
        null=True, blank=True, help_text="as its listing said when it was signed; empty: it never leaves for a call"
    )
    listing_version = models.PositiveIntegerField()
    terms = models.JSONField(help_text="the order form as agreed: every field of the listing and quote")
    state = models.CharField(max_length=16, choices=State, default=State.ACTIVE)
    reference = models.CharField(max_length=80, blank=True)
    metadata = models.JSONField(default=dict, blank=True)
    upfront_minor = models.BigIntegerField(default=0, help_text="due at signing; the commitment draws it down first")
    pay_by = models.DateTimeField(null=True, blank=True, help_text="until then what is due at signing is waited for")
    created_at = models.DateTimeField()
    began_at = models.DateTimeField(null=True, blank=True, help_text="its window has begun, and its customer was told")
    terminated_at = models.DateTimeField(
        null=True, blank=True, help_text="when somebody ended it before its agreed end"
    )
    ended_at = models.DateTimeField(null=True, blank=True)

    objects = ContractQuerySet.as_manager()

    class Meta:
        constraints = [
            models.CheckConstraint(
                condition=Q(
                    state__in=("pending_payment", "active", "ending", "ended", "terminated", "cancelled", "defaulted")
                ),
                name="contract_state",
            ),
            models.CheckConstraint(
                condition=Q(ends_at__isnull=True) | Q(ends_at__gt=F("starts_at")), name="contract_window"
            ),
        ]
        indexes = [
            models.Index(fields=["organization", "-created_at", "-id"]),
            models.Index(fields=["state", "ends_at"]),
        ]

    def __str__(self) -> str:
        return f"{self.public_id} {self.kind} {self.gpu_count} GPUs"

    @property
    def reservation(self) -> "Reservation":
        """Its own GPUs for its term: what stands in during maintenance is not among them, nor what else it holds while parts of it are
        offered or sold on.
        """
        found: Reservation = self.reservations.get(maintenance=None, piece=False)
        return found


class ContractEvent(models.Model):
    """Append-only."""

    contract = models.ForeignKey(Contract, on_delete=models.CASCADE, related_name="events")
    at = models.DateTimeField()
    actor = models.CharField(max_length=120)
    from_state = models.CharField(max_length=16, blank=True)
    to_state = models.CharField(max_length=16)
    reason = models.CharField(max_length=200, blank=True)

    class Meta:
        ordering = ["id"]

    def __str__(self) -> str:
        return f"{self.from_state} -> {self.to_state}"


class Reservation(models.Model):
    """Capacity held over a half-open window: for a quote (minutes), a contract (its term), or for maintenance, which takes hosts
    and may have other GPUs stand in for a contract's.
    """

    class State(models.TextChoices):
        HELD = "held"
        FIRM = "firm"
        RELEASED = "released"

    listing = models.ForeignKey(Listing, on_delete=models.PROTECT, related_name="reservations")
    quote = models.OneToOneField(Quote, null=True, on_delete=models.CASCADE, related_name="reservation")
    contract = models.ForeignKey(
        Contract,
        null=True,
        on_delete=models.CASCADE,
        related_name="reservations",
        related_query_name="reservation",
        db_index=False,
    )
    maintenance = models.ForeignKey(
        "marketplace.Maintenance", null=True, on_delete=models.CASCADE, related_name="reservations",
        help_text="what it takes (no contract), or GPUs that stand in meanwhile for those of a contract",
    )  # fmt: skip
    piece = models.BooleanField(
        default=False, db_default=False,
        help_text="one more of a contract, while parts of it are offered or sold on (services.forward.pieces)",
    )  # fmt: skip
    within = models.ForeignKey(
        "self", null=True, on_delete=models.CASCADE, related_name="held_inside",
        help_text="a hold on GPUs that this other reservation has set aside: it claims nothing by itself",
    )  # fmt: skip
    starts_at = models.DateTimeField()
    ends_at = models.DateTimeField()
    claims_at = models.DateTimeField(
        help_text="start less notice, grace and shed lead: from here on the GPUs are kept clear"
    )
    held_until = models.DateTimeField(null=True, help_text="of a quote's hold")
    state = models.CharField(max_length=10, choices=State)

    class Meta:
        constraints = [
            models.CheckConstraint(condition=Q(ends_at__gt=F("starts_at")), name="reservation_window"),
            models.UniqueConstraint(
                fields=["contract"],
                condition=Q(maintenance__isnull=True, piece=False),
                name="reservation_once_for_a_contract",
            ),
        ]
        indexes = [
            models.Index(fields=["listing", "state", "ends_at"]),
            models.Index(fields=["contract"], name="reservation_of_contract"),
        ]

    def __str__(self) -> str:
        return f"{self.starts_at:%F %R} to {self.ends_at:%F %R}"


class ReservationBlock(models.Model):
    """Which GPUs of which host a reservation holds."""

    reservation = models.ForeignKey(Reservation, on_delete=models.CASCADE, related_name="blocks")
    host = models.ForeignKey(Host, on_delete=models.PROTECT, related_name="reservation_blocks")
    gpu_indices = ArrayField(models.PositiveSmallIntegerField())

    class Meta:
        constraints = [models.UniqueConstraint(fields=["reservation", "host"], name="reservation_block_once")]

    def __str__(self) -> str:
        return f"{self.host}: {self.gpu_indices}"
