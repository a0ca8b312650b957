"""Money: accounts, usage, prices, invoices, payments, payouts, the ledger, and what Stripe told us.

Append-only tables, immutable invoices and balanced transactions are held by triggers (migration 0002), not by manners.
Seconds are whole UTC seconds since 1970; amounts integer minor units; quantities of GPU time milli-GPU-seconds.
"""

from billing.models.accounts import BillingAccount, BillingCase, OperatorAccount
from billing.models.invoices import DunningStep, Invoice, InvoiceCounter, InvoiceLine, Payment
from billing.models.ledger import LedgerAccount, LedgerBalance, LedgerTransaction, Posting
from billing.models.payouts import Payout, PayoutLine
from billing.models.stripe import StripeCall, StripeEvent
from billing.models.usage import Meter, PriceVersion, UsageQuarantine, UsageRecord

__all__ = [
    "BillingAccount",
    "BillingCase",
    "DunningStep",
    "Invoice",
    "InvoiceCounter",
    "InvoiceLine",
    "LedgerAccount",
    "LedgerBalance",
    "LedgerTransaction",
    "Meter",
    "OperatorAccount",
    "Payment",
    "Payout",
    "PayoutLine",
    "Posting",
    "PriceVersion",
    "StripeCall",
    "StripeEvent",
    "UsageQuarantine",
    "UsageRecord",
]
