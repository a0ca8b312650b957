"""Invoices, their lines, and how they are collected. Amounts are integer minor units."""

from django.db import models
from django.db.models import F, Q

from billing.models.accounts import BillingAccount
from billing.models.usage import Meter, PriceVersion
from marketplace.models import Contract, Organization, Resale
from marketplace.tenancy import TenantModel, TenantQuerySet


class InvoiceCounter(models.Model):
    """The last number a legal entity gave out. Locked by the UPDATE that takes the next: no gaps, ever."""

    legal_entity = models.CharField(max_length=80, primary_key=True)
    last_number = models.BigIntegerField(default=0)

    def __str__(self) -> str:
        return f"{self.legal_entity}: {self.last_number}"


class InvoiceQuerySet(TenantQuerySet):
    tenant_paths = ("organization",)


class Invoice(TenantModel):
    """Immutable from `open` on, but for its collection. `due_minor` is the total less the credit applied."""

    PREFIX = "ivc"

    class Kind(models.TextChoices):
        PERIOD = "period"
        INTERIM = "interim"
        UPFRONT = "upfront"

    class State(models.TextChoices):
        DRAFT = "draft"
        OPEN = "open"
        PAID = "paid"
        VOID = "void"
        UNCOLLECTIBLE = "uncollectible"

    TRANSITIONS = {
        "draft": {"open", "paid"},
        "open": {"paid", "void", "uncollectible"},
        "uncollectible": {"paid", "void"},
        "paid": set(),
        "void": set(),
    }

    account = models.ForeignKey(BillingAccount, on_delete=models.PROTECT, related_name="invoices")
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="invoices")
    kind = models.CharField(max_length=8, choices=Kind)
    state = models.CharField(max_length=14, choices=State, default=State.DRAFT)
    legal_entity = models.CharField(max_length=80)
    number = models.BigIntegerField(null=True, blank=True)
    period_start = models.DateTimeField()
    period_end = models.DateTimeField()
    currency = models.CharField(max_length=3)
    total_minor = models.BigIntegerField(default=0)
    credit_minor = models.BigIntegerField(
        default=0,
        help_text="total less due: credit applied or carried on; negative: carried here from earlier invoices",
    )
    due_minor = models.BigIntegerField(default=0)
    buyer = models.JSONField(default=dict, help_text="name and country as they were when it was issued")
    created_at = models.DateTimeField()
    finalized_at = models.DateTimeField(null=True, blank=True)
    # collection: the only part that still moves
    stripe_invoice = models.CharField(max_length=64, null=True, blank=True, unique=True)
    pay_url = models.URLField(max_length=500, blank=True, help_text="Stripe's page: pay, or confirm with the bank")
    pay_attempts = models.PositiveIntegerField(default=0)
    next_attempt_at = models.DateTimeField(null=True, blank=True)
    last_error = models.CharField(max_length=200, blank=True)
    mirrored_at = models.DateTimeField(null=True, blank=True)
    paid_at = models.DateTimeField(null=True, blank=True)

    objects = InvoiceQuerySet.as_manager()

    class Meta:
        ordering = ["-id"]
        constraints = [
            models.UniqueConstraint(
                fields=["account", "period_start", "period_end", "kind"],
                condition=~Q(kind="upfront"),
                name="invoice_once",
            ),
            models.UniqueConstraint(fields=["legal_entity", "number"], name="invoice_number_once"),
            models.CheckConstraint(condition=Q(period_end__gt=F("period_start")), name="invoice_period"),
            models.CheckConstraint(
                condition=Q(state="draft") | Q(number__isnull=False, finalized_at__isnull=False),
                name="invoice_numbered",
            ),
        ]
        indexes = [
            models.Index(fields=["organization", "-id"], name="invoice_of_organization"),
            models.Index(fields=["state", "next_attempt_at"], name="invoice_to_collect", condition=Q(state="open")),
        ]

    def __str__(self) -> str:
        return self.display_number or f"draft {self.pk}"

    @property
    def display_number(self) -> str:
        """`TR-000123`; empty before it is finalized."""
        return f"TR-{self.number:06d}" if self.number is not None else ""


class InvoiceLineQuerySet(TenantQuerySet):
    tenant_paths = ("invoice__organization", "operator")


class InvoiceLine(TenantModel):
    """`quantity` milli-GPU-seconds of `contract` at one price version, rounded once; operator + platform + seller = amount.

    `seller_minor` goes to the customer whose `resale` sold the capacity; his own invoice takes it from there (`resale`: a line
    below zero). What is paid at signing (`upfront`) and drawn down later is nobody's share: it is held until the commitment is billed.
    """

    PREFIX = "ivl"

    class Kind(models.TextChoices):
        USAGE = "usage"
        COMMITMENT = "commitment"
        OVERAGE = "overage"
        UPFRONT = "upfront"
        DRAWDOWN = "drawdown"
        RESALE = "resale"
        CREDIT = "credit"
        HELD_LOWER = "held_lower"

    HELD = ("upfront", "drawdown")

    invoice = models.ForeignKey(Invoice, on_delete=models.PROTECT, related_name="lines", db_index=False)
    position = models.PositiveIntegerField()
    contract = models.ForeignKey(Contract, on_delete=models.PROTECT, related_name="invoice_lines", db_index=False)
    operator = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="+", db_index=False)
    kind = models.CharField(max_length=10, choices=Kind)
    adjustment = models.BooleanField(default=False, help_text="usage of an earlier period that came or changed late")
    meter = models.PositiveSmallIntegerField(choices=Meter, default=Meter.GPU)
    price_version = models.ForeignKey(PriceVersion, on_delete=models.PROTECT, related_name="+", db_index=False)
    price_millionths = models.BigIntegerField()
    month_s = models.BigIntegerField(help_text="the UTC month it belongs to")
    start_s = models.BigIntegerField()
    end_s = models.BigIntegerField()
    quantity = models.BigIntegerField()
    amount_minor = models.BigIntegerField()
    operator_minor = models.BigIntegerField()
    platform_minor = models.BigIntegerField()
    resale = models.ForeignKey(Resale, null=True, on_delete=models.PROTECT, related_name="+")
    seller_minor = models.BigIntegerField(default=0)
    description = models.CharField(max_length=200)

    objects = InvoiceLineQuerySet.as_manager()

    class Meta:
        ordering = ["invoice_id", "position"]
        constraints = [
            models.UniqueConstraint(fields=["invoice", "position"], name="invoice_line_once"),
            models.CheckConstraint(
                condition=Q(kind__in=("upfront", "drawdown"), operator_minor=0, platform_minor=0, seller_minor=0)
                | (
                    ~Q(kind__in=("upfront", "drawdown"))
                    & Q(amount_minor=F("operator_minor") + F("platform_minor") + F("seller_minor"))
                ),
                name="invoice_line_shared_out",
            ),
            models.CheckConstraint(
                condition=Q(seller_minor=0) | Q(resale__isnull=False), name="invoice_line_seller_known"
            ),
            models.UniqueConstraint(fields=["contract"], condition=Q(kind="upfront"), name="invoice_line_one_upfront"),
        ]
        indexes = [models.Index(fields=["contract", "month_s"], name="invoice_line_of_contract")]

    def __str__(self) -> str:
        return self.description


class Payment(TenantModel):
    """One attempt to collect an invoice. Unique per payment intent: two webhooks never book one payment twice."""

    PREFIX = "pmt"

    class State(models.TextChoices):
        PENDING = "pending"
        REQUIRES_ACTION = "requires_action"
        SUCCEEDED = "succeeded"
        FAILED = "failed"

    invoice = models.ForeignKey(Invoice, on_delete=models.PROTECT, related_name="payments")
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="payments")
    attempt = models.PositiveIntegerField()
    state = models.CharField(max_length=16, choices=State, default=State.PENDING)
    amount_minor = models.BigIntegerField()
    currency = models.CharField(max_length=3)
    stripe_payment_intent = models.CharField(max_length=64, null=True, blank=True, unique=True)
    failure_code = models.CharField(max_length=60, blank=True)
    created_at = models.DateTimeField()
    settled_at = models.DateTimeField(null=True, blank=True)

    objects = TenantQuerySet.as_manager()

    class Meta:
        constraints = [models.UniqueConstraint(fields=["invoice", "attempt"], name="payment_attempt_once")]

    def __str__(self) -> str:
        return f"{self.invoice} #{self.attempt} {self.state}"


class DunningStep(models.Model):
    """A step of the dunning table taken for an invoice, once."""

    invoice = models.ForeignKey(Invoice, on_delete=models.PROTECT, related_name="dunning_steps")
    action = models.CharField(max_length=16)
    day = models.PositiveSmallIntegerField()
    taken_at = models.DateTimeField()

    class Meta:
        constraints = [models.UniqueConstraint(fields=["invoice", "day", "action"], name="dunning_step_once")]

    def __str__(self) -> str:
        return f"{self.invoice_id} day {self.day}: {self.action}"
