"""Imports every module that registers routes."""

from importlib import import_module

MODULES = (
    "events",
    "customers",
    "payment_methods",
    "setup_intents",
    "charges",
    "payment_intents",
    "invoice_items",
    "invoices",
    "invoice_pay",
    "refunds",
    "credit_notes",
    "disputes",
    "balance",
    "transfers",
    "payouts",
    "topups",
    "accounts",
    "tax",
    "checkout",
    "portal",
)


def load() -> None:
    for name in MODULES:
        import_module(f"sandbox.stripe.{name}")
