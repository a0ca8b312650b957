"""The forward market: what holders of contracts sell on, what buyers wait for, and what was sold."""

from django.db import models
from django.db.models import F, Q

from marketplace.models.accounts import Organization, User
from marketplace.models.contracts import Contract, Reservation
from marketplace.models.listings import Kind, Listing
from marketplace.models.sites import GpuModel, Site
from marketplace.tenancy import Actor, TenantModel, TenantQuerySet


class ResaleQuerySet(TenantQuerySet):
    tenant_paths = ("organization", "contract__operator")


class Resale(TenantModel):
    """GPUs of a contract in a window of it, offered to others. What is neither sold nor taken back is set aside in `reservation`.

    `listing` is how the market sees it: the terms that the contract froze, at the holder's price.
    """

    PREFIX = "rsl"

    class State(models.TextChoices):
        OPEN = "open"
        SOLD = "sold"
        WITHDRAWN = "withdrawn"
        EXPIRED = "expired"

    TRANSITIONS = {
        "open": {"sold", "withdrawn", "expired"},
        "sold": {"open", "expired"},  # its buyer did not pay
        "withdrawn": set(),
        "expired": set(),
    }

    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="resales")
    contract = models.ForeignKey(Contract, on_delete=models.PROTECT, related_name="resales")
    listing = models.OneToOneField(Listing, on_delete=models.PROTECT, related_name="resale")
    reservation = models.OneToOneField(Reservation, on_delete=models.PROTECT, related_name="resale")
    gpu_count = models.PositiveIntegerField()
    sold_gpus = models.PositiveIntegerField(default=0)
    starts_at = models.DateTimeField()
    ends_at = models.DateTimeField()
    expires_at = models.DateTimeField(help_text="what is unsold then goes back")
    price = models.BigIntegerField(help_text="millionths of the major unit per GPU-hour, asked of the buyer")
    fee_permille = models.PositiveIntegerField(help_text="the platform's part of that price")
    currency = models.CharField(max_length=3)
    state = models.CharField(max_length=10, choices=State, default=State.OPEN)
    created_at = models.DateTimeField()
    created_by = models.CharField(max_length=120)
    closed_at = models.DateTimeField(null=True, blank=True)
    reason = models.CharField(max_length=200, blank=True, help_text="why it was closed")

    objects = ResaleQuerySet.as_manager()

    class Meta:
        constraints = [
            models.CheckConstraint(condition=Q(ends_at__gt=F("starts_at")), name="resale_window"),
            models.CheckConstraint(condition=Q(sold_gpus__lte=F("gpu_count")), name="resale_not_oversold"),
            models.CheckConstraint(
                condition=Q(state__in=("open", "sold", "withdrawn", "expired")), name="resale_state"
            ),
            models.CheckConstraint(condition=Q(price__gt=0, fee_permille__lte=1000), name="resale_price"),
        ]
        indexes = [
            models.Index(fields=["expires_at"], condition=Q(state="open"), name="resale_open"),
            models.Index(fields=["contract", "ends_at"], name="resale_of_contract"),
        ]

    def __str__(self) -> str:
        return f"{self.gpu_count} GPUs of {self.contract_id}, {self.starts_at:%F %R} to {self.ends_at:%F %R}"

    @property
    def left(self) -> int:
        """GPUs still on offer."""
        return self.gpu_count - self.sold_gpus if self.state == self.State.OPEN else 0


class BidQuerySet(TenantQuerySet):
    tenant_paths = ("organization",)


class StandingBid(TenantModel):
    """What a buyer would take, and the most that he would pay, until it expires. It turns into quotes, and never into on-demand.

    The window begins between `earliest` and `latest` and lasts `duration_s`. `auto_accept` is a recorded consent to be bound at
    up to the limit; without it a quote waits for its buyer as any other.
    """

    PREFIX = "bid"

    class State(models.TextChoices):
        OPEN = "open"
        FILLED = "filled"
        CANCELLED = "cancelled"
        EXPIRED = "expired"

    TRANSITIONS = {
        "open": {"filled", "cancelled", "expired"},
        "filled": {"cancelled"},
        "cancelled": set(),
        "expired": set(),
    }

    organization = models.ForeignKey(Organization, on_delete=models.CASCADE, related_name="bids")
    created_by = models.ForeignKey(User, null=True, on_delete=models.SET_NULL, related_name="+")
    gpu_model = models.ForeignKey(GpuModel, on_delete=models.PROTECT, related_name="+", db_index=False)
    region = models.CharField(max_length=40)
    site = models.ForeignKey(Site, null=True, blank=True, on_delete=models.PROTECT, related_name="+")
    kind = models.CharField(max_length=12, choices=Kind, default=Kind.RESERVED)
    gpu_count = models.PositiveIntegerField()
    filled_gpus = models.PositiveIntegerField(default=0)
    min_gpus = models.PositiveIntegerField(help_text="the least that one quote may be of; all of it: nothing in parts")
    level = models.CharField(max_length=8, default="site")
    earliest = models.DateTimeField()
    latest = models.DateTimeField()
    duration_s = models.PositiveIntegerField()
    limit_price = models.BigIntegerField(help_text="millionths of the major unit per GPU-hour")
    currency = models.CharField(max_length=3)
    livemode = models.BooleanField(default=True)
    expires_at = models.DateTimeField()
    auto_accept = models.BooleanField(default=False)
    consent = models.JSONField(default=dict, blank=True, help_text="to auto_accept: who, when, in which words")
    state = models.CharField(max_length=10, choices=State, default=State.OPEN)
    created_at = models.DateTimeField()
    rests_until = models.DateTimeField(null=True, blank=True, help_text="it has a quote to answer, or let one lapse")
    tried_at = models.DateTimeField(null=True, blank=True, help_text="when it was last looked at")
    note = models.CharField(max_length=200, blank=True, help_text="what stands in its way, or what became of it")
    closed_at = models.DateTimeField(null=True, blank=True)
    reference = models.CharField(max_length=80, blank=True)
    metadata = models.JSONField(default=dict, blank=True)

    objects = BidQuerySet.as_manager()

    class Meta:
        constraints = [
            models.CheckConstraint(condition=Q(filled_gpus__lte=F("gpu_count")), name="bid_not_overfilled"),
            models.CheckConstraint(
                condition=Q(min_gpus__gte=1, min_gpus__lte=F("gpu_count"), limit_price__gt=0, duration_s__gt=0),
                name="bid_of_something",
            ),
            models.CheckConstraint(condition=Q(latest__gte=F("earliest")), name="bid_window"),
            models.CheckConstraint(condition=Q(state__in=("open", "filled", "cancelled", "expired")), name="bid_state"),
            models.CheckConstraint(condition=Q(kind__in=("reserved", "flexible")), name="bid_holds"),
        ]
        indexes = [
            # The line of one book, in the order in which it is served.
            models.Index(
                fields=["livemode", "gpu_model", "region", "-limit_price", "created_at", "id"],
                condition=Q(state="open"),
                name="bid_line",
            ),
            models.Index(fields=["expires_at"], condition=Q(state="open"), name="bid_expiring"),
        ]

    def __str__(self) -> str:
        return f"{self.gpu_count} GPUs at {self.limit_price} or less"

    @property
    def wanted(self) -> int:
        """GPUs that are still looked for."""
        return self.gpu_count - self.filled_gpus if self.state == self.State.OPEN else 0


class FillQuerySet(TenantQuerySet):
    tenant_paths = ("contract__organization", "resale__organization", "contract__operator")

    def public_to(self, actor: Actor) -> Q:
        """Time, price and count are public; the API's shape leaves out who (services.forward.book)."""
        return Q(livemode=actor.livemode)


class Fill(TenantModel):
    """A sale of the forward market: a resale that was bought, a standing bid that was met, or both at once."""

    PREFIX = "fil"

    contract = models.OneToOneField(Contract, on_delete=models.PROTECT, related_name="fill", help_text="the buyer's")
    resale = models.ForeignKey(Resale, null=True, on_delete=models.PROTECT, related_name="fills")
    bid = models.ForeignKey(StandingBid, null=True, on_delete=models.SET_NULL, related_name="fills")
    gpu_model = models.ForeignKey(GpuModel, null=True, on_delete=models.PROTECT, related_name="+", db_index=False)
    region = models.CharField(max_length=40)
    livemode = models.BooleanField(default=True)
    gpu_count = models.PositiveIntegerField()
    starts_at = models.DateTimeField()
    ends_at = models.DateTimeField()
    price = models.BigIntegerField()
    currency = models.CharField(max_length=3)
    at = models.DateTimeField()
    undone_at = models.DateTimeField(null=True, blank=True, help_text="its buyer did not pay")

    objects = FillQuerySet.as_manager()

    class Meta:
        constraints = [models.CheckConstraint(condition=Q(ends_at__gt=F("starts_at")), name="fill_window")]
        indexes = [models.Index(fields=["livemode", "gpu_model", "region", "-id"], name="fill_history")]

    def __str__(self) -> str:
        return f"{self.gpu_count} GPUs at {self.price}"
