"""The books: accounts, balanced transactions, postings. Written by billing.ledger alone."""

from django.db import models
from django.db.models import Q
from django.db.models.functions import Now

from marketplace.models import Organization


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
        RESALE = "resale"
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
