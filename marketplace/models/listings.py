"""What is offered: listings and quotes."""

from typing import Any

from django.db import models
from django.db.models import F, Q

from marketplace.models.accounts import Organization, User
from marketplace.models.sites import GpuModel, Host, Site
from marketplace.tenancy import Actor, TenantModel, TenantQuerySet


class Kind(models.TextChoices):
    ON_DEMAND = "on_demand"
    RESERVED = "reserved"
    FLEXIBLE = "flexible"
    SPOT = "spot"


PRICE_COLUMNS: dict[str, str] = {
    Kind.ON_DEMAND: "on_demand_price",
    Kind.RESERVED: "reserved_price",
    Kind.FLEXIBLE: "flexible_price",
    Kind.SPOT: "spot_floor",
}


class ListingQuerySet(TenantQuerySet):
    def public_to(self, actor: Actor) -> Q:
        """Published offers of the same mode are everybody's; those for partners only the named ones'."""
        shown = Q(state="published", site__cell__livemode=actor.livemode)
        if actor.organization_id is None:
            return shown & Q(visibility="public")
        # A subquery, not a join: a row is shown once, whoever else is named.
        named = Listing.objects.filter(partners=actor.organization_id)
        return shown & (Q(visibility="public") | Q(pk__in=named.values("pk")))


def hosts_behind(listing: Any, *, is_resale: bool) -> models.QuerySet[Host]:
    """`Listing.offered_hosts` of a listing, its id, or a slot for it."""
    path = "reservation_blocks__reservation__resale__listing" if is_resale else "listing"
    return Host.objects.filter(**{path: listing}).exclude(state=Host.State.RETIRED).distinct()


class Listing(TenantModel):
    PREFIX = "lst"

    class State(models.TextChoices):
        DRAFT = "draft"
        PUBLISHED = "published"
        PAUSED = "paused"
        RETIRED = "retired"

    TRANSITIONS = {
        "draft": {"published", "retired"},
        "published": {"paused", "retired"},
        "paused": {"published", "retired"},
        "retired": set(),
    }

    class Visibility(models.TextChoices):
        PUBLIC = "public"
        PARTNERS = "partners"

    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="listings")
    site = models.ForeignKey(Site, on_delete=models.PROTECT, related_name="listings")
    gpu_model = models.ForeignKey(
        GpuModel, null=True, blank=True, on_delete=models.PROTECT, help_text="empty: a mixed pool"
    )
    title = models.CharField(max_length=120)
    description = models.TextField(blank=True)
    state = models.CharField(max_length=12, choices=State, default=State.DRAFT)
    visibility = models.CharField(max_length=12, choices=Visibility, default=Visibility.PUBLIC)
    partners = models.ManyToManyField(Organization, blank=True, related_name="+")
    currency = models.CharField(max_length=3, default="USD")
    # prices in millionths of the major unit per GPU-hour; empty: this kind is not offered
    on_demand_price = models.BigIntegerField(null=True, blank=True)
    reserved_price = models.BigIntegerField(null=True, blank=True)
    flexible_price = models.BigIntegerField(null=True, blank=True)
    spot_floor = models.BigIntegerField(null=True, blank=True)
    min_gpus = models.PositiveIntegerField(default=1, help_text="minimum chunk")
    min_term_hours = models.PositiveIntegerField(default=1)
    max_term_days = models.PositiveIntegerField(default=365)
    upfront_permille = models.PositiveIntegerField(
        default=0, help_text="of a reserved or flexible commitment, due at signing"
    )
    price_tiers = models.JSONField(
        default=list, blank=True, help_text="other prices of what holds capacity, as services.price_tiers reads them"
    )
    eviction_notice_s = models.PositiveIntegerField(default=120)
    flexible_hours_per_month = models.PositiveIntegerField(default=40)
    flexible_notice_s = models.PositiveIntegerField(default=600)
    emergency_notice_s = models.PositiveIntegerField(
        null=True, blank=True,
        help_text="in a grid emergency firm jobs may be asked to leave, last of all, so long after it was announced; empty: never",
    )  # fmt: skip
    maintenance_hours_per_month = models.PositiveIntegerField(
        default=4,
        help_text="of announced maintenance that a firm contract bears; beyond it reserved time is not charged",
    )
    available_from = models.DateTimeField(null=True, blank=True)
    available_until = models.DateTimeField(null=True, blank=True)
    interconnect = models.CharField(max_length=40, blank=True)
    fabric_gbps = models.PositiveIntegerField(default=0)
    runtime = models.CharField(max_length=24, default="process", help_text="as its site's agent says")
    version = models.PositiveIntegerField(default=1)
    is_resale = models.BooleanField(
        default=False, db_default=False, help_text="a customer's offer of part of a contract, see Resale"
    )
    published_at = models.DateTimeField(null=True, blank=True)
    created_at = models.DateTimeField(auto_now_add=True)

    objects = ListingQuerySet.as_manager()

    def __str__(self) -> str:
        return self.title

    def offered_hosts(self) -> models.QuerySet[Host]:
        """Hosts that stand behind the offer, in service or not: its own, or those on which a resale has GPUs set aside."""
        return hosts_behind(self, is_resale=self.is_resale)

    def price_of(self, kind: str) -> int | None:
        """The plain price, millionths of the major unit per GPU-hour; None where the kind is not offered."""
        found: int | None = getattr(self, PRICE_COLUMNS[kind])
        return found


class Quote(TenantModel):
    """A price firm for 15 minutes with capacity held for 2. Its hold, where it has one, is a Reservation."""

    PREFIX = "quo"

    class State(models.TextChoices):
        OPEN = "open"
        ACCEPTED = "accepted"
        EXPIRED = "expired"
        RELEASED = "released"

    organization = models.ForeignKey(Organization, on_delete=models.CASCADE, related_name="quotes")
    listing = models.ForeignKey(Listing, on_delete=models.PROTECT, related_name="quotes")
    created_by = models.ForeignKey(User, null=True, on_delete=models.SET_NULL, related_name="+")
    bid = models.ForeignKey("StandingBid", null=True, on_delete=models.SET_NULL, related_name="quotes")
    kind = models.CharField(max_length=12, choices=Kind)
    gpu_count = models.PositiveIntegerField()
    level = models.CharField(max_length=8, default="site", help_text="all GPUs in one host, leaf, spine or site")
    starts_at = models.DateTimeField()
    ends_at = models.DateTimeField(null=True, blank=True)
    price = models.BigIntegerField(help_text="millionths of the major unit per GPU-hour")
    overage_price = models.BigIntegerField(null=True, blank=True)
    limit_price = models.BigIntegerField(null=True, blank=True, help_text="spot: the buyer's limit")
    upfront_max_permille = models.PositiveIntegerField(
        null=True, blank=True, help_text="as asked: at most so much due at signing; empty: as the plain price"
    )
    flexible_hours_max = models.PositiveIntegerField(
        null=True, blank=True, help_text="as asked: at most so many hours a month; empty: as the plain price"
    )
    currency = models.CharField(max_length=3)
    fee_permille = models.PositiveIntegerField(help_text="the platform's part of the price")
    total_minor = models.BigIntegerField(
        null=True, blank=True, help_text="of the commitment, in minor units; empty: by use"
    )
    listing_version = models.PositiveIntegerField(default=0, help_text="of the listing, when it was quoted")
    terms = models.JSONField(default=dict, help_text="the listing's terms as quoted: a contract is made of these")
    state = models.CharField(max_length=12, choices=State, default=State.OPEN)
    created_at = models.DateTimeField()
    held_until = models.DateTimeField(null=True, blank=True)
    firm_until = models.DateTimeField()
    reference = models.CharField(max_length=80, blank=True)
    metadata = models.JSONField(default=dict, blank=True)

    objects = TenantQuerySet.as_manager()

    class Meta:
        constraints = [
            models.CheckConstraint(
                condition=Q(ends_at__isnull=True) | Q(ends_at__gt=F("starts_at")), name="quote_window"
            )
        ]
        indexes = [models.Index(fields=["organization", "state"])]

    def __str__(self) -> str:
        return f"{self.gpu_count} GPUs of {self.listing}"


class OfferChange(models.Model):
    """Something that a search shows has changed. Written by triggers, read and pruned by services.catalogue."""

    pk = models.CompositePrimaryKey("changed_in", "what", "row_id")
    changed_in = models.BigIntegerField(help_text="the transaction")
    what = models.PositiveSmallIntegerField(
        help_text="as in services.catalogue: everything, listing, host, site, model"
    )
    row_id = models.BigIntegerField()

    def __str__(self) -> str:
        return f"{self.what} {self.row_id} in {self.changed_in}"


class OfferFloor(models.Model):
    """One row: changes of transactions below `floor` are pruned; `next_floor` is what it will be a round later."""

    floor = models.BigIntegerField(default=0)
    next_floor = models.BigIntegerField(default=0)
    at = models.DateTimeField()

    def __str__(self) -> str:
        return f"{self.floor} at {self.at:%F %T}"
