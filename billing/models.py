"""Money: accounts, usage, prices, invoices, payments, payouts, the ledger, and what Stripe told us.

Append-only tables, immutable invoices and balanced transactions are held by triggers (migration 0002), not by manners.
Seconds are whole UTC seconds since 1970; amounts integer minor units; quantities of GPU time milli-GPU-seconds.
"""

from django.db import models
from django.db.models import F, Q
from django.db.models.functions import Now

from marketplace.models import Contract, Organization, Placement
from marketplace.tenancy import TenantModel, TenantQuerySet


class Meter(models.IntegerChoices):
    GPU = 1, "gpu_milli_seconds"
    ENERGY = 2, "energy_wh"
    STORAGE = 3, "storage_mib_seconds"
    EGRESS = 4, "egress_bytes"


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


class PriceVersion(models.Model):
    """A price from an instant on, in millionths of the major unit per GPU-hour. Immutable; a change is a new row."""

    class Kind(models.TextChoices):
        RATE = "rate"
        OVERAGE = "overage"

    contract = models.ForeignKey(Contract, on_delete=models.PROTECT, related_name="price_versions", db_index=False)
    kind = models.CharField(max_length=8, choices=Kind, default=Kind.RATE)
    valid_from_s = models.BigIntegerField()
    millionths = models.BigIntegerField()
    created_at = models.DateTimeField()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["contract", "kind", "valid_from_s"], name="price_version_once"),
            models.CheckConstraint(condition=Q(millionths__gte=0), name="price_not_negative"),
        ]

    def __str__(self) -> str:
        return f"{self.contract_id} {self.kind} {self.millionths}"


class UsageQuerySet(TenantQuerySet):
    tenant_paths = ("organization", "contract__operator")


class UsageRecord(TenantModel):
    """Append-only: `quantity` in `[start_s, end_s)`. A correction is the same interval with the next revision.

    `previous` is the quantity of the revision before, so that the sum of `quantity - previous` over all rows is what
    counts, without looking for the highest revision. No two rows of one placement, meter and revision overlap
    (exclusion constraint, migration 0002).
    """

    PREFIX = "usg"

    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="+", db_index=False)
    contract = models.ForeignKey(Contract, on_delete=models.PROTECT, related_name="usage", db_index=False)
    placement = models.ForeignKey(Placement, on_delete=models.PROTECT, related_name="usage", db_index=False)
    price_version = models.ForeignKey(PriceVersion, on_delete=models.PROTECT, related_name="+", db_index=False)
    meter = models.PositiveSmallIntegerField(choices=Meter, default=Meter.GPU)
    revision = models.PositiveSmallIntegerField(default=0)
    start_s = models.BigIntegerField()
    end_s = models.BigIntegerField()
    rate = models.BigIntegerField(help_text="quantity per second")
    quantity = models.BigIntegerField()
    previous = models.BigIntegerField(default=0)
    source = models.CharField(max_length=24)
    event_id = models.CharField(max_length=80)
    payload_digest = models.CharField(max_length=64)
    received_at = models.DateTimeField(db_default=Now())

    objects = UsageQuerySet.as_manager()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["source", "event_id"], name="usage_event_once"),
            models.CheckConstraint(condition=Q(end_s__gt=F("start_s")), name="usage_interval"),
            models.CheckConstraint(
                condition=Q(rate__gt=0, quantity__gte=0, previous__gte=0), name="usage_not_negative"
            ),
        ]
        indexes = [models.Index(fields=["organization", "start_s"], name="usage_of_organization")]

    def __str__(self) -> str:
        return f"{self.placement_id} [{self.start_s}, {self.end_s}) r{self.revision}"


class UsageQuarantine(models.Model):
    """Usage that names a placement we do not know, or that contradicts itself: kept, counted, looked at."""

    source = models.CharField(max_length=24)
    event_id = models.CharField(max_length=80)
    payload = models.JSONField()
    payload_digest = models.CharField(max_length=64)
    reason = models.CharField(max_length=200)
    received_at = models.DateTimeField(db_default=Now())
    settled_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["source", "event_id", "payload_digest"], name="quarantine_once")]

    def __str__(self) -> str:
        return f"{self.source}/{self.event_id}: {self.reason}"


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
            models.UniqueConstraint(fields=["account", "period_start", "period_end", "kind"], name="invoice_once"),
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
    """`quantity` milli-GPU-seconds of `contract` at one price version, rounded once; operator + platform = amount."""

    PREFIX = "ivl"

    class Kind(models.TextChoices):
        USAGE = "usage"
        COMMITMENT = "commitment"
        OVERAGE = "overage"

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
    description = models.CharField(max_length=200)

    objects = InvoiceLineQuerySet.as_manager()

    class Meta:
        ordering = ["invoice_id", "position"]
        constraints = [
            models.UniqueConstraint(fields=["invoice", "position"], name="invoice_line_once"),
            models.CheckConstraint(
                condition=Q(amount_minor=F("operator_minor") + F("platform_minor")), name="invoice_line_shared_out"
            ),
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


class LedgerAccount(models.Model):
    """A debit-positive account of one currency; per organization where `organization` is set."""

    class Code(models.TextChoices):
        RECEIVABLE = "receivable"
        UNBILLED = "unbilled"
        PREPAID = "prepaid"
        REVENUE = "revenue"
        PLATFORM_FEE = "platform_fee"
        OPERATOR_ACCRUED = "operator_accrued"
        OPERATOR_PAYABLE = "operator_payable"
        OPERATOR_RESERVE = "operator_reserve"
        TAX_PAYABLE = "tax_payable"
        STRIPE_CLEARING = "stripe_clearing"
        STRIPE_FEES = "stripe_fees"
        REFUNDS = "refunds"
        DISPUTES = "disputes"
        SLA_CREDIT = "sla_credit"
        BAD_DEBT = "bad_debt"
        HASHING_REVENUE = "hashing_revenue"
        ENERGY_COST = "energy_cost"

    code = models.CharField(max_length=20, choices=Code)
    organization = models.ForeignKey(Organization, null=True, on_delete=models.PROTECT, related_name="+")
    currency = models.CharField(max_length=3)

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["code", "organization", "currency"], name="ledger_account_once", nulls_distinct=False
            )
        ]

    def __str__(self) -> str:
        return f"{self.code} {self.organization_id or ''} {self.currency}"


class LedgerTransaction(models.Model):
    """A balanced set of postings, once per `key`. Checked at commit: the declared count, and zero per currency."""

    key = models.CharField(max_length=120, unique=True)
    kind = models.CharField(max_length=24)
    subject = models.CharField(max_length=80, blank=True, help_text="public id of what it is about")
    posting_count = models.PositiveIntegerField()
    at = models.DateTimeField()
    created_at = models.DateTimeField(db_default=Now(), db_index=True)

    def __str__(self) -> str:
        return self.key


class Posting(models.Model):
    transaction = models.ForeignKey(LedgerTransaction, on_delete=models.PROTECT, related_name="postings")
    account = models.ForeignKey(LedgerAccount, on_delete=models.PROTECT, related_name="postings")
    amount_minor = models.BigIntegerField(help_text="debit positive")

    class Meta:
        constraints = [models.CheckConstraint(condition=~Q(amount_minor=0), name="posting_not_zero")]

    def __str__(self) -> str:
        return f"{self.account_id}: {self.amount_minor}"


class LedgerBalance(models.Model):
    """A projection: the balance of all postings created before `through`. Rebuilt and compared by billing.reconcile."""

    account = models.OneToOneField(LedgerAccount, primary_key=True, on_delete=models.CASCADE, related_name="projection")
    through = models.DateTimeField()
    balance_minor = models.BigIntegerField()

    def __str__(self) -> str:
        return f"{self.account_id}: {self.balance_minor}"


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
